"""Logits of whole images: windows, sizes and mirror images; each against what it means, computed apart."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import CLASSES
from PIL import Image
from tiny_models import varied_segmenter
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig

from glare import GlareConfig, GlareForSemanticSegmentation
from glare.dense_inference import (
    PASS_PIXELS,
    WHOLE_LIMIT_PX,
    WINDOW_PX,
    Sweep,
    logits,
    remember,
    segment,
    sweep_for,
    sweep_of,
)
from glare.errors import UserError
from glare.views import Normalisation

NORMALISE = Normalisation()


class Pointwise(nn.Module):
    """Logits that depend on the pixel alone, so that a mirror image has mirrored logits; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, patch_size=4)
        self.config = GlareConfig(backbone_config=vit, id2label=dict(enumerate(CLASSES)))
        self.device = torch.device("cpu")
        self.passes: list[tuple[int, ...]] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.passes.append(tuple(pixel_values.shape))
        return SimpleNamespace(logits=pixel_values * torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1))


@pytest.fixture
def model() -> PreTrainedModel:
    return varied_segmenter()


@pytest.fixture
def pointwise() -> Any:
    return Pointwise()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).unsqueeze(0)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Without the edges at which filters overshoot and clip, each in its own way."""
    coarse = np.random.default_rng(seed).integers(60, 200, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def resized(pixels: Tensor, width: int, height: int) -> Tensor:
    """Images (1, h, w, 3) by Pillow's bicubic filter."""
    image = Image.fromarray(pixels[0].numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return pixels_of(image)


def test_logits_are_those_of_the_padded_image_cut_back(model: PreTrainedModel) -> None:
    image = picture(22, 13)
    found = logits(model, pixels_of(image), normalise=NORMALISE)
    assert found.shape == (1, 3, 13, 22) and found.dtype == torch.float32
    padded = torch.zeros(1, 3, 16, 24)
    padded[:, :, :13, :22] = NORMALISE(pixels_of(image).permute(0, 3, 1, 2) / 255)
    with torch.inference_mode():
        coarse = model(pixel_values=padded).logits
    fine = torch.nn.functional.interpolate(coarse, size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, fine[:, :, :13, :22])


def test_sizes_may_be_mixed_and_smaller_than_a_patch(model: PreTrainedModel) -> None:
    images = [picture(22, 13), picture(1, 1), picture(3, 30)]
    labels = segment(model, images, normalise=NORMALISE)
    assert [label.shape for label in labels] == [(13, 22), (1, 1), (30, 3)]
    assert all(label.dtype == np.uint8 and label.max() < 3 for label in labels)


def test_a_batch_equals_its_images(model: PreTrainedModel) -> None:
    pixels = torch.cat([pixels_of(picture(22, 13, seed)) for seed in range(3)])
    for sweep in (Sweep(), Sweep(window=12, stride=5)):
        together = logits(model, pixels, normalise=NORMALISE, sweep=sweep)
        apart = [logits(model, image.unsqueeze(0), normalise=NORMALISE, sweep=sweep) for image in pixels]
        torch.testing.assert_close(together, torch.cat(apart))


def test_one_window_is_the_whole_image(model: PreTrainedModel) -> None:
    pixels = pixels_of(picture(22, 13))
    whole = logits(model, pixels, normalise=NORMALISE)
    assert torch.equal(logits(model, pixels, normalise=NORMALISE, sweep=Sweep(window=22)), whole)
    assert not torch.allclose(logits(model, pixels, normalise=NORMALISE, sweep=Sweep(window=12)), whole)


def test_windows_are_averaged_whatever_their_order(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, sweep = pixels_of(picture(30, 21)), Sweep(window=12, stride=7)
    found = logits(model, pixels, normalise=NORMALISE, sweep=sweep)
    windows = sweep.windows((21, 30))
    total, covered = torch.zeros(3, 21, 30), torch.zeros(21, 30)
    for rows, columns in windows:
        total[:, rows, columns] += logits(model, pixels[:, rows, columns], normalise=NORMALISE)[0]
        covered[rows, columns] += 1
    torch.testing.assert_close(found[0], total / covered)
    monkeypatch.setattr(Sweep, "windows", lambda *_: windows[::-1])
    torch.testing.assert_close(logits(model, pixels, normalise=NORMALISE, sweep=sweep), found)


@pytest.mark.parametrize("size", [(21, 30), (12, 50), (100, 13), (5, 40), (12, 13)])
@pytest.mark.parametrize("stride", [None, 1, 7, 12])
def test_windows_cover_every_pixel_and_stay_inside(size: tuple[int, int], stride: int | None) -> None:
    covered = np.zeros(size, dtype=int)
    shapes = set()
    for window in Sweep(window=12, stride=stride).windows(size):
        assert all(0 <= span.start < span.stop <= length for span, length in zip(window, size, strict=True))
        covered[window] += 1
        shapes.add(covered[window].shape)
    assert covered.min() >= 1 and shapes == {(min(12, size[0]), min(12, size[1]))}


def test_only_large_images_are_cut_by_default() -> None:
    assert len(Sweep().windows((WHOLE_LIMIT_PX, 700))) == 1
    windows = Sweep().windows((WHOLE_LIMIT_PX + 1, 700))
    assert len(windows) == 2 and windows[0] == (slice(0, WINDOW_PX), slice(0, 700))


@pytest.mark.parametrize(("window", "stride"), [(0, None), (16, 0), (16, 17), (None, 2000)])
def test_windows_that_leave_gaps_are_refused(window: int | None, stride: int | None) -> None:
    with pytest.raises(ValueError, match="give"):
        Sweep(window, stride)


def test_one_size_without_mirror_images_is_the_plain_result(model: PreTrainedModel) -> None:
    pixels = pixels_of(picture(22, 13))
    plain = logits(model, pixels, normalise=NORMALISE, sweep=Sweep())
    assert torch.equal(logits(model, pixels, normalise=NORMALISE, sweep=Sweep(ratios=(1.0,), flip=False)), plain)
    assert torch.equal(logits(model, pixels, normalise=NORMALISE, sweep=Sweep(test_scale=(22, 13))), plain)


@pytest.mark.parametrize("width", [24, 22])
def test_mirror_images_change_nothing_where_the_model_is_equivariant(pointwise: Any, width: int) -> None:
    pixels = pixels_of(picture(width, 13))
    plain = logits(pointwise, pixels, normalise=NORMALISE)
    found = logits(pointwise, pixels, normalise=NORMALISE, sweep=Sweep(flip=True))
    # a mirrored pixel may be computed in another lane of the processor, which rounds otherwise
    torch.testing.assert_close(found, plain.softmax(dim=1).log(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.argmax(dim=1), plain.argmax(dim=1))
    assert pointwise.passes[-1][0] == 2  # both in one pass


def test_sizes_and_mirror_images_are_the_mean_of_the_softmax(model: PreTrainedModel) -> None:
    pixels = torch.cat([pixels_of(smooth(40, 28, seed)) for seed in (0, 1)])
    sweep = Sweep(window=16, stride=11, ratios=(0.5, 1.0, 1.5), flip=True)
    windows = Sweep(window=16, stride=11)
    found = logits(model, pixels, normalise=NORMALISE, sweep=sweep)
    for number, image in enumerate(pixels.split(1)):
        total = torch.zeros(1, 3, 28, 40)
        for width, height in ((20, 14), (40, 28), (60, 42)):
            for flip in (False, True):
                source = resized(image.flip(2) if flip else image, width, height)
                part = logits(model, source, normalise=NORMALISE, sweep=windows)
                part = torch.nn.functional.interpolate(part, size=(28, 40), mode="bilinear").softmax(dim=1)
                total += part.flip(-1) if flip else part
        # torch's filter and Pillow's may differ by one step of 255
        torch.testing.assert_close(found[number : number + 1].exp(), total / 6, rtol=0, atol=8e-3)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(2, 28, 40))
    for wrong in (Sweep(16, 11, flip=True), Sweep(16, 11, ratios=(0.5, 1.0, 1.5))):
        assert (logits(model, pixels, normalise=NORMALISE, sweep=wrong).softmax(dim=1) - found.exp()).abs().max() > 0.05


def test_images_are_brought_to_the_test_scale_and_logits_back(pointwise: Any) -> None:
    image = smooth(40, 20)
    found = logits(pointwise, pixels_of(image), normalise=NORMALISE, sweep=Sweep(test_scale=(64, 24)))
    assert found.shape == (1, 3, 20, 40) and pointwise.passes == [(1, 3, 24, 48)]
    source = resized(pixels_of(image), 48, 24)
    coarse = logits(pointwise, source, normalise=NORMALISE)
    expected = torch.nn.functional.interpolate(coarse, size=(20, 40), mode="bilinear")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.06)  # a step of 255, three times


@pytest.mark.parametrize(
    ("size", "scale", "ratios", "expected"),
    [
        ((512, 683), (2048, 512), (1.0,), [(512, 683)]),
        ((300, 400), (2048, 512), (0.5, 1.75), [(256, 341), (896, 1195)]),
        ((200, 2000), (2048, 512), (1.0,), [(205, 2048)]),  # the longer side stops it
        ((1024, 2048), (1024, 2048), (1.0,), [(1024, 2048)]),
        ((5, 3), None, (0.1, 2.0), [(1, 1), (10, 6)]),
    ],
)
def test_sizes_are_those_of_mmsegmentation(
    size: tuple[int, int], scale: Any, ratios: tuple[float, ...], expected: list[tuple[int, int]]
) -> None:
    assert Sweep(test_scale=scale, ratios=ratios).sizes(size) == expected


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (Sweep(ratios=(1.0, 1e9)), "ratio 1e+09 brings an image of 37 x 30 px to 3.7e+10 x 3e+10 px, at most 16384"),
        (Sweep(ratios=(1e308,)), "to inf x inf px, at most 16384 x 16384 px can be segmented; give lower ratios"),
        (Sweep(test_scale=(16384, 16384), ratios=(4.0,)), "to 6.554e+04 x 5.314e+04 px, at most 16384 x 16384 px"),
    ],
)
def test_ratios_beyond_what_can_be_segmented_are_one_sentence(pointwise: Any, sweep: Sweep, said: str) -> None:
    with pytest.raises(UserError) as caught:
        logits(pointwise, pixels_of(picture(37, 30)), normalise=NORMALISE, sweep=sweep)
    assert said in str(caught.value) and not pointwise.passes


