"""Labelled folders and scenes: what is accepted, what each mistake is told, and how they are packed."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import write_labelled
from PIL import Image

from glare.data.labelled import distinct_colours, open_labelled, pack_labelled
from glare.data.landcover import parse_landcover
from glare.data.sources import BadImage
from glare.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
CLASSES = ["road", "roof", "lawn"]


def picture(seed: int, *, width: int = 6, height: int = 4) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def indices(seed: int, *, width: int = 6, height: int = 4) -> Any:
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), (height, width))


def write_classes(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES} | content))


def write(folder: Path, name: str, seed: int, label: Any = None) -> None:
    """One image and its label, by default random indices."""
    image, target = folder / "images" / name, (folder / "labels" / name).with_suffix(".png")
    for file in (image, target):
        file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(image)
    values = indices(seed) if label is None else label
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(target)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three labelled images."""
    write_classes(tmp_path)
    for seed, name in enumerate(["tile10.png", "tile9.png", "more/tile1.png"]):
        write(tmp_path, name, seed)
    return tmp_path


# layout


def test_images_meet_their_labels_in_natural_order(folder: Path) -> None:
    found = open_labelled(str(folder))
    assert [found.name(index) for index in range(len(found))] == ["more/tile1.png", "tile9.png", "tile10.png"]
    assert found.classes == CLASSES and found.ignore_index == 255
    for index, seed in enumerate([2, 1, 0]):
        image, label = found.read(index)
        assert np.array_equal(np.asarray(image), np.asarray(picture(seed)))
        assert label.dtype == np.uint8 and np.array_equal(label, indices(seed))


@pytest.mark.parametrize("suffix", [".PNG", ".TIF", ".TIFF"])
def test_labels_may_end_in_capitals(suffix: str, folder: Path) -> None:
    for label in (folder / "labels").rglob("*.png"):
        Image.open(label).save(label.with_suffix(suffix))
        label.unlink()
    assert np.array_equal(open_labelled(str(folder)).read(2)[1], indices(0))


def test_match_and_subset(folder: Path) -> None:
    found = open_labelled(str(folder), match="tile*,!tile9")
    assert list(found.names) == ["more/tile1.png", "tile10.png"]
    few = found.subset([1])
    assert list(few.names) == ["tile10.png"] and few.classes == found.classes
    assert np.array_equal(few.read(0)[1], indices(0))
    with pytest.raises(UserError, match="match 'x' selects none of the 3 images"):
        open_labelled(str(folder), match="x")


def test_images_that_are_called_like_labels_count_where_they_have_labels(tmp_path: Path) -> None:
    write_labelled(tmp_path, 4)
    for kind in ("images", "labels"):
        for number, name in enumerate(("a", "a_gt", "b", "b_gt")):
            (tmp_path / kind / f"scene_{number}.png").rename(tmp_path / kind / f"{name}.png")
    assert list(open_labelled(str(tmp_path)).names) == ["a.png", "a_gt.png", "b.png", "b_gt.png"]


def test_splits(tmp_path: Path) -> None:
    write_classes(tmp_path)
    write(tmp_path / "train", "a.jpg", 0)
    assert list(open_labelled(str(tmp_path)).names) == ["a.jpg"]  # the only one
    write(tmp_path / "val", "b.jpg", 1)
    assert list(open_labelled(str(tmp_path), split="val").names) == ["b.jpg"]
    assert list(open_labelled(str(tmp_path / "val")).names) == ["b.jpg"]  # classes.json above it
    with pytest.raises(UserError, match="has several splits; choose one of train, val"):
        open_labelled(str(tmp_path))
    with pytest.raises(UserError, match="has no split 'test'; it has train, val"):
        open_labelled(str(tmp_path), split="test")
    with pytest.raises(UserError, match="has no split 'val'; leave split out"):
        open_labelled(str(tmp_path / "train"), split="val")
    write_classes(tmp_path / "val", classes=["x", "y", "z"])
    assert open_labelled(str(tmp_path), split="val").classes == ["x", "y", "z"]  # its own comes first


