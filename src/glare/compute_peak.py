"""The fastest that a device multiplies matrices: what model FLOP utilisation is measured against."""

import time

import torch

from glare.runtime import finish

DATA_SHEET = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}
"""Part of a GPU's name -> FLOP/s of dense bfloat16 matrix products, of the SXM form, by NVIDIA's data sheets."""

CPU_SIDE, GPU_SIDE = 2048, 8192
REPEATS = 5


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of products of matrices of ``dtype``, and where the number is from: "data sheet" or "measured"."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in DATA_SHEET.items():
            if part in name:
                return flops, "data sheet"
    return _measured(device, dtype), "measured"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of some products of large square matrices."""
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        left @ right
        finish(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds)
