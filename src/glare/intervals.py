"""How sure a difference of two segmentation models is: both were tested on the same images, perhaps with several seeds.

Scores are functions of areas: the pixels of each class that are intersect (label and prediction agree), labelled and
predicted, pooled over images first, as mmsegmentation does.

The squared standard error of a difference has two parts. Test images are a sample: they are drawn anew, with the same
draw for both models (paired bootstrap; Efron and Tibshirani 1993). Replicates, that is seeds or draws of a control,
are a sample as well, crossed with the images: with R replicates their part is s² / R, less what the images' part holds
already, the interaction of images and replicates (the moment estimate of crossed random effects; Searle, Casella and
McCulloch 1992). The interval is the difference ± t standard errors with the degrees of freedom of Welch and
Satterthwaite (Satterthwaite 1946).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""Areas (..., 3, k) -> one score (...) or m scores (..., m), in [0, 1], NaN where undefined."""


def areas(counts: Tensor) -> Tensor:
    """What scores need of confusion matrices: pixels by class that are intersect, labelled and predicted.

    Args:
        counts: (..., k, k), rows labels, columns predictions.

    Returns:
        (..., 3, k) float64.
    """
    parts = counts.diagonal(dim1=-2, dim2=-1), counts.sum(dim=-1), counts.sum(dim=-2)
    return torch.stack(parts, dim=-2).double()


def class_iou(areas: Tensor) -> Tensor:
    """IoU of each class: areas (..., 3, k) -> (..., k), NaN where the class has no labels."""
    intersect, labelled, predicted = areas.unbind(dim=-2)
    return (intersect / (labelled + predicted - intersect)).where(labelled > 0, torch.nan)


def mean_iou(areas: Tensor) -> Tensor:
    """Mean IoU over the classes that have labels: areas (..., 3, k) -> (...)."""
    return class_iou(areas).nanmean(dim=-1)


def mean_accuracy(areas: Tensor) -> Tensor:
    """Mean over the classes that have labels of intersect / labelled: areas (..., 3, k) -> (...)."""
    intersect, labelled, _ = areas.unbind(dim=-2)
    return (intersect / labelled).nanmean(dim=-1)


def pixel_accuracy(areas: Tensor) -> Tensor:
    """Share of labelled pixels that are right: areas (..., 3, k) -> (...)."""
    intersect, labelled, _ = areas.unbind(dim=-2)
    return intersect.sum(dim=-1) / labelled.sum(dim=-1)


@dataclass(frozen=True)
class Estimate:
    """A difference and its confidence interval.

    ``image_variance`` and ``seed_variance`` add up to the squared standard error; ``images`` and ``seeds`` are the
    numbers it rests on.
    """

    value: float
    low: float
    high: float
    image_variance: float
    seed_variance: float
    images: int
    seeds: int


@dataclass(frozen=True)
class Needed:
    """How many images alone, or seeds alone, would show a difference; None where no number does."""

    images: int | None
    seeds: int | None


@dataclass(frozen=True)
class Spread:
    """Variance of the score of ONE replicate, known from ``degrees`` + 1 replicates of the same kind."""

    variance: float
    degrees: int
