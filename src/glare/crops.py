"""Many crops cut out of packed uint8 images at once, on the device, antialiased.

The images lie one after another in one flat array of pixels, in RAM, in a memory-mapped file or on the GPU, so a
batch needs no collation: a crop is a gather of its window and two small matrix products with the weights of a
separable bicubic filter. The filter is Pillow's (a = -0.5, widened by the reduction factor), so a crop equals
Pillow's crop-and-resize up to rounding. On a CPU, crops of whole pixels are cut one by one with torch's kernel for
uint8, which does the same and is many times as fast; its results differ by rounding, 2/255 at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glare.geometry import Crop, patch_centres

EDGE_TOLERANCE_PX = 1e-2  # float32 unit coordinates of a whole pixel are off by less than this up to 100,000 px
GPU_SHARE = 0.3  # of the free GPU memory that packed images may take
WINDOW_BUDGET = 2**26  # float32 values of one chunk of windows: 256 MiB


@dataclass(frozen=True)
class PackedImages:
    """Decoded images in one flat array.

    ``pixels`` (total_pixels, 3) uint8, images row-major one after another; ``start`` (n,) int64, the first row of
    each image in ``pixels``; ``size`` (n, 2) int64, (width, height) in px.
    """

    pixels: Tensor
    start: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def image(self, index: int) -> Tensor:
        """One image as (height, width, 3) uint8, a view on the packed pixels."""
        width, height = self.size[index].tolist()
        first = int(self.start[index])
        return self.pixels[first : first + width * height].view(height, width, 3)

    def to(self, device: torch.device) -> "PackedImages":
        """The same images on ``device``."""
        return PackedImages(self.pixels.to(device), self.start.to(device), self.size.to(device))


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a pack of this size should live on ``device``: a GPU with plenty of free memory, never the CPU."""
    return device.type == "cuda" and num_bytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]


def subset(images: PackedImages, index: Tensor) -> PackedImages:
    """Only the images ``index`` (n,), packed anew: what has to travel when the pack does not fit the device."""
    chosen = [images.image(i).reshape(-1, 3) for i in index.tolist()]
    size = images.size[index]
    return PackedImages(torch.cat(chosen), size.prod(dim=1).cumsum(0) - size.prod(dim=1), size)


def cut(images: PackedImages, index: Tensor, crop: Crop, *, size: tuple[int, int]) -> Tensor:
    """Crop and resize, antialiased bicubic.

    Args:
        images: the packed images.
        index: (n,) int64, the image each crop is cut from.
        crop: crops (n, 2). A pixel whose centre lies outside the image is black; the others see the image only,
            so that a border has no dark rim.
        size: (height, width) of the result in px.

    Returns:
        (n, 3, height, width) float32 in [0, 1], on the device of ``images``.
    """
    device = images.pixels.device
    index, crop = index.to(device), crop.to(device)
    if device.type == "cpu":
        window = _whole_pixels(crop, images.size[index])
        if window is not None:
            return _resized(images, index, window, flipped=crop.scale < 0, size=size)
    return _filtered(images, index, crop, size=size)


