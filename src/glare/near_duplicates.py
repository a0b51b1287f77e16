"""Images that show the same picture: copies, re-encodings, neighbouring frames of a film.

A difference hash (is a block of a small grey picture brighter than the one on its left?) finds the candidates among
all pairs with a few bit operations each; the small pictures themselves, at equal mean and contrast, confirm them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = (32, 36)  # rows, columns: 4 x 4 px for each block of the hash
BLOCKS = (8, 9)
MAX_HAMMING = 10  # of 64 bits; aerial pictures of different places differ by 15 and more, streets by 9 and more
MAX_DIFFERENCE = 0.25  # as `difference`; places seen from the air 0.5 and more, one dark street from another 0.28
CANDIDATES = 16  # an image is compared with so many others, those of the closest hashes
CHUNK_PAIRS = 4_000_000  # hashes compared at a time: 32 MB

Thumbnails = NDArray[np.uint8]
"""Small grey pictures (n, rows, columns)."""


@dataclass(frozen=True)
class Twin:
    """Image ``index`` shows what image ``other`` shows; ``difference`` of their thumbnails, 0 for equal ones."""

    index: int
    other: int
    difference: float


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """The image in grey, resized to ``THUMBNAIL`` whatever its shape."""
    return np.asarray(image.convert("L").resize(THUMBNAIL[::-1], Image.Resampling.BICUBIC, reducing_gap=2.0))


def difference_hash(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    """64 bits an image, (n,): whether each of 8 x 9 blocks is brighter than its left neighbour."""
    rows, columns = (side // blocks for side, blocks in zip(THUMBNAIL, BLOCKS, strict=True))
    blocks = thumbnails.reshape(-1, BLOCKS[0], rows, BLOCKS[1], columns).sum(axis=(2, 4), dtype=np.int64)
    bits = (blocks[:, :, 1:] > blocks[:, :, :-1]).reshape(len(thumbnails), 64)
    return np.packbits(bits, axis=1).view(np.uint64).squeeze(1)


def difference(first: Thumbnails, second: Thumbnails) -> NDArray[np.float32]:
    """Mean absolute difference (n,) of pairs of thumbnails, each brought to mean 0 and mean absolute deviation 1."""
    distance: NDArray[np.float32] = np.abs(_standardised(first) - _standardised(second)).mean(axis=1)
    return distance


def repeats(thumbnails: Thumbnails) -> list[Twin]:
    """Each image that shows what an earlier one shows, with the most similar earlier one.

    Without the images ``index`` of the result, no near-duplicates are left.
    """
    return _twins(thumbnails, thumbnails, earlier=True)


def twins(thumbnails: Thumbnails, others: Thumbnails) -> list[Twin]:
    """Each image that shows what one of ``others`` shows, with the most similar one of those."""
    return _twins(thumbnails, others, earlier=False)


def _twins(thumbnails: Thumbnails, others: Thumbnails, *, earlier: bool) -> list[Twin]:
    hashes, other_hashes = difference_hash(thumbnails), difference_hash(others)
    found: list[Twin] = []
    rows = max(1, CHUNK_PAIRS // max(1, len(others)))
    for first in range(0, len(hashes), rows):
        hamming = np.bitwise_count(hashes[first : first + rows, None] ^ other_hashes)
        if earlier:
            later = np.arange(len(others)) >= np.arange(first, first + len(hamming))[:, None]
            hamming[later] = 64
        index, other = _candidates(hamming)
        found += _confirmed(thumbnails, others, index + first, other)
    return found


def _candidates(hamming: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (row, column) of a table of distances: in each row the closest ones within ``MAX_HAMMING``."""
    rows = np.flatnonzero(hamming.min(axis=1, initial=64) <= MAX_HAMMING)
    near = hamming[rows]
    if near.shape[1] > CANDIDATES:
        columns = np.argpartition(near, CANDIDATES, axis=1)[:, :CANDIDATES]
    else:
        columns = np.broadcast_to(np.arange(near.shape[1]), near.shape)
    row, place = np.nonzero(np.take_along_axis(near, columns, axis=1) <= MAX_HAMMING)
    return rows[row], columns[row, place]


def _confirmed(
    thumbnails: Thumbnails, others: Thumbnails, index: NDArray[np.int64], other: NDArray[np.int64]
) -> list[Twin]:
    """The most similar one of the candidates of each image, if it is similar enough."""
    best: dict[int, Twin] = {}
    for first in range(0, len(index), 4096):
        piece = slice(first, first + 4096)
        values = difference(thumbnails[index[piece]], others[other[piece]])
        for i, j, value in zip(index[piece].tolist(), other[piece].tolist(), values.tolist(), strict=True):
            if value <= MAX_DIFFERENCE and (i not in best or value < best[i].difference):
                best[i] = Twin(i, j, value)
    return list(best.values())


def _standardised(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """(n, pixels); a plain picture has no contrast to divide by and becomes zeros."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.abs(flat).mean(axis=1, keepdims=True), 1.0)
    return flat
