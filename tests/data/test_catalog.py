"""Data sets by name: each archive's layout read back exactly, its label rule, and what each mistake is told."""

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from labelled_samples import write_labelled
from numpy.typing import NDArray
from PIL import Image
from small_runs import FINETUNE, SHARED
from tiny_models import tiny_vit

from glare import cli, licences
from glare.comparison_data import open_pool
from glare.data import pets_study
from glare.data.catalog import CATALOG, STORED, named
from glare.data.labelled import default_split, open_labelled
from glare.data.landcover import parse_landcover
from glare.data.notices import say_once
from glare.data.sources import BadImage, open_source
from glare.data_check import check_data
from glare.errors import UserError
from glare.finetune import FinetuneRecipe
from glare.finetune_data import open_data
from glare.lineage import origin_of, public_name
from glare.metrics import confusion_matrix

IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITY = "aachen/aachen_00000{}_000019"


@dataclass(frozen=True)
class Archive:
    """Two images of each split, ``{split}`` and ``{}`` (a number) in the paths of image and label.

    ``values`` of labels -> what they mean here; ``folders`` split -> its name in the archive; ``lists`` likewise,
    of the files that name the images.
    """

    name: str
    image: str
    label: str
    values: dict[int, int]
    folders: dict[str, str]
    lists: dict[str, str] = field(default_factory=dict)
    mode: str = "L"

    def paths(self, split: str) -> list[str]:
        first = 1 + 2 * list(self.folders).index(split)
        return [self.image.format(number, split=self.folders[split]) for number in (first, first + 1)]

    def labels(self, split: str) -> list[str]:
        first = 1 + 2 * list(self.folders).index(split)
        return [self.label.format(number, split=self.folders[split]) for number in (first, first + 1)]

    def write(self, root: Path) -> Path:
        for split in self.folders:
            for image, label in zip(self.paths(split), self.labels(split), strict=True):
                save(root / image, Image.fromarray(pixels(image, len(self.values))))
                if not (self.name in ("cityscapes", "loveda") and split == "test"):
                    save(root / label, as_mode(raw(self.values, label), self.mode))
        for split, file in self.lists.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text("".join(f"{Path(image).stem} 1 1 1\n" for image in self.paths(split)))
        return root


