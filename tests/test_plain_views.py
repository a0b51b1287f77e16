"""Views of Pillow in DataLoader workers: the crops of the package, its record, its distributions."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from reference.builders import noise_image, packed
from torch import Tensor

from glare import crops
from glare import photometric as batched
from glare.crops import PackedImages
from glare.draws import Draws
from glare.patch_augmentation import augment_patches
from glare.plain_views import ENHANCERS, LoadedViews, collate, photometric, turn_hue, view_loader
from glare.runtime import epoch_batches
from glare.views import BLUR_RADIUS_PX, BLUR_SIGMA_PX, Normalisation, ViewConfig, Views, make_views

# a forked worker inherits no thread that it waits for
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PLAIN = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SMALL = ViewConfig(num_local=3, global_size=32, local_size=16)
COLOURLESS = replace(SMALL, jitter_prob=0.0, grey_prob=0.0, blur_prob=(0.0, 0.0, 0.0), solarize_prob=(0.0, 0.0, 0.0))
SIZES = [(60, 40), (33, 90), (7, 5), (128, 128), (200, 30)]
BATCH = 2


def smooth_image(width: int, height: int, seed: int) -> np.ndarray:
    small = Image.fromarray(noise_image(max(width // 8, 2), max(height // 8, 2), seed))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def arrays() -> list[np.ndarray]:
    return [(noise_image, smooth_image)[seed % 2](*size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture
def paths(tmp_path: Path, arrays: list[np.ndarray]) -> list[Path]:
    files = [tmp_path / f"{number}.png" for number in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        Image.fromarray(array).save(file)
    return files


def test_pictures_are_opened_as_everywhere_else(paths: list[Path]) -> None:
    """Pillow would read this format, too, as it would wait for ever in front of a pipe."""
    Image.fromarray(noise_image(9, 9, 0)).save(paths[0], "pcx")
    os.mkfifo(paths[0].with_name("pipe.png"))
    for file, error, said in (
        (paths[0], UnidentifiedImageError, "image"),
        (paths[0].with_name("pipe.png"), ValueError, "no regular file"),
    ):
        loader = view_loader([file], SMALL, patch_size=8, normalise=PLAIN, batch_size=1, seed=0, num_workers=0)
        with pytest.raises(error, match=said):
            next(iter(loader))


@pytest.fixture
def load(paths: list[Path]) -> Callable[..., list[LoadedViews]]:
    """`load(config, *, batches=1, **options)`: the first batches."""

    def load(config: ViewConfig, *, batches: int = 1, **changes: Any) -> list[LoadedViews]:
        options = {"patch_size": 8, "normalise": PLAIN, "batch_size": BATCH, "seed": 0, "num_workers": 0} | changes
        return list(islice(view_loader(paths, config, **options), batches))

    return load


def tensors(made: Views) -> list[Tensor]:
    places = (made.global_crops, made.local_crops)
    return [
        made.global_,
        made.augmented,
        made.local,
        made.patch_mask,
        *(t for c in places for t in (c.offset, c.scale)),
    ]


def order(count: int, steps: int, *, seed: int = 0) -> list[Tensor]:
    return list(islice(epoch_batches(count, BATCH, seed=seed), steps))


@pytest.mark.parametrize("num_local", [0, 1, 3])
def test_shapes_are_those_of_the_packages_views(
    load: Callable[..., list[LoadedViews]], arrays: list[np.ndarray], num_local: int
) -> None:
    config = replace(SMALL, num_local=num_local)
    own = make_views(
        packed(arrays), torch.tensor([0, 1]), config, patch_size=8, normalise=PLAIN, draws=Draws(torch.Generator(), 2)
    )
    (made,) = load(config)
    assert [(t.shape, t.dtype) for t in tensors(made)] == [(t.shape, t.dtype) for t in tensors(own)]
    assert (made.grid, made.local_grid if num_local else None) == (own.grid, own.local_grid if num_local else None)


def test_the_crops_are_the_packages(load: Callable[..., list[LoadedViews]], arrays: list[np.ndarray]) -> None:
    images: PackedImages = packed(arrays)
    flips = set()
    for made, index in zip(load(COLOURLESS, batches=8), order(len(SIZES), 8), strict=True):
        for pixels, places in ((made.global_, made.global_crops), (made.local, made.local_crops)):
            for view, crop in zip(pixels, (places[v] for v in range(len(pixels))), strict=True):
                expected = crops.cut(images, index, crop, size=view.shape[-2:])
                assert (view - expected).abs().max() <= 2 / 255
                flips |= set((crop.scale[:, 0] < 0).tolist())
    assert flips == {True, False}


def test_areas_are_those_asked_for(load: Callable[..., list[LoadedViews]]) -> None:
    made = collate(load(replace(SMALL, global_area=(0.5, 0.6), local_area=(0.05, 0.1)), batches=12))
    for places, (low, high) in ((made.global_crops, (0.48, 0.62)), (made.local_crops, (0.04, 0.11))):
        area = places.scale.prod(dim=-1).abs().flatten()
        assert ((area > low) & (area < high)).float().mean() > 0.6, "but of images too small or too long"


def test_batches_come_in_the_order_of_the_package_without_end(paths: list[Path]) -> None:
    """Grey images whose brightness is their number."""
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 20), (10 * number,) * 3).save(path)
    loader = view_loader(paths, COLOURLESS, patch_size=8, normalise=PLAIN, batch_size=BATCH, seed=3, num_workers=0)
    for made, index in zip(loader, order(len(paths), 7, seed=3), strict=False):
        assert torch.equal((made.local.mean(dim=(0, 2, 3, 4)) * 255 / 10).round().long(), index)


@pytest.mark.parametrize("patch_augmentation", ["blur", "rotation", "none"])
def test_the_students_views_are_changed_where_the_mask_says(
    load: Callable[..., list[LoadedViews]], patch_augmentation: str
) -> None:
    config = replace(SMALL, patch_prob=1.0, patch_ratio=(0.3, 0.6), patch_augmentation=patch_augmentation)
    (made,) = load(config)
    inside = made.patch_mask.view(2, BATCH, 1, 4, 4).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
    inside = inside.expand_as(made.global_)
    assert torch.equal(made.augmented[~inside], made.global_[~inside])
    if patch_augmentation == "none":
        assert not inside.any()
    else:
        assert ((made.augmented != made.global_) & inside).any(dim=(2, 3, 4)).all()
        assert made.patch_mask.sum(dim=-1).min() >= 4
    if patch_augmentation == "blur":
        expected = augment_patches(
            made.global_.flatten(0, 1),
            made.patch_mask.flatten(0, 1),
            kind="blur",
            patch_size=8,
            blur_sigma=config.patch_blur_sigma,
            generators=[],
        )
        torch.testing.assert_close(made.augmented.flatten(0, 1), expected, atol=1e-6, rtol=0)


def test_draws_depend_on_seed_and_visit_alone(load: Callable[..., list[LoadedViews]]) -> None:
    state = torch.get_rng_state()
    first, again, other = load(SMALL, batches=3), load(SMALL, batches=3), load(SMALL, batches=3, seed=1)
    for ours, theirs in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))
    assert not torch.equal(first[0].global_crops.offset, other[0].global_crops.offset)
    scales = collate(load(SMALL, batches=12)).global_crops.scale.flatten(0, 1)
    assert len(scales.unique(dim=0)) > 0.7 * len(scales), "every visit has draws of its own; one image is tiny"
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_that_comes_twice_in_a_batch_is_cut_anew(paths: list[Path]) -> None:
    loader = view_loader(paths[:1], SMALL, patch_size=8, normalise=PLAIN, batch_size=2, seed=0, num_workers=0)
    made = next(iter(loader))
    assert not torch.equal(made.global_[:, 0], made.global_[:, 1])


def test_workers_give_the_same_views(load: Callable[..., list[LoadedViews]]) -> None:
    for alone, worked in zip(load(SMALL, batches=4), load(SMALL, batches=4, num_workers=1), strict=True):
        assert isinstance(worked, LoadedViews) and worked.grid == alone.grid
        for ours, theirs in zip(tensors(worked), tensors(alone), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_next_pass_begins_anew(paths: list[Path]) -> None:
    loader = view_loader(paths, SMALL, patch_size=8, normalise=PLAIN, batch_size=BATCH, seed=0, num_workers=0)
    first, again = next(iter(loader)), next(iter(loader))
    assert torch.equal(first.global_, again.global_)


def test_a_batch_goes_to_a_device_whole(load: Callable[..., list[LoadedViews]]) -> None:
    (made,) = load(SMALL)
    moved = made.to(torch.device("meta"))
    assert isinstance(moved, LoadedViews) and moved.grid == made.grid
    assert all(t.device.type == "meta" for t in tensors(moved))


def test_colours_change_within_their_range(load: Callable[..., list[LoadedViews]]) -> None:
    strong = replace(SMALL, jitter_prob=1.0, grey_prob=0.5, blur_prob=(1.0, 0.5, 0.5), solarize_prob=(0.5, 0.5, 0.5))
    coloured, colourless = load(strong)[0], load(COLOURLESS)[0]
    for views in (coloured.global_, coloured.augmented, coloured.local):
        assert torch.isfinite(views).all() and views.min() >= 0 and views.max() <= 1
        assert views.std() > 0.02
    assert torch.equal(coloured.global_crops.offset, colourless.global_crops.offset)
    assert ((coloured.global_ - colourless.global_).abs().mean(dim=(2, 3, 4)) > 0.02).all()


def test_views_are_normalised_last(load: Callable[..., list[LoadedViews]]) -> None:
    normalise = Normalisation()
    (raw,), (made,) = load(SMALL), load(SMALL, normalise=normalise)
    for ours, theirs in ((made.global_, raw.global_), (made.local, raw.local), (made.augmented, raw.augmented)):
        torch.testing.assert_close(ours, normalise(theirs), atol=1e-4, rtol=0)


# Each change of colour against the batched one


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("change", [-0.4, -0.1, 0.0, 0.3])
@pytest.mark.parametrize("number", range(4))
def test_an_adjustment_is_the_batched_one(number: int, change: float) -> None:
    image = Image.fromarray(smooth_image(48, 40, 0))
    if number < len(ENHANCERS):
        found, amount = ENHANCERS[number](image).enhance(1 + change), 1 + change
    else:
        found, amount = turn_hue(image, change), change
    expected = batched.ADJUSTMENTS[number](as_tensor(image)[None], torch.tensor([amount]))[0]
    difference = (as_tensor(found) - expected).abs()
    assert difference.max() <= (2 / 255 if number < len(ENHANCERS) else 16 / 255)  # hue has 8 bits
    assert difference.mean() <= 2 / 255


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("name", ["grey_prob", "blur_prob", "solarize_prob"])
def test_each_change_comes_with_its_probability(name: str, kind: int) -> None:
    image = Image.fromarray(noise_image(48, 40, 0))
    always = 1.0 if name == "grey_prob" else tuple(float(place == kind) for place in range(3))
    config = replace(COLOURLESS, **{name: always})

    def changed(kind: int) -> Tensor:
        return as_tensor(photometric(image, config, kind=kind, generator=torch.Generator().manual_seed(1)))

    clean, found = as_tensor(image), changed(kind)
    if name == "grey_prob":
        assert (found - batched.grey(clean[None])[0]).abs().max() <= 1.5 / 255
    elif name == "solarize_prob":
        torch.testing.assert_close(found, batched.solarize(clean), atol=1e-6, rtol=0)
    else:
        assert found.std() < 0.9 * clean.std()
        assert (found.mean() - clean.mean()).abs() < 2 / 255
    if name != "grey_prob":
        assert torch.equal(changed((kind + 1) % 3), clean)


def test_blur_is_the_batched_one_for_sigmas_of_its_range() -> None:
    """Pillow blurs by repeated boxes, which come close to a Gaussian."""
    image, config = Image.fromarray(smooth_image(48, 40, 0)), replace(COLOURLESS, blur_prob=(1.0, 0.0, 0.0))
    sigmas = torch.linspace(*BLUR_SIGMA_PX, 200)
    clean = as_tensor(image).expand(len(sigmas), -1, -1, -1)
    candidates = batched.gaussian_blur(clean, sigmas, radius=BLUR_RADIUS_PX)[..., 6:-6, 6:-6]
    closest = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        found = as_tensor(photometric(image, config, kind=0, generator=generator))[..., 6:-6, 6:-6]
        distance = (candidates - found).abs().mean(dim=(1, 2, 3))
        assert distance.min() < 1 / 255
        closest.append(float(sigmas[distance.argmin()]))
    assert max(closest) > 1.5 and min(closest) < 0.6


def test_jitter_is_drawn_for_each_view() -> None:
    image, config = Image.fromarray(smooth_image(48, 40, 0)), replace(COLOURLESS, jitter_prob=1.0)
    made = [
        as_tensor(photometric(image, config, kind=0, generator=torch.Generator().manual_seed(seed)))
        for seed in range(6)
    ]
    assert len(torch.stack([view.flatten() for view in made]).unique(dim=0)) == 6
