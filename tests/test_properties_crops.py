"""Properties of crops: any box on any image gives what a loop gives, and no pixel of another image is ever read."""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference.builders import crop_of, noise_image, packed
from reference.correspondence import Box
from reference.resample import crop_and_resize, crop_labels

from glare.crops import _filtered, cut, cut_labels
from glare.draws import Draws
from glare.geometry import random_resized_crops
from glare.labelled_crops import ATTEMPTS, random_crops

SIDES = st.integers(1, 9)
EIGHTHS = st.integers(-40, 80).map(lambda number: number / 8)
LENGTHS = st.integers(1, 96).map(lambda number: number / 8)
BOXES = st.builds(Box, EIGHTHS, EIGHTHS, LENGTHS, LENGTHS, st.booleans())
OUTPUTS = st.tuples(st.integers(1, 6), st.integers(1, 6))
TIE = 1e-3  # px: whether a centre this near to a border is inside depends on rounding


def clear_of_borders(box: Box, image: tuple[int, int], output: tuple[int, int]) -> bool:
    """Whether no centre of an output pixel lies on the border of the image."""
    across = (box.left, box.width, image[0], output[1])
    down = (box.top, box.height, image[1], output[0])
    for first, length, side, count in (across, down):
        centres = [first + (number + 0.5) * length / count for number in range(count)]
        if any(min(abs(centre), abs(centre - side)) < TIE for centre in centres):
            return False
    return True


@given(st.tuples(SIDES, SIDES), BOXES, OUTPUTS)
def test_any_crop_is_what_a_loop_gives(size: tuple[int, int], box: Box, output: tuple[int, int]) -> None:
    assume(clear_of_borders(box, size, output))
    image = noise_image(*size, 0)
    # pictures before and after it in the same array, so that what is read outside would show
    images = packed([np.full((2, 2, 3), 255, np.uint8), image, np.full((9, 9, 3), 255, np.uint8)])
    crop, index = crop_of([box], [size]), torch.tensor([1])
    expected = crop_and_resize(image, box, output)
    for way in (cut, _filtered):
        found = way(images, index, crop, size=output)[0].permute(1, 2, 0).numpy()
        assert found.shape == (*output, 3) and np.isfinite(found).all()
        assert np.abs(found - expected).max() <= 2.01 / 255


@given(st.tuples(SIDES, SIDES), BOXES, OUTPUTS)
def test_any_crop_of_labels_is_what_a_loop_gives(size: tuple[int, int], box: Box, output: tuple[int, int]) -> None:
    pixels = size[0] * size[1]
    assume(clear_of_borders(box, size, output))
    width, height = output[1], output[0]
    grid = [box.left + (x + 0.5) * box.width / width for x in range(width)]
    grid += [box.top + (y + 0.5) * box.height / height for y in range(height)]
    assume(all(abs(centre - round(centre)) > TIE for centre in grid))
    images = packed([np.zeros((2, 2, 3), np.uint8), noise_image(*size, 0), np.zeros((9, 9, 3), np.uint8)])
    labels = np.arange(pixels, dtype=np.uint8)
    everything = torch.from_numpy(np.concatenate([np.full(4, 200, np.uint8), labels, np.full(81, 200, np.uint8)]))
    found = cut_labels(everything, images, torch.tensor([1]), crop_of([box], [size]), size=output)[0]
    assert np.array_equal(found.numpy(), crop_labels(labels.reshape(size[::-1]), box, output, 255))


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=8),
    st.floats(1e-4, 1),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_random_crops_are_whole_pixels_inside_their_images(
    sizes: list[tuple[int, int]], low: float, extra: float, seed: int
) -> None:
    area = (low, low + extra * (1 - low))
    size_px = torch.tensor(sizes)
    draws = Draws(torch.Generator().manual_seed(seed), len(sizes))
    crop = random_resized_crops(size_px, area=area, flip_prob=0.5, draws=draws)
    edges = torch.stack([crop.offset, crop.offset + crop.scale]).double() * size_px
    first, last = edges.amin(dim=0), edges.amax(dim=0)
    assert (edges - edges.round()).abs().max() < 1e-2  # of float32 in units of the image
    assert (first > -1e-2).all() and (last < size_px + 1e-2).all() and (last - first > 0.99).all()


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.integers(1, 1024),
    st.floats(0.1, 4),
    st.floats(0, 4),
    st.integers(0, 2**31),
)
def test_training_crops_begin_inside_their_image(
    size: tuple[int, int], side: int, low: float, extra: float, seed: int
) -> None:
    draws = Draws(torch.Generator().manual_seed(seed), 1)
    crop = random_crops(torch.tensor([size]), size=side, scale=(low, low + extra), draws=draws)
    edges = torch.stack([crop.offset, crop.offset + crop.scale])
    first, last = edges.amin(dim=0), edges.amax(dim=0)
    assert crop.offset.shape == (1, ATTEMPTS, 2) and bool((crop.scale[..., 1] > 0).all())
    # inside, or where the crop is the larger one, from the left and upper border on
    larger = crop.scale.abs() > 1
    assert (first > -1e-4 * crop.scale.abs().clamp(min=1)).logical_or(larger).all()
    assert (last < 1 + 1e-4).logical_or(larger).all()
    assert torch.equal(crop.scale[:, :1].expand_as(crop.scale), crop.scale)  # one scale and flip an image
