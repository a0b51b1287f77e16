"""Scores against a slow transcription of mmsegmentation's definition, and the evaluate.Metric on top."""

import json
import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from reference import mmseg_metrics as mmseg
from torch import Tensor

from glare.metrics import SegmentationMetric, SegmentationScores, confusion_matrix

NAMES = ["a", "b", "c", "d", "e", "f"]


def slow_scores(pairs: list[tuple[Tensor, Tensor]], *, k: int, ignore: int) -> dict[str, Any]:
    """Areas counted class by class and pixel by pixel, summed over the maps, then divided."""
    intersect, predicted, labelled = [0] * k, [0] * k, [0] * k
    for prediction, label in pairs:
        for p, q in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True):
            if q == ignore:
                continue
            for index in range(k):
                predicted[index] += p == index
                labelled[index] += q == index
                intersect[index] += p == index and q == index
    union = [predicted[i] + labelled[i] - intersect[i] for i in range(k)]
    iou = [intersect[i] / union[i] if union[i] else None for i in range(k)]
    accuracy = [intersect[i] / labelled[i] if labelled[i] else None for i in range(k)]
    present = [value for value in iou if value is not None]
    reached = [value for value in accuracy if value is not None]
    return {
        "miou": sum(present) / len(present) if present else None,
        "aacc": sum(intersect) / sum(labelled) if sum(labelled) else None,
        "macc": sum(reached) / len(reached) if reached else None,
        "iou": dict(zip(NAMES, iou, strict=False)),
        "accuracy": dict(zip(NAMES, accuracy, strict=False)),
    }


