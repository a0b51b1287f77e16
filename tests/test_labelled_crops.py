import colorsys

import numpy as np
import pytest
import torch

from glare import labelled_crops
from glare.crops import PackedImages
from glare.data.labelled import PackedLabelled
from glare.draws import Draws
from glare.labelled_crops import (
    ATTEMPTS,
    TrainingCrops,
    first_balanced,
    photometric_distortion,
    random_crops,
    scale_saturation,
    scaled_sizes,
    training_batch,
)
from glare.views import Normalisation

IDENTITY = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(images: int, seed: int = 0) -> Draws:
    return Draws(seeded(seed), images)


def pack(label: torch.Tensor, value: float = 60.0) -> PackedLabelled:
    """An image (h, w) whose grey value is 20 + 60 times its class."""
    height, width = label.shape
    pixels = (20 + value * label.float()).to(torch.uint8).view(-1, 1).expand(-1, 3).contiguous()
    images = PackedImages(pixels, torch.tensor([0]), torch.tensor([[width, height]]))
    classes = ["a", "b", "c"]
    return PackedLabelled(images, label.to(torch.uint8).view(-1), ["x"], classes, np.zeros((3, 3), np.uint8), [])


@pytest.fixture
def undistorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_crops, "photometric_distortion", lambda images, **_: images)


@pytest.mark.usefixtures("undistorted")
def test_pixels_and_labels_of_a_crop_show_the_same_place() -> None:
    label = torch.zeros(60, 80, dtype=torch.long)
    label[:, 30:] = 1
    label[40:, 50:] = 2
    crops = TrainingCrops(32, (0.5, 2.0), 0.99, IDENTITY)
    pixels, labels = training_batch(pack(label), torch.zeros(64, dtype=torch.long), crops, CPU, draws=draws(64))
    assert pixels.shape == (64, 3, 32, 32) and labels.shape == (64, 32, 32) and labels.dtype == torch.int64
    seen = ((pixels[:, 0] * 255 - 20) / 60).round().long()
    known = labels != 255
    # resampling mixes the two sides of an edge, and only there may they differ
    assert (seen[known] == labels[known]).float().mean() > 0.97
    left, right = labels[..., 0].float(), labels[..., -1].float()
    assert (left > right).any() and (left < right).any()  # flipped and not


@pytest.mark.usefixtures("undistorted")
def test_what_lies_outside_the_image_is_zero_after_normalisation_and_ignored() -> None:
    label = torch.zeros(10, 20, dtype=torch.long)
    label[:, 10:] = 1
    crops = TrainingCrops(32, (1.0, 1.0), 0.75, Normalisation())
    pixels, labels = training_batch(pack(label), torch.zeros(16, dtype=torch.long), crops, CPU, draws=draws(16))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:10, :20] = True
    assert (labels == 255).eq(~inside).all()
    assert (pixels[:, :, ~inside] == 0).all() and (pixels[:, :, inside] != 0).all()
    assert sorted({tuple(row.tolist()) for row in labels[:, 0, :20]}) == [
        (0,) * 10 + (1,) * 10,
        (1,) * 10 + (0,) * 10,
    ]


