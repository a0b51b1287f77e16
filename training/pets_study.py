r"""Scores against label budgets after SimMIM pre-training, with and without a step of classification between.

    python training/pets_study.py --data oxford_pets:FOLDER --train-split study:{budget} --test-split study:test \
        --pretrain 45k=imagenet_45k 200k=imagenet_200k --classify-data seg_train --classify-val seg_test \
        --output runs/pets

Every run is one of ``glare pretrain``, ``classify`` and ``finetune`` with a recipe of ``training/recipes/pets`` in a
folder of its own below --output; what is done is left out, what was stopped goes on. The scores of all fine-tunings on
the test images are in study.json, their curves in study.png. The start "none" is the ViT of random weights. Beside the
folder of each run stands the recipe that was asked of it: a study goes on with the same settings only, but for those
that change no result.

Where --train-split has no {budget}, as many images are drawn from it with the seed, a smaller budget being part of a
larger one. Settings of a job are changed by --set JOB.KEY=VALUE, JOB being simmim, classify or finetune.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from glare import cli, recipes
from glare.budget_figure import budget_curves
from glare.classify import ClassifyRecipe
from glare.errors import UserError
from glare.finetune import FinetuneRecipe
from glare.finetune_data import open_data
from glare.pretrain import PretrainRecipe
from glare.resuming import CHANGE_NO_RESULT, differences
from glare.run_folder import atomic_write_json, atomic_write_png, atomic_write_text
from glare.yaml_files import flatten, read_mapping

RECIPES = Path(__file__).parent / "recipes" / "pets"
BUDGETS = (250, 500, 1000, 2000, 4000, 6000)
JOBS: dict[str, tuple[str, type[Any]]] = {
    "simmim": ("pretrain", PretrainRecipe),
    "classify": ("classify", ClassifyRecipe),
    "finetune": ("finetune", FinetuneRecipe),
}
SCORES = ("miou", "aacc", "macc")


@dataclass(frozen=True)
class Job:
    """One run of the study: ``words`` are the command line of ``JOBS[name]``, ``done`` is there once it is over."""

    name: str
    run: Path
    words: list[str]
    done: str

    @property
    def recipe(self) -> Any:
        """What is asked; the job derives what it leaves open."""
        return recipes.parse(JOBS[self.name][1], self.words, prog="pets_study")

    @property
    def asked(self) -> Path:
        """Where that stands, beside the run."""
        return self.run.with_name(f"{self.run.name}.yaml")

    def check(self) -> None:
        """UserError where the run was begun with another recipe.

        Of a run whose ``asked`` is not there, the keys that are given now are compared with its resolved recipe.
        """
        resolved = self.run / "recipe.yaml"
        if not resolved.exists():
            return
        old, new = flatten(read_mapping(resolved)), flatten(recipes.to_dict(self.recipe))
        if self.asked.exists():
            old = flatten(read_mapping(self.asked))
        else:
            given = flatten(recipes.parse_given(JOBS[self.name][1], self.words, prog="pets_study"))
            new = {**old, **{key: new[key] for key in given}}
        if wrong := differences(old, new, CHANGE_NO_RESULT):
            raise UserError(
                f"the run in {self.run} has another recipe: {'; '.join(wrong.values())}; give the old values, or "
                "another --output, as one table holds runs of the same settings"
            )

    @property
    def over(self) -> bool:
        """Whether it is done."""
        return (self.run / self.done).exists()

    def perform(self) -> None:
        """Run it unless it is done; ends the study with the job's exit code where it fails."""
        if self.over:
            return
        print(f"== {self.run}", flush=True)
        begun = (self.run / "recipe.yaml").exists()
        if not begun:
            self.run.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.asked, recipes.to_yaml(self.recipe))
        code = cli.main([JOBS[self.name][0], *self.words, *(["--resume"] if begun else [])])
        if code:
            sys.exit(code)


def main() -> None:
    """Run what is not done yet, then write the table and the picture."""
    args = arguments()
    try:
        earlier = list(starting(args))
        models = [("none", args.vit), *((start, str(job.run)) for start, job in earlier)]
        wanted = list(product(models, args.budgets, args.seeds))
        last = [finetuning(args, start, model, budget, seed) for (start, model), budget, seed in wanted]
        jobs = [*(job for _, job in earlier), *last]
        check(jobs)  # before anything is trained
        check_data(last[: len(args.budgets) * len(args.seeds)])
    except UserError as error:
        print(f"pets_study: {error}", file=sys.stderr)
        sys.exit(2)
    for job in jobs:
        job.perform()
    rows = [
        {"start": start, "budget": budget, "seed": seed, **scores_in(job.run)}
        for ((start, _), budget, seed), job in zip(wanted, last, strict=True)
    ]
    accuracy = {
        file.parent.name: json.loads(file.read_text())["accuracy"] for file in args.output.glob("*/accuracy.json")
    }
    atomic_write_json(args.output / "study.json", {"rows": rows, "accuracy": accuracy})
    curves = {start: scores_of(rows, start) for start in dict.fromkeys(row["start"] for row in rows)}
    atomic_write_png(args.output / "study.png", budget_curves(curves, label="mIoU, %"))
    print(table(curves))


