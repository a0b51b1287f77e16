"""Packing: the same pixels whatever the workers and wherever they are kept, and an account of what is bad."""

import io
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image

from glare.data import cache
from glare.data.cache import Packed, pack
from glare.data.sources import BadImage, Images, open_source
from glare.errors import UserError
from glare.price import CLEAR_REFS, peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")


def picture(seed: int, *, width: int = 8, height: int = 6) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


class Pictures:
    """A source of any pictures, None for a bad one, that are read with some delay each."""

    def __init__(self, *pictures: Image.Image | None, delay_s: Callable[[int], float] = lambda _: 0.0) -> None:
        self.pictures, self.delay_s = pictures, delay_s

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def read(self, index: int) -> Image.Image:
        time.sleep(self.delay_s(index))
        image = self.pictures[index]
        if image is None:
            raise BadImage(self.name(index), "it is broken")
        return image


def several(count: int = 12) -> list[Image.Image]:
    return [picture(seed, width=3 + seed % 5, height=2 + seed % 7) for seed in range(count)]


def assert_holds(packed: Packed, pictures: list[Image.Image]) -> None:
    assert len(packed.images) == len(packed.names) == len(pictures)
    for index, image in enumerate(pictures):
        assert np.array_equal(packed.images.image(index).numpy(), np.asarray(image))
        assert tuple(packed.images.size[index].tolist()) == image.size
    assert packed.images.pixels.dtype == torch.uint8
    assert len(packed.images.pixels) == sum(image.width * image.height for image in pictures)


def test_images_of_all_sizes_lie_one_after_another() -> None:
    pictures = [*several(), picture(1, width=1, height=1), picture(2, width=200, height=100)]
    packed = pack(Pictures(*pictures))
    assert_holds(packed, pictures)
    assert packed.names == [f"{index}.png" for index in range(14)]
    assert packed.skipped == []
    assert packed.images.start.dtype == packed.images.size.dtype == torch.int64


@pytest.mark.parametrize("workers", [None, 1, 2, 7, 50])
def test_the_result_does_not_depend_on_the_workers(workers: int | None) -> None:
    pictures: list[Image.Image | None] = [*several()]
    pictures[3] = pictures[8] = None
    packed = pack(Pictures(*pictures, delay_s=lambda index: 0.002 * (index * 5 % 4)), workers=workers)
    assert_holds(packed, [image for image in pictures if image is not None])
    assert packed.names == [f"{index}.png" for index in range(12) if index not in (3, 8)]
    assert packed.skipped == [("3.png", "it is broken"), ("8.png", "it is broken")]


def test_only_a_few_images_are_decoded_ahead() -> None:
    begun: list[int] = []
    three_began = threading.Event()
    begun_while_first_was_read = 0

    def open_image(index: int) -> Image.Image:
        nonlocal begun_while_first_was_read
        begun.append(index)
        if len(begun) == 3:
            three_began.set()
        if index == 0:
            assert three_began.wait(timeout=20)
            time.sleep(0.05)  # time for more of them to begin
            begun_while_first_was_read = len(begun)
        return picture(index)

    packed = pack(Images([str(index) for index in range(40)], open_image), workers=3)
    assert len(packed.names) == 40
    assert begun_while_first_was_read <= 4


def test_strict_stops_at_the_first_bad_image() -> None:
    read: list[int] = []

    class Watched(Pictures):
        def read(self, index: int) -> Image.Image:
            read.append(index)
            return super().read(index)

    with pytest.raises(UserError, match=r"2.png: it is broken; repair or remove it, or leave --strict out"):
        pack(Watched(picture(0), picture(1), None, *several(30)), strict=True, workers=1)
    assert max(read) <= 3


def test_no_good_image_is_an_error() -> None:
    with pytest.raises(UserError, match=r"none of the 2 images can be used; 0.png, for example: it is broken"):
        pack(Pictures(None, None))
    with pytest.raises(UserError, match="no images"):
        pack(Pictures())


def test_a_fault_of_the_program_is_not_a_bad_image() -> None:
    class Faulty(Pictures):
        def read(self, index: int) -> Image.Image:
            raise ZeroDivisionError(index)

    with pytest.raises(ZeroDivisionError):
        pack(Faulty(picture(0), picture(1)))


