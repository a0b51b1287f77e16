"""The check of the data: every fact against a plain count, every problem in one line with its remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
from labelled_samples import CLASSES, write_labelled
from PIL import Image

from glare import UserError
from glare.data.landcover import parse_landcover
from glare.data.sources import open_source
from glare.data_advice import Needs, advice, describe, to_json
from glare.data_check import DataCheck, Pair, check_data

NEEDS = Needs(global_size=32, image_size=64)


def check(folder: Path, *, workers: int | None = 2) -> DataCheck:
    return check_data(open_source(str(folder)), str(folder), short_side=64, workers=workers)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def problems(folder: Path) -> list[str]:
    return advice(check(folder), NEEDS)


def only(lines: list[str], start: str) -> str:
    found = [line for line in lines if line.startswith(start)]
    assert len(found) == 1, lines
    assert "; " in found[0]  # the remedy
    return found[0]


def test_sizes_are_upright_and_modes_are_of_the_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((90, 70), 1).save(tmp_path / "turned.jpg", exif=exif)
    noise((90, 70), 2).save(tmp_path / "turned.tif", exif=exif)
    noise((90, 70), 3).convert("L").save(tmp_path / "grey.png")
    noise((90, 70), 4).convert("RGBA").save(tmp_path / "clear.png")
    noise((90, 70), 5).convert("P").save(tmp_path / "palette.png")
    values = np.asarray(noise((90, 70), 6).convert("L")).astype(np.uint16) * 200
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = check(tmp_path)
    sizes = dict(zip(found.names, found.sizes, strict=True))
    assert sizes.pop("turned.jpg") == sizes.pop("turned.tif") == (70, 90)
    assert set(sizes.values()) == {(90, 70)}
    expected = {"RGB": 2, "grey": 1, "RGB with transparency": 1, "palette": 1, "grey 16 bit": 1}
    assert found.modes == expected
    lines = advice(found, NEEDS)
    assert "1 of 6 images" in only(lines, "more than 8 bits") and "1 of 6 images" in only(lines, "transparent")
    assert "2 of 6 images" in only(lines, "grey among coloured")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    noise((80, 80)).save(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    found = check(tmp_path)
    assert found.names == ["good.png"]
    assert [name for name, _ in found.unreadable] == ["broken.jpg"]
    line = only(problems(tmp_path), "unreadable")
    assert "1 of 2 images (broken.jpg: not an image" in line and line.endswith("repair or remove them")
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="none of the 1 images can be used"):
        check(tmp_path)


def test_images_that_are_too_small_too_large_or_too_long(tmp_path: Path) -> None:
    sizes = {"tiny": (31, 100), "small": (63, 63), "fits": (64, 64), "large": (256, 256), "long": (70, 210)}
    for seed, (name, size) in enumerate(sizes.items()):
        noise(size, seed).save(tmp_path / f"{name}.png")
    lines = problems(tmp_path)
    assert "1 of 5 images (tiny.png)" in only(lines, "smaller than a global view of 32 px")
    assert "1 of 5 images (small.png)" in only(lines, "a short side below image_size of 64 px")
    assert "1 of 5 images (large.png)" in only(lines, "reduced to a quarter or less")
    assert "2 of 5 images (long.png, tiny.png)" in only(lines, "3 times as long as wide")
    assert len(lines) == 4
    kept = advice(check(tmp_path), Needs(global_size=32, image_size=0))
    assert not [line for line in kept if "reduced" in line or "image_size" in line]


def test_nothing_to_complain_about(tmp_path: Path) -> None:
    for seed in range(3):
        noise((80, 72), seed).save(tmp_path / f"{seed}.png")
    found = check(tmp_path)
    assert advice(found, NEEDS) == []
    text = describe(found, [])
    assert "no problems found" in text and "80 x 72 px, all of them" in text and "RGB 3" in text
    assert found == check(tmp_path, workers=1)


def write_splits(folder: Path) -> Path:
    """Three images of each split; val has one of train's, and no grass."""
    for number, split in enumerate(("train", "val")):
        write_labelled(folder / split, 3, size=(80, 72), prefix=split)
        for index, scene in enumerate(parse_landcover(f"landcover:arid:3:{number}").read(i) for i in range(3)):
            scene.resize((80, 72)).save(folder / split / "images" / f"{split}_{index}.png")
    Image.open(folder / "train/images/train_1.png").save(folder / "val/images/val_2.png")
    return folder


