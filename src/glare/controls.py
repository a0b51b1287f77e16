"""Random adapters: the control of an adaptation, which moves the features as far as it did, but nowhere in particular.

What a probe gains from random adapters it gains from having other features, not from the data.
"""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from peft import PeftConfig
from torch import Tensor

from glare.errors import UserError
from glare.health import mean_cosine
from glare.modeling_glare import GlareModel
from glare.runtime import seeded
from glare.uniadapter import UniAdapterConfig

UP_PROJECTIONS = ("uniadapter_up", "lora_B")
"""In the names of the weights that start at zero, so that a fresh adapter changes nothing."""

TOLERANCE = 0.002  # of the cosine; near 1, a tenth of 1 - target
RESOLUTION = 1e-5  # of 1 - cosine, below which float32 shows little but rounding
FIRST, LEAST, MOST = math.log(0.05), math.log(1e-7), math.log(1e4)  # log of the factor
LARGEST_STEP = 4.0  # in log(factor)
OVERSHOOT = 1.5  # of a step that is to get to the other side of the target
SATURATED = 0.02  # slope of log(1 - cosine) over log(factor)
MOST_TRIALS = 16


def random_adapters(
    base: GlareModel, like: PeftConfig | None, images: Tensor, untouched: Tensor, target: float, *, seed: int
) -> tuple[GlareModel, float]:
    """A frozen copy of a model with random adapters that turn its patch tokens as far as an adaptation did.

    The down projections start as they do in training. The up projections are normal, times the one factor at which
    the mean cosine of the patch tokens to the untouched ones is ``target``.

    Args:
        base: the untouched model, without adapters; it stays as it is.
        like: configuration of the adapters, UniAdapter or LoRA; None for UniAdapter with its defaults.
        images: (n, 3, h, w), normalised, on the device of ``base``.
        untouched: what ``patch_tokens`` gives for ``base`` and ``images``, (n * patches, d).
        target: mean cosine over the patches of ``images``, at most 1.
        seed: of the directions.

    Returns:
        The model in evaluation mode, and its cosine: within 0.002 of the target, near 1 within a tenth of
        1 - target, or the nearest that was met where no factor gets there.
    """
    model = _fresh_adapters(base, like or UniAdapterConfig(), seed=seed)
    ups = [value for name, value in model.named_parameters() if any(part in name for part in UP_PROJECTIONS)]
    if not ups:
        raise UserError(f"{type(like).__name__} given; random adapters can be drawn for UniAdapterConfig or LoraConfig")
    generator = seeded(seed, 1)
    directions = [torch.randn(up.shape, generator=generator).to(up) for up in ups]

    def set_factor(factor: float) -> None:
        with torch.no_grad():
            for up, direction in zip(ups, directions, strict=True):
                up.copy_(factor * direction)

    def cosine_at(factor: float) -> float:
        set_factor(factor)
        return mean_cosine(patch_tokens(model, images), untouched)

    factor, cosine = find_factor(cosine_at, target)
    set_factor(factor)
    return model, cosine


def _fresh_adapters(base: GlareModel, config: PeftConfig, *, seed: int) -> GlareModel:
    """A frozen copy of ``base`` with adapters as PEFT initialises them, here from a seed."""
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, from the global generator
        torch.set_rng_state(seeded(seed, 0).get_state())
        model = GlareModel.from_backbone(copy.deepcopy(base.backbone), config)
    model.eval().requires_grad_(False)
    return model


@torch.no_grad()
def patch_tokens(model: GlareModel, images: Tensor) -> Tensor:
    """Images (n, 3, h, w) -> final-norm patch tokens (n * patches, d)."""
    rows, columns = model.grid_size(images)
    tokens: Tensor = model(images).last_hidden_state
    return tokens[:, -rows * columns :].flatten(0, 1)


class _Trial(NamedTuple):
    """A factor that was tried. ``place`` is its logarithm, ``excess`` is log(1 - cosine) less what is wanted."""

    place: float
    cosine: float
    excess: float


def find_factor(cosine_at: Callable[[float], float], target: float) -> tuple[float, float]:
    """The factor at which a cosine that falls from 1 is ``target``, and the cosine there.

    Small factors turn the features in proportion, so log(1 - cosine) over log(factor) is a line of slope 2. The
    first step assumes it, the next are secant steps that overshoot; once the target lies between two factors, regula
    falsi with the Illinois weights (Dowell and Jarratt 1971). ``cosine_at`` is called at most 16 times; a factor at
    which it is not a number is too large. Where no factor has the target, the answer is the nearest of those tried.
    """
    tolerance = min(TOLERANCE, max((1 - target) / 10, RESOLUTION))
    wanted = math.log(max(1 - target, RESOLUTION))
    trials: list[_Trial] = []
    place: float | None = FIRST
    while place is not None and len(trials) < MOST_TRIALS:
        cosine = cosine_at(math.exp(place))
        excess = math.log(max(1 - cosine, RESOLUTION)) - wanted if math.isfinite(cosine) else 1.0
        trials.append(_Trial(place, cosine, excess))
        if abs(cosine - target) <= tolerance:
            break
        place = _next_place(trials)
    met = [(abs(trial.cosine - target), trial) for trial in trials if math.isfinite(trial.cosine)]
    if not met:
        return 0.0, 1.0
    nearest = min(met)[1]
    return math.exp(nearest.place), nearest.cosine


def _next_place(trials: Sequence[_Trial]) -> float | None:
    """Where to look next; None at the bounds, and where larger factors turn the features no further."""
    last = trials[-1]
    same_side = list(takewhile(lambda trial: (trial.excess < 0) == (last.excess < 0), reversed(trials)))
    if len(same_side) < len(trials):
        across = trials[-1 - len(same_side)]
        weight = across.excess * 0.5 ** (len(same_side) - 1)
        return (last.place * weight - across.place * last.excess) / (weight - last.excess)
    slope, stride = 2.0, 1.0
    if len(trials) > 1:
        slope = (last.excess - trials[-2].excess) / (last.place - trials[-2].place)
        stride = OVERSHOOT
        if last.excess < 0 and slope < SATURATED and last.cosine < 1 - TOLERANCE:
            return None
    step = -stride * last.excess / max(slope, SATURATED)
    place = min(max(last.place + min(max(step, -LARGEST_STEP), LARGEST_STEP), LEAST), MOST)
    return place if abs(place - last.place) > 0 else None  # nor where the target is not a number