def test_real_files_good_and_bad(tmp_path: Path) -> None:
    for seed in range(5):
        picture(seed).save(tmp_path / f"{seed}.png")
    whole = io.BytesIO()
    picture(9, width=64, height=64).save(whole, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:900])
    (tmp_path / "text.png").write_text("text")
    packed = pack(open_source(str(tmp_path)))
    assert_holds(packed, [picture(seed) for seed in range(5)])
    assert [name for name, _ in packed.skipped] == ["cut.jpg", "text.png"]
    with pytest.raises(UserError, match=r"cut.jpg: .*truncated.*; repair or remove it"):
        pack(open_source(str(tmp_path)), strict=True)


# reducing


def test_short_side_reduces_but_never_enlarges() -> None:
    pictures = [picture(0, width=40, height=20), picture(1, width=30, height=90), picture(2, width=9, height=300)]
    packed = pack(Pictures(*pictures), short_side=10)
    assert packed.images.size.tolist() == [[20, 10], [10, 30], [9, 300]]
    reduced = [
        image.resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(pictures[:2], [(20, 10), (10, 30)], strict=True)
    ]
    assert_holds(packed, [*reduced, pictures[2]])
    with pytest.raises(UserError, match="short side of 0 px"):
        pack(Pictures(*pictures), short_side=0)


def test_files_are_reduced_as_the_source_does(tmp_path: Path) -> None:
    picture(0, width=640, height=480).save(tmp_path / "0.jpg", quality=95)
    picture(1, width=64, height=48).save(tmp_path / "1.png")
    source = open_source(str(tmp_path))
    packed = pack(source, short_side=24)
    assert_holds(packed, [source.read(index, short_side=24) for index in range(2)])


# memory


def test_memory_never_holds_the_pixels_twice() -> None:
    if not CLEAR_REFS.exists():
        pytest.skip("needs a system that can reset the peak of memory")
    images = Images([str(i) for i in range(90)], lambda i: Image.new("RGB", (900 + i, 1000), (i, 0, 0)))
    before = reset_peak_memory(CPU)
    packed = pack(images, workers=1)
    assert packed.images.pixels.nbytes > 3 * cache.PIECE_BYTES
    assert peak_memory_bytes(CPU) - before < 1.5 * packed.images.pixels.nbytes
    assert packed.images.pixels.untyped_storage().nbytes() == packed.images.pixels.nbytes


@pytest.mark.parametrize("piece", [1, 7, 100, 1_000_000])
@pytest.mark.parametrize("budget", [10, 500, 1_000_000])
def test_pieces_of_any_size_give_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, piece: int, budget: int
) -> None:
    monkeypatch.setattr(cache, "PIECE_BYTES", piece)
    monkeypatch.setattr(cache, "memory_budget", lambda: budget)
    assert_holds(pack(Pictures(*several()), spill=tmp_path), several())


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "memory_budget", lambda: 500)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("first", [1, 200])  # short of memory midway, or from the first image on
def test_what_does_not_fit_goes_to_a_file_that_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    pictures = [picture(0, width=first, height=1), *several(40)]
    with caplog.at_level(logging.WARNING):
        packed = pack(Pictures(*pictures), spill=tmp_path / "new")
    assert_holds(packed, pictures)
    assert [record.name for record in caplog.records] == ["glare.data.cache"]
    assert "half of the free memory" in caplog.text and f"a file in {tmp_path / 'new'}" in caplog.text
    assert list((tmp_path / "new").iterdir()) == []
    packed.images.pixels[0] = 1  # an ordinary tensor


@pytest.mark.usefixtures("little_memory")
def test_without_a_folder_the_temporary_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert_holds(pack(Pictures(*several(40))), several(40))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("little_memory")
def test_a_bad_image_or_a_bad_folder_leaves_no_file(tmp_path: Path) -> None:
    pictures: list[Image.Image | None] = [*several(40)]
    pictures[30] = None
    with pytest.raises(UserError, match=r"30.png"):
        pack(Pictures(*pictures), strict=True, spill=tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .* name another folder"):
        pack(Pictures(*several(40)), spill=tmp_path / "file")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> IO[bytes]:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"do not fit into .*No space left.* more room"):
        pack(Pictures(*several(40)), spill=tmp_path)


def test_the_bar_shows_only_when_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    pack(Pictures(*several(3)))
    assert capsys.readouterr() == ("", "")
    pack(Pictures(*several(3)), progress=True)
    assert "3/3" in capsys.readouterr().err
