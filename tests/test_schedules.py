import math

import pytest

from glare.schedules import cosine, linear, warmup_cosine, warmup_poly

LENGTHS = [1, 2, 3, 10, 400]


def literal_cosine(steps: int, start: float, end: float) -> list[float]:
    """Values at equal distances on half a cosine, both ends included."""
    places = [step / (steps - 1) if steps > 1 else 0.0 for step in range(steps)]
    return [end + (start - end) * (1 + math.cos(math.pi * place)) / 2 for place in places]


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize(("start", "end"), [(0.996, 1.0), (1e-3, 1e-6)])
def test_cosine(steps: int, start: float, end: float):
    found = [cosine(step, steps=steps, start=start, end=end) for step in range(steps)]
    assert found == pytest.approx(literal_cosine(steps, start, end), rel=1e-9)
    assert found[0] == pytest.approx(start)
    if steps > 1:
        assert found[-1] == pytest.approx(end, abs=1e-12)
    assert found == sorted(found, reverse=start > end)
    assert cosine(steps + 100, steps=steps, start=start, end=end) == pytest.approx(end, abs=1e-12)


def test_the_papers_momentum_leaves_45_percent_of_the_start_after_400_steps():
    """Section 1.1 of the settings: 400 steps on LoveDA from 0.996 to 1."""
    kept = math.prod(cosine(step, steps=400, start=0.996, end=1.0) for step in range(400))
    assert kept == pytest.approx(0.45, abs=0.01)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 1), (100, 0), (5, 4), (5, 5), (1, 0), (1, 1)])
def test_warmup_cosine(steps: int, warmup: int):
    found = [warmup_cosine(step, steps=steps, warmup=warmup, peak=1.5e-4, end=1e-6) for step in range(steps)]
    rise = [1.5e-4 * (step + 1) / warmup for step in range(warmup)]
    expected = rise + literal_cosine(steps - warmup, 1.5e-4, 1e-6)
    assert found == pytest.approx(expected, rel=1e-9)
    assert max(found) == pytest.approx(1.5e-4)
    assert min(found) > 0, "no step is wasted"
    assert found[:warmup] == sorted(found[:warmup]) and found[warmup:] == sorted(found[warmup:], reverse=True)
    if steps > warmup + 1:
        assert found[-1] == pytest.approx(1e-6)


@pytest.mark.parametrize("power", [1.0, 0.9])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_warmup_poly(power: float, warmup: int):
    found = [warmup_poly(step, steps=80, warmup=warmup, peak=6e-5, power=power) for step in range(80)]
    poly = [6e-5 * (1 - step / 80) ** power for step in range(80)]
    rise = [min(1.0, (step + 1) / warmup) if warmup else 1.0 for step in range(80)]
    assert found == pytest.approx([p * r for p, r in zip(poly, rise, strict=True)])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert warmup_poly(80, steps=80, warmup=warmup, peak=6e-5, power=power) == 0


@pytest.mark.parametrize("steps", [0, 1, 7, 120])
def test_linear(steps: int):
    found = [linear(step, steps=steps, start=0.04, end=0.07) for step in range(steps + 5)]
    expected = [0.04 + 0.03 * step / steps if step < steps else 0.07 for step in range(steps + 5)]
    assert found == pytest.approx(expected)
    assert found == sorted(found)
