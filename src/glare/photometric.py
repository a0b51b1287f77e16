"""Colour and blur of whole batches, one draw of parameters an image (paper appendix B.1, after BYOL and DINO).

All functions take images (n, 3, h, w) float32 in [0, 1] and parameters (n,), and return new images in [0, 1].
"""

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's conversion to "L"


def grey(images: Tensor) -> Tensor:
    """Luma as three equal channels."""
    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale: 0 gives black, 1 the image."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image: 0 gives plain grey, 1 the image."""
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel: 0 gives a grey image, 1 the image."""
    return torch.lerp(grey(images), images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def shift_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the full circle, in [-0.5, 0.5], at constant HSV saturation and value."""
    red, green, blue = images.unbind(dim=1)
    value, lead = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    safe = chroma.clamp(min=1e-8)
    sector = torch.where(lead == 0, (green - blue) / safe, torch.where(lead == 1, (blue - red) / safe + 2, 0))
    sector = torch.where(lead == 2, (red - green) / safe + 4, sector) + 6 * turn.view(-1, 1, 1)
    place = torch.stack([sector + 5, sector + 3, sector + 1], dim=1) % 6
    fall = torch.minimum(place, 4 - place).clamp(0, 1)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * fall


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue)


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order of its own for every image, as torchvision's ColorJitter.

    Args:
        images: (n, 3, h, w).
        factors: (n, 4), parameters of ``ADJUSTMENTS`` in their order.
        order: (n, 4) int64, the adjustment of each image to apply at every one of four steps.
    """
    images = images.clone()
    for step in range(len(ADJUSTMENTS)):
        for kind, adjust in enumerate(ADJUSTMENTS):
            rows = (order[:, step] == kind).nonzero().squeeze(1)
            if len(rows):
                images[rows] = adjust(images[rows], factors[rows, kind])
    return images


def solarize(images: Tensor) -> Tensor:
    """Invert every value of at least one half."""
    return torch.where(images >= 0.5, 1 - images, images)


def gaussian_blur(images: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Separable Gaussian blur with reflected borders; ``sigma`` (n,) and ``radius`` in px.

    Each axis is one matrix product, which the device does faster than a per-image convolution.
    """
    height, width = images.shape[-2:]
    down = _blur_matrix(height, sigma, radius).unsqueeze(1)
    across = down if width == height else _blur_matrix(width, sigma, radius).unsqueeze(1)
    return torch.matmul(torch.matmul(down, images), across.transpose(-1, -2))


def _blur_matrix(length: int, sigma: Tensor, radius: int) -> Tensor:
    """(n, length, length): row i holds the kernel around i, folded back at the borders."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (tap / sigma.unsqueeze(1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    place = _reflect(torch.arange(length, device=sigma.device).unsqueeze(1) + tap, length)
    matrix = kernel.new_zeros(len(sigma), length, length)
    return matrix.scatter_add_(2, place.expand(len(sigma), -1, -1), kernel.unsqueeze(1).expand(-1, length, -1))


def _reflect(place: Tensor, length: int) -> Tensor:
    """Indices mirrored into [0, length) about the outermost pixels, as often as needed."""
    if length == 1:
        return torch.zeros_like(place)
    period = 2 * (length - 1)
    place = place.abs() % period
    return torch.minimum(place, period - place)
