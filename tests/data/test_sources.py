"""Every kind of data and every kind of picture that a user may bring, and the errors for what is none."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from glare.data import downloads
from glare.data.landcover import parse_landcover
from glare.data.sources import (
    BEHIND_TRANSPARENT,
    BadImage,
    Images,
    fit,
    image_files,
    natural,
    open_source,
    to_rgb8,
)
from glare.errors import UserError

Pixels = NDArray[Any]


def noise(seed: int, *, width: int = 9, height: int = 7) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes, **options: Any) -> Pixels:
    images = Images(["it"], lambda _: Image.open(io.BytesIO(data)))
    return np.asarray(images.read(0, **options))


def write(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)


def grey_png(
    bits: int, packed_row: bytes, *, width: int, height: int = 1, colour: int = 0, interlaced: bool = False
) -> bytes:
    """A PNG of one row, made by hand; grey, or of the given type of ``colour``."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + packed_row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# folders


def test_a_folder_of_any_depth_in_natural_order(tmp_path: Path) -> None:
    write(tmp_path, "tile10.png", "tile9.JPG", "b/c/deep.tif", "b/a2.png", "b/a10.png")
    write(tmp_path, ".hidden.png", ".cache/x.png", "b/._a2.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "noextension").write_text("not an image")
    source = open_source(str(tmp_path))
    names = [source.name(index) for index in range(len(source))]
    assert names == ["b/a2.png", "b/a10.png", "b/c/deep.tif", "tile9.JPG", "tile10.png"]
    assert np.array_equal(np.asarray(source.read(4)), np.asarray(noise(0)))


def test_every_extension_is_found_in_any_case(tmp_path: Path) -> None:
    extensions = ["jpg", "jpeg", "PNG", "bmp", "gif", "webp", "Tif", "tiff", "ppm", "pgm", "jp2"]
    for extension in extensions:
        noise(0).convert("L").save(tmp_path / f"a.{extension}")
    source = open_source(str(tmp_path))
    assert len(source) == len(extensions)
    assert {source.read(index).mode for index in range(len(source))} == {"RGB"}


def test_natural_order_has_no_ties_and_mixes_words_and_numbers() -> None:
    names = ["a1", "a01", "1", "a", "10b", "2", "a1b2", "a1b10", "b"]
    assert natural("a1") != natural("a01")
    assert sorted(names, key=natural) == ["1", "2", "10b", "a", "a01", "a1", "a1b2", "a1b10", "b"]


def test_labels_beside_images_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, "train/images/1.png", "train/labels/1.png", "train/preview.png", "val/images/2.png")
    write(tmp_path, "val/labels/2.png", "more/images/3.png")
    assert open_source(str(tmp_path)).names == ["more/images/3.png", "train/images/1.png", "val/images/2.png"]
    assert open_source(str(tmp_path / "train")).names == ["images/1.png"]
    assert open_source(str(tmp_path / "train" / "labels")).names == ["1.png"]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images", "masks"),
        ("img_dir", "ann_dir"),
        ("JPEGImages", "SegmentationClass"),
        ("image", "label"),
        ("imgs", "annotations"),
    ],
)
def test_folders_called_like_labels_are_left_out_beside_images(
    images: str, labels: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, f"{images}/train/1.png", f"{labels}/train/1.png", "more/2.png")
    assert open_source(str(tmp_path)).names == [f"{images}/train/1.png", "more/2.png"]
    assert caplog.messages == [f"{labels} of {str(tmp_path)!r} left out as labels by the name"]
    assert open_source(str(tmp_path / labels)).names == ["train/1.png"]


@pytest.mark.parametrize(("images", "labels"), [("photos/a", "masks"), ("sat", "gt"), ("faces/x/y", "Annotations")])
def test_folders_called_like_labels_are_left_out_beside_any_pictures(
    images: str, labels: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, f"{images}/1.png", f"{labels}/1.png", f"{labels}/masks/2.png")
    assert open_source(str(tmp_path)).names == [f"{images}/1.png"]
    assert caplog.messages == [f"{labels} of {str(tmp_path)!r} left out as labels by the name"]


