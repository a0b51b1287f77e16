"""The pictures of a comparison: where pixels were gained and lost, what the features and the attention look like."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glare.comparison_probes import Subject
from glare.features import encode, use_packed_attention
from glare.frozen_features import PatchFeatures, by_image
from glare.modeling_glare import GlareModel
from glare.pictures import attention_picture, change_picture, pca_picture
from glare.report import Picture
from glare.views import Normalisation

CHANGED = 3  # images that gained most, and as many that lost most
ATTENDED = 2


@dataclass(frozen=True)
class Side:
    """The untouched or an adapted model: ``features`` of all images of the subject, ``predict`` gives class indices
    (h, w) for some of them.
    """

    name: str
    model: GlareModel
    features: PatchFeatures
    predict: Callable[[Sequence[int]], list[NDArray[np.uint8]]]


def draw(
    subject: Subject,
    before: Side,
    after: Side,
    gains: Tensor,
    *,
    normalise: Normalisation,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Picture]:
    """All pictures; ``gains`` (tested images,): share of right pixels after, minus before."""
    order = gains.argsort(descending=True).tolist()
    gained = [subject.tested[place] for place in order[:CHANGED] if gains[place] > 0]
    lost = [subject.tested[place] for place in order[::-1][:CHANGED] if gains[place] < 0]
    shown = [*gained, *lost] or subject.tested[:CHANGED]
    with autocast():
        pictures = [
            *_changes(subject, before, after, gained, "gained"),
            *_changes(subject, before, after, lost, "lost"),
        ]
        attention = [_attention(subject, before, after, image, normalise) for image in shown[:ATTENDED]]
    maps = [[_feature_map(side.features, image) for image in shown] for side in (before, after)]
    names = [_name(subject, image) for image in shown]
    pca = Picture(
        f"Patch features, untouched and {after.name}",
        "First three principal components of both models' patch features together, as red, green and blue.",
        pca_picture([subject.picture(image) for image in shown], *maps, names=names),
        "pca",
    )
    return [*pictures, pca, *attention]


def _changes(subject: Subject, before: Side, after: Side, images: Sequence[int], section: str) -> list[Picture]:
    data = subject.pool.data
    if not images:
        return []
    pairs = zip(before.predict(images), after.predict(images), strict=True)
    return [
        Picture(
            _name(subject, image),
            f"Untouched against {after.name}.",
            change_picture(subject.picture(image), subject.labels.maps[image], *pair, data.classes, data.palette),
            section,
        )
        for image, pair in zip(images, pairs, strict=True)
    ]


@torch.no_grad()
def _attention(subject: Subject, before: Side, after: Side, image: int, normalise: Normalisation) -> Picture:
    pixels = subject.images[image]
    maps = []
    for model in (before.model, after.model):
        use_packed_attention(model.backbone)
        views = normalise(pixels.to(model.device).float().div(255))[None, None]
        attention = encode(model.backbone, [views], attention=True)[0].attention
        model.backbone.set_attn_implementation("sdpa")
        assert attention is not None
        maps.append(attention[0, 0].unflatten(1, model.grid_size(pixels)).float().cpu())
    return Picture(
        _name(subject, image),
        f"What the class token attends to in the last block, by head; untouched above {after.name}.",
        attention_picture(subject.picture(image), *maps),
        "attention",
    )


def _feature_map(features: PatchFeatures, image: int) -> Tensor:
    """Patch features (rows, columns, d) of one image."""
    rows = by_image(features.features, features.grids)[image]
    grid: Tensor = rows.float().unflatten(0, features.grids[image])
    return grid


def _name(subject: Subject, image: int) -> str:
    return subject.pool.data.name(image)
