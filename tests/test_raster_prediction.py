import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import CLASSES, COLOURS
from PIL import Image
from transformers import PreTrainedModel

pytest.importorskip("rasterio", reason="the extra geotiff is not installed")

import rasterio
from raster_samples import CRS, TRANSFORM, noise, write_raster, write_scene

from glare import GlareConfig, GlareForSemanticSegmentation, UserError, recipes
from glare.cli import main as glare_main
from glare.data.geotiff import Raster, Reader, open_raster
from glare.data.sources import open_source
from glare.dense_inference import Sweep, segment
from glare.inference import PredictRecipe, predict
from glare.raster_prediction import BLOCK_PX, OVERLAY_PX, predict_raster
from glare.views import Normalisation


@pytest.fixture
def model(make_vit_config: Any) -> PreTrainedModel:
    config = GlareConfig(backbone_config=make_vit_config(), id2label=dict(enumerate(CLASSES)))
    torch.manual_seed(0)
    made = GlareForSemanticSegmentation(config)
    torch.nn.init.normal_(made.head.classifier.weight, std=0.1)
    made.config.palette = COLOURS.tolist()
    return made.eval()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def recipe(folder: Path, *images: Path, **keys: Any) -> PredictRecipe:
    return PredictRecipe(
        model=str(folder), output=folder.parent / "out", images=tuple(map(str, images)), precision="fp32", **keys
    )


