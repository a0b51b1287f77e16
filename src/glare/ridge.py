"""The probe ``linear``: ridge regression in closed form from frozen patch features to the classes of the pixels.

Least squares over the labelled pixels, each with the features of its patch and its class as one-hot target, an
intercept that is not penalised, and features that are centred but not standardised. Pixels weigh as the inverse root
of their class's frequency in the training part: with equal weights, least squares hardly ever predicts a rare class,
and mIoU then hangs on which way a few pixels fall. Of exponents 0 to -1 for untouched features this one gave the best
or nearly the best mIoU without loss of pixel accuracy (``training/RESULTS.md``).

All of it follows from sums over images, [1, x]ᵀ [a, a x, y] with the weighted class shares y of a patch and their sum
a; so images leave a training part by subtraction, and one eigen-decomposition gives the solutions of all strengths.

The strength is a multiple of the mean eigenvalue of the centred Gram matrix: the same after any scaling of the
features. It is chosen inside the training part of each fold by mIoU, pooled over inner folds, of patches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glare.frozen_features import PatchFeatures, PatchLabels, by_image, check_folds, counts_of
from glare.gram import eigh
from glare.intervals import areas, mean_iou
from glare.splits import Fold, inner_folds

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -15, -1))
"""Multiples of the mean eigenvalue, from strong to weak: of equal ones the strongest is taken."""

ROUNDING = 1e-12  # of the mean square of the features: variance below it is what centring leaves of constant features
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Ridge:
    """Solutions for s strengths: ``weight`` (d, s, k) and ``intercept`` (s, k), float32."""

    weight: Tensor
    intercept: Tensor

    def scores(self, patches: Tensor) -> Tensor:
        """Class scores (n, s, k) of patch features (n, d)."""
        scores: Tensor = torch.tensordot(patches.float(), self.weight, dims=1) + self.intercept
        return scores


def ridge_counts(
    features: PatchFeatures, labels: PatchLabels, folds: Sequence[Fold], *, groups: Sequence[str] | None, seed: int
) -> Tensor:
    """Confusion of the pixels of every test image, (images, k, k) int64, zero for others; see ``ridge_scores``."""
    return counts_of(ridge_scores(features, labels, folds, groups=groups, seed=seed), features.grids, labels)


def ridge_scores(
    features: PatchFeatures, labels: PatchLabels, folds: Sequence[Fold], *, groups: Sequence[str] | None, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Class scores of every test image under the ridge of its fold.

    Args:
        features: of all images.
        labels: of the same images; those of test images are not looked at.
        folds: no image is tested twice.
        groups: of all images, for the inner folds; None where images are not grouped.
        seed: of inner folds that are drawn.

    Yields:
        Index of a test image, and the scores (patches, k) of its patches.

    Raises:
        UserError: the training part of a fold has no labelled pixel.
    """
    patches, shares = by_image(features.features, features.grids), by_image(labels.shares, features.grids)
    check_folds(shares, folds)
    num_classes = labels.shares.shape[1]

    def moments(images: Sequence[int], weight: Tensor) -> Tensor:
        sums = (image_moments(patches[i], shares[i], weight) for i in images)
        return sum(sums, start=torch.zeros((), dtype=torch.float64))

    for fold in folds:
        weight = class_weights([shares[i] for i in fold.train])
        parts = inner_folds(fold.train, groups, seed=seed)
        sums = torch.stack([moments(part, weight) for part in parts])
        total = sums.sum(dim=0)
        found = torch.zeros((len(STRENGTHS), num_classes, num_classes), dtype=torch.float64)
        for part, left_out in zip(parts, sums, strict=True):
            ridge = solve(total - left_out, STRENGTHS)
            for image in part:
                found += patch_counts(ridge.scores(patches[image]), shares[image])
        best = STRENGTHS[int(mean_iou(areas(found)).argmax())]
        chosen = solve(total, [best])
        for image in fold.test:
            yield image, chosen.scores(patches[image]).squeeze(1)


def class_weights(shares: Sequence[Tensor]) -> Tensor:
    """Weight of a pixel of each class, (k,) float64: frequency ** -0.5, mean 1 over labelled pixels, 0 without any.

    Args:
        shares: of pixels by class, (patches, k), of each training image.
    """
    pixels = torch.stack([image.sum(dim=0, dtype=torch.float64) for image in shares]).sum(dim=0)
    weight = pixels.rsqrt().where(pixels > 0, 0)
    return weight * pixels.sum() / (weight * pixels).sum()


def image_moments(patches: Tensor, shares: Tensor, weight: Tensor) -> Tensor:
    """What the ridge needs of some patches: [1, x]ᵀ [a, a x, y], (1 + d, 1 + d + k) float64.

    Args:
        patches: features x (n, d).
        shares: of pixels by class, (n, k); times ``weight`` they are y, whose sum over classes is a.
        weight: of each class, (k,) float64.
    """
    x, y = patches.double(), shares.double() * weight
    total = y.sum(dim=1, keepdim=True)
    return F.pad(x, (1, 0), value=1.0).T @ torch.cat([total, total * x, y], dim=1)


def solve(moments: Tensor, strengths: Sequence[float]) -> Ridge:
    """Ridge solutions for ``strengths``, multiples of the mean eigenvalue, from summed ``image_moments``."""
    dim = len(moments) - 1
    total = moments[0, 0].clamp(min=TINY)
    mean = moments[1:, 0] / total
    mean_target = moments[0, 1 + dim :] / total
    centred = moments[1:, 1 : 1 + dim] - total * torch.outer(mean, mean)
    cross = moments[1:, 1 + dim :] - total * torch.outer(mean, mean_target)
    values, vectors = eigh(centred)
    penalty = torch.tensor(strengths, dtype=torch.float64) * values.mean()
    rounding = (ROUNDING * moments.diagonal()[1:].mean()).clamp(min=TINY)
    shrunk = (vectors.T @ cross).unsqueeze(1) / (values.unsqueeze(1) + penalty).clamp(min=rounding).unsqueeze(2)
    weight = torch.tensordot(vectors, shrunk, dims=1)
    return Ridge(weight.float(), (mean_target - torch.tensordot(mean, weight, dims=1)).float())


def patch_counts(scores: Tensor, shares: Tensor) -> Tensor:
    """Confusion of the pixels of patches that are of one predicted class each, in units of a patch.

    Args:
        scores: (n, s, k).
        shares: (n, k).

    Returns:
        (s, k, k), rows labels, columns predictions.
    """
    predicted = F.one_hot(scores.argmax(dim=2), scores.shape[2])
    return torch.einsum("nl,nsp->slp", shares, predicted.to(shares))
