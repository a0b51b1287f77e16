"""Images read anew each time they are trained on, for sets that fit neither memory nor disk once decoded.

Images that can be had in any order (files of a folder) come in the very order of the cached mode. A table (parquet, tar
shards, data sets of the Hub) is read front to back by `datasets`, each process its own shards, and mixed in a buffer
of bounded size: nothing is downloaded or listed before the first step. After an interruption the rows of the steps
behind it are passed over without being decoded, so that the same images follow.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from numpy.typing import NDArray
from PIL import Image

from glare.crops import PackedImages
from glare.data.sources import BadImage, Images
from glare.data.tables import Table
from glare.errors import UserError, first_line
from glare.runtime import epoch_batches

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # rows of a table, still encoded
MIXED_SHARDS = 10  # are read at the same time, unless the buffer holds all rows of the table
BATCHES_AHEAD = 2  # are read and decoded while the device computes
REPORTED = 10  # unreadable images that are named
MOST_BAD = 1000  # unreadable images in a row, after which there may be no good one at all

Pixels = NDArray[np.uint8]
Read = Callable[[], Pixels]
"""Decodes one image (h, w, 3); raises BadImage."""


@dataclass(frozen=True)
class Stream:
    """Batches of images without an end: this process's share of each, the ``rank``-th of ``world`` equal parts.

    short_side: px to which a longer short side is reduced, antialiased; None keeps every size.
    workers: decoding threads.
    strict: stop at the first bad image. Otherwise a good one of the same share, or the first that follows, stands in
        for it: which one does not depend on where the stream began.
    """

    data: str
    source: Images | Table
    short_side: int | None
    batch_size: int
    rank: int
    world: int
    seed: int
    workers: int
    strict: bool = False

    def batches(self, start: int = 0) -> Generator[PackedImages]:
        """The shares of step ``start`` and all that follow. Raises UserError, as for ``MOST_BAD`` bad images on end."""
        size = self.batch_size // self.world
        reads = self._files(start) if isinstance(self.source, Images) else islice(self._rows(), start * size, None)
        reported = shares = 0
        for share in _decoded(reads, size, self.workers):
            shares += 1  # to be given out
            good = [image for image in share if not isinstance(image, BadImage)]
            for bad in share:
                if isinstance(bad, BadImage):
                    reported = self._report(bad, reported)
            if good:
                for _ in range(1, shares):
                    yield packed(good[:1] * size)
                spare = iter(good * size)
                yield packed([next(spare) if isinstance(image, BadImage) else image for image in share])
                shares = 0
            elif shares * size >= MOST_BAD:
                raise UserError(
                    f"{shares * size} images of {self.data!r} in a row cannot be used; {share[0]}, for example"
                )

    def _report(self, bad: BadImage, reported: int) -> int:
        if self.strict:
            raise UserError(f"{bad}; repair or remove it, or leave --strict out to skip it") from bad
        if reported < REPORTED:
            logger.warning("skipped %s", bad)
        elif reported == REPORTED:
            logger.warning("more images are skipped; they are not named any more")
        return reported + 1

    def _files(self, start: int) -> Iterator[Read]:
        images, size = self.source, self.batch_size // self.world
        assert isinstance(images, Images)
        for batch in epoch_batches(len(images), self.batch_size, seed=self.seed, start=start):
            for index in batch[self.rank * size :][:size].tolist():
                yield partial(_pixels, images, index, self.short_side)

    def _rows(self) -> Iterator[Read]:
        table = self.source
        assert isinstance(table, Table)
        rows = enough_shards(table.rows, self.world, data=self.data)
        alone = rows.num_shards <= self.world or (table.count or SHUFFLE_BUFFER + 1) <= SHUFFLE_BUFFER
        rows = rows.shuffle(
            seed=self.seed,
            buffer_size=SHUFFLE_BUFFER,
            max_buffer_input_shards=1 if alone else MIXED_SHARDS,  # each pass over several ends in 5 s of sleep
        )
        rows = split_dataset_by_node(rows, rank=self.rank, world_size=self.world)
        for epoch in count():
            rows.set_epoch(epoch)
            number = -1
            for number, row in enumerate(self._read_on(rows)):
                image = Images([f"row {number} of pass {epoch}"], partial(_open, table, row))
                yield partial(_pixels, image, 0, self.short_side)
            if number < 0:
                raise UserError(f"data {self.data!r} has no rows for one of {self.world} processes; use fewer")

    def _read_on(self, rows: Any) -> Iterator[Any]:
        try:
            yield from rows
        except Exception as error:  # the connection is lost, a shard is broken, ...
            raise UserError(
                f"data {self.data!r} cannot be read on ({first_line(error)}); go on with --resume once it can"
            ) from error


def _open(table: Table, row: Any, _index: int) -> Image.Image:
    return table.open(row)


def _pixels(images: Images, index: int, short_side: int | None) -> Pixels:
    return np.asarray(images.read(index, short_side=short_side))


def enough_shards(rows: Any, world: int, *, data: str) -> Any:
    """The streamed rows in at least ``world`` shards: parquet files are divided by their row groups where needed.

    Raises UserError where that gives too few.
    """
    if rows.num_shards < world:
        rows = rows.reshard()
    if rows.num_shards < world:
        raise UserError(
            f"data {data!r} has {rows.num_shards} shard{'s' * (rows.num_shards > 1)} for {world} processes that read; "
            f"write it as {world} files or more, use fewer processes, or leave --streaming out to decode all of it once"
        )
    return rows


def packed(images: list[Pixels]) -> PackedImages:
    """Decoded images (h, w, 3) in one flat array."""
    size = torch.tensor([(image.shape[1], image.shape[0]) for image in images])
    area = size.prod(dim=1)
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    return PackedImages(torch.from_numpy(pixels), area.cumsum(0) - area, size)


def _decoded(reads: Iterator[Read], size: int, workers: int) -> Iterator[list[Pixels | BadImage]]:
    """Shares of ``size`` images in order; one thread reads ``BATCHES_AHEAD`` shares ahead, ``workers`` decode them."""
    reader, decoders = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(workers, "decode")

    def share() -> list[Future[Pixels | BadImage]]:
        return [decoders.submit(_read, read) for read in islice(reads, size)]

    try:
        waiting = deque(reader.submit(share) for _ in range(BATCHES_AHEAD))
        while True:
            waiting.append(reader.submit(share))
            yield [image.result() for image in waiting.popleft().result()]
    finally:
        reader.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


def _read(read: Read) -> Pixels | BadImage:
    try:
        return read()
    except BadImage as bad:
        return bad
