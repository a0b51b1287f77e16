"""How much memory decoding many images once takes beyond the pixels: ``python training/cache_memory.py``.

Decodes 20,000 JPEG files, reads a pass of crops from the pixels, and says by how much the memory of the process grew.
Exit code 1 where that is more than the pixels and 500 MB. Linux.
"""

import argparse
import os
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from glare.crops import PackedImages, cut
from glare.data.cache import pack
from glare.data.sources import open_source
from glare.geometry import Crop
from glare.price import peak_memory_bytes, reset_peak_memory
from glare.runtime import epoch_batches

DIFFERENT = 200  # files; the others are links to them
SIDES = (320, 240)
ALLOWED = 500 * 10**6
BATCH, CROP = 64, 96
CPU = torch.device("cpu")


def write_images(folder: Path, count: int) -> None:
    """``count`` JPEG files of smooth random colours, in folders of 1,000."""
    noise = np.random.default_rng(0)
    for index in range(count):
        file = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        file.parent.mkdir(exist_ok=True)
        if index < DIFFERENT:
            coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize(SIDES, Image.Resampling.BICUBIC).save(file, quality=90)
        else:
            os.link(folder / "000" / f"{index % DIFFERENT:06d}.jpg", file)


def read_a_pass(images: PackedImages) -> None:
    """Cut a quarter of each image."""
    for index in islice(epoch_batches(len(images), BATCH, seed=0), len(images) // BATCH):
        quarter = Crop(torch.rand(len(index), 2) / 2, torch.full((len(index), 2), 0.5))
        cut(images, index, quarter, size=(CROP, CROP))


def main() -> int:
    """Write, decode, read, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    with TemporaryDirectory() as name:
        write_images(Path(name), parser.parse_args().images)
        before = reset_peak_memory(CPU)
        packed = pack(open_source(name))
        decoding = peak_memory_bytes(CPU) - before
        read_a_pass(packed.images)
        grown = peak_memory_bytes(CPU) - before
    pixels = packed.images.pixels.nbytes
    print(
        f"{len(packed.names)} images, {pixels / 1e6:.0f} MB of pixels; memory grew by {decoding / 1e6:.0f} MB to ",
        end="",
    )
    print(f"decode them, {grown / 1e6:.0f} MB with a pass of crops: {(grown - pixels) / 1e6:.0f} MB beyond the pixels")
    return int(grown > pixels + ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
