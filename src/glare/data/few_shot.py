"""A part of a data set, drawn with a seed, as few images and few labels are studied: 1/32 of them, 10 %, or 250.

The parts of one seed are nested: the images of 10 % are among those of 20 %.
"""

import torch

from glare.errors import UserError
from glare.runtime import seeded


def drawn(count: int, *, seed: int, fraction: float = 1.0, num_images: int | None = None) -> list[int]:
    """Indices of a part of ``count`` images, rising.

    Args:
        count: of all images.
        seed: another one draws another part.
        fraction: share of the images in (0, 1], rounded to whole ones, at least 1.
        num_images: a number of images in place of a share.

    Raises:
        UserError: both are given, or there are fewer than ``num_images``.
    """
    if num_images is None:
        num_images = max(1, round(fraction * count))
    elif fraction != 1:
        raise UserError(f"fraction is {fraction:g} and num_images {num_images}; give one of them")
    if num_images > count:
        raise UserError(f"num_images is {num_images}, but there are only {count} images; give at most {count}")
    return sorted(torch.randperm(count, generator=seeded(seed, count))[:num_images].tolist())
