"""How sure a difference of two segmentation models is: both were tested on the same images, perhaps with several seeds.

Scores are functions of areas: the pixels of each class that are intersect (label and prediction agree), labelled and
predicted, pooled over images first, as mmsegmentation does.

The squared standard error of a difference has two parts. Test images are a sample: they are drawn anew, with the same
draw for both models (paired bootstrap; Efron and Tibshirani 1993), times n / (n - 1). Replicates, that is seeds or
draws of a control, are a sample as well, crossed with the images: with R replicates their part is s² / R, less what
the images' part holds already, the interaction of images and replicates (the moment estimate of crossed random
effects; Searle, Casella and McCulloch 1992).

The interval is the difference ± t standard errors. The degrees of freedom of t are n - 1 for the images' part, those
of Welch for the replicates' part, and between the two their harmonic mean weighted with the parts. The formula of
Welch and Satterthwaite would square the weights, which gives too many degrees just when few replicates agree by
chance: in simulations its 95 % intervals missed up to 8 % of true differences with 3 replicates and 12 % with 2,
these up to 6 % and 10 %, and 5 % with 5. Without replicates they missed 7 % with 20 images and 6 % with 45.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glare.errors import UserError
from glare.t_distribution import t_quantile

Score = Callable[[Tensor], Tensor]
"""Areas (..., 3, k) -> one score (...) or m scores (..., m), in [0, 1], NaN where undefined."""

MOST_NEEDED = 10**6


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

    ``image_variance`` and ``seed_variance`` add up to the squared standard error. ``images`` and ``seeds`` are the
    numbers of images and of replicates that these rest on; with 1 seed the difference holds for that seed only.
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
    """Variance of the score of one replicate of its kind, known from ``degrees`` + 1 of them."""

    variance: float
    degrees: int


def difference(
    first: Tensor,
    second: Tensor,
    *,
    score: Score,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    spread: Spread | None = None,
) -> Estimate:
    """How much higher the first model scores than the second, on average over replicates.

    Args:
        first: areas (R1, n, 3, k) of R1 replicates on n images.
        second: areas (R2, n, 3, k) on the same images. With R1 = R2 replicates are pairs, else independent. A side
            with one replicate has no replicate variance: the interval holds for this very replicate.
        score: areas (..., 3, k) -> (...).
        confidence: of the interval, 0..1.
        resamples: of the images.
        seed: of the resamples; equal for all differences on the same images.
        spread: of one replicate of either side, where both are of the same kind, in place of their own variances;
            so a single replicate can be compared with others; see ``spread_of``.

    Raises:
        UserError: fewer than 2 images.
    """
    images = torch.tensor([first.shape[1]])
    found = differences(
        first,
        second,
        score=lambda areas: score(areas)[..., None],
        images=images,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        spread=spread,
    )
    return found[0]


def class_differences(
    first: Tensor, second: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[Estimate | None]:
    """The difference of each class's IoU, as ``difference``; None for classes labelled in fewer than 2 images.

    The images of a class are those where it is labelled.
    """
    images = (first[0, :, 1] > 0).sum(dim=0)
    known = (images > 1).nonzero().flatten()
    found = differences(
        first,
        second,
        score=lambda areas: class_iou(areas)[..., known],
        images=images[known],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    by_class = dict(zip(known.tolist(), found, strict=True))
    return [by_class.get(index) for index in range(len(images))]


def spread_of(replicates: Tensor, *, score: Score) -> Spread:
    """How far replicates lie apart: areas (R, n, 3, k) of at least 2, and a score (..., 3, k) -> (...)."""
    return Spread(score(replicates.sum(dim=1)).var().item(), len(replicates) - 1)


def differences(
    first: Tensor,
    second: Tensor,
    *,
    score: Score,
    images: Tensor,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    spread: Spread | None = None,
) -> list[Estimate]:
    """``difference`` of m scores at once.

    Args:
        first: areas (R1, n, ..., 3, k).
        second: areas (R2, n, ..., 3, k).
        score: areas (..., 3, k) -> (..., m).
        images: (m,) number of images that each score rests on.
        confidence: this and the others as for ``difference``.
        resamples: of the images.
        seed: of the resamples.
        spread: of one replicate.
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(f"areas have shapes {tuple(first.shape)} and {tuple(second.shape)}; give the same images")
    if first.shape[1] < 2:
        raise UserError(f"only {first.shape[1]} image is tested; the interval of a difference needs at least 2")
    weights = _weights(first.shape[1], resamples, seed)
    sides = [_scores(side, score, weights) for side in (first, second)]
    mean = sides[0].mean(dim=1) - sides[1].mean(dim=1)
    image_part = _image_variance(mean, images)
    seed_part = _seed_part(sides, images) if spread is None else _given_seed_part(spread, sides)
    return _estimates(mean[0], image_part, images, seed_part, confidence)


