"""``glare demo``: the whole method on built-in scenes, without a network, in a few minutes on two cores.

A small ViT that has seen temperate landscapes only meets an arid one. It is adapted to 200 unlabelled arid scenes;
then the untouched and the adapted ViT get the same head, the same few labels and the same seeds, and both are
measured on the same unseen scenes. Whatever comes out is printed.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from glare import finetune, pretrain, ranges, recipes
from glare.data.labelled import open_labelled
from glare.dense_inference import segment
from glare.figures import colourise, panel
from glare.inference import load_segmenter
from glare.model_names import EMBEDDED
from glare.recipes import option
from glare.run_folder import RunFolder, atomic_write_json

ADAPTATION: dict[str, Any] = {
    "backbone": EMBEDDED,
    "data": "landcover:arid:200:1",
    "adapter": "uniadapter",
    "steps": 80,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "freeze_last_layer_steps": 12,
    "anchor": 0.0,
    "image_size": 0,
    "views": {
        "num_local": 4,
        "global_size": 80,
        "local_size": 40,
        "global_area": [0.1, 0.5],
        "local_area": [0.03, 0.12],
    },
    "glare": {"prototypes": 1024, "head_hidden": 512, "head_init": "random"},
}
"""Keys of the adaptation's recipe, also in training/recipes/demo.yaml; the rest is derived from the data."""

LABELLED = "landcover:arid:{num_labels}:2"
VALIDATION = "landcover:arid:40:3"
NUM_PICTURES = 4
CROP_SIZE = 128  # px, half a scene: a quarter of the time of whole ones
BEFORE, AFTER = "untouched", "adapted"


@dataclass(frozen=True)
class DemoRecipe:
    """Adapt the built-in ViT to a new landscape, fine-tune with few labels, compare and draw."""

    output: Path = option(Path("runs/demo"), "run folder to write")
    steps: int = option(ADAPTATION["steps"], "optimizer steps of the adaptation")
    finetune_steps: int = option(120, "optimizer steps of each fine-tuning")
    num_labels: int = option(8, "labelled scenes to fine-tune on")
    num_seeds: int = option(2, "fine-tunings of each ViT")
    seed: int = option(0, "the first seed")

    def __post_init__(self) -> None:
        ranges.check(self)


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare demo``."""
    run(recipes.parse(DemoRecipe, argv, prog="glare demo"))


def run(recipe: DemoRecipe) -> dict[str, Any]:
    """Adapt, fine-tune, compare, draw; returns what ``demo.json`` holds."""
    RunFolder.check(recipe.output)
    started = time.perf_counter()
    heading("1. Adapt the ViT to 200 unlabelled arid scenes (it has seen temperate ones only)")
    own = {"output": recipe.output / "adapted", "steps": recipe.steps, "seed": recipe.seed, "report_to": "none"}
    adapted = pretrain.run({**ADAPTATION, **own})
    heading(f"2. Fine-tune both on {recipe.num_labels} labelled scenes and measure on 40 unseen ones")
    scores: dict[str, list[float]] = {BEFORE: [], AFTER: []}
    for seed in range(recipe.seed, recipe.seed + recipe.num_seeds):
        for name, model in ((BEFORE, EMBEDDED), (AFTER, str(adapted))):
            scores[name].append(fine_tune(recipe, name, model, seed))
    result = {
        "miou": scores,
        "gain": [after - before for before, after in zip(scores[BEFORE], scores[AFTER], strict=True)],
        "seconds": time.perf_counter() - started,
    }
    atomic_write_json(recipe.output / "demo.json", result)
    picture = draw(recipe, scores)
    heading("3. Result")
    print(summary(scores))
    print(f"pictures: {picture}\nnumbers:  {recipe.output / 'demo.json'}   ({result['seconds']:.0f} s in all)")
    return result


def heading(text: str) -> None:
    """A line that stands out between the jobs' own."""
    print(f"\n=== {text}", flush=True)


def fine_tune(recipe: DemoRecipe, name: str, model: str, seed: int) -> float:
    """Fine-tune one ViT with one seed; returns its mIoU on the validation scenes."""
    folder = finetune.run(
        finetune.FinetuneRecipe(
            model=model,
            data=LABELLED.format(num_labels=recipe.num_labels),
            val_data=VALIDATION,
            output=recipe.output / f"{name}_seed{seed}",
            steps=recipe.finetune_steps,
            crop_size=CROP_SIZE,
            seed=seed,
            report_to="none",
        )
    )
    return float(json.loads((folder / "eval.json").read_text())["miou"])


def summary(scores: dict[str, list[float]]) -> str:
    """Both scores side by side, and what to make of them: a difference has to have the same sign with every seed."""
    lines = [f"{'mIoU':<12}" + "".join(f"  seed {n}" for n in range(len(scores[BEFORE]))) + "    mean"]
    for name, values in scores.items():
        numbers = "".join(f"  {100 * value:6.1f}" for value in values)
        lines.append(f"{name:<12}{numbers}  {100 * statistics.mean(values):6.1f}")
    gains = [100 * (after - before) for before, after in zip(scores[BEFORE], scores[AFTER], strict=True)]
    mean = statistics.mean(gains)
    if min(gains) > 0:
        lines.append(f"Adaptation helped: {mean:+.1f} points of mIoU, better with every seed.")
    elif max(gains) < 0:
        lines.append(f"Adaptation did not help: {mean:+.1f} points of mIoU, worse with every seed.")
    else:
        lines.append(f"Adaptation made no clear difference: {mean:+.1f} points of mIoU, its sign depends on the seed.")
    lines.append(
        f"(A demonstration, no proof: without any effect, all {len(gains)} seeds would still come out in favour "
        f"once in {2 ** len(gains)} times.)"
    )
    return "\n".join(lines)


def draw(recipe: DemoRecipe, scores: dict[str, list[float]]) -> Path:
    """Scene, truth, prediction before and after, for the first scenes of the validation set."""
    val = open_labelled(VALIDATION, split=None, match=None)
    pairs = [val.read(index) for index in range(NUM_PICTURES)]
    images = [image for image, _ in pairs]
    columns: list[list[Image.Image]] = [images, [colourise(label, val.palette) for _, label in pairs]]
    for name in (BEFORE, AFTER):
        folder = str(recipe.output / f"{name}_seed{recipe.seed}")
        model, normalise = load_segmenter(folder, device=torch.device("cpu"))
        columns.append([colourise(label, val.palette) for label in segment(model, images, normalise=normalise)])
    entries = {name: tuple(map(int, colour)) for name, colour in zip(val.classes, np.asarray(val.palette), strict=True)}
    picture = panel(
        list(zip(*columns, strict=True)),
        columns=["scene", "truth", "before adaptation", "after adaptation"],
        scores=["", "", *(f"mIoU {100 * scores[name][0]:.1f}" for name in (BEFORE, AFTER))],
        legend_entries=entries,  # type: ignore[arg-type]
    )
    path = recipe.output / "demo.png"
    picture.save(path)
    return path
