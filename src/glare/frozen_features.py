"""Frozen patch features of labelled images, and the labels on the grid of patches: what the probes see.

Images are read and resized once for all compared models, features are taken once a model. Nothing is standardised:
a probe on standardised features does not notice a model whose features have collapsed.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glare.data.cache import Reading, memory_budget
from glare.data.labelled import IGNORE_INDEX, LabelledSet
from glare.errors import UserError
from glare.geometry import Grid
from glare.metrics import confusion_matrix
from glare.modeling_glare import GlareModel
from glare.splits import Fold
from glare.views import Normalisation

PASS_PATCHES = 4096  # of the images that are encoded together


@dataclass(frozen=True)
class PatchFeatures:
    """Final-norm features of all images, one image after another, patches row-major.

    ``features`` (patches, d) float16 on the CPU; ``cls`` (images, d) float32; ``grids``: patch rows and columns of
    each image.
    """

    features: Tensor
    cls: Tensor
    grids: list[Grid]


@dataclass(frozen=True)
class PatchLabels:
    """Labels of the same images.

    ``shares`` (patches, k) float32: share of the patch's pixels with each class; ignored pixels count nowhere, so rows
    sum to at most 1. ``maps``: class indices (h, w) uint8 of each image at the size the model sees, 255 is ignored.
    """

    shares: Tensor
    maps: list[NDArray[np.uint8]]


def read_images(
    data: LabelledSet, *, patch: int, short_side: int, strict: bool
) -> tuple[list[Tensor], PatchLabels, list[str], list[tuple[str, str]]]:
    """Images and labels at the size the models see.

    Images are resized, antialiased, labels to the nearest pixel, so that the short side is ``short_side`` px, or the
    multiple of ``patch`` nearest to it; the long side follows, to the nearest multiple.

    Returns:
        Images (3, h, w) uint8, their labels, their names, and (name, reason) of those that could not be read.

    Raises:
        UserError: ``short_side`` is below ``patch``; an image cannot be read and ``strict`` is set, or none can.
    """
    if short_side < patch:
        raise UserError(f"a short side of {short_side} px is less than a patch of {patch} px; give {patch} or more")
    images: list[Tensor] = []
    maps: list[NDArray[np.uint8]] = []
    shares: list[Tensor] = []
    names: list[str] = []

    def read(index: int) -> tuple[Tensor, NDArray[np.uint8]]:
        image, label = data.read(index)
        scale = short_side / min(image.size)
        width, height = (patch * max(1, round(side * scale / patch)) for side in image.size)
        pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
        nearest = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), np.asarray(nearest)

    def keep(index: int, pair: tuple[Tensor, NDArray[np.uint8]]) -> None:
        image, label = pair
        images.append(image)
        maps.append(label)
        shares.append(class_shares(label, patch=patch, num_classes=len(data.classes)))
        names.append(data.name(index))

    skipped = Reading(strict=strict, workers=None, progress=True).run(read, keep, count=len(data))
    return images, PatchLabels(torch.cat(shares), maps), names, skipped


def class_shares(label: NDArray[np.uint8], *, patch: int, num_classes: int) -> Tensor:
    """Share of each patch's pixels with each class: (patches, num_classes) float32 from a label map (h, w)."""
    rows, columns = label.shape[0] // patch, label.shape[1] // patch
    pixels = label.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows * columns, patch * patch)
    slots = np.minimum(pixels, num_classes) + (num_classes + 1) * np.arange(rows * columns)[:, None]
    counts = np.bincount(slots.ravel(), minlength=rows * columns * (num_classes + 1))
    return torch.from_numpy(counts.reshape(rows * columns, -1)[:, :num_classes]).float() / patch**2


