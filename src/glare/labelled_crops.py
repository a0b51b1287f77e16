"""Training crops for segmentation: images and labels cut and augmented in batches, on the device.

The recipe is mmsegmentation's: random scale, a random crop in which no class dominates, a horizontal flip and
photometric distortion. Departures from it:

* scale, crop and flip are one Crop, cut from the source in one go, antialiased bicubic;
* the scale is relative to the native size where no base scale is given;
* the share of classes is counted on a grid of 64 x 64 points of the candidate crops, all of them drawn at once;
* values are not rounded to 8 bits between the distortions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glare.crops import cut, cut_labels, fits, subset
from glare.data.labelled import PackedLabelled
from glare.draws import Draws
from glare.geometry import Crop, factor_to_fit, patch_centres
from glare.photometric import adjust_brightness, shift_hue
from glare.views import Normalisation

ATTEMPTS = 11  # crops drawn an image: ten are looked at, the last one is taken unseen
PROBE = (64, 64)
DELTA = 32 / 255  # of brightness, either way
RANGE = (0.5, 1.5)  # of contrast, here a factor on all values, and of saturation
TURN = 18 / 180  # of hue, either way, as a share of the circle
IGNORED = 255


@dataclass(frozen=True)
class TrainingCrops:
    """What crops to cut.

    size: side in px.
    scale: lowest and highest factor on the images' size, drawn uniformly.
    dominant_share: crops in which one class has this share of the labelled points or more are drawn anew; 1: none.
    normalise: of the model's input.
    base_scale: two sides in px; the size that ``scale`` acts on is the largest that fits them. None is the native size.
    """

    size: int
    scale: tuple[float, float]
    dominant_share: float
    normalise: Normalisation
    base_scale: tuple[int, int] | None = None


def to_device(packed: PackedLabelled, device: torch.device) -> PackedLabelled:
    """All images on a GPU that has room for them; otherwise they stay, and every batch travels."""
    if fits(packed.images.pixels.nbytes + packed.labels.nbytes, device):
        return replace(packed, images=packed.images.to(device), labels=packed.labels.to(device))
    return packed


def training_batch(
    packed: PackedLabelled,
    index: Tensor,
    crops: TrainingCrops,
    device: torch.device,
    *,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """Augmented crops of the images ``index`` (n,), cut on ``device``; with the ``draws`` of these images.

    Returns:
        Normalised pixels (n, 3, size, size) float32, 0 outside the image, and labels (n, size, size) int64, 255
        outside the image.
    """
    images, labels = packed.images, packed.labels
    if labels.device.type != device.type:  # "cuda" is not "cuda:0"
        labels = _labels_of(packed, index).to(device)
        images, index = subset(images, index).to(device), torch.arange(len(index))
    size, count = (crops.size, crops.size), len(index)
    size_px = scaled_sizes(images.size.cpu()[index], crops.base_scale)
    candidates = random_crops(size_px, size=crops.size, scale=crops.scale, draws=draws)
    probe = cut_labels(labels, images, index.repeat_interleave(ATTEMPTS), candidates.flatten(), size=PROBE)
    chosen = first_balanced(probe.view(count, ATTEMPTS, -1), crops.dominant_share).cpu()
    crop = Crop(candidates.offset[torch.arange(count), chosen], candidates.scale[torch.arange(count), chosen])
    pixels = photometric_distortion(cut(images, index, crop, size=size), draws=draws)
    pixels = torch.where(_inside(crop.to(device), size).unsqueeze(1), crops.normalise(pixels), 0)
    return pixels, cut_labels(labels, images, index, crop, size=size).long()


def _labels_of(packed: PackedLabelled, index: Tensor) -> Tensor:
    """The labels of some images, packed anew as ``subset`` packs the images."""
    first, area = packed.images.start[index].tolist(), packed.images.size[index].prod(dim=1).tolist()
    return torch.cat([packed.labels[start : start + count] for start, count in zip(first, area, strict=True)])


def scaled_sizes(size_px: Tensor, base_scale: tuple[int, int] | None) -> Tensor:
    """Sizes (n, 2) of images after they were brought to the base scale, not rounded: float64 px."""
    size_px = size_px.double()
    return size_px if base_scale is None else size_px * factor_to_fit(size_px, base_scale).unsqueeze(-1)


def random_crops(size_px: Tensor, *, size: int, scale: tuple[float, float], draws: Draws) -> Crop:
    """Eleven candidate crops (n, 11, 2) an image of one scale and flip, on the CPU.

    ``size_px`` (n, 2), (width, height). A crop larger than the scaled image has it in its upper left corner.
    """
    size_px = size_px.double()

    def uniform(*shape: int) -> Tensor:
        return draws.rand(*shape, dtype=torch.float64)

    factor = scale[0] + (scale[1] - scale[0]) * uniform(1, 1)
    extent = size / (factor * size_px.unsqueeze(1))  # (n, 1, 2), in units of the image
    low = uniform(ATTEMPTS, 2) * (1 - extent).clamp(min=0)
    flip = torch.cat([uniform(1, 1) < 0.5, torch.zeros(len(size_px), 1, 1, dtype=torch.bool)], dim=-1)
    high = low + extent.clamp(max=1)
    return Crop(torch.where(flip, high, low).float(), torch.where(flip, -extent, extent).expand_as(low).float())


def first_balanced(probe: Tensor, dominant_share: float) -> Tensor:
    """Number of the first candidate with two classes or more, none of them dominant; the last one if there is none.

    With a ``dominant_share`` of 1 nothing is asked of it, as with mmsegmentation's ``cat_max_ratio``: the first one.
    ``probe`` (n, candidates, points) uint8 labels; the result is (n,) int64.
    """
    if dominant_share >= 1:
        return torch.zeros(len(probe), dtype=torch.int64, device=probe.device)
    counts = torch.zeros((*probe.shape[:2], 256), device=probe.device)
    counts.scatter_add_(2, probe.long(), torch.ones((), device=probe.device).expand(probe.shape))
    counts = counts[..., :IGNORED]
    balanced = counts.amax(dim=-1) < dominant_share * counts.sum(dim=-1)  # never with one class or none
    balanced[:, -1] = True
    return balanced.int().argmax(dim=1)


def photometric_distortion(images: Tensor, *, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue, each with probability 0.5; contrast comes first or last.

    ``images`` (n, 3, h, w) in [0, 1].
    """
    drawn = draws.rand(9)
    happens = drawn[:, :4] < 0.5
    delta, contrast, saturation, turn = (2 * drawn[:, 4:8] - 1).unbind(1)
    low, high = RANGE
    contrast, saturation = (low + (high - low) * (value + 1) / 2 for value in (contrast, saturation))
    first = drawn[:, 8] < 0.5
    images = images.clone()
    for rows, change, value in (
        (happens[:, 0], _add, delta * DELTA),
        (happens[:, 1] & first, adjust_brightness, contrast),
        (happens[:, 2], scale_saturation, saturation),
        (happens[:, 3], shift_hue, turn * TURN),
        (happens[:, 1] & ~first, adjust_brightness, contrast),
    ):
        chosen = rows.nonzero().squeeze(1)
        if len(chosen):
            place = chosen.to(images.device)
            images[place] = change(images[place], value[chosen].to(images.device))
    return images


def _add(images: Tensor, delta: Tensor) -> Tensor:
    return (images + delta.view(-1, 1, 1, 1)).clamp_(0, 1)


def scale_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the HSV saturation, at most to 1, at constant hue and value."""
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    limit = torch.where(chroma > 0, value / chroma.clamp(min=1e-8), 1)
    return (value - (value - images) * torch.minimum(factor.view(-1, 1, 1, 1), limit)).clamp_(0, 1)


def _inside(crop: Crop, size: tuple[int, int]) -> Tensor:
    """Which pixels of crops (n, 2) lie in the image: (n, height, width) bool."""
    points = crop.to_source(patch_centres(size, device=crop.offset.device))
    return ((points >= 0) & (points < 1)).all(dim=-1).view(-1, *size)
