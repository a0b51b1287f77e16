"""What a fine-tuning run says: before it begins, in every line of its log, and behind its progress bar."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from glare.data.cache import skipped_lines
from glare.data.labelled import PackedLabelled
from glare.finetune_data import absent_line
from glare.finetune_plan import Plan
from glare.metrics import SegmentationScores
from glare.runtime import Clock


def describe_run(recipe: object, packed: PackedLabelled, plan: Plan, *, absent: Sequence[str]) -> str:
    """What is about to happen, for the user: the data, what was skipped and what was chosen.

    ``recipe`` has None in those fields of the plan that the user left open; ``absent`` are classes without a pixel.
    """
    count = len(packed.names)
    lines = [f"{count} labelled images of {len(packed.classes)} classes, {len(packed.skipped)} skipped"]
    lines += skipped_lines(packed.skipped)
    if absent:
        lines.append(absent_line(absent, len(packed.classes)))
    passes = plan.steps * plan.batch_size / count
    lines.append(f"{plan.steps} steps of {plan.batch_size} crops of {plan.crop_size} px = {passes:.1f} passes")
    chosen = [f"{name}={value}" for name, value in asdict(plan).items() if getattr(recipe, name) is None]
    if chosen:
        lines.append(f"chosen from the data: {', '.join(chosen)}")
    return "\n".join(lines)


def measurements(plan: Plan, loss: float, clock: Clock, *, rates: tuple[float, float], steps: int) -> dict[str, float]:
    """One line of the log: this step's loss and rates of head and backbone, and the speed over the last ``steps``."""
    head, backbone = rates
    seconds = clock.seconds["data"] + clock.seconds["train"]
    return {
        "loss": loss,
        "learning_rate": head,
        "backbone_learning_rate": backbone,
        "images_per_second": steps * plan.batch_size / seconds,
        "data_wait": clock.seconds["data"] / seconds,
    }


def summary(scores: SegmentationScores) -> dict[str, float]:
    """What the log and the trackers hold of an evaluation."""
    return {"miou": scores.miou, "aacc": scores.aacc, "macc": scores.macc}


def progress_text(values: Mapping[str, float]) -> str:
    """Behind the progress bar."""
    speed = f"{values['images_per_second']:.1f} images/s, {values['data_wait']:.0%} waiting for data"
    return f"loss {values['loss']:.3f} | {speed}"
