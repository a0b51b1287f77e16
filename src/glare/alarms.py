"""When a pre-training run is in trouble: pure functions of what its log holds, each with its limit.

Every alarm gives the cause with the measured value against its limit, or None. A single line proves nothing, as the
loss follows the draw of the patches, so what is read from losses has to hold for some lines in a row; the features of
fixed images do not jump, so one check of them is enough.

A loss at log K, targets that say nothing, is no alarm: fresh heads begin there, and runs that helped stayed there.
"""

import math
from collections.abc import Mapping, Sequence

from glare.comparison import Health
from glare.health import COLLAPSED, collapse

Line = Mapping[str, float]
"""Values of one line of metrics.jsonl."""

EARLY_LINES = 3  # whose largest value is what a run began with; short runs have six lines in all
IN_A_ROW = 3  # lines over a limit
LOSS_LIMIT = 2.0  # times the early level: healthy runs stay below 1.05, log K bounds all but confident mistakes
GRADIENT_LIMIT = 100.0  # times the early level: healthy runs on trained weights stay below 3, a fresh head may not
LIMITS = {"loss": LOSS_LIMIT, "grad_norm": GRADIENT_LIMIT}
SAME_TARGETS = 0.05  # nats by which the entropy of the mean target exceeds the mean entropy; with wrong centres 0.03
PEAKED = 0.5  # of log K: nearly uniform targets come as close to each other in healthy runs, too
SOME_IMAGES = 4  # of a line; fewer may well show the same thing
FROM_SCRATCH = 0.1  # of the value at random weights: a healthy run fell to a third of it before it rose
NAMES = {"loss": "loss", "grad_norm": "gradient norm"}
CHECKED = ("rankme_cls", "rankme_patches", "feature_std", "cosine_to_base")
"""Values of a health check."""


def not_finite(line: Line) -> str | None:
    """What is not a number, or infinite, in a line whose loss is one: gradients, or the features that a check saw."""
    broken = [name for name in ("grad_norm", *CHECKED) if not math.isfinite(line.get(name, 0.0))]
    return f"not finite: {', '.join(broken)}" if broken else None


def divergence(early: Sequence[Line], recent: Sequence[Line]) -> str | None:
    """Loss or gradient norm far above the level of the ``early`` lines in all of the ``recent`` ones."""
    if len(recent) < IN_A_ROW:
        return None
    return next((found for name in LIMITS if (found := _above(name, early, recent[-IN_A_ROW:]))), None)


def over_limit(early: Sequence[Line], line: Line) -> str | None:
    """What ``divergence`` would count of one line: the run may be in trouble, or it was a bad draw."""
    return next((found for name in LIMITS if (found := _above(name, early, [line]))), None)


def without_overflow(line: Line) -> Line:
    """A line of a run whose loss is scaled (fp16), without a gradient norm that is not finite.

    There the step was left out and the scale lowered, which is no trouble and says nothing of the gradients.
    """
    return {name: value for name, value in line.items() if name != "grad_norm" or math.isfinite(value)}


def _above(name: str, early: Sequence[Line], recent: Sequence[Line]) -> str | None:
    known = [line[name] for line in early if name in line]
    if len(known) < EARLY_LINES:
        return None
    level = max(known)
    if all(line.get(name, level) > LIMITS[name] * level for line in recent):
        return (
            f"diverged: the {NAMES[name]} is {recent[-1][name]:.3g}, "
            f"more than {LIMITS[name]:g} times the {level:.3g} it began with"
        )
    return None


def constant_targets(recent: Sequence[Line], *, images: int, prototypes: int) -> str | None:
    """The teacher gives all images the same target, and one that says something; ``images`` are those of one line."""
    lines = [line for line in recent[-IN_A_ROW:] if {"teacher_entropy", "marginal_entropy"} <= line.keys()]
    if len(lines) < IN_A_ROW or images < SOME_IMAGES:
        return None
    limit = PEAKED * math.log(prototypes)
    same = (line["marginal_entropy"] - line["teacher_entropy"] < SAME_TARGETS for line in lines)
    if all(same) and all(line["marginal_entropy"] < limit for line in lines):
        now = lines[-1]
        return (
            f"collapsed: the teacher's targets are the same for all images (entropy of their mean "
            f"{now['marginal_entropy']:.3g} nats, mean of their entropies {now['teacher_entropy']:.3g}; "
            f"{math.log(prototypes):.3g} would be uniform)"
        )
    return None


def collapsed_features(line: Line, untouched: Line, *, from_scratch: bool) -> str | None:
    """``health.collapse`` of a line with a health check; ``untouched`` is the check before the first step.

    ``from_scratch``: that one was of random weights.
    """
    share = FROM_SCRATCH if from_scratch else COLLAPSED
    found = collapse(_health(line), _health(untouched), share=share)
    return found and f"collapsed: {found}"


def _health(line: Line) -> Health:
    return Health(rankme=line["rankme_patches"], std=line["feature_std"], cosine=line["cosine_to_base"])
