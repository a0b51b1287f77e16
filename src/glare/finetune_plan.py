"""Settings of a fine-tuning run, derived from how many labelled images there are and how large they are.

mmsegmentation's 6e-5 for every weight is made for 20,000 steps and more. A run of hundreds of steps does not get a
fresh head anywhere with it, so short runs have a larger rate, and a smaller one of its own for the pre-trained part:
with DINOv2 ViT-S/14 and 25 images of Dubai, 80 steps of 8, 3e-5 scored 46.9 mIoU, 1e-5 45.0, 1e-4 42.5 (one seed).
A linear layer on features that stay as they are takes more: on CamVid, 240 steps of 4, 1e-3 scored 31.1, 5e-3 39.5,
2e-2 44.7 (one seed).
"""

from dataclasses import dataclass, fields, replace
from typing import Any

LONG_RUN_VISITS = 160_000  # images seen in a run from which the published rate is right: 20,000 steps of 8
PASSES = 40
STEPS = (200, 40_000)
MAX_CROP = {True: 256, False: 512}  # on a CPU, elsewhere
MAX_WARMUP = 1500


@dataclass(frozen=True)
class Plan:
    """Numbers of a run: peaks and floor of the learning rates, ``crop_size`` in px, the others in steps and crops."""

    steps: int
    batch_size: int
    crop_size: int
    warmup_steps: int
    learning_rate: float
    backbone_learning_rate: float
    gradient_accumulation_steps: int = 1
    poly_power: float = 1.0
    min_learning_rate: float = 0.0


def make_plan(given: Any, *, num_images: int, short_side: int, patch: int, on_cpu: bool) -> Plan:
    """What ``given`` says, an object with ``head``, ``train_on`` and the fields of a Plan, None where they are derived.

    Steps: 40 passes, but 200 to 40,000. Warm-up: a tenth of the steps, at most 1500. Crops: the images' short side,
    at most 512 px, or 256 px on a CPU, in whole patches. Batch: 8, or 4 on a CPU. Rates: 6e-5 throughout where the
    run sees 160,000 images, otherwise 1e-3 for the head, 2e-2 for a linear one that trains alone, and 3e-5 below it.
    """
    batch_size = (4 if on_cpu else 8) if given.batch_size is None else given.batch_size
    steps = given.steps
    if steps is None:
        steps = max(STEPS[0], min(STEPS[1], PASSES * num_images // batch_size))
    long = steps * batch_size >= LONG_RUN_VISITS
    alone = given.head == "linear" and given.train_on == "head"
    derived = Plan(
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        crop_size=max(1, min(MAX_CROP[on_cpu], short_side) // patch) * patch,
        warmup_steps=min(MAX_WARMUP, steps // 10),
        learning_rate=6e-5 if long else 2e-2 if alone else 1e-3,
        backbone_learning_rate=6e-5 if long else 3e-5,
    )
    set_ones = {name: value for name in names() if (value := getattr(given, name)) is not None}
    return replace(derived, **set_ones)


def names() -> tuple[str, ...]:
    """Names of the fields of a Plan."""
    return tuple(field.name for field in fields(Plan))
