"""Pillow's bicubic crop-and-resize, one output value at a time, and label lookup, one pixel at a time."""

import math

import numpy as np
from reference.correspondence import Box, source_point


def keys_cubic(x: float) -> float:
    """Keys' interpolation kernel for a = -1/2."""
    a, x = -0.5, abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def resample_line(line: list[float], first: float, length: float, outputs: int) -> list[float]:
    """Resize the stretch [first, first + length) px of a line: 0 beyond the line, 8-bit range elsewhere.

    The kernel is widened when the stretch is reduced, and sees no pixel outside the stretch or the line.
    """
    step = length / outputs
    reduction = max(step, 1.0)
    inside = range(max(math.floor(first + 1e-2), 0), min(math.ceil(first + length - 1e-2), len(line)))
    result = []
    for output in range(outputs):
        centre = first + (output + 0.5) * step
        if not 0 <= centre < len(line):
            result.append(0.0)
            continue
        weights = [keys_cubic((pixel + 0.5 - centre) / reduction) for pixel in inside]
        total = sum(w * line[pixel] for w, pixel in zip(weights, inside, strict=True)) / sum(weights)
        result.append(min(max(total, 0.0), 255.0))
    return result


def crop_and_resize(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """An (h, w, 3) uint8 image cut to ``box``, resized to ``size`` (height, width): floats in [0, 1]."""
    height, width = size
    result = np.zeros((height, width, 3))
    for channel in range(3):
        lines = [resample_line(list(map(float, row)), box.left, box.width, width) for row in image[..., channel]]
        columns = [resample_line([row[x] for row in lines], box.top, box.height, height) for x in range(width)]
        for x, column in enumerate(columns):
            for y, value in enumerate(column):
                result[y, width - 1 - x if box.flip else x, channel] = value / 255
    return result


def crop_labels(labels: np.ndarray, box: Box, size: tuple[int, int], fill: int) -> np.ndarray:
    """The label under the centre of every pixel of a crop; ``fill`` outside the image."""
    result = np.full(size, fill, dtype=np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = source_point(box, (column + 0.5) / size[1], (row + 0.5) / size[0])
            if 0 <= x < labels.shape[1] and 0 <= y < labels.shape[0]:
                result[row, column] = labels[math.floor(y), math.floor(x)]
    return result
