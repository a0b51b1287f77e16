from dataclasses import replace

import pytest
import torch
from reference.builders import coordinate_image, noise_image, packed
from torch import Tensor

from glare.crops import PackedImages, cut
from glare.draws import Draws
from glare.geometry import Crop, match
from glare.photometric import gaussian_blur, grey, solarize
from glare.views import Normalisation, ViewConfig, Views, make_views

PLAIN = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SMALL = ViewConfig(num_local=3, global_size=32, local_size=16)
COLOURLESS = replace(SMALL, jitter_prob=0.0, grey_prob=0.0, blur_prob=(0.0, 0.0, 0.0), solarize_prob=(0.0, 0.0, 0.0))
SIZES = [(60, 40), (33, 90), (1, 1), (128, 128), (200, 3)]


def images() -> PackedImages:
    return packed([noise_image(*size, seed) for seed, size in enumerate(SIZES)])


def views(
    config: ViewConfig,
    pack: PackedImages | None = None,
    *,
    index: Tensor | None = None,
    patch_size: int = 8,
    normalise: Normalisation = PLAIN,
    seed: int = 0,
) -> Views:
    pack = images() if pack is None else pack
    index = torch.arange(len(pack)) if index is None else index
    return make_views(
        pack,
        index,
        config,
        patch_size=patch_size,
        normalise=normalise,
        draws=Draws(torch.Generator().manual_seed(seed), len(index)),
    )


def tensors(made: Views) -> list[Tensor]:
    crops = (made.global_crops, made.local_crops)
    return [made.global_, made.augmented, made.local, made.patch_mask, *(t for c in crops for t in (c.offset, c.scale))]


