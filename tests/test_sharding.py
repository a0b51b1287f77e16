"""Sharding without a launcher: what is refused before anything is read, and what the main process hands out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glare import pretrain, shares
from glare.errors import UserError
from glare.sharding import check_precision
from glare.shares import same_everywhere


def accelerator(processes: int, precision: str) -> Any:
    return SimpleNamespace(num_processes=processes, mixed_precision=precision)


def test_a_scaled_loss_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for processes, precision in ((2, "bf16"), (2, "no"), (1, "fp16")):
        check_precision(accelerator(processes, precision))
    monkeypatch.setattr(pretrain, "make_accelerator", lambda **_: accelerator(2, "fp16"))
    asked = {"backbone": "no-vit", "data": "no-images", "output": tmp_path / "run", "shard": True}
    with pytest.raises(UserError, match=r"shard does not go with precision fp16 .*; give --precision bf16 or fp32"):
        pretrain.run(asked)
    assert not (tmp_path / "run").exists()


def test_heads_are_those_of_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for tensor in (first.weight.data, first.running_mean):
        assert isinstance(tensor, Tensor)
        tensor.normal_()
    sent = iter([*first.parameters(), *first.buffers()])
    monkeypatch.setattr(shares, "broadcast", lambda tensor: tensor.copy_(next(sent)))
    same_everywhere(other)
    for name, value in first.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert next(sent, None) is None
    assert other.weight.requires_grad