@torch.no_grad()
def extract(
    model: GlareModel,
    images: Sequence[Tensor],
    *,
    normalise: Normalisation,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> PatchFeatures:
    """Features of a model, which is moved to ``device`` and set to evaluation.

    Args:
        model: a ViT, with adapters or without.
        images: (3, h, w) uint8, sides multiples of the patch; those of one size are encoded together.
        normalise: of the model's input.
        device: where to encode; the features come back to the CPU.
        autocast: context of the forward passes, as ``Accelerator.autocast``.

    Raises:
        UserError: the features would take more than half of the free memory, or they are not finite.
    """
    grids = [model.grid_size(image) for image in images]
    sizes = [rows * columns for rows, columns in grids]
    _check_memory(len(images), 2 * sum(sizes) * model.config.hidden_size)
    features = torch.empty((sum(sizes), model.config.hidden_size), dtype=torch.float16)
    cls = torch.empty((len(images), model.config.hidden_size))
    places = features.split(sizes)
    model.to(device).eval()
    with tqdm(total=len(images), desc="features", unit="image", disable=None, leave=False) as bar:
        for batch in _batches(grids):
            pixels = normalise(torch.stack([images[i] for i in batch]).to(device).float().div(255))
            with autocast():
                tokens = model(pixels).last_hidden_state
            for index, image in zip(batch, tokens, strict=True):
                places[index].copy_(image[-sizes[index] :])
                cls[index].copy_(image[0])
            bar.update(len(batch))
    if not torch.stack([part.sum(dtype=torch.float32) for part in places]).isfinite().all():
        raise UserError("the model's patch features are not finite; adapt it again with a lower learning rate")
    return PatchFeatures(features, cls, grids)


def _check_memory(num_images: int, needed: int) -> None:
    budget = memory_budget()
    if needed > budget:
        raise UserError(
            f"the features of {num_images} images take {needed / 2**30:.1f} GiB, half of the free memory is "
            f"{budget / 2**30:.1f} GiB; lower the number of images (--num-images)"
        )


def _batches(grids: Sequence[Grid]) -> list[list[int]]:
    """Indices of images of one size, as many as are encoded together."""
    same: dict[Grid, list[int]] = {}
    for index, grid in enumerate(grids):
        same.setdefault(grid, []).append(index)
    batches = []
    for (rows, columns), indices in same.items():
        limit = max(1, PASS_PATCHES // (rows * columns))
        batches += [indices[first : first + limit] for first in range(0, len(indices), limit)]
    return batches


def by_image(rows: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """The rows of each image, without copying: (patches of all images, ...) -> tensors (patches of one image, ...)."""
    parts: tuple[Tensor, ...] = rows.split([height * width for height, width in grids])
    return parts


def label_map(scores: Tensor, grid: Grid, size: tuple[int, ...]) -> Tensor:
    """Class index (h, w) of the pixels of an image of ``size`` (h, w), from the scores (patches, k) of its patches."""
    coarse = scores.float().T.reshape(1, -1, *grid)
    fine = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return fine[0].max(dim=0).indices  # on the CPU several times as fast as argmax, which finds the same


def pixel_counts(scores: Tensor, grid: Grid, label: NDArray[np.uint8]) -> Tensor:
    """Confusion of the pixels of one image: scores (patches, k), label (h, w) -> (k, k) int64."""
    predicted = label_map(scores, grid, label.shape)
    return confusion_matrix(predicted, label, num_classes=scores.shape[1], ignore_index=IGNORE_INDEX)


def counts_of(scores: Iterable[tuple[int, Tensor]], grids: Sequence[Grid], labels: PatchLabels) -> Tensor:
    """(image, scores (patches, k)) of some images -> confusion of their pixels (images, k, k), zero for the others."""
    num_classes = labels.shares.shape[1]
    counts = torch.zeros((len(grids), num_classes, num_classes), dtype=torch.int64)
    for image, patches in scores:
        counts[image] = pixel_counts(patches, grids[image], labels.maps[image])
    return counts


def check_folds(shares: Sequence[Tensor], folds: Sequence[Fold]) -> None:
    """UserError if the training images of a fold have no labelled pixel; ``shares`` (patches, k) by image."""
    labelled = [bool(image.any()) for image in shares]
    for fold in folds:
        if not any(labelled[i] for i in fold.train):
            raise UserError(
                f"the {len(fold.train)} training images of a fold have no labelled pixel; "
                "add labelled images, or split them otherwise"
            )
