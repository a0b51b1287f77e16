"""What all training jobs share below the loop: processes and precision, seeded draws, clocks, optimizer state."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from glare.errors import NotFiniteError, UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TRACKERS = ("tensorboard", "none")


def make_accelerator(*, device: str, precision: str, report_to: str, output: Path) -> Accelerator:
    """Accelerate for one job; several jobs may follow each other in one process.

    ``precision`` auto is bf16 where the processor computes in it, else fp32. What stays in float32 under a lower
    precision, the logits of the losses, is multiplied in TF32 by GPUs that have it.
    """
    if (device == "cuda" and not torch.cuda.is_available()) or (device == "mps" and not torch.mps.is_available()):
        raise UserError(f"device {device!r} is not available on this machine; leave --device out or give cpu")
    AcceleratorState._reset_state(reset_partial_state=False)
    cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    if precision == "auto":
        precision = "bf16" if _has_bf16(cpu=cpu) else "fp32"
    if cpu and precision == "fp16":
        raise UserError("precision 'fp16' needs a GPU; give bf16 or fp32")
    if not cpu and precision != "fp32":
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=cpu,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(output),
    )


def _has_bf16(*, cpu: bool) -> bool:
    if cpu:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def seeded(*parts: int) -> torch.Generator:
    """A generator that depends on all of ``parts`` (seed, step, rank, ...): nothing to save, nothing to restore."""
    state = np.random.SeedSequence(parts).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def epoch_batches(count: int, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices into ``count`` images, from step ``start`` on.

    Each epoch is a fresh permutation whose incomplete last batch is dropped; sets smaller than a batch fill it
    with several permutations.
    """
    per_epoch = max(1, count // batch_size)
    step = start
    while True:
        epoch, place = divmod(step, per_epoch)
        generator = seeded(seed, epoch)
        rounds = -(-batch_size // count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
        for first in range(place * batch_size, per_epoch * batch_size, batch_size):
            yield order[first : first + batch_size]
            step += 1


def finish(device: torch.device) -> None:
    """Wait until a device has nothing left to do; the CPU computes at once."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """Seconds spent in named parts of a loop.

    A GPU works on while Python goes ahead; with ``device`` each part ends when the device is done with it, which
    gives every part its own time and costs some speed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``."""
        begin = time.perf_counter()
        yield
        if self.device is not None:
            finish(self.device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of ``elapsed``."""
        begin = time.perf_counter()
        yield
        self.started += time.perf_counter() - begin

    def share(self, part: str) -> float:
        """Share of ``part`` in ``elapsed``."""
        return self.seconds.get(part, 0.0) / max(self.elapsed, 1e-9)

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made, but those in which it was paused."""
        return time.perf_counter() - self.started


def scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    """What the loss is scaled with, which changes under fp16; None elsewhere."""
    return None if accelerator.scaler is None else dict(accelerator.scaler.state_dict())


def restore_scaler(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Undo ``scaler_state``; a run that goes on in another precision has nothing to undo."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def check_weights(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise NotFiniteError for a state that is not to become the checkpoint of ``step``."""
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise NotFiniteError(
            f"{len(broken)} tensors, such as {broken[0]}, are not finite after step {step}; lower the learning rate or "
            "give --precision fp32"
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer as named tensors: ``<parameter number>.<entry>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo ``optimizer_tensors``. Raises UserError where they are of other parameters, or of another order of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if int(number) >= len(parameters) or (value.ndim and value.shape != parameters[int(number)].shape):
            raise UserError(
                "the checkpoint has the optimizer of other parameters, as those of earlier versions of glare may have; "
                "begin anew in another --output, without --resume"
            )
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