def random_maps(seed: int) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """One to three maps of different sizes; some classes absent, some only predicted, some pixels ignored."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    k, ignore = draw(1, 7), 255 if seed % 3 else 0
    in_labels, in_predictions = (torch.randperm(k, generator=g)[: draw(1, k + 1)] for _ in range(2))
    pairs = []
    for _ in range(draw(1, 4)):
        shape = (draw(1, 9), draw(1, 9))
        label = in_labels[torch.randint(len(in_labels), shape, generator=g)]
        prediction = in_predictions[torch.randint(len(in_predictions), shape, generator=g)]
        label[torch.rand(shape, generator=g) < 0.2] = ignore
        pairs.append((prediction, label))
    return pairs, k, ignore


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            assert found[key] == (None if value is None else pytest.approx(value, rel=1e-12))


def test_scores_equal_the_slow_transcription_on_random_maps() -> None:
    for seed in range(240):
        pairs, k, ignore = random_maps(seed)
        counts = [confusion_matrix(p, q, num_classes=k, ignore_index=ignore) for p, q in pairs]
        scores = SegmentationScores.from_confusion(torch.stack(counts).sum(dim=0), NAMES[:k])
        assert_same(scores.to_dict(), slow_scores(pairs, k=k, ignore=ignore))


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_scores_are_those_of_mmsegmentation(reduce_zero_label: bool) -> None:
    """250 data sets of two maps each, with ignored pixels, absent classes, and classes that are only predicted."""
    rng = np.random.default_rng(int(reduce_zero_label))
    unseen = 0
    for _ in range(250):
        k = int(rng.integers(2, 7))
        areas, total = [], torch.zeros((k, k), dtype=torch.int64)
        drawn = rng.permutation(k + reduce_zero_label)[: rng.integers(1, k + 1)]
        guessed = rng.permutation(k)[: rng.integers(1, k + 1)]
        for _ in range(2):
            shape = tuple(rng.integers(1, 9, 2))
            label = rng.choice(drawn, shape)
            label[rng.random(shape) < 0.2] = 255
            prediction = rng.choice(guessed, shape)
            areas.append(mmseg.intersect_and_union(prediction, label, k, 255, reduce_zero_label))
            # what zero means goes, and the classes count from zero
            seen = np.where((label == 0) | (label == 255), 255, label - 1) if reduce_zero_label else label
            matrix = confusion_matrix(torch.from_numpy(prediction), seen, num_classes=k)
            assert matrix.sum() == ((label != 255) & ~(reduce_zero_label & (label == 0))).sum()
            total += matrix
        expected = mmseg.total_area_to_metrics(areas)
        scores = SegmentationScores.from_confusion(total, NAMES[:k])
        for found, name in ((scores.miou, "mIoU"), (scores.aacc, "aAcc"), (scores.macc, "mAcc")):
            np.testing.assert_allclose(found, expected[name], rtol=1e-14)  # the order of the sum is another
        for by_class, name in ((scores.iou, "IoU"), (scores.accuracy, "Acc")):
            np.testing.assert_equal([math.nan if v is None else v for v in by_class.values()], expected[name])
        unseen += None in scores.iou.values()
    assert unseen > 50


def test_rows_are_labels_and_columns_predictions() -> None:
    prediction, label = torch.tensor([[0, 1, 1], [2, 2, 0]]), torch.tensor([[0, 0, 1], [2, 1, 255]])
    matrix = confusion_matrix(prediction, label, num_classes=3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_absent_classes_are_left_out_and_only_predicted_ones_count_as_zero() -> None:
    # class 1 is labelled never and predicted once; class 2 is neither
    matrix = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4]])
    scores = SegmentationScores.from_confusion(matrix, ["a", "b", "c", "d"])
    assert scores.iou == {"a": 0.75, "b": 0.0, "c": None, "d": 1.0}
    assert scores.accuracy == {"a": 0.75, "b": None, "c": None, "d": 1.0}
    assert scores.miou == pytest.approx(1.75 / 3)
    assert (scores.macc, scores.aacc) == (0.875, 0.875)


def test_nothing_counted_is_nan_and_null_in_json() -> None:
    scores = SegmentationScores.from_confusion(torch.zeros((2, 2), dtype=torch.int64), ["a", "b"])
    assert math.isnan(scores.miou) and math.isnan(scores.aacc) and math.isnan(scores.macc)
    written = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    by_class = {"a": None, "b": None}
    assert written == {"miou": None, "aacc": None, "macc": None, "iou": by_class, "accuracy": by_class}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_numpy_tensors_and_lists_of_any_integer_type_count_the_same(dtype: type) -> None:
    prediction: Any = np.array([[0, 1], [1, 2]], dtype)
    label: Any = np.array([[0, 255], [2, 2]], dtype)
    expected = [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    prediction.setflags(write=False)  # as a picture's pixels are
    assert confusion_matrix(prediction, label[::1], num_classes=3).tolist() == expected
    flipped = confusion_matrix(prediction[::-1], torch.from_numpy(label[::-1].astype(np.int64)), num_classes=3)
    assert flipped.tolist() == expected
    metric = SegmentationMetric(3)
    metric.add(prediction=prediction.tolist(), reference=label.tolist())
    assert metric.matrix.tolist() == expected


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([[3]], [[0]], "prediction has values from 3 to 3; with 3 classes they go to 2"),
        ([[-1]], [[0]], "prediction has values from -1"),
        ([[0]], [[3]], "label has values from 3"),
        ([[0]], [[-1]], "label has values from -1"),
        ([[0, 1]], [[0], [1]], r"shape \(1, 2\), label \(2, 1\)"),
        ([[0.5]], [[0]], "argmax"),
    ],
)
def test_what_cannot_be_counted_is_an_error(prediction: Any, label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(label), num_classes=3)


def test_predictions_on_ignored_pixels_may_be_anything() -> None:
    matrix = confusion_matrix(torch.tensor([255, 1]), torch.tensor([255, 1]), num_classes=2)
    assert matrix.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("classes", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_class_names_must_fit_the_matrix(classes: list[str]) -> None:
    with pytest.raises(ValueError, match="one name for each row"):
        SegmentationScores.from_confusion(torch.eye(2, dtype=torch.int64), classes)


def test_counts_beyond_float32_stay_exact() -> None:
    matrix = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    scores = SegmentationScores.from_confusion(matrix, ["a", "b"])
    assert scores.iou["b"] == 2**40 / (2**40 + 1)


def test_metric_adds_up_batches_and_starts_anew() -> None:
    pairs, k, _ = random_maps(1)
    metric = SegmentationMetric(k, classes=NAMES[:k])
    metric.add_batch(predictions=[p for p, _ in pairs], references=[q for _, q in pairs])
    metric.add(prediction=pairs[0][0], reference=pairs[0][1])
    assert len(metric) == len(pairs) + 1
    assert_same(metric.compute(), slow_scores([*pairs, pairs[0]], k=k, ignore=255))
    assert len(metric) == 0 and not metric.matrix.any()
    prediction, label = pairs[0]
    again = metric.compute(predictions=prediction.unsqueeze(0), references=label.unsqueeze(0))
    assert_same(again, slow_scores(pairs[:1], k=k, ignore=255))


def test_metric_is_an_evaluate_metric_that_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    metric = SegmentationMetric(2, classes=["ground", "water"], ignore_index=9)
    assert isinstance(metric, evaluate.Metric)
    assert "segmentation_metric" in repr(metric)
    both = evaluate.combine([metric])
    both.add_batch(predictions=np.array([[[0, 1]]]), references=np.array([[[0, 9]]]))
    assert both.compute() == {
        "miou": 1.0,
        "aacc": 1.0,
        "macc": 1.0,
        "iou": {"ground": 1.0, "water": None},
        "accuracy": {"ground": 1.0, "water": None},
    }
    assert list(tmp_path.iterdir()) == []


def test_a_bad_batch_leaves_the_metric_as_it_was() -> None:
    metric = SegmentationMetric(2)
    metric.add(prediction=torch.tensor([0]), reference=torch.tensor([0]))
    with pytest.raises(ValueError, match="with 2 classes"):
        metric.add_batch(predictions=torch.tensor([[0], [2]]), references=torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="1 predictions, but 2 references"):
        metric.add_batch(predictions=[[0]], references=[[0], [1]])
    with pytest.raises(ValueError, match="give both"):
        metric.compute(predictions=torch.tensor([[0]]))
    assert len(metric) == 1 and metric.matrix.tolist() == [[1, 0], [0, 0]]


def test_metric_needs_images_and_one_name_for_each_class() -> None:
    with pytest.raises(ValueError, match="call add or add_batch"):
        SegmentationMetric(2).compute()
    with pytest.raises(ValueError, match="num_classes is 2, but classes has 1"):
        SegmentationMetric(2, classes=["a", "a"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counts_on_the_device_equal_those_on_the_cpu() -> None:
    pairs, k, ignore = random_maps(5)
    for prediction, label in pairs:
        on_device = confusion_matrix(prediction.cuda(), label, num_classes=k, ignore_index=ignore)
        assert on_device.is_cuda
        assert torch.equal(on_device.cpu(), confusion_matrix(prediction, label, num_classes=k, ignore_index=ignore))
