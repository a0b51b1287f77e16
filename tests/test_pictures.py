import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glare.figures import GAP, MARGIN, SMALL, TEXT, TITLE
from glare.pictures import (
    CELL,
    GAINED,
    HEAT,
    LOST,
    attention_picture,
    change_picture,
    changed_pixels,
    changes,
    pca_colours,
    pca_picture,
)

PALETTE = [(200, 10, 20), (10, 220, 30), (20, 30, 240)]
TOP = MARGIN + TITLE + GAP


def features(seed: int, *shape: int) -> Tensor:
    """Random features whose components have clearly different variances."""
    drawn = torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(3, 0.2, 12) ** 2


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64))[0]


def slow_colours(before: Tensor, after: Tensor) -> np.ndarray:
    """The definition, component by component, by singular value decomposition."""
    rows = torch.cat([before.flatten(0, -2), after.flatten(0, -2)]).double().numpy()
    rows = rows - rows.mean(axis=0)
    directions = np.linalg.svd(rows, full_matrices=False)[2]
    channels = []
    for component in range(3):
        score = rows @ directions[component]
        if score[np.abs(score).argmax()] < 0:
            score = -score
        low, high = np.quantile(score, 0.01), np.quantile(score, 0.99)
        channels.append(np.round(255 * np.clip((score - low) / (high - low), 0, 1)))
    return np.stack(channels, axis=-1)


def test_colours_are_the_three_components_of_all_patches() -> None:
    before, after = features(0, 2, 5, 6), features(1, 2, 5, 6)
    found = np.concatenate([colours.reshape(-1, 3) for colours in pca_colours(before, after)])
    assert np.abs(found - slow_colours(before, after)).max() <= 1


def test_equal_features_have_equal_colours() -> None:
    same = features(0, 5, 6)
    before, after = pca_colours(same, same)
    assert before.shape == (5, 6, 3) and before.dtype == np.uint8
    assert (before == after).all()


def test_a_patch_keeps_its_colour_whatever_else_is_in_its_picture() -> None:
    before, after = features(0, 5, 6), 4 * features(1, 5, 6) + 2
    after[2, 3] = before[1, 1]
    ours, theirs = pca_colours(before, after)
    assert (ours[1, 1] == theirs[2, 3]).all()


def test_a_rotation_of_both_changes_nothing() -> None:
    before, after = features(0, 2, 5, 6).double(), features(1, 2, 5, 6).double()
    turned = pca_colours(before @ rotation(12), after @ rotation(12))
    for found, expected in zip(turned, pca_colours(before, after), strict=True):
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_collapsed_features_have_one_colour() -> None:
    before, after = pca_colours(features(0, 5, 6), torch.ones(5, 6, 12))
    assert len(np.unique(after.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_what_does_not_vary_is_grey(dim: int) -> None:
    flat = torch.zeros(4, 5, dim)
    flat[..., 0] = torch.arange(20.0).view(4, 5)
    turned = flat.double() @ rotation(dim)  # numbers that are zero but for rounding
    colours, _ = pca_colours(turned, turned)
    assert (colours[..., 1:] == 128).all() and np.ptp(colours[..., 0]) == 255


def test_images_of_different_grids_share_their_colours() -> None:
    tensors = [features(0, 4, 4), features(1, 3, 6)]
    tensors[1][0, 5] = tensors[0][3, 0]
    images = [Image.new("RGB", (40, 40), (9, 8, 7)), Image.new("RGB", (60, 30), (9, 8, 7))]
    picture = pca_picture(images, tensors, tensors, names=["a", "b"])
    left, second = MARGIN + SMALL + GAP, TOP + CELL + GAP
    assert picture.getpixel((left + 10, TOP + 10)) == (9, 8, 7)
    for column in (1, 2):
        x = left + column * (CELL + GAP)
        first = picture.getpixel((x + CELL // 8, TOP + CELL * 7 // 8))
        assert first == picture.getpixel((x + CELL * 11 // 12, second + CELL // 12))
        assert first != picture.getpixel((x + CELL * 7 // 8, TOP + CELL // 8))


def test_gained_and_lost_pixels() -> None:
    label = np.array([[0, 0, 1, 1, 255]], np.uint8)
    before = np.array([[0, 1, 1, 0, 1]], np.uint8)
    after = np.array([[1, 0, 1, 0, 2]], np.uint8)
    gained, lost = changes(label, before, after)
    assert gained.tolist() == [[False, True, False, False, False]]
    assert lost.tolist() == [[True, False, False, False, False]]
    pixels = np.asarray(changed_pixels(Image.new("RGB", (5, 1), (90, 90, 90)), gained, lost))
    assert tuple(pixels[0, 1]) == GAINED and tuple(pixels[0, 0]) == LOST
    assert len({*map(tuple, pixels[0, 2:])}) == 1 and len({*pixels[0, 2]}) == 1


def test_the_change_picture_shows_image_truth_predictions_and_change() -> None:
    size = (CELL, 100)
    label, before, after = (np.full(size[::-1], value, np.uint8) for value in (0, 1, 0))
    label[:, :20] = 255
    after[50:], before[50:] = 2, 0
    picture = change_picture(Image.new("RGB", size, (9, 8, 7)), label, before, after, ["a", "b", "c"], PALETTE)
    top = TOP + TEXT + GAP // 2

    def at(column: int, y: int, x: int = 200) -> object:
        return picture.getpixel((MARGIN + column * (CELL + GAP) + x, top + y))

    assert at(0, 20) == (9, 8, 7) and at(1, 20) == PALETTE[0]
    assert at(2, 20) == PALETTE[1] and at(2, 80) == PALETTE[0]
    assert at(3, 20) == PALETTE[0] and at(3, 80) == PALETTE[2]
    assert at(4, 20) == GAINED and at(4, 80) == LOST
    assert at(4, 20, x=10) not in (GAINED, LOST)


def test_an_image_without_labels_has_no_change() -> None:
    label = np.full((10, 10), 255, np.uint8)
    change_picture(Image.new("RGB", (10, 10)), label, label * 0, label * 0 + 1, ["a", "b"], PALETTE)
    gained, lost = changes(label, label * 0, label * 0 + 1)
    assert not gained.any() and not lost.any()


def test_attention_is_brightest_where_it_is_highest_on_one_scale_a_head() -> None:
    before, after = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    before[0, :4], after[0, :4] = 0.1, 0.2
    before[1], after[1] = 0.01, 0.01
    picture = attention_picture(Image.new("RGB", (64, 64), (80, 80, 80)), before, after)
    left, step = MARGIN + SMALL + GAP, CELL + GAP

    def brightness(column: int, row: int, y: float) -> int:
        pixel = picture.getpixel((left + column * step + CELL // 2, TOP + row * step + round(y * CELL)))
        assert isinstance(pixel, tuple)
        return sum(pixel)

    assert picture.getpixel((left + 50, TOP + 50)) == (80, 80, 80)
    assert brightness(1, 1, 0.25) > brightness(1, 0, 0.25) + 100 > brightness(1, 0, 0.9) + 200
    assert brightness(2, 0, 0.5) == brightness(2, 1, 0.5) > sum(HEAT[3])


def test_many_heads_share_the_width() -> None:
    picture = attention_picture(Image.new("RGB", (64, 48)), torch.rand(16, 6, 8), torch.rand(16, 6, 8))
    assert picture.width < 1800
