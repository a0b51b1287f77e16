"""The two halves of a segmentation score: finding where something is, and saying what it is (LOCA, section 5.2).

Localization: an oracle gives each predicted mask the class of the true mask of that image that it overlaps best, by
IoU; what mIoU then lacks is wrong outlines. Classification: which classes are in an image, wherever they are; mean
average precision. A mask is all pixels of one class in an image. LOCA does not say how an image's score for a class is
made; here it is the highest probability of any pixel. Pixels with the ignored label count in neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glare.metrics import SegmentationScores


def localised(matrix: Tensor) -> Tensor:
    """The confusion matrix of one image after the oracle; rows are labels, columns predictions (k, k) int64.

    A predicted mask that overlaps no true one keeps its class, which is counted nowhere.
    """
    union = matrix.sum(dim=1, keepdim=True) + matrix.sum(dim=0) - matrix
    iou = matrix / union.clamp(min=1)
    best = torch.where(matrix.any(dim=0), iou.argmax(dim=0), torch.arange(len(matrix)))
    return torch.zeros_like(matrix).index_add_(1, best, matrix)


def presence_scores(logits: Tensor, counted: Tensor) -> Tensor:
    """How likely each class is somewhere in an image, where pixels are counted; 0 where none are.

    logits (n, k, h, w), counted (n, h, w) bool; the result is (n, k) in [0, 1].
    """
    return logits.softmax(dim=1).where(counted.unsqueeze(1), 0).amax(dim=(2, 3))


def average_precision(scores: Tensor, present: Tensor) -> float:
    """Mean precision at each image that has the class, from the highest score down; NaN where none has it.

    scores (n,), present (n,) bool. Images of equal score count together, so that their order does not matter.
    """
    if not present.any():
        return math.nan
    levels = scores.unique(sorted=True).flip(0)
    chosen = scores >= levels[:, None]
    hits = (chosen & present).sum(dim=1)
    gained = hits.diff(prepend=hits.new_zeros(1))
    return float((gained * hits / chosen.sum(dim=1)).sum() / present.sum())


@dataclass(frozen=True)
class SplitScores:
    """``localization``: mIoU with the oracle's classes; ``classification``: mAP over the classes that occur; [0, 1]."""

    localization: float
    classification: float


class ScoreSplitter:
    """Gathers what ``SplitScores`` need, image by image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.matrix = torch.zeros((len(self.classes), len(self.classes)), dtype=torch.int64)
        self.scores: list[Tensor] = []
        self.present: list[Tensor] = []

    def add(self, matrix: Tensor, scores: Tensor) -> None:
        """One image: its confusion matrix (k, k), and ``presence_scores`` (k,)."""
        self.matrix += localised(matrix)
        self.scores.append(scores)
        self.present.append(matrix.sum(dim=1) > 0)

    def result(self) -> SplitScores:
        """Of all images so far, at least one."""
        scores, present = torch.stack(self.scores), torch.stack(self.present)
        found = [average_precision(scores[:, k], present[:, k]) for k in range(len(self.classes))]
        defined = [value for value in found if not math.isnan(value)]
        return SplitScores(
            localization=SegmentationScores.from_confusion(self.matrix, self.classes).miou,
            classification=sum(defined) / len(defined) if defined else math.nan,
        )
