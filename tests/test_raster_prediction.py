import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_samples import CLASSES, COLOURS
from PIL import Image
from tiny_models import varied_segmenter
from transformers import PreTrainedModel

pytest.importorskip("rasterio", reason="the extra geotiff is not installed")

import rasterio
from raster_samples import CRS, TRANSFORM, noise, write_raster, write_scene

from glare import UserError, recipes
from glare.cli import main as glare_main
from glare.data.geotiff import Raster, Reader, open_raster
from glare.data.raster_windows import KeepingPlace
from glare.data.sources import open_source
from glare.dense_inference import Sweep, segment
from glare.inference import PredictRecipe, predict, raster_sweep
from glare.raster_prediction import BLOCK_PX, OVERLAY_PX, predict_raster
from glare.views import Normalisation

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture
def model() -> PreTrainedModel:
    return varied_segmenter()


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
    file = write_raster(tmp_path / "scene.tif", values, photometric="RGB", crs=None, transform=None)
    assert predict(recipe(folder, file, window=32, stride=32)) == []  # it lies nowhere: a PNG
    assert (tmp_path / "out" / "scene.png").exists()
    arguments = ["predict", "--model", str(folder), "--output", str(tmp_path / "wide"), str(file), "raster.bands=1,2,3"]
    assert glare_main([*arguments, "--window", "40", "--stride", "24", "--precision", "fp32"]) == 0
    with rasterio.open(tmp_path / "wide" / "scene.tif") as found:
        label = found.read(1)
    picture = Image.fromarray(values.transpose(1, 2, 0))
    left = segment(model, [picture.crop((0, 0, 40, 40))], normalise=Normalisation())[0]
    assert np.array_equal(label[:, :32], left[:, :32])