@pytest.mark.parametrize(
    "names",
    [
        ["mask/4.png", "mask/5.png", "no_mask/1.png", "no_mask/2.png"],
        ["gt/a.png", "gt/b.png", "gt/c.png", "turbo/a.png"],
        ["mask/1.png", "overview.png"],
    ],
)
def test_folders_called_like_labels_of_other_pictures_hold_images(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, *names)
    assert open_source(str(tmp_path)).names == names
    assert caplog.messages == []


def test_folders_of_classes_may_be_called_like_labels(tmp_path: Path) -> None:
    names = ["face/1.png", "face/2.png", "mask/1.png", "mask/2.png"]
    write(tmp_path, *names)
    assert open_source(str(tmp_path)).names == names[:2]
    assert open_source(str(tmp_path), labels=True).names == names


def test_labels_inside_the_folder_of_their_pictures_are_left_out_however_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, *(f"{i}/{name}" for i in range(7) for name in ("1.png", "masks/1.png")))
    assert open_source(str(tmp_path)).names == [f"{i}/1.png" for i in range(7)]
    shown = ", ".join(f"{i}/masks" for i in range(5))
    assert caplog.messages == [f"{shown} and 2 more of {str(tmp_path)!r} left out as labels by the name"]


def test_folders_called_like_labels_alone_hold_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "masks/1.png", "gt/2.png", "notes/labels/3_mask.png", "notes/labels/4_mask.png")
    (tmp_path / "empty").mkdir()
    listed = ["gt/2.png", "masks/1.png", "notes/labels/3_mask.png", "notes/labels/4_mask.png"]
    assert open_source(str(tmp_path)).names == listed
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("pictures", "labels", "ending"),
    [
        (["0_sat.jpg", "1_sat.jpg", "2_sat.jpg"], ["0_mask.png", "1_mask.png"], "_mask"),
        (["x_1.png", "x_2.png", "x_3_other.png"], ["x_1-Label.png", "x_2-label.tif"], "-label"),
        (["a.b.png", "c.png"], ["a.b_ground_truth.png", "c_ground_truth.png"], "_ground_truth"),
    ],
)
def test_files_called_like_the_labels_of_their_neighbours_are_left_out(
    pictures: list[str], labels: list[str], ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, *(f"deep/{name}" for name in pictures + labels))
    assert open_source(str(tmp_path)).names == [f"deep/{name}" for name in sorted(pictures)]
    count = f"{len(labels)} files *{ending}.* of {str(tmp_path)!r}"
    assert caplog.messages == [f"{count} left out as labels of the pictures beside them, by the name"]


@pytest.mark.parametrize(
    "names",
    [
        ["1_label.png", "2_label.png", "3_label.png"],
        ["1_label.png", "1_mask.png", "2_label.png", "2_mask.png"],
        ["man.png", "man_mask.png", "woman.png"],  # not many
        ["cat_1.png", "cat_mask.png", "dog_1.png", "dog_mask.png"],
        ["1.png", "1_gt.png", "2_gt.png", "3_gt.png"],  # whose pictures are not all there
        ["1_gt.png", "1_sat.png", "2_gt.png", "2_other.png"],
        ["fiat.png", "ford-gt.png", "ford.png", "opel-gt.png", "opel.png", "seat.png", "vw.png"],  # few of them
    ],
)
def test_files_called_like_labels_that_are_none_are_images(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, *names)
    assert open_source(str(tmp_path)).names == names
    assert caplog.messages == []


