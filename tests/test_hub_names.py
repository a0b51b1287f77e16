"""Models by the names they have on the Hub, in the jobs and in transformers, and what is said where there are none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Fault, Hub, Repo
from safetensors.torch import load_file, save_file
from tiny_models import adapted_model, segmenter, tiny_vit

from glare.configuration_glare import FORMAT
from glare.data.labelled import open_labelled
from glare.segmenters import image_processor
from glare.views import Normalisation

DATA = "landcover:arid:3"
PROGRAM = """
import contextlib, io, json, sys
import torch
import glare
from glare import cli
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoModel

results = {}
for name, argv in json.load(open("jobs.json")).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    errors = [line for line in err.getvalue().splitlines() if "error:" in line]
    results[name] = {"code": code, "out": out.getvalue(), "errors": errors}
json.dump(results, open("results.json", "w"))

images = load_file("images.safetensors")["images"]
with torch.no_grad():
    found = {"map": AutoBackbone.from_pretrained("org/segment")(images).feature_maps[-1]}
    found["plain"] = AutoModel.from_pretrained("plain", add_pooling_layer=False)(
        images, interpolate_pos_encoding=True
    ).last_hidden_state
save_file({name: value.contiguous() for name, value in found.items()}, "found.safetensors")
"""
EVALUATE = ["evaluate", "--data", DATA, "--device", "cpu", "--model"]
JOBS = {
    "by folder": [*EVALUATE, "segment", "--json", "folder.json"],
    "by id": [*EVALUATE, "org/segment", "--json", "id.json"],
    "by branch": [*EVALUATE, "org/segment@v1", "--json", "branch.json"],
    "adapter": ["export", "--model", "org/adapter@main", "--output", "plain"],
    "no repository": [*EVALUATE, "org/none"],
    "no revision": [*EVALUATE, "org/segment@v9"],
    "no access": [*EVALUATE, "org/private"],
    "cut short": [*EVALUATE, "org/cut"],
    "later format": [*EVALUATE, "org/later"],
    "no backbone": ["export", "--model", "org/none", "--output", "other"],
}
SAID = {
    "no repository": "model 'org/none' cannot be loaded (org/none is not a local folder and is not a valid model",
    "no revision": "model 'org/segment@v9' cannot be loaded (v9 is not a valid git identifier",
    "no access": "model 'org/private' cannot be loaded (the Hub does not accept the token (401); log in with",
    "cut short": "model 'org/cut' cannot be loaded (its weights are damaged or cut short",
    "later format": f"model 'org/later' cannot be loaded (the checkpoint has format {FORMAT + 1}",
    "no backbone": "backbone 'org/none' cannot be loaded (org/none is not a local folder and is not a valid model",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def publish(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    hub.repos[name] = Repo()
    hub.repos[name].commit("main", files)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the jobs and transformers gave, asked for models of a Hub on this machine."""
    folder = tmp_path_factory.mktemp("names")
    classes = dict(enumerate(open_labelled(DATA).classes))
    for seed, name in enumerate(("segment", "second")):
        model = segmenter(tiny_vit("dinov2", seed=seed), num_labels=len(classes), id2label=classes)
        model.save_pretrained(folder / name)
        image_processor(Normalisation(), size=64, patch=4).save_pretrained(folder / name)
    tiny_vit("vit").save_pretrained(folder / "vit")
    adapted_model(tiny_vit("vit"), "lora").save_adapter(folder / "adapter", base_model="org/vit")
    save_file({"images": torch.randn(2, 3, 16, 24)}, folder / "images.safetensors")
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    with Hub() as hub:
        first = contents(folder / "segment")
        publish(hub, "org/segment", first)
        hub.repos["org/segment"].branches["v1"] = hub.repos["org/segment"].branches["main"]
        hub.repos["org/segment"].commit("main", {**contents(folder / "second"), "news.txt": b"two"})
        publish(hub, "org/vit", contents(folder / "vit"))
        publish(hub, "org/adapter", contents(folder / "adapter"))
        publish(hub, "org/private", first)
        hub.faults += [Fault(method, "/org/private/", 401, times=1000) for method in ("GET", "HEAD")]
        publish(hub, "org/cut", first | {"model.safetensors": first["model.safetensors"][:-1000]})
        config = json.loads(first["config.json"]) | {"format": FORMAT + 1}
        publish(hub, "org/later", first | {"config.json": json.dumps(config).encode()})
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    yield folder, json.loads((folder / "results.json").read_text())


def test_a_model_is_the_same_by_id_and_by_folder(world: tuple[Path, dict[str, Any]]) -> None:
    folder, results = world
    assert [results[name]["code"] for name in ("by folder", "by id", "by branch", "adapter")] == [0, 0, 0, 0]
    scores = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("folder", "id", "branch")}
    assert scores["branch"]["iou"] == scores["folder"]["iou"] != scores["id"]["iou"]
    assert scores["branch"]["model"] == "org/segment@v1"


def test_auto_backbone_takes_an_id(world: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = world
    images = load_file(folder / "images.safetensors")["images"]
    model = segmenter(tiny_vit("dinov2", seed=1), num_labels=7).glare
    with torch.no_grad():
        expected = model.patch_maps(model(images, output_hidden_states=True).hidden_states[-1], images)
    assert torch.equal(load_file(folder / "found.safetensors")["map"], expected)


def test_an_adapter_is_found_by_its_id(world: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = world
    images = load_file(folder / "images.safetensors")["images"]
    with torch.no_grad():
        expected = adapted_model(tiny_vit("vit"), "lora")(images).last_hidden_state
    torch.testing.assert_close(load_file(folder / "found.safetensors")["plain"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_there_is_one_sentence(name: str, world: tuple[Path, dict[str, Any]]) -> None:
    folder, results = world
    result = results[name]
    assert result["code"] == 2
    assert len(result["errors"]) == 1 and SAID[name] in result["errors"][0]
    assert TOKEN not in result["errors"][0] + result["out"] and not (folder / "other").exists()
