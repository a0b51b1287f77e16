"""What a pre-training run says: before it begins, in every line of its log, and behind its progress bar."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from glare.feed import Feed
from glare.objectives.base import Objective, Terms
from glare.pretrain_plan import Plan
from glare.runtime import Clock

STEP_FORMS = {"grad_norm": "gradient {:.2g}", "teacher_entropy": "entropy {:.2f}", "matched_share": "matched {:.0%}"}
"""Values of a step that stand behind the progress bar, in this order."""


def describe(plan: Plan, feed: Feed, derived: Mapping[str, Any]) -> str:
    """What is about to happen, for the user: the data, what was skipped and what was chosen."""
    passes = f" = {plan.steps * plan.batch_size / len(feed.names):.1f} passes" if feed.names is not None else ""
    lines = [*feed.about, f"{plan.steps} steps of {plan.batch_size} images{passes}"]
    if derived:
        lines.append("chosen from the data: " + ", ".join(f"{key}={value}" for key, value in derived.items()))
    return "\n".join(lines)


def measurements(
    terms: Terms,
    grad_norms: Mapping[str, Tensor],
    objective: Objective,
    plan: Plan,
    step: int,
    clock: Clock,
    *,
    steps: int,
) -> dict[str, float]:
    """One line of the log: this step's terms and health, and the speed over the ``steps`` since the last line."""
    centres = {name: value.norm() for name, value in objective.named_buffers() if name.startswith("centre_")}
    return {
        "loss": terms.total.item(),
        **{f"loss_{name}": value.item() for name, value in terms.losses.items()},
        **{name: value.item() for name, value in terms.health.items()},
        **{name.replace("centre_", "centre_norm_"): value.item() for name, value in centres.items()},
        **{name: value.item() for name, value in grad_norms.items()},
        "learning_rate": plan.learning_rate_at(step),
        **({"teacher_momentum": plan.momentum_at(step)} if objective.needs_teacher else {}),
        "images_per_second": steps * plan.batch_size / clock.elapsed,
        "data_wait": clock.share("data"),
    }


def progress_text(values: Mapping[str, float], untouched: Mapping[str, float]) -> str:
    """Behind the progress bar; ``values`` with those of the last health check, ``untouched`` of the one before.

    What a terminal of usual width cuts off is the end.
    """
    terms = [f"{key.removeprefix('loss_')} {value:.2f}" for key, value in values.items() if "loss_" in key]
    centres = [f"{value:.2g}" for key, value in values.items() if key.startswith("centre_norm_")]
    health = []
    if "rankme_patches" in values:
        rank, base = values["rankme_patches"], untouched["rankme_patches"]
        health += [f"RankMe {rank:.0f} of {base:.0f}, cosine {values['cosine_to_base']:.2f},"]
        health += [f"std {values['feature_std']:.2g}, [CLS] {values['rankme_cls']:.1f}"]
    step = [form.format(values[key]) for key, form in STEP_FORMS.items() if key in values]
    step += [f"centres {'/'.join(centres)}"] if centres else []
    speed = [f"{values['images_per_second']:.1f} images/s, {values['data_wait']:.0%} waiting for data"]
    return " | ".join(" ".join(part) for part in (terms, health, step, speed) if part)
