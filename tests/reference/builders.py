"""The package's nouns made from plain data."""

from collections.abc import Sequence

import numpy as np
import torch
from reference.correspondence import Box

from glare.crops import PackedImages
from glare.geometry import Crop


def crop_of(boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> Crop:
    """Boxes in px of images of the given (width, height) -> Crop (n, 2)."""
    offset, scale = [], []
    for box, (width, height) in zip(boxes, sizes, strict=True):
        x = box.left + box.width if box.flip else box.left
        offset.append((x / width, box.top / height))
        scale.append((-box.width / width if box.flip else box.width / width, box.height / height))
    return Crop(torch.tensor(offset), torch.tensor(scale))


def packed(images: Sequence[np.ndarray]) -> PackedImages:
    """(h, w, 3) uint8 arrays -> PackedImages."""
    size = torch.tensor([(image.shape[1], image.shape[0]) for image in images])
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images]))
    area = size.prod(dim=1)
    return PackedImages(pixels, area.cumsum(0) - area, size)


def noise_image(width: int, height: int, seed: int) -> np.ndarray:
    """Uniform noise, the hardest picture for a resampler."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinate_image(width: int, height: int, limit: int = 256) -> np.ndarray:
    """Red holds each pixel's column, green its row, so that one grey step is one pixel; ``limit`` a side."""
    assert width <= limit and height <= limit
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image
