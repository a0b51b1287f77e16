"""Segmentation scores from one summed confusion matrix, by mmsegmentation's definition, as fractions of 1.

With the pixels of the whole data set summed first, and those with the ignored label left out:
IoU = intersect / (predicted + labelled - intersect), accuracy = intersect / labelled, for each class;
mIoU and mAcc are means over the classes for which that is not 0/0; aAcc = sum of intersect / sum of labelled.
So a class that occurs neither in the labels nor in the predictions is left out of mIoU; one that is only ever
predicted has an IoU of 0 and counts, as in mmsegmentation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ClassMap = Tensor | NDArray[Any]
"""Class indices of any shape and any integer type."""


def confusion_matrix(prediction: ClassMap, label: ClassMap, *, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by label (row) and prediction (column).

    Args:
        prediction: class indices, any shape.
        label: class indices of the same shape; pixels with ``ignore_index`` are not counted.
        num_classes: number of classes k.
        ignore_index: the label to leave out.

    Returns:
        (k, k) int64 on the device of ``prediction``.

    Raises:
        ValueError: shapes differ, values are not integers, or a counted pixel is outside 0..k-1.
    """
    prediction, label = _integers(prediction, "prediction"), _integers(label, "label")
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, label {tuple(label.shape)}; they must be equal"
        )
    label = label.to(prediction.device)
    counted = label != ignore_index
    prediction, label = prediction[counted], label[counted]
    _check_range(prediction, "prediction", num_classes)
    _check_range(label, "label", num_classes)
    return torch.bincount(label * num_classes + prediction, minlength=num_classes**2).view(num_classes, -1)


def _integers(values: ClassMap, what: str) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        # a copy, as PyTorch has no room for NumPy's read-only and reversed arrays
        values = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "biu" else array.copy())
    if values.is_floating_point():
        raise ValueError(f"{what} has type {values.dtype}; give class indices as integers (argmax of the logits)")
    return values.long()


def _check_range(values: Tensor, what: str, num_classes: int) -> None:
    if not values.numel():
        return
    low, high = (int(edge) for edge in torch.aminmax(values))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{what} has values from {low} to {high}; with {num_classes} classes they go to {num_classes - 1}"
        )


@dataclass(frozen=True)
class SegmentationScores:
    """Scores in [0, 1]; by class name, None where the class did not occur; NaN means where none did."""

    miou: float
    aacc: float
    macc: float
    iou: dict[str, float | None]
    accuracy: dict[str, float | None]

    @classmethod
    def from_confusion(cls, matrix: Tensor | NDArray[np.int64], classes: Sequence[str]) -> "SegmentationScores":
        """Scores of a matrix (k, k), rows labels, columns predictions, of k classes with different names."""
        counts = torch.as_tensor(matrix).cpu().to(torch.float64)
        if counts.shape != (len(classes), len(classes)) or len(set(classes)) != len(classes):
            raise ValueError(
                f"the matrix has shape {tuple(counts.shape)} for {len(set(classes))} different class names; "
                "give one name for each row"
            )
        intersect, labelled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        iou = intersect / (labelled + predicted - intersect)
        accuracy = intersect / labelled
        return cls(
            miou=iou.nanmean().item(),
            aacc=(intersect.sum() / labelled.sum()).item(),
            macc=accuracy.nanmean().item(),
            iou=dict(zip(classes, map(_defined, iou.tolist()), strict=True)),
            accuracy=dict(zip(classes, map(_defined, accuracy.tolist()), strict=True)),
        )

    def to_dict(self) -> dict[str, Any]:
        """All scores as JSON knows them: null where undefined."""
        means = {"miou": self.miou, "aacc": self.aacc, "macc": self.macc}
        defined = {name: _defined(value) for name, value in means.items()}
        return {**defined, "iou": dict(self.iou), "accuracy": dict(self.accuracy)}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


class SegmentationMetric(evaluate.Metric):
    """mIoU, aAcc, mAcc and per-class scores as an `evaluate.Metric` that keeps counts, not predictions.

    ``add`` and ``add_batch`` add to a confusion matrix in memory: no file is written, no network needed.
    ``compute`` returns `SegmentationScores.to_dict` and starts anew. ``matrix`` (k, k) int64 is the state, to be
    summed over processes where there are several.
    """

    def __init__(self, num_classes: int, *, classes: Sequence[str] | None = None, ignore_index: int = 255) -> None:
        self.classes = [str(k) for k in range(num_classes)] if classes is None else list(classes)
        if len(set(self.classes)) != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but classes has {len(set(self.classes))} different names")
        self.ignore_index = ignore_index
        self._reset()
        super().__init__(seed=0)

    def _reset(self) -> None:
        self.matrix = torch.zeros((len(self.classes), len(self.classes)), dtype=torch.int64)
        self.num_images = 0

    def __len__(self) -> int:
        return self.num_images

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Semantic segmentation: mIoU, aAcc, mAcc, and IoU and accuracy of each class.",
            citation="",
            inputs_description="predictions, references: class indices (h, w) of each image.",
            features=datasets.Features({"predictions": image, "references": image}),
        )

    def _build_data_dir(self) -> str:
        return str(Path(self._data_dir_root, self.name))  # the base class would create it

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Count one image: class indices (h, w) each."""
        self.matrix += self._count(prediction, reference)
        self.num_images += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Count a batch: class indices (n, h, w) each, or a list of n maps (h, w) of any sizes."""
        if predictions is None or references is None:
            raise ValueError("only one of predictions and references was given; give both")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions, but {len(references)} references; give one for each")
        pairs = zip(predictions, references, strict=True)
        counts = [self._count(prediction, reference) for prediction, reference in pairs]
        self.matrix += torch.stack(counts).sum(dim=0) if counts else 0
        self.num_images += len(counts)

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any]:
        """Scores of all that was added, and of the batch given here; the counts start anew afterwards."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.num_images:
            raise ValueError("no image was added; call add or add_batch before compute")
        scores = SegmentationScores.from_confusion(self.matrix, self.classes)
        self._reset()
        return scores.to_dict()

    def _count(self, prediction: Any, reference: Any) -> Tensor:
        matrix = confusion_matrix(prediction, reference, num_classes=len(self.classes), ignore_index=self.ignore_index)
        return matrix.cpu()