def pixels(name: str, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(list(name.encode())).integers(0, 256, (3, width, 3), np.uint8)


def raw(values: dict[int, int], name: str) -> NDArray[np.int64]:
    """Each value three times, in another order in each row and each file."""
    rng = np.random.default_rng(list(name.encode()))
    return np.stack([rng.permutation(list(values)) for _ in range(3)])


def expected(values: dict[int, int], name: str) -> NDArray[np.uint8]:
    return np.vectorize(values.__getitem__)(raw(values, name)).astype(np.uint8)


def as_mode(values: NDArray[np.int64], mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    return image


def save(file: Path, image: Image.Image) -> None:
    """As PNG, whatever it is called, so that images come back exactly."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, format="PNG")


CLASSIC = {"train": "train", "val": "val", "test": "test"}
ARCHIVES = {
    "ade20k": Archive(
        "ade20k",
        "images/{split}/ADE_{}.jpg",
        "annotations/{split}/ADE_{}.png",
        {0: 255} | {k: k - 1 for k in range(1, 151)},
        {"train": "training", "val": "validation"},
    ),
    "pascal_context": Archive(
        "pascal_context",
        "JPEGImages/2008_00{}.jpg",
        "SegmentationClassContext/2008_00{}.png",
        {k: k for k in range(60)},
        {"train": "", "val": ""},
        {split: f"ImageSets/SegmentationContext/{split}.txt" for split in ("train", "val")},
    ),
    "cityscapes, train ids": Archive(
        "cityscapes",
        f"leftImg8bit/{{split}}/{CITY}_leftImg8bit.png",
        f"gtFine/{{split}}/{CITY}_gtFine_labelTrainIds.png",
        {255: 255} | {k: k for k in range(19)},
        CLASSIC,
    ),
    "cityscapes, ids": Archive(
        "cityscapes",
        f"leftImg8bit/{{split}}/{CITY}_leftImg8bit.png",
        f"gtFine/{{split}}/{CITY}_gtFine_labelIds.png",
        {k: IDS.index(k) if k in IDS else 255 for k in range(34)},
        CLASSIC,
        mode="P",
    ),
    "loveda": Archive(
        "loveda",
        "{split}/Urban/images_png/{}.png",
        "{split}/Urban/masks_png/{}.png",
        {0: 255} | {k: k - 1 for k in range(1, 8)},
        {"train": "Train", "val": "Val", "test": "Test"},
    ),
    "loveda of mmsegmentation, 16 bits": Archive(
        "loveda",
        "img_dir/{split}/{}.png",
        "ann_dir/{split}/{}.png",
        {0: 255} | {k: k - 1 for k in range(1, 8)},
        CLASSIC,
        mode="I;16",
    ),
    "camvid": Archive(
        "camvid",
        "{split}/0001TP_{}.png",
        "{split}annot/0001TP_{}.png",
        {11: 255} | {k: k for k in range(11)},
        CLASSIC,
        mode="P",
    ),
    "oxford_pets": Archive(
        "oxford_pets",
        "images/Abyssinian_{}.jpg",
        "annotations/trimaps/Abyssinian_{}.png",
        {1: 0, 2: 1, 3: 2},
        {"train": "", "test": ""},
        {"train": "annotations/trainval.txt", "test": "annotations/test.txt"},
    ),
}
"""What lies in the archives, as their pages and readers say."""

each_archive = pytest.mark.parametrize("archive", ARCHIVES.values(), ids=ARCHIVES)


def public(archive: Archive) -> list[str]:
    """The splits with labels."""
    return [split for split in archive.folders if split not in CATALOG[archive.name].unlabelled]


# what the papers count


@pytest.mark.parametrize(
    ("name", "classes", "counts"),
    [
        ("ade20k", 150, {"train": 20210, "val": 2000}),
        ("pascal_context", 60, {"train": 4998, "val": 5105}),
        ("cityscapes", 19, {"train": 2975, "val": 500, "test": 1525}),
        ("loveda", 7, {"train": 2522, "val": 1669, "test": 1796}),
        ("camvid", 11, {"train": 367, "val": 101, "test": 233}),
        ("oxford_pets", 3, {"train": 3680, "test": 3669}),
        ("landcover", 7, {}),
    ],
)
def test_classes_and_counts_are_those_of_the_papers(name: str, classes: int, counts: dict[str, int]) -> None:
    entry = CATALOG[name]
    assert entry.counts == counts and entry.name == name
    names, palette = entry.classes.names, entry.classes.palette
    assert len(names) == len(set(names)) == len(palette) == classes and all(n == " ".join(n.split()) for n in names)
    ways = [entry.values, *(way.values for layout in entry.layouts for way in layout.labels)]
    assert all(sorted(values.classes.values()) == list(range(classes)) for values in ways)
    assert not any(values.ignored & values.classes.keys() for values in ways)


def test_some_classes_by_index() -> None:
    """Indices that other code bases print: a list that slipped by one would differ."""
    at = {name: CATALOG[name].classes.names for name in CATALOG}
    assert [at["ade20k"][k] for k in (0, 12, 59, 89, 149)] == ["wall", "person", "stairway", "television", "flag"]
    assert at["ade20k"][91] == "dirt track"
    assert [at["pascal_context"][k] for k in (0, 1, 30, 59)] == ["background", "aeroplane", "cup", "wood"]
    assert [at["cityscapes"][k] for k in (0, 10, 13, 18)] == ["road", "sky", "car", "bicycle"]
    assert CATALOG["cityscapes"].classes.palette[13] == (0, 0, 142)
    assert at["loveda"] == at["landcover"] == tuple(parse_landcover("landcover:arid").classes)
    assert CATALOG["ade20k"].classes.palette[149] == (92, 0, 255)


DIGESTS = {
    "ade20k": "7a565e83cc0e8630",
    "pascal_context": "4f70ef34608c74c6",
    "cityscapes": "ec48b97380d3b479",
    "loveda": "d30d484bc0472f03",
    "camvid": "ea5d5a1ad5a3ce38",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_names_and_colours_are_those_that_were_compared_with_the_sources(name: str) -> None:
    """All of them: with mmsegmentation's data sets, of CamVid with the script of SegNet's tutorial."""
    classes = CATALOG[name].classes
    assert hashlib.sha256(repr((classes.names, classes.palette)).encode()).hexdigest()[:16] == DIGESTS[name]


# layouts


@each_archive
def test_an_archive_is_read_back_exactly(archive: Archive, tmp_path: Path) -> None:
    archive.write(tmp_path)
    entry = CATALOG[archive.name]
    for split in public(archive):
        found = open_labelled(f"{archive.name}:{tmp_path}", split=split)
        assert found.classes == list(entry.classes.names)
        assert found.palette.tolist() == [list(colour) for colour in entry.classes.palette]
        assert list(found.names) == archive.paths(split)
        for index, (name, label_name) in enumerate(zip(archive.paths(split), archive.labels(split), strict=True)):
            image, label = found.read(index)
            assert np.array_equal(np.asarray(image), pixels(name, len(archive.values)))
            assert label.dtype == np.uint8 and np.array_equal(label, expected(archive.values, label_name))
    images = open_source(f"{archive.name}:{tmp_path}")
    assert images.names == archive.paths("train")
    assert np.array_equal(np.asarray(images.read(1)), pixels(images.names[1], len(archive.values)))


@each_archive
def test_what_is_ignored_is_never_counted(archive: Archive, tmp_path: Path) -> None:
    archive.write(tmp_path)
    data = open_labelled(f"{archive.name}:{tmp_path}", split="train")
    label = torch.from_numpy(data.read(0)[1])
    count = len(data.classes)
    matrix = confusion_matrix(torch.zeros_like(label), label, num_classes=count, ignore_index=data.ignore_index)
    ignored = sum(meaning == 255 for meaning in archive.values.values())
    assert matrix.sum() == 3 * (len(archive.values) - ignored)
    assert matrix.sum(dim=1).tolist() == [3] * count


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("ade20k", "ADEChallengeData2016"),
        ("pascal_context", "VOCdevkit/VOC2010"),
        ("pascal_context", "VOC2010"),
        ("camvid", "CamVid"),
        ("loveda", "LoveDA"),
    ],
)
def test_the_folder_above_will_do(name: str, below: str, tmp_path: Path) -> None:
    ARCHIVES[name].write(tmp_path / below)
    assert list(open_labelled(f"{name}:{tmp_path}", split="val").names) == ARCHIVES[name].paths("val")


def test_loveda_is_urban_and_rural(tmp_path: Path) -> None:
    archive = ARCHIVES["loveda"].write(tmp_path)
    for kind in ("images_png", "masks_png"):
        (archive / "Val" / "Urban" / kind / "4.png").rename(archive / "Val" / "Urban" / kind / "7.png")
        (archive / "Val" / "Rural" / kind).mkdir(parents=True)
        (archive / "Val" / "Urban" / kind / "3.png").rename(archive / "Val" / "Rural" / kind / "7.png")
    found = open_labelled(f"loveda:{tmp_path}", split="val")
    assert list(found.names) == ["Val/Urban/images_png/7.png", "Val/Rural/images_png/7.png"]
    first, second = (found.read(index)[1] for index in range(2))
    assert np.array_equal(first, expected(ARCHIVES["loveda"].values, "Val/Urban/masks_png/4.png"))
    assert np.array_equal(second, expected(ARCHIVES["loveda"].values, "Val/Urban/masks_png/3.png"))


def test_train_ids_come_before_ids(tmp_path: Path) -> None:
    """Where both files lie side by side, as createTrainIdLabelImgs leaves them, an image has one label."""
    first, second = ARCHIVES["cityscapes, train ids"], ARCHIVES["cityscapes, ids"]
    second.write(tmp_path)
    first.write(tmp_path)
    found = open_labelled(f"cityscapes:{tmp_path}", split="val")
    assert np.array_equal(found.read(0)[1], expected(first.values, first.labels("val")[0]))
    (tmp_path / first.labels("val")[0]).unlink()
    with pytest.raises(BadImage, match=r"labelIds.png has 34 x 3 px, the image 20 x 3"):
        found.read(0)
    save(tmp_path / second.labels("val")[0], Image.new("L", (20, 3), 26))
    assert (found.read(0)[1] == 13).all()


def test_stray_files_of_the_pets_archive_are_left_out(tmp_path: Path) -> None:
    ARCHIVES["oxford_pets"].write(tmp_path)
    (tmp_path / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB 5.0")
    (tmp_path / "annotations" / "trimaps" / "._Abyssinian_1.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "annotations" / "trainval.txt").write_text("# Image CLASS-ID SPECIES BREED ID\n\nAbyssinian_1 1 1 1\n")
    found = open_labelled(f"oxford_pets:{tmp_path}", split="train")
    assert list(found.names) == ["images/Abyssinian_1.jpg"]
    assert found.read(0)[1].max() == 2


def test_match_and_default_splits(tmp_path: Path) -> None:
    ARCHIVES["camvid"].write(tmp_path)
    assert list(open_labelled(f"camvid:{tmp_path}", split="val", match="*_4").names) == ["val/0001TP_4.png"]
    usual = {name: (default_split(name, "train"), default_split(name, "val")) for name in STORED}
    assert usual.pop("oxford_pets") == ("train", "test")
    assert set(usual.values()) == {("train", "val")}


def test_a_comparison_has_train_and_what_is_measured_on(tmp_path: Path) -> None:
    ARCHIVES["oxford_pets"].write(tmp_path)
    pool = open_pool(f"oxford_pets:{tmp_path}", match=None)
    assert pool.parts == ["train", "train", "val", "val"]
    assert pool.data.names[2] == "val/images/Abyssinian_3.jpg"
    values = expected(ARCHIVES["oxford_pets"].values, "annotations/trimaps/Abyssinian_3.png")
    assert np.array_equal(pool.data.read(2)[1], values)


def test_a_check_of_the_data_counts_the_labels_by_the_rule(tmp_path: Path) -> None:
    ARCHIVES["ade20k"].write(tmp_path)
    data = f"ade20k:{tmp_path}"
    found = check_data(open_source(data), data, short_side=None)
    assert found.labels[0].ignored == 6
    assert set(found.labels[0].pixels.values()) == {6} and len(found.labels[0].pixels) == 150
    for label in (tmp_path / "annotations" / "training").iterdir():
        label.unlink()
    (tmp_path / "annotations" / "training").rmdir()
    assert check_data(open_source(data), data, short_side=None).labels == []


def test_images_of_a_split(tmp_path: Path) -> None:
    """Of an archive by its name, of a folder by its sub-folder; None is train there and everything here."""
    archive = ARCHIVES["loveda"]
    archive.write(tmp_path / "archive")
    data = f"loveda:{tmp_path}/archive"
    for split, found in ((None, "train"), ("train", "train"), ("val", "val"), ("test", "test")):
        assert list(open_source(data, split=split).names) == archive.paths(found)
    check = check_data(open_source(data, split="val"), data, split="val", short_side=None)
    assert check.names == archive.paths("val") and sum(check.labels[0].pixels.values()) > 0

    folder = tmp_path / "folder"
    for split, count in (("train", 3), ("val", 2)):
        write_labelled(folder / split, count)
    assert len(open_source(str(folder))) == 5
    images = open_source(str(folder), split="val")
    assert list(images.names) == ["images/scene_0.png", "images/scene_1.png"]
    found = check_data(images, str(folder), split="val", short_side=None)
    assert found.names == images.names and len(found.labels) == 1 and not found.labels[0].unusable


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    ARCHIVES["loveda"].write(tmp_path / "archive")
    write_labelled(tmp_path / "folder" / "train", 1)
    image = tmp_path / "folder" / "train" / "images" / "scene_0.png"
    for data, split, message in (
        (f"loveda:{tmp_path}/archive", "vall", "loveda has no split 'vall'; choose one of train, val, test"),
        (str(tmp_path / "folder"), "val", "has no split 'val', which would be val/images; it has train"),
        (str(tmp_path / "folder"), "../folder/train", "has no split '../folder/train', .* it has train"),
        (str(tmp_path / "folder" / "train"), "val", "has no split 'val', which would be val/images; leave split out"),
        (str(image), "val", "has no splits to choose from, 'val' was asked for; leave split out"),
        ("landcover:arid:3", "val", "has no splits to choose from"),
        ("owner/name", "val", "neither an existing path nor a loadable Hub data set"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(data, split=split)


# what is not right


@each_archive
def test_a_number_that_differs_is_said_once_in_a_line(
    archive: Archive, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive.write(tmp_path)
    data = f"{archive.name}:{tmp_path}"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            open_labelled(data, split="train")
            open_source(data)
    whole = CATALOG[archive.name].counts["train"]
    title = CATALOG[archive.name].title
    assert caplog.messages == [f"{data}: train has 2 images here, {whole:,} in the whole of {title}"]


def test_only_the_main_process_of_a_run_says_the_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ARCHIVES["loveda"].write(tmp_path)
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        say_once.cache_clear()
        open_source(f"loveda:{tmp_path}")
        assert len(caplog.messages) == lines


def test_a_number_that_is_right_is_not_said_and_one_too_many_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOG["camvid"].counts, "train", 2)
    data = f"camvid:{ARCHIVES['camvid'].write(tmp_path)}"
    open_labelled(data, split="train")
    assert caplog.messages == []
    monkeypatch.setitem(CATALOG["camvid"].counts, "train", 1)
    open_labelled(data, split="train")
    assert caplog.messages == [f"{data}: train has 2 images here, 1 in the whole of CamVid"]


def test_values_that_are_no_class_spoil_the_image(tmp_path: Path) -> None:
    ARCHIVES["ade20k"].write(tmp_path)
    label = tmp_path / "annotations" / "validation" / "ADE_3.png"
    for wrong, shown in ((151, "151"), (255, "255"), (40000, "40000")):
        values = raw(ARCHIVES["ade20k"].values, "annotations/validation/ADE_3.png")
        values[0, 0] = wrong
        save(label, as_mode(values, "I;16"))
        found = open_labelled(f"ade20k:{tmp_path}", split="val")
        with pytest.raises(BadImage, match=rf"ADE_3.png has the values {shown}; allowed in ADE20K are 0 to 150"):
            found.read(0)


@pytest.mark.usefixtures("own_cache")
def test_a_wrong_value_of_cityscapes_is_told_which_ids_are_expected_there(tmp_path: Path) -> None:
    archive = ARCHIVES["cityscapes, ids"]
    archive.write(tmp_path / "archive")
    save(tmp_path / "archive" / archive.labels("val")[0], Image.new("L", (34, 3), 40))
    (tmp_path / "tables").mkdir()
    save(tmp_path / "26.png", Image.new("L", (20, 3), 26))
    picture = {"bytes": (tmp_path / "26.png").read_bytes(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [picture], "label": [picture]}, features=features)
    rows.to_parquet(tmp_path / "tables" / "val.parquet")
    for place, expected_text in (
        ("tables", "has the values 26; allowed in Cityscapes are the train ids 0 to 18 and 255: give labels of these"),
        ("archive", "has the values 40; allowed in Cityscapes are the label ids 0 to 33: give labels of these"),
    ):
        found = open_labelled(f"cityscapes:{tmp_path / place}", split="val")
        with pytest.raises(BadImage, match=expected_text):
            found.read(0)


def test_labels_that_are_missing(tmp_path: Path) -> None:
    ARCHIVES["camvid"].write(tmp_path)
    (tmp_path / "valannot" / "0001TP_3.png").unlink()
    found = open_labelled(f"camvid:{tmp_path}", split="val")
    with pytest.raises(BadImage, match=r"it has no label .*valannot/0001TP_3.png; add that file"):
        found.read(0)
    assert found.read(1)
    (tmp_path / "valannot" / "0001TP_4.png").unlink()
    (tmp_path / "valannot").rmdir()
    with pytest.raises(UserError, match=r"CamVid val in .* has images without labels, which would be .*valannot/"):
        open_labelled(f"camvid:{tmp_path}", split="val")


@pytest.mark.parametrize("name", ["cityscapes, ids", "loveda"])
def test_splits_without_public_labels(name: str, tmp_path: Path) -> None:
    archive = ARCHIVES[name]
    archive.write(tmp_path)
    with pytest.raises(UserError, match="test are not public; give --split train or val"):
        open_labelled(f"{archive.name}:{tmp_path}", split="test")


def test_splits_that_are_none(tmp_path: Path) -> None:
    data = f"ade20k:{ARCHIVES['ade20k'].write(tmp_path)}"
    with pytest.raises(UserError, match=r"ade20k has no split 'validation'; choose one of train, val$"):
        open_labelled(data, split="validation")
    with pytest.raises(UserError, match=r"ade20k has several splits; choose one of train, val$"):
        open_labelled(data)
    pets = f"oxford_pets:{ARCHIVES['oxford_pets'].write(tmp_path / 'pets')}"
    with pytest.raises(UserError, match=r"choose one of train, test, study:test and study:N \(N of 250, "):
        open_labelled(pets, split="val")


@pytest.mark.parametrize("line", ["../../secret", "/etc/passwd", "a/b", "..", ".hidden", "a\\..\\b", "x" * 300 + "/"])
@pytest.mark.parametrize("name", ["pascal_context", "oxford_pets"])
def test_a_list_that_leads_out_of_the_archive_is_refused(name: str, line: str, tmp_path: Path) -> None:
    archive = ARCHIVES[name]
    archive.write(tmp_path / "inside")
    save(tmp_path / "secret.jpg", Image.new("RGB", (3, 3)))
    save(tmp_path / "secret.png", Image.new("L", (3, 3)))
    file = tmp_path / "inside" / archive.lists["train"]
    file.write_text(f"{Path(archive.paths('train')[0]).stem} 1\n{line} 1\n")
    for opened in (open_source, lambda data: open_labelled(data, split="train")):
        with pytest.raises(UserError, match=r"line 2 of .*; allowed are names of images without folders") as caught:
            opened(f"{name}:{tmp_path / 'inside'}")
        assert len(str(caught.value)) < 600


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    data = f"oxford_pets:{ARCHIVES['oxford_pets'].write(tmp_path)}"
    file = tmp_path / "annotations" / "test.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"the list .*test.txt' cannot be read .*; write it again in UTF-8"):
        open_labelled(data, split="test")
    file.write_text("\n")
    with pytest.raises(UserError, match=r"has no images in images; unpack https://www\.robots.ox.ac.uk"):
        open_labelled(data, split="test")
    file.unlink()
    with pytest.raises(UserError, match=r"the list .*test.txt' is missing; unpack the whole archive"):
        open_labelled(data, split="test")
    ARCHIVES["oxford_pets"].write(tmp_path)
    (tmp_path / "images" / "Abyssinian_3.jpg").unlink()
    with pytest.raises(BadImage, match=r"images/Abyssinian_3\.jpg: "):
        open_labelled(data, split="test").read(0)


def test_a_name_without_a_place() -> None:
    for name in set(STORED) - {"ade20k"}:
        entry = CATALOG[name]
        for opened in (open_source, lambda data: open_labelled(data, split="train")):
            with pytest.raises(UserError) as caught:
                opened(name)
            said = str(caught.value)
            assert entry.archive in said and entry.terms in said and f"--data {name}:FOLDER" in said
            assert "\n" not in said


def test_places_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names '/no/such', which is no folder; give the folder of the unpacked"):
        open_source("loveda:/no/such")
    with pytest.raises(UserError, match="'loveda:' has nothing behind the colon; give --data loveda:FOLDER"):
        open_labelled("loveda:")
    with pytest.raises(UserError, match=r"does not hold LoveDA train .*Train/Urban/images_png and .*or img_dir/train"):
        open_source(f"loveda:{tmp_path}")
    ARCHIVES["ade20k"].write(tmp_path)
    with pytest.raises(UserError, match="does not hold Cityscapes val as its archive does"):
        open_labelled(f"cityscapes:{tmp_path}", split="val")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="which is no folder"):
        open_source(f"camvid:{tmp_path / 'file'}")


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("ade20k", "images"),
        ("ade20k", "annotations/validation"),
        ("loveda", "Train"),
        ("loveda", "Val/Urban/images_png"),
        ("cityscapes, ids", "leftImg8bit"),
        ("camvid", "val"),
        ("oxford_pets", "images"),
        ("pascal_context", "ImageSets"),
        ("cityscapes, ids", ".."),
    ],
)
def test_a_wrong_level_of_an_archive_is_told_the_right_one(name: str, level: str, tmp_path: Path) -> None:
    archive = ARCHIVES[name]
    root = archive.write(tmp_path / "archive")
    split = list(archive.folders)[1]
    with pytest.raises(UserError) as caught:
        open_labelled(f"{archive.name}:{(root / level).resolve()}", split=split)
    assert f"which is {str(root)!r}; give --data {archive.name}:{root}" in str(caught.value)


def test_a_folder_beside_an_archive_is_no_part_of_it(tmp_path: Path) -> None:
    ARCHIVES["loveda"].write(tmp_path / "LoveDA")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"does not hold LoveDA val as its archive does .*; unpack https://zenodo"):
        open_labelled(f"loveda:{tmp_path / 'other'}", split="val")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ade20", "ade20k"),
        ("ADE20K", "ade20k"),
        ("lovda:somewhere", "loveda:somewhere"),
        ("oxford-pets", "oxford_pets"),
        ("cityscape", "cityscapes"),
    ],
)
def test_a_name_near_to_a_known_one(given: str, meant: str) -> None:
    for opened in (open_source, open_labelled):
        with pytest.raises(UserError, match=f"; the catalog has '{meant}'"):
            opened(given)


def test_a_name_near_to_none() -> None:
    for opened in (open_source, open_labelled):
        with pytest.raises(UserError) as caught:
            opened("zzz")
        assert "catalog" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in ARCHIVES if "mmsegmentation" not in key])
def test_an_archive_without_its_name_is_recognised(key: str, tmp_path: Path) -> None:
    archive = ARCHIVES[key]
    archive.write(tmp_path)
    title = CATALOG[archive.name].title
    for opened, otherwise in ((open_source, "the folder of its images alone"), (open_labelled, "arrange it so")):
        hint = rf"looks like {title}, .* give --data {archive.name}:{tmp_path} or, if it is something else, {otherwise}"
        with pytest.raises(UserError, match=hint):
            opened(str(tmp_path))


def test_a_part_of_an_archive_with_its_labels_is_recognised_and_images_alone_are_not(tmp_path: Path) -> None:
    ARCHIVES["loveda"].write(tmp_path)
    with pytest.raises(UserError, match=f"looks like LoveDA, .* give --data loveda:{tmp_path} or"):
        open_source(str(tmp_path / "Train"))
    assert len(open_source(str(tmp_path / "Train" / "Urban" / "images_png"))) == 2
    ARCHIVES["camvid"].write(tmp_path / "camvid")
    assert len(open_source(str(tmp_path / "camvid" / "train"))) == 2


def test_what_lies_there_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "camvid" / "a.png", Image.new("RGB", (3, 3)))
    monkeypatch.chdir(tmp_path)
    assert open_source("camvid").names == ["a.png"]
    assert named("camvid") is None and named("landcover:arid") is None and named("owner/ade20k") is None


# the Hub and tables


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def table(archive: Archive, split: str, image: str = "image", label: str | None = "label") -> datasets.Dataset:
    """The archive's images and labels as rows."""
    width = len(archive.values)
    columns: dict[str, Any] = {image: [Image.fromarray(pixels(name, width)) for name in archive.paths(split)]}
    if label is not None:
        columns[label] = [as_mode(raw(archive.values, name), "L") for name in archive.labels(split)]
    features = datasets.Features({name: datasets.Image() for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def assert_rows(data: str, archive: Archive, split: str) -> None:
    found = open_labelled(data, split=split)
    assert list(found.names) == ["000000", "000001"]
    for index, (name, label) in enumerate(zip(archive.paths(split), archive.labels(split), strict=True)):
        image, values = found.read(index)
        assert np.array_equal(np.asarray(image), pixels(name, len(archive.values)))
        assert np.array_equal(values, expected(archive.values, label))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("script", [False, True])
def test_the_copy_on_the_hub(script: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its tables, or those that the Hub made of it while it is a program; of one split alone."""
    archive, real, asked = ARCHIVES["ade20k"], datasets.load_dataset, []
    folder = tmp_path / "hub" / "scene_parsing"
    for split, theirs in (("train", "train"), ("val", "validation")):
        (folder / theirs).mkdir(parents=True)
        table(archive, split, label="annotation").to_parquet(folder / theirs / "0000.parquet")

    def load(name: str, config: str | None = None, **options: Any) -> Any:
        asked.append(options["split"])
        assert "trust_remote_code" not in options
        if name == "parquet":
            return real(name, **options)
        assert (name, config) == ("zhoubolei/scene_parse_150", "scene_parsing")
        if script:
            raise RuntimeError("Dataset scripts are no longer supported, but found scene_parse_150.py")
        return real("parquet", data_files={options["split"]: f"{folder}/{options['split']}/*"}, **options)

    def download(name: str, *, repo_type: str, revision: str, allow_patterns: str) -> str:
        assert (name, repo_type, revision) == ("zhoubolei/scene_parse_150", "dataset", "refs/convert/parquet")
        assert script and allow_patterns == f"scene_parsing/{asked[-1]}/*.parquet"
        return str(tmp_path / "hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("glare.data.tables.snapshot_download", download)
    assert_rows("ade20k", archive, "val")
    assert set(asked) == {"validation"} and len(asked) == 1 + script
    images = open_source("ade20k")
    assert np.array_equal(np.asarray(images.read(0)), pixels(archive.paths("train")[0], len(archive.values)))


def test_a_copy_on_the_hub_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it\nmore")

    for place in ("datasets.load_dataset", "glare.data.downloads.load"):
        monkeypatch.setattr(place, fail)
    monkeypatch.setattr("glare.data.tables.snapshot_download", fail)
    expected_text = r"zhoubolei/scene_parse_150, cannot be loaded \(Couldn't reach it\); .* --data ade20k:FOLDER"
    with pytest.raises(UserError, match=expected_text):
        open_labelled("ade20k", split="val")
    with pytest.raises(
        UserError, match=r"'loveda:me/copy' is neither an existing path nor a loadable Hub .* \(Couldn't reach it\)"
    ):
        open_source("loveda:me/copy")


def test_a_copy_of_the_user_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = ARCHIVES["loveda"]
    splits = datasets.DatasetDict({"train": table(archive, "train"), "validation": table(archive, "val")})
    copies = {("me/copy", None): splits, ("me/copies", "whole"): splits}

    def load(hub_id: str, *, name: str | None = None, **_: bool) -> datasets.DatasetDict:
        if (hub_id, name) not in copies:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['whole', 'parts']")
        return copies[hub_id, name]

    monkeypatch.setattr("glare.data.downloads.load", load)
    assert_rows("loveda:me/copy", archive, "val")
    assert_rows("loveda:me/copies:whole", archive, "val")
    with pytest.raises(UserError, match="has configurations 'whole', 'parts'; give one as loveda:me/copies:NAME"):
        open_source("loveda:me/copies")
    assert origin_of("dataset", "loveda:me/copy").name == "LoveDA"


@pytest.mark.usefixtures("own_cache")
def test_a_folder_of_parquet_files_of_the_user(tmp_path: Path) -> None:
    archive, folder = ARCHIVES["loveda"], tmp_path / "tables" / "data"
    folder.mkdir(parents=True)
    table(archive, "train", "picture", "mask").to_parquet(folder / "train-00000-of-00001.parquet")
    table(archive, "val", "picture", "mask").to_parquet(folder / "validation-00000-of-00001.parquet")
    assert_rows(f"loveda:{tmp_path / 'tables'}", archive, "val")
    images = open_source(f"loveda:{tmp_path / 'tables'}")
    assert np.array_equal(np.asarray(images.read(1)), pixels(archive.paths("train")[1], len(archive.values)))
    with pytest.raises(UserError, match="has no split 'val'; it has train"):
        (folder / "validation-00000-of-00001.parquet").unlink()
        open_labelled(f"loveda:{tmp_path / 'tables'}", split="val")


@pytest.mark.usefixtures("own_cache")
def test_tables_without_labels_and_with_one_missing(tmp_path: Path) -> None:
    archive = ARCHIVES["loveda"]
    for name in ("images", "gaps"):
        (tmp_path / name).mkdir()
    table(archive, "train", label=None).to_parquet(tmp_path / "images" / "train.parquet")
    assert len(open_source(f"loveda:{tmp_path / 'images'}")) == 2
    with pytest.raises(UserError, match="has no column of labels among image; give tables with the pictures 'image'"):
        open_labelled(f"loveda:{tmp_path / 'images'}", split="train")
    rows = table(archive, "train")
    features = rows.features
    gaps = [{"image": row["image"], "label": None} for row in rows]
    datasets.Dataset.from_list(gaps, features=features).to_parquet(tmp_path / "gaps" / "train.parquet")
    with pytest.raises(BadImage, match="000000: the row has no label"):
        open_labelled(f"loveda:{tmp_path / 'gaps'}", split="train").read(0)


# the study on few labels


def test_the_study_s_budgets_are_nested_and_leave_its_test_images_alone() -> None:
    names = [f"pet_{number}" for number in range(7349)]
    test = pets_study.study_split(names, "study:test")
    budgets = [pets_study.study_split(names, f"study:{count}") for count in pets_study.BUDGETS]
    assert len(test) == len(set(test)) == 1000
    assert [len(set(budget)) for budget in budgets] == [250, 500, 1000, 2000, 4000, 6000]
    for smaller, larger in pairwise(budgets):
        assert set(smaller) < set(larger)
    assert not set(test) & set(budgets[-1])
    assert pets_study.study_split(names[::-1], "study:250:0") == budgets[0]  # whatever the order of the list
    other = [set(pets_study.study_split(names, f"study:{count}:1")) for count in (250, 6000)]
    assert other[0] < other[1] and not other[1] & set(test)
    assert len(other[0] & set(budgets[0])) < 50  # 10 are to be expected


@pytest.mark.parametrize(
    "split", ["study", "study:", "study:300", "study:250:x", "study:250:1:2", "study:test:1", "study:²", "study::"]
)
def test_splits_that_the_study_does_not_have(split: str) -> None:
    with pytest.raises(UserError, match=r"the study's are study:test and study:N with N of 250, 500"):
        pets_study.study_split(["a"] * 7349, split)
    with pytest.raises(UserError, match="needs 1,250 images, the list has 3; use the whole archive"):
        pets_study.study_split(["a", "b", "c"], "study:250")


def test_the_study_s_split_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = ARCHIVES["oxford_pets"]
    archive.write(tmp_path)
    every = [Path(name).stem for split in archive.folders for name in archive.paths(split)]
    (tmp_path / "annotations" / "list.txt").write_text("#Image CLASS-ID\n" + "".join(f"{n} 1 1 1\n" for n in every))
    monkeypatch.setattr(pets_study, "TEST_IMAGES", 1)
    monkeypatch.setattr(pets_study, "BUDGETS", (1, 3))
    data = f"oxford_pets:{tmp_path}"
    parts = {part: set(open_labelled(data, split=f"study:{part}").names) for part in ("test", "1", "3")}
    assert parts["1"] < parts["3"] and not parts["3"] & parts["test"]
    assert parts["3"] | parts["test"] == {f"images/{name}.jpg" for name in every}


def test_the_study_is_measured_on_its_own_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = ARCHIVES["oxford_pets"]
    archive.write(tmp_path)
    every = [Path(name).stem for split in archive.folders for name in archive.paths(split)]
    (tmp_path / "annotations" / "list.txt").write_text("".join(f"{n} 1 1 1\n" for n in every))
    monkeypatch.setattr(pets_study, "TEST_IMAGES", 1)
    monkeypatch.setattr(pets_study, "BUDGETS", (1, 3))
    recipe = FinetuneRecipe(model="m", data=f"oxford_pets:{tmp_path}", output=tmp_path / "run")
    train, val = open_data(replace(recipe, train_split="study:3"))
    assert val is not None and len(train) == 3 and not set(train.names) & set(val.names)
    assert val.names == open_labelled(recipe.data, split="study:test").names
    with pytest.raises(UserError, match=r"of the 2 images to evaluate on are among .*; give --val-split study:test, "):
        open_data(replace(recipe, train_split="study:3", val_split="test"))
    held = "train" if val.names[0] in open_labelled(recipe.data, split="train").names else "test"
    with pytest.raises(UserError, match=r"1 of the 1 images .* give a --train-split of the study, too"):
        open_data(replace(recipe, train_split=held, val_split="study:test"))
    train, val = open_data(recipe)
    assert (train.names, val and val.names) == (archive.paths("train"), archive.paths("test"))


@pytest.mark.usefixtures("own_cache")
def test_rows_of_different_splits_are_different_images(tmp_path: Path) -> None:
    archive, folder = ARCHIVES["loveda"], tmp_path / "tables"
    folder.mkdir()
    for split, file in (("train", "train.parquet"), ("val", "validation.parquet")):
        table(archive, split).to_parquet(folder / file)
    recipe = FinetuneRecipe(model="m", data=f"loveda:{folder}", output=tmp_path / "run")
    train, val = open_data(recipe)
    assert val is not None and train.names == val.names
    with pytest.raises(UserError, match="2 of the 2 images to evaluate on are among those to train on"):
        open_data(replace(recipe, val_split="train"))


# licences and cards


def test_licence_and_name_of_a_data_set_by_name(tmp_path: Path) -> None:
    found = origin_of("dataset", f"loveda:{tmp_path}/secret/LoveDA-copy")
    assert found.name == public_name(f"loveda:{tmp_path}/secret/LoveDA-copy") == "LoveDA"
    assert found.licence.id == "cc-by-nc-sa-4.0" and found.licence.non_commercial and found.hub_id is None
    hub = origin_of("dataset", "ade20k")
    assert (hub.name, hub.hub_id) == ("ADE20K", "zhoubolei/scene_parse_150")
    assert hub.licence.non_commercial and hub.licence.metadata()["license"] == "other"
    assert origin_of("dataset", f"ade20k:{tmp_path}").hub_id is None
    assert origin_of("dataset", f"cityscapes:{tmp_path}").licence.non_commercial
    configured = origin_of("dataset", "owner/name:winter")
    assert (configured.name, configured.hub_id) == ("owner/name:winter", "owner/name")
    assert not origin_of("dataset", f"oxford_pets:{tmp_path}").licence.non_commercial
    assert origin_of("dataset", f"pascal_context:{tmp_path}").licence == licences.UNKNOWN


# the whole way


def test_fine_tuning_and_evaluation_by_name(tmp_path: Path) -> None:
    """The command line, a name in the catalog, the files of the run and what its card says."""
    folder = tmp_path / "private" / "my-copy"
    rng = np.random.default_rng(0)
    for split in ("Train", "Val"):
        for number in range(3):
            save(
                folder / split / "Rural" / "images_png" / f"{number}.png",
                Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)),
            )
            save(
                folder / split / "Rural" / "masks_png" / f"{number}.png",
                Image.fromarray(rng.integers(0, 8, (32, 40), np.uint8)),
            )
    tiny_vit("dinov2", num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    settings = {**SHARED, **FINETUNE, "steps": 2}
    options = [f"{name}={str(value).lower()}" for name, value in settings.items()]
    data, run = f"loveda:{folder}", tmp_path / "run"
    common = ["--model", str(tmp_path / "vit"), "--data", data, "--output", str(run)]
    assert cli.main(["finetune", *common, *options]) == 0
    scores = json.loads((run / "eval.json").read_text())
    assert list(scores["iou"]) == list(CATALOG["loveda"].classes.names)
    assert (scores["num_images"], scores["split"], scores["data"]) == (3, "val", data)

    again = tmp_path / "again.json"
    on_cpu = ["--device", "cpu", "--precision", "fp32"]  # as in training; some processors have bf16
    evaluate = ["evaluate", "--model", str(run), "--data", data, *on_cpu]
    assert cli.main([*evaluate, "--json", str(again)]) == 0
    assert json.loads(again.read_text())["iou"] == scores["iou"]
    card = (run / "model" / "README.md").read_text()
    assert "LoveDA" in card and "cc-by-nc-sa-4.0" in card
    assert "my-copy" not in card and "private" not in card
    assert cli.main(["evaluate", "--model", str(run), "--data", data, "--split", "test"]) == 2


def table_row(name: str) -> str:
    """An entry as training/README.md has it."""
    entry = CATALOG[name]
    counts = [
        "-" if count is None else f"({count:,})" if split in entry.unlabelled else f"{count:,}"
        for split, count in ((split, entry.counts.get(split)) for split in ("train", "val", "test"))
    ]
    data = f"{name}:DOMAIN" if not entry.layouts else name if entry.hub else f"{name}:FOLDER"
    number = " / ".join(counts) if entry.counts else "any number"
    return f"| `{data}` | {len(entry.classes.names)} | {number} | {entry.terms} |"


def test_the_table_of_the_readme_is_the_catalog() -> None:
    text = (Path(__file__).parents[2] / "training" / "README.md").read_text(encoding="utf-8")
    rows = [
        line for line in text.partition("## Data sets by name")[2].partition("\n## ")[0].splitlines() if "| `" in line
    ]
    assert rows[1:] == [table_row(name) for name in CATALOG]