def test_what_is_no_labelled_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; a labelled folder holds"):
        open_labelled(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="has no folder of images"):
        open_labelled(str(tmp_path))
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_labelled(str(tmp_path))
    picture(0).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r'has no classes.json.*write one such as \{"classes": \["building", "road"\]'):
        open_labelled(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "has no list of classes"),
        ("[]", "has no list of classes"),
        ("{}", "has no list of classes"),
        ('{"classes": "road"}', "1 to 255 different names"),
        ('{"classes": []}', "1 to 255 different names"),
        ('{"classes": ["a", "a"]}', "1 to 255 different names"),
        ('{"classes": ["a", 1]}', "1 to 255 different names"),
        (json.dumps({"classes": [str(k) for k in range(256)]}), "1 to 255 different names"),
        ('{"classes": ["a"], "ignore_index": "255"}', "ignore_index .* is '255'; give the value"),
        ('{"classes": ["a"], "palette": [[0, 0]]}', "palette .* for each of 1 classes"),
        ('{"classes": ["a"], "palette": [[0, 0, 0], [1, 1, 1]]}', "palette .* for each of 1 classes"),
        ('{"classes": ["a"], "palette": [[0, 0, 256]]}', "palette .* for each of 1 classes"),
        ('{"classes": ["a", "b"], "palette": [[0, 0, 1], [0]]}', "palette .* for each of 2 classes"),
        ('{"classes": ["a"], "palette": ["red"]}', "palette .* for each of 1 classes"),
    ],
)
def test_faults_of_classes_json(folder: Path, content: str, message: str) -> None:
    (folder / "classes.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_labelled(str(folder))


def test_palette_given_or_made(folder: Path) -> None:
    made = open_labelled(str(folder)).palette
    assert made.dtype == np.uint8 and np.array_equal(made, distinct_colours(3))
    write_classes(folder, palette=[[1, 2, 3], [255, 0, 0], [0, 255, 0]])
    assert open_labelled(str(folder)).palette.tolist() == [[1, 2, 3], [255, 0, 0], [0, 255, 0]]


def test_made_colours_differ() -> None:
    assert len(np.unique(distinct_colours(255), axis=0)) == 255
    few = distinct_colours(12).astype(int)
    distance = np.abs(few[:, None] - few[None]).sum(axis=-1) + 1000 * np.eye(12, dtype=int)
    assert distance.min() > 60
    assert np.array_equal(distinct_colours(5), distinct_colours(9)[:5])


# labels


def palette_picture() -> Image.Image:
    image = Image.fromarray(indices(0)).convert("L")
    colours = Image.frombytes("P", image.size, image.tobytes())
    colours.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200] + [0] * 759)
    return colours


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(Image.fromarray(indices(0)), id="L"),
        pytest.param(palette_picture(), id="P"),
        pytest.param(Image.fromarray(indices(0).astype(np.uint16)), id="I;16"),
    ],
)
def test_label_modes(folder: Path, label: Image.Image) -> None:
    write(folder, "tile10.png", 0, label)
    assert np.array_equal(open_labelled(str(folder), match="tile10").read(0)[1], indices(0))


def test_labels_of_few_bits(folder: Path) -> None:
    values = indices(0) % 2
    write(folder, "tile10.png", 0, Image.fromarray(values * 255).convert("1"))
    assert np.array_equal(open_labelled(str(folder), match="tile10").read(0)[1], values)
    palette = Image.frombytes("P", (6, 4), values.tobytes())
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(folder / "labels" / "tile10.png", bits=1)
    assert np.array_equal(open_labelled(str(folder), match="tile10").read(0)[1], values)


