"""Runs that differ in their seed alone, and the mean and standard deviation of their scores, as papers report them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from glare.errors import UserError
from glare.json_files import read_json
from glare.recipes import to_dict
from glare.resuming import CHANGE_NO_RESULT, differences, other_recipe
from glare.run_folder import RunFolder, atomic_write_json
from glare.runtime import make_accelerator
from glare.typed_values import written
from glare.yaml_files import flatten, read_mapping

MEANS = {"miou": "mIoU", "aacc": "aAcc", "macc": "mAcc"}
FACTS = ("num_images", "data", "split", "match", "inference", "versions")


def repeat(recipe: Any, run: Callable[[Any], object]) -> dict[str, Any]:
    """Do a job with ``recipe.seeds`` seeds, one after another, and sum up its ``eval.json`` in ``seeds.json``.

    ``recipe`` has ``seed``, ``seeds``, ``steps``, ``output``, ``resume``, ``device`` and ``precision``; ``run`` does it
    once and leaves the processes together. The runs go into folders ``seed_<seed>`` of the output. With ``resume``,
    those that are done are not done again, and one that was stopped goes on. Returns the ``summary``; raises
    UserError for runs of different recipes, with nothing changed where those that are there tell.
    """
    RunFolder.check(recipe.output, resume=recipe.resume)
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    runs = [replace(recipe, seeds=1, seed=seed, output=recipe.output / f"seed_{seed}") for seed in seeds]
    begun = {one.seed for one in runs if (one.output / "recipe.yaml").exists()}
    left = [one for one in runs if not _is_done(one.output)]
    _check_several(recipe)
    for one in runs:
        if one.seed in begun:
            _check_begun(one, done=one not in left)
    accelerator = make_accelerator(
        device=recipe.device, precision=recipe.precision, report_to="none", output=recipe.output
    )
    accelerator.wait_for_everyone()  # all have seen what is there before anything is written
    folder = RunFolder.create(recipe.output, resume=recipe.resume, write=accelerator.is_main_process)
    stays = len(left) < len(runs) and recipe.steps is None  # what runs that are done derived, the others have to
    free = CHANGE_NO_RESULT if stays else CHANGE_NO_RESULT | {"steps"}
    folder.begin(recipe, may_differ=frozenset({"seeds"}), free=free)
    for one in left:
        accelerator.print(f"seed {one.seed}: {one.output}")
        run(replace(one, resume=one.seed in begun))
    _check_alike([read_mapping(one.output / "recipe.yaml") for one in runs])
    found = summary([read_json(one.output / "eval.json") for one in runs])
    if folder.write:
        print(table(found))
        atomic_write_json(folder.path / "seeds.json", found)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return found


def _is_done(run: Path) -> bool:
    """Whether a run has its scores and what is written after them, the card of its model."""
    return all((run / name).exists() for name in ("eval.json", "model/README.md"))


def _check_several(recipe: Any) -> None:
    """Raise UserError where the output is the folder of a single run."""
    file = recipe.output / "recipe.yaml"
    if file.exists() and read_mapping(file).get("seeds", 1) == 1:
        raise UserError(
            f"{recipe.output} is the folder of a single run, not of several seeds; give --seeds {recipe.seeds} another "
            "--output, or go on with that run without --seeds"
        )


def _check_begun(run: Any, *, done: bool) -> None:
    """Raise UserError where a run was begun with another recipe than ``run``, or is done with other steps.

    What the recipe leaves open, its file has as it was derived.
    """
    old = flatten(read_mapping(run.output / "recipe.yaml"))
    given = {name: value for name, value in flatten(to_dict(run)).items() if value is not None}
    wrong = differences(old, {**old, **given}, CHANGE_NO_RESULT if done else CHANGE_NO_RESULT | {"steps"})
    if wrong:
        raise other_recipe(run.output, wrong)


def _check_alike(recipes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where the runs differ in more than their seed, as where steps were derived from other images."""
    for key in recipes[0].keys() - CHANGE_NO_RESULT - {"seed"}:
        values = [written(recipe.get(key)) for recipe in recipes]
        if len(set(values)) > 1:
            raise UserError(
                f"the runs differ in {key} ({', '.join(values)}), so that they have no common mean; "
                "give the same recipe and another --output"
            )


def summary(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``seeds.json`` holds.

    ``evaluations``: the ``eval.json`` of each run. Each score becomes ``mean``, ``std`` (of the sample, divided by
    n - 1) and ``values`` by run; the first two are None where a class occurs in some runs only, ``std`` for one run.
    """
    first = evaluations[0]
    scores = {key: _spread([one[key] for one in evaluations]) for key in MEANS}
    iou = {name: _spread([one["iou"][name] for one in evaluations]) for name in first["iou"]}
    return {
        **scores,
        "iou": iou,
        "seeds": [one["seed"] for one in evaluations],
        "models": [one["model"] for one in evaluations],
        **{key: first[key] for key in FACTS},
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "mean": mean(known) if whole else None,
        "std": stdev(known) if whole and len(known) > 1 else None,
        "values": list(values),
    }


def table(found: Mapping[str, Any]) -> str:
    """A ``summary`` for people, in percent; ``-`` for a class that does not occur in all runs."""
    width = max(len("class"), *(len(name) for name in found["iou"]))
    lines = [f"{'class':<{width}}    IoU"]
    lines += [f"{name:<{width}}  {_percent(value):>5}" for name, value in found["iou"].items()]
    lines.append("  ".join(f"{name} {_percent(found[key])}" for key, name in MEANS.items()))
    seeds = ", ".join(map(str, found["seeds"]))
    lines.append(f"mean and sample standard deviation of seeds {seeds} ({found['num_images']} images)")
    return "\n".join(lines)


def _percent(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{100 * value['mean']:.1f}" + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")
