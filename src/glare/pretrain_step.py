"""One step of pre-training (paper section 4): views, teacher, student, gradients, and what follows from them."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glare.crops import PackedImages, subset
from glare.errors import UserError
from glare.objectives.base import Terms
from glare.pretrain_plan import Plan
from glare.runtime import Clock, seeded
from glare.teacher import update_teacher
from glare.train_state import TrainState, clip_parts
from glare.views import Normalisation, ViewConfig, Views, make_views


def cut_views(
    images: PackedImages,
    batch: Tensor,
    config: ViewConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
    patch_size: int,
    normalise: Normalisation,
) -> Views:
    """This process's share of a batch, cut and augmented on the device."""
    rank, world = accelerator.process_index, accelerator.num_processes
    index = batch.view(world, -1)[rank]
    if images.pixels.device != accelerator.device:
        images, index = subset(images, index).to(accelerator.device), torch.arange(len(index))
    generator = seeded(seed, step, rank, 0)
    return make_views(images, index, config, patch_size=patch_size, normalise=normalise, generator=generator)


def train_step(
    state: TrainState,
    wrapped: nn.Module,
    views: Views,
    plan: Plan,
    accelerator: Accelerator,
    *,
    step: int,
    clock: Clock,
) -> tuple[Terms, dict[str, Tensor]]:
    """One optimizer step, then the teacher and the centres follow. Raises UserError when the loss is not finite.

    ``clock`` gets the parts "teacher", "student" (with heads and losses), "backward" and "update". Returns the terms
    and the gradient norms of ``clip_parts``.
    """
    with clock.measure("teacher"), accelerator.autocast():
        features = state.teacher.target_features(views)
    with clock.measure("student"), accelerator.autocast():
        terms: Terms = wrapped(
            views,
            features,
            target=state.teacher,
            temperature=plan.temperature_at(step),
            generator=seeded(plan.seed, step, accelerator.process_index, 1),
        )
        total = terms.total
    require_finite(terms, plan, accelerator, step=step)
    with clock.measure("backward"):
        accelerator.backward(total)
    with clock.measure("update"):
        grad_norms = update(state, terms, plan, accelerator, step=step)
    return terms, grad_norms


def require_finite(terms: Terms, plan: Plan, accelerator: Accelerator, *, step: int) -> None:
    """Raise UserError on all processes where a term of the loss is not finite on any of them."""
    own = torch.stack(list(terms.losses.values())).isfinite().logical_not()
    broken = accelerator.reduce(own.float(), reduction="sum") if accelerator.num_processes > 1 else own
    if not broken.any():
        return
    names = ", ".join(name for name, there in zip(terms.losses, broken.tolist(), strict=True) if there)
    value = terms.total.item() if own.any() else "nan or infinite on another process"
    raise UserError(
        f"the loss became {value} at step {step + 1} (terms: {names}); lower learning_rate "
        f"(now {plan.learning_rate}) or give --precision fp32, and go on from the last checkpoint with --resume"
    )


def update(state: TrainState, terms: Terms, plan: Plan, accelerator: Accelerator, *, step: int) -> dict[str, Tensor]:
    """What follows from the gradients: student, teacher, centres. Returns the norms of the gradients."""
    student = state.student
    accelerator.unscale_gradients(state.optimizer)
    grad_norms = clip_parts(student, plan.clip)
    if step < plan.freeze_last_layer_steps:
        student.objective.head.last_layer.zero_grad()
    if step < plan.head_warmup_steps:
        student.backbone.zero_grad()
    state.optimizer.step()
    state.optimizer.zero_grad()
    update_teacher(state.teacher, student, plan.momentum_at(step))
    student.objective.update(sums_over_ranks(terms.batch_sums, accelerator))
    return grad_norms


def sums_over_ranks(
    batch_sums: dict[str, tuple[Tensor, Tensor]], accelerator: Accelerator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and their counts, added up over processes in one message."""
    if accelerator.num_processes == 1 or not batch_sums:
        return batch_sums
    sizes = [total.numel() for total, _ in batch_sums.values()]
    packed = torch.cat([torch.cat([total, rows.view(1)]) for total, rows in batch_sums.values()])
    parts = accelerator.reduce(packed, reduction="sum").split([size + 1 for size in sizes])
    return {key: (part[:-1], part[-1]) for key, part in zip(batch_sums, parts, strict=True)}
