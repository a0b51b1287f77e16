"""Near-duplicates: what is done to copies is found, other scenes are not, and the tables agree with plain loops."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from glare import near_duplicates
from glare.data.landcover import parse_landcover
from glare.near_duplicates import MAX_HAMMING, Twin, difference, difference_hash, repeats, thumbnail, twins

SCENES = [
    scenes.read(i) for scenes in map(parse_landcover, ("landcover:arid:5", "landcover:temperate:5")) for i in range(5)
]


def as_jpeg(image: Image.Image) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(BytesIO(file.getvalue()))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": as_jpeg,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "shifted by 2 px": lambda image: image.crop((2, 0, image.width, image.height)),
    "smaller": lambda image: image.resize((90, 90)),
}


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return np.stack([thumbnail(image) for image in images])


@pytest.mark.parametrize("change", COPIES)
def test_a_changed_copy_is_found(change: str) -> None:
    copies = [COPIES[change](scene) for scene in SCENES]
    found = twins(thumbnails(copies), thumbnails(SCENES))
    assert [(twin.index, twin.other) for twin in found] == [(i, i) for i in range(len(SCENES))]
    found = repeats(thumbnails([*SCENES, *copies]))
    assert [(twin.index - len(SCENES), twin.other) for twin in found] == [(i, i) for i in range(len(SCENES))]


def test_different_scenes_are_not_near_duplicates() -> None:
    assert repeats(thumbnails(SCENES)) == []


def test_the_hash_says_which_block_is_brighter_than_its_left_neighbour() -> None:
    small = thumbnail(SCENES[0])
    blocks = [[small[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].mean() for c in range(9)] for r in range(8)]
    expected = {(r, c) for r in range(8) for c in range(8) if blocks[r][c + 1] > blocks[r][c]}
    bits = np.unpackbits(difference_hash(small[None]).view(np.uint8)).reshape(8, 8)
    assert {(int(r), int(c)) for r, c in np.argwhere(bits)} == expected
    assert 0 < len(expected) < 64


def loop(images: np.ndarray, others: np.ndarray, *, earlier: bool) -> list[tuple[int, int]]:
    """Every pair by itself."""
    hashes, other_hashes = difference_hash(images), difference_hash(others)
    found = []
    for i in range(len(images)):
        best: tuple[float, int] | None = None
        for j in range(i if earlier else len(others)):
            near = (int(hashes[i]) ^ int(other_hashes[j])).bit_count() <= MAX_HAMMING
            value = float(difference(images[i : i + 1], others[j : j + 1])[0])
            if near and value <= near_duplicates.MAX_DIFFERENCE and (best is None or value < best[0]):
                best = value, j
        if best is not None:
            found.append((i, best[1]))
    return found


@pytest.mark.parametrize("chunk", [1, 7 * 120, 10**9])
def test_chunks_agree_with_a_loop_over_pairs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "CHUNK_PAIRS", chunk)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (30, 4, 4), dtype=np.uint8)
    basis = np.stack([np.asarray(Image.fromarray(c).resize(near_duplicates.THUMBNAIL[::-1])) for c in coarse])
    noise = rng.normal(0, 1, (4, *basis.shape)) * rng.choice([2, 10, 30], (4, 30, 1, 1))
    images = (basis + noise).clip(0, 255).astype(np.uint8).reshape(-1, *near_duplicates.THUMBNAIL)
    expected = loop(images, images, earlier=True)
    assert 20 < len(expected) < 90
    assert [(twin.index, twin.other) for twin in repeats(images)] == expected
    across = loop(images[:50], images[50:], earlier=False)
    assert [(twin.index, twin.other) for twin in twins(images[:50], images[50:])] == across


def test_a_set_of_one_picture_is_one_image_and_its_repeats() -> None:
    found = repeats(np.repeat(thumbnails(SCENES[:1]), 200, axis=0))
    assert [twin.index for twin in found] == list(range(1, 200))
    assert all(twin.other < twin.index and twin.difference == 0 for twin in found)


def test_pictures_without_contrast() -> None:
    plain = np.stack([np.full(near_duplicates.THUMBNAIL, 90, np.uint8), thumbnail(SCENES[0])])
    assert repeats(plain) == []
    assert repeats(plain[[0, 0]]) == [Twin(1, 0, 0.0)]
