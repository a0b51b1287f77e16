"""One step of fine-tuning: crops and labels, loss, gradients; the same however a batch is shared out.

Dropout draws on each process for itself. The running statistics of batch norms are those of a pass.
"""

import math
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glare.data.labelled import PackedLabelled
from glare.errors import NotFiniteError
from glare.finetune_plan import Plan
from glare.labelled_crops import IGNORED, TrainingCrops, training_batch
from glare.runtime import seeded
from glare.schedules import warmup_poly
from glare.shares import added_up, draws_of, passes

CROPS, DROPOUT = 1, 2
"""What a step draws for: a part of the seed of its generator."""


def cut_batch(
    packed: PackedLabelled,
    index: Tensor,
    crops: TrainingCrops,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """This process's share of the batch ``index``: pixels and labels."""
    draws = draws_of(accelerator, len(index), seed=seed, step=step, purpose=CROPS)
    return training_batch(packed, index[draws.share], crops, accelerator.device, draws=draws)


def train_step(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    plan: Plan,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
) -> float:
    """One optimizer step on this process's pixels and labels; returns the loss of the whole batch.

    Raises NotFiniteError, on all processes, where it is not finite; nothing has changed then.
    """
    # dropout draws from the global generator: seeded anew, it draws the same after a resume
    torch.manual_seed(seeded(seed, step, DROPOUT, accelerator.process_index).initial_seed())
    pixels, labels = batch
    labelled = added_up({"pixels": (labels != IGNORED).sum().view(1).float()}, accelerator)["pixels"].clamp(min=1)
    shares = []
    for images in passes(len(labels), plan.gradient_accumulation_steps):
        last = images.stop == len(labels)
        counted = (labels[images] != IGNORED).sum()
        # UPerNet's loss of no labelled pixel is no number: give it some, which count for nothing
        shown = labels[images].where(counted > 0, 0)
        with nullcontext() if last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                loss = wrapped(pixel_values=pixels[images], labels=shown).loss
            part = loss * (counted / labelled).squeeze()
            accelerator.backward(part * accelerator.num_processes)  # of whose gradients DDP takes the mean
        shares.append(part.detach().float().view(1))
    value = added_up({"loss": torch.stack(shares).sum(dim=0)}, accelerator)["loss"].item()
    if not math.isfinite(value):
        raise NotFiniteError(
            f"the loss became {value} at step {step + 1}; lower learning_rate (now {plan.learning_rate}) and "
            f"backbone_learning_rate (now {plan.backbone_learning_rate}), or give --precision fp32"
        )
    head, backbone = learning_rates(plan, step)
    for group in optimizer.param_groups:
        group["lr"] = head if group["head"] else backbone
    optimizer.step()
    optimizer.zero_grad()
    return value


def learning_rates(plan: Plan, step: int) -> tuple[float, float]:
    """Of head and backbone: linear warm-up, then mmsegmentation's poly, a straight line where its power is 1."""

    def rate(peak: float) -> float:
        shape = {"power": plan.poly_power, "end": min(plan.min_learning_rate, peak)}
        return warmup_poly(step, steps=plan.steps, warmup=plan.warmup_steps, peak=peak, **shape)

    return rate(plan.learning_rate), rate(plan.backbone_learning_rate)
