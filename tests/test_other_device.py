"""What the package does on a device is what it does on the CPU, and no tensor is on the wrong one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from labelled_samples import write_labelled
from other_device import OTHER, other_device
from PIL import Image
from reference.builders import noise_image, packed
from tiny_models import adapted_model, segmenter, tiny_config, tiny_vit
from torch import Tensor

from glare import compare, evaluate, finetune, inference, inspect, pretrain, runtime
from glare.views import Normalisation, ViewConfig, Views, make_views

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "steps": 3,
    "batch_size": 3,
    "rank": 4,
    "learning_rate": 1e-3,
    "log_every": 1,
    "num_workers": 1,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
    "views": {"num_local": 2, "global_size": 16, "local_size": 8, "global_area": [0.5, 1.0]},
    "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 2}},
}


@pytest.fixture
def jobs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs run on the other device."""

    Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", OTHER)
    with other_device():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(7):
        Image.fromarray(noise_image(41, 30 + number, number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit("dinov2").save_pretrained(folder)
    return folder


def test_pretrain(jobs_elsewhere: None, photos: Path, vit: Path, tmp_path: Path) -> None:
    pretrain.run({**SMALL, "backbone": str(vit), "data": str(photos), "output": tmp_path / "run"})
