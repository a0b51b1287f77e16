"""Intervals against a slow transcription, and what they promise: simulated models of which the truth is known."""

import math
from functools import cache

import pytest
import torch
from reference import intervals as literal
from reference.crossed_effects import Effects, Images, true_mean_iou
from torch import Tensor

from glare.errors import UserError
from glare.intervals import (
    Estimate,
    Needed,
    Score,
    Spread,
    areas,
    class_differences,
    class_iou,
    difference,
    differences,
    mean_accuracy,
    mean_iou,
    needed,
    pixel_accuracy,
    spread_of,
)
from glare.metrics import SegmentationScores
from glare.t_distribution import t_quantile

SIMULATIONS, RESAMPLES = 1000, 200
GAIN = 0.25
SEEDS_DIFFER = Effects(seed=0.15, interaction=0.3)


def random_counts(replicates: int, images: int, k: int, *, seed: int = 0) -> Tensor:
    """Confusion counts (replicates, images, k, k), larger on the diagonal; each class is absent from some images."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (replicates, images, k, k), generator=g)
    counts += torch.diag_embed(torch.randint(0, 40, (replicates, images, k), generator=g))
    absent = torch.rand((images, k), generator=torch.Generator().manual_seed(99)) < 0.4
    return counts.masked_fill(absent[None, :, :, None], 0)


def all_estimates(first: Tensor, second: Tensor, **options: object) -> list[Estimate]:
    """One estimate for each simulation of areas (seeds, n, simulations, 3, k)."""
    images = torch.full((first.shape[2],), first.shape[1])
    return differences(first, second, score=mean_iou, images=images, resamples=RESAMPLES, **options)


# scores


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("score", "slow"),
    [
        (mean_iou, literal.mean_iou),
        (mean_accuracy, literal.mean_accuracy),
        (pixel_accuracy, literal.pixel_accuracy),
    ],
)
def test_scores_are_those_of_the_transcription(score: Score, slow: object, seed: int) -> None:
    counts = random_counts(1, 3, 5, seed=seed)[0]
    counts[:, seed % 5] = 0  # a class without labels, which is predicted
    expected = [slow(matrix) for matrix in counts.tolist()]
    torch.testing.assert_close(score(areas(counts)), torch.tensor(expected, dtype=torch.float64))


def test_class_iou_is_nan_without_labels() -> None:
    counts = random_counts(1, 3, 4)[0].sum(dim=0)
    counts[2] = 0
    expected = [math.nan if value is None else value for value in literal.class_scores(counts.tolist())[0]]
    torch.testing.assert_close(class_iou(areas(counts)), torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert math.isnan(expected[2])


def test_scores_are_those_of_evaluate_where_every_class_has_labels() -> None:
    counts = random_counts(1, 30, 6)[0].sum(dim=0)
    expected = SegmentationScores.from_confusion(counts, list("abcdef"))
    pooled = areas(counts)
    assert mean_iou(pooled).item() == pytest.approx(expected.miou)
    assert mean_accuracy(pooled).item() == pytest.approx(expected.macc)
    assert pixel_accuracy(pooled).item() == pytest.approx(expected.aacc)
    assert class_iou(pooled).tolist() == pytest.approx(list(expected.iou.values()))


# the formula


@pytest.mark.parametrize(("replicates", "others"), [(1, 1), (3, 3), (2, 4), (4, 2), (3, 1), (1, 3)])
def test_an_interval_is_that_of_the_transcription(replicates: int, others: int) -> None:
    first, second = random_counts(replicates, 7, 3, seed=1), random_counts(others, 7, 3, seed=2)
    value, image_part, seed_part, degrees = literal.parts(first, second, resamples=40, seed=5)
    found = difference(areas(first), areas(second), score=mean_iou, confidence=0.9, resamples=40, seed=5)
    half = t_quantile(0.95, degrees) * math.sqrt(image_part + seed_part)
    assert found.value == pytest.approx(value)
    assert (found.image_variance, found.seed_variance) == pytest.approx((image_part, seed_part))
    assert (found.low, found.high) == pytest.approx((value - half, value + half))
    assert found.images == 7
    assert found.seeds == (min(r for r in (replicates, others) if r > 1) if max(replicates, others) > 1 else 1)


@pytest.mark.parametrize(("replicates", "others"), [(1, 1), (1, 3), (2, 3)])
def test_a_given_spread_counts_for_every_replicate(replicates: int, others: int) -> None:
    first, second = areas(random_counts(replicates, 9, 3, seed=1)), areas(random_counts(others, 9, 3, seed=2))
    plain = difference(first, second, score=mean_iou)
    found = difference(first, second, score=mean_iou, spread=Spread(variance=0.01, degrees=2))
    seed_part = 0.01 * (1 / replicates + 1 / others)
    image_part = plain.image_variance
    degrees = (image_part + seed_part) / (image_part / 8 + seed_part / 2)
    assert (found.value, found.image_variance) == (plain.value, plain.image_variance)
    assert found.seed_variance == pytest.approx(seed_part)
    assert found.seeds == 3
    assert found.high - found.value == pytest.approx(t_quantile(0.975, degrees) * math.sqrt(image_part + seed_part))


def test_the_spread_of_replicates_is_the_variance_of_their_scores() -> None:
    counts = random_counts(4, 6, 3)
    scores = [literal.mean_iou(literal.summed(replicate)) for replicate in counts.tolist()]
    found = spread_of(areas(counts), score=mean_iou)
    assert found.variance == pytest.approx(literal.sample_variance(scores, ddof=1))
    assert found.degrees == 3


def test_resamples_leave_out_a_class_for_both_models_where_they_hold_none_of_its_labels() -> None:
    # class 1 is in the first image only, where one model finds it and the other does not
    good = torch.tensor([[[[5, 0], [0, 5]], [[5, 0], [0, 0]], [[5, 0], [0, 0]]]])
    bad = torch.tensor([[[[5, 0], [5, 0]], [[5, 0], [0, 0]], [[5, 0], [0, 0]]]])
    draws = torch.randint(3, (500, 3), generator=torch.Generator().manual_seed(4)).tolist()
    expected = []
    for draw in draws:
        first = draw.count(0)
        # class 0: all of 15 pixels, against 5 more wrong ones with every copy of the first image
        expected.append((1 + 1) / 2 - (15 / (15 + 5 * first)) / 2 if first else 0.0)
    found = difference(areas(good), areas(bad), score=mean_iou, resamples=500, seed=4)
    assert 0.0 in expected
    assert found.image_variance == pytest.approx(literal.sample_variance(expected, ddof=0) * 3 / 2)


def test_classes_are_compared_one_by_one_on_the_images_where_they_are_labelled() -> None:
    first, second = random_counts(2, 12, 4, seed=1), random_counts(2, 12, 4, seed=2)
    for counts in (first, second):
        counts[:, 1:, 2] = 0  # in one image only
        counts[:, :, 3] = 0  # nowhere
    found = class_differences(areas(first), areas(second), resamples=50)
    assert found[2] is None
    assert found[3] is None
    for index in (0, 1):
        estimate = found[index]
        assert estimate is not None
        labelled = int((first[0, :, index].sum(dim=-1) > 0).sum())
        assert 1 < labelled < 12
        alone = difference(areas(first), areas(second), score=lambda a, c=index: class_iou(a)[..., c], resamples=50)
        assert (estimate.value, estimate.images) == (pytest.approx(alone.value), labelled)
        scale = labelled / (labelled - 1) * 11 / 12
        assert estimate.image_variance == pytest.approx(alone.image_variance * scale)


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = areas(random_counts(1, 9, 3, seed=1)), areas(random_counts(1, 9, 3, seed=2))
    again = [difference(first, second, score=mean_iou, seed=seed) for seed in (3, 3, 4)]
    assert again[0] == again[1]
    assert again[0].low != again[2].low


def test_one_image_is_too_few() -> None:
    one = areas(random_counts(1, 1, 3))
    with pytest.raises(UserError, match="only 1 image"):
        difference(one, one, score=mean_iou)


def test_both_models_need_the_same_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        difference(areas(random_counts(1, 5, 3)), areas(random_counts(1, 6, 3)), score=mean_iou)


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.5, 3, 0.0),
        (0.8, 3, 0.978472),
        (0.975, 1, 12.706205),
        (0.975, 2, 4.302653),
        (0.975, 30, 2.042272),
        (0.9995, 1, 636.619249),
        (0.9995, 2, 31.599055),
        (0.9995, 10, 4.586894),
        (0.975, 1e9, 1.959964),
    ],
)
def test_quantiles_of_t_are_those_of_the_tables(probability: float, degrees: float, value: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(value, rel=2e-4)


# what intervals promise


@pytest.mark.parametrize("replicates", [1, 3])
def test_a_model_does_not_differ_from_itself(replicates: int) -> None:
    own = areas(random_counts(replicates, 20, 5))
    found = difference(own, own.clone(), score=mean_iou)
    assert (found.value, found.low, found.high) == (0, 0, 0)


@cache
def true_difference(effects: Effects, gain: float) -> float:
    return true_mean_iou(effects, gain=gain) - true_mean_iou(effects)


@pytest.mark.parametrize(
    ("replicates", "others", "effects"), [(1, 1, Effects()), (3, 3, SEEDS_DIFFER), (5, 3, SEEDS_DIFFER)]
)
def test_95_percent_intervals_hold_the_true_difference_in_95_percent(
    replicates: int, others: int, effects: Effects
) -> None:
    images = Images(45, SIMULATIONS, seed=0)
    found = all_estimates(images.areas(replicates, effects, gain=GAIN), images.areas(others, effects))
    truth = true_difference(effects, GAIN)
    held = sum(estimate.low <= truth <= estimate.high for estimate in found) / SIMULATIONS
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize("count", [3, 5])
def test_one_more_random_draw_differs_from_the_others_in_5_percent(count: int) -> None:
    draws = Images(30, SIMULATIONS, seed=count).areas(count + 2, SEEDS_DIFFER)
    controls, single, another = draws[:count], draws[count : count + 1], draws[count + 1 :]
    spread = Spread(mean_iou(controls.sum(dim=1)).var(dim=0), count - 1)  # of each simulation
    for second in (controls, another):
        found = all_estimates(single, second, spread=spread)
        differ = sum(not estimate.low <= 0 <= estimate.high for estimate in found) / SIMULATIONS
        assert 0.01 <= differ <= 0.06


# how much is needed


def typical(estimates: list[Estimate], value: float) -> Estimate:
    """An estimate with a true difference and the variances of most simulations."""
    image_part, seed_part = (
        sum(getattr(estimate, part) for estimate in estimates) / len(estimates)
        for part in ("image_variance", "seed_variance")
    )
    return Estimate(value, math.nan, math.nan, image_part, seed_part, estimates[0].images, estimates[0].seeds)


def seen(images: int, seeds: int, effects: Effects, gain: float) -> tuple[float, Estimate]:
    """How often the interval lies above zero in 400 simulations, and a typical one of them."""
    drawn = Images(images, 400, seed=images + seeds)
    found = all_estimates(drawn.areas(seeds, effects, gain=gain), drawn.areas(seeds, effects))
    return sum(estimate.low > 0 for estimate in found) / 400, typical(found, true_difference(effects, gain))


def test_the_needed_images_show_the_difference_in_80_percent() -> None:
    few, estimate = seen(25, 1, Effects(), GAIN)
    count = needed(estimate).images
    assert few < 0.5
    assert count is not None
    assert seen(count, 1, Effects(), GAIN)[0] == pytest.approx(0.8, abs=0.05)


def test_the_needed_seeds_show_the_difference_in_80_percent() -> None:
    effects, gain = Effects(seed=0.2, interaction=0.1), 0.5
    few, estimate = seen(40, 3, effects, gain)
    count = needed(estimate).seeds
    assert few < 0.5
    assert count is not None
    assert seen(40, count, effects, gain)[0] == pytest.approx(0.8, abs=0.05)


def test_what_no_number_of_images_or_seeds_settles_needs_none() -> None:
    def estimate(*, value: float = 0.02, image: float = 0.0, seed: float = 0.0, seeds: int = 3) -> Estimate:
        return Estimate(value, -1, 1, image, seed, 40, seeds)

    assert needed(estimate(value=0.0, image=1e-4)) == Needed(None, None)
    assert needed(estimate(seed=1e-4)).images is None
    assert needed(estimate(image=1e-4)).seeds is None
    assert needed(estimate(value=1e-6, image=1e-4)).images is None
    one_seed = needed(estimate(image=1e-4, seeds=1))
    assert one_seed.seeds is None
    assert one_seed.images is not None
    assert one_seed.images > 40


def test_higher_power_and_confidence_need_more() -> None:
    estimate = Estimate(0.02, -0.01, 0.05, 2e-4, 2e-6, 40, 3)
    usual, sure, certain = needed(estimate), needed(estimate, power=0.95), needed(estimate, confidence=0.99)
    assert usual.images is not None
    assert sure.images is not None
    assert certain.images is not None
    assert 40 < usual.images < min(sure.images, certain.images)