def check(jobs: Sequence[Job]) -> None:
    """UserError where two runs would share a folder, or one was begun with another recipe."""
    folder, count = Counter(job.run for job in jobs).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"two runs would share the folder {folder}; give each seed, each budget and each name of --pretrain once, "
            "and no name 'none', which is the start from random weights"
        )
    for job in jobs:
        job.check()


def check_data(finetunings: Sequence[Job]) -> None:
    """UserError where those that are not done cannot have their images, or have none to test on."""
    for job in finetunings:
        if not job.over and open_data(job.recipe)[1] is None:
            raise UserError("there are no images to test on; give --test-data or --test-split")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument("--train-split", help="of --data; may hold {budget}")
    parser.add_argument("--test-data", help="labelled images to test on, if they are not of --data")
    parser.add_argument("--test-split", help="of the data to test on")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="NAME=DATA", help="unlabelled images, by name")
    parser.add_argument("--classify-data", help="folder with a folder of images for each class")
    parser.add_argument("--classify-val", help="such a folder to measure the accuracy on")
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="N")
    parser.add_argument("--epochs", type=int, default=100, help="of fine-tuning, for every budget")
    parser.add_argument("--vit", default=str(RECIPES / "vit.json"), help="configuration of the ViT")
    parser.add_argument("--set", nargs="*", default=[], metavar="JOB.KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    wrong = [item for item in args.set if item.split(".")[0] not in JOBS or "=" not in item]
    wrong += [item for item in args.pretrain if item.find("=") < 1 or "/" in item.partition("=")[0]]
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}; give at least 1")
    if wrong:
        parser.error(f"{wrong[0]!r} is neither NAME=DATA of --pretrain nor JOB.KEY=VALUE of --set ({', '.join(JOBS)})")
    return args


def starting(args: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    """Name of each start and the job whose run is the model that fine-tuning takes, in their order."""
    for item in args.pretrain:
        name, _, data = item.partition("=")
        simmim = job(args, "simmim", f"simmim_{name}", ["--backbone", args.vit, "--data", data], done="model")
        yield name, simmim
        if args.classify_data:
            given = ["--model", str(simmim.run), "--data", args.classify_data]
            given += ["--val-data", args.classify_val] if args.classify_val else []
            done = "accuracy.json" if args.classify_val else "model"
            yield f"{name}, then classes", job(args, "classify", f"classify_{name}", given, done=done)


def finetuning(args: argparse.Namespace, start: str, model: str, budget: int, seed: int) -> Job:
    """One fine-tuning, which measures on the test images."""
    split = args.train_split
    given = ["--model", model, "--data", args.data, "--seed", str(seed)]
    given += ["--train-split", split.replace("{budget}", str(budget))] if split else []
    given += [] if split and "{budget}" in split else ["--num-images", str(budget)]
    given += ["--val-data", args.test_data] if args.test_data else []
    given += ["--val-split", args.test_split] if args.test_split else []
    run = f"finetune/{start.replace(', ', '_').replace(' ', '_')}_{budget}_{seed}"
    recipe = job(args, "finetune", run, given, done="eval.json").recipe
    if recipe.steps is None:
        given += ["--steps", str(max(1, args.epochs * budget // (recipe.batch_size or 1)))]
    return job(args, "finetune", run, given, done="eval.json")


def scores_in(run: Path) -> dict[str, Any]:
    """Scores of a fine-tuning on the test images."""
    scores = json.loads((run / "eval.json").read_text())
    return {name: scores[name] for name in (*SCORES, "num_images")}


def job(args: argparse.Namespace, name: str, run: str, given: Sequence[str], *, done: str) -> Job:
    """A job in the folder ``run`` of the study, with what --set says of it."""
    words = ["--recipe", str(RECIPES / f"{name}.yaml"), "--output", str(args.output / run), *given]
    return Job(name, args.output / run, [*words, *changes(args, name)], done)


def changes(args: argparse.Namespace, name: str) -> list[str]:
    """KEY=VALUE of --set for a job."""
    return [item.partition(".")[2] for item in args.set if item.split(".")[0] == name]


def scores_of(rows: Sequence[dict[str, Any]], start: str) -> dict[int, list[float]]:
    """Budget -> mIoU of each seed, in percent."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["start"] == start:
            found.setdefault(row["budget"], []).append(100 * row["miou"])
    return found


def table(curves: dict[str, dict[int, list[float]]]) -> str:
    """mIoU by start and budget, mean and standard deviation over seeds, as Markdown."""
    budgets = list(dict.fromkeys(budget for scores in curves.values() for budget in scores))
    lines = ["| mIoU | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
    for start, scores in curves.items():
        cells = [f"{fmean(v):.1f}" + (f" ± {stdev(v):.1f}" if len(v) > 1 else "") for v in scores.values()]
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
