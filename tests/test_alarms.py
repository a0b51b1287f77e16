"""Each alarm on a made-up log: it sounds where it has to, with its numbers, and is still where it must not."""

import math

import pytest

from glare.alarms import (
    CHECKED,
    EARLY_LINES,
    GRADIENT_LIMIT,
    IN_A_ROW,
    LOSS_LIMIT,
    Line,
    collapsed_features,
    constant_targets,
    divergence,
    not_finite,
    over_limit,
)

EARLY: list[Line] = [{"loss": 20.0, "grad_norm": 3.0}, {"loss": 23.0, "grad_norm": 12.0}, {"loss": 19.0}]
EARLY_WITH_GRADIENTS: list[Line] = [*EARLY[:2], {"loss": 19.0, "grad_norm": 2.0}]
UNTOUCHED: Line = {"rankme_cls": 10.0, "rankme_patches": 104.0, "feature_std": 0.57, "cosine_to_base": 1.0}


def rows(*losses: float, grad_norm: float = 5.0) -> list[Line]:
    return [{"loss": loss, "grad_norm": grad_norm} for loss in losses]


def test_a_loss_far_above_its_beginning_for_some_lines() -> None:
    far = LOSS_LIMIT * 23.0 + 0.1
    assert divergence(EARLY_WITH_GRADIENTS, rows(20, far, far, far)) == (
        f"diverged: the loss is {far:.3g}, more than 2 times the 23 it began with"
    )
    assert divergence(EARLY_WITH_GRADIENTS, rows(far, far, 20)) is None
    assert divergence(EARLY_WITH_GRADIENTS, rows(far, far)) is None
    assert divergence(EARLY_WITH_GRADIENTS[:2], rows(far, far, far)) is None, "the beginning is not known yet"
    assert divergence(EARLY_WITH_GRADIENTS, rows(*[LOSS_LIMIT * 23.0] * IN_A_ROW)) is None


def test_a_gradient_far_above_its_beginning() -> None:
    far = GRADIENT_LIMIT * 12 + 1
    found = divergence(EARLY_WITH_GRADIENTS, rows(20, 20, 20, grad_norm=far))
    assert found is not None and "gradient norm is 1.2e+03, more than 100 times the 12" in found
    assert divergence(EARLY_WITH_GRADIENTS, rows(20, 20, 20, grad_norm=far - 2)) is None
    assert divergence(EARLY, rows(20, 20, 20, grad_norm=far)) is None, "a line of the beginning has no gradient norm"


def test_one_line_over_a_limit_is_a_suspicion() -> None:
    assert over_limit(EARLY_WITH_GRADIENTS, {"loss": 99.0, "grad_norm": 1.0})
    assert over_limit(EARLY_WITH_GRADIENTS, {"loss": 1.0, "grad_norm": 1e5})
    assert not over_limit(EARLY_WITH_GRADIENTS, {"loss": 30.0, "grad_norm": 30.0})
    assert len(EARLY) == EARLY_LINES


def entropies(*pairs: tuple[float, float]) -> list[Line]:
    return [{"teacher_entropy": mean, "marginal_entropy": marginal} for mean, marginal in pairs]


def test_the_same_target_for_all_images() -> None:
    found = constant_targets(entropies((0.9, 0.902), (0.8, 0.801), (1.12, 1.121)), images=8, prototypes=512)
    assert found is not None and "entropy of their mean 1.12 nats" in found and "6.24 would be uniform" in found
    assert constant_targets(entropies(*[(0.0, 0.0)] * 3), images=8, prototypes=512)
    # a run with centres that did not belong to its head, every other step
    started = [(1.120, 1.244), (0.048, 0.074), (0.017, 0.018), (0.075, 0.091)]
    assert constant_targets(entropies(*started), images=8, prototypes=512)
    assert not constant_targets(entropies(*started[:3]), images=8, prototypes=512)


@pytest.mark.parametrize(
    ("pairs", "images"),
    [
        ([(6.23, 6.235)] * 3, 8),  # uniform, as a fresh head and [CLS] of healthy runs give
        ([(0.2, 2.1)] * 3, 8),  # sharp and different
        ([(0.0, 0.0), (0.0, 0.0), (0.2, 0.9)], 8),
        ([(0.0, 0.0)] * 2, 8),
        ([(0.0, 0.0)] * 3, 2),  # two images may well show the same
    ],
)
def test_other_targets_are_no_alarm(pairs: list[tuple[float, float]], images: int) -> None:
    assert constant_targets(entropies(*pairs), images=images, prototypes=512) is None


def test_an_objective_without_entropies_has_no_such_alarm() -> None:
    assert constant_targets(rows(1, 1, 1), images=8, prototypes=512) is None


def test_features_below_half_of_the_untouched_model() -> None:
    # the two collapsing runs and the healthy one with the lowest rank that were measured
    for rank, std in ((8.0, 0.04), (35.0, 0.5), (104.0, 0.04), (math.nan, 0.57)):
        line = {**UNTOUCHED, "rankme_patches": rank, "feature_std": std}
        assert str(collapsed_features(line, UNTOUCHED, from_scratch=False)).startswith("collapsed: the ")
    assert collapsed_features({**UNTOUCHED, "rankme_patches": 77.0}, UNTOUCHED, from_scratch=False) is None
    assert collapsed_features(UNTOUCHED, UNTOUCHED, from_scratch=False) is None


def test_random_weights_are_a_weaker_reference() -> None:
    fell = {**UNTOUCHED, "rankme_patches": 104 * 29 / 88}
    assert collapsed_features(fell, UNTOUCHED, from_scratch=False)
    assert collapsed_features(fell, UNTOUCHED, from_scratch=True) is None
    found = collapsed_features({**fell, "rankme_patches": 3.0}, UNTOUCHED, from_scratch=True)
    assert found is not None and "less than 10% of the untouched model's 104" in found


@pytest.mark.parametrize("name", ["grad_norm", *CHECKED])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(name: str, value: float) -> None:
    line = {"loss": 3.0, "grad_norm": 1.0, **UNTOUCHED}
    assert not_finite(line) is None
    assert not_finite({**line, name: value}) == f"not finite: {name}"