def _whole_pixels(crop: Crop, source_px: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and one-past-last pixel (n, 2) of crops that are whole pixels inside their images, as training's are."""
    edges = torch.stack([crop.offset, crop.offset + crop.scale]) * source_px
    pixels = edges.round()
    low, high = pixels.amin(dim=0), pixels.amax(dim=0)
    exact = (edges - pixels).abs().amax() < EDGE_TOLERANCE_PX if len(source_px) else False
    return (low.long(), high.long()) if exact and low.amin() >= 0 and bool((high <= source_px).all()) else None


def _resized(
    images: PackedImages, index: Tensor, window: tuple[Tensor, Tensor], *, flipped: Tensor, size: tuple[int, int]
) -> Tensor:
    """``cut`` one by one with torch's kernel for uint8, whose results are rounded to 8 bits as Pillow's are."""
    low, high = (edge.tolist() for edge in window)
    out = torch.empty((len(index), 3, *size), dtype=torch.uint8)
    for place, image in enumerate(index.tolist()):
        (left, top), (right, bottom) = low[place], high[place]
        pixels = images.image(image)[top:bottom, left:right].permute(2, 0, 1).unsqueeze(0)
        out[place] = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    for axis, mirrored in ((-1, flipped[:, 0]), (-2, flipped[:, 1])):
        out[mirrored] = out[mirrored].flip(axis)
    return out.float().div_(255)


def _filtered(images: PackedImages, index: Tensor, crop: Crop, *, size: tuple[int, int]) -> Tensor:
    """``cut`` of any crops, many at once: their windows are gathered and multiplied by the weights of the filter."""
    device = images.pixels.device
    source_px = images.size[index]
    low, high = _window(crop, source_px)
    out = torch.empty((len(index), 3, *size), device=device)
    for chunk in _chunks(high - low):
        first, extent = low[chunk], (high - low)[chunk].amax(dim=0)
        window = _gather(images, index[chunk], first, extent)
        across, down = (
            _weights(crop[chunk], source_px[chunk], (low[chunk], high[chunk]), axis=axis, taps=taps, outputs=outputs)
            for axis, taps, outputs in ((0, int(extent[0]), size[1]), (1, int(extent[1]), size[0]))
        )
        count, _, rows, columns = window.shape
        narrow = torch.bmm(window.view(count, 3 * rows, columns), across.transpose(1, 2)).view(count, 3, rows, -1)
        narrow.clamp_(0, 255)  # between the passes too, as Pillow, whose rows are 8 bit by then
        out[chunk] = torch.matmul(down.unsqueeze(1), narrow).clamp_(0, 255).div_(255)
    return out


def cut_labels(
    labels: Tensor, images: PackedImages, index: Tensor, crop: Crop, *, size: tuple[int, int], fill: int = 255
) -> Tensor:
    """The label under the centre of every pixel of a crop.

    Args:
        labels: (total_pixels,) uint8, packed like ``images.pixels``.
        images: the images the labels belong to.
        index: (n,) int64, the image each crop is cut from.
        crop: crops (n, 2).
        size: (height, width) of the result in px.
        fill: label of what lies outside the image.

    Returns:
        (n, height, width) uint8.
    """
    device = labels.device
    index, crop = index.to(device), crop.to(device)
    source_px = images.size[index].to(device).unsqueeze(1)
    cell = (crop.to_source(patch_centres(size, device=device)) * source_px).floor().long()
    inside = ((cell >= 0) & (cell < source_px)).all(dim=-1)
    x, y = torch.minimum(cell.clamp(min=0), source_px - 1).unbind(-1)
    found = labels[images.start[index].to(device).unsqueeze(1) + y * source_px[..., 0] + x]
    return torch.where(inside, found, fill).to(torch.uint8).view(-1, *size)


def _window(crop: Crop, source_px: Tensor) -> tuple[Tensor, Tensor]:
    """Whole-pixel window of each crop inside its image: first and one-past-last pixel, (n, 2) int64 each."""
    edges = torch.stack([crop.offset, crop.offset + crop.scale]) * source_px
    low = (edges.amin(dim=0) + EDGE_TOLERANCE_PX).floor().long()
    high = (edges.amax(dim=0) - EDGE_TOLERANCE_PX).ceil().long()
    low = torch.minimum(low.clamp(min=0), source_px - 1)
    return low, torch.minimum(torch.maximum(high, low + 1), source_px)


def _chunks(extent: Tensor) -> Iterator[slice]:
    """Runs of crops whose windows, padded to the largest, fit the budget."""
    largest = 3 * int(extent[:, 0].amax()) * int(extent[:, 1].amax()) if len(extent) else 1
    step = max(1, WINDOW_BUDGET // largest)
    return (slice(first, first + step) for first in range(0, len(extent), step))


def _gather(images: PackedImages, index: Tensor, first: Tensor, extent: Tensor) -> Tensor:
    """Windows that begin at pixel ``first`` (n, 2), all of the same ``extent`` (2,): (n, 3, rows, columns) float32."""
    last = images.size[index] - 1
    x = first[:, :1] + torch.arange(int(extent[0]), device=first.device)
    y = first[:, 1:] + torch.arange(int(extent[1]), device=first.device)
    x, y = x.minimum(last[:, :1]), y.minimum(last[:, 1:])
    row = images.start[index].unsqueeze(1) + y * images.size[index, :1]
    pixel = row.unsqueeze(2) + x.unsqueeze(1)
    return images.pixels[pixel].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _weights(
    crop: Crop, source_px: Tensor, window: tuple[Tensor, Tensor], *, axis: int, taps: int, outputs: int
) -> Tensor:
    """Filter weights along one axis: (n, outputs, taps), each row summing to 1, or 0 where its centre lies outside."""
    low, high = (edge[:, axis, None, None] for edge in window)
    length = source_px[:, axis, None, None].float()
    offset, scale = crop.offset[:, axis, None, None] * length, crop.scale[:, axis, None, None] * length
    centre = offset + scale * ((torch.arange(outputs, device=low.device) + 0.5) / outputs).view(1, -1, 1)
    pixel = low + torch.arange(taps, device=low.device).view(1, 1, -1)
    reduction = (scale.abs() / outputs).clamp(min=1)
    weight = _bicubic((pixel + 0.5 - centre) / reduction) * (pixel < high)
    inside = (centre >= 0) & (centre < length)
    return torch.where(inside, weight / weight.sum(dim=-1, keepdim=True), 0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, zero beyond 2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