def test_a_batch_depends_on_the_generator_alone() -> None:
    label = torch.arange(3).repeat_interleave(20).expand(40, 60)
    crops, index = TrainingCrops(24, (0.5, 2.0), 0.75, IDENTITY), torch.zeros(4, dtype=torch.long)
    first, again, other = (
        training_batch(pack(label), index, crops, CPU, draws=draws(len(index), s)) for s in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_crops_have_the_drawn_scale_and_lie_inside_where_they_fit() -> None:
    size = torch.tensor([[100, 80]]).expand(200, 2)
    crop = random_crops(size, size=32, scale=(0.5, 2.0), draws=draws(len(size)))
    assert crop.offset.shape == crop.scale.shape == (200, ATTEMPTS, 2)
    extent_px = crop.scale.abs() * size.unsqueeze(1)
    assert torch.allclose(extent_px[..., 0], extent_px[..., 1])
    factor = 32 / extent_px[:, 0, 0]
    assert 0.5 <= factor.min() < 0.6 and 1.9 < factor.max() <= 2.0
    edges = torch.stack([crop.offset, crop.offset + crop.scale])
    assert edges.min() > -1e-6 and edges.max() < 1 + 1e-6
    flipped = crop.scale[..., 0] < 0
    assert 60 < flipped[:, 0].sum() < 140 and (flipped == flipped[:, :1]).all() and (crop.scale[..., 1] > 0).all()


@pytest.mark.parametrize(
    ("size", "base_scale", "expected"),
    [
        ((640, 480), (2048, 512), (682.667, 512)),
        ((512, 2048), (512, 2048), (512, 2048)),
        ((3000, 300), (2048, 512), (2048, 204.8)),  # the longer side stops it
        ((100, 100), (520, 520), (520, 520)),
        ((100, 80), None, (100, 80)),
    ],
)
def test_images_are_brought_to_the_base_scale_first(
    size: tuple[int, int], base_scale: tuple[int, int] | None, expected: tuple[float, float]
) -> None:
    found = scaled_sizes(torch.tensor([size, size]), base_scale)
    assert found.dtype == torch.float64 and found[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert torch.equal(found[0], found[1])


@pytest.mark.usefixtures("undistorted")
def test_a_crop_at_the_base_scale_is_one_of_the_resized_image() -> None:
    label = torch.arange(3).repeat_interleave(20).expand(40, 60)
    large = label.repeat_interleave(2, 0).repeat_interleave(2, 1)
    index = torch.zeros(8, dtype=torch.long)
    at_base = TrainingCrops(24, (0.5, 2.0), 0.75, IDENTITY, base_scale=(120, 80))
    native = TrainingCrops(24, (0.5, 2.0), 0.75, IDENTITY)
    found, expected = (
        training_batch(pack(source), index, crops, CPU, draws=draws(8))[1]
        for source, crops in ((label, at_base), (large, native))
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, training_batch(pack(label), index, native, CPU, draws=draws(8))[1])


def test_the_first_crop_without_a_dominant_class_is_taken() -> None:
    generator = seeded()
    probe = torch.randint(0, 4, (300, 5, 12), generator=generator)
    probe[torch.rand(probe.shape, generator=generator) < 0.5] = 1
    probe[probe == 3] = 255
    expected = []
    for image in probe.tolist():
        chosen = len(image) - 1
        for number, crop in enumerate(image):
            counts = [crop.count(k) for k in set(crop) - {255}]
            if len(counts) > 1 and max(counts) / sum(counts) < 0.75:
                chosen = number
                break
        expected.append(chosen)
    assert first_balanced(probe.to(torch.uint8), 0.75).tolist() == expected
    assert len(set(expected)) == 5


def test_a_dominant_share_of_one_asks_nothing_of_a_crop() -> None:
    """As mmsegmentation's ``cat_max_ratio`` of 1."""
    probe = torch.zeros((2, ATTEMPTS, 4096), dtype=torch.uint8)
    assert first_balanced(probe, 1.0).tolist() == [0, 0]
    assert first_balanced(probe, 0.99).tolist() == [ATTEMPTS - 1] * 2


def test_saturation_scales_as_in_hsv() -> None:
    images = torch.rand((2, 3, 4, 5), generator=seeded())
    factor = torch.tensor([0.5, 1.5])
    result = scale_saturation(images, factor)
    for n, y, x in np.ndindex(2, 4, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[n, :, y, x].tolist())
        wanted = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor[n].item()), value)
        assert result[n, :, y, x].tolist() == pytest.approx(wanted, abs=1e-5)


def test_distortion_leaves_some_images_alone_and_keeps_the_range() -> None:
    images = torch.rand((256, 3, 6, 6), generator=seeded())
    result = photometric_distortion(images, draws=draws(len(images), 3))
    assert result.min() > -1e-6 and result.max() < 1 + 1e-6
    same = (result == images).flatten(1).all(dim=1).sum().item()
    assert 256 / 16 - 12 < same < 256 / 16 + 12  # each of four changes happens half of the time
    assert torch.equal(result, photometric_distortion(images, draws=draws(len(images), 3)))


def test_each_distortion_is_bounded_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {"_add": [], "adjust_brightness": [], "scale_saturation": [], "shift_hue": []}

    def record(name: str):  # type: ignore[no-untyped-def]
        return lambda images, value: (seen[name].append(value), images)[1]

    for name in seen:
        monkeypatch.setattr(labelled_crops, name, record(name))
    photometric_distortion(torch.rand((2000, 3, 1, 1)), draws=draws(2000))
    bounds = {
        "_add": (-32 / 255, 32 / 255),
        "adjust_brightness": (0.5, 1.5),
        "scale_saturation": (0.5, 1.5),
        "shift_hue": (-0.1, 0.1),
    }
    for name, (low, high) in bounds.items():
        values = torch.cat(seen[name])
        width = high - low
        assert 900 < len(values) < 1100
        assert low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high
    assert len(seen["adjust_brightness"]) == 2  # before saturation and hue, or after


def test_ten_crops_are_looked_at_and_an_eleventh_is_taken_unseen() -> None:
    crops = random_crops(torch.tensor([[60, 40], [30, 30]]), size=16, scale=(1.0, 1.0), draws=draws(2))
    assert crops.offset.shape == crops.scale.shape == (2, 11, 2)


def test_contrast_comes_once_first_or_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("_add", "shift_hue"):
        monkeypatch.setattr(labelled_crops, other, lambda images, _: images)
    # in place of these, a product and a sum, whose order tells in the result
    monkeypatch.setattr(labelled_crops, "adjust_brightness", lambda images, _: images * 0.5)
    monkeypatch.setattr(labelled_crops, "scale_saturation", lambda images, _: images + 0.125)
    found = photometric_distortion(torch.full((800, 3, 1, 1), 0.5), draws=draws(800))[:, 0, 0, 0]
    values, counts = found.unique(return_counts=True)
    # contrast alone; last of both; first of both; neither; saturation alone
    assert values.tolist() == [0.25, 0.3125, 0.375, 0.5, 0.625]
    assert counts.tolist() == pytest.approx([200, 100, 100, 200, 200], abs=50)
