"""One batch of global and local views with the record of where each came from (paper section 5, appendix B.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glare.crops import PackedImages, cut
from glare.geometry import Crop, Grid, random_resized_crops
from glare.patch_augmentation import augment_patches, sample_patch_mask
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
    patch_sampling: str = option("random", "where these patches lie", choices=("random", "block"))
    patch_prob: float = option(0.5, "share of the global views that have such patches")
    patch_ratio: tuple[float, float] = option((0.1, 0.5), "share of the patches of such a view, low and high")
    patch_blur_sigma: float = option(0.3125, "of patch blur, in patch sides (5 px for a patch of 16)")

    def __post_init__(self) -> None:
        for name in ("global_area", "local_area", "patch_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is {(low, high)}; give two numbers with 0 < low <= high <= 1")
        if self.num_local < 0:
            raise ValueError(f"num_local is {self.num_local}; give 0 or more")


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
    generator: torch.Generator,
) -> Views:
    """Cut and augment all views of the images ``index`` (b,), on the device of ``images``.

    All draws come from ``generator`` (on the CPU), so the same generator state gives the same views.
    """
    count, side = len(index), config.global_size
    crops, pixels = [], []
    for kind in (*range(NUM_GLOBAL), *[NUM_GLOBAL] * config.num_local):
        area = config.global_area if kind < NUM_GLOBAL else config.local_area
        crops.append(
            random_resized_crops(
                images.size[index.to(images.size.device)], area=area, flip_prob=config.flip_prob, generator=generator
            )
        )
    for kind, group, size in (
        (0, crops[:1], side),
        (1, crops[1:NUM_GLOBAL], side),
        (NUM_GLOBAL, crops[NUM_GLOBAL:], config.local_size),
    ):
        pixels.append(_cut_group(images, index, group, size=size))
        pixels[-1] = normalise(_photometric(pixels[-1], config, kind=kind, generator=generator))
    global_ = torch.stack(pixels[:NUM_GLOBAL])
    grid = (side // patch_size, side // patch_size)
    augmented, mask = _student_globals(global_, config, grid=grid, patch_size=patch_size, generator=generator)
    return Views(
        global_=global_,
        augmented=augmented,
        local=pixels[NUM_GLOBAL].view(config.num_local, count, 3, config.local_size, config.local_size),
        global_crops=_stack(crops[:NUM_GLOBAL], count).to(global_.device),
        local_crops=_stack(crops[NUM_GLOBAL:], count).to(global_.device),
        patch_mask=mask,
        grid=grid,
    )


def _stack(crops: list[Crop], count: int) -> Crop:
    empty = torch.empty(0, count, 2)
    if not crops:
        return Crop(empty, empty)
    return Crop(torch.stack([crop.offset for crop in crops]), torch.stack([crop.scale for crop in crops]))


def _cut_group(images: PackedImages, index: Tensor, crops: list[Crop], *, size: int) -> Tensor:
    """(len(crops) * b, 3, size, size), view-major."""
    crop = _stack(crops, len(index)).flatten()
    return cut(images, index.repeat(len(crops)), crop, size=(size, size))


def _photometric(images: Tensor, config: ViewConfig, *, kind: int, generator: torch.Generator) -> Tensor:
    """Colour jitter, grey, blur and solarisation with the probabilities of one kind of view."""
    count, device = len(images), images.device

    def chosen(prob: float) -> Tensor:
        return (torch.rand(count, generator=generator) < prob).nonzero().squeeze(1).to(device)

    rows = chosen(config.jitter_prob)
    factors, order = _draw_jitter(len(rows), config.jitter, generator)
    images = images.index_copy(0, rows, colour_jitter(images[rows], factors.to(device), order.to(device)))
    rows = chosen(config.grey_prob)
    images[rows] = grey(images[rows])
    rows = chosen(config.blur_prob[kind])
    sigma = torch.rand(len(rows), generator=generator) * (BLUR_SIGMA_PX[1] - BLUR_SIGMA_PX[0]) + BLUR_SIGMA_PX[0]
    images[rows] = gaussian_blur(images[rows], sigma.to(device), radius=BLUR_RADIUS_PX)
    rows = chosen(config.solarize_prob[kind])
    images[rows] = solarize(images[rows])
    return images


def _draw_jitter(
    count: int, strength: tuple[float, float, float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors (n, 4) around 1 (hue: around 0) and a random order (n, 4) of the four adjustments."""
    spread = torch.tensor(strength)
    draw = (2 * torch.rand((count, 4), generator=generator) - 1) * spread
    factors = draw + torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors[:, :3].clamp_(min=0)
    return factors, torch.rand((count, 4), generator=generator).argsort(dim=1)


def _student_globals(
    global_: Tensor, config: ViewConfig, *, grid: Grid, patch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's global views and the mask of their changed patches."""
    views, count = global_.shape[:2]
    kind = config.patch_augmentation
    mask = sample_patch_mask(
        views * count,
        grid,
        prob=config.patch_prob if kind != "none" else 0.0,
        ratio=config.patch_ratio,
        block=config.patch_sampling == "block",
        generator=generator,
    ).to(global_.device)
    augmented = augment_patches(
        global_.flatten(0, 1),
        mask,
        kind=kind,
        patch_size=patch_size,
        blur_sigma=config.patch_blur_sigma,
        generator=generator,
    )
    return augmented.view_as(global_), mask.view(views, count, -1)
