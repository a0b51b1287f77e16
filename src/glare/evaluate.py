"""``glare evaluate``: mIoU, accuracies and per-class IoU of a model on labelled images, at the labels' own size."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from glare import recipes
from glare.data.labelled import LabelledSet, open_labelled, split_for
from glare.data.raster_windows import RasterReading
from glare.data.sources import BadImage
from glare.dense_inference import Sweep, asked, logits, sweep_for
from glare.errors import UserError
from glare.finetune_data import unusable
from glare.inference import class_names, load_segmenter
from glare.metrics import SegmentationScores, confusion_matrix
from glare.model_names import place_of
from glare.recipes import option, required
from glare.run_folder import atomic_write_json, run_folder_of
from glare.runtime import DEVICES, PRECISIONS, make_accelerator
from glare.split_scores import ScoreSplitter, SplitScores, presence_scores
from glare.trained_images import trained_on
from glare.versions import versions
from glare.views import Normalisation
from glare.weight_files import weights_digest
from glare.yaml_files import read_mapping

PASS_PIXELS = 8 * 512 * 512  # of the images that are segmented together
READERS = 4  # threads that decode ahead

Labelled = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Pixels (h, w, 3) and class indices (h, w)."""


@dataclass(frozen=True)
class EvaluateRecipe:
    """Measure a segmentation model on labelled images."""

    model: str = required(help="run folder of glare finetune, its model folder, or a Hub id")
    data: str = required(help="labelled folder, landcover:<domain>[:count[:seed]], or of the catalog (loveda:FOLDER)")
    split: str | None = option(None, "sub-folder of the data or split of the catalog; val, or test, where there is one")
    match: str | None = option(None, "globs on file stems, or paths with a /, comma-separated, ! excludes")
    json: Path | None = option(None, "file to write the scores to")
    window: int | None = option(None, "side in px of sliding windows; by default only above 1536 px, of 1024 px")
    stride: int | None = option(None, "distance of sliding windows in px; two thirds of the window by default")
    test_scale: tuple[int, int] | None = option(None, "bring images to fit these two sides in px first, as 2048,512")
    ratios: tuple[float, ...] = option((1.0,), "factors on the images' size, as 0.5,1,1.5; the mean of the softmax")
    flip: bool = option(False, "the mean with the mirror images, too")
    split_scores: bool = option(False, "what the score lacks in outlines and what in naming (LOCA, section 5.2)")
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    raster: RasterReading = option(RasterReading(), "GeoTIFFs")

    def __post_init__(self) -> None:
        asked(self)


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare evaluate``."""
    run(recipes.parse(EvaluateRecipe, argv, prog="glare evaluate"))


def run(recipe: EvaluateRecipe) -> SegmentationScores:
    """Evaluate, print the scores and write them where the recipe says."""
    if recipe.json is not None:
        check_file(recipe.json)
    accelerator = make_accelerator(device=recipe.device, precision=recipe.precision, report_to="none", output=Path())
    model, normalise = load_segmenter(recipe.model, device=accelerator.device)
    split = recipe.split or split_for(recipe.data, "val")
    data = open_labelled(recipe.data, split=split, match=recipe.match, raster=recipe.raster)
    check_classes(class_names(model), data.classes, model=recipe.model, data=recipe.data)
    if recipe.split is None and split is not None:
        print(f"evaluated on the split {split!r}; --split takes another one")
    shared = trained_on(recipe.model, data, data=recipe.data, split=split, raster=recipe.raster)
    if shared:
        print(f"warning: the model was trained on {shared:,} of these {len(data):,} images: new ones would score lower")
    sweep = sweep_for(model, recipe)
    splitter = ScoreSplitter(data.classes) if recipe.split_scores else None
    with accelerator.autocast():
        scores, skipped = evaluate(
            model, data, normalise=normalise, sweep=sweep, strict=recipe.strict, splitter=splitter
        )
    num_images = len(data) - len(skipped)
    if not num_images:
        raise unusable(len(data), *skipped[0])
    parts = splitter.result() if splitter else None
    print(table(scores, num_images=num_images, parts=parts, skipped=skipped))
    if recipe.json is not None:
        about = {"data": recipe.data, "split": split, "match": recipe.match, "model": recipe.model}
        about["weights_sha256"] = weights_digest(place_of(recipe.model))
        seed = training_seed(recipe.model)
        entry = describe(scores, num_images=num_images, parts=parts, seed=seed, about=about, sweep=sweep)
        atomic_write_json(recipe.json, entry | ({"trained_on": shared} if shared else {}))
    return scores


def check_file(file: Path) -> None:
    """Raise UserError where the scores cannot be written to ``file``; touches nothing."""
    folder = file.absolute().parent
    if file.is_dir():
        raise UserError(f"json {str(file)!r} is a folder; give a file, such as {str(file / 'scores.json')!r}")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"json {str(file)!r} cannot be written, {str(folder)!r} is no folder one may write to; make it, or give "
            "another file"
        )


def evaluate(
    model: PreTrainedModel,
    data: LabelledSet,
    *,
    normalise: Normalisation,
    sweep: Sweep | None = None,
    strict: bool = False,
    splitter: ScoreSplitter | None = None,
) -> tuple[SegmentationScores, list[tuple[str, str]]]:
    """Scores of a model in evaluation mode on all images, and (name, reason) of those that could not be read.

    A ``splitter`` is given each image.
    """
    everything = range(len(data))
    matrix, skipped = confusion(
        model, data, everything, normalise=normalise, sweep=sweep, strict=strict, splitter=splitter
    )
    return SegmentationScores.from_confusion(matrix, data.classes), skipped


def confusion(
    model: PreTrainedModel,
    data: LabelledSet,
    indices: Sequence[int],
    *,
    normalise: Normalisation,
    sweep: Sweep | None = None,
    strict: bool = False,
    splitter: ScoreSplitter | None = None,
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Confusion matrix (classes, classes) int64 of the images ``indices``, and those that could not be read.

    A ``splitter`` is given each image.
    """
    num_classes = len(data.classes)
    total = torch.zeros((num_classes, num_classes), dtype=torch.int64)
    skipped: list[tuple[str, str]] = []
    bar = tqdm(total=len(indices), desc="evaluate", unit="image", disable=None, leave=False)
    for group in _equal_sizes(read_ahead(data, indices, skipped=skipped, strict=strict)):
        pixels, labels = (torch.from_numpy(np.stack(part)) for part in zip(*group, strict=True))
        scores = logits(model, pixels, normalise=normalise, sweep=sweep)
        found = scores.max(dim=1).indices.cpu()
        matrices = [
            confusion_matrix(*pair, num_classes=num_classes, ignore_index=data.ignore_index)
            for pair in zip(found, labels, strict=True)
        ]
        total += torch.stack(matrices).sum(dim=0)
        if splitter is not None:
            present = presence_scores(scores, (labels != data.ignore_index).to(scores.device)).cpu()
            for matrix, presence in zip(matrices, present, strict=True):
                splitter.add(matrix, presence)
        bar.update(len(group))
    bar.close()
    return total, skipped


