"""Back-tracking one patch at a time (paper section 4.2), from boxes in pixels and a flip bit."""

import math
import random
from typing import NamedTuple


class Box(NamedTuple):
    """Where a view was cut from its source, in pixels, and whether it was then mirrored."""

    left: float
    top: float
    width: float
    height: float
    flip: bool


Grid = tuple[int, int]  # rows, columns


def source_point(box: Box, u: float, v: float) -> tuple[float, float]:
    """A point of a view in unit coordinates -> pixels of the source."""
    if box.flip:
        u = 1 - u
    return box.left + u * box.width, box.top + v * box.height


def view_point(box: Box, x: float, y: float) -> tuple[float, float]:
    """A point of the source in pixels -> unit coordinates of a view."""
    u, v = (x - box.left) / box.width, (y - box.top) / box.height
    return (1 - u if box.flip else u), v


def corresponding_patch(a: Box, b: Box, row: int, column: int, grid_a: Grid, grid_b: Grid) -> int | None:
    """h(x^(s) | X'): the patch of ``b`` that holds the centre of a patch of ``a``, if there is one."""
    x, y = source_point(a, (column + 0.5) / grid_a[1], (row + 0.5) / grid_a[0])
    u, v = view_point(b, x, y)
    if not (0 <= u < 1 and 0 <= v < 1):
        return None
    return math.floor(v * grid_b[0]) * grid_b[1] + math.floor(u * grid_b[1])


def correspondence(a: Box, b: Box, grid_a: Grid, grid_b: Grid) -> list[int | None]:
    """``corresponding_patch`` of all patches of ``a``, row by row."""
    cells = [(row, column) for row in range(grid_a[0]) for column in range(grid_a[1])]
    return [corresponding_patch(a, b, row, column, grid_a, grid_b) for row, column in cells]


def patch_in_source(box: Box, index: int, grid: Grid) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of a patch, in pixels of the source."""
    row, column = divmod(index, grid[1])
    x0, y0 = source_point(box, column / grid[1], row / grid[0])
    x1, y1 = source_point(box, (column + 1) / grid[1], (row + 1) / grid[0])
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def overlap(p: tuple[float, float, float, float], q: tuple[float, float, float, float]) -> float:
    """Area two rectangles share."""
    across = min(p[2], q[2]) - max(p[0], q[0])
    down = min(p[3], q[3]) - max(p[1], q[1])
    return max(across, 0.0) * max(down, 0.0)


def random_resized_crop(
    width: int,
    height: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    draw: random.Random,
) -> tuple[int, int, int, int]:
    """The rule of torchvision's RandomResizedCrop, told from its documentation: left, top, width, height.

    Ten times, an area and an aspect ratio (log-uniform) are drawn, and the first pair that fits is placed at
    a uniformly drawn whole pixel. If none fits, the largest central window of an allowed ratio.
    """
    for _ in range(10):
        target = width * height * draw.uniform(*area)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, max(w, 1), max(h, 1)
