"""Class logits of whole images: in one pass or in windows, at one size or several, mirrored or not.

An image is padded on the right and at the bottom to a multiple of the patch, and its logits are cut back; one that
is too large for a single pass is covered by overlapping windows, whose logits are averaged. Of several sizes, and of
an image and its mirror image, the softmax is averaged. Both are what mmsegmentation does (``slide`` and
``MultiScaleFlipAug``). Here images of one size go through the model together, windows and mirror images, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from glare.configuration_glare import GlareConfig
from glare.errors import UserError
from glare.geometry import factor_to_fit
from glare.typed_values import MismatchError, read
from glare.views import Normalisation

WHOLE_LIMIT_PX = 1536  # longer side up to which an image is segmented in one pass
WINDOW_PX = 1024  # side of the windows of larger images
LARGEST_SIDE_PX = 2**14  # of a test scale
LARGEST_PIXELS = LARGEST_SIDE_PX**2  # of an image that is made larger
PASS_PIXELS = 4 * WINDOW_PX**2  # that go through the model together

REMEMBERED = ("window", "stride", "test_scale")
"""What a model keeps of how it was evaluated."""

Size = tuple[int, int]
"""(height, width) in px."""
Window = tuple[slice, slice]
"""Rows and columns."""


@dataclass(frozen=True)
class Sweep:
    """How images are segmented: at what sizes, and how large ones are covered.

    ``window``: side in px; None segments images of up to 1536 px in one pass and takes 1024 px above.
    ``stride``: distance of windows in px, two thirds of the window where None.
    ``test_scale``: two sides in px; images are first brought to the largest size whose longer side is not above the
    larger and whose shorter side is not above the smaller of them. None is their native size.
    ``ratios``: factors on that size, of whose results the mean is taken. ``flip``: mirror images, too.
    """

    window: int | None = None
    stride: int | None = None
    test_scale: tuple[int, int] | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; give a side in px of at least 1")
        if self.stride is not None and not 1 <= self.stride <= (self.window or WINDOW_PX):
            raise ValueError(
                f"stride is {self.stride}; give 1 to {self.window or WINDOW_PX}, so that windows leave no gap"
            )
        check_scale("test_scale", self.test_scale)
        if not self.ratios or not all(0 < ratio < math.inf for ratio in self.ratios):
            raise ValueError(f"ratios is {', '.join(map(str, self.ratios)) or 'empty'}; give factors above 0")

    @property
    def described(self) -> str:
        """How, for people."""
        parts = ["at their native size" if self.test_scale is None else "fitted to {} x {} px".format(*self.test_scale)]
        parts += [f"in windows of {self.window} px"] * (self.window is not None)
        parts += [f"at {' and '.join(f'{ratio:g}' for ratio in self.ratios)} times that size"] * (self.ratios != (1,))
        return ", ".join(parts + ["mirrored, too"] * self.flip)

    def sizes(self, size: Size, *, patch: int = 1) -> list[Size]:
        """The sizes at which an image of ``size`` is segmented by a model with patches of ``patch`` px.

        No ratio makes its longer side shorter than a patch. Raises UserError where one makes it larger than
        `LARGEST_PIXELS`.
        """
        factor = 1.0 if self.test_scale is None else factor_to_fit(torch.tensor(size), self.test_scale).item()
        height, width = (factor * side for side in size)
        for ratio in self.ratios:
            if height * ratio * width * ratio > max(LARGEST_PIXELS, size[0] * size[1]):
                raise UserError(
                    f"ratio {ratio:g} brings an image of {size[1]} x {size[0]} px to {width * ratio:.4g} x "
                    f"{height * ratio:.4g} px, at most {LARGEST_SIDE_PX} x {LARGEST_SIDE_PX} px can be segmented; give "
                    "lower ratios"
                )
        least = min(1.0, patch / max(height, width))
        factors = [max(ratio, least) for ratio in self.ratios]
        return [(max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))) for ratio in factors]

    def windows(self, size: Size) -> list[Window]:
        """Windows of equal size that cover an image of ``size``; one for the whole if it fits."""
        if max(size) <= (self.window or WHOLE_LIMIT_PX):
            return [(slice(0, size[0]), slice(0, size[1]))]
        side = self.window or WINDOW_PX
        stride = self.stride or max(1, side * 2 // 3)
        return list(product(_spans(size[0], side, stride), _spans(size[1], side, stride)))


def check_scale(name: str, scale: tuple[int, int] | None) -> None:
    """Raise ValueError for a scale with a side below 1 px or of more than images may be brought to."""
    if scale is not None and not 1 <= min(scale) <= max(scale) <= LARGEST_SIDE_PX:
        raise ValueError(f"{name} is {scale}; give two sides of 1 to {LARGEST_SIDE_PX} px, such as 2048,512")


def _spans(length: int, side: int, stride: int) -> list[slice]:
    """Spans of one axis, the last one moved back inside."""
    side = min(side, length)
    steps = math.ceil((length - side) / stride)
    starts = (min(i * stride, length - side) for i in range(steps + 1))
    return [slice(start, start + side) for start in starts]


def asked(given: Any) -> Sweep:
    """What ``given`` says, an object with fields of a Sweep; ValueError where that is impossible."""
    names = [field.name for field in fields(Sweep) if hasattr(given, field.name)]
    return Sweep(**{name: getattr(given, name) for name in names})


def sweep_of(model: PreTrainedModel) -> Sweep:
    """How a model is used where its user says nothing: as ``remember`` noted. Raises ValueError for a broken note."""
    said = getattr(model.config, "inference", None) or {}
    if not isinstance(said, dict) or not set(said) <= set(REMEMBERED):
        raise ValueError("inference in config.json is not made of window, stride and test_scale")
    return read_sweep(said)


def read_sweep(said: Mapping[str, Any]) -> Sweep:
    """A Sweep of values as JSON has them; keys left out keep their defaults. Raises ValueError for other values."""
    types = get_type_hints(Sweep)
    try:
        return Sweep(**{key: read(types[key], value) for key, value in said.items()})
    except (KeyError, MismatchError):
        raise ValueError(f"{dict(said)} does not say how images are segmented ({', '.join(types)})") from None


def remember(model: PreTrainedModel, sweep: Sweep) -> None:
    """Note in the model's configuration with what windows and test scale it is used; no note where none are given."""
    note = {key: value for key in REMEMBERED if (value := getattr(sweep, key)) is not None}
    if note:
        model.config.inference = note