@pytest.mark.parametrize(("patch_size", "side", "local_side"), [(14, 56, 28), (16, 64, 32), (8, 64, 24)])
@pytest.mark.parametrize("num_local", [0, 1, 3])
def test_shapes(patch_size: int, side: int, local_side: int, num_local: int):
    config = ViewConfig(num_local=num_local, global_size=side, local_size=local_side)
    made = views(config, patch_size=patch_size)
    n = (side // patch_size) ** 2
    assert made.grid == (side // patch_size,) * 2
    assert made.global_.shape == made.augmented.shape == (2, 5, 3, side, side)
    assert made.local.shape == (num_local, 5, 3, local_side, local_side)
    assert made.global_crops.offset.shape == made.global_crops.scale.shape == (2, 5, 2)
    assert made.local_crops.offset.shape == made.local_crops.scale.shape == (num_local, 5, 2)
    assert made.patch_mask.shape == (2, 5, n) and made.patch_mask.dtype == torch.bool
    assert all(t.dtype == torch.float32 for t in (made.global_, made.augmented, made.local))
    assert all(torch.isfinite(t).all() for t in tensors(made))


def test_the_papers_views_of_one_image():
    made = views(ViewConfig(), packed([noise_image(300, 260, 0)]), patch_size=16)
    assert made.global_.shape == (2, 1, 3, 224, 224) and made.local.shape == (10, 1, 3, 96, 96)
    assert made.grid == (14, 14)


def test_values_stay_in_range_until_normalised():
    made = views(replace(SMALL, patch_augmentation="none"))
    for t in (made.global_, made.local):
        assert t.min() >= 0 and t.max() <= 1
        assert t.std() > 0.05


def test_views_are_normalised_last():
    normalise = Normalisation()
    plain, normed = views(SMALL), views(SMALL, normalise=normalise)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name in ("global_", "local", "augmented"):
        expected = (getattr(plain, name) - mean) / std
        torch.testing.assert_close(getattr(normed, name), expected, atol=1e-4, rtol=1e-4)


def test_the_generator_alone_decides():
    first = views(SMALL, seed=7)
    torch.rand(5)
    again, other = views(SMALL, seed=7), views(SMALL, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert not torch.equal(first.global_, other.global_)


def test_every_crop_has_draws_of_its_own():
    pack = packed([noise_image(100, 100, 0)] * 6)
    made = views(SMALL, pack)
    offsets = torch.cat([made.global_crops.offset, made.local_crops.offset]).flatten(0, 1)
    assert len(offsets.unique(dim=0)) > 0.9 * len(offsets)


@pytest.mark.parametrize("index", [[0, 3], [3, 3, 1], [4]])
def test_views_are_of_the_images_asked_for(index: list[int]):
    made = views(COLOURLESS, index=torch.tensor(index))
    for crops, pixels, side in (
        (made.global_crops, made.global_, 32),
        (made.local_crops, made.local, 16),
    ):
        for view in range(len(pixels)):
            expected = cut(images(), torch.tensor(index), crops[view], size=(side, side))
            torch.testing.assert_close(pixels[view], expected, atol=1e-6, rtol=0)


def test_the_record_matches_the_pixels():
    """A coordinate image in which every pixel of a view tells where it was cut from."""
    pack = packed([coordinate_image(200, 150), coordinate_image(120, 250)])
    config = replace(COLOURLESS, global_size=96, local_size=48)
    made = views(config, pack)
    for pixels, crops in ((made.global_, made.global_crops), (made.local, made.local_crops)):
        side = pixels.shape[-1]
        unit = (torch.arange(side) + 0.5) / side
        points = torch.stack(torch.meshgrid(unit, unit, indexing="xy"), dim=-1).flatten(0, 1)
        where = crops.to_source(points) * pack.size.view(1, 2, 1, 2) - 0.5  # centre of pixel 0 is at 0.5 px
        found = pixels[:, :, :2].flatten(3).transpose(2, 3) * 255
        inner = ((points > 0.05) & (points < 0.95)).all(dim=1)
        assert (found - where)[:, :, inner].abs().max() < 0.6


def test_matched_patches_of_both_globals_show_the_same_place():
    pack = packed([coordinate_image(240, 200)] * 30)
    config = replace(COLOURLESS, global_size=112, num_local=0)
    made = views(config, pack, patch_size=14)
    mean = made.global_[:, :, :2].unfold(3, 14, 14).unfold(4, 14, 14).mean(dim=(-1, -2)).flatten(3) * 255
    mean = mean.transpose(2, 3)  # (2, b, n, 2): column and row
    for a, b in ((0, 1), (1, 0)):
        index, valid = match(made.global_crops[a], made.global_crops[b], made.grid)
        other = mean[b].gather(1, index.unsqueeze(-1).expand(-1, -1, 2))
        half = made.global_crops[b].scale.abs() * pack.size / 8 / 2
        assert valid.float().mean() > 0.2
        assert ((mean[a] - other).abs() / half.unsqueeze(1))[valid].max() < 1.1


@pytest.mark.parametrize("kind", ["blur", "noise", "rotation"])
@pytest.mark.parametrize("sampling", ["random", "block"])
def test_only_the_students_globals_have_changed_patches(kind: str, sampling: str):
    config = replace(SMALL, patch_augmentation=kind, patch_sampling=sampling, patch_prob=0.7)
    made, clean = views(config), views(replace(config, patch_augmentation="none"))
    assert torch.equal(made.global_, clean.global_), "the teacher's views do not know of it"
    assert torch.equal(made.local, clean.local)
    equal = made.augmented == made.global_
    by_patch = equal.unfold(3, 8, 8).unfold(4, 8, 8).all(dim=-1).all(dim=-1).all(dim=2).flatten(2)
    assert by_patch[~made.patch_mask].all()
    textured = made.global_.flatten(3).std(dim=-1).amin(dim=-1) > 0.01  # the 1-pixel image has nothing to blur
    assert not (by_patch & made.patch_mask)[textured].any()
    assert made.patch_mask.any() and not made.patch_mask.any(dim=-1).all()


def test_mask_marks_patches_but_leaves_the_pixels():
    made = views(replace(SMALL, patch_augmentation="mask"))
    assert torch.equal(made.augmented, made.global_) and made.patch_mask.any()


def test_none_marks_nothing():
    made = views(replace(SMALL, patch_augmentation="none", patch_prob=1.0))
    assert torch.equal(made.augmented, made.global_) and not made.patch_mask.any()


def test_patches_are_drawn_for_each_view_by_itself():
    made = views(replace(SMALL, patch_prob=1.0, patch_ratio=(0.5, 0.5)), packed([noise_image(50, 50, 0)] * 20))
    assert (made.patch_mask.sum(dim=-1) == 8).all()
    assert (made.patch_mask[0] != made.patch_mask[1]).any(dim=-1).float().mean() > 0.9


# Photometric augmentation: which views get it, and in which order


def share_changed(config: ViewConfig, count: int = 300) -> tuple[float, float, float]:
    """Share of first globals, second globals and locals that differ from the same crop without colour."""
    config = replace(config, num_local=1, global_size=8, local_size=8, patch_augmentation="none")
    pack = packed([noise_image(16, 16, seed) for seed in range(count)])
    made = views(config, pack)
    shares = []
    for pixels, crop in (
        (made.global_[0], made.global_crops[0]),
        (made.global_[1], made.global_crops[1]),
        (made.local[0], made.local_crops[0]),
    ):
        plain = cut(
            packed([noise_image(16, 16, seed) for seed in range(count)]), torch.arange(count), crop, size=(8, 8)
        )
        shares.append(float(((pixels - plain).abs().flatten(1).amax(dim=1) > 1e-3).float().mean()))
    return tuple(shares)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, (0, 0, 0), id="nothing"),
        pytest.param({"jitter_prob": 0.8}, (0.8, 0.8, 0.8), id="jitter"),
        pytest.param({"grey_prob": 0.2}, (0.2, 0.2, 0.2), id="grey"),
        pytest.param({"blur_prob": (1.0, 0.1, 0.5)}, (0.95, 0.1, 0.47), id="blur"),
        pytest.param({"solarize_prob": (0.0, 0.2, 0.0)}, (0, 0.2, 0), id="solarize"),
    ],
)
def test_each_change_comes_with_its_probability(changes: dict[str, object], expected: tuple[float, float, float]):
    """Blur of a sigma near 0.1 px changes nothing: it shows in a few per cent fewer views than are drawn."""
    found = share_changed(replace(COLOURLESS, **changes))
    for share, prob in zip(found, expected, strict=True):
        assert abs(share - prob) < 0.1 if prob else share == 0


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"grey_prob": 1.0}, grey),
        ({"solarize_prob": (1.0, 1.0, 1.0)}, solarize),
        ({"grey_prob": 1.0, "solarize_prob": (1.0, 1.0, 1.0)}, lambda x: solarize(grey(x))),
    ],
)
def test_a_sure_change_is_that_change(changes: dict[str, object], change):
    made, plain = views(replace(COLOURLESS, **changes)), views(COLOURLESS)
    assert torch.equal(made.global_crops.offset, plain.global_crops.offset)
    for name in ("global_", "local"):
        given = getattr(plain, name).flatten(0, 1)
        torch.testing.assert_close(getattr(made, name).flatten(0, 1), change(given), atol=1e-6, rtol=0)


