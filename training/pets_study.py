r"""Scores against label budgets after SimMIM pre-training, with and without a step of classification between.

    python training/pets_study.py --data oxford_pets:FOLDER --train-split study:{budget} --test-split study:test \
        --pretrain 45k=imagenet_45k 200k=imagenet_200k --classify-data seg_train --classify-val seg_test \
        --output runs/pets

Every run is one of ``glare pretrain``, ``classify`` and ``finetune`` with a recipe of ``training/recipes/pets`` in a
folder of its own below --output; what is done is left out, what was stopped goes on. The scores of all fine-tunings on
the test images are in study.json, their curves in study.png. The start "none" is the ViT of random weights.

Where --train-split has no {budget}, as many images are drawn from it with the seed, a smaller budget being part of a
larger one. Settings of a job are changed by --set JOB.KEY=VALUE, JOB being simmim, classify or finetune.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from glare import cli, recipes
from glare.budget_figure import budget_curves
from glare.finetune import FinetuneRecipe
from glare.run_folder import atomic_write_json, atomic_write_png

RECIPES = Path(__file__).parent / "recipes" / "pets"
BUDGETS = (250, 500, 1000, 2000, 4000, 6000)
JOBS = {"simmim": "pretrain", "classify": "classify", "finetune": "finetune"}
SCORES = ("miou", "aacc", "macc")


def main() -> None:
    """Run what is not done yet, then write the table and the picture."""
    args = arguments()
    rows = [
        {"start": start, "budget": budget, "seed": seed, **finetuned(args, start, model, budget, seed)}
        for start, model in starts(args).items()
        for budget in args.budgets
        for seed in args.seeds
    ]
    accuracy = {
        file.parent.name: json.loads(file.read_text())["accuracy"] for file in args.output.glob("*/accuracy.json")
    }
    atomic_write_json(args.output / "study.json", {"rows": rows, "accuracy": accuracy})
    curves = {start: scores_of(rows, start) for start in dict.fromkeys(row["start"] for row in rows)}
    atomic_write_png(args.output / "study.png", budget_curves(curves, label="mIoU, %"))
    print(table(curves))


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
    parser.add_argument("--budgets", nargs="*", type=int, default=BUDGETS, metavar="N")
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2), metavar="N")
    parser.add_argument("--epochs", type=int, default=100, help="of fine-tuning, for every budget")
    parser.add_argument("--vit", default=str(RECIPES / "vit.json"), help="configuration of the ViT")
    parser.add_argument("--set", nargs="*", default=[], metavar="JOB.KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    wrong = [item for item in args.set if item.split(".")[0] not in JOBS or "=" not in item]
    wrong += [item for item in args.pretrain if "=" not in item]
    if wrong:
        parser.error(f"{wrong[0]!r} is neither NAME=DATA of --pretrain nor JOB.KEY=VALUE of --set ({', '.join(JOBS)})")
    return args


def starts(args: argparse.Namespace) -> dict[str, str]:
    """Name of each start -> the model that fine-tuning takes; pre-trains and classifies where that is not done."""
    found = {"none": args.vit}
    for item in args.pretrain:
        name, _, data = item.partition("=")
        run = args.output / f"simmim_{name}"
        perform(args, "simmim", run, ["--backbone", args.vit, "--data", data], done=run / "model")
        found[name] = str(run)
        if args.classify_data:
            run, given = args.output / f"classify_{name}", ["--model", str(run), "--data", args.classify_data]
            given += ["--val-data", args.classify_val] if args.classify_val else []
            perform(args, "classify", run, given, done=run / ("accuracy.json" if args.classify_val else "model"))
            found[f"{name}, then classes"] = str(run)
    return found


def finetuned(args: argparse.Namespace, start: str, model: str, budget: int, seed: int) -> dict[str, Any]:
    """Scores of one fine-tuning on the test images."""
    run = args.output / "finetune" / f"{start.replace(', ', '_').replace(' ', '_')}_{budget}_{seed}"
    split = args.train_split
    given = ["--model", model, "--data", args.data, "--seed", str(seed)]
    given += ["--train-split", split.format(budget=budget)] if split else []
    given += [] if split and "{budget}" in split else ["--num-images", str(budget)]
    given += ["--val-data", args.test_data] if args.test_data else []
    given += ["--val-split", args.test_split] if args.test_split else []
    overrides = [*given, "--output", str(run), *changes(args, "finetune")]
    recipe = recipes.parse(FinetuneRecipe, ["--recipe", str(RECIPES / "finetune.yaml"), *overrides], prog="pets_study")
    if recipe.steps is None:
        given += ["--steps", str(max(1, args.epochs * budget // (recipe.batch_size or 1)))]
    perform(args, "finetune", run, given, done=run / "eval.json")
    scores = json.loads((run / "eval.json").read_text())
    return {name: scores[name] for name in (*SCORES, "num_images")}


def perform(args: argparse.Namespace, name: str, run: Path, given: Sequence[str], *, done: Path) -> None:
    """One job, unless it is ``done``; ends the study with the job's exit code where it fails."""
    if done.exists():
        return
    print(f"== {run}", flush=True)
    going_on = ["--resume"] if (run / "recipe.yaml").exists() else []
    recipe = ["--recipe", str(RECIPES / f"{name}.yaml"), "--output", str(run)]
    code = cli.main([JOBS[name], *recipe, *given, *going_on, *changes(args, name)])
    if code:
        sys.exit(code)


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
