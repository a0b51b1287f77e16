"""Streaming gives every image once a pass, the same after an interruption, and says what it cannot do."""

import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from glare.crops import PackedImages
from glare.data import streaming
from glare.data.cache import pack
from glare.data.sources import open_source
from glare.data.streaming import Stream, enough_shards
from glare.data.tables import open_table
from glare.errors import UserError
from glare.runtime import epoch_batches

COUNT = 23


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after each pass over parquet files
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 5)


def picture(number: int) -> Image.Image:
    """Its colour is its number."""
    return Image.new("RGB", (4 + number % 3, 5), (number, 0, 0))


def png(number: int) -> bytes:
    file = BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, *, files: int = 4, count: int = COUNT, bad: tuple[int, ...] = ()) -> str:
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for file in range(files):
        rows = [
            {"image": {"bytes": b"broken" if number in bad else png(number), "path": None}, "text": "x"}
            for number in range(file, count, files)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{file}.parquet", batch_size=2)
    return str(folder)


def write_folder(folder: Path, *, bad: tuple[int, ...] = ()) -> str:
    folder.mkdir()
    for number in range(COUNT):
        if number in bad:
            (folder / f"{number}.png").write_bytes(b"broken")
        else:
            picture(number).save(folder / f"{number}.png")
    return str(folder)


def stream(data: str, *, batch_size: int = 4, rank: int = 0, world: int = 1, **changes: Any) -> Stream:
    table = next(Path(data).glob("*.parquet"), None)
    source = open_table(data, streaming=True) if table else open_source(data)
    return Stream(data, source, None, batch_size, rank, world, seed=3, workers=2, **changes)


def numbers(batches: Iterator[PackedImages], steps: int) -> list[list[int]]:
    return [[int(images.image(i)[0, 0, 0]) for i in range(len(images))] for images in islice(batches, steps)]


def in_order(found: list[list[int]]) -> list[int]:
    return [number for share in found for number in share]


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_an_image_arrives_as_it_was_written(write: Any, tmp_path: Path) -> None:
    images = next(stream(write(tmp_path / "data")).batches())
    for index in range(4):
        pixels = images.image(index)
        number = int(pixels[0, 0, 0])
        assert pixels.shape == (5, 4 + number % 3, 3)
        assert torch.equal(pixels, torch.tensor([number, 0, 0], dtype=torch.uint8).expand_as(pixels))


def test_large_images_are_reduced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (60, 30)).save(tmp_path / "data/large.png")
    source = open_source(str(tmp_path / "data"))
    images = next(Stream("data", source, 10, batch_size=1, rank=0, world=1, seed=0, workers=1).batches())
    assert images.image(0).shape == (10, 20, 3)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2)])
def test_a_folder_is_streamed_in_the_order_of_the_cached_mode(rank: int, world: int, tmp_path: Path) -> None:
    """So both modes see the same images in every step."""
    data = write_folder(tmp_path / "data")
    cached = pack(open_source(data)).images
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    batches = islice(epoch_batches(COUNT, 4, seed=3), 12)
    expected = [[int(cached.image(i)[0, 0, 0]) for i in batch[share].tolist()] for batch in batches]
    assert numbers(stream(data, rank=rank, world=world).batches(), 12) == expected