def read_ahead(
    data: LabelledSet, indices: Iterable[int], *, skipped: list[tuple[str, str]], strict: bool
) -> Iterator[Labelled]:
    """Images and labels in order, decoded by threads; bad ones are added to ``skipped``, or raise if ``strict``."""

    def read(index: int) -> Labelled:
        image, label = data.read(index)
        return np.asarray(image), label

    def settle(future: Future[Labelled]) -> Iterator[Labelled]:
        try:
            yield future.result()
        except BadImage as bad:
            if strict:
                raise UserError(f"{bad}; repair or remove it, or leave --strict out to skip it") from None
            skipped.append((bad.name, bad.reason))

    waiting: deque[Future[Labelled]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > 2 * READERS:
                yield from settle(waiting.popleft())
        while waiting:
            yield from settle(waiting.popleft())


def _equal_sizes(items: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    """Runs of images of one size, as many as are segmented together."""
    for (height, width), run in groupby(items, key=lambda item: item[1].shape):
        limit = max(1, PASS_PIXELS // (height * width))
        while group := list(islice(run, limit)):
            yield group


def check_classes(ours: Sequence[str], theirs: Sequence[str], *, model: str, data: str) -> None:
    """Raise UserError unless model and data have the same classes in the same order."""
    if list(ours) != list(theirs):
        raise UserError(
            f"the classes differ: model {model!r} has {', '.join(ours)}; data {data!r} has {', '.join(theirs)}; "
            "give data with the classes the model was fine-tuned on, in the same order"
        )


def table(
    scores: SegmentationScores,
    *,
    num_images: int,
    parts: SplitScores | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> str:
    """The scores for people, in percent; ``-`` for a class that does not occur, a warning where fewer than two do."""
    width = max(len("class"), *(len(name) for name in scores.iou))
    lines = [f"{'class':<{width}}    IoU"]
    lines += [f"{name:<{width}}  {_percent(value):>5}" for name, value in scores.iou.items()]
    means = (("mIoU", scores.miou), ("aAcc", scores.aacc), ("mAcc", scores.macc))
    lines.append("  ".join(f"{name} {_percent(value)}" for name, value in means) + f"  ({num_images} images)")
    if parts:
        lines.append(f"mIoU if an oracle named the outlines: {_percent(parts.localization)}")
        lines.append(f"mAP of which classes are in an image: {_percent(parts.classification)}")
    present = [name for name, accuracy in scores.accuracy.items() if accuracy is not None]
    if len(present) < 2:
        held = (
            f"no class but {present[0]!r}, so these scores say little" if present else "no class, so there is no score"
        )
        lines.append(
            f"warning: the labels hold {held}; what is ignored, 255 unless classes.json has another ignore_index, "
            "counts nowhere"
        )
    lines += [f"skipped {name}: {reason}" for name, reason in skipped]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def describe(
    scores: SegmentationScores,
    *,
    num_images: int,
    seed: int | None,
    about: Mapping[str, str | None],
    sweep: Sweep,
    parts: SplitScores | None = None,
) -> dict[str, Any]:
    """What ``eval.json`` holds; ``about`` says which data and model the scores are of, ``sweep`` how they were got."""
    counted = {**scores.to_dict(), **(asdict(parts) if parts else {}), "num_images": num_images}
    return {**counted, **about, "inference": asdict(sweep), "seed": seed, "versions": versions()}


def training_seed(model: str) -> int | None:
    """The seed in the recipe of the run that wrote ``model``, where it lies in its run folder."""
    run = run_folder_of(model)
    seed = read_mapping(run / "recipe.yaml").get("seed") if run else None
    return seed if isinstance(seed, int) else None
