"""Runs that differ in their seed alone, and the mean and standard deviation of their scores, as papers report them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from glare.errors import UserError
from glare.json_files import read_json
from glare.resuming import MAY_DIFFER_ON_RESUME
from glare.run_folder import RunFolder, atomic_write_json
from glare.runtime import make_accelerator
from glare.typed_values import written
from glare.yaml_files import read_mapping

MEANS = {"miou": "mIoU", "aacc": "aAcc", "macc": "mAcc"}
FACTS = ("num_images", "data", "split", "match", "inference", "versions")


def repeat(recipe: Any, run: Callable[[Any], object]) -> dict[str, Any]:
    """Do a job with ``recipe.seeds`` seeds, one after another, and sum up its ``eval.json`` in ``seeds.json``.

    ``recipe`` has ``seed``, ``seeds``, ``output``, ``resume``, ``device`` and ``precision``; ``run`` does it once and
    leaves the processes together. The runs go into folders ``seed_<seed>`` of the output. With ``resume``, those that
    have scores are not done again, and one that was stopped goes on. Returns the ``summary``; raises UserError for runs
    of different recipes.
    """
    RunFolder.check(recipe.output, resume=recipe.resume)
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    runs = [replace(recipe, seeds=1, seed=seed, output=recipe.output / f"seed_{seed}") for seed in seeds]
    begun = {one.seed: (one.output / "recipe.yaml").exists() for one in runs}
    left = [one for one in runs if not (one.output / "eval.json").exists()]
    accelerator = make_accelerator(
        device=recipe.device, precision=recipe.precision, report_to="none", output=recipe.output
    )
    accelerator.wait_for_everyone()  # all have seen what is there before anything is written
    folder = RunFolder.create(recipe.output, resume=recipe.resume, write=accelerator.is_main_process)
    folder.begin(recipe, may_differ=frozenset({"seeds"}))
    for one in left:
        accelerator.print(f"seed {one.seed}: {one.output}")
        run(replace(one, resume=begun[one.seed]))
    _check_alike([read_mapping(one.output / "recipe.yaml") for one in runs])
    found = summary([read_json(one.output / "eval.json") for one in runs])
    if folder.write:
        print(table(found))
        atomic_write_json(folder.path / "seeds.json", found)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return found


def _check_alike(recipes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where the runs differ in more than their seed, as after a --resume with other steps."""
    for key in recipes[0].keys() - (MAY_DIFFER_ON_RESUME - {"steps"}) - {"seed"}:
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
