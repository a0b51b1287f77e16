"""Runs of a second or two: recipes, data and a ViT for them, and whether two runs are the same."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_vit

from glare.checkpoints import TENSORS, folders
from glare.yaml_files import dump

SHARED: dict[str, Any] = {
    "log_every": 1,
    "num_workers": 2,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
}
PRETRAIN: dict[str, Any] = {
    "batch_size": 3,
    "rank": 4,
    "views": {"num_local": 2, "global_size": 16, "local_size": 8},
    "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 2}},
}
FINETUNE: dict[str, Any] = {"batch_size": 2, "crop_size": 16}
TIMES = {"images_per_second", "data_wait"}


Given = Callable[..., dict[str, Any]]
"""``given(output, **changes)``: the keys of a pre-training recipe."""


def write_photos(folder: Path, count: int) -> Path:
    """Noise of different sizes, as PNG; returns ``folder``."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (30 + number, 41, 3), dtype=np.uint8))
        image.save(folder / f"{number}.png")
    return folder


def pretraining(folder: Path, *, photos: int = 7, **fixed: Any) -> Given:
    """A ViT of 3 blocks and photographs in ``folder``, and what makes recipes of them; ``fixed`` keys are in all."""
    tiny_vit("dinov2").save_pretrained(folder / "vit")
    write_photos(folder / "photos", photos)

    def make(output: str, **changes: Any) -> dict[str, Any]:
        places = {"backbone": str(folder / "vit"), "data": str(folder / "photos"), "output": folder / output}
        return {**SHARED, **PRETRAIN, **fixed, **places, **changes}

    return make


def write_inputs(folder: Path) -> None:
    """A ViT, photographs, labelled scenes, and the recipes ``pretrain.yaml`` and ``finetune.yaml``."""
    tiny_vit("dinov2", num_hidden_layers=1).save_pretrained(folder / "vit")
    write_photos(folder / "photos", 7)
    write_labelled(folder / "scenes" / "train", 5)
    write_labelled(folder / "scenes" / "val", 2)
    pretrain = {**SHARED, **PRETRAIN, "backbone": str(folder / "vit"), "data": str(folder / "photos")}
    finetune = {**SHARED, **FINETUNE, "model": str(folder / "vit"), "data": str(folder / "scenes")}
    (folder / "pretrain.yaml").write_text(dump(pretrain))
    (folder / "finetune.yaml").write_text(dump(finetune))


def arguments(job: str, inputs: Path, output: Path, **keys: object) -> list[str]:
    """The command line of a run of ``pretrain`` or ``finetune`` without its first word."""
    changes = [f"{name}={str(value).lower()}" for name, value in keys.items()]
    return [job, "--recipe", str(inputs / f"{job}.yaml"), "--output", str(output), *changes]


def logged(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    """Every bit of the model, of the last checkpoint and of the metrics, and the same files."""
    files = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*"))
    assert logged(run) == logged(other)
    ours, theirs = (load_file(folders(path)[0] / TENSORS) for path in (run, other))
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    for file in (path for path in files if path.suffix == ".safetensors" and path.parts[0] != "checkpoints"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def ranks_of_two() -> list[dict[str, str]]:
    """The environments of the two processes of a run, as torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
