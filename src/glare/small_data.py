"""Settings derived from how many images there are and how many go into a batch.

The paper's values are made for thousands of images and hundreds of steps at batch 512; on fifty images they move
nothing. These starting points lie *under* whatever the user or a recipe gives, and the job prints those it used.
"""

from collections.abc import Mapping
from typing import Any

SMALL_RUN_VISITS = 50_000  # images seen in a run below which the small head and fewer local views are enough
EPOCHS = 20
STEPS = (100, 1000)
PEAK_LEARNING_RATE = 5e-3  # of adapters with scale 1, measured at 60 to 150 steps of batch 8


def derive_steps(num_images: int, batch_size: int) -> int:
    """About twenty passes over the images, within 100 to 1000 steps."""
    return max(STEPS[0], min(STEPS[1], EPOCHS * num_images // batch_size))


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


def derive_model(steps: int, batch_size: int, *, patch_size: int) -> dict[str, Any]:
    """The paper's 14 x 14 and 6 x 6 patches a view; for short runs a small head, four local views, adapters unscaled.

    Images are kept at twice the side of a global view, so that the smallest local views are hardly enlarged.
    """
    derived: dict[str, Any] = {
        "views": {"global_size": 14 * patch_size, "local_size": 6 * patch_size},
        "image_size": 28 * patch_size,
    }
    if steps * batch_size <= SMALL_RUN_VISITS:
        derived["views"]["num_local"] = 4
        derived["glare"] = {"prototypes": 2048, "head_hidden": 512}
        derived["scale"] = 1.0
    return derived


def overlay(derived: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``derived``, nested mappings merged."""
    merged = dict(derived)
    for key, value in given.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