def test_a_pass_over_shards_has_the_images_of_the_cached_mode(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data")
    cached = pack(open_source(data)).images
    expected = Counter(int(cached.image(i)[0, 0, 0]) for i in range(len(cached)))
    found = in_order(numbers(stream(data, batch_size=1).batches(), 2 * COUNT))
    assert Counter(found[:COUNT]) == Counter(found[COUNT:]) == expected == Counter(range(COUNT))
    assert found[:COUNT] != found[COUNT:] != sorted(found[COUNT:])


@pytest.mark.parametrize(("files", "world"), [(4, 2), (4, 3), (1, 4)])
def test_processes_share_a_pass(files: int, world: int, tmp_path: Path) -> None:
    """Also where shards and processes do not divide, and where one file has to be divided by its row groups."""
    data = write_shards(tmp_path / "data", files=files, count=24)
    passes = [
        numbers(stream(data, batch_size=world, rank=rank, world=world).batches(), 24 // world) for rank in range(world)
    ]
    assert sorted(in_order([in_order(found) for found in passes])) == list(range(24))


@pytest.mark.parametrize("write", [write_folder, write_shards])
@pytest.mark.parametrize("start", [1, 9])
def test_an_interrupted_stream_goes_on_with_the_same_images(write: Any, start: int, tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    whole = numbers(stream(data).batches(), start + 5)
    assert numbers(stream(data).batches(start), 5) == whole[start:]


def test_passing_over_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    original = streaming._pixels
    monkeypatch.setattr(streaming, "_pixels", lambda *given: read.append(given) or original(*given))
    batches = stream(write_shards(tmp_path / "data")).batches(20)
    next(batches)
    batches.close()
    assert len(read) <= 4 * (streaming.BATCHES_AHEAD + 1)


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_a_good_image_stands_in_for_a_bad_one(write: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = (2, 3, 5, 7)
    with caplog.at_level(logging.WARNING):
        found = in_order(numbers(stream(write(tmp_path / "data", bad=bad)).batches(), 12))
    assert len(found) == 48
    assert len(set(found)) > 12
    assert not set(found) & set(bad)
    assert "skipped" in caplog.text and "not an image" in caplog.text


def test_the_next_good_image_stands_in_for_a_share_of_bad_ones(tmp_path: Path) -> None:
    """So a stream that goes on at such a share gives the same one."""
    bad = (2, 3, 5)
    data = write_folder(tmp_path / "data", bad=bad)
    found = in_order(numbers(stream(data, batch_size=1).batches(), 2 * COUNT))
    alone = in_order(numbers(stream(write_folder(tmp_path / "good"), batch_size=1).batches(), 3 * COUNT))
    assert found == [next(good for good in alone[step:] if good not in bad) for step in range(2 * COUNT)]
    for start in (step for step in range(COUNT) if alone[step] in bad):
        assert in_order(numbers(stream(data, batch_size=1).batches(start), 2)) == found[start : start + 2]


def test_only_the_first_bad_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        numbers(stream(write_folder(tmp_path / "data", bad=tuple(range(0, COUNT, 2)))).batches(), 15)
    assert len(caplog.records) == streaming.REPORTED + 1


@pytest.mark.parametrize(("strict", "bad"), [(True, (4,)), (False, tuple(range(COUNT)))])
def test_bad_images_end_a_strict_run_and_one_without_any_good(
    strict: bool, bad: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="leave --strict out" if strict else "1000 images of .* in a row cannot be"):
        numbers(stream(write_folder(tmp_path / "data", bad=bad), strict=strict).batches(), 6)


def test_too_few_shards_are_refused_with_a_remedy(tmp_path: Path) -> None:
    table = open_table(write_shards(tmp_path / "data", files=1, count=2), streaming=True)
    with pytest.raises(UserError, match=r"has 1 shard for 3 processes.*3 files or more.*fewer processes.*--streaming"):
        enough_shards(table.rows, 3, data="data")


def test_a_table_that_breaks_on_the_way_says_so(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", files=2)
    (tmp_path / "data/1.parquet").write_bytes((tmp_path / "data/1.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        numbers(stream(data).batches(), 6)


def test_tar_shards_are_streamed(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(shard, 8, 2):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(png(number))
                tar.addfile(info, BytesIO(png(number)))
    table = open_table(str(tmp_path), streaming=True)
    batches = Stream("tar", table, None, batch_size=8, rank=0, world=1, seed=0, workers=1).batches()
    assert sorted(numbers(batches, 1)[0]) == list(range(8))


def test_a_pass_over_a_small_table_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets sleeps at the end of each pass over shards that it reads at the same time."""
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", COUNT)
    monkeypatch.setattr(datasets.iterable_dataset.time, "sleep", lambda _: pytest.fail("slept"))
    for files in (1, 4):
        batches = stream(write_shards(tmp_path / str(files), files=files)).batches()
        assert len(numbers(batches, 3 * COUNT // 8)) == 3 * COUNT // 8
        batches.close()


def test_memory_holds_a_buffer_of_rows(tmp_path: Path) -> None:
    """Rows read before the first share: the buffer, the shares ahead, and what datasets fetches at a time."""
    opened: list[int] = []
    table = open_table(write_shards(tmp_path / "data", files=1, count=200), streaming=True)
    rows = table.rows.map(lambda row, index: opened.append(index) or row, with_indices=True)
    changed = streaming.Table(rows, table.column, table.folder, table.count)
    batches = Stream("data", changed, None, batch_size=4, rank=0, world=1, seed=0, workers=1).batches()
    next(batches)
    batches.close()
    assert len(opened) < 5 + 4 * (streaming.BATCHES_AHEAD + 2) + 10
