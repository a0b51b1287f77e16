"""Colour and blur, one pixel at a time, on nested lists image[channel][row][column] of floats in [0, 1]."""

import colorsys
import math

import numpy as np


def clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def luma(red: float, green: float, blue: float) -> float:
    return 0.299 * red + 0.587 * green + 0.114 * blue


def each_pixel(image: np.ndarray, change) -> np.ndarray:
    """Apply ``change(red, green, blue) -> three values`` to an image (3, h, w)."""
    result = np.empty(image.shape, dtype=np.float64)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            result[:, row, column] = change(*(float(c) for c in image[:, row, column]))
    return result


def grey(image: np.ndarray) -> np.ndarray:
    return each_pixel(image, lambda r, g, b: [luma(r, g, b)] * 3)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return each_pixel(image, lambda *rgb: [clip(factor * c) for c in rgb])


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    level = float(np.mean(grey(image)[0]))
    return each_pixel(image, lambda *rgb: [clip(factor * c + (1 - factor) * level) for c in rgb])


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return each_pixel(image, lambda *rgb: [clip(factor * c + (1 - factor) * luma(*rgb)) for c in rgb])


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    def change(*rgb: float) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)

    return each_pixel(image, change)


def solarize(image: np.ndarray) -> np.ndarray:
    return each_pixel(image, lambda *rgb: [1 - c if c >= 0.5 else c for c in rgb])


def reflected(place: int, length: int) -> int:
    """A place beyond the border, mirrored about the outermost pixel until it lies inside."""
    while length > 1 and not 0 <= place < length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place if length > 1 else 0


def gaussian_blur(image: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """A two-dimensional convolution with a cut-off Gaussian and reflected borders."""
    taps = range(-radius, radius + 1)
    kernel = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma**2)) for i in taps for j in taps}
    total = sum(kernel.values())
    _, height, width = image.shape
    result = np.zeros(image.shape, dtype=np.float64)
    for row in range(height):
        for column in range(width):
            for (i, j), weight in kernel.items():
                source = image[:, reflected(row + i, height), reflected(column + j, width)]
                result[:, row, column] += weight / total * source
    return result
