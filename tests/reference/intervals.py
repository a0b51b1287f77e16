"""Scores and intervals of ``glare.intervals``, one image, one resample and one replicate at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Matrix = list[list[int]]  # pixels, rows labels, columns predictions


def class_scores(matrix: Matrix) -> tuple[list[float | None], list[float | None]]:
    """IoU and accuracy of each class, None where the class has no labels."""
    iou: list[float | None] = []
    accuracy: list[float | None] = []
    for c in range(len(matrix)):
        labelled = sum(matrix[c])
        predicted = sum(row[c] for row in matrix)
        hit = matrix[c][c]
        iou.append(hit / (labelled + predicted - hit) if labelled else None)
        accuracy.append(hit / labelled if labelled else None)
    return iou, accuracy


def mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def mean_iou(matrix: Matrix) -> float:
    return mean(class_scores(matrix)[0])


def mean_accuracy(matrix: Matrix) -> float:
    return mean(class_scores(matrix)[1])


def pixel_accuracy(matrix: Matrix) -> float:
    return sum(matrix[c][c] for c in range(len(matrix))) / sum(map(sum, matrix))


def summed(matrices: Sequence[Matrix]) -> Matrix:
    k = len(matrices[0])
    return [[sum(matrix[row][column] for matrix in matrices) for column in range(k)] for row in range(k)]


def sample_variance(values: Sequence[float], *, ddof: int) -> float:
    middle = sum(values) / len(values)
    return sum((value - middle) ** 2 for value in values) / (len(values) - ddof)


def parts(first: Tensor, second: Tensor, *, resamples: int, seed: int) -> tuple[float, float, float, float]:
    """Difference of mean IoU, images' part, replicates' part, degrees of freedom, from counts (R, n, k, k)."""
    n = first.shape[1]
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed)).tolist()

    def scores(side: Tensor, images: Sequence[int]) -> list[float]:
        return [mean_iou(summed([replicate[image] for image in images])) for replicate in side.tolist()]

    def average(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def image_variance(values: Sequence[float]) -> float:
        return sample_variance(values, ddof=0) * n / (n - 1)

    whole = [scores(first, range(n)), scores(second, range(n))]
    drawn = [[scores(side, images) for images in draws] for side in (first, second)]
    value = average(whole[0]) - average(whole[1])
    image_part = image_variance([average(a) - average(b) for a, b in zip(*drawn, strict=True)])
    if len(first) == len(second):
        whole = [[a - b for a, b in zip(*whole, strict=True)]]
        drawn = [[[x - y for x, y in zip(a, b, strict=True)] for a, b in zip(*drawn, strict=True)]]

    variances, crossed = [], []
    for values, resampled in zip(whole, drawn, strict=True):
        replicates = len(values)
        if replicates == 1:
            continue
        of_each = [image_variance([scores[r] for scores in resampled]) for r in range(replicates)]
        of_mean = image_variance([average(scores) for scores in resampled])
        variances.append((sample_variance(values, ddof=1) / replicates, replicates - 1))
        crossed.append((average(of_each) - of_mean) / (replicates - 1))

    total = sum(variance for variance, _ in variances)
    doubt = image_part / (n - 1)
    if total:
        welch = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
        doubt += total / welch
    degrees = (image_part + total) / doubt
    return value, image_part, max(0.0, total - math.fsum(crossed)), degrees
