"""Segment whole images of any size, and ``glare predict``.

An image is padded on the right and at the bottom to a multiple of the patch, and its logits are cut back; one that
is too large for a single pass is covered by overlapping windows, whose logits are averaged.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from glare.backbones import read_normalisation, resolve_backbone
from glare.configuration_glare import GlareConfig
from glare.errors import UserError
from glare.views import Normalisation

WHOLE_LIMIT_PX = 1536  # longer side up to which an image is segmented in one pass
WINDOW_PX = 1024  # side of the windows of larger images
WINDOW_BATCH = 4


@dataclass(frozen=True)
class Tiling:
    """How large images are covered.

    ``window``: side in px; None segments images of up to 1536 px in one pass and takes 1024 px above.
    ``stride``: distance of windows in px, two thirds of the window where None.
    """

    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; give a side in px of at least 1")
        if self.stride is not None and not 1 <= self.stride <= (self.window or WINDOW_PX):
            raise ValueError(
                f"stride is {self.stride}; give 1 to {self.window or WINDOW_PX}, so that windows leave no gap"
            )

    def windows(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Windows of equal size that cover an image of ``size`` (height, width); one for the whole if it fits."""
        if max(size) <= (self.window or WHOLE_LIMIT_PX):
            return [(slice(0, size[0]), slice(0, size[1]))]
        side = self.window or WINDOW_PX
        stride = self.stride or max(1, side * 2 // 3)
        return list(product(_spans(size[0], side, stride), _spans(size[1], side, stride)))


def _spans(length: int, side: int, stride: int) -> list[slice]:
    """Spans of one axis, the last one moved back inside."""
    side = min(side, length)
    count = math.ceil((length - side) / stride) + 1
    starts = (min(i * stride, length - side) for i in range(count))
    return [slice(start, start + side) for start in starts]


def load_segmenter(name: str, *, device: torch.device) -> tuple[PreTrainedModel, Normalisation]:
    """A segmentation model, ready to predict, and the normalisation of its input.

    ``name``: a ``model`` folder, the run folder of ``glare finetune`` or a Hub id. Raises UserError for others.
    """
    folder = resolve_backbone(name)
    try:
        model = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model {name!r} cannot be loaded ({reason}); give a run folder of glare finetune, its model folder, "
            "or the Hub id of such a model"
        ) from error
    config = model.config
    built = (config.architectures or [type(model).__name__])[0]
    if not isinstance(
        getattr(config, "backbone_config", None) if config.model_type == "upernet" else config, GlareConfig
    ):
        raise UserError(f"model {name!r} is a {built}; give a model that glare finetune has written")
    if "Segmentation" not in built:
        raise UserError(f"model {name!r} is a {built} without segmentation head; run glare finetune on it first")
    return model.to(device).eval(), read_normalisation(name)


def class_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's classes in the order of its logits."""
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def patch_size(model: PreTrainedModel) -> int:
    """Side of a patch in px; images are padded to a multiple of it."""
    config: Any = model.config
    return int((config if isinstance(config, GlareConfig) else config.backbone_config).patch_size)


DEFAULT_TILING = Tiling()


@torch.inference_mode()
def logits(
    model: PreTrainedModel, pixels: Tensor, *, normalise: Normalisation, tiling: Tiling = DEFAULT_TILING
) -> Tensor:
    """Class logits of images of one size.

    Args:
        model: a segmentation model in evaluation mode.
        pixels: (n, height, width, 3) uint8.
        normalise: of the model's input.
        tiling: how large images are covered.

    Returns:
        (n, classes, height, width) float32 on the model's device.
    """
    count, *size = pixels.shape[:3]
    windows = tiling.windows((size[0], size[1]))
    if len(windows) == 1:
        return _whole(model, pixels, normalise)
    total = torch.zeros((count, model.config.num_labels, *size), device=model.device)
    covered = torch.zeros(tuple(size), device=model.device)
    for image, chunk in product(range(count), _chunks(windows)):
        found = _whole(model, torch.stack([pixels[image][window] for window in chunk]), normalise)
        for window, part in zip(chunk, found, strict=True):
            total[image, :, *window] += part
    for window in windows:
        covered[window] += 1
    return total.div_(covered)


def _chunks(windows: Sequence[tuple[slice, slice]]) -> Iterator[Sequence[tuple[slice, slice]]]:
    return (windows[first : first + WINDOW_BATCH] for first in range(0, len(windows), WINDOW_BATCH))


def _whole(model: PreTrainedModel, pixels: Tensor, normalise: Normalisation) -> Tensor:
    """Logits (n, classes, height, width) of images (n, height, width, 3) in one pass."""
    height, width = pixels.shape[1:3]
    patch = patch_size(model)
    images = normalise(pixels.to(model.device).permute(0, 3, 1, 2).float().div(255))
    images = F.pad(images, (0, -width % patch, 0, -height % patch))
    coarse = model(pixel_values=images).logits.float()
    fine = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return fine[..., :height, :width]


def segment(
    model: PreTrainedModel,
    images: Sequence[Image.Image],
    *,
    normalise: Normalisation,
    tiling: Tiling = DEFAULT_TILING,
) -> list[NDArray[np.uint8]]:
    """Class index (height, width) of every pixel of RGB images of any sizes."""
    labels = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).unsqueeze(0)
        found = logits(model, pixels, normalise=normalise, tiling=tiling).argmax(dim=1)[0]
        labels.append(found.to(torch.uint8).cpu().numpy())
    return labels