def test_blur_comes_before_solarisation():
    """Solarised edges stay sharp: where both are sure, solarising comes last and values never lie above one half."""
    config = replace(COLOURLESS, blur_prob=(1.0, 1.0, 1.0), solarize_prob=(1.0, 1.0, 1.0))
    made, blurred = views(config), views(replace(config, solarize_prob=(0.0, 0.0, 0.0)))
    assert made.global_.max() <= 0.5 and blurred.global_.max() > 0.5
    torch.testing.assert_close(made.global_, solarize(blurred.global_), atol=1e-6, rtol=0)


def test_blur_is_a_gaussian_of_a_drawn_width():
    pack = packed([noise_image(64, 64, seed) for seed in range(30)])
    made = views(replace(COLOURLESS, blur_prob=(1.0, 0.0, 0.0), num_local=0), pack)
    plain = cut(pack, torch.arange(30), made.global_crops[0], size=(32, 32))
    candidates = torch.linspace(0.1, 2.0, 96)
    guesses = [gaussian_blur(plain, torch.full((30,), float(sigma)), radius=6) for sigma in candidates]
    nearest = torch.stack([(guess - made.global_[0]).abs().mean(dim=(1, 2, 3)) for guess in guesses])
    error, which = nearest.min(dim=0)
    assert error.max() < 5e-3, "the candidates are 0.02 px apart"
    sigmas = candidates[which]
    assert sigmas.min() < 0.5 and sigmas.max() > 1.6, "drawn image by image from U(0.1, 2)"


def test_jitter_stays_within_its_strength():
    """Brightness alone: the ratio of the means is the factor, U(0.6, 1.4)."""
    config = replace(COLOURLESS, jitter_prob=1.0, jitter=(0.4, 0.0, 0.0, 0.0), num_local=0)
    dark = [noise_image(32, 32, seed) // 2 for seed in range(200)]
    made = views(config, packed(dark))
    plain = torch.stack([cut(packed(dark), torch.arange(200), made.global_crops[v], size=(32, 32)) for v in (0, 1)])
    factor = (made.global_.mean(dim=(2, 3, 4)) / plain.mean(dim=(2, 3, 4))).flatten()
    assert factor.min() >= 0.599 and factor.max() <= 1.401
    levels = torch.linspace(0.1, 0.9, 9)
    assert (factor.quantile(levels) - (0.6 + 0.8 * levels)).abs().max() < 0.08


@pytest.mark.parametrize(
    "changes",
    [
        {"global_area": (0.0, 1.0)},
        {"local_area": (0.5, 0.2)},
        {"patch_ratio": (0.1, 1.5)},
        {"num_local": -1},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(SMALL, **changes)


def test_the_record_can_be_indexed_by_view():
    made = views(SMALL)
    assert isinstance(made.global_crops[0], Crop) and made.global_crops[0].offset.shape == (5, 2)