def sweep_for(model: PreTrainedModel, given: Any) -> Sweep:
    """As ``asked``, with the model's own windows and test scale where ``given`` says nothing of them.

    A stride that is given goes with the model's window, a window with its own usual stride. Raises UserError for a
    stride above the model's window.
    """
    own, sweep = sweep_of(model), asked(given)
    test_scale = sweep.test_scale or own.test_scale
    if sweep.window is not None or own.window is None:
        return replace(sweep, test_scale=test_scale)
    try:
        return replace(sweep, window=own.window, stride=sweep.stride or own.stride, test_scale=test_scale)
    except ValueError as error:
        raise UserError(f"{error} (the window is the model's own)") from None


@torch.inference_mode()
def logits(model: PreTrainedModel, pixels: Tensor, *, normalise: Normalisation, sweep: Sweep | None = None) -> Tensor:
    """Class logits of images of one size.

    Args:
        model: a segmentation model in evaluation mode.
        pixels: (n, height, width, 3) uint8.
        normalise: of the model's input.
        sweep: sizes and windows; by default those of the model's fine-tuning.

    Returns:
        (n, classes, height, width) float32 on the model's device; of several sizes, or with mirror images, the
        logarithm of the mean of the softmax.
    """
    sweep = sweep or sweep_of(model)
    native = (pixels.shape[1], pixels.shape[2])
    sizes = sweep.sizes(native, patch=patch_size(model))

    def of(images: Tensor) -> Tensor:
        if len(sizes) == 1 and not sweep.flip:
            return _at_size(model, images, sizes[0], normalise, sweep)
        total = _probabilities(model, images, sizes[0], normalise, sweep)
        for size in sizes[1:]:
            total += _probabilities(model, images, size, normalise, sweep)
        return total.div_(len(sizes)).log_()

    largest = max(height * width for height, width in [native, *sizes]) * (2 if sweep.flip else 1)
    return torch.cat([of(chunk) for chunk in pixels.permute(0, 3, 1, 2).split(max(1, PASS_PIXELS // largest))])


def _probabilities(
    model: PreTrainedModel, images: Tensor, size: Size, normalise: Normalisation, sweep: Sweep
) -> Tensor:
    """Softmax (n, classes, height, width) of images (n, 3, height, width) at ``size``, mean with the mirror images."""
    if not sweep.flip:
        return _at_size(model, images, size, normalise, sweep).softmax(dim=1)
    both = _at_size(model, torch.cat([images, images.flip(-1)]), size, normalise, sweep).softmax(dim=1)
    straight, mirrored = both.chunk(2)
    return (straight + mirrored.flip(-1)).div_(2)


def _at_size(model: PreTrainedModel, images: Tensor, size: Size, normalise: Normalisation, sweep: Sweep) -> Tensor:
    """Logits (n, classes, height, width) of images (n, 3, height, width) uint8 that are segmented at ``size``."""
    native = (images.shape[2], images.shape[3])
    if size == native:
        return _tiled(model, images, normalise, sweep)
    resized = F.interpolate(images.to(model.device).float(), size=size, mode="bicubic", antialias=True)
    found = _tiled(model, resized.round_().clamp_(0, 255), normalise, sweep)
    return F.interpolate(found, size=native, mode="bilinear", align_corners=False)


def _tiled(model: PreTrainedModel, images: Tensor, normalise: Normalisation, sweep: Sweep) -> Tensor:
    """Logits (n, classes, height, width) of images (n, 3, height, width), values 0 to 255, covered by windows."""
    count, _, *size = images.shape
    windows = sweep.windows((size[0], size[1]))
    if len(windows) == 1:
        return _one_pass(model, images, normalise)
    total = torch.zeros((count, model.config.num_labels, *size), device=model.device)
    covered = torch.zeros(tuple(size), device=model.device)
    places = list(product(range(count), windows))
    rows, columns = windows[0]
    together = max(1, PASS_PIXELS // (rows.stop * columns.stop))
    for first in range(0, len(places), together):
        chunk = places[first : first + together]
        found = _one_pass(model, torch.stack([images[image, :, *window] for image, window in chunk]), normalise)
        for (image, window), part in zip(chunk, found, strict=True):
            total[image, :, *window] += part
    for window in windows:
        covered[window] += 1
    return total.div_(covered)


def _one_pass(model: PreTrainedModel, images: Tensor, normalise: Normalisation) -> Tensor:
    """Logits (n, classes, height, width) of images (n, 3, height, width), values 0 to 255."""
    height, width = images.shape[2:]
    patch = patch_size(model)
    padded = F.pad(normalise(images.to(model.device).float().div(255)), (0, -width % patch, 0, -height % patch))
    coarse = model(pixel_values=padded).logits.float()
    fine = F.interpolate(coarse, size=padded.shape[-2:], mode="bilinear", align_corners=False)
    return fine[..., :height, :width]


def patch_size(model: PreTrainedModel) -> int:
    """Side of a patch in px; images are padded to a multiple of it."""
    config: Any = model.config
    return int((config if isinstance(config, GlareConfig) else config.backbone_config).patch_size)


def segment(
    model: PreTrainedModel,
    images: Sequence[Image.Image],
    *,
    normalise: Normalisation,
    sweep: Sweep | None = None,
) -> list[NDArray[np.uint8]]:
    """Class index (height, width) of every pixel of RGB images of any sizes; the arguments as in ``logits``."""
    labels = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).unsqueeze(0)
        found = logits(model, pixels, normalise=normalise, sweep=sweep).max(dim=1).indices[0]
        labels.append(found.to(torch.uint8).cpu().numpy())
    return labels