def test_what_lies_beside_images_and_labels_is_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "x/images/1.png", "x/labels/1.png", "x/extra/2.png", "x/3.png", "x/4.png")
    for _ in range(2):
        assert open_source(str(tmp_path)).names == ["x/images/1.png"]
    beside = f"x/extra, 2 pictures beside x/images of {str(tmp_path)!r}"
    assert caplog.messages == [f"{beside} left out: beside labels only images is taken"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, "here/1.png", "elsewhere/2.png")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "elsewhere")
    assert open_source(str(tmp_path / "here")).names == ["1.png", "again/2.png"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed"):
        image_files(tmp_path)


def test_one_image_is_a_source(tmp_path: Path) -> None:
    write(tmp_path, "one.png", "other.png")
    source = open_source(str(tmp_path / "one.png"))
    assert source.names == ["one.png"]
    assert np.array_equal(np.asarray(source.read(0)), np.asarray(noise(0)))


@pytest.mark.parametrize(
    ("match", "left"),
    [
        (None, ["tile1_001", "tile1_003", "tile2_001", "tile3_001"]),
        ("tile[13]_*", ["tile1_001", "tile1_003", "tile3_001"]),
        ("tile[13]_*, !tile1_003", ["tile1_001", "tile3_001"]),
        ("!*_001", ["tile1_003"]),
        ("tile3_001,tile2*", ["tile2_001", "tile3_001"]),
        ("x/*", ["tile1_001"]),
        ("x/tile1_001, y/*_001.jpg", ["tile1_001", "tile2_001"]),
        ("tile*, !y/*", ["tile1_001", "tile1_003", "tile3_001"]),
    ],
)
def test_match_selects_by_stem_or_path(tmp_path: Path, match: str | None, left: list[str]) -> None:
    write(tmp_path, "x/tile1_001.png", "tile1_003.png", "y/tile2_001.jpg", "tile3_001.png")
    source = open_source(str(tmp_path), match=match)
    assert sorted(Path(name).stem for name in source.names) == left
    assert [source.read(index).size for index in range(len(source))] == [(9, 7)] * len(left)


def test_a_match_with_a_slash_fits_from_any_folder_on(tmp_path: Path) -> None:
    write(tmp_path, "images/train/a.png", "images/train/b/c.png", "images/val/a.png", "images/retrain/a.png")
    source = open_source(str(tmp_path), match="train/*")
    assert source.names == ["images/train/a.png", "images/train/b/c.png"]
    assert open_source(str(tmp_path), match="images/val/a").names == ["images/val/a.png"]


def test_a_split_below_images_is_chosen_by_match(tmp_path: Path) -> None:
    write(tmp_path, "images/train/a.png", "images/val/a.png", "labels/train/a.png")
    with pytest.raises(UserError, match=r"no split 'train', .*; leave split out and match 'train/\*'$"):
        open_source(str(tmp_path), split="train")
    with pytest.raises(UserError, match=r"no split 'test', .*; leave split out$"):
        open_source(str(tmp_path), split="test")


def test_a_match_that_selects_none_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "tile1.png")
    with pytest.raises(UserError, match=r"match 'tail\*' selects none of the 1 images .* such as 'tile1'"):
        open_source(str(tmp_path), match="tail*")


def test_subset_keeps_names_and_pictures_together(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "1.png", "2.png")
    part = open_source(str(tmp_path)).subset([2, 0]).subset([1])
    assert part.names == ["0.png"]
    assert np.array_equal(np.asarray(part.read(0)), np.asarray(noise(0)))


# what is no data


def test_no_images_no_folder_no_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"holds no images \(jpg, .*\) and no parquet or tar files; give a folder"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="is no image by its name; give a file named jpg"):
        open_source(str(tmp_path / "a.txt"))
    for missing in (str(tmp_path / "missing"), "missing", "a/b/c", ""):
        with pytest.raises(UserError, match="neither an existing path nor a Hub id"):
            open_source(missing)


def test_a_hub_id_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    monkeypatch.setattr(downloads, "load", fail)
    expected = r"'owner/name' is neither an existing path nor a loadable Hub data set \(Couldn't reach .* on the Hub\)"
    with pytest.raises(UserError, match=expected):
        open_source("owner/name")


# tables


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def table(*seeds: int) -> datasets.Dataset:
    """Rows with a mask before the image, so that the first column of images is not the right one."""
    features = {"mask": datasets.Image(), "image": datasets.Image(), "key": datasets.Value("int64")}
    columns = {"mask": [noise(99)] * len(seeds), "image": [noise(seed) for seed in seeds], "key": seeds}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def assert_pictures(source: Images, *seeds: int) -> None:
    found = [np.asarray(source.read(index)) for index in range(len(source))]
    assert all(np.array_equal(a, np.asarray(noise(b))) for a, b in zip(found, seeds, strict=True))


@pytest.mark.usefixtures("own_cache")
def test_parquet_file_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    (folder / "data").mkdir(parents=True)
    table(1, 2).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(3).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert_pictures(open_source(str(folder)), 1, 2)
    assert_pictures(open_source(str(folder / "data" / "test-00000-of-00001.parquet")), 3)
    assert open_source(str(folder), match="000001").names == ["000001"]


