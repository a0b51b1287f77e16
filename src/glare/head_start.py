"""A fresh projection head fitted to the images before the first step, for runs too short to learn one.

A head drawn at random maps all tokens to nearly the same place, so that for the first dozens of steps the teacher's
targets say next to nothing about the image. Here the bottleneck is whitened on the first images (mean zero, the same
variance in all directions, as in data-dependent initialisations; Krähenbühl et al. 2016), and the centres begin at the
mean logits of these images instead of zero.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glare.crops import PackedImages, subset
from glare.draws import Draws
from glare.gram import eigh, gram
from glare.objectives.base import ProjectionHead
from glare.pretrain_plan import Plan
from glare.runtime import seeded
from glare.student import Student
from glare.views import Normalisation, Views, make_views

IMAGES = 32
FLOOR = 0.01  # of the mean variance, added to that of each direction
EPS = 1e-12  # variance, for rows that are all the same


def fit_head(
    student: Student,
    images: PackedImages,
    recipe: Any,
    accelerator: Accelerator,
    *,
    patch_size: int,
    normalise: Normalisation,
) -> None:
    """Fit the fresh head to the first of ``images``, the same on every process, by a resolved recipe."""
    index = torch.arange(min(len(images), IMAGES))
    first, draws = subset(images, index).to(accelerator.device), Draws(seeded(recipe.seed, 0), len(index))
    views = make_views(first, index, recipe.views, patch_size=patch_size, normalise=normalise, draws=draws)
    with accelerator.autocast():
        start_head(student, views, temperature=Plan.of(recipe).temperature_at(0), draws=draws)


@torch.no_grad()
def start_head(student: Student, views: Views, *, temperature: float, draws: Draws) -> None:
    """Whiten the head's bottleneck on the tokens of clean global views and set the centres to the mean logits.

    Args:
        student: a backbone with a fresh objective, before the teacher is made from it.
        views: of the first images.
        temperature: of the teacher at the first step.
        draws: of these images, for the objective.
    """
    head = student.objective.head
    assert head is not None
    features = student.target_features(views)
    whiten(head, torch.cat([features.patches.flatten(0, 2), features.cls.flatten(0, 1)]))
    places = student.objective.places(features, views, draws)
    terms = student(views, features, places, counts=places.counts(), target=student, temperature=temperature)
    student.objective.update(terms.batch_sums, momentum=0.0)


@torch.no_grad()
def whiten(head: ProjectionHead, rows: Tensor) -> None:
    """Change the last layer of the head's MLP so that its output over ``rows`` (n, dim) is white.

    Autocast is left out: what it has cast of a layer it would use again, after the layer has changed.
    """
    with torch.autocast(rows.device.type, enabled=False):
        output = head.mlp(rows.float()).cpu().double()  # not every GPU has float64
    mean = output.mean(dim=0)
    values, vectors = eigh(gram([output - mean]) / len(output))
    scale = (values + FLOOR * values.mean() + EPS).rsqrt()
    transform = (vectors * scale) @ vectors.T
    last = head.mlp[-1]
    assert isinstance(last, nn.Linear)
    last.weight.copy_(transform @ last.weight.cpu().double())
    last.bias.copy_(transform @ (last.bias.cpu().double() - mean))