def by_red(image: Image.Image) -> np.ndarray[Any, Any]:
    """A segmentation of which every pixel depends on itself alone."""
    assert image.mode == "RGB"
    return (np.asarray(image)[..., 0] // 86).astype(np.uint8)


def written(raster: Raster, tmp_path: Path, sweep: Sweep, by: Any = by_red) -> np.ndarray[Any, Any]:
    files = tmp_path / "out.tif", tmp_path / "out.png"
    windows = sweep.windows((raster.height, raster.width))
    predict_raster(raster, windows, by, files=files, classes=CLASSES, colours=COLOURS)
    with rasterio.open(files[0]) as found:
        label: np.ndarray[Any, Any] = found.read(1)
    return label


@pytest.mark.parametrize("sweep", [Sweep(64), Sweep(64, 64), Sweep(300, 100), Sweep(50, 7)])
def test_windows_join_without_a_seam(sweep: Sweep, tmp_path: Path) -> None:
    values = noise(4, 2 * BLOCK_PX + 30, 200, dtype="uint8", high=256)
    raster = open_raster(write_raster(tmp_path / "scene.tif", values), Reader())
    assert np.array_equal(written(raster, tmp_path, sweep), values[0] // 86)


def test_a_pixel_comes_from_the_window_in_whose_middle_it_lies(tmp_path: Path) -> None:
    raster = open_raster(write_raster(tmp_path / "scene.tif", noise(3, 16, 40, dtype="uint8")), Reader())
    turns = iter(range(3))
    found = written(raster, tmp_path, Sweep(20, 10), by=lambda image: np.full(image.size[::-1], next(turns), np.uint8))
    assert [int(row.argmax()) for row in (found == 1, found == 2)] == [15, 25]
    assert (np.diff(found.astype(int), axis=1) >= 0).all()


def test_the_label_map_lies_where_the_scene_lies(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    values = noise(5, 70, 90)
    values[:, :20, :30] = 0
    file = write_raster(tmp_path / "scene.tif", values, nodata=0)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert predict(recipe(folder, file, tmp_path / "plain.png")) == []
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "plain.png", "plain_overlay.png", "scene.tif", "scene_overlay.png",
    ]  # fmt: skip
    with rasterio.open(out / "scene.tif") as found:
        assert found.crs == CRS and found.transform == TRANSFORM and found.shape == (70, 90)
        assert found.nodata == 255 and found.dtypes == ("uint8",) and found.compression.name == "deflate"
        assert [found.colormap(1)[i][:3] for i in range(3)] == [tuple(colour) for colour in COLOURS.tolist()]
        label = found.read(1)
    assert (label[:20, :30] == 255).all() and label[20:].max() < 3
    image = open_source(str(file)).read(0)
    expected = segment(model, [image], normalise=Normalisation())[0]
    assert np.array_equal(label[20:], expected[20:])


def test_windows_are_segmented_like_pictures_of_their_size(
    folder: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    values = noise(3, 40, 64, dtype="uint8", high=256)
    file = write_raster(tmp_path / "scene.tif", values, photometric="RGB")
    assert predict(recipe(folder, file, window=32, stride=32)) == []  # Pillow reads it: a PNG, as ever
    assert (tmp_path / "out" / "scene.png").exists()
    arguments = ["predict", "--model", str(folder), "--output", str(tmp_path / "wide"), str(file), "raster.bands=1,2,3"]
    assert glare_main([*arguments, "--window", "40", "--stride", "24", "--precision", "fp32"]) == 0
    with rasterio.open(tmp_path / "wide" / "scene.tif") as found:
        label = found.read(1)
    picture = Image.fromarray(values.transpose(1, 2, 0))
    left = segment(model, [picture.crop((0, 0, 40, 40))], normalise=Normalisation())[0]
    assert np.array_equal(label[:, :32], left[:, :32])


def test_a_window_without_data_is_not_segmented(tmp_path: Path) -> None:
    values = noise(3, 64, 64)
    values[:, :, 20:] = 0
    raster = open_raster(write_raster(tmp_path / "scene.tif", values, nodata=0), Reader()).stretched()
    calls = []

    def by(image: Image.Image) -> np.ndarray[Any, Any]:
        calls.append(image.size)
        return by_red(image)

    found = written(raster, tmp_path, Sweep(32, 32), by)
    assert len(calls) == 2 and (found[:, 20:] == 255).all() and (found[:, :20] < 3).all()


def test_the_overlay_is_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glare.raster_prediction.OVERLAY_PX", 100)
    values = np.kron(noise(3, 61, 40, dtype="uint8", high=256), np.ones((1, 4, 4), np.uint8))
    raster = open_raster(write_raster(tmp_path / "scene.tif", values), Reader())
    taken = []
    monkeypatch.setattr("glare.raster_prediction.annotated", lambda *given: taken.append(given) or given[0])
    written(raster, tmp_path, Sweep(50, 31))
    image, label = taken[0][:2]
    assert OVERLAY_PX == 2048 and image.size == (54, 82) and label.shape == (82, 54)
    assert np.array_equal(np.asarray(image), values.transpose(1, 2, 0)[::3, ::3])
    assert np.array_equal(label, values[0][::3, ::3] // 86)


def test_a_broken_scene_leaves_nothing_behind(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scene.tif"
    values = noise(5, 256, 256, dtype="uint8", high=256)
    write_raster(file, values, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    content = bytearray(file.read_bytes())
    with rasterio.open(file) as raster:
        place = int(raster.get_tag_item("BLOCK_OFFSET_0_2", "TIFF", bidx=1))
    content[place : place + 200] = bytes(200)
    file.write_bytes(content)
    assert glare_main(["predict", "--model", str(folder), "--output", str(tmp_path / "out"), str(file)]) == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_tile_is_no_setting_of_predict() -> None:
    with pytest.raises(UserError, match="those of --window"):
        recipes.parse(
            PredictRecipe, ["--model", "m", "--output", "o", "a.tif", "raster.tile=512"], prog="glare predict"
        )


def test_every_job_reads_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str], make_vit: Any) -> None:
    make_vit("dinov2", num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    for split in ("train", "val"):
        write_scene(tmp_path / "data" / split, f"{split}_1", side=96)
    keys = ["raster.tile=32", "raster.bands=2,3,4"]
    data = ["--data", str(tmp_path / "data"), "--device", "cpu", "--precision", "fp32"]
    run = ["--steps", "2", "--report-to", "none", "--output"]
    sheet = [str(tmp_path / "look.png"), "--backbone", str(tmp_path / "vit"), "--json", str(tmp_path / "look.json")]
    views = ["views.global_size=16", "views.local_size=8", "views.num_local=1", "glare.prototypes=16"]
    small = ["glare.head_hidden=16", "glare.head_bottleneck=8", "glare.regions.min_side=1", "glare.regions.max_side=2"]
    assert glare_main(["inspect", *data, "--output", *sheet, "--num-images", "2", *views, *small, *keys]) == 0
    found = json.loads((tmp_path / "look.json").read_text())
    assert found["num_images"] == 18 and found["splits"] == {"train": 9, "val": 9}
    assert [sum(split["pixels"].values()) for split in found["labels"]] == [96 * 96] * 2
    backbone = ["--backbone", str(tmp_path / "vit"), "--batch-size", "2"]
    assert glare_main(["pretrain", *data, *backbone, *run, str(tmp_path / "adapt"), *views, *small, *keys]) == 0
    model = ["--model", str(tmp_path / "adapt"), "--batch-size", "2", "--crop-size", "16"]
    assert glare_main(["finetune", *data, *model, *run, str(tmp_path / "segment"), *keys]) == 0
    score = tmp_path / "eval.json"
    assert glare_main(["evaluate", "--model", str(tmp_path / "segment"), *data, "--json", str(score), *keys]) == 0
    assert json.loads(score.read_text())["num_images"] == 9
    assert json.loads((tmp_path / "segment" / "eval.json").read_text())["miou"] == json.loads(score.read_text())["miou"]
    capsys.readouterr()
    wrong = ["raster.tile=32", "raster.bands=9,9,9"]
    assert glare_main(["evaluate", "--model", str(tmp_path / "segment"), *data, *wrong]) == 2
    assert "it has 4 bands, raster.bands asks for 9" in capsys.readouterr().err
