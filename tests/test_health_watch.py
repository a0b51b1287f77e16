"""A watched run: equal bits, alarms that stop it and keep its last healthy checkpoint, remedies that can be followed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_no_class_token import tiny_ijepa
from transformers import PreTrainedModel

from glare import health_watch, pretrain
from glare.alarms import CHECKED
from glare.cli import main
from glare.errors import UserError
from glare.health_check import HealthCheck

SMALL: dict[str, Any] = {
    "steps": 6,
    "batch_size": 3,
    "rank": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "num_workers": 1,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
    "views": {"num_local": 2, "global_size": 16, "local_size": 8},
    "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 2}},
}
CHECKS = set(CHECKED)


@pytest.fixture
def given(tmp_path: Path, make_vit: Callable[..., PreTrainedModel]) -> Callable[..., dict[str, Any]]:
    make_vit("dinov2").save_pretrained(tmp_path / "vit")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(7):
        image = rng.integers(0, 256, (30 + number, 41, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")

    def make(output: str, **changes: Any) -> dict[str, Any]:
        places = {"backbone": str(tmp_path / "vit"), "data": str(tmp_path / "photos"), "output": tmp_path / output}
        return {**SMALL, **places, **changes}

    return make


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def weights(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "state.safetensors")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_probe(given: Callable[..., dict[str, Any]]) -> None:
    for lr in (0.02, 0.05, 0.1, 0.2, 0.5):
        folder = pretrain.run(given(f"x{lr}", learning_rate=lr, warmup_steps=12, steps=12, on_unhealthy="warn"))
        for line in lines(folder):
            print(
                lr,
                {
                    k: round(v, 3)
                    for k, v in line.items()
                    if v is not None and k in (*CHECKED, "loss", "grad_norm", "teacher_entropy", "marginal_entropy")
                },
            )
    assert 0
