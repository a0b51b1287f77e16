"""What the Space compares: a segmenter after adaptation and, where there is one, its twin without.

The built-in pair is small because only what differs from the package's embedded ViT is stored: adapters and two
linear heads, in ``landcover/``, written by ``make_landcover.py``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from glare.data.landcover import CLASSES, PALETTE
from glare.dense_inference import patch_size
from glare.errors import UserError
from glare.inference import class_names, load_segmenter, palette
from glare.model_names import EMBEDDED
from glare.modeling_glare import GlareModel
from glare.segmenters import add_head, load_pretrained
from glare.views import Normalisation

LANDCOVER = Path(__file__).parent / "landcover"
ADAPTER = LANDCOVER / "adapter"
HEADS = LANDCOVER / "heads.safetensors"
ABOUT = LANDCOVER / "about.json"
CACHED_PAIRS = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Segmenter:
    """A segmentation model in evaluation mode and the normalisation of its input."""

    model: PreTrainedModel
    normalise: Normalisation

    @property
    def classes(self) -> list[str]:
        """Names of its classes in the order of its logits."""
        return class_names(self.model)

    @property
    def colours(self) -> NDArray[np.uint8]:
        """Colours (classes, 3) of its classes."""
        return palette(self.model)

    @property
    def patch_size(self) -> int:
        """Side of its patches in px."""
        return patch_size(self.model)


@dataclass(frozen=True)
class Pair:
    """Two segmenters of the same classes and where they come from (Markdown); ``before`` None where there is none."""

    before: Segmenter | None
    after: Segmenter
    about: str


@lru_cache(maxsize=CACHED_PAIRS)
def load_pair(after: str, before: str) -> Pair:
    """The models to compare; the last two pairs stay in memory.

    ``after`` and ``before``: Hub id or folder of a model that ``glare finetune`` has written. Without ``after`` it is
    the built-in pair, without ``before`` there is nothing to compare with. Raises UserError for a model that cannot
    be loaded, for two of different classes, and for ``before`` alone.
    """
    if not after:
        if before:
            raise UserError("only the model before adaptation is given; name the adapted one too, or clear both fields")
        return built_in()
    adapted = Segmenter(*load_segmenter(after, device=DEVICE))
    if not before:
        return Pair(None, adapted, "Name the model fine-tuned without adaptation, too, to see what adapting changed.")
    untouched = Segmenter(*load_segmenter(before, device=DEVICE))
    if untouched.classes != adapted.classes:
        raise UserError(
            f"the two models have different classes ({', '.join(untouched.classes)} before adaptation, "
            f"{', '.join(adapted.classes)} after); give two that were fine-tuned on the same data"
        )
    return Pair(untouched, adapted, "Both models are yours: they compare fairly if only the adaptation differs.")


def built_in() -> Pair:
    """The embedded ViT and the same with adapters, each with its own linear head for the landcover classes."""
    heads = load_file(HEADS)
    before, after = (
        with_linear_head(*load_pretrained(backbone), head(heads, name))
        for name, backbone in (("before", EMBEDDED), ("after", str(ADAPTER)))
    )
    return Pair(before, after, describe(json.loads(ABOUT.read_text(encoding="utf-8"))))


def head(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one of several heads in a file: ``before.classifier.bias`` is ``classifier.bias`` of before."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def with_linear_head(vit: GlareModel, normalise: Normalisation, weights: Mapping[str, Tensor]) -> Segmenter:
    """A ViT with the given linear head for the landcover classes."""
    model = add_head(vit, "linear", pyramid=False, classes=list(CLASSES), palette=[list(colour) for colour in PALETTE])
    model.head.load_state_dict(weights)
    return Segmenter(model.to(DEVICE).eval(), normalise)


def describe(about: Mapping[str, Any]) -> str:
    """Where the built-in pair comes from and what it scores, from ``about.json``."""
    before, after = (100 * about["miou"][name] for name in ("before", "after"))
    return (
        f"Built-in model: a small ViT that has only seen temperate landscapes, adapted to {about['unlabelled']} "
        f"unlabelled arid scenes. Before and after adaptation it has a linear head, fitted in the same way to the same "
        f"{about['labelled']} labelled arid scenes. On {about['tested']} unseen ones mIoU is {before:.1f} before and "
        f"{after:.1f} after ({after - before:+.1f} points, one run): see for yourself how much that is."
    )
