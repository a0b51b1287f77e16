import numpy as np
import pytest
import torch
from PIL import Image
from reference.builders import crop_of, noise_image, packed
from reference.correspondence import Box
from reference.resample import crop_and_resize, crop_labels

from glare import crops
from glare.crops import PackedImages, _filtered, cut, cut_labels, subset
from glare.draws import Draws
from glare.geometry import Crop, random_resized_crops

PILLOW_TOLERANCE = 2 / 255  # what is promised; rounding between Pillow's two passes costs about a seventh of it


def smooth_image(width: int, height: int, seed: int) -> np.ndarray:
    """A blurred photograph's statistics: noise enlarged, with some sharp edges."""
    small = Image.fromarray(noise_image(max(width // 8, 1), max(height // 8, 1), seed))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 3 : height // 2, width // 4 :] = (250, 10, 128)
    return image


def pillow(image: np.ndarray, box: Box, size: tuple[int, int]) -> torch.Tensor:
    region = (int(box.left), int(box.top), int(box.left + box.width), int(box.top + box.height))
    result = Image.fromarray(image).crop(region).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    if box.flip:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(result)).permute(2, 0, 1).float() / 255


WAYS = {"whole-pixels": cut, "any-crop": _filtered}
"""On the CPU crops of whole pixels take a way of their own; the other one takes all crops."""


def one(image: np.ndarray, box: Box, size: tuple[int, int], way: str = "any-crop") -> torch.Tensor:
    crop = crop_of([box], [(image.shape[1], image.shape[0])])
    return WAYS[way](packed([image]), torch.tensor([0]), crop, size=size)[0]


CASES = [
    pytest.param((300, 200), Box(20, 30, 250, 150, False), (96, 96), id="down"),
    pytest.param((300, 200), Box(20, 30, 250, 150, True), (96, 96), id="down-flipped"),
    pytest.param((60, 40), Box(5, 5, 30, 30, False), (224, 224), id="up"),
    pytest.param((60, 40), Box(0, 0, 60, 40, True), (128, 96), id="whole-image-up-non-square"),
    pytest.param((400, 100), Box(10, 0, 390, 20, False), (30, 160), id="up-and-down"),
    pytest.param((512, 512), Box(0, 0, 512, 512, False), (14, 14), id="far-down"),
    pytest.param((97, 61), Box(13, 7, 64, 48, False), (48, 64), id="same-size"),
    pytest.param((3, 2), Box(1, 0, 2, 2, True), (16, 16), id="tiny"),
    pytest.param((1, 1), Box(0, 0, 1, 1, False), (32, 32), id="one-pixel-image"),
    pytest.param((50, 50), Box(49, 49, 1, 1, False), (8, 8), id="one-pixel-crop"),
    pytest.param((70, 50), Box(69, 0, 1, 50, True), (20, 20), id="one-column"),
    pytest.param((200, 150), Box(11, 13, 100, 100, False), (1, 1), id="to-one-pixel"),
]


@pytest.mark.parametrize(("image_size", "box", "size"), CASES)
@pytest.mark.parametrize("make", [noise_image, smooth_image])
@pytest.mark.parametrize("way", WAYS)
def test_a_crop_is_pillows(way: str, make, image_size: tuple[int, int], box: Box, size: tuple[int, int]):
    image = make(*image_size, 0)
    found, expected = one(image, box, size, way), pillow(image, box, size)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().mean() <= PILLOW_TOLERANCE / 4
    assert (found - expected).abs().max() <= (2.01 if way == "whole-pixels" else 1.5) / 255


def test_the_way_of_whole_pixels(monkeypatch: pytest.MonkeyPatch):
    """It is taken for crops of whole pixels inside their images, and for no others."""
    image, taken = noise_image(20, 16, 0), []
    real = crops._resized
    monkeypatch.setattr(crops, "_resized", lambda *args, **kwargs: taken.append(1) or real(*args, **kwargs))
    for box, expected in (
        (Box(3, 2, 12, 9, True), 1),
        (Box(0, 0, 20, 16, False), 1),
        (Box(3.3, 2, 12, 9, False), 0),
        (Box(3, 2, 12, 9.5, False), 0),
        (Box(-1, 2, 12, 9, False), 0),
        (Box(10, 2, 11, 9, False), 0),
    ):
        taken.clear()
        found = one(image, box, (8, 8), "whole-pixels")
        assert len(taken) == expected
        torch.testing.assert_close(found, one(image, box, (8, 8)), atol=2.01 / 255, rtol=0)


def test_both_ways_flip_alike():
    image = smooth_image(40, 30, 0)
    for scale in ((1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)):
        crop = Crop(torch.tensor([[float(s < 0) for s in scale]]), torch.tensor([scale]))
        ways = [way(packed([image]), torch.tensor([0]), crop, size=(12, 12)) for way in WAYS.values()]
        torch.testing.assert_close(*ways, atol=2.01 / 255, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_random_crops_of_many_images_are_pillows(way: str):
    """One call, many images and crops of all shapes, as in training."""
    sizes = [(120, 80), (64, 64), (33, 90), (200, 150), (9, 5)]
    images = [smooth_image(*size, seed) for seed, size in enumerate(sizes)]
    pack = packed(images)
    index = torch.arange(5).repeat(12)
    crop = random_resized_crops(
        pack.size[index], area=(0.05, 1.0), flip_prob=0.5, draws=Draws(torch.Generator().manual_seed(0), len(index))
    )
    result = WAYS[way](pack, index, crop, size=(48, 48))
    for row, image_number in enumerate(index.tolist()):
        width, height = sizes[image_number]
        edges = torch.stack([crop.offset[row], crop.offset[row] + crop.scale[row]]) * torch.tensor([width, height])
        left, top = edges.amin(0).round().int().tolist()
        right, bottom = edges.amax(0).round().int().tolist()
        box = Box(left, top, right - left, bottom - top, bool(crop.scale[row, 0] < 0))
        assert (result[row] - pillow(images[image_number], box, (48, 48))).abs().mean() <= PILLOW_TOLERANCE / 4


@pytest.mark.parametrize(
    ("image_size", "box", "size"),
    [
        pytest.param((20, 16), Box(3, 2, 12, 9, False), (7, 5), id="down"),
        pytest.param((20, 16), Box(3, 2, 12, 9, True), (5, 17), id="down-and-up-flipped"),
        pytest.param((20, 16), Box(3.3, 2.6, 9.25, 7.5, True), (6, 6), id="between-pixels"),
        pytest.param((9, 7), Box(0, 0, 9, 7, False), (7, 9), id="whole"),
        pytest.param((2, 1), Box(0, 0, 2, 1, False), (3, 4), id="tiny"),
    ],
)
def test_a_crop_is_the_transcription(image_size: tuple[int, int], box: Box, size: tuple[int, int]):
    image = noise_image(*image_size, 1)
    expected = torch.from_numpy(crop_and_resize(image, box, size)).permute(2, 0, 1).float()
    torch.testing.assert_close(one(image, box, size), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        pytest.param(Box(-6, -4, 16, 12, False), (12, 16), id="top-left-same-scale"),
        pytest.param(Box(10, 8, 20, 16, False), (24, 30), id="bottom-right-up"),
        pytest.param(Box(-20, -24, 60, 60, False), (20, 20), id="all-around-down"),
        pytest.param(Box(-20, -24, 60, 60, False), (90, 90), id="all-around-up"),
        pytest.param(Box(-20, 0, 30, 16, False), (7, 11), id="left-down"),
    ],
)
def test_outside_the_image_is_black(box: Box, size: tuple[int, int], flip: bool):
    """A hard border: as if the image were resized first and then laid on a black ground."""
    image = noise_image(20, 16, 2) // 2 + 100
    box = box._replace(flip=flip)
    found = one(image, box, size)
    expected = torch.from_numpy(crop_and_resize(image, box, size)).permute(2, 0, 1).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    white = torch.full((20 * 16,), 255, dtype=torch.uint8)
    inside = cut_labels(white, packed([image]), torch.tensor([0]), crop_of([box], [(20, 16)]), size=size, fill=0)[0] > 0
    assert not found[:, ~inside].any()
    assert (found[:, inside] > 0.2).all(), "no dark rim: the image has no pixel below 100"


def test_a_crop_beside_the_image_is_black():
    assert not one(noise_image(20, 16, 2), Box(40, 40, 10, 10, False), (4, 4)).any()


def test_a_crop_of_another_image_is_of_that_image():
    images = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (0, 51, 255)]
    whole = Crop(torch.zeros(4, 2), torch.ones(4, 2))
    result = cut(packed(images), torch.tensor([2, 0, 1, 2]), whole, size=(3, 3))
    torch.testing.assert_close(result.mean(dim=(1, 2, 3)), torch.tensor([1.0, 0.0, 0.2, 1.0]))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    images = packed([noise_image(40, 30, 0), noise_image(17, 60, 1), noise_image(5, 5, 2)])
    index = torch.arange(3).repeat(5)
    crop = random_resized_crops(
        images.size[index], area=(0.1, 1.0), flip_prob=0.5, draws=Draws(torch.Generator().manual_seed(1), len(index))
    )
    whole = _filtered(images, index, crop, size=(12, 9))
    for budget in (1, 10_000):
        monkeypatch.setattr(crops, "WINDOW_BUDGET", budget)
        torch.testing.assert_close(_filtered(images, index, crop, size=(12, 9)), whole, atol=1e-6, rtol=0)


def test_no_crops():
    none = Crop(torch.empty(0, 2), torch.empty(0, 2))
    images, index = packed([noise_image(4, 4, 0)]), torch.empty(0, dtype=torch.long)
    assert cut(images, index, none, size=(5, 6)).shape == (0, 3, 5, 6)
    labels = torch.zeros(16, dtype=torch.uint8)
    assert cut_labels(labels, images, index, none, size=(5, 6)).shape == (0, 5, 6)


@pytest.mark.parametrize("fill", [255, 7])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        (Box(3, 2, 12, 9, False), (7, 5)),
        (Box(3, 2, 12, 9, True), (20, 31)),
        (Box(0, 0, 20, 16, False), (16, 20)),
        (Box(-5.5, -3.25, 31, 20, True), (13, 17)),
        (Box(40, 0, 5, 5, False), (3, 3)),
    ],
)
def test_labels_are_looked_up_pixel_by_pixel(box: Box, size: tuple[int, int], fill: int):
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 6, (16, 20), dtype=np.uint8) for _ in range(2)]
    images = packed([np.zeros((16, 20, 3), dtype=np.uint8)] * 2)
    flat = torch.from_numpy(np.concatenate([label.ravel() for label in labels]))
    result = cut_labels(flat, images, torch.tensor([1, 0]), crop_of([box] * 2, [(20, 16)] * 2), size=size, fill=fill)
    assert result.dtype == torch.uint8
    for found, number in zip(result, (1, 0), strict=True):
        assert np.array_equal(found.numpy(), crop_labels(labels[number], box, size, fill))