@pytest.mark.usefixtures("own_cache")
def test_parquet_without_feature_types_without_images_and_broken(tmp_path: Path) -> None:
    cell = {"bytes": encode(noise(4)), "path": None}
    plain = datasets.Dataset.from_dict({"key": [1, 2], "picture": [cell, None]})
    plain.to_parquet(tmp_path / "plain.parquet")
    source = open_source(str(tmp_path / "plain.parquet"))
    assert_pictures(source.subset([0]), 4)
    with pytest.raises(BadImage, match="000001: the row has no image"):
        source.read(1)
    datasets.Dataset.from_dict({"key": [1]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no column of images, only key"):
        open_source(str(tmp_path / "none.parquet"))
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"broken.parquet' cannot be read \("):
        open_source(str(tmp_path / "broken.parquet"))


@pytest.mark.usefixtures("own_cache")
def test_tar_shards(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        pictures = [encode(noise(5)), encode(noise(6))[:-30], encode(noise(7))]
        for index, picture in enumerate(pictures):
            for name, body in ((f"{index}.png", picture), (f"{index}.json", b'{"a": 1}')):
                member = tarfile.TarInfo(name)
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    source = open_source(str(tmp_path / "shards"))
    assert_pictures(source.subset([0, 2]), 5, 7)
    with pytest.raises(BadImage, match="truncated"):
        source.read(1)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("label", ["label.png", "mask.png", "seg_label.png"])
def test_a_column_called_like_labels_is_not_the_images(
    label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, body in ((f"0.{label}", encode(noise(1))), ("0.jpg.png", encode(noise(2)))):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    assert_pictures(open_source(str(tmp_path / "0.tar")), 2)
    assert f"its column 'jpg.png', not {label}" in caplog.text


def test_hub_takes_train_or_else_the_only_split(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    splits = {"test": table(1)}
    monkeypatch.setattr(downloads, "load", lambda *_, **__: datasets.DatasetDict(splits))
    assert_pictures(open_source("owner/name"), 1)
    splits["validation"] = table(2, 3)
    assert_pictures(open_source("owner/name", split="val"), 2, 3)
    with pytest.raises(UserError, match="'owner/name' has several splits; choose one by --split test, validation"):
        open_source("owner/name")
    splits["train"] = table(4)
    assert_pictures(open_source("owner/name"), 4)
    assert "its split 'train' is read; --split takes another one (test, validation)" in caplog.text


@pytest.mark.usefixtures("own_cache")
def test_hub_configurations_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a data set as it lies on the Hub; what is asked for is read from a folder with its files."""
    for configuration, split, seed in (("summer", "train", 1), ("winter", "train", 2), ("winter", "test", 3)):
        table(seed).to_parquet(tmp_path / "files" / f"{configuration}-{split}.parquet")
    lines = [f"- config_name: {name}\n  data_files: {name}-*.parquet" for name in ("summer", "winter")]
    lines[1] = "- config_name: winter\n  data_files:\n" + "\n".join(
        f"  - split: {split}\n    path: winter-{split}.parquet" for split in ("train", "test")
    )
    (tmp_path / "files/README.md").write_text("\n".join(["---", "configs:", *lines, "---\n"]))
    load, places = downloads.load, {"owner/name": str(tmp_path / "files")}
    monkeypatch.setattr(downloads, "load", lambda hub_id, **chosen: load(places[hub_id], **chosen))
    assert_pictures(open_source("owner/name:summer"), 1)
    assert_pictures(open_source("owner/name:winter"), 2)
    assert_pictures(open_source("owner/name:winter", split="test"), 3)
    with pytest.raises(
        UserError, match="'owner/name' has configurations 'summer', 'winter'; give one as owner/name:NA"
    ):
        open_source("owner/name")
    with pytest.raises(UserError, match=r"loadable Hub data set .*'spring' not found. Available: .'summer', 'winter'"):
        open_source("owner/name:spring")
    with pytest.raises(UserError, match="'owner/name:winter' has no split 'val'; it has train, test"):
        open_source("owner/name:winter", split="val")


def test_landcover_strings() -> None:
    source = open_source("landcover:arid:2:7")
    scenes = parse_landcover("landcover:arid:2:7")
    assert source.names == [scenes.name(0), scenes.name(1)]
    assert np.array_equal(np.asarray(source.read(1)), np.asarray(scenes.read(1)))
    with pytest.raises(UserError, match="landcover has no domain 'moon'"):
        open_source("landcover:moon")


# colour modes and bit depths


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_are_converted(mode: str) -> None:
    image = noise(1).convert("RGB" if mode == "LAB" else mode)
    image = image if image.mode == mode else Image.new(mode, (9, 7), (50, 100, 150))
    rgb = to_rgb8(image)
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb), np.asarray(image.convert("RGB")))


def test_transparent_parts_take_the_mean_colour() -> None:
    rgba = noise(1).convert("RGBA")
    alpha = Image.fromarray(np.repeat(np.array([[0], [255], [128]], np.uint8), 9, axis=1).repeat(3, axis=0)[:7])
    rgba.putalpha(alpha)
    found = read(encode(rgba)).astype(int)
    original = np.asarray(rgba)[..., :3].astype(int)
    assert (found[:3] == BEHIND_TRANSPARENT).all()
    assert np.array_equal(found[3:6], original[3:6])
    assert np.abs(found[6] - (original[6] * 128 + np.array(BEHIND_TRANSPARENT) * 127) / 255).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBa", "RGBA"])
def test_modes_with_alpha(mode: str) -> None:
    assert np.asarray(to_rgb8(Image.new(mode, (1, 1)))).tolist() == [[list(BEHIND_TRANSPARENT)]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_colour_takes_the_mean_colour(mode: str) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), (255, 255, 255) if mode == "RGB" else 1)
    found = read(encode(image, transparency=(0, 0, 0) if mode == "RGB" else 0))
    assert found[0, 0].tolist() == list(BEHIND_TRANSPARENT)
    assert found[0, 1].tolist() != list(BEHIND_TRANSPARENT)


def test_adobe_cmyk_jpeg() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    assert np.abs(read(encode(red, "jpeg", quality=100)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 32768, 65535], [0, 128, 255]),
        ([0, 4096, 8191], [0, 16, 32]),
        ([0, 2048, 4095], [0, 128, 255]),
        ([0, 100, 300], [0, 6, 19]),
        ([0, 100, 255], [0, 100, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_by_the_depth_in_use(kind: str, values: list[int], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.uint16))
    assert read(encode(image, kind)).tolist() == [[[v, v, v] for v in expected]]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("most", [255, 256, 3000, 4095, 4096, 65535])
@pytest.mark.parametrize("bands", [2, 3, 4])
def test_16_bit_colours_by_the_depth_in_use(bands: int, most: int, interlaced: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, most + 1, (1, 1 if interlaced else 40, bands))
    values[0, 0] = most
    values[..., 3 if bands == 4 else 1 if bands == 2 else bands :] = 65535  # alpha
    colour = {2: 4, 3: 2, 4: 6}[bands]
    data = grey_png(16, values.astype(">u2").tobytes(), width=values.shape[1], colour=colour, interlaced=interlaced)
    (tmp_path / "1.png").write_bytes(data)
    expected = to_rgb8(Image.fromarray(values[..., 0].astype(np.uint16)))
    tolerance = 1 if most > 4095 else 0  # by the high byte
    for found in (read(data), np.asarray(open_source(str(tmp_path)).read(0))):
        assert np.abs(found[..., 0].astype(int) - np.asarray(expected)[..., 0]).max() <= tolerance


def test_a_transparent_16_bit_colour_stays_transparent() -> None:
    data = grey_png(16, np.array([0, 0, 0, 4095, 0, 0], ">u2").tobytes(), width=2, colour=2)
    key = b"tRNS" + bytes(6)
    chunk = struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key))
    place = data.index(b"IDAT") - 4
    assert read(data[:place] + chunk + data[place:]).tolist() == [[list(BEHIND_TRANSPARENT), [255, 0, 0]]]


def test_half_transparent_16_bit_colours_keep_their_alpha() -> None:
    data = grey_png(16, np.array([3000, 0, 4095, 0], ">u2").tobytes(), width=1, colour=6)
    assert read(data).tolist() == [[list(BEHIND_TRANSPARENT)]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([0.0, np.nan, np.inf], [0, 0, 0]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([-2.0, -2.0, -2.0], [0, 0, 0]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([100_000.0, np.nan, 300_000.0], [0, 0, 255]),
    ],
)
def test_floating_point_tiffs(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert read(encode(image, "tiff")).tolist() == [[[v, v, v] for v in expected]]


def test_32_bits() -> None:
    wide = Image.fromarray(np.array([[0, 1_000_000, 2_000_000]], np.int32))
    assert read(encode(wide, "tiff"))[0, :, 0].tolist() == [0, 128, 255]
    signed = Image.fromarray(np.array([[-100, 0, 100]], np.int32))
    assert read(encode(signed, "tiff"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_one_pixel(mode: str) -> None:
    assert read(encode(Image.new(mode, (1, 1)))).shape == (1, 1, 3)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(2, width=40, height=24), kind, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(read(data), np.asarray(upright))
    assert read(data, short_side=6).shape == ((10, 6, 3) if orientation > 4 else (6, 10, 3))


def test_broken_exif_does_not_spoil_the_picture() -> None:
    png = encode(noise(3), exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x05\x01\x12")
    assert np.array_equal(read(png), np.asarray(noise(3)))
    assert read(encode(noise(3), "jpeg", exif=b"Exif\0\0nonsense")).shape == (7, 9, 3)


@pytest.mark.parametrize("kind", ["gif", "tiff", "png", "webp"])
def test_the_first_of_several_frames(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), (grey, grey, grey)) for grey in (10, 200)]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    image = open_source(str(tmp_path)).read(0)
    assert (np.asarray(image) == 10).all()
    assert (np.asarray(image.resize((3, 2))) == 10).all()  # usable after its file is closed


# bad images


def test_bad_images_say_why(tmp_path: Path) -> None:
    jpeg = encode(noise(1, width=64, height=64), "jpeg")
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is text")
    (tmp_path / "vanished.png").write_bytes(encode(noise(1)))
    source = open_source(str(tmp_path))
    (tmp_path / "vanished.png").unlink()
    reasons = {}
    for index, name in enumerate(source.names):
        with pytest.raises(BadImage) as caught:
            source.read(index)
        assert caught.value.name == name and str(caught.value) == f"{name}: {caught.value.reason}"
        reasons[name] = caught.value.reason
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["text.png"] == reasons["empty.png"] == "not an image, or of a format that Pillow cannot read"
    assert "No such file" in reasons["vanished.png"]


def test_a_decompression_bomb_is_a_bad_image() -> None:
    with pytest.raises(BadImage, match=r"exceeds limit .* Cut it into tiles"):
        read(grey_png(8, b"\0", width=60_000, height=60_000))


def test_running_out_of_memory_is_not_the_image() -> None:
    def fail(_: int) -> Image.Image:
        raise MemoryError

    with pytest.raises(MemoryError):
        Images(["it"], fail).read(0)


# reducing


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((100, 50), None, (100, 50)),
        ((100, 50), 50, (100, 50)),
        ((100, 50), 60, (100, 50)),
        ((100, 50), 20, (40, 20)),
        ((50, 101), 20, (20, 40)),
        ((1, 1000), 1, (1, 1000)),
        ((3, 1000), 1, (1, 333)),
    ],
)
def test_fit(size: tuple[int, int], short_side: int | None, expected: tuple[int, int]) -> None:
    assert fit(size, short_side) == expected


def test_a_jpeg_decoded_small_differs_little_from_one_decoded_whole() -> None:
    whole = noise(1, width=9, height=7).resize((901, 701), Image.Resampling.BICUBIC)
    data = encode(whole, "jpeg", quality=95)
    decoded = Image.open(io.BytesIO(data))
    expected = np.asarray(decoded.resize(fit(whole.size, 80), Image.Resampling.BICUBIC)).astype(int)
    found = read(data, short_side=80).astype(int)
    assert found.shape == expected.shape == (80, 103, 3)
    assert np.abs(found - expected).mean() < 1


def test_a_large_jpeg_is_decoded_at_least_at_twice_the_size() -> None:
    data = encode(noise(1, width=640, height=480), "jpeg")
    opened: list[Image.Image] = []

    def open_image(_: int) -> Image.Image:
        opened.append(Image.open(io.BytesIO(data)))
        return opened[-1]

    small = Images(["it"], open_image).read(0, short_side=60)
    assert (small.size, opened[0].size) == ((80, 60), (160, 120))
