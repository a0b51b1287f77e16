"""The images of a pre-training run: all decoded once, or read anew for each step where they fit nowhere."""

import shutil
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from os import cpu_count, environ
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from glare.crops import PackedImages, fits, subset
from glare.data.cache import memory_budget, pack, skipped_lines
from glare.data.few_shot import drawn
from glare.data.sources import Images, check_whole, fit, open_source
from glare.data.streaming import SHUFFLE_BUFFER, Stream, enough_shards
from glare.data.tables import Table, open_table, streamable
from glare.errors import UserError
from glare.runtime import epoch_batches
from glare.shares import share_of

SAMPLE = 32  # images of a stream for what is fitted and measured before the first step
HEADERS = 64  # images whose size is looked at
DISK_SHARE = 0.9  # of what is free, for decoded images


@dataclass(frozen=True)
class Feed:
    """Where a run's batches come from.

    sample: the first images of the run's order, for what is done before the first step; the same on every process.
    names: of all images in their order, None of a table that is streamed.
    about: what is trained on, for people.
    """

    sample: PackedImages
    names: list[str] | None
    about: list[str]
    shares: Callable[[int], Generator[tuple[PackedImages, Tensor]]]
    """Step to begin with -> this process's share of each batch: a pack, on the device where it fits, and indices."""


def list_images(recipe: Any) -> Images:
    """The images of a recipe's ``data``, with its ``split``, ``match``, ``raster``, ``fraction`` and ``seed``."""
    images = open_source(recipe.data, split=recipe.split, match=recipe.match, raster=recipe.raster)
    return images.subset(drawn(len(images), seed=recipe.seed, fraction=recipe.fraction))


def open_images(recipe: Any) -> Images | Table:
    """What a recipe trains on: a table that is streamed if that is wished for and possible, else `list_images`."""
    data, match, fraction = recipe.data, recipe.match, recipe.fraction
    if not (recipe.streaming and streamable(data)):
        return list_images(recipe)
    if match is not None:
        raise UserError(
            f"match {match!r} chooses files, and data {data!r} is streamed as a table; leave one of them out"
        )
    if fraction != 1:
        raise UserError(
            f"fraction is {fraction:g}, but nobody has counted the images of the table {data!r} that is streamed; "
            "leave --streaming out"
        )
    check_whole(data, recipe.raster)
    return open_table(data, split=recipe.split, streaming=True)


def open_feed(source: Images | Table, recipe: Any, accelerator: Accelerator) -> Feed:
    """The feed of a resolved recipe; streamed where it says so, or where neither memory nor disk has room."""
    if isinstance(source, Table) or streams(source, recipe, accelerator):
        return _streamed(source, recipe, accelerator)
    return _cached(source, recipe, accelerator)


def streams(images: Images, recipe: Any, accelerator: Accelerator) -> bool:
    """Whether images are read anew each time; all processes do what the main one decides."""
    wished: bool | None = recipe.streaming
    if wished is not None:
        return wished
    decided = [accelerator.is_main_process and not has_room(decoded_bytes(images, recipe.image_size or None))]
    return bool(broadcast_object_list(decided)[0])


def decoded_bytes(images: Images, short_side: int | None) -> int:
    """About how many bytes all images take once they are decoded, from the headers of a few."""
    sizes = []
    for index in range(0, len(images), -(-len(images) // HEADERS)):
        try:
            width, height = fit(_size(images, index), short_side)
            sizes.append(3 * width * height)
        except Exception:
            continue
    return len(images) * sum(sizes) // max(1, len(sizes))


def _size(images: Images, index: int) -> tuple[int, int]:
    """(width, height) of an image, which is not decoded."""
    box = images.parts[index].box if images.parts else None
    if box is not None:  # a window, which would be decoded to be opened
        return box.width, box.height
    with images.open_image(index) as image:
        return image.size


def has_room(count: int) -> bool:
    """Whether the memory of this process has room for so many bytes, or the disk that the cache goes to then."""
    disk = shutil.disk_usage(Path(tempfile.gettempdir())).free // int(environ.get("LOCAL_WORLD_SIZE", "1"))
    return count <= max(memory_budget(), DISK_SHARE * disk)


def _cached(source: Images, recipe: Any, accelerator: Accelerator) -> Feed:
    packed = pack(
        source,
        short_side=recipe.image_size or None,
        strict=recipe.strict,
        workers=recipe.num_workers,
        progress=accelerator.is_main_process,
    )
    size = packed.images.pixels.nbytes
    share = share_of(accelerator, recipe.batch_size)

    def shares(start: int) -> Generator[tuple[PackedImages, Tensor]]:
        images = packed.images.to(accelerator.device) if fits(size, accelerator.device) else packed.images
        for batch in epoch_batches(len(images), recipe.batch_size, seed=recipe.seed, start=start):
            yield images, batch[share]

    about = [f"{len(packed.names)} images decoded once ({size / 2**20:.0f} MiB), {len(packed.skipped)} skipped"]
    count = len(packed.names)
    sample = subset(packed.images, next(epoch_batches(count, min(count, SAMPLE), seed=recipe.seed)))
    return Feed(sample, packed.names, about + skipped_lines(packed.skipped), shares)


def _streamed(source: Images | Table, recipe: Any, accelerator: Accelerator) -> Feed:
    if isinstance(source, Table):
        enough_shards(source.rows, accelerator.num_processes, data=recipe.data)  # said before anything is written

    def stream(batch_size: int, rank: int, world: int) -> Stream:
        workers = min(8, cpu_count() or 1) if recipe.num_workers is None else recipe.num_workers
        short_side = recipe.image_size or None
        return Stream(
            recipe.data, source, short_side, batch_size, rank, world, recipe.seed, workers, strict=recipe.strict
        )

    own = stream(recipe.batch_size, accelerator.process_index, accelerator.num_processes)

    def shares(start: int) -> Generator[tuple[PackedImages, Tensor]]:
        for images in own.batches(start):
            yield images, torch.arange(len(images))

    first = stream(min(SAMPLE, len(source)) if isinstance(source, Images) else SAMPLE, 0, 1).batches()
    sample = next(first)
    first.close()
    if isinstance(source, Table):
        about = [f"the table {recipe.data} is streamed, in a shuffle buffer of {SHUFFLE_BUFFER} rows"]
        return Feed(sample, None, about, shares)
    about = [f"{len(source)} images, streamed: each is read and decoded anew in every pass"]
    if recipe.streaming is None:
        about.append("decoded they would fit neither memory nor disk; a smaller --image-size may change that")
    return Feed(sample, list(source.names), about, shares)
