"""What has to be the same when a run goes on with ``--resume``; each difference is one sentence."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glare.errors import UserError, shortened
from glare.recipes import to_dict
from glare.typed_values import written
from glare.yaml_files import flatten, read_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHANGE_NO_RESULT = frozenset(
    {
        "checkpoint_every",
        "compile",
        "device",
        "keep_checkpoints",
        "log_every",
        "num_workers",
        "output",
        "report_to",
        "resume",
        "shard",
        "strict",
    }
)
"""Recipe keys that do not change what a run comes to."""

MAY_DIFFER_ON_RESUME = CHANGE_NO_RESULT | {"epochs", "gradient_accumulation_steps", "steps"}
"""Recipe keys that may change between a training and its ``--resume``, where no batch norm sees parts of a batch."""

PLACES = frozenset({"backbone", "data", "model", "val_data"})
"""Recipe keys that a process may have for itself, such as the disk of its node; the main process's are written."""

AS_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integers as long


def check_same_recipe(
    file: Path,
    recipe: "DataclassInstance",
    may_differ: frozenset[str],
    derived: Collection[str] = (),
    free: frozenset[str] = MAY_DIFFER_ON_RESUME,
) -> list[str]:
    """What changed of the keys ``may_differ``; UserError where the recipes differ in another key that is not ``free``.

    ``derived`` keys were not given; where they differ, it is because of what they follow from.
    """
    old, new = flatten(read_mapping(file)), flatten(to_dict(recipe))
    changes = differences(old, new, free)
    wrong = {name: text for name, text in changes.items() if name not in may_differ}
    if wrong:
        followed = [name for name in wrong if name in derived]
        remedy = _remedy(followed, old, new) if followed else "give --resume with the old values"
        raise other_recipe(file.parent, wrong, remedy)
    return list(changes.values())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: frozenset[str]) -> dict[str, str]:
    """Key -> what it was and is, of the keys of two flat recipes that differ and are not ``free``."""
    return {
        name: f"{name} was {written(old.get(name))} and is {written(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name.split(".")[0] not in free
    }


def other_recipe(run: Path, wrong: Mapping[str, str], remedy: str = "give --resume with the old values") -> UserError:
    """What to raise for a run of which ``differences`` found some that are not allowed."""
    return UserError(
        f"the run in {run} has another recipe: {'; '.join(wrong.values())}; {remedy}, or another --output without it"
    )


def _remedy(followed: list[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What to do about keys that nobody gave: give back what they follow from, or state them."""
    steps = [written(values.get("steps")) for values in (old, new)]
    changed = steps[0] != steps[1]
    source = f"steps (was {steps[0]} and is {steps[1]})" if changed else "the steps, the images and the device"
    stated = " ".join(f"{name}={written(old.get(name))}" for name in followed)
    return (
        f"what was not given ({', '.join(followed)}) follows from {source}: give --resume with "
        f"{f'--steps {steps[0]}, or with ' if changed else ''}the old values: {stated}"
    )


@torch.no_grad()
def frozen_digest(module: nn.Module) -> str:
    """What identifies the weights that do not train, the same bits on every device.

    The bytes of each row are added up as integers of 64 bits, in which their order does not matter, and the sums
    hashed: this takes as long as it takes to read the weights once (2.4 GB/s on one busy core).
    """
    found = hashlib.sha256()
    for parameter in module.parameters():
        if not parameter.requires_grad:
            value = parameter.detach().contiguous()
            rows = value.reshape(len(value) if value.ndim else 1, -1)
            fits = rows.shape[1] * rows.element_size() % 8 == 0
            rows = rows.view(torch.int64 if fits else AS_WHOLE[rows.element_size()])
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(rows.sum(dim=1, dtype=torch.int64).cpu().numpy().tobytes())
    return found.hexdigest()


def check_same_frozen(run: Path, old: str | None, new: str | None) -> None:
    """UserError where a checkpoint was made on other frozen weights; one that does not know them is taken as it is."""
    if old is not None and new is not None and old != new:
        raise UserError(
            f"the weights that do not train are not those that the run in {run} was made with: its backbone or model "
            "was replaced; give --resume with the old one in its place, or another --output without it"
        )


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
