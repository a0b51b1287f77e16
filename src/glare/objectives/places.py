"""Which patches are compared with which, and how many of them there are (paper sections 4.2 and 4.3).

The means of eqs. 7 and 9 run over what is valid in the whole batch, of which a process, or one of several passes, sees
a share. So the places of a batch are found before its terms, and their numbers can be added up in between.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import torch
from torch import Tensor

from glare.draws import Draws
from glare.features import Features
from glare.geometry import match
from glare.regions import RegionConfig, Regions, sample_regions
from glare.views import Views

DIRECTIONS = ((0, 1), (1, 0))
"""(student view, teacher view) of the two global views."""


@dataclass(frozen=True)
class Match:
    """Patches of a student view, local views numbered after global ones, and those of a teacher view they show.

    ``index`` (b, n) int64 and ``valid`` (b, n) bool as of ``geometry.match``.
    """

    view: int
    target: int
    index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Places:
    """What the terms compare of b images.

    ``augmented`` (2, b, n) bool, changed patches of L_loc1; ``matches`` of L_loc2, those of ``DIRECTIONS`` first;
    ``regions`` of L_reg, one a direction, none where the term is left out; ``pixels`` (2, b, 3, h, w) of the clean
    global views, for an objective that reconstructs them.
    """

    augmented: Tensor
    matches: tuple[Match, ...]
    regions: tuple[Regions, ...]
    pixels: Tensor | None = None

    def of(self, images: slice) -> Self:
        """The places of some of the images."""
        return replace(
            self,
            augmented=self.augmented[:, images],
            matches=tuple(replace(m, index=m.index[images], valid=m.valid[images]) for m in self.matches),
            regions=tuple(regions.of(images) for regions in self.regions),
            pixels=None if self.pixels is None else self.pixels[:, images],
        )

    def counts(self) -> dict[str, Tensor]:
        """How many there are: ``images`` and ``augmented`` (1), ``matched`` (matches), ``region`` (regions).

        Without matches or regions their number stands for a 0.
        """
        found = [m.valid.sum() for m in self.matches] or [self.augmented.sum() * 0]
        return {
            "images": self.augmented.new_tensor([self.augmented.shape[1]], dtype=torch.float32),
            "augmented": self.augmented.sum().view(1).float(),
            "matched": torch.stack(found).float(),
            "region": torch.stack([r.matched.sum() for r in self.regions] or [found[0]]).float(),
        }


def find_matches(views: Views, *, min_overlap: float, local_queries: bool) -> tuple[Match, ...]:
    """h of paper eq. 9 for both directions, and with ``local_queries`` from every local to every global view."""
    crops, found = views.global_crops, []
    for a, b in DIRECTIONS:
        found.append(Match(a, b, *match(crops[a], crops[b], views.grid, min_iou=min_overlap)))
    if local_queries:
        for a, b in product(range(len(views.local)), range(len(views.global_))):
            pair = match(views.local_crops[a], crops[b], views.local_grid, views.grid, min_iou=min_overlap)
            found.append(Match(len(views.global_) + a, b, *pair))
    return tuple(found)


def find_regions(
    teacher: Features, matches: tuple[Match, ...], views: Views, config: RegionConfig, draws: Draws
) -> tuple[Regions, ...]:
    """The regions of both directions. Raises ValueError for features without attention."""
    if teacher.attention is None:
        raise ValueError("the regional term needs Features.attention of the teacher")
    return tuple(
        sample_regions(teacher.attention[m.view], (m.index, m.valid), views.grid, config, draws=draws)
        for m in matches[: len(DIRECTIONS)]
    )


Counts = Mapping[str, Tensor]
"""``Places.counts`` of the whole batch."""
