import io
import logging
import os
import struct
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

pytest.importorskip("rasterio", reason="the extra geotiff is not installed")

from raster_samples import TRANSFORM, noise, write_raster, write_scene

from glare.data import geotiff, label_files
from glare.data.cache import pack
from glare.data.geotiff import CACHE_BYTES, Box, Raster, Reader, open_raster
from glare.data.labelled import open_labelled
from glare.data.opening import open_picture
from glare.data.raster_windows import RasterReading, file_of
from glare.data.sources import BEHIND_TRANSPARENT, BadImage, Images, open_source
from glare.data_check import check_data
from glare.errors import UserError
from glare.feed import decoded_bytes
from glare.trained_images import trained_on

LAYOUTS: dict[str, dict[str, Any]] = {
    "tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
    "striped": {"compress": "lzw", "blockysize": 5},
    "planar": {"interleave": "band"},
    "one strip": {"blockysize": 10_000},
}


def joined(source: Images) -> np.ndarray[Any, Any]:
    """The windows of one raster, each at its place."""
    whole = source.raster(0)
    assert whole is not None and source.parts is not None
    picture = np.zeros((whole.height, whole.width, 3), np.uint8)
    for index in range(len(source)):
        box = source.parts[index].box
        assert box is not None
        left, top, width, height = box
        picture[top : top + height, left : left + width] = np.asarray(source.read(index))
    return picture


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_are_the_whole(layout: str, tmp_path: Path) -> None:
    values = noise(5, 150, 210, dtype="uint8", high=256)
    write_raster(tmp_path / "scene.tif", values, **LAYOUTS[layout])
    source = open_source(str(tmp_path), raster=RasterReading(tile=64))
    assert len(source) == 3 * 4 and source.names[:2] == ["scene.tif@0,0", "scene.tif@52,0"]
    assert {source.read(i).mode for i in range(12)} == {"RGB"}
    assert all(max(source.read(i).size) <= 64 for i in range(12))
    assert np.array_equal(joined(source), values[:3].transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "uint32", "float32", "float64"])
def test_all_windows_have_one_conversion_to_8_bits(dtype: str, tmp_path: Path) -> None:
    values = noise(3, 200, 200, dtype=dtype, low=-2000 if dtype != "uint16" and dtype[0] != "u" else 0)
    values[:, :100] //= 7  # windows of their own would be stretched otherwise
    write_raster(tmp_path / "scene.tif", values)
    found = joined(open_source(str(tmp_path), raster=RasterReading(tile=50)))
    low, high = np.percentile(values, (2, 98), axis=(1, 2))
    share = (values.transpose(1, 2, 0).astype(float) - low) / (high - low)
    expected = np.rint(np.clip(share, 0, 1) * 255)
    assert np.abs(found - expected).max() <= 2  # spots overlap a little
    assert np.array_equal(found, joined(open_source(str(tmp_path), raster=RasterReading(tile=200))))


def test_a_constant_band_is_black_and_a_huge_range_is_no_error(tmp_path: Path) -> None:
    values = np.full((3, 20, 20), 5.0)
    values[1, ::2] = 1e308
    values[1, 1::2] = -1e308
    values[2, 0, 0] = 6
    write_raster(tmp_path / "scene.tif", values)
    picture = np.asarray(open_source(str(tmp_path)).read(0))
    assert picture[..., 0].max() == 0 and picture[0, 0, 2] == 255 and picture[1:, :, 2].max() == 0


def test_bands_make_the_colours(tmp_path: Path) -> None:
    values = noise(6, 30, 40, dtype="uint8", high=256)
    write_raster(tmp_path / "scene.tif", values)
    for bands in ((4, 3, 2), (6, 6, 1)):
        picture = open_source(str(tmp_path), raster=RasterReading(bands=bands)).read(0)
        assert np.array_equal(np.asarray(picture), values[[band - 1 for band in bands]].transpose(1, 2, 0))
    write_raster(tmp_path / "scene.tif", values[:2])
    picture = np.asarray(open_source(str(tmp_path), raster=RasterReading(tile=64)).read(0))
    assert np.array_equal(picture, np.dstack([values[0]] * 3))