def test_labels_are_counted_as_by_a_loop(tmp_path: Path) -> None:
    folder = write_splits(tmp_path)
    label = np.asarray(Image.open(folder / "val/labels/val_0.png")).copy()
    label[:30] = 255
    Image.fromarray(label).save(folder / "val/labels/val_0.png")
    found = check(folder)
    assert [labels.split for labels in found.labels] == ["train", "val"]
    for labels in found.labels:
        pixels, images, ignored = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0), 0
        for file in sorted((folder / labels.split / "labels").iterdir()):
            values = np.asarray(Image.open(file)).ravel().tolist()
            ignored += values.count(255)
            for number, name in enumerate(CLASSES):
                pixels[name] += values.count(number)
                images[name] += number in values
        assert (labels.pixels, labels.images, labels.ignored) == (pixels, images, ignored)
        assert labels.unusable == []
    assert found.labels[1].ignored == 30 * 80
    soil = found.labels[0].pixels["soil"] / (3 * 80 * 72)
    row = next(line for line in describe(found, []).splitlines() if "soil" in line)
    assert f"{soil:.1%}" in row and str(found.labels[0].images["soil"]) in row


def test_near_duplicates_within_and_between_splits(tmp_path: Path) -> None:
    folder = write_splits(tmp_path)
    Image.open(folder / "train/images/train_0.png").save(folder / "train/images/train_2.png")
    found = check(folder)
    assert found.splits == {"train": 3, "val": 3}
    assert found.repeated == [Pair("train/images/train_2.png", "train/images/train_0.png", 0.0)]
    assert found.leaked == [Pair("val/images/val_2.png", "train/images/train_1.png", 0.0)]
    lines = advice(found, NEEDS)
    assert "1 of 3 images of val (val/images/val_2.png = train/images/train_1.png)" in only(
        lines, "near-duplicates of images of train"
    )
    assert "1 of 3 images (train/images/train_2.png = " in only(lines, "near-duplicates of an earlier image of train")
    assert only(lines, "glare pretrain takes").endswith("give --split train to keep the others unseen")
    text = describe(found, lines)
    assert "1 within a split, 1 between train and the other splits" in text
    assert text.count("\n! ") == len(lines)


def test_one_split_alone_is_one_set(tmp_path: Path) -> None:
    folder = write_splits(tmp_path)
    found = check(folder / "val")
    assert found.splits == {} and found.leaked == [] and found.repeated == []
    assert [(labels.split, sum(labels.pixels.values())) for labels in found.labels] == [("", 3 * 80 * 72)]
    assert check(folder / "val" / "images").labels == []


def test_labels_that_cannot_be_used_spare_their_images(tmp_path: Path) -> None:
    folder = write_splits(tmp_path)
    (folder / "train/labels/train_0.png").unlink()
    Image.fromarray(np.full((72, 80), 9, np.uint8)).save(folder / "val/labels/val_1.png")
    found = check(folder)
    assert len(found.names) == 6 and found.unreadable == []
    assert [[name for name, _ in labels.unusable] for labels in found.labels] == [
        ["train/images/train_0.png"],
        ["val/images/val_1.png"],
    ]
    lines = advice(found, NEEDS)
    assert "it has no label" in only(lines, "labels of train that cannot be used")
    assert "has the values 9" in only(lines, "labels of val that cannot be used")


def test_labels_without_classes_are_a_problem_and_no_end(tmp_path: Path) -> None:
    write_labelled(tmp_path, 2, size=(80, 72))
    (tmp_path / "classes.json").unlink()
    lines = problems(tmp_path)
    assert "has no classes.json" in only(lines, "labels that cannot be used")


def test_classes_that_are_missing(tmp_path: Path) -> None:
    folder = write_splits(tmp_path)
    for split, value in (("train", 0), ("val", 1)):
        for file in (folder / split / "labels").iterdir():
            Image.fromarray(np.full((72, 80), value, np.uint8)).save(file)
    lines = problems(folder)
    assert "grass; label them" in only(lines, "classes that never occur")
    assert "water; move some" in only(lines, "classes of val that train never shows")


def test_the_json_has_everything(tmp_path: Path) -> None:
    found = check(write_splits(tmp_path))
    values = json.loads(json.dumps(to_json(found, ["a line"], data="d")))
    assert values["num_images"] == 6 and values["problems"] == ["a line"] and values["data"] == "d"
    assert values["sizes"] == {"width": [80, 80, 80], "height": [72, 72, 72], "different": 1}
    assert values["leaked"][0] == {
        "name": "val/images/val_2.png",
        "other": "train/images/train_1.png",
        "difference": 0.0,
    }
    assert set(values["labels"][0]["pixels"]) == set(CLASSES)
