"""One check of the health of a pre-training run, without labels: the features of a few fixed images.

The images are the first of the run's own, in clean centre crops. Nothing here draws from a generator of the run or
changes what trains, so a run with checks ends with the same bits as one without.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from glare.alarms import CHECKED
from glare.crops import PackedImages, cut, subset
from glare.features import encode
from glare.geometry import Crop
from glare.health import feature_std, mean_cosine, rankme
from glare.student import without_adapters
from glare.views import Normalisation

IMAGES = (8, 32)  # fewest and most; in between two for each image of a batch, as the teacher sees


@dataclass(frozen=True)
class HealthCheck:
    """Fixed ``views`` (1, n, 3, size, size), normalised, and what the backbone made of them before the first step.

    ``patches`` (n, patches, d) float32 and ``untouched``, as ``measure`` gives it, are those without adapters.
    """

    views: Tensor
    patches: Tensor
    untouched: dict[str, float]
    accelerator: Accelerator

    @classmethod
    def of(cls, backbone: PreTrainedModel, views: Tensor, accelerator: Accelerator) -> "HealthCheck":
        """To be made before training or a checkpoint changes the weights of ``backbone``."""
        with without_adapters(backbone):
            cls_tokens, patches = features(backbone, views, accelerator)
        return cls(views, patches, measured(cls_tokens, patches, patches), accelerator)

    def measure(self, backbone: PreTrainedModel) -> dict[str, float]:
        """Values for the log: ``rankme_cls``, ``rankme_patches``, ``feature_std`` and ``cosine_to_base``."""
        return measured(*features(backbone, self.views, self.accelerator), self.patches)


def measured(cls_tokens: Tensor, patches: Tensor, base: Tensor) -> dict[str, float]:
    """Measures of features (n, d) and (n, patches, d), nan where they are not finite; ``base``: untouched patches."""
    rows = patches.flatten(0, 1)
    if not (rows.isfinite().all() and cls_tokens.isfinite().all()):
        return dict.fromkeys(CHECKED, math.nan)
    return {
        "rankme_cls": rankme(cls_tokens),
        "rankme_patches": rankme(rows),
        "feature_std": feature_std(rows),
        "cosine_to_base": mean_cosine(patches, base),
    }


@torch.no_grad()
def features(backbone: PreTrainedModel, views: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """[CLS] (n, d) and patches (n, patches, d) of views (1, n, 3, h, w), float32, where float64 can be computed."""
    with accelerator.autocast(), _without_compiling(backbone):
        found = encode(backbone, [views])[0]
    device = torch.device("cpu") if views.device.type == "mps" else views.device  # which has no float64
    return found.cls[0].float().to(device), found.patches[0].float().to(device)


@contextmanager
def _without_compiling(backbone: PreTrainedModel) -> Iterator[None]:
    """Blocks given to ``torch.compile`` run as they are: other sizes would trace new graphs for the training, too."""
    compiled = any(module._compiled_call_impl is not None for module in backbone.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def check_views(images: PackedImages, *, batch_size: int, size: int, normalise: Normalisation) -> Tensor:
    """The first of ``images``, the largest square in the middle of each: (1, n, 3, size, size).

    Twice ``batch_size`` images, that of all processes, but 8 to 32: the same however a batch is shared out.
    """
    count = min(max(2 * batch_size, IMAGES[0]), IMAGES[1], len(images))
    few = subset(images, torch.arange(count))
    return normalise(cut(few, torch.arange(count), centre_crops(few), size=(size, size))).unsqueeze(0)


def centre_crops(images: PackedImages) -> Crop:
    """The largest square in the middle of each image, on whole pixels: crops (n, 2)."""
    side = images.size.amin(dim=1, keepdim=True)
    return Crop((images.size - side) // 2 / images.size, side / images.size)
