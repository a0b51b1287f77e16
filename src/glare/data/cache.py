"""Decode every image once, into one flat array of pixels in memory or in a memory-mapped file."""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glare.crops import PackedImages
from glare.data.free_memory import free_memory
from glare.data.sources import BadImage, Images, Source, fit
from glare.errors import UserError

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**26  # more than malloc keeps for itself when it is freed

T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """Decoded images, their names in the same order, and (name, reason) of those that could not be used."""

    images: PackedImages
    names: list[str]
    skipped: list[tuple[str, str]]


def skipped_lines(skipped: Sequence[tuple[str, str]], *, most: int = 10) -> list[str]:
    """(name, reason) of images that could not be used, a line each; of more than ``most`` the rest is counted."""
    lines = [f"  skipped {name}: {reason}" for name, reason in skipped[:most]]
    return lines + ([f"  ... and {len(skipped) - most} more"] if len(skipped) > most else [])


def pack(
    source: Source,
    *,
    short_side: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    spill: Path | None = None,
    progress: bool = False,
) -> Packed:
    """Decode all images of a source; the result does not depend on the number of workers.

    Args:
        source: what to decode.
        short_side: px to which a longer short side is reduced, antialiased; None keeps every size.
        strict: stop at the first bad image instead of skipping it.
        workers: decoding threads, by default one per core up to 8.
        spill: folder for the unnamed file that holds the pixels when they take more than half of the free memory;
            by default the system's temporary folder.
        progress: show a progress bar.

    Raises:
        UserError: a bad image if ``strict``, no good image at all, or no room in ``spill``.
    """
    check_short_side(short_side)

    def read(index: int) -> NDArray[np.uint8]:
        if isinstance(source, Images):
            return np.asarray(source.read(index, short_side=short_side))
        return np.asarray(shrink(source.read(index), short_side))

    names: list[str] = []
    sizes: list[tuple[int, int]] = []

    def keep(index: int, image: NDArray[np.uint8]) -> None:
        pixels.append(image)
        sizes.append((image.shape[1], image.shape[0]))
        names.append(source.name(index))

    with PixelStore(channels=3, spill=spill) as pixels:
        reading = Reading(strict=strict, workers=workers, progress=progress)
        skipped = reading.run(read, keep, count=len(source))
        return Packed(packed_images(pixels, sizes), names, skipped)


@dataclass(frozen=True)
class Reading:
    """How to read many images: whether a bad one stops it, threads (by default one per core up to 8), a bar or not."""

    strict: bool
    workers: int | None
    progress: bool

    def run(self, read: Callable[[int], T], keep: Callable[[int, T], None], *, count: int) -> list[tuple[str, str]]:
        """``read`` indices 0..count-1 in threads and ``keep`` the results in order; (name, reason) of the bad ones.

        At most one read more is under way, or waits to be kept, than there are threads. UserError at a bad image if
        ``strict``, and if all are bad.
        """
        if not count:
            raise UserError("there are no images to read; give at least one")
        skipped: list[tuple[str, str]] = []
        threads = self.workers or min(8, os.cpu_count() or 1)
        waiting: deque[Future[T]] = deque()
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
            tqdm(total=count, desc="decode", unit="image", disable=not self.progress) as bar,
        ):
            for index in range(count + threads):
                if index < count:
                    waiting.append(pool.submit(read, index))
                if threads <= index:
                    skipped += self._settle(waiting.popleft(), index - threads, keep)
                    bar.update()
        if len(skipped) == count:
            name, reason = skipped[0]
            raise UserError(f"none of the {count} images can be used; {name}, for example: {reason}")
        return skipped

    def _settle(self, future: Future[T], index: int, keep: Callable[[int, T], None]) -> list[tuple[str, str]]:
        try:
            keep(index, future.result())
        except BadImage as bad:
            if self.strict:
                raise UserError(f"{bad}; repair or remove it, or leave --strict out to skip it") from bad
            return [(bad.name, bad.reason)]
        return []


class PixelStore:
    """Pixels of uint8 appended to one flat array: in memory, or in an unnamed file once memory is short.

    In memory they gather in pieces that are moved into the array one by one and freed, so that the pixels are never
    there twice; growing one array would copy it.
    """

    def __init__(self, *, channels: int, spill: Path | None = None) -> None:
        self.channels = channels
        self.spill = Path(tempfile.gettempdir()) if spill is None else spill
        self.budget = memory_budget()
        self._pieces: deque[NDArray[np.uint8]] = deque()
        self._file: IO[bytes] | None = None
        self._used = 0

    def __enter__(self) -> "PixelStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes what a full disk has refused before
                self._file.close()

    def append(self, image: NDArray[np.uint8]) -> None:
        """Add the pixels of an image (h, w, channels) or (h, w)."""
        flat = np.ascontiguousarray(image).reshape(-1)
        if self._file is None and self._used + flat.size > self.budget:
            self._move_to_file()
        if self._file is None:
            self._keep(flat)
        else:
            self._write(flat)
        self._used += flat.size

    def finish(self) -> Tensor:
        """All pixels: (total, channels) uint8, or (total,) of one channel. The store is used up."""
        if self._file is None:
            flat = np.empty(self._used, np.uint8)
            for start, piece in self._drain():
                flat[start : start + piece.size] = piece
        else:
            flat = np.memmap(self._file, np.uint8, mode="r+", shape=(self._used,))
        pixels = torch.from_numpy(flat)
        return pixels if self.channels == 1 else pixels.view(-1, self.channels)

    def _keep(self, flat: NDArray[np.uint8]) -> None:
        at = self._used
        while flat.size:
            if at == PIECE_BYTES * len(self._pieces):
                self._pieces.append(np.empty(PIECE_BYTES, np.uint8))  # takes no memory until it is written to
            filled = at % PIECE_BYTES
            part, flat = np.split(flat, [PIECE_BYTES - filled])
            self._pieces[-1][filled : filled + part.size] = part
            at += part.size

    def _drain(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Where each piece begins, and what is in it; it is forgotten afterwards."""
        for start in range(0, self._used, PIECE_BYTES):
            yield start, self._pieces.popleft()[: self._used - start]

    def _move_to_file(self) -> None:
        logger.warning(
            "the decoded images take more than %.1f GiB, half of the free memory: they go to a file in %s",
            self.budget / 2**30,
            self.spill,
        )
        try:
            self.spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.spill)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise UserError(f"cannot write to {str(self.spill)!r} ({error.strerror}); name another folder") from error
        for _, piece in self._drain():
            self._write(piece)

    def _write(self, flat: NDArray[np.uint8]) -> None:
        assert self._file is not None
        try:
            self._file.write(flat.data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"the decoded images do not fit into {str(self.spill)!r} ({error.strerror}); "
                "reduce them (a smaller image_size), or name a folder with more room (TMPDIR)"
            ) from error


def packed_images(pixels: PixelStore, sizes: list[tuple[int, int]]) -> PackedImages:
    """The finished store as images of these (width, height)."""
    size = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    area = size.prod(dim=1)
    return PackedImages(pixels.finish(), area.cumsum(0) - area, size)


def shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    """The image with its short side reduced to ``short_side`` px, antialiased; never enlarged."""
    size = fit(image.size, short_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def check_short_side(short_side: int | None) -> None:
    """UserError unless ``short_side`` is None or at least 1 px."""
    if short_side is not None and short_side < 1:
        raise UserError(f"a short side of {short_side} px is no image; give 1 or more, or none to keep the sizes")


def memory_budget() -> int:
    """Bytes of pixels that may stay in memory: half of what is free, shared by the processes of this machine."""
    return free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