@pytest.mark.parametrize("kind", ["nodata", "nan", "mask", "alpha"])
def test_pixels_without_data_get_the_colour_behind_transparency(kind: str, tmp_path: Path) -> None:
    values = noise(5, 64, 64, dtype="float32" if kind == "nan" else "uint16")
    missing = np.zeros((64, 64), bool)
    missing[:10, :20] = True
    values[:, missing] = np.nan if kind == "nan" else 0
    options: dict[str, Any] = {"nodata": 0} if kind == "nodata" else {}
    if kind == "alpha":
        values[4] = np.where(missing, 0, 65535)
        options = {"alpha": "YES", "photometric": "RGB"}
        values = values[[0, 1, 2, 4]]
    file = write_raster(tmp_path / "scene.tif", values, **options)
    if kind == "mask":
        rasterio = geotiff.rasterio()
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as raster:
            raster.write_mask(~missing)
    reading = RasterReading(tile=64) if kind == "alpha" else RasterReading(bands=(1, 2, 3))
    picture = np.asarray(open_source(str(tmp_path), raster=reading).read(0))
    assert (picture[missing] == BEHIND_TRANSPARENT).all()
    assert not (picture[~missing] == BEHIND_TRANSPARENT).all(axis=-1).any()
    if kind == "nodata":  # it counts for neither black nor white
        values[:, missing] = 65535
        write_raster(file, values, nodata=65535)
        assert np.array_equal(np.asarray(open_source(str(tmp_path)).read(0)), picture)


