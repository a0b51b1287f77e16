"""What an adaptation costs: time and memory to train, bytes to store, time to run.

Training writes ``price.json`` into its run folder, a comparison reads it.
"""

import math
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glare.comparison import Price
from glare.errors import UserError
from glare.intervals import Estimate
from glare.json_files import read_json
from glare.run_folder import RunFolder, atomic_write_json, run_folder_of
from glare.runtime import Clock, finish

FILE = "price.json"
RECORDED = ("parameters_trained", "seconds", "peak_memory_bytes")
LARGEST = 1e18  # of what is recorded: bytes, seconds, weights
STATUS = Path("/proc/self/status")  # of Linux, with the peak of the resident set
RESIDENT_PEAK = re.compile(r"VmHWM:\s*(\d+) kB")
CLEAR_REFS = Path("/proc/self/clear_refs")  # of Linux: 5 sets that peak to what it is now
TAIL, NORMAL = 0.025, 1.96  # of a 95 % interval: probability on each side, half its width in standard errors


class Meter:
    """The cost of a training run from the moment this is made; ``earlier`` are the seconds before a resume."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.clock = Clock()
        self.earlier = 0.0
        if accelerator.device.type == "cuda":
            reset_peak_memory(accelerator.device)

    @property
    def seconds(self) -> float:
        """Wall clock over all parts of the run, without work that was lost when it was stopped."""
        return self.earlier + self.clock.elapsed

    def write(self, folder: RunFolder, model: nn.Module, *, seconds: float, steps: int, images: int | None) -> None:
        """Write ``price.json``, once the weights are in the run folder. ``images``: of the training set, if known."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        values = {
            "parameters_trained": trained_parameters(model),
            "adapter_bytes": stored_bytes(folder.path),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": f"{processes} x {device_name(device)}" if processes > 1 else device_name(device),
            "steps": steps,
            "images": images,
        }
        atomic_write_json(folder.path / FILE, values)


def trained_parameters(model: nn.Module) -> int:
    """Number of weights of a model that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on a CUDA device, elsewhere the resident set of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = RESIDENT_PEAK.search(STATUS.read_text()) if STATUS.exists() else None
    if peak:  # what getrusage tells begins, on Linux, with the peak of the process that started this one
        return int(peak[1]) * 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # macOS counts bytes, others KiB


def reset_peak_memory(device: torch.device) -> int:
    """Let ``peak_memory_bytes`` begin anew, where the system can; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")
    return peak_memory_bytes(device)


def device_name(device: torch.device) -> str:
    """What the device is, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def price(model_path: str | Path, *, overhead: Estimate | None) -> Price:
    """What is known of a model's cost: a run folder, the ``model`` folder in one, another model folder or a Hub id."""
    run = run_folder_of(str(model_path))
    recorded: dict[str, Any] = {}
    if run is not None and (run / FILE).is_file():
        recorded = read_json(run / FILE)
    numbers = {key: recorded.get(key) for key in RECORDED}
    wrong = [key for key, value in numbers.items() if value is not None and not _is_amount(value)]
    if wrong:
        raise UserError(f"{run}/{FILE} has no number under {wrong[0]!r}; remove the file, the price is then not known")
    device = recorded.get("device")
    return Price(
        adapter_bytes=stored_bytes(run or Path(model_path)),
        device=None if device is None else str(device),
        overhead=overhead,
        **numbers,
    )


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def stored_bytes(folder: Path) -> int | None:
    """Bytes of the weights that are stored besides the untouched model: the adapters, or all weights where all trained.

    ``folder``: a run folder or a model folder. None where the adapters are in one file with the untouched weights.
    """
    adapter = folder / "adapter" / "adapter_model.safetensors"
    if adapter.is_file():
        return adapter.stat().st_size
    model = folder / "model" if (folder / "model").is_dir() else folder
    weights = list(model.glob("*.safetensors"))
    config = model / "config.json"
    if not weights or not config.is_file() or read_json(config).get("adapter_config"):
        return None
    return sum(file.stat().st_size for file in weights)


@torch.inference_mode()
def inference_overhead(
    base: nn.Module,
    adapted: nn.Module,
    images: Tensor,
    *,
    repeats: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """How much longer a forward pass of the adapted model takes: its time over the untouched model's, minus 1.

    The value is the median of the ratios of ``repeats`` pairs of passes: what slows the machine for a while slows
    both passes of a pair, so it leaves the ratio, but would move one of two medians of times; and a pass that was
    interrupted spoils one pair, which the median ignores. The order within pairs alternates. The 95 % interval is
    between order statistics (the sign test's), whatever the distribution; of fewer than 6 pairs it is the range.

    Args:
        base: the untouched model, in evaluation mode.
        adapted: the adapted model, in evaluation mode.
        images: (n, 3, h, w), on the device of both models.
        repeats: number of pairs, at least 1, after one pass of each model that does not count.
        clock: gives seconds.

    Returns:
        An estimate over ``images`` = ``repeats`` pairs; ``image_variance`` is the square of the standard error that
        a normal distribution would have with this interval.
    """
    for model in (base, adapted):
        _seconds(model, images, clock)
    ratios = []
    for pair in range(repeats):
        order = (base, adapted) if pair % 2 == 0 else (adapted, base)
        first, second = (_seconds(model, images, clock) for model in order)
        ratios.append(second / first if pair % 2 == 0 else first / second)
    low, high = median_interval(ratios)
    return Estimate(
        value=statistics.median(ratios) - 1,
        low=low - 1,
        high=high - 1,
        image_variance=((high - low) / (2 * NORMAL)) ** 2,
        seed_variance=0.0,
        images=repeats,
        seeds=1,
    )


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median between the k-th smallest and the k-th largest value; the range if there is none.

    k is the largest number with P(B < k) <= 2.5 %, B binomial with n = ``len(values)`` and 1/2.
    """
    n, ordered = len(values), sorted(values)
    k, below = 1, 1 / 2**n  # P(B < k)
    while (below := below + math.comb(n, k) / 2**n) <= TAIL:
        k += 1
    return ordered[k - 1], ordered[n - k]


def _seconds(model: nn.Module, images: Tensor, clock: Callable[[], float]) -> float:
    """Of one forward pass, with all that the device still had to do."""
    finish(images.device)
    start = clock()
    model(images)
    finish(images.device)
    return clock() - start
