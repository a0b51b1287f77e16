"""Simulated tests of segmentation models of which the true mean IoU is known: images and seeds have effects.

Whether a pixel is right depends on its class, on how difficult its image is for everybody, on what this model makes of
the image, on the seed, and on what this seed makes of the image. Classes are frequent in some images and absent from
others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FREQUENCY = (0.40, 0.28, 0.18, 0.10, 0.04)
LOGIT = torch.tensor([1.8, 1.4, 1.0, 0.6, 0.2])
PIXELS = 4000
DIFFICULTY, TASTE, NOISE = 0.8, 0.5, 0.2


@dataclass(frozen=True)
class Effects:
    """Standard deviations on the logit scale: of seeds, and of seeds by image."""

    seed: float = 0.0
    interaction: float = 0.0


class Images:
    """Test images: pixels labelled with each class (n, simulations, k), and their difficulty."""

    def __init__(self, num_images: int, simulations: int, *, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        shape = torch.tensor(FREQUENCY).expand(num_images, simulations, -1) * len(FREQUENCY)
        shares = np.random.default_rng(seed).standard_gamma(shape.numpy())
        self.labelled = (torch.from_numpy(shares / shares.sum(-1, keepdims=True)) * PIXELS).floor()
        self.difficulty = DIFFICULTY * self.normal(num_images, simulations, 1)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def areas(self, seeds: int, effects: Effects, *, gain: float = 0.0) -> Tensor:
        """A model that is better by ``gain`` on the logit scale: areas (seeds, n, simulations, 3, k)."""
        n, simulations, k = self.labelled.shape
        taste = TASTE * self.normal(n, simulations, 1)
        of_seed = effects.seed * self.normal(seeds, 1, simulations, 1)
        crossed = effects.interaction * self.normal(seeds, n, simulations, 1)
        noise = NOISE * self.normal(seeds, n, simulations, k)
        return self._areas((LOGIT + gain + self.difficulty + taste + of_seed + crossed + noise).sigmoid())

    def _areas(self, accuracy: Tensor) -> Tensor:
        """Wrong pixels go to the next class and, half of them, to the one before."""
        labelled = self.labelled.expand_as(accuracy)
        intersect = (labelled * accuracy).floor()
        wrong = labelled - intersect
        forward = (wrong / 2).floor()
        predicted = intersect + forward.roll(1, dims=-1) + (wrong - forward).roll(-1, dims=-1)
        return torch.stack((intersect, labelled, predicted), dim=-2).double()


def true_mean_iou(effects: Effects, *, gain: float = 0.0) -> float:
    """Mean IoU over all images there are, and over all seeds: 31 equally likely seeds on 20,000 images."""
    images = Images(20_000, 1, seed=2**31)
    # the interaction is new in every image, so on one image each it is part of the taste
    taste = (TASTE**2 + effects.interaction**2 + NOISE**2) ** 0.5 * images.normal(20_000, 1, 1)
    quantiles = torch.special.ndtri((torch.arange(31) + 0.5) / 31) if effects.seed else torch.zeros(1)
    found = []
    for quantile in quantiles.tolist():
        logit = LOGIT + gain + images.difficulty + taste + effects.seed * quantile
        intersect, labelled, predicted = images._areas(logit[None].sigmoid()).sum(dim=1)[0, 0]
        found.append((intersect / (labelled + predicted - intersect)).mean().item())
    return sum(found) / len(found)
