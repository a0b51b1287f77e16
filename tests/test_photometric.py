import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from reference import photometric as literal
from torch import Tensor

from glare.photometric import (
    ADJUSTMENTS,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    colour_jitter,
    gaussian_blur,
    grey,
    shift_hue,
    solarize,
)

LITERAL = (literal.brightness, literal.contrast, literal.saturation, literal.hue)
IDENTITY = (1.0, 1.0, 1.0, 0.0)


def images(count: int = 4, height: int = 5, width: int = 6, seed: int = 0) -> Tensor:
    """Noise, with black, white, greys and pure colours among its pixels."""
    result = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    special = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0.2, 0.7, 0.7)]
    result[0].flatten(1)[:, : len(special)] = torch.tensor(special).T
    return result


def assert_equal_each(found: Tensor, given: Tensor, change, *parameters: Tensor) -> None:
    """``found`` is ``change`` of every image with its own parameters."""
    for number, image in enumerate(given):
        expected = change(image.double().numpy(), *(float(p[number]) for p in parameters))
        torch.testing.assert_close(found[number].double(), torch.from_numpy(expected), atol=2e-6, rtol=0)


def test_grey_is_luma():
    given = images()
    assert_equal_each(grey(given), given, literal.grey)


def test_solarize_inverts_from_one_half_on():
    given = images()
    assert_equal_each(solarize(given), given, literal.solarize)


@pytest.mark.parametrize(
    ("number", "factors"),
    [(0, (0.0, 0.6, 1.0, 1.4)), (1, (0.0, 0.6, 1.0, 1.4)), (2, (0.0, 0.8, 1.0, 1.2)), (3, (-0.5, -0.1, 0.07, 0.5))],
)
def test_each_adjustment_equals_the_transcription(number: int, factors: tuple[float, ...]):
    given, parameters = images(), torch.tensor(factors)
    found = ADJUSTMENTS[number](given, parameters)
    assert_equal_each(found, given, LITERAL[number], parameters)
    assert found.amin() >= 0 and found.amax() <= 1


@pytest.mark.parametrize(("adjust", "parameter"), list(zip(ADJUSTMENTS, IDENTITY, strict=True)))
def test_the_identity_parameter_changes_nothing(adjust, parameter: float):
    given = images()
    torch.testing.assert_close(adjust(given, torch.full((4,), parameter)), given, atol=1e-6, rtol=0)


def test_hue_turns_full_circle():
    given, third = images(), torch.full((4,), 1 / 3)
    turned = shift_hue(shift_hue(shift_hue(given, third), third), third)
    torch.testing.assert_close(turned, given, atol=5e-6, rtol=0)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(shift_hue(red, third[:1]), red.roll(1, dims=1), atol=1e-6, rtol=0)


def test_what_factor_zero_leaves():
    given, zero = images(), torch.zeros(4)
    assert not adjust_brightness(given, zero).any()
    assert torch.equal(adjust_saturation(given, zero), grey(given))
    plain = adjust_contrast(given, zero)
    torch.testing.assert_close(plain, plain.mean(dim=(1, 2, 3), keepdim=True).expand_as(plain))


def test_arguments_are_left_alone():
    given, half = images(), torch.full((4,), 0.3)
    before = given.clone()
    for adjust in ADJUSTMENTS:
        adjust(given, half)
    colour_jitter(given, torch.full((4, 4), 0.3), torch.arange(4).expand(4, 4))
    solarize(given)
    gaussian_blur(given, half, radius=2)
    assert torch.equal(given, before)


def test_jitter_goes_through_each_images_own_order():
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]])
    given = images()
    factors = torch.tensor([[1.4, 0.6, 1.2, 0.1], [0.6, 1.4, 0.8, -0.1], [1.3, 1.4, 1.1, 0.05], [0.7, 1.3, 0.9, 0.08]])
    found = colour_jitter(given, factors, orders)
    for number in range(4):
        expected = given[number].double().numpy()
        for kind in orders[number].tolist():
            expected = LITERAL[kind](expected, float(factors[number, kind]))
        torch.testing.assert_close(found[number].double(), torch.from_numpy(expected), atol=5e-6, rtol=0)
    other = colour_jitter(given, factors, orders.flip(0))
    assert (found - other).abs().amax() > 0.02, "the order matters, or this test proves nothing"


@pytest.mark.parametrize(("height", "width"), [(9, 9), (7, 12), (3, 5), (1, 4), (1, 1)])
@pytest.mark.parametrize("radius", [2, 6])
def test_blur_equals_the_transcription(height: int, width: int, radius: int):
    """Also where the kernel reaches over the image more than once."""
    given, sigma = images(2, height, width) if height * width > 8 else torch.rand(2, 3, height, width), [0.3, 1.9]
    found = gaussian_blur(given, torch.tensor(sigma), radius=radius)
    for number in range(2):
        expected = literal.gaussian_blur(given[number].double().numpy(), sigma[number], radius)
        torch.testing.assert_close(found[number].double(), torch.from_numpy(expected), atol=2e-6, rtol=0)


def test_blur_keeps_a_plain_image_and_almost_nothing_of_a_chequerboard():
    plain = torch.full((1, 3, 16, 16), 0.37)
    torch.testing.assert_close(gaussian_blur(plain, torch.tensor([2.0]), radius=6), plain)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board = ((rows + columns) % 2).float().expand(1, 3, 16, 16)
    assert (gaussian_blur(board, torch.tensor([2.0]), radius=6) - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_close_to_pillows(sigma: float):
    """Pillow approximates a Gaussian by repeated box filters, and repeats the outermost pixels."""
    small = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
    given = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).float() / 255
    expected = np.array(picture.filter(ImageFilter.GaussianBlur(sigma)))
    found = gaussian_blur(given, torch.tensor([sigma]), radius=6)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected)[8:-8, 8:-8].mean() < 1.5
