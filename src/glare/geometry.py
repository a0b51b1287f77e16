"""Where a view came from, and which patches of two views show the same place (paper section 4.2, "back-tracking").

A view is an affine window on its source image: ``source = offset + scale * view``, both in unit coordinates, so
that (0, 0) is the top left *edge* and (1, 1) the bottom right *edge* of an image, whatever its size. Points are
ordered (x, y). A horizontal flip is a negative x scale with the offset at the right edge: no code below ever asks
whether a view is flipped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glare.draws import Draws

Grid = tuple[int, int]
"""(rows, columns) of patches."""

ATTEMPTS = 10  # as torchvision's RandomResizedCrop, which DINO and BYOL used


@dataclass(frozen=True)
class Crop:
    """Affine windows on source images: ``source_unit = offset + scale * view_unit``.

    ``offset`` and ``scale`` are float32 of shape (..., 2), ordered (x, y), in units of the source image.
    """

    offset: Tensor
    scale: Tensor

    def to_source(self, view_unit: Tensor) -> Tensor:
        """Points (..., n, 2) of the view -> the same points in the source image."""
        return self.offset.unsqueeze(-2) + self.scale.unsqueeze(-2) * view_unit

    def to_view(self, source_unit: Tensor) -> Tensor:
        """Points (..., n, 2) of the source image -> the same points in the view; outside [0, 1] when not in it."""
        return (source_unit - self.offset.unsqueeze(-2)) / self.scale.unsqueeze(-2)

    def __getitem__(self, index: int | slice | Tensor | tuple[slice, slice]) -> "Crop":
        return Crop(self.offset[index], self.scale[index])

    def flatten(self) -> "Crop":
        """The same crops with one leading dimension."""
        return Crop(self.offset.reshape(-1, 2), self.scale.reshape(-1, 2))

    def to(self, device: torch.device) -> "Crop":
        """The same crops on ``device``."""
        return Crop(self.offset.to(device), self.scale.to(device))


def factor_to_fit(size_px: Tensor, scale: tuple[int, int]) -> Tensor:
    """By what images are multiplied so that they just fit ``scale``, as mmcv's ``imrescale`` does.

    ``size_px`` (..., 2), sides in any order, and so ``scale``: the longer side may be as long as its larger number, the
    shorter one as its smaller number. The result (...) is float64.
    """
    size_px = size_px.double()
    return torch.minimum(max(scale) / size_px.amax(dim=-1), min(scale) / size_px.amin(dim=-1))


def patch_centres(grid: Grid, *, device: torch.device | None = None) -> Tensor:
    """Centres of the patches of a view, row-major: (rows * columns, 2) in unit coordinates, (x, y)."""
    rows, columns = grid
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def match(a: Crop, b: Crop, grid_a: Grid, grid_b: Grid | None = None, *, min_iou: float = 0.0) -> tuple[Tensor, Tensor]:
    """For every patch of view ``a`` the patch of view ``b`` whose cell holds its centre: h of paper eq. 9.

    Args:
        a: crops (..., 2) of the querying views.
        b: crops (..., 2) of the same images.
        grid_a: patches of ``a`` as (rows, columns).
        grid_b: patches of ``b``; that of ``a`` where not given.
        min_iou: pairs that overlap by no more than this have no match. From 0.5 on, the match is the only patch of
            ``b`` that can overlap so much: the cells of ``b`` are disjoint.

    Returns:
        ``index`` (..., n) int64 into the row-major patches of ``b`` (0 where there is none), and ``valid``
        (..., n) bool: the centre lies inside ``b``. The cell that holds the centre is also the one of
        greatest overlap (LOCA, section 3).
    """
    rows, columns = grid_b or grid_a
    points = b.to_view(a.to_source(patch_centres(grid_a, device=a.offset.device)))
    valid = ((points >= 0) & (points < 1)).all(dim=-1)
    cell = (points * points.new_tensor([columns, rows])).floor().long()
    index = cell[..., 1].clamp(0, rows - 1) * columns + cell[..., 0].clamp(0, columns - 1)
    if min_iou > 0:
        valid = valid & (_overlap(a, b, points, cell, (grid_a, (rows, columns))) > min_iou)
    return torch.where(valid, index, 0), valid


def _overlap(a: Crop, b: Crop, centre: Tensor, cell: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """Intersection over union of a's patches, given by their centres in b, with cells of b: (..., n)."""
    side_a, side_b = (centre.new_tensor([1 / grid[1], 1 / grid[0]]) for grid in grids)
    half = (side_a * (a.scale / b.scale).abs() / 2).unsqueeze(-2)
    low = torch.maximum(centre - half, cell * side_b)
    high = torch.minimum(centre + half, (cell + 1) * side_b)
    shared = (high - low).clamp(min=0).prod(dim=-1)
    return shared / ((2 * half).prod(dim=-1) + side_b.prod() - shared)


def random_resized_crops(
    size_px: Tensor,
    *,
    area: tuple[float, float],
    flip_prob: float,
    draws: Draws,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """One random resized crop an image, on whole pixels, with the sampling rule of torchvision's RandomResizedCrop.

    Args:
        size_px: (n, 2) int64, (width, height) of each source image.
        area: lowest and highest share of the image's area, 0 < low <= high <= 1.
        flip_prob: probability of a horizontal flip.
        draws: of the n images.
        ratio: lowest and highest width / height, drawn log-uniformly.

    Returns:
        Crops (n, 2) on the CPU. Where no draw of ten fits, the largest central window of allowed ratio.
    """
    size_px = size_px.cpu()
    width, height = size_px[:, :1].double(), size_px[:, 1:].double()

    def uniform(low: float, high: float, columns: int = ATTEMPTS) -> Tensor:
        return draws.rand(columns, dtype=torch.float64) * (high - low) + low

    target = uniform(*area) * width * height
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    crop_w = (target * aspect).sqrt().round()
    crop_h = (target / aspect).sqrt().round()
    fits = (crop_w >= 1) & (crop_w <= width) & (crop_h >= 1) & (crop_h <= height)
    fallback_w, fallback_h = _largest_window(width, height, ratio)
    first = torch.cat([fits, torch.ones(len(size_px), 1, dtype=torch.bool)], dim=1).int().argmax(dim=1, keepdim=True)
    crop_w = torch.cat([crop_w, fallback_w], dim=1).gather(1, first)
    crop_h = torch.cat([crop_h, fallback_h], dim=1).gather(1, first)
    place = torch.where(first < ATTEMPTS, uniform(0, 1, 2), 0.5)
    left = (place[:, :1] * (width - crop_w + 1)).floor().minimum(width - crop_w)
    top = (place[:, 1:] * (height - crop_h + 1)).floor().minimum(height - crop_h)
    flip = uniform(0, 1, 1) < flip_prob
    x = torch.where(flip, left + crop_w, left)
    offset = torch.cat([x / width, top / height], dim=1)
    scale = torch.cat([torch.where(flip, -crop_w, crop_w) / width, crop_h / height], dim=1)
    return Crop(offset.float(), scale.float())


def _largest_window(width: Tensor, height: Tensor, ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    window_w = torch.minimum(width, (height * ratio[1]).round().clamp(min=1))
    window_h = torch.minimum(height, (width / ratio[0]).round().clamp(min=1))
    return window_w, window_h
