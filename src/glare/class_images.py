"""Images with a class, that of the folder each lies in, and their training batches, mixed by MixUp.

MixUp (Zhang et al. 2018): x = l x_i + (1 - l) x_j and y = l y_i + (1 - l) y_j of an image i and its partner j, with
l ~ Beta(alpha, alpha) drawn for each pair. Images 2k and 2k + 1 of a batch, whose order is random anyway, are partners
of each other with one l; the last of an odd batch stays as it is. So the batch is the same however it is shared out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import one_hot

from glare.crops import PackedImages, cut, subset
from glare.data.cache import Packed
from glare.data.same_files import resolved
from glare.errors import UserError
from glare.geometry import random_resized_crops
from glare.labelled_crops import photometric_distortion
from glare.paths import kind_of, local_path
from glare.shares import draws_of
from glare.views import Normalisation

CROPS, MIXUP = 1, 2
"""What a step draws for: a part of the seed of its generator."""

FLIP = 0.5


@dataclass(frozen=True)
class ClassImages:
    """Decoded images and the number (n,) int64 of the class of each, of ``classes``."""

    images: PackedImages
    labels: Tensor
    classes: Sequence[str]


def class_of(name: str) -> str:
    """The folder that an image lies in, "" for none."""
    return PurePosixPath(name).parent.name


def class_names(names: Sequence[str], data: str) -> list[str]:
    """The classes of images, in alphabetical order. Raises UserError unless each lies in a folder, of two or more."""
    classes = sorted({class_of(name) for name in names})
    if "" in classes or len(classes) < 2:
        raise UserError(
            f"data {data!r} has no two classes: each image has to lie in a folder named after its class, such as "
            "forest/1.jpg and street/2.jpg; give the folder above these"
        )
    return classes


def labelled(packed: Packed, classes: Sequence[str], data: str) -> ClassImages:
    """The images with their classes. Raises UserError where one is of no class that is trained."""
    number = {name: place for place, name in enumerate(classes)}
    unknown = sorted({class_of(name) for name in packed.names} - number.keys())
    if unknown:
        raise UserError(
            f"data {data!r} has the class {unknown[0]!r}, the training data has {', '.join(classes)}; "
            "give folders of the same names"
        )
    return ClassImages(packed.images, torch.tensor([number[class_of(name)] for name in packed.names]), classes)


def check_apart(names: Sequence[str], data: str, val_names: Sequence[str], val_data: str) -> None:
    """Raise UserError where an image to measure the accuracy on is one to train on, behind links, too."""
    trained = set(resolved(_origin(data), names))
    shared = sum(place in trained for place in resolved(_origin(val_data), val_names))
    if shared:
        raise UserError(
            f"{shared:,} of the {len(val_names):,} images to measure the accuracy on are among those to train on; "
            "give others by --val-data, or leave it out"
        )


def _origin(data: str) -> str:
    """What names of images are below: the folder, without links; other data tell by their name."""
    path = local_path(data)
    return os.path.realpath(path) if kind_of(path) else data


@dataclass(frozen=True)
class ClassCrops:
    """How training crops are made: side in px, share of the image low and high, alpha of MixUp, normalisation."""

    size: int
    area: tuple[float, float]
    mixup: float
    normalise: Normalisation


def cut_batch(
    data: ClassImages,
    index: Tensor,
    crops: ClassCrops,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """This process's share of the batch ``index``: augmented, mixed pixels (b, 3, h, w) and targets (b, classes)."""
    draws = draws_of(accelerator, len(index), seed=seed, step=step, purpose=CROPS)
    images, own = data.images, index[draws.share]
    labels = data.labels[own]
    if images.pixels.device.type != accelerator.device.type:  # "cuda" is not "cuda:0"
        images, own = subset(images, own).to(accelerator.device), torch.arange(len(own))
    windows = random_resized_crops(images.size.cpu()[own], area=crops.area, flip_prob=FLIP, draws=draws)
    pixels = photometric_distortion(cut(images, own, windows, size=(crops.size, crops.size)), draws=draws)
    targets = one_hot(labels, len(data.classes)).float().to(accelerator.device)
    if not crops.mixup:
        return crops.normalise(pixels), targets
    factors = mixup_factors(len(index), crops.mixup, seed=seed, step=step)[draws.share]
    return mixed(crops.normalise(pixels), targets, factors)


def check_pairs(batch_size: int, processes: int) -> None:
    """Raise UserError where MixUp would mix images of two processes."""
    if processes > 1 and batch_size // processes % 2:
        raise UserError(
            f"mixup mixes pairs of images, and a batch_size of {batch_size} gives each of {processes} processes "
            f"{batch_size // processes}; give a multiple of {2 * processes}, or --mixup 0"
        )


def mixup_factors(total: int, alpha: float, *, seed: int, step: int) -> Tensor:
    """What each image of a batch keeps of itself: (total,) float64, the same for both of a pair."""
    pairs = np.random.default_rng((seed, step, MIXUP)).beta(alpha, alpha, size=(total + 1) // 2)
    return torch.from_numpy(pairs).repeat_interleave(2)[:total]


def mixed(pixels: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """MixUp of pixels (b, 3, h, w) and targets (b, classes), each image with its neighbour, by factors (b,)."""
    last = len(pixels) - 1
    partner = (torch.arange(len(pixels)) ^ 1).clamp(max=last).to(pixels.device)  # 1, 0, 3, 2, ...
    share = factors.unsqueeze(1).to(targets)
    return (
        torch.lerp(pixels[partner], pixels, share.view(-1, 1, 1, 1)),
        torch.lerp(targets[partner], targets, share),
    )
