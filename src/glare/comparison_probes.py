"""Frozen probes of a comparison: one data set read once, and what every model scores on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from glare.comparison import Health
from glare.comparison_data import Division, Pool, SplitPlan, divide
from glare.frozen_features import PatchFeatures, PatchLabels, counts_of, label_map, read_images
from glare.health import feature_std, mean_cosine, rankme
from glare.intervals import areas
from glare.near_duplicates import repeats, thumbnail
from glare.neighbours import knn_scores
from glare.ridge import ridge_scores
from glare.splits import Fold

PROBES = {"linear": ("linear",), "knn": ("knn", "whitened knn"), "fpn": ("fpn",)}
"""Protocol -> the probes it consists of, which have to agree."""


@dataclass(frozen=True)
class Subject:
    """One data set as the probes see it: images, labels, and who trains and who tests.

    ``folds`` by seed; ``images`` uint8 (3, h, w).
    """

    name: str
    pool: Pool
    images: list[Tensor]
    labels: PatchLabels
    division: Division
    folds: list[list[Fold]]
    seed: int

    @property
    def tested(self) -> list[int]:
        """Indices of the images that are measured on."""
        return sorted({image for fold in self.folds[0] for image in fold.test})

    @property
    def tested_groups(self) -> list[str] | None:
        """Groups of those images."""
        groups = self.division.groups
        return None if groups is None else [groups[image] for image in self.tested]

    def picture(self, image: int) -> Image.Image:
        """An image as the probes see it."""
        return Image.fromarray(self.images[image].permute(1, 2, 0).numpy())

    def repeats(self) -> int:
        """How many of them are near-duplicates of another one."""
        return len(repeats(np.stack([thumbnail(self.picture(image)) for image in self.tested])))

    def thumbnails(self, count: int, *, side: int) -> Tensor:
        """At most ``count`` images from all over the data set, at ``side`` x ``side`` px: (n, 3, side, side) uint8."""
        chosen = np.linspace(0, len(self.images) - 1, min(count, len(self.images))).round().astype(int)
        small = [np.asarray(self.picture(i).resize((side, side), Image.Resampling.BICUBIC)) for i in chosen]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


def read_subject(
    name: str, pool: Pool, plan: SplitPlan, *, patch: int, short_side: int, strict: bool, repeat: bool
) -> Subject:
    """Decode a data set and divide what could be read.

    ``repeat``: whether seeds matter to the probe even where folds do not depend on them.
    """
    images, labels, names, skipped = read_images(pool.data, patch=patch, short_side=short_side, strict=strict)
    for bad, reason in skipped:
        print(f"  skipped {bad}: {reason}")
    kept = set(names)
    pool = pool.subset([i for i, image in enumerate(pool.data.names) if image in kept])
    division = divide(pool, plan, data=name)
    folds = division.folds if division.drawn or not repeat else division.folds * plan.seeds
    print(f"{name}: {len(images)} images, {division.text}")
    return Subject(name, pool, images, labels, division, folds, plan.seed)


def frozen_areas(features: PatchFeatures, subject: Subject, protocol: str) -> dict[str, Tensor]:
    """Areas (seeds, tested images, 3, k) of each probe of a frozen protocol; see ``intervals.areas``."""
    found: dict[str, Tensor] = {}
    for probe in PROBES[protocol]:
        by_seed = (_scores(features, subject, probe, folds, number) for number, folds in enumerate(subject.folds))
        counts = [counts_of(scores, features.grids, subject.labels)[subject.tested] for scores in by_seed]
        found[probe] = areas(torch.stack(counts))
    return found


def frozen_predictions(
    features: PatchFeatures, subject: Subject, protocol: str, images: Sequence[int]
) -> list[NDArray[np.uint8]]:
    """Class indices (h, w) of some tested images, by the first seed of the protocol's last probe."""
    folds = [replace(fold, test=[i for i in fold.test if i in images]) for fold in subject.folds[0]]
    scores = dict(_scores(features, subject, PROBES[protocol][-1], [fold for fold in folds if fold.test], 0))
    maps = [label_map(scores[i], features.grids[i], subject.labels.maps[i].shape) for i in images]
    return [found.to(torch.uint8).numpy() for found in maps]


def _scores(
    features: PatchFeatures, subject: Subject, probe: str, folds: Sequence[Fold], number: int
) -> Iterator[tuple[int, Tensor]]:
    """Image and scores (patches, k) of every test image of ``folds``, those of seed ``number``."""
    seed = subject.seed + number
    if probe == "linear":
        return ridge_scores(features, subject.labels, folds, groups=subject.division.groups, seed=seed)
    return knn_scores(features, subject.labels, folds, whiten=probe == "whitened knn", seed=seed)


def health_of(features: PatchFeatures, untouched: PatchFeatures) -> Health:
    """Label-free state of a model's patch features."""
    return Health(
        rankme=rankme(features.features),
        std=feature_std(features.features),
        cosine=mean_cosine(features.features, untouched.features),
    )
