"""A batch shared out: over processes, and over the passes of a process whose gradients are accumulated."""

from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from glare.draws import Draws
from glare.errors import UserError
from glare.runtime import seeded


def check_shares(batch_size: int, processes: int, accumulation: int) -> None:
    """Raise UserError where a batch cannot be shared out equally."""
    if batch_size % (processes * accumulation):
        passes = f" times {accumulation} gradient_accumulation_steps" if accumulation > 1 else ""
        raise UserError(
            f"batch_size {batch_size} does not divide by {processes} process{'es' * (processes > 1)}{passes}; "
            f"give a multiple of {processes * accumulation}"
        )


def share_of(accelerator: Accelerator, total: int) -> slice:
    """The part of a batch of ``total`` that is this process's."""
    count = total // accelerator.num_processes
    first = count * accelerator.process_index
    return slice(first, first + count)


def draws_of(accelerator: Accelerator, total: int, *, seed: int, step: int, purpose: int) -> Draws:
    """Random numbers of this process's share of a batch of ``total``; each ``purpose`` has its own."""
    return Draws(seeded(seed, step, purpose), total, share_of(accelerator, total))


def passes(count: int, number: int) -> Iterator[slice]:
    """``count`` images in ``number`` equal parts."""
    size = count // number
    return (slice(first, first + size) for first in range(0, count, size))


@torch.no_grad()
def same_everywhere(module: nn.Module) -> None:
    """Give a module the weights and buffers of the main process, in case of other files, or other roundings, here."""
    for tensor in (*module.parameters(), *module.buffers()):
        broadcast(tensor.detach())


def added_up(vectors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Vectors of float32 summed over processes, in one message."""
    if accelerator.num_processes == 1:
        return dict(vectors)
    packed = accelerator.reduce(torch.cat(list(vectors.values())), reduction="sum")
    parts = packed.split([value.numel() for value in vectors.values()])
    return dict(zip(vectors, parts, strict=True))
