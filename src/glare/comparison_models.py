"""The models of a comparison: what they are called, which of them are one recipe run with several seeds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from glare.comparison import ADAPTED, FOREIGN, UNTOUCHED, Model
from glare.errors import UserError
from glare.json_files import read_json
from glare.modeling_glare import GlareModel
from glare.resuming import MAY_DIFFER_ON_RESUME
from glare.run_folder import run_folder_of
from glare.segmenters import load_pretrained
from glare.yaml_files import flatten, read_mapping

BETWEEN_RUNS = {"seed", "output"}
"""Keys in which the runs of one row may differ, besides those that do not change what is learned."""

WEIGHTS = "weights.json"
"""In the folder of a comparison: path -> digest of the weights of the base and of each model that was given."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that get one verdict together, or a single model."""

    name: str
    members: list[Model]


def untouched(base: str) -> Model:
    """The model that was not adapted."""
    return Model(UNTOUCHED, UNTOUCHED, base)


def groups_of(adapted: Sequence[str], foreign: Sequence[str]) -> tuple[list[Group], Group | None]:
    """The rows of the adapted models, and the foreign ones as one group; different names throughout."""
    names = distinct_names([*adapted, *foreign])
    ours = [Model(name, ADAPTED, path) for name, path in zip(names, adapted, strict=False)]
    theirs = [Model(name, FOREIGN, path) for name, path in zip(names[len(adapted) :], foreign, strict=True)]
    rows: list[list[Model]] = []
    for model in ours:
        row = next((row for row in rows if _same_recipe(row[0].path, model.path)), None)
        if row is None:
            rows.append([model])
        else:
            row.append(model)
    return [Group(_group_name(row), row) for row in rows], Group(_group_name(theirs), theirs) if theirs else None


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, of which the one before is added where two would be the same.

    Raises UserError where a path occurs twice.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if list(paths).count(path) > 1)
        raise UserError(f"the model {twice!r} was given twice; give each model once")
    parts = [[part for part in Path(path).parts if part not in ("/", "model")] or [path] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len({*names, UNTOUCHED}) == len(names) + 1:
            return names
    return list(paths)


def load(model: Model, like: GlareModel) -> GlareModel:
    """The model behind a path, in evaluation mode; UserError where it is no relative of ``like``."""
    assert model.path is not None
    loaded, _ = load_pretrained(model.path)
    ours, theirs = loaded.config.backbone_config, like.config.backbone_config
    for key in ("model_type", "hidden_size", "num_hidden_layers", "patch_size"):
        if getattr(ours, key) != getattr(theirs, key):
            raise UserError(
                f"{model.path!r} has {key} {getattr(ours, key)}, the untouched model {getattr(theirs, key)}; "
                "give models adapted from the one that --base names"
            )
    loaded.eval().requires_grad_(False)
    return loaded


def check_same_weights(folder: Path, digests: Mapping[str, str]) -> None:
    """UserError where a comparison in ``folder`` was begun with other weights at one of the paths.

    ``digests`` by path, as ``resuming.frozen_digest`` gives them for all weights of a model. A path, or a folder, that
    has none in its ``weights.json`` is taken as it is.
    """
    file = folder / WEIGHTS
    old = read_json(file) if file.exists() else {}
    replaced = [path for path, digest in digests.items() if old.get(path, digest) != digest]
    if replaced:
        raise UserError(
            f"the weights of {', '.join(map(repr, replaced))} are not those that the comparison in {folder} was begun "
            "with; give --resume with the old ones in their place, or another --output without it"
        )


def file_name(model: Model) -> str:
    """The model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", model.name)


def recipe_of(path: str) -> dict[str, Any] | None:
    """The recipe of the run that wrote the model, None where it is not in its run folder."""
    run = run_folder_of(path)
    return read_mapping(run / "recipe.yaml") if run else None


def _same_recipe(first: str | None, second: str | None) -> bool:
    """Whether two runs differ in their seeds alone."""
    a, b = (recipe_of(path) if path else None for path in (first, second))
    if a is None or b is None or a.get("seed") == b.get("seed"):
        return False
    return _what_matters(a) == _what_matters(b)


def _what_matters(recipe: dict[str, Any]) -> dict[str, Any]:
    left_out = BETWEEN_RUNS | (MAY_DIFFER_ON_RESUME - {"steps"})
    return {key: value for key, value in flatten(recipe).items() if key.split(".")[0] not in left_out}


def _group_name(members: Sequence[Model]) -> str:
    if len(members) == 1:
        return members[0].name
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*(model.name for model in members), strict=False))
    shared = "".join(column[0] for column in letters).rstrip("_-/ ")
    return f"{shared or members[0].name} ({len(members)} seeds)"
