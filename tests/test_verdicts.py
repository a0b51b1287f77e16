"""What is concluded from per-image areas: better is earned against the untouched model and the control."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from glare.comparison import ADAPTED, BETTER, FOREIGN, SAME, UNTOUCHED, WORSE, Model
from glare.comparison_models import Group
from glare.intervals import Estimate, mean_iou
from glare.verdicts import Measured, confidence_of, judge, probe_result, row_verdict

IMAGES, CLASSES = 60, ["soil", "water", "grass"]


def areas_of(quality: float, *, seeds: int = 1, seed: int = 0) -> Tensor:
    """A model that gets about ``quality`` of each class right, the same images being hard for all models."""
    generator = torch.Generator().manual_seed(1)
    labelled = torch.rand(1, IMAGES, 1, 3, generator=generator) * 900 + 100
    ease = torch.rand(1, IMAGES, 1, 1, generator=generator) * 0.4 - 0.2
    own = torch.Generator().manual_seed(100 + seed)
    noise = torch.randn(seeds, IMAGES, 1, 3, generator=own) * 0.03
    right = (labelled * (quality + ease + noise).clamp(0, 1)).round()
    return torch.cat([right, labelled.round().expand_as(right), labelled.round().expand_as(right)], dim=2).double()


def group(*names: str, role: str = ADAPTED) -> Group:
    return Group(names[0], [Model(name, role, name) for name in names])


def measured(controls: Sequence[float], groups: Sequence[str] | None = None, **models: Tensor) -> Measured:
    draws = {f"random{i}": areas_of(quality, seed=50 + i) for i, quality in enumerate(controls)}
    return Measured({**models, **draws}, {name: list(draws) for name in models}, CLASSES, groups)


BASE = areas_of(0.60)


@pytest.mark.parametrize(
    ("quality", "controls", "verdict"),
    [
        (0.70, (0.60, 0.59, 0.61), BETTER),
        (0.70, (0.70, 0.69, 0.71), SAME),  # above the untouched model, but so are random adapters
        (0.50, (0.60, 0.59, 0.61), WORSE),
        (0.50, (0.40, 0.39, 0.41), WORSE),  # that random adapters are worse still does not help
        (0.60, (0.50, 0.49, 0.51), SAME),
    ],
)
def test_better_is_earned_against_both(quality: float, controls: tuple[float, ...], verdict: str) -> None:
    values = measured(controls, untouched=BASE, ours=areas_of(quality, seed=1))
    result = probe_result("linear", values, [group("ours")], None)
    assert result.findings["ours"].verdict == verdict
    assert (result.findings["ours"].needed is not None) == (verdict == SAME)


def test_a_model_against_itself() -> None:
    result = probe_result("linear", measured((0.6, 0.61), untouched=BASE, ours=BASE), [group("ours")], None)
    found = result.findings["ours"]
    assert found.verdict == SAME and found.needed is not None and found.needed.images is None
    assert (found.against_untouched.low, found.against_untouched.high) == (0, 0)


def test_scores_are_means_over_seeds_and_differences_follow() -> None:
    values = measured((0.6, 0.6), untouched=areas_of(0.6, seeds=3), ours=areas_of(0.65, seeds=3, seed=1))
    result = probe_result("fpn", values, [group("ours")], None)
    expected = [mean_iou(values.areas[name].sum(dim=1)).mean().item() for name in ("ours", UNTOUCHED)]
    assert result.scores["ours"].miou == pytest.approx(expected[0])
    finding = result.findings["ours"]
    assert finding.against_untouched.value == pytest.approx(expected[0] - expected[1])
    assert finding.against_untouched.seeds == 3
    for name in CLASSES:
        ours, base = (result.scores[key].iou[name] for key in ("ours", UNTOUCHED))
        change = finding.classes[name]
        assert ours is not None and base is not None and change is not None
        assert change.value == pytest.approx(ours - base, abs=2e-3)


def test_runs_of_one_recipe_are_replicates() -> None:
    runs = {f"run{i}": areas_of(0.64 + 0.02 * i, seed=i) for i in range(3)}
    values = measured((0.6, 0.61, 0.59), untouched=BASE, **runs)
    values.controls["run0"][:] = ["random0", "random1", "random2"]
    found = probe_result("linear", values, [group(*runs)], None).findings["run0"]
    alone = probe_result("linear", values, [group("run1")], None).findings["run1"]
    assert found.against_untouched.seeds == 3 and alone.against_untouched.seeds == 1
    assert found.against_untouched.seed_variance > 0 == alone.against_untouched.seed_variance
    assert found.against_untouched.value == pytest.approx(alone.against_untouched.value, abs=0.01)


def test_the_foreign_model_splits_the_gain() -> None:
    values = measured((0.6, 0.61), untouched=BASE, ours=areas_of(0.7, seed=1), theirs=areas_of(0.65, seed=2))
    found = probe_result("linear", values, [group("ours")], group("theirs", role=FOREIGN)).findings["ours"]
    assert found.tuning is not None and found.domain is not None
    assert found.tuning.value > 0 < found.domain.value
    assert found.tuning.value + found.domain.value == pytest.approx(found.against_untouched.value)
    assert found.domain.seed_variance > 0  # one run of each: how much runs vary is taken from random adapters


def test_each_group_of_images_has_its_difference() -> None:
    groups = ["a"] * 20 + ["b"] * 40
    values = measured((0.6, 0.61), groups, untouched=BASE, ours=areas_of(0.7, seed=1))
    found = probe_result("linear", values, [group("ours")], None).findings["ours"].groups
    expected = [mean_iou(values.areas[name][0, :20].sum(dim=0)).item() for name in ("ours", UNTOUCHED)]
    assert list(found) == ["a", "b"] and found["a"] == pytest.approx(expected[0] - expected[1])


def test_every_pair_of_rows_is_compared() -> None:
    values = measured((0.6, 0.61, 0.59), untouched=BASE, a=areas_of(0.7, seed=1), b=areas_of(0.5, seed=2), c=BASE)
    pairs = probe_result("linear", values, [group("a"), group("b"), group("c")], None).pairs
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.verdict for pair in pairs] == [BETTER, BETTER, WORSE]


def test_the_more_rows_the_wider_each_interval() -> None:
    assert confidence_of(1) == pytest.approx(0.95) and confidence_of(5) == pytest.approx(0.99)
    values = measured((0.6, 0.61), untouched=BASE, a=areas_of(0.62, seed=1), b=areas_of(0.5, seed=2))
    alone = probe_result("linear", values, [group("a")], None).findings["a"].against_untouched
    together = probe_result("linear", values, [group("a"), group("b")], None).findings["a"].against_untouched
    assert together.high - together.low > alone.high - alone.low


def test_random_adapters_seldom_beat_random_adapters() -> None:
    """A model that is itself a draw of the control is better, or different from another draw, in about 5 % at most."""
    wins = differ = 0
    for trial in range(100):
        generator = torch.Generator().manual_seed(trial)
        qualities = (0.65 + 0.01 * torch.randn(5, generator=generator)).tolist()
        models = {
            name: areas_of(quality, seed=1000 + 10 * trial + i)
            for i, (name, quality) in enumerate(zip(("ours", "other"), qualities[:2], strict=True))
        }
        draws = {f"r{i}": areas_of(quality, seed=1005 + 10 * trial + i) for i, quality in enumerate(qualities[2:])}
        controls = {name: list(draws) for name in models}
        values = Measured({UNTOUCHED: BASE, **models, **draws}, controls, CLASSES, None)
        result = probe_result("linear", values, [group("ours")], None)
        wins += result.findings["ours"].verdict == BETTER
        pair = probe_result("linear", values, [group("ours"), group("other")], None).pairs[0]
        differ += pair.verdict != SAME
    assert wins <= 8 and differ <= 11


def test_the_verdict_of_a_row_needs_all_probes_and_no_collapse() -> None:
    better = measured((0.6, 0.61, 0.59), untouched=BASE, ours=areas_of(0.7, seed=1))
    same = measured((0.6, 0.61), untouched=BASE, ours=BASE)
    row = group("ours")
    first, second = (probe_result(name, values, [row], None) for name, values in (("knn", better), ("w", same)))
    assert row_verdict(row, [first], None).verdict == BETTER
    assert row_verdict(row, [first, first], None).verdict == BETTER
    mixed = row_verdict(row, [first, second], None)
    assert mixed.verdict == SAME and "knn: above" in mixed.reason and "w: the interval" in mixed.reason
    collapsed = row_verdict(row, [first], "rank 3")
    assert collapsed.verdict == SAME and collapsed.collapsed == "rank 3" and "collapsed" in collapsed.reason


def test_an_interval_that_touches_zero_decides_nothing() -> None:
    def estimate(low: float, high: float) -> Estimate:
        return Estimate((low + high) / 2, low, high, 0.0, 0.0, 10, 1)

    assert judge(estimate(0.0, 0.1), estimate(0.1, 0.2))[0] == SAME
    assert judge(estimate(-0.1, 0.0), estimate(0.1, 0.2))[0] == SAME
    assert judge(estimate(0.01, 0.1), estimate(0.0, 0.2))[0] == SAME
    assert judge(estimate(0.01, 0.1), estimate(0.01, 0.2))[0] == BETTER
    assert judge(estimate(-0.2, -0.01), estimate(0.01, 0.2))[0] == WORSE