def test_a_band_that_is_called_alpha_may_be_a_colour(tmp_path: Path) -> None:
    values = noise(4, 20, 20, dtype="uint8", low=0, high=4)
    write_raster(tmp_path / "scene.tif", values, photometric="RGB", alpha="YES")
    picture = open_source(str(tmp_path), raster=RasterReading(bands=(4, 1, 2))).read(0)
    assert np.array_equal(np.asarray(picture), values[[3, 0, 1]].transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_near_infrared_that_is_declared_as_alpha_is_said(
    dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = noise(4, 64, 64, dtype=dtype, high=256)
    values[3, :20] = 0  # water
    file = write_raster(tmp_path / "scene.tif", values, photometric="RGB", alpha="YES")
    water = np.asarray(open_source(str(file)).read(0))[:20]
    assert (water == BEHIND_TRANSPARENT).all()
    assert [line for line in caplog.messages if "near infrared" in line] == [
        "scene.tif: band 4 is taken as transparency, as the file declares it, though it varies like a colour (near "
        "infrared?); raster.bands=1,2,3 takes all bands as colours, in all such files"
    ]
    caplog.clear()
    picture = np.asarray(open_source(str(file), raster=RasterReading(bands=(1, 2, 3))).read(0))
    assert not (picture[:20] == BEHIND_TRANSPARENT).all(axis=-1).any() and "infrared" not in caplog.text
    if dtype == "uint8":
        assert np.array_equal(picture, values[:3].transpose(1, 2, 0))


def test_transparency_is_taken_as_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = noise(4, 100, 100, dtype="uint8", high=256)
    values[3] = 255
    write_raster(tmp_path / "opaque.tif", values, photometric="RGB", alpha="YES")
    values[3, :50] = 0
    values[3, 50:54] = 128  # a soft edge
    write_raster(tmp_path / "half.tif", values, photometric="RGB", alpha="YES")
    write_raster(tmp_path / "damaged.tif", values, photometric="RGB", alpha="YES")
    content = (tmp_path / "damaged.tif").read_bytes()
    (tmp_path / "damaged.tif").write_bytes(content[: len(content) // 2])
    open_source(str(tmp_path))
    assert "infrared" not in caplog.text


def test_windows_of_mostly_nodata_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = noise(4, 256, 256)
    values[:, 100:, :140] = 0
    write_raster(tmp_path / "scene.tif", values, nodata=0)
    values[:] = 0
    write_raster(tmp_path / "void.tif", values, nodata=0)
    with caplog.at_level(logging.WARNING):
        source = open_source(str(tmp_path), raster=RasterReading(tile=64))
    kept = set(source.names)
    assert "scene.tif@0,64" in kept  # 28 of its rows lack data
    assert {f"scene.tif@{x},{y}" for x in (0, 64) for y in (128, 192)}.isdisjoint(kept)
    assert len(kept) == 1 + 12
    assert caplog.messages == [
        "scene.tif: 256 x 256 px, 4 bands of uint16, 1, 2, 3 as RGB, read as 12 windows, 4 more left out as mostly "
        "nodata"
    ]
    with pytest.raises(BadImage, match="nodata nearly everywhere"):
        source.read(len(source) - 1)


def test_what_pillow_reads_well_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mode in ("RGB", "RGBA", "L", "P", "CMYK"):
        Image.new(mode, (40, 30), 3).save(tmp_path / f"{mode}.TIFF")
    write_raster(tmp_path / "nir.tif", noise(4, 30, 40, dtype="uint8", high=256), photometric="RGB", alpha="NO")
    source = open_source(str(tmp_path))
    assert sorted(source.names) == sorted(path.name for path in tmp_path.iterdir())
    assert not any(source.raster(index) for index in range(len(source))) and not caplog.messages


RAMP = np.linspace(200, 1000, 60 * 60).reshape(1, 60, 60)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("float32", -9999),
        ("float32", -3.4028234663852886e38),
        ("uint16", 65535),
        ("int16", -32768),
        ("uint8", 0),
    ],
)
def test_one_band_is_stretched_without_its_nodata(dtype: str, nodata: float, tmp_path: Path) -> None:
    values = (RAMP / (4 if dtype == "uint8" else 1)).astype(dtype)
    values[:, :20] = nodata
    source = open_source(str(write_raster(tmp_path / "dem.tif", values, nodata=nodata)))
    picture = np.asarray(source.read(0))
    assert source.raster(0) is not None and (picture[:20] == BEHIND_TRANSPARENT).all()
    grey = picture[20:, :, 0].astype(int)
    assert (np.diff(grey.ravel()) >= 0).all() and np.array_equal(picture[20:, :, 0], picture[20:, :, 2])
    low, high = (116, 250) if dtype == "uint8" else (0, 255)
    assert (grey.min(), grey.max()) == (low, high) and len(np.unique(grey)) == high - low + 1


def test_numbers_with_a_sign_keep_it(tmp_path: Path) -> None:
    values = np.linspace(-100, 100, 2500).reshape(1, 50, 50).astype(np.int8)
    grey = np.asarray(open_source(str(write_raster(tmp_path / "scene.tif", values))).read(0))[..., 0]
    assert (np.diff(grey.ravel().astype(int)) >= 0).all() and (grey.min(), grey.max()) == (0, 255)


def test_colours_of_16_bits_keep_their_low_bits(tmp_path: Path) -> None:
    values = np.repeat(RAMP, 3, axis=0).astype(np.uint16)
    source = open_source(str(write_raster(tmp_path / "scene.tif", values, photometric="RGB")))
    assert len(np.unique(np.asarray(source.read(0)))) == 256  # Pillow keeps the high byte alone


@pytest.mark.parametrize("mode", ["palette", "white is zero", "turned", "LAB", "CMYK"])
def test_pixels_that_only_pillow_knows_how_to_show_are_left_to_it(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "scene.tif"
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise(1, 20, 30)[0]).save(file, exif=exif)
    elif mode.isupper():
        Image.new(mode, (20, 30)).save(file, tiffinfo={42113: "0"})
    else:
        options = {"photometric": "PALETTE" if mode == "palette" else "MINISWHITE", "nodata": 0}
        write_raster(file, noise(1, 30, 20, dtype="uint8", high=200), **options)
    source = open_source(str(file))
    assert source.raster(0) is None and source.read(0).size == (20, 30)


def test_without_rasterio_the_files_that_pillow_reads_badly_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raster(tmp_path / "dem.tif", RAMP.astype("float32"), nodata=-9999)
    write_raster(tmp_path / "rgb.tif", noise(3, 20, 20, dtype="uint8", high=256), photometric="RGB")
    write_raster(tmp_path / "sar.tif", noise(1, 20, 20))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    source = open_source(str(tmp_path))
    assert len({source.read(index).size for index in range(3)}) == 2
    assert caplog.messages == [
        "2 TIFFs have more than 8 bits or a nodata value, which rasterio reads better than Pillow; "
        "pip install 'glare-ssl[geotiff]'"
    ]


def test_a_large_tiff_is_cut_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = noise(3, 100, 100, dtype="uint8", high=256)
    write_raster(tmp_path / "scene.tif", values, photometric="RGB")
    monkeypatch.setattr("glare.data.opening.MAX_PIXELS", 5000)
    monkeypatch.setattr("glare.data.raster_windows.TILE_PX", 40)
    source = open_source(str(tmp_path / "scene.tif"))
    assert len(source) == 9 and np.array_equal(joined(source), values.transpose(1, 2, 0))


def test_names_keep_the_stem_of_the_file(tmp_path: Path) -> None:
    for name in ("a_1", "b_2"):
        write_raster(tmp_path / f"{name}.tif", noise(4, 64, 64))
    Image.new("RGB", (20, 20)).save(tmp_path / "c.png")
    source = open_source(str(tmp_path), match="b_*,c", raster=RasterReading(tile=32))
    assert source.names == [*(f"b_2.tif@{x},{y}" for y in (0, 32) for x in (0, 32)), "c.png"]
    assert [file_of(name) for name in source.names] == ["b_2.tif"] * 4 + ["c.png"]
    assert source.read(3).size == (32, 32) and source.raster(4) is None
    assert source.subset([4, 2]).names[1] == "b_2.tif@0,32" and source.subset([4, 2]).raster(1) is not None


def test_threads_read_the_same_pixels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_raster(tmp_path / f"{name}.tif", noise(4, 128, 128), **LAYOUTS["tiled"])
    source = open_source(str(tmp_path), raster=RasterReading(tile=16))
    one, many = (pack(source, workers=workers).images.pixels for workers in (1, 8))
    assert bool((one == many).all()) and len(one) == 2 * 128 * 128


def test_labels_are_paired_with_windows(tmp_path: Path) -> None:
    write_scene(tmp_path, side=96)
    rasterio = geotiff.rasterio()
    with rasterio.open(tmp_path / "labels" / "scene.tif") as raster:
        truth = raster.read(1)
    data = open_labelled(str(tmp_path), raster=RasterReading(tile=40, bands=(2, 3, 4)))
    assert len(data) == 9
    for index, name in enumerate(data.names):
        left, top = map(int, name.rpartition("@")[2].split(","))
        image, label = data.read(index)
        assert image.size == (32, 32) and np.array_equal(label, truth[top : top + 32, left : left + 32])
    image, label = open_labelled(str(tmp_path), raster=RasterReading(tile=0)).read(0)
    assert np.array_equal(label, truth)


@pytest.mark.parametrize(
    ("recipe", "reading", "count"),
    [
        ("raster: {tile: 32}\n", RasterReading(tile=32), 9),
        ("raster: {tile: 32}\n", RasterReading(tile=48), 4),
        ("raster: {tile: 32}\n", RasterReading(), 1),
        ("raster: {tile: null}\n", RasterReading(tile=32), 9),
        ("raster: {tile: 32}\nnum_images: 5\n", RasterReading(tile=32), 5),
    ],
)
def test_a_scene_was_trained_on_however_it_is_cut(
    recipe: str, reading: RasterReading, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(write_scene(tmp_path / "data"))
    (tmp_path / "recipe.yaml").write_text(f"data: {data}\n{recipe}")
    evaluated = open_labelled(data, raster=reading)
    caplog.clear()
    assert trained_on(str(tmp_path), evaluated, data=data, split=None, raster=reading) == count
    assert not caplog.messages, "what was trained on is not what is evaluated"


def test_a_check_of_scenes_says_what_they_hold_and_announces_them_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(write_scene(tmp_path))
    write_raster(tmp_path / "images" / "scene.tif", noise(4, 96, 96))
    reading = RasterReading(tile=48)
    report = check_data(open_source(data, raster=reading), data, short_side=None, raster=reading)
    assert report.modes == {"4 bands of uint16": 4}
    assert len([line for line in caplog.messages if "scene.tif" in line]) == 1


def test_a_listing_looks_for_no_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raster(tmp_path / "scene.tif", noise(3, 40, 40))
    with monkeypatch.context() as patch:
        patch.setattr(geotiff, "spots", None)
        source = open_source(str(tmp_path))
    assert source.read(0).size == (40, 40)


def test_a_small_picture_may_have_a_tiff_as_label(tmp_path: Path) -> None:
    write_scene(tmp_path, side=24)
    Image.new("RGB", (24, 24)).save(tmp_path / "images" / "scene.tif")
    assert set(np.unique(open_labelled(str(tmp_path)).read(0)[1])) == {0, 1, 2}


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_one_band_of_16_bits_may_be_image_and_label(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glare.data.raster_windows.TILE_PX", 40)
    write_scene(tmp_path, side=96)
    truth = noise(1, 96, 96, low=0, high=3)
    write_raster(tmp_path / "images" / "scene.tif", noise(1, 96, 96))
    (tmp_path / "labels" / "scene.tif").unlink()
    if suffix == ".tif":
        write_raster(tmp_path / "labels" / "scene.tif", truth)
    else:
        Image.fromarray(truth[0].astype(np.uint8)).save(tmp_path / "labels" / "scene.png")
    data = open_labelled(str(tmp_path))
    assert len(data) == 9 and data.name(5) == "scene.tif@64,32"
    assert np.array_equal(data.read(5)[1], truth[0, 32:64, 64:])
    Image.new("RGB", (96, 96)).save(tmp_path / "images" / "scene.tif")
    assert np.array_equal(open_labelled(str(tmp_path)).read(0)[1], truth[0])


def test_windows_of_one_png_label_are_cut_from_one_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scene(tmp_path, side=96)
    (tmp_path / "labels" / "scene.tif").unlink()
    file, decoded = tmp_path / "labels" / "scene.png", list[object]()
    truth = noise(1, 96, 96, dtype="uint8", low=0, high=3)[0]
    Image.fromarray(truth).save(file)

    def opened(given: Path | io.BytesIO) -> ImageFile.ImageFile:
        decoded.append(given)
        return open_picture(given)

    monkeypatch.setattr(label_files, "open_picture", opened)
    data = open_labelled(str(tmp_path), raster=RasterReading(tile=32, bands=(2, 3, 4)))
    with ThreadPoolExecutor(4) as threads:
        labels = list(threads.map(lambda index: data.read(index)[1], range(len(data))))
    assert np.array_equal(np.block([labels[row : row + 3] for row in (0, 3, 6)]), truth)
    assert decoded == [file]
    Image.fromarray(2 - truth).save(file)
    os.utime(file, ns=(0, 0))
    assert np.array_equal(data.read(4)[1], (2 - truth)[32:64, 32:64])


def test_a_large_png_label_is_held_in_its_own_type(tmp_path: Path) -> None:
    side = 3000
    write_scene(tmp_path, side=96)
    write_raster(tmp_path / "images" / "scene.tif", np.ones((1, side, side), np.uint16), tiled=True)
    (tmp_path / "labels" / "scene.tif").unlink()
    Image.new("L", (side, side)).save(tmp_path / "labels" / "scene.png")
    data = open_labelled(str(tmp_path))
    tracemalloc.start()
    data.read(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * side**2  # 8 bytes a pixel would be more


def test_labels_without_data_are_ignored(tmp_path: Path) -> None:
    write_scene(tmp_path, side=64)
    values = np.full((1, 64, 64), 2, np.int16)
    values[:, :32] = -1
    write_raster(tmp_path / "labels" / "scene.tif", values, nodata=-1)
    _, label = open_labelled(str(tmp_path)).read(0)
    assert (label[:32] == 255).all() and (label[32:] == 2).all()


@pytest.mark.parametrize("nodata", [None, 0, 2, 3, 9, 255])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_labels_have_one_meaning_whoever_reads_them(
    nodata: int | None, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_scene(tmp_path, side=64)
    write_raster(tmp_path / "images" / "scene.tif", noise(3, 64, 64, dtype="uint8", high=256), photometric="RGB")
    truth = noise(1, 64, 64, low=0, high=3)
    missing = nodata is not None and nodata > 2
    truth[:, :20] = nodata if missing else 1
    write_raster(tmp_path / "labels" / "scene.tif", truth.astype(dtype), nodata=nodata)
    expected = np.where(truth[0] > 2, 255, truth[0])
    for tile in (None, 32, 64):  # by Pillow, in parts, and whole
        data = open_labelled(str(tmp_path), raster=RasterReading(tile=tile))
        for index in range(len(data)):
            left, top = (0, 0) if tile != 32 else (index % 2 * 32, index // 2 * 32)
            label = data.read(index)[1]
            assert np.array_equal(label, expected[top:, left:][: label.shape[0], : label.shape[1]])
    said = [line for line in caplog.messages if "of a class" in line]
    assert len(said) == (nodata in (0, 2)) and all(f"labels: the nodata value {nodata} of" in line for line in said)


def test_an_ignored_class_may_be_the_nodata_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_scene(tmp_path, side=64)
    (tmp_path / "classes.json").write_text('{"classes": ["void", "b", "c"], "ignore_index": 0}')
    write_raster(tmp_path / "images" / "scene.tif", noise(3, 64, 64, dtype="uint8", high=256), photometric="RGB")
    write_raster(tmp_path / "labels" / "scene.tif", noise(1, 64, 64, low=0, high=3), nodata=0)
    by_pillow, in_parts = (
        open_labelled(str(tmp_path), raster=RasterReading(tile=tile)).read(0)[1] for tile in (None, 64)
    )
    assert set(np.unique(by_pillow)) == {1, 2, 255} and np.array_equal(by_pillow, in_parts)
    assert "of a class" not in caplog.text


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (noise(1, 64, 48, dtype="uint8", high=3), "it has 48 x 64 px, the image 64 x 64"),
        (noise(2, 64, 64, dtype="uint8", high=3), "it has 2 bands of uint8; write one band"),
        (noise(1, 64, 64, dtype="float32", high=3), "it has 1 bands of float32"),
        (np.full((1, 64, 64), 7, np.uint8), "has the values 7; allowed are 0 to 2"),
        (None, "it has no label .*labels/scene.tif"),
    ],
)
def test_unfit_labels_are_named(label: np.ndarray[Any, Any] | None, reason: str, tmp_path: Path) -> None:
    write_scene(tmp_path, side=64)
    (tmp_path / "labels" / "scene.tif").unlink()
    if label is not None:
        Image.new("L", (64, 64)).save(tmp_path / "labels" / "scene.png")  # of a picture that is cut, the TIFF is taken
        write_raster(tmp_path / "labels" / "scene.tif", label)
    data = open_labelled(str(tmp_path), raster=RasterReading(tile=32))
    with pytest.raises(BadImage, match=reason):
        data.read(0)


def test_a_label_whose_compression_changes_its_values_is_refused(tmp_path: Path) -> None:
    write_scene(tmp_path, side=64)
    write_raster(tmp_path / "labels" / "scene.tif", noise(1, 64, 64, dtype="uint8", high=3), compress="JPEG")
    with pytest.raises(BadImage, match=r"scene.tif cannot be used: it is jpeg inside, which may change the indices"):
        open_labelled(str(tmp_path)).read(0)


def refused(file: Path, **keys: Any) -> str:
    """Why a file cannot be used, in one line."""
    source = open_source(str(file), raster=RasterReading(**keys))
    assert len(source) == 1
    with pytest.raises(BadImage) as caught:
        source.read(0)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said


def header(width: int, height: int, *, samples: int = 3, tile: int = 0) -> bytes:
    """A TIFF of 16 bits that is only a header and some bytes."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (277, 3, samples)]
    place = [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, 100)]
    tags += place if tile else [(273, 4, 8), (278, 4, height), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(200)


@pytest.mark.parametrize("compress", ["deflate", None])
def test_a_file_that_is_cut_off_is_refused_whole(compress: str | None, tmp_path: Path) -> None:
    file = write_raster(tmp_path / "scene.tif", noise(4, 256, 256), tiled=True, blockxsize=64, compress=compress)
    content = file.read_bytes()
    for share in (0.9, 0.5, 0.02):
        file.write_bytes(content[: int(len(content) * share)])
        assert "damaged or cut off" in refused(file)


@pytest.mark.parametrize(
    "content",
    [header(2**31 - 1, 2**31 - 1), header(2**31 - 1, 2**31 - 1, tile=16), header(10**6, 10**6, tile=2**16),
     header(0, 5), header(5, 5, samples=60_000), b"II*\0", b"II+\0" + bytes(100), b"II*\0" + b"\xff" * 1000],
)  # fmt: skip
def test_lying_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scene.tif").write_bytes(content)
    refused(tmp_path / "scene.tif")


def test_a_tag_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    Image.new("RGBA", (17, 13)).save(tmp_path / "scene.tif")
    compression, custom = struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 3, 0, 0, 127)
    content = (tmp_path / "scene.tif").read_bytes()
    assert content.count(compression) == 1
    (tmp_path / "scene.tif").write_bytes(content.replace(compression, custom))
    assert open_source(str(tmp_path)).read(0).size == (17, 13), "Pillow does not mind"


def test_too_many_windows_are_refused(tmp_path: Path) -> None:
    rasterio = geotiff.rasterio()
    form = {"width": 10**6, "height": 10**6, "count": 4, "dtype": "uint16", "tiled": True, "SPARSE_OK": True}
    form |= {"transform": TRANSFORM, "BIGTIFF": "YES", "blockxsize": 2048, "blockysize": 2048}
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", **form):
        pass
    assert "954529 windows, at most 100000" in refused(tmp_path / "scene.tif")
    assert "too many at once; give raster.tile of at most 13377" in refused(tmp_path / "scene.tif", tile=0)


def test_what_is_no_picture_in_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scene.tif"
    for dtype in ("complex64", "complex_int16"):
        write_raster(file, noise(2, 20, 20, dtype="complex64"), dtype=dtype)
        assert f"complex numbers ({dtype})" in refused(file)
    write_raster(file, noise(3, 20, 20))
    assert "it has 3 bands, raster.bands asks for 4" in refused(file, bands=(4, 3, 2))
    Image.new("P", (20, 20)).save(file)
    assert "indices of a palette" in refused(file, tile=64)
    monkeypatch.setattr(geotiff, "MAX_BLOCK_BYTES", 4000)
    write_raster(file, noise(3, 40, 40), blockysize=40)
    assert "its blocks of 0 MB have to be decoded whole" in refused(file)


def test_files_beside_a_raster_are_not_looked_at(tmp_path: Path) -> None:
    file = write_raster(tmp_path / "scene.tif", noise(4, 20, 20))
    before = np.asarray(open_source(str(file)).read(0))
    rasterio = geotiff.rasterio()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(file, "r+") as raster:
        raster.write_mask(np.zeros((20, 20), bool))
    (tmp_path / "scene.tif.aux.xml").write_text("<PAMDataset><PAMRasterBand band='1'><NoDataValue>1</NoDataValue>"
                                                "</PAMRasterBand></PAMDataset>")  # fmt: skip
    assert np.array_equal(np.asarray(open_source(str(file)).read(0)), before)
    assert {path.name for path in tmp_path.iterdir()} == {"scene.tif", "scene.tif.msk", "scene.tif.aux.xml"}


def test_without_rasterio_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raster(tmp_path / "many.tif", noise(5, 20, 20))
    write_raster(tmp_path / "planes.tif", noise(5, 20, 20), interleave="band")  # Pillow would take the first
    Image.new("RGB", (20, 20)).save(tmp_path / "few.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    source = open_source(str(tmp_path))
    assert source.names == ["few.tif", "many.tif", "planes.tif"] and source.read(0).size == (20, 20)
    for index in (1, 2):
        with pytest.raises(BadImage, match=r"rasterio can; pip install 'glare-ssl\[geotiff\]'"):
            source.read(index)
    with pytest.raises(UserError, match=r"pip install 'glare-ssl\[geotiff\]'"):
        open_source(str(tmp_path), raster=RasterReading(tile=16))


@pytest.mark.parametrize("keys", [{"tile": -1}, {"tile": 20_000}, {"bands": (0, 1, 2)}])
def test_impossible_settings_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|counted from 1"):
        RasterReading(**keys)


def test_the_cache_holds_a_row_of_windows_of_strips(tmp_path: Path) -> None:
    reader = Reader()
    for width, expected in ((64, CACHE_BYTES), (60_000, 60_000 * 4 * 2 * 1025)):
        file = write_raster(tmp_path / f"{width}.tif", np.zeros((4, 1, width), np.uint16))
        open_raster(file, reader)
        assert reader._cache == expected
    raster = open_raster(file, reader)
    assert raster.whole == Box(0, 0, 60_000, 1) and raster.read(Box(10, 0, 5, 1)).size == (5, 1)


MEMORY = """
import sys
import torch
from glare.data import geotiff
from glare.data.sources import RasterReading, open_source
from glare.price import peak_memory_bytes, reset_peak_memory
geotiff.CACHE_BYTES = 2**24
before = reset_peak_memory(torch.device("cpu"))
source = open_source(sys.argv[1], raster=RasterReading(tile=500))
for index in range(len(source)):
    source.read(index)
print(len(source), (peak_memory_bytes(torch.device("cpu")) - before) // 2**20)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rasterio = geotiff.rasterio()
    form = {"width": 4000, "height": 4000, "count": 8, "dtype": "uint16", "tiled": True, "SPARSE_OK": True}
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", transform=TRANSFORM, **form):
        pass  # 244 MB when decoded, nothing but zeros
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    count, taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert count == "64", taken
    assert int(taken) < 122, "half of it"


def test_the_estimate_of_decoded_windows_decodes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raster(tmp_path / "scene.tif", noise(3, 96, 64))
    images = open_source(str(tmp_path), raster=RasterReading(tile=32))
    monkeypatch.setattr(Raster, "read", lambda *_: pytest.fail("a window is decoded"))
    assert len(images) == 6 and decoded_bytes(images, None) == 96 * 64 * 3
    assert decoded_bytes(images, 16) == 96 * 64 * 3 // 4
