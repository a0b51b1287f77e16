"""Which files are the shards of a table, and which split each is of."""

import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from glare.data.archives import open_part
from glare.data.catalog import named
from glare.data.raster_windows import RasterReading
from glare.data.sources import open_source
from glare.data.tables import open_table
from glare.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write(file: Path, *levels: int) -> Path:
    """A parquet file of a grey picture of each level."""
    cells = []
    for level in levels:
        picture = io.BytesIO()
        Image.new("RGB", (4, 3), (level, level, level)).save(picture, "png")
        cells.append({"bytes": picture.getvalue(), "path": None})
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(file)
    return file


def levels(data: Path, **chosen: Any) -> list[int]:
    """Of the pictures, in order; the same ones where they are streamed."""
    images = open_source(str(data), **chosen)
    read = [images.read(index).getpixel((0, 0))[0] for index in range(len(images))]  # type: ignore[index]
    table = open_table(str(data), streaming=True, **chosen)
    assert [table.open(row).getpixel((0, 0))[0] for row in table.rows] == read  # type: ignore[index]
    assert table.count == len(read)
    return read


def test_splits_are_words_in_names_of_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "a/train-0.parquet", 1, 2)
    write(tmp_path / "a/validation-0.parquet", 3)
    write(tmp_path / "b/train/x.parquet", 4)
    write(tmp_path / "b/val/x.parquet", 5)
    assert levels(tmp_path / "a") == levels(tmp_path / "a", split="train") == [1, 2]
    assert levels(tmp_path / "a", split="validation") == levels(tmp_path / "a", split="val") == [3]
    assert levels(tmp_path / "b") == [4] and levels(tmp_path / "b", split="validation") == [5]
    assert (
        levels(tmp_path / "a/validation-0.parquet", split="val") == [3] == levels(tmp_path / "a/validation-0.parquet")
    )
    with pytest.raises(UserError, match="has no split 'test'; it has train, val"):
        levels(tmp_path / "a", split="test")


def test_no_file_is_dropped_for_the_name_of_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "site_a.parquet", 1, 2)
    write(tmp_path / "site_b.parquet", 3)
    write(tmp_path / "test_site.parquet", 4)
    assert levels(tmp_path) == [1, 2, 3]
    assert "its split 'train' is read; --split takes another one (test)" in caplog.text


def test_names_that_datasets_writes_are_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a/train.parquet", 1)
    write(tmp_path / "a/eval.parquet", 2)
    write(tmp_path / "b/train-00000-of-00001.parquet", 3)
    write(tmp_path / "b/extra-00000-of-00002.parquet", 4)
    write(tmp_path / "b/extra-00001-of-00002.parquet", 5)
    write(tmp_path / "b/testing/0.parquet", 6)
    assert levels(tmp_path / "a") == [1] and levels(tmp_path / "a", split="test") == [2]
    assert levels(tmp_path / "b") == [3] and levels(tmp_path / "b", split="extra") == [4, 5]
    assert levels(tmp_path / "b", split="testing") == [6]
    assert "tell no split" not in caplog.text
    write(tmp_path / "b/0.parquet", 7)
    assert levels(tmp_path / "b") == [7, 3]
    assert "the files whose names tell no split are train (1: 0.parquet)" in caplog.text


def test_several_splits_without_train_have_to_be_chosen_from(tmp_path: Path) -> None:
    write(tmp_path / "val.parquet", 1)
    write(tmp_path / "test.parquet", 2, 3)
    with pytest.raises(UserError, match="has several splits; choose one by --split test, val"):
        open_source(str(tmp_path))


def test_names_that_are_patterns_are_names(tmp_path: Path) -> None:
    write(tmp_path / "a[1]/s[1].parquet", 1)
    write(tmp_path / "a[1]/s1.PARQUET", 2)
    assert levels(tmp_path / "a[1]/s[1].parquet") == [1]
    assert levels(tmp_path / "a[1]") == [2, 1]


def test_other_files_beside_shards_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 1)
    write(tmp_path / ".old/b.parquet", 2)
    (tmp_path / "classes.json").write_text('{"classes": ["a"]}')
    (tmp_path / "SHA256SUMS").write_text("0 a")
    assert levels(tmp_path) == [1]


def test_the_shard_that_is_broken_is_named_unless_nobody_asked_for_it(tmp_path: Path) -> None:
    write(tmp_path / "val.parquet", 1)
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 and no more")
    assert levels(tmp_path, split="val") == [1]
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"train-1.parquet' cannot be read \(.*; repair it or write it again"):
            open_table(str(tmp_path), streaming=streaming)
    shutil.copy(tmp_path / "val.parquet", tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"files of one kind that end in .parquet or .tar; found: parquet and tar"):
        open_source(str(tmp_path))


def test_pictures_of_a_table_have_no_windows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 1)
    for reading in (RasterReading(tile=32), RasterReading(bands=(3, 2, 1))):
        with pytest.raises(UserError, match="is a table, whose pictures are read whole, but raster"):
            open_source(str(tmp_path), raster=reading)


def test_deep_tiffs_in_a_table_are_said_to_be_read_better_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, mode in (("plain", "RGB"), ("deep", "I;16")):
        stream = io.BytesIO()
        Image.new(mode, (4, 3)).save(stream, "tiff")
        cells = {"image": [{"bytes": stream.getvalue(), "path": None}]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / f"{name}.parquet")
        open_source(str(tmp_path / f"{name}.parquet")).read(0)
        assert ("more than 8 bits" in caplog.text) == (name == "deep")


def test_a_copy_of_the_catalog_keeps_files_without_a_split(tmp_path: Path) -> None:
    write(tmp_path / "urban.parquet", 1, 2)
    write(tmp_path / "val.parquet", 3)
    wanted = named(f"loveda:{tmp_path}")
    assert wanted is not None
    assert len(open_part(wanted, "train", labelled=False).names) == 2
    assert len(open_part(wanted, "val", labelled=False).names) == 1
