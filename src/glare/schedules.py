"""Values that depend on the step only: nothing here has a state, so a resumed run cannot differ."""

import math


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at the last step, constant afterwards."""
    share = min(step / max(steps - 1, 1), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, end: float) -> float:
    """Linear from ``peak / warmup`` to ``peak`` over ``warmup`` steps, then a cosine to ``end`` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps=steps - warmup, start=peak, end=end)


def warmup_poly(step: int, *, steps: int, warmup: int, peak: float, power: float = 1.0, end: float = 0.0) -> float:
    """Linear warm-up, then ``end + (peak - end) * (1 - step / steps) ** power``, mmsegmentation's "poly" schedule."""
    value = end + (peak - end) * float((1 - step / steps) ** power)
    return value * (step + 1) / warmup if step < warmup else value


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """A straight line from ``start`` to ``end`` over ``steps`` steps, constant afterwards; ``end`` at once for none."""
    share = min(step / steps, 1.0) if steps else 1.0
    return start + (end - start) * share