def test_pictures_and_labels_of_one_crop_agree():
    """A two-coloured image whose labels are its colours."""
    mask = (np.random.default_rng(0).random((6, 8)) > 0.5).repeat(10, 0).repeat(10, 1)
    image = np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    pack, box = packed([image]), crop_of([Box(13, 7, 60, 45, True)], [(80, 60)])
    picture = cut(pack, torch.tensor([0]), box, size=(90, 120))[0, 0]
    label = cut_labels(torch.from_numpy(mask.astype(np.uint8).ravel()), pack, torch.tensor([0]), box, size=(90, 120))[0]
    clear = (picture < 0.05) | (picture > 0.95)
    assert clear.float().mean() > 0.6
    assert torch.equal((picture > 0.5)[clear], label.bool()[clear])


def test_packed_images_give_back_each_image():
    arrays = [noise_image(5, 7, 0), noise_image(1, 1, 1), noise_image(8, 3, 2)]
    images = packed(arrays)
    assert len(images) == 3
    for number, array in enumerate(arrays):
        assert np.array_equal(images.image(number).numpy(), array)
    moved: PackedImages = images.to(torch.device("cpu"))
    assert torch.equal(moved.pixels, images.pixels)


def test_a_subset_holds_the_chosen_images_in_order():
    arrays = [noise_image(5, 7, 0), noise_image(1, 1, 1), noise_image(8, 3, 2)]
    chosen = subset(packed(arrays), torch.tensor([2, 0, 2]))
    assert len(chosen.pixels) == 24 + 35 + 24
    for number, original in enumerate((2, 0, 2)):
        assert np.array_equal(chosen.image(number).numpy(), arrays[original])