def test_what_is_large_or_small_by_itself_is_segmented(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sweep(ratios=(1.0, 0.01)).sizes((30, 37), patch=4) == [(30, 37), (3, 4)]
    assert Sweep(ratios=(0.5, 0.1)).sizes((3, 2), patch=4) == [(3, 2), (3, 2)]
    monkeypatch.setattr("glare.dense_inference.LARGEST_PIXELS", 100)
    assert Sweep().sizes((20, 30), patch=4) == [(20, 30)] and Sweep().sizes((2, 3), patch=4) == [(2, 3)]


def test_windows_of_many_images_share_passes_within_the_budget(pointwise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PASS_PIXELS >= WHOLE_LIMIT_PX**2
    monkeypatch.setattr("glare.dense_inference.PASS_PIXELS", 3 * 20 * 30)
    pixels = torch.cat([pixels_of(picture(30, 20, seed)) for seed in range(4)])
    found = logits(pointwise, pixels, normalise=NORMALISE, sweep=Sweep(window=12, stride=12))
    # three images at a time, each of six windows of 144 px, twelve together
    assert [shape[0] for shape in pointwise.passes] == [12, 6, 6]
    torch.testing.assert_close(found, logits(pointwise, pixels, normalise=NORMALISE))
    pointwise.passes.clear()
    logits(pointwise, pixels, normalise=NORMALISE, sweep=Sweep(ratios=(1.0, 2.0), flip=True))
    assert [shape[0] for shape in pointwise.passes] == [2, 2] * 4  # one image, for its mirror image at twice the size


@pytest.mark.parametrize("values", [{"ratios": ()}, {"ratios": (1.0, 0.0)}, {"test_scale": (0, 5)}])
def test_impossible_sizes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give"):
        Sweep(**values)
    with pytest.raises(ValueError, match="16384"):
        Sweep(test_scale=(2**20, 512))


def test_a_model_remembers_its_windows_and_test_scale(model: PreTrainedModel, tmp_path: Any) -> None:
    assert sweep_of(model) == Sweep()
    remember(model, Sweep())
    assert not hasattr(model.config, "inference")
    remember(model, Sweep(window=16, test_scale=(48, 24), ratios=(0.5, 1.0), flip=True))
    model.save_pretrained(tmp_path)
    again = GlareForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert sweep_of(again) == Sweep(window=16, test_scale=(48, 24))
    pixels = pixels_of(picture(30, 20))
    wanted = logits(model, pixels, normalise=NORMALISE, sweep=Sweep(16, None, (48, 24)))
    assert torch.equal(logits(again, pixels, normalise=NORMALISE), wanted)
    asked = SimpleNamespace(window=None, stride=8, test_scale=None, ratios=(2.0,), flip=True)
    assert sweep_for(again, asked) == Sweep(16, 8, (48, 24), (2.0,), True)
    asked.stride = 17
    with pytest.raises(UserError, match=r"stride.*17.* \(the window is the model's own\)"):
        sweep_for(again, asked)
    asked.stride = None
    assert sweep_for(again, asked) == Sweep(16, None, (48, 24), (2.0,), True)


@pytest.mark.parametrize(
    "note",
    [{"test_scale": [1]}, {"test_scale": "big"}, {"window": "all"}, {"window": -1}, {"test_scale": [2**30, 1]}, [1], 7],
)
def test_a_broken_note_is_an_error(model: PreTrainedModel, note: Any) -> None:
    model.config.inference = note
    with pytest.raises(ValueError, match=r"window|test_scale"):
        sweep_of(model)
