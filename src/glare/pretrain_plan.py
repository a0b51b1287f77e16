"""Settings of a pre-training run, derived from how many images there are and how many go into a batch.

The paper's values are made for thousands of images and hundreds of steps at batch 512; on fifty images they move
nothing. These starting points lie *under* whatever the user or a recipe gives, and the job prints those it used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from glare.errors import UserError
from glare.schedules import cosine, linear, warmup_cosine
from glare.views import ViewConfig

SMALL_RUN_VISITS = 50_000  # images seen in a run below which the small head and fewer local views are enough
STEPS = (60, 1000)
PEAK_LEARNING_RATE = 5e-3  # of adapters with scale 1, at the 60 steps of batch 8 that training/RESULTS.md measures


@dataclass(frozen=True)
class Plan:
    """What a run does at each step: sizes of the run, and the values that change with the step."""

    steps: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    momentum: float
    momentum_end: float
    teacher_temperature: tuple[float, float]
    temperature_ramp: float
    freeze_last_layer_steps: int
    head_warmup_steps: int
    clip: float
    seed: int

    @classmethod
    def of(cls, recipe: Any) -> Self:
        """The plan of a resolved recipe, which has fields of the same names."""
        return cls(**{name: getattr(recipe, name) for name in cls.__dataclass_fields__})

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up and cosine."""
        end = min(self.min_learning_rate, self.learning_rate)
        return warmup_cosine(step, steps=self.steps, warmup=self.warmup_steps, peak=self.learning_rate, end=end)

    def momentum_at(self, step: int) -> float:
        """Of the teacher: cosine from ``momentum`` to ``momentum_end``."""
        return cosine(step, steps=self.steps, start=self.momentum, end=self.momentum_end)

    def temperature_at(self, step: int) -> float:
        """Of the teacher: linear ramp over the first ``temperature_ramp`` of the steps."""
        start, end = self.teacher_temperature
        return linear(step, steps=round(self.temperature_ramp * self.steps), start=start, end=end)


def derive_steps(num_images: int, batch_size: int) -> int:
    """One pass over the images, within 60 to 1000 steps."""
    return max(STEPS[0], min(STEPS[1], num_images // batch_size))


def derive_optimisation(steps: int) -> dict[str, Any]:
    """Learning rate, warm-up and teacher momentum of a run of ``steps`` steps.

    The teacher keeps 1/e of its initial weights at the end, however short the run: a momentum made for 100,000
    steps would leave it at its initial weights. The learning rate falls with the root of the steps.
    """
    return {
        "learning_rate": float(f"{max(5e-4, PEAK_LEARNING_RATE * (STEPS[0] / max(steps, STEPS[0])) ** 0.5):.2g}"),
        "warmup_steps": max(1, steps // 10),
        "momentum": round(1 - 1 / steps, 6),
        "momentum_end": round(1 - 1 / steps, 6),
    }


def derive_model(steps: int, batch_size: int, *, patch_size: int, anchored: bool) -> dict[str, Any]:
    """The paper's 14 x 14 and 6 x 6 patches a view; for short runs a small head fitted to the images, four local views,
    adapters unscaled, an anchor where they can have one (``anchored``), and a teacher that stays sharp: at 0.07 a head
    that has seen little gives uniform targets.

    Images are kept at twice the side of a global view, so that the smallest local views are hardly enlarged.
    """
    derived: dict[str, Any] = {
        "views": {"global_size": 14 * patch_size, "local_size": 6 * patch_size},
        "image_size": 28 * patch_size,
    }
    if steps * batch_size <= SMALL_RUN_VISITS:
        derived["views"]["num_local"] = 4
        derived["glare"] = {"prototypes": 512, "head_hidden": 512, "head_init": "data"}
        derived["scale"] = 1.0
        if anchored:
            derived["anchor"] = 1.0
        derived["teacher_temperature"] = (0.04, 0.04)
    return derived


def check_sizes(views: ViewConfig, patch_size: int) -> None:
    """Raise UserError for views that are not of whole patches."""
    for name in ("global_size", "local_size"):
        size = getattr(views, name)
        if size % patch_size:
            fitting = max(1, round(size / patch_size)) * patch_size
            raise UserError(f"views.{name} {size} is no multiple of the patch size {patch_size}; give {fitting}")


def overlay(derived: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``derived``, nested mappings merged."""
    merged = dict(derived)
    for key, value in given.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