@pytest.mark.parametrize(("bits", "row"), [(2, bytes([0b00011011])), (4, bytes([0x01, 0x23]))])
def test_grey_labels_of_2_and_4_bits_are_not_spread(tmp_path: Path, bits: int, row: bytes) -> None:
    from test_sources import grey_png

    write_classes(tmp_path, classes=["a", "b", "c", "d"])
    write(tmp_path, "a.png", 0)
    picture(0, width=4, height=1).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.png").write_bytes(grey_png(bits, row, width=4))
    assert open_labelled(str(tmp_path)).read(0)[1].tolist() == [[0, 1, 2, 3]]


def tiff_of_few_bits(bits: int, row: bytes, *, compression: int) -> bytes:
    """A grey TIFF of one row of 4 px, made by hand."""
    data = zlib.compress(row) if compression == 8 else row
    tags = [(256, 4), (257, 1), (258, bits), (259, compression), (262, 1)]
    tags += [(273, 8), (277, 1), (278, 1), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    padded = data + bytes(-len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(("bits", "row"), [(2, bytes([0b00011011])), (4, bytes([0x01, 0x23]))])
def test_grey_tiff_labels_of_2_and_4_bits_are_not_spread(
    tmp_path: Path, bits: int, row: bytes, compression: int
) -> None:
    write_classes(tmp_path, classes=[f"class {i}" for i in range(60)])
    write(tmp_path, "a.png", 0)
    picture(0, width=4, height=1).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.png").unlink()
    (tmp_path / "labels" / "a.tif").write_bytes(tiff_of_few_bits(bits, row, compression=compression))
    assert open_labelled(str(tmp_path)).read(0)[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("tile9.png", {"format": "JPEG"}, "JPEG"),
        ("tile9.png", {"format": "PPM"}, "PPM"),
        ("tile9.tif", {"compression": "jpeg"}, "jpeg"),
    ],
)
def test_labels_whose_format_changes_their_values_are_refused(
    folder: Path, name: str, options: dict[str, Any], found: str
) -> None:
    (folder / "labels" / "tile9.png").unlink()
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(folder / "labels" / name, **options)
    labelled = open_labelled(str(folder), match="tile9")
    with pytest.raises(
        BadImage, match=rf"its label .*{name} is {found} inside, which may change the indices .*; write it"
    ):
        labelled.read(0)


@pytest.mark.parametrize("ignore", [0, 7, 255, 65535])
def test_the_ignored_value_becomes_255(folder: Path, ignore: int) -> None:
    values = indices(0).astype(np.uint16)
    values[values == 255] = ignore
    write(folder, "tile10.png", 0, values)
    write_classes(folder, ignore_index=ignore)
    expected = np.where(values == ignore, 255, values)
    assert np.array_equal(open_labelled(str(folder), match="tile10").read(0)[1], expected)


def test_wrong_values_name_the_file_the_values_and_the_range(folder: Path) -> None:
    label = indices(1)
    label[0, :3] = (3, 254, 3)
    write(folder, "tile9.png", 1, label)
    found = open_labelled(str(folder))
    expected = r"tile9.png has the values 3, 254; allowed are 0 to 2 and 255 to ignore: correct the label"
    with pytest.raises(BadImage, match=expected) as caught:
        found.read(1)
    assert caught.value.name == "tile9.png"
    write(folder, "tile9.png", 1, np.arange(24, dtype=np.uint8).reshape(4, 6))
    with pytest.raises(BadImage, match=r"values 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.; allowed"):
        found.read(1)


def test_missing_broken_coloured_and_wrongly_sized_labels(folder: Path) -> None:
    found = open_labelled(str(folder), match="tile10")
    label = folder / "labels" / "tile10.png"
    picture(0).save(label)
    with pytest.raises(BadImage, match=r"tile10.png is a colour picture \(mode RGB\); write a PNG with one channel"):
        found.read(0)
    Image.fromarray(indices(0, width=5, height=9)).save(label)
    with pytest.raises(BadImage, match=r"tile10.png has 5 x 9 px, the image 6 x 4; give them the same size"):
        found.read(0)
    label.write_text("text")
    with pytest.raises(BadImage, match=r"tile10.png cannot be read \(.*; write it again"):
        found.read(0)
    label.unlink()
    with pytest.raises(BadImage, match=r"has no label .*tile10.png; add that file or remove the image"):
        found.read(0)


# packing


@pytest.mark.parametrize("workers", [1, 5])
def test_pack_keeps_images_and_labels_together(folder: Path, workers: int) -> None:
    (folder / "labels" / "tile9.png").unlink()
    packed = pack_labelled(open_labelled(str(folder)), workers=workers)
    assert packed.names == ["more/tile1.png", "tile10.png"] and packed.classes == CLASSES
    assert [name for name, _ in packed.skipped] == ["tile9.png"]
    assert packed.labels.shape == (48,) and packed.labels.dtype == torch.uint8
    assert np.array_equal(packed.palette, distinct_colours(3))
    for index, seed in enumerate([2, 0]):
        assert np.array_equal(packed.images.image(index).numpy(), np.asarray(picture(seed)))
        first = int(packed.images.start[index])
        assert np.array_equal(packed.labels[first : first + 24].view(4, 6).numpy(), indices(seed))


def test_pack_strict_and_hopeless(folder: Path) -> None:
    (folder / "labels" / "tile9.png").unlink()
    with pytest.raises(UserError, match=r"tile9.png: it has no label .* or leave --strict out"):
        pack_labelled(open_labelled(str(folder)), strict=True)
    with pytest.raises(UserError, match="none of the 1 images can be used"):
        pack_labelled(open_labelled(str(folder), match="tile9"))


def test_short_side_smooths_images_and_picks_labels(tmp_path: Path) -> None:
    write_classes(tmp_path)
    write(tmp_path, "a.png", 0)
    image = picture(0, width=40, height=20)
    label = np.repeat(np.repeat(indices(3, width=8, height=4), 5, axis=0), 5, axis=1)
    image.save(tmp_path / "images" / "a.png")
    Image.fromarray(label).save(tmp_path / "labels" / "a.png")
    packed = pack_labelled(open_labelled(str(tmp_path)), short_side=4)
    assert packed.images.size.tolist() == [[8, 4]]
    assert np.array_equal(packed.labels.view(4, 8).numpy(), indices(3, width=8, height=4))
    expected = image.resize((8, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(packed.images.image(0).numpy(), np.asarray(expected))


# generated scenes and real data


def test_landcover_strings() -> None:
    found = open_labelled("landcover:temperate:3:5", match="*_000001")
    scenes = parse_landcover("landcover:temperate:3:5")
    image, label = scenes.read_labelled(1)
    assert list(found.names) == [scenes.name(1)]
    assert found.classes == list(scenes.classes) and found.palette.tolist() == [list(c) for c in scenes.palette]
    assert np.array_equal(np.asarray(found.read(0)[0]), np.asarray(image))
    assert np.array_equal(found.read(0)[1], label)
    with pytest.raises(UserError, match="has no splits, 'val' was asked for"):
        open_labelled("landcover:temperate:3:5", split="val")


@pytest.mark.parametrize(
    ("name", "split", "match", "count"),
    [("dubai", None, "tile1_*", 9), ("camvid", "val", "*_0795*,*_0796*", 2), ("camvid", "train", "0001TP_0066*", 1)],
)
def test_real_data(name: str, split: str | None, match: str, count: int) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the {name} data is not beside the repository")
    packed = pack_labelled(open_labelled(str(SHARED / name), split=split, match=match), strict=True)
    assert len(packed.names) >= count
    assert len(packed.labels) == len(packed.images.pixels) == int(packed.images.size.prod(dim=1).sum())
    found = set(packed.labels.unique().tolist())
    assert found <= {*range(len(packed.classes)), 255} and len(found) >= 4