def needed(estimate: Estimate, *, power: float = 0.8, confidence: float = 0.95) -> Needed:
    """How many images, with the present seeds, or seeds, with the present images, would show the difference.

    That is: if the true difference is the estimated one, its interval excludes 0 with probability ``power``. What
    depends on image and seed together counts as the images' part, so seeds may do a little more than said here.
    """

    def enough(images: int, seeds: int) -> bool:
        image_part = estimate.image_variance * estimate.images / images
        seed_part = estimate.seed_variance * estimate.seeds / seeds
        variance = image_part + seed_part
        if not variance > 0:
            return variance == 0 and estimate.value != 0
        degrees = variance / (image_part / (images - 1) + (seed_part / (seeds - 1) if seed_part else 0))
        quantiles = t_quantile((1 + confidence) / 2, degrees) + t_quantile(power, degrees)
        return abs(estimate.value) >= quantiles * math.sqrt(variance)

    many = range(2, MOST_NEEDED + 1) if estimate.seeds > 1 else range(1, 2)
    return Needed(
        images=_first(range(2, MOST_NEEDED + 1), lambda images: enough(images, estimate.seeds)),
        seeds=_first(many, lambda seeds: enough(estimate.images, seeds)),
    )


def _first(numbers: range, holds: Callable[[int], bool]) -> int | None:
    """The first of the numbers from which on it holds."""
    place = bisect_left(numbers, True, key=holds)
    return numbers[place] if place < len(numbers) else None


@dataclass(frozen=True)
class _SeedPart:
    """Replicates' part of the squared standard error of m scores: ``variance`` s² / R, of which ``interaction`` is
    in the images' part already, with ``degrees`` of freedom; from ``seeds`` replicates.
    """

    variance: Tensor
    interaction: Tensor
    degrees: Tensor
    seeds: int


def _weights(num_images: int, resamples: int, seed: int) -> Tensor:
    """How often each image is in each draw (1 + resamples, n); the first draw is that of all images once."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_images, (resamples, num_images), generator=generator)
    counts = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    return torch.cat((torch.ones((1, num_images), dtype=torch.float64), counts))


def _scores(side: Tensor, score: Score, weights: Tensor) -> Tensor:
    """Pooled scores (1 + resamples, R, m) of areas (R, n, ..., 3, k)."""
    return score(torch.tensordot(weights, side, dims=([1], [1])))


def _image_variance(scores: Tensor, images: Tensor) -> Tensor:
    """Bootstrap variance (..., m) of scores (1 + resamples, ..., m); resamples without a score are left out."""
    resampled = scores[1:]
    variance = (resampled - resampled.nanmean(dim=0)).square().nanmean(dim=0)
    return variance * images / (images - 1)


def _one_replicate(scores: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (m,) of one replicate, and its interaction with the images, from scores (1 + resamples, R, m)."""
    replicates = scores.shape[1]
    of_each = _image_variance(scores, images).mean(dim=0)
    of_mean = _image_variance(scores.mean(dim=1), images)
    return scores[0].var(dim=0), (of_each - of_mean) * replicates / (replicates - 1)


def _seed_part(sides: Sequence[Tensor], images: Tensor) -> _SeedPart:
    """From the scores (1 + resamples, R, m) of two sides: as many replicates are pairs, others independent."""
    first, second = sides
    levels = [first - second] if first.shape[1] == second.shape[1] else [first, second]
    levels = [level for level in levels if level.shape[1] > 1]
    variance = interaction = uncertainty = torch.zeros(len(images), dtype=torch.float64)
    for level in levels:
        replicates = level.shape[1]
        spread, crossed = _one_replicate(level, images)
        variance = variance + spread / replicates
        interaction = interaction + crossed / replicates
        uncertainty = uncertainty + (spread / replicates).square() / (replicates - 1)
    return _SeedPart(
        variance, interaction, variance.square() / uncertainty, min((level.shape[1] for level in levels), default=1)
    )


def _given_seed_part(spread: Spread, sides: Sequence[Tensor]) -> _SeedPart:
    """As ``_seed_part``; how much of a given variance is interaction is not known, so nothing is taken off."""
    none = torch.zeros_like(sides[0][0, 0])
    variance = none + spread.variance * sum(1 / side.shape[1] for side in sides)
    return _SeedPart(variance, none, none + spread.degrees, spread.degrees + 1)


def _estimates(
    value: Tensor, image_part: Tensor, images: Tensor, seed_part: _SeedPart, confidence: float
) -> list[Estimate]:
    net = (seed_part.variance - seed_part.interaction).clamp(min=0)
    doubt = image_part / (images - 1) + (seed_part.variance / seed_part.degrees).nan_to_num()
    degrees = (image_part + seed_part.variance) / doubt
    found = []
    columns = (column.tolist() for column in (value, image_part, net, degrees, images))
    for middle, by_image, by_seed, freedom, count in zip(*columns, strict=True):
        error = math.sqrt(by_image + by_seed)
        half = t_quantile((1 + confidence) / 2, freedom) * error if error > 0 else error
        found.append(Estimate(middle, middle - half, middle + half, by_image, by_seed, count, seed_part.seeds))
    return found
