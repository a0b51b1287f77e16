"""What has to be the same when a run goes on with ``--resume``; each difference is one sentence."""

from pathlib import Path
from typing import TYPE_CHECKING

from glare.errors import UserError, shortened
from glare.recipes import to_dict
from glare.typed_values import written
from glare.yaml_files import flatten, read_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAY_DIFFER_ON_RESUME = frozenset(
    {
        "checkpoint_every",
        "compile",
        "device",
        "epochs",
        "gradient_accumulation_steps",
        "keep_checkpoints",
        "log_every",
        "num_workers",
        "output",
        "report_to",
        "resume",
        "shard",
        "steps",
        "strict",
    }
)
"""Recipe keys that may change between a run and its ``--resume``."""


def check_same_recipe(file: Path, recipe: "DataclassInstance", may_differ: frozenset[str]) -> list[str]:
    """What changed of the keys ``may_differ``; UserError where the recipes differ in another key that matters."""
    old, new = flatten(read_mapping(file)), flatten(to_dict(recipe))
    changes = {
        name: f"{name} was {written(old.get(name))} and is {written(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name.split(".")[0] not in MAY_DIFFER_ON_RESUME
    }
    wrong = [text for name, text in changes.items() if name not in may_differ]
    if wrong:
        raise UserError(
            f"the run in {file.parent} has another recipe: {'; '.join(wrong)}; "
            "give --resume with the old values, or another --output without it"
        )
    return list(changes.values())


def check_same_images(run: Path, old: list[str] | None, new: list[str] | None) -> None:
    """UserError where a checkpoint was made with other images; one that does not know them is taken as it is."""
    if old is None or new is None or old == new:
        return
    more, fewer = (_some(sorted(set(one) - set(other))) for one, other in ((new, old), (old, new)))
    found = [text for text in (more and f"{more} came in", fewer and f"{fewer} dropped out") if text]
    raise UserError(
        f"the run in {run} was made with other images: {', '.join(found) or 'they have another order'}; "
        "give --resume with the images as they were, or another --output without it"
    )


def _some(names: list[str]) -> str:
    """How many names there are, and the first three; nothing for none."""
    listed = ", ".join(map(shortened, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({listed})" if names else ""


def check_steps(run: Path, done: int, asked: int | None) -> None:
    """UserError where a run is to end before its last checkpoint."""
    if asked is not None and done > asked:
        raise UserError(
            f"the last checkpoint in {run} has {done} steps, more than the {asked} that were asked for (--steps or "
            f"--epochs); give --resume with --steps {done} or more, or another --output without it"
        )
