"""Whole jobs on a pretended device, from files to files."""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from labelled_samples import write_labelled
from other_device import OTHER, other_device
from PIL import Image
from reference.builders import noise_image
from tiny_models import adapted_model, tiny_vit
from transformers import PreTrainedModel

from glare import bench_ways, compare, evaluate, finetune, inference, inspect, pretrain
from glare.bench_ways import OwnWay, PlainWay
from glare.compare import CompareRecipe
from glare.data.cache import pack
from glare.data.sources import image_files, open_source
from glare.evaluate import EvaluateRecipe
from glare.finetune import FinetuneRecipe
from glare.inference import PredictRecipe
from glare.runtime import Clock, make_accelerator

SMALL: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "rank": 4,
    "learning_rate": 1e-3,
    "log_every": 1,
    "checkpoint_every": 1,
    "num_workers": 1,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
    "views": {"num_local": 1, "global_size": 16, "local_size": 8, "global_area": [0.5, 1.0]},
    "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 2}},
}
SHARED: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs run on the other device, whatever they were asked for."""
    Accelerator(cpu=True)  # fills the shared state
    monkeypatch.setitem(PartialState._shared_state, "device", OTHER)
    save = PreTrainedModel.save_pretrained

    def saved_from_a_copy(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        # transformers takes the device's type, "meta", for weights that are not loaded
        save(deepcopy(self).to("cpu"), *args, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saved_from_a_copy)
    with other_device():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        Image.fromarray(noise_image(41, 30 + number, number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for tile in range(3):
        write_labelled(folder, 2, size=(40, 32), prefix=f"tile{tile}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_vit("dinov2").save_pretrained(folder / "base")
    adapted_model(tiny_vit("dinov2")).save_pretrained(folder / "adapted")
    return folder


@pytest.mark.usefixtures("elsewhere")
def test_pretrain_and_its_resume(models: Path, photos: Path, tmp_path: Path) -> None:
    given = {**SMALL, "backbone": str(models / "base"), "data": str(photos), "output": tmp_path / "run"}
    whole = json.loads((pretrain.run(given) / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000002")
    run = pretrain.run({**given, "resume": True})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert (run / "model" / "model.safetensors").is_file() and (run / "adapter").is_dir()
    assert json.loads((run / "price.json").read_text())["device"] == OTHER.type


@pytest.mark.usefixtures("elsewhere")
def test_finetune_evaluate_and_predict(models: Path, data: Path, photos: Path, tmp_path: Path) -> None:
    recipe = FinetuneRecipe(model=str(models / "adapted"), data=str(data), output=tmp_path / "run", **SHARED)
    val = str(write_labelled(tmp_path / "val", 3))
    recipe = replace(recipe, val_data=val, steps=2, batch_size=2, crop_size=16, eval_every=1, report_to="none")
    run = finetune.run(replace(recipe, checkpoint_every=1, num_workers=1))
    entry = json.loads((run / "eval.json").read_text())
    scores = evaluate.run(EvaluateRecipe(model=str(run), data=val, **SHARED))
    assert scores.miou == pytest.approx(entry["miou"], abs=1e-3)
    images = tuple(str(file) for file in sorted(photos.iterdir())[:2])
    inference.predict(PredictRecipe(model=str(run), images=images, output=tmp_path / "masks", window=24, **SHARED))
    assert np.asarray(Image.open(tmp_path / "masks" / "0.png")).shape == (30, 41)


@pytest.mark.usefixtures("elsewhere")
def test_compare(models: Path, data: Path, tmp_path: Path) -> None:
    recipe = CompareRecipe(
        base=str(models / "base"),
        adapted=(str(models / "adapted"),),
        data=str(data),
        output=tmp_path / "proof",
        group_by="prefix",
        short_side=32,
        controls=3,
        **SHARED,
    )
    assert [row.name for row in compare.run(recipe).rows] == ["adapted"]
    assert (tmp_path / "proof" / "report.html").is_file()


@pytest.mark.usefixtures("elsewhere")
def test_inspect(models: Path, photos: Path, tmp_path: Path) -> None:
    given = {**SMALL, "backbone": str(models / "base"), "data": str(photos), "output": tmp_path / "look.png"}
    inspect.run({**given, "num_images": 2})
    assert np.asarray(Image.open(tmp_path / "look.png")).std() > 0


@pytest.mark.usefixtures("elsewhere")
def test_both_ways_of_the_benchmark(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_ways, "MAX_WORKERS", 0)
    given = {**SMALL, "backbone": str(models / "base"), "data": str(photos), "output": tmp_path}
    accelerator = make_accelerator(device="cpu", precision="fp32", report_to="none", output=tmp_path)
    recipe, _ = pretrain.resolve(given, num_images=4, patch_size=4, accelerator=accelerator)
    packed = pack(open_source(str(photos)))
    for way in (OwnWay(recipe, packed.images, accelerator), PlainWay(recipe, image_files(photos), accelerator)):
        way.begin()
        terms = way.step(Clock(OTHER))
        way.end()
        assert terms.total.device.type == OTHER.type and torch.isfinite(terms.total)
