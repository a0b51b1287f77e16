"""One step of pre-training (paper section 4): views, teacher, student, gradients, and what follows from them.

A batch is shared out over processes, and the share of a process over several passes where gradients are accumulated.
Draws belong to images and every mean runs over the whole batch, so the step is the same however it is shared out.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glare.crops import PackedImages, subset
from glare.errors import NotFiniteError
from glare.objectives.base import Terms
from glare.pretrain_plan import Plan
from glare.runtime import Clock
from glare.sharding import average_whole, is_sharded
from glare.shares import added_up, draws_of, passes
from glare.teacher import update_teacher
from glare.train_state import TrainState, clip_parts
from glare.views import Normalisation, ViewConfig, Views, make_views

VIEWS, OBJECTIVE = 1, 2
"""What a step draws for: the last part of the seed of its generator."""


def cut_views(
    images: PackedImages,
    index: Tensor,
    config: ViewConfig,
    accelerator: Accelerator,
    *,
    batch_size: int,
    seed: int,
    step: int,
    patch_size: int,
    normalise: Normalisation,
) -> Views:
    """This process's share of a batch, the images ``index`` of a pack, cut and augmented on the device."""
    draws = draws_of(accelerator, batch_size, seed=seed, step=step, purpose=VIEWS)
    if images.pixels.device.type != accelerator.device.type:  # "cuda" is not "cuda:0"
        images, index = subset(images, index).to(accelerator.device), torch.arange(len(index))
    return make_views(images, index, config, patch_size=patch_size, normalise=normalise, draws=draws)


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
    """One optimizer step, then the teacher and the centres follow. Raises NotFiniteError for the loss.

    ``views`` are this process's share. Returns the terms of the whole batch, without gradient, and the gradient norms
    of ``clip_parts``. ``clock`` gets the parts "teacher", "student" (with heads and losses), "backward" and "update".
    """
    processes = accelerator.num_processes
    with clock.measure("teacher"), accelerator.autocast():
        draws = draws_of(accelerator, plan.batch_size, seed=plan.seed, step=step, purpose=OBJECTIVE)
        features = state.teacher.target_features(views)
        places = state.student.objective.places(features, views, draws)
        counts = added_up(places.counts(), accelerator)
    parts = []
    for images in passes(len(draws), plan.gradient_accumulation_steps):
        last = images.stop == len(draws)
        with nullcontext() if last else accelerator.no_sync(wrapped):
            with clock.measure("student"), accelerator.autocast():
                terms: Terms = wrapped(
                    views.of(images),
                    features.of(images),
                    places.of(images),
                    counts=counts,
                    target=state.teacher,
                    temperature=plan.temperature_at(step),
                )
                total = terms.total * processes  # of whose gradients DDP takes the mean
            with clock.measure("backward"):
                accelerator.backward(total)
        parts.append(terms)
    with clock.measure("update"):
        whole = terms_of_batch(parts, accelerator)
        check_finite(whole, plan, step=step)
        grad_norms = update(state, whole, plan, accelerator, step=step)
    return whole, grad_norms


def check_finite(terms: Terms, plan: Plan, *, step: int) -> None:
    """Raise NotFiniteError for the loss; it is that of the batch, so all processes raise it."""
    total = terms.total
    if not torch.isfinite(total):
        broken = ", ".join(name for name, value in terms.losses.items() if not torch.isfinite(value))
        raise NotFiniteError(
            f"the loss became {total.item()} at step {step + 1} (terms: {broken}); lower learning_rate "
            f"(now {plan.learning_rate}) or give --precision fp32"
        )


def update(state: TrainState, terms: Terms, plan: Plan, accelerator: Accelerator, *, step: int) -> dict[str, Tensor]:
    """What follows from the gradients: student, teacher, centres. Returns the norms of the gradients."""
    student = state.student
    accelerator.unscale_gradients(state.optimizer)
    if is_sharded(student):
        average_whole(list(student.parameters()), accelerator)
    grad_norms = clip_parts(student, plan.clip)
    if student.objective.head is not None and step < plan.freeze_last_layer_steps:
        student.objective.head.last_layer.zero_grad()
    if step < plan.head_warmup_steps:
        student.backbone.zero_grad()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if student.objective.needs_teacher:
        update_teacher(state.teacher, student, plan.momentum_at(step))
    student.objective.update(terms.batch_sums)
    return grad_norms


@torch.no_grad()
def terms_of_batch(parts: Sequence[Terms], accelerator: Accelerator) -> Terms:
    """The terms of the shares of a batch, those of other processes too, added up in one message."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        for key, value in _flattened(part).items():
            sums[key] = sums[key] + value if key in sums else value
    sums = added_up(sums, accelerator)

    def named(kind: str) -> dict[str, Tensor]:
        return {key.removeprefix(kind): value for key, value in sums.items() if key.startswith(kind)}

    batch_sums = {key: (value[:-1], value[-1]) for key, value in named("sum ").items()}
    health = {key: value.squeeze() for key, value in named("health ").items()}
    if "marginal" in sums:
        health["marginal_entropy"] = torch.special.entr(sums["marginal"][:-1] / sums["marginal"][-1]).sum()
    return Terms({key: value.squeeze() for key, value in named("loss ").items()}, batch_sums, health)


def _flattened(terms: Terms) -> dict[str, Tensor]:
    """All numbers of the terms as named vectors."""
    vectors = {f"loss {key}": value.detach().float().view(1) for key, value in terms.losses.items()}
    vectors |= {f"health {key}": value.float().view(1) for key, value in terms.health.items()}
    pairs = {f"sum {key}": pair for key, pair in terms.batch_sums.items()}
    if terms.marginal is not None:
        pairs["marginal"] = terms.marginal
    return vectors | {key: torch.cat([total, rows.view(1)]) for key, (total, rows) in pairs.items()}
