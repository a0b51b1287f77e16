"""What ``glare bench`` measures, says and writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_models import tiny_config

from glare import bench, cli
from glare.bench_table import table
from glare.bench_ways import OwnWay, PlainWay
from glare.compute_peak import peak_flops
from glare.data.cache import pack
from glare.data.sources import image_files, open_source
from glare.price import peak_memory_bytes, reset_peak_memory
from glare.runtime import Clock

CPU = torch.device("cpu")
SMALL = {
    "batch_size": 2,
    "steps": 1,
    "device": "cpu",
    "precision": "fp32",
    "views": {"global_size": 16, "local_size": 8, "num_local": 2},
    "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A benchmark of a tiny ViT on four images."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_config(initializer_range=0.02).to_json_file(folder / "vit.json")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        pixels = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
    return {**SMALL, "backbone": str(folder / "vit.json"), "data": folder / "images"}


def test_the_figures(given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = bench.run({**given, "json": tmp_path / "bench.json"})
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(values))
    assert values["batch_size"] == 2 and values["steps"] == 2 and values["device"].startswith("cpu")
    assert values["speedup"] == pytest.approx(sum(values["speedups"]) / 2)
    work = values["gflop_per_image"]
    assert values["flops_per_second"] == pytest.approx(values["images_per_second"] * 1e9 * sum(work.values()))
    assert values["flop_utilisation"] == values["flops_per_second"] / values["peak_flops_per_second"]
    for way in ("", "plain_"):
        assert list(values[f"{way}phases_ms"]) == list(bench.PHASES)
        assert all(value > 0 for value in values[f"{way}phases_ms"].values())
        assert values[f"{way}images_per_second"] > 0 and 0 <= values[f"{way}data_wait"] < 1
    assert table(values) in capsys.readouterr().out


def test_without_the_plain_way(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    values = bench.run({**given, "plain": False})
    assert not [name for name in values if name.startswith("plain") or name.startswith("speedup")]
    assert "plain" not in capsys.readouterr().out


def test_both_ways_begin_with_the_same_loss(given: dict[str, Any]) -> None:
    accelerator = Accelerator(cpu=True)
    views = {**SMALL["views"], "jitter_prob": 0.0, "grey_prob": 0.0, "patch_prob": 0.0, "flip_prob": 0.0}
    views |= {"blur_prob": (0.0, 0.0, 0.0), "solarize_prob": (0.0, 0.0, 0.0), "global_area": (1.0, 1.0)}
    recipe = bench.pretrain_recipe({**given, "batch_size": 4, "views": views | {"num_local": 0}}, 4, accelerator)
    files = image_files(given["data"])
    own = OwnWay(recipe, pack(open_source(str(given["data"]))).images, accelerator)
    plain = PlainWay(recipe, files, accelerator)
    plain.begin()
    clock = Clock()
    terms = [way.step(clock).losses for way in (own, plain)]
    plain.end()
    # the views of the whole image are the same up to Pillow's rounding to 8 bits
    assert terms[0].keys() == terms[1].keys()
    for name in ("glob", "loc2"):
        assert terms[0][name].item() == pytest.approx(terms[1][name].item(), rel=1e-2)
    assert clock.seconds["heads and losses"] > 0


def test_the_paper_s_settings_by_default() -> None:
    backbone = {"backbone": str(bench.VIT_SMALL)}
    recipe = bench.pretrain_recipe(backbone, 2522, Accelerator(cpu=True))
    assert (recipe.views.global_size, recipe.views.local_size, recipe.views.num_local) == (224, 96, 10)
    assert (recipe.glare.prototypes, recipe.glare.head_hidden, recipe.anchor) == (8192, 2048, 0.0)
    work = bench.work_of(recipe, matched=0.73)
    assert work.total == pytest.approx(126.6e9, rel=0.01)
    given_views = bench.pretrain_recipe({**backbone, "views": {"num_local": 4}}, 2522, Accelerator(cpu=True)).views
    assert given_views == replace(recipe.views, num_local=4)


def test_drawn_scenes_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIDE_PX", 32)
    with bench.image_folder(None, 0) as folder:
        files = image_files(folder)
        assert len(files) == 16 and {open_source(str(folder)).read(i).size for i in range(16)} == {(32, 32)}
        assert len({file.read_bytes() for file in files}) == 16
    assert not folder.exists()


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--data", str(tmp_path), "--device", "cpu"]) == 2
    assert "holds no image files, which the plain way needs; give a folder of them" in capsys.readouterr().err
    assert cli.main(["bench", "--steps", "0"]) == 2
    assert "steps is 0; give at least 1" in capsys.readouterr().err


def test_the_peak_is_what_a_product_reaches() -> None:
    flops, source = peak_flops(CPU, torch.float32)
    assert source == "measured" and 1e8 < flops < 1e15


def test_a_gpu_of_the_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == (989e12, "data sheet")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which can forget a peak")
def test_the_peak_of_memory_begins_anew() -> None:
    big = torch.ones(2**26)
    del big
    high = peak_memory_bytes(CPU)
    held = reset_peak_memory(CPU)
    assert held <= high - 2**27
    more = torch.ones(2**25)
    assert peak_memory_bytes(CPU) - held >= 0.9 * more.nbytes
