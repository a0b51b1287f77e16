"""Localization and classification against slow transcriptions that look at pixels and at ranked lists."""

import math

import pytest
import torch
from torch import Tensor

from glare.metrics import SegmentationScores, confusion_matrix
from glare.split_scores import ScoreSplitter, average_precision, localised, presence_scores

CLASSES = ["a", "b", "c", "d", "e"]


def maps(seed: int, *, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Blocky label and prediction (12, 12) that agree in part; some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (4, 4), generator=generator)
    label = coarse.repeat_interleave(3, 0).repeat_interleave(3, 1)
    prediction = torch.where(torch.rand(12, 12, generator=generator) < 0.3, label.roll(2, 0), label)
    prediction = torch.tensor([2, 4, 0, 1, 3])[prediction]
    if ignored:
        label = label.clone()
        label[torch.rand(12, 12, generator=generator) < 0.2] = 255
    return prediction, label


def relabelled(prediction: Tensor, label: Tensor) -> Tensor:
    """The oracle, mask by mask and pixel by pixel."""
    counted = label != 255
    found = prediction.clone()
    for mask_class in prediction.unique().tolist():
        mask = (prediction == mask_class) & counted
        best, best_iou = mask_class, 0.0
        for true_class in label[counted].unique().tolist():
            true = (label == true_class) & counted
            iou = float((mask & true).sum()) / max(1, float((mask | true).sum()))
            if iou > best_iou:
                best, best_iou = true_class, iou
        found[prediction == mask_class] = best
    return found


def ranked_precision(scores: list[float], present: list[bool]) -> float:
    """Average precision of a list without ties: the mean over hits of the precision down to them."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    hits, total = 0, 0.0
    for rank, index in enumerate(order, start=1):
        if present[index]:
            hits += 1
            total += hits / rank
    return total / hits


def matrix_of(prediction: Tensor, label: Tensor) -> Tensor:
    return confusion_matrix(prediction, label, num_classes=len(CLASSES))


@pytest.mark.parametrize("seed", range(20))
def test_the_oracle_is_the_transcription_on_pixels(seed: int) -> None:
    prediction, label = maps(seed)
    assert torch.equal(localised(matrix_of(prediction, label)), matrix_of(relabelled(prediction, label), label))


def test_right_outlines_with_wrong_names_are_perfectly_localised() -> None:
    _, label = maps(0, ignored=False)
    prediction = torch.tensor([3, 2, 1, 0])[label]
    assert SegmentationScores.from_confusion(matrix_of(prediction, label), CLASSES).miou == 0
    assert SegmentationScores.from_confusion(localised(matrix_of(prediction, label)), CLASSES).miou == 1


def test_the_oracle_keeps_a_perfect_prediction_and_every_pixel() -> None:
    prediction, label = maps(1)
    perfect = torch.where(label == 255, 0, label)
    assert torch.equal(localised(matrix_of(perfect, label)), matrix_of(perfect, label))
    assert torch.equal(localised(matrix_of(prediction, label)).sum(dim=1), matrix_of(prediction, label).sum(dim=1))


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_is_the_ranked_list(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, present = torch.rand(15, generator=generator), torch.rand(15, generator=generator) < 0.4
    present[seed] = True
    assert average_precision(scores, present) == pytest.approx(ranked_precision(scores.tolist(), present.tolist()))


def test_average_precision_of_known_lists() -> None:
    present = torch.tensor([True, False, True, False])
    assert average_precision(torch.tensor([0.9, 0.1, 0.8, 0.2]), present) == 1
    assert average_precision(torch.tensor([0.1, 0.9, 0.2, 0.8]), present) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert average_precision(torch.full((4,), 0.5), present) == 0.5, "equal scores say nothing"
    assert math.isnan(average_precision(torch.rand(4), torch.zeros(4, dtype=torch.bool)))


def test_a_class_is_as_present_as_its_surest_pixel() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 1] = math.log(3)
    counted = torch.ones(1, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(presence_scores(logits, counted), torch.tensor([[0.5, 0.75]]))
    counted[0, 0, 1] = False
    torch.testing.assert_close(presence_scores(logits, counted), torch.tensor([[0.5, 0.5]]))
    assert not presence_scores(logits, torch.zeros_like(counted)).any()


def test_the_splitter_adds_up_images() -> None:
    splitter = ScoreSplitter(CLASSES)
    total = torch.zeros(5, 5, dtype=torch.int64)
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    present = []
    for seed in range(6):
        prediction, label = maps(seed)
        splitter.add(matrix_of(prediction, label), scores[seed])
        total += matrix_of(relabelled(prediction, label), label)
        present.append([bool((label == k).any()) for k in range(5)])
    found = splitter.result()
    assert found.localization == pytest.approx(SegmentationScores.from_confusion(total, CLASSES).miou)
    columns = list(zip(*present, strict=True))
    expected = [ranked_precision(scores[:, k].tolist(), list(columns[k])) for k in range(5) if any(columns[k])]
    assert len(expected) == 4, "one class never occurs"
    assert found.classification == pytest.approx(sum(expected) / 4)
