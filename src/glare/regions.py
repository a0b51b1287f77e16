"""Attention-aware regions: where they start and which patches they hold (paper section 4.2, "region sampling")."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from glare import ranges
from glare.draws import Draws
from glare.geometry import Grid
from glare.recipes import option


@dataclass(frozen=True)
class RegionConfig:
    """How regions are drawn. The paper gives M = 6, the number of heads of ViT-S: one region a head."""

    count: int | None = option(None, "regions a view; one for each attention head where not given")
    sampling: str = option("attention", "what picks the start patch", choices=("attention", "random"))
    min_side: int = option(3, "smallest number of patches a side")
    max_side: int = option(7, "largest number of patches a side")
    anchor: str = option("corner", "place of the start patch in its region", choices=("corner", "centre"))

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.min_side > self.max_side:
            raise ValueError(f"min_side, max_side are {self.min_side}, {self.max_side}; give 1 <= min_side <= max_side")


@dataclass(frozen=True)
class Regions:
    """M regions of each of b views, padded to the same number l of patches.

    ``index`` (b, m, l) int64, patches of the view; ``valid`` (b, m, l) bool, padding is False;
    ``match_index`` (b, m, l) int64, the corresponding patches of the other view, R'; ``matched`` (b, m, l) bool,
    a patch of the region that has a correspondence (implies ``valid``).
    """

    index: Tensor
    valid: Tensor
    match_index: Tensor
    matched: Tensor

    def of(self, images: slice) -> Self:
        """The regions of some of the views."""
        return type(self)(*(getattr(self, field.name)[images] for field in fields(self)))


def joined(parts: Sequence[Regions]) -> Regions:
    """Regions of several sets of views as those of one set, one after another."""
    return Regions(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Regions)))


def sample_regions(
    attention: Tensor,
    match: tuple[Tensor, Tensor],
    grid: Grid,
    config: RegionConfig,
    *,
    draws: Draws,
) -> Regions:
    """Draw the regions of one view of every image.

    Args:
        attention: (b, heads, n), what the [CLS] token attends to in the last block, head by head.
        match: index and valid of ``geometry.match``, (b, n) each.
        grid: (rows, columns) of the view, n = rows * columns.
        config: number, size and start of the regions.
        draws: of the b images.

    A start patch is the most attended one (or a random one) *among those with a correspondence*; the region's
    sides are uniform in [min_side, max_side] and it is shifted to lie inside the grid. A view without any
    correspondence gets regions of which nothing is matched.
    """
    match_index, match_valid = match
    heads = _choose_heads(attention.shape[1], config.count, draws.generator).to(attention.device)
    if config.sampling == "attention":
        score = attention.float()[:, heads]
    else:
        score = draws.rand(len(heads), attention.shape[2]).to(attention.device)
    start = score.masked_fill(~match_valid.unsqueeze(1), -1).argmax(dim=-1)
    index, valid = _rectangles(start, grid, config, draws)
    flat = index.flatten(1)
    return Regions(
        index=index,
        valid=valid,
        match_index=match_index.gather(1, flat).view_as(index),
        matched=valid & match_valid.gather(1, flat).view_as(index),
    )


def _choose_heads(num_heads: int, count: int | None, generator: torch.Generator) -> Tensor:
    """The head of each region: each once, a random choice where there are more heads than regions."""
    wanted = count or num_heads
    if wanted < num_heads:
        return torch.randperm(num_heads, generator=generator)[:wanted].sort().values
    return torch.arange(wanted) % num_heads


def _rectangles(start: Tensor, grid: Grid, config: RegionConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """Patches of random rectangles that hold the patch ``start`` (b, m): index and valid, (b, m, l)."""
    limits = torch.tensor(grid)
    low, high = limits.clamp(max=config.min_side), limits.clamp(max=config.max_side)
    draw = draws.rand(start.shape[1], 2)
    sides = (low + (draw * (high - low + 1)).floor()).long().to(start.device)  # (b, m, 2) rows, columns
    columns = grid[1]
    corner = torch.stack([start // columns, start % columns], dim=-1)
    if config.anchor == "centre":
        corner = corner - sides // 2
    corner = corner.clamp(min=0).minimum(limits.to(start.device) - sides)
    steps = [torch.arange(int(side), device=start.device) for side in high]
    down, across = (s.flatten() for s in torch.meshgrid(*steps, indexing="ij"))
    valid = (down < sides[..., :1]) & (across < sides[..., 1:])
    index = (corner[..., :1] + down) * columns + corner[..., 1:] + across
    return torch.where(valid, index, 0), valid
