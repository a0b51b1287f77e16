"""What is chosen where there is a GPU, or none of the kind that was asked for."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glare import runtime
from glare.crops import GPU_SHARE, fits
from glare.errors import UserError
from glare.runtime import make_accelerator

CUDA = torch.device("cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device '{device}' is not available"):
        make_accelerator(device=device, precision="auto", report_to="none", output=tmp_path)


@pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True), (9, True)])
def test_bf16_is_chosen_where_the_gpu_computes_in_it(
    major: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A V100 or T4 only emulates it, slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert runtime._has_bf16(cpu=False) == expected


def test_images_live_on_a_gpu_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 8000))
    assert fits(int(1000 * GPU_SHARE) - 1, CUDA) and not fits(int(1000 * GPU_SHARE), CUDA)
    assert not fits(0, torch.device("cpu"))