SCALED: dict[str, Any] = {"test_scale": (48, 24), "ratios": (1.0, 1.5), "flip": True}


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_raster_is_segmented_at_the_test_scale(
    remembered: bool, dtype: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    if remembered:
        model.config.inference = {"test_scale": [48, 24]}
    model.save_pretrained(tmp_path / "model")
    values = noise(3, 64, 90, dtype=dtype, high=256)
    file = write_raster(tmp_path / "scene.tif", values, photometric="RGB")
    given = {key: value for key, value in SCALED.items() if key != "test_scale" or not remembered}
    assert predict(recipe(tmp_path / "model", file, **given)) == []
    image = open_source(str(file)).read(0)  # as evaluate reads it
    expected = segment(model, [image], normalise=Normalisation(), sweep=Sweep(**SCALED))[0]
    native = segment(model, [image], normalise=Normalisation())[0]
    with rasterio.open(tmp_path / "out" / "scene.tif") as found:
        assert np.array_equal(found.read(1), expected) and not np.array_equal(expected, native)


def test_windows_of_a_raster_have_the_factor_of_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glare.data.raster_windows.TILE_PX", 40)
    sweep = Sweep(test_scale=(64, 20), ratios=(1.0, 2.0))
    pictures = {}
    for name, bands in (("many", 4), ("ortho", 3)):
        values = noise(bands, 60, 70, dtype="uint8", high=256)
        file = write_raster(tmp_path / f"{name}.tif", values, photometric="RGB" if bands == 3 else "MINISBLACK")
        source = open_source(str(file))
        pictures[name] = source.read(0).size[::-1]
        raster = open_source(str(file), raster=KeepingPlace(tile=0)).raster(0)
        assert raster is not None and raster.picture == pictures[name]
        _, each = raster_sweep(raster, sweep)
        assert each.sizes(pictures[name]) == sweep.sizes(pictures[name]) and each.test_scale is None
    assert pictures == {"many": (30, 35), "ortho": (60, 70)}
    large = replace(raster, width=5000, height=3000, picture=(3000, 5000))
    windows, each = raster_sweep(large, Sweep(test_scale=(2500, 2000), window=512))
    assert each == Sweep(ratios=(0.5,), window=512)
    assert {rows.stop - rows.start for rows, _ in windows} == {2048} and len(windows) == 2 * 4
    assert raster_sweep(large, Sweep(window=700))[0] == Sweep(window=700).windows((3000, 5000))


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_the_place_of_an_ordinary_picture_is_kept(bands: int, folder: Path, tmp_path: Path) -> None:
    values = noise(bands, 30, 40, dtype="uint8", high=256)
    if bands == 4:
        values[3] = 255
        values[3, :10] = 0
    file = write_raster(tmp_path / "ortho.tif", values, photometric="RGB" if bands > 1 else "MINISBLACK", alpha="YES")
    assert open_source(str(file)).raster(0) is None  # other jobs read it by Pillow
    assert predict(recipe(folder, file)) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ortho.tif", "ortho_overlay.png"]
    with rasterio.open(tmp_path / "out" / "ortho.tif") as found:
        assert found.crs == CRS and found.transform == TRANSFORM
        assert (found.read(1)[:10] == 255).all() == (bands == 4) and (found.read(1)[10:] < 3).all()


def test_a_place_that_is_not_kept_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = write_raster(tmp_path / "inverted.tif", noise(1, 20, 20, dtype="uint8"), photometric="MINISWHITE")
    assert predict(recipe(folder, turned)) == [] and (tmp_path / "out" / "inverted.png").exists()
    assert caplog.messages[0].startswith("1 TIFF says where it lies, which is not kept")
    caplog.clear()
    file = write_raster(tmp_path / "ortho.tif", noise(3, 20, 20, dtype="uint8"), photometric="RGB")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    source = open_source(str(file), raster=KeepingPlace(tile=0))
    assert source.raster(0) is None and caplog.messages == [
        "1 TIFF says where it lies, which is not kept, as Pillow reads such files: pip install 'glare-ssl[geotiff]'"
    ]


def test_what_cannot_be_read_in_parts_is_read_by_pillow_without_its_place(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glare.data.geotiff.MAX_BLOCK_BYTES", 1000)
    values = noise(3, 30, 40, dtype="uint8", high=256)
    assert predict(recipe(folder, write_raster(tmp_path / "ortho.tif", values, photometric="RGB"))) == []
    assert (tmp_path / "out" / "ortho.png").exists()
    assert "1 TIFF says where it lies, which is not kept" in caplog.text


def label_map_of(raster: Raster, tmp_path: Path) -> Any:
    written(raster, tmp_path, Sweep())
    with rasterio.open(tmp_path / "out.tif") as found:
        return found.transform


@pytest.mark.parametrize("ending", ["tfw", "TFW", "tifw", "wld"])
def test_a_world_file_says_where_a_scene_lies(
    ending: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = noise(3, 30, 40, dtype="uint8", high=256)
    file = write_raster(tmp_path / "scene.tif", values, photometric="RGB", crs=None, transform=None)
    (tmp_path / f"scene.{ending}").write_text("0.5\n0.1\n-0.2\n-0.4\n500000.25\n4599999.75\n")
    assert predict(recipe(folder, file)) == []
    with rasterio.open(tmp_path / "out" / "scene.tif") as found, rasterio.open(file) as by_gdal:
        expected = (0.5, -0.2, 500000.1, 0.1, -0.4, 4599999.9)
        assert found.transform[:6] == pytest.approx(expected, rel=1e-12) == by_gdal.transform[:6]
    assert "georeference" not in caplog.text


@pytest.mark.parametrize(
    "text", ["", "1\n2\n3", "1\n0\n0\nnan\n5\n6", "1\n1\n1\n1\n5\n6", "a\nb\nc\nd\ne\nf", "1 " * 2000, "\xe9\0" * 6]
)
def test_nonsense_beside_a_scene_is_said(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_raster(tmp_path / "scene.tif", noise(4, 20, 20), crs=None, transform=None)
    (tmp_path / "scene.tfw").write_text(text)
    assert label_map_of(open_raster(file, Reader()), tmp_path).is_identity
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("scene.tif has no georeference and scene.tfw is no world file: it")


def test_a_world_file_is_not_asked_where_the_scene_knows_better(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_raster(tmp_path / "scene.tif", noise(4, 20, 20))
    (tmp_path / "scene.tfw").write_text("1\n0\n0\n-1\n5\n6\n")
    assert label_map_of(open_raster(file, Reader()), tmp_path) == TRANSFORM
    nowhere = write_raster(tmp_path / "nowhere.tif", noise(4, 20, 20), crs=None, transform=None)
    assert label_map_of(open_raster(nowhere, Reader()), tmp_path).is_identity
    assert caplog.messages == ["nowhere.tif has no georeference and no world file beside it; nor has its label map"]


def test_a_window_without_data_is_not_segmented(tmp_path: Path) -> None:
    values = noise(3, 64, 64)
    values[:, :, 20:] = 0
    raster = open_raster(write_raster(tmp_path / "scene.tif", values, nodata=0), Reader())
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
