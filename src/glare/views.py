"""One batch of global and local views with the record of where each came from (paper section 5, appendix B.1)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from glare import ranges
from glare.crops import PackedImages, cut
from glare.draws import Draws
from glare.geometry import Crop, Grid, random_resized_crops
from glare.patch_augmentation import RANDOM, augment_patches, sample_patch_mask, sample_square_mask
from glare.photometric import colour_jitter, gaussian_blur, grey, solarize
from glare.recipes import option

PATCH_AUGMENTATIONS = ("blur", "inner_blur", "mask", "noise", "rotation", "none")
BLUR_SIGMA_PX = (0.1, 2.0)
BLUR_RADIUS_PX = 6
NUM_GLOBAL = 2


@dataclass(frozen=True)
class ViewConfig:
    """How views are cut and changed; the defaults are the paper's."""

    num_local: int = option(10, "local views an image")
    global_size: int = option(224, "side of the two global views in px, a multiple of the patch size")
    local_size: int = option(96, "side of the local views in px, a multiple of the patch size")
    global_area: tuple[float, float] = option((0.25, 1.0), "share of the image a global view covers, low and high")
    local_area: tuple[float, float] = option((0.05, 0.25), "share of the image a local view covers, low and high")
    flip_prob: float = option(0.5, "probability of a horizontal flip")
    jitter_prob: float = option(0.8, "probability of colour jitter")
    jitter: tuple[float, float, float, float] = option((0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue")
    grey_prob: float = option(0.2, "probability of a grey view")
    blur_prob: tuple[float, float, float] = option((1.0, 0.1, 0.5), "of first global, second global, local views")
    solarize_prob: tuple[float, float, float] = option((0.0, 0.2, 0.0), "likewise")
    patch_augmentation: str = option(
        "blur", "what is done to patches of the student's views", choices=PATCH_AUGMENTATIONS
    )
    patch_sampling: str = option("random", "where these patches lie", choices=("random", "block", "square"))
    patch_square: int = option(1, "side of the squares of patch_sampling square, in patches")
    patch_prob: float = option(0.5, "share of the global views that have such patches")
    patch_ratio: tuple[float, float] = option((0.1, 0.5), "share of the patches of such a view, low and high")
    patch_blur_sigma: float = option(0.3125, "of patch blur, in patch sides (5 px for a patch of 16)")

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class Views:
    """Views of b images, view-major: two global ones, L local ones.

    ``global_`` (2, b, 3, H, W) normalised, as the teacher sees them; ``augmented`` the same with patches changed, as
    the student sees them; ``local`` (L, b, 3, h, w); ``global_crops`` (2, b, 2) and ``local_crops`` (L, b, 2);
    ``patch_mask`` (2, b, n) bool, the changed patches; ``grid`` the patches of a global view as (rows, columns).
    """

    global_: Tensor
    augmented: Tensor
    local: Tensor
    global_crops: Crop
    local_crops: Crop
    patch_mask: Tensor
    grid: Grid

    def of(self, images: slice) -> Self:
        """The views of some of the images."""
        parts = ("global_", "augmented", "local", "global_crops", "local_crops", "patch_mask")
        return replace(self, **{name: getattr(self, name)[:, images] for name in parts})

    @property
    def local_grid(self) -> Grid:
        """Patches of a local view as (rows, columns)."""
        patch = self.global_.shape[-1] // self.grid[1]
        return self.local.shape[-2] // patch, self.local.shape[-1] // patch


@dataclass(frozen=True)
class Normalisation:
    """Channel mean and standard deviation of a backbone's input, for values in [0, 1]."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise (..., 3, h, w)."""
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std


def make_views(
    images: PackedImages,
    index: Tensor,
    config: ViewConfig,
    *,
    patch_size: int,
    normalise: Normalisation,
    draws: Draws,
) -> Views:
    """Cut and augment all views of the images ``index`` (b,), on the device of ``images``.

    ``draws``: of these images; with the same numbers come the same views.
    """
    sizes_px = images.size[index.to(images.size.device)].cpu()
    areas = [config.global_area] * NUM_GLOBAL + [config.local_area] * config.num_local
    crops = [random_resized_crops(sizes_px, area=area, flip_prob=config.flip_prob, draws=draws) for area in areas]
    colours = draw_colours(config, draws)
    grid = (config.global_size // patch_size, config.global_size // patch_size)
    mask = torch.stack([_draw_mask(config, grid, draws) for _ in range(NUM_GLOBAL)])

    def rendered(kinds: slice, side: int) -> tuple[Tensor, Crop]:
        crop = _stack(crops[kinds], len(index))
        views = cut(images, index.repeat(len(crops[kinds])), crop.flatten(), size=(side, side))
        views = normalise(recolour(views, colours.of(kinds)))
        return views.view(len(crops[kinds]), len(index), *views.shape[1:]), crop.to(views.device)

    global_, global_crops = rendered(slice(NUM_GLOBAL), config.global_size)
    local, local_crops = rendered(slice(NUM_GLOBAL, None), config.local_size)
    mask = mask.to(global_.device)
    return Views(
        global_=global_,
        augmented=_augmented(global_, mask, config, patch_size=patch_size, draws=draws),
        local=local,
        global_crops=global_crops,
        local_crops=local_crops,
        patch_mask=mask,
        grid=grid,
    )


def _stack(crops: list[Crop], count: int) -> Crop:
    empty = torch.empty(0, count, 2)
    if not crops:
        return Crop(empty, empty)
    return Crop(torch.stack([crop.offset for crop in crops]), torch.stack([crop.scale for crop in crops]))


@dataclass(frozen=True)
class Colours:
    """What is done to the colours of views, on the CPU, (views, b, ...) or, after ``of``, (views * b, ...).

    ``chosen`` (4) bool: jitter, grey, blur, solarisation; ``factors`` (4) of the jitter, around 1 (hue: around 0), and
    the ``order`` (4) of its adjustments; ``sigma`` of the blur in px.
    """

    chosen: Tensor
    factors: Tensor
    order: Tensor
    sigma: Tensor

    def of(self, views: slice) -> "Colours":
        """Those of some views, view-major."""
        parts = (self.chosen, self.factors, self.order, self.sigma)
        return Colours(*(part[views].flatten(0, 1) for part in parts))


def draw_colours(config: ViewConfig, draws: Draws) -> Colours:
    """Of all views of the images, with the probabilities of their kinds."""
    kinds = [*range(NUM_GLOBAL), *[NUM_GLOBAL] * config.num_local]
    prob = [(config.jitter_prob, config.grey_prob, config.blur_prob[k], config.solarize_prob[k]) for k in kinds]
    low, high = BLUR_SIGMA_PX
    factors = (2 * draws.rand(len(kinds), 4) - 1) * torch.tensor(config.jitter) + torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors[..., :3].clamp_(min=0)
    parts = (
        draws.rand(len(kinds), 4) < torch.tensor(prob),
        factors,
        draws.rand(len(kinds), 4).argsort(dim=-1),
        draws.rand(len(kinds)) * (high - low) + low,
    )
    return Colours(*(part.transpose(0, 1) for part in parts))


def recolour(images: Tensor, colours: Colours) -> Tensor:
    """Colour jitter, grey, blur and solarisation of images (n, 3, h, w) in [0, 1], which may be changed in place."""
    device = images.device
    jittered, greyed, blurred, solarized = (chosen.nonzero().squeeze(1) for chosen in colours.chosen.unbind(dim=1))
    rows = jittered.to(device)
    factors, order = colours.factors[jittered].to(device), colours.order[jittered].to(device)
    images = images.index_copy(0, rows, colour_jitter(images[rows], factors, order))
    rows = greyed.to(device)
    images[rows] = grey(images[rows])
    rows = blurred.to(device)
    images[rows] = gaussian_blur(images[rows], colours.sigma[blurred].to(device), radius=BLUR_RADIUS_PX)
    rows = solarized.to(device)
    images[rows] = solarize(images[rows])
    return images


def _draw_mask(config: ViewConfig, grid: Grid, draws: Draws) -> Tensor:
    """The patches of one global view that the student sees changed, (b, n) bool."""
    prob = config.patch_prob if config.patch_augmentation != "none" else 0.0
    if config.patch_sampling == "square":
        return sample_square_mask(draws, grid, prob=prob, ratio=config.patch_ratio, side=config.patch_square)
    return sample_patch_mask(draws, grid, prob=prob, ratio=config.patch_ratio, block=config.patch_sampling == "block")


def _augmented(global_: Tensor, mask: Tensor, config: ViewConfig, *, patch_size: int, draws: Draws) -> Tensor:
    """The student's global views (2, b, 3, h, w)."""
    kind = config.patch_augmentation
    changed = augment_patches(
        global_.flatten(0, 1),
        mask.flatten(0, 1),
        kind=kind,
        patch_size=patch_size,
        blur_sigma=config.patch_blur_sigma,
        generators=[one for _ in global_ for one in draws.generators()] if kind in RANDOM else [],
    )
    return changed.view_as(global_)
