"""Small random features and labels of images of several sizes, for the tests of the probes."""

import torch

from glare.frozen_features import PatchFeatures, PatchLabels, class_shares

PATCH, CLASSES, DIM = 4, 3, 6
GRIDS = [(2, 3), (3, 2), (2, 2), (3, 3), (1, 4), (2, 3), (2, 4)]
IGNORED = 255


def sample(*, seed: int = 0, signal: float = 1.0) -> tuple[PatchFeatures, PatchLabels]:
    """Features that carry the class of their patch, with noise, far from the origin; some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = 3 * torch.randn(CLASSES, DIM, generator=generator)
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1])
    features, shares, maps = [], [], []
    for rows, columns in GRIDS:
        label = torch.randint(0, CLASSES, (rows, columns), generator=generator)
        pixels = label.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        other = torch.randint(0, CLASSES + 1, pixels.shape, generator=generator)
        mixed = torch.where(torch.rand(pixels.shape, generator=generator) < 0.3, other, pixels)
        pixels = torch.where(mixed == CLASSES, IGNORED, mixed).to(torch.uint8).numpy()
        noise = torch.randn(rows * columns, DIM, generator=generator)
        features.append((signal * prototypes[label.flatten()] + noise) * scale + 5)
        shares.append(class_shares(pixels, patch=PATCH, num_classes=CLASSES))
        maps.append(pixels)
    cls = torch.zeros(len(GRIDS), DIM)
    return PatchFeatures(torch.cat(features), cls, list(GRIDS)), PatchLabels(torch.cat(shares), maps)


def relabelled(labels: PatchLabels, image: int, value: int) -> PatchLabels:
    """The same labels, but all pixels of one image have ``value``."""
    maps = [label.copy() for label in labels.maps]
    maps[image][:] = value
    shares = [class_shares(label, patch=PATCH, num_classes=labels.shares.shape[1]) for label in maps]
    return PatchLabels(torch.cat(shares), maps)
