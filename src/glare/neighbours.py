"""The probes ``knn`` and ``whitened knn``: patches are labelled by their nearest training patches.

As in DINO (Caron et al. 2021): 20 neighbours by cosine similarity s, with votes weighted by exp(s / 0.07). A
neighbour votes for each class with the share of its pixels. Whitening, by the principal components of the fold's
training patches, takes away that a few directions of large variance decide alone what is near.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glare.frozen_features import PatchFeatures, PatchLabels, by_image, check_folds, counts_of
from glare.gram import eigh, gram
from glare.runtime import seeded
from glare.splits import Fold

NEIGHBOURS = 20
TEMPERATURE = 0.07
MEMORY_PATCHES = 5_000
EPS = 0.1  # of the mean eigenvalue, added to each before whitening
QUERIES = 1024  # whose similarities to the memory are held at once


def knn_counts(
    features: PatchFeatures, labels: PatchLabels, folds: Sequence[Fold], *, whiten: bool, seed: int
) -> Tensor:
    """Confusion of the pixels of every test image, (images, k, k) int64, zero for others; see ``knn_scores``."""
    return counts_of(knn_scores(features, labels, folds, whiten=whiten, seed=seed), features.grids, labels)


def knn_scores(
    features: PatchFeatures, labels: PatchLabels, folds: Sequence[Fold], *, whiten: bool, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Votes for the classes of every test image of its neighbours in the training part of its fold.

    Args:
        features: of all images.
        labels: of the same images; those of test images are not looked at.
        folds: no image is tested twice.
        whiten: whether to whiten the features first.
        seed: of the draw of training patches, which does not depend on the features.

    Yields:
        Index of a test image, and the votes (patches, k) for each of its patches.

    Raises:
        UserError: the training part of a fold has no labelled pixel.
    """
    patches, shares = by_image(features.features, features.grids), by_image(labels.shares, features.grids)
    check_folds(shares, folds)
    rows = by_image(torch.arange(len(labels.shares)), features.grids)
    whole = gram(map(_with_one, patches)) if whiten else None
    for number, fold in enumerate(folds):
        embed: Callable[[Tensor], Tensor] = _unit
        if whole is not None:
            rest = set(range(len(patches))).difference(fold.train)
            embed = whitening(whole - gram(_with_one(patches[i]) for i in rest))
        drawn = draw(
            [rows[i][shares[i].any(dim=1)] for i in fold.train], limit=MEMORY_PATCHES, generator=seeded(seed, number)
        )
        memory, classes = embed(features.features[drawn]), labels.shares[drawn]
        for image in fold.test:
            yield image, torch.cat([vote(embed(part), memory, classes) for part in patches[image].split(QUERIES)])


def draw(rows: Sequence[Tensor], *, limit: int, generator: torch.Generator) -> Tensor:
    """At most ``limit`` of the rows (n,) of each image, (drawn,): the same number of each that has as many."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    shuffled = [rows[i][torch.randperm(len(rows[i]), generator=generator)] for i in order]
    turn = torch.cat([torch.arange(len(image)) for image in shuffled])
    return torch.cat(shuffled)[turn.argsort(stable=True)[:limit]]


def vote(queries: Tensor, memory: Tensor, classes: Tensor) -> Tensor:
    """Share of the votes of each query's neighbours for each class.

    Args:
        queries: (n, d), of length 1.
        memory: (m, d), of length 1.
        classes: (m, k), shares of the pixels of the patches in memory.

    Returns:
        (n, k).
    """
    similarity, nearest = (queries @ memory.T).topk(min(NEIGHBOURS, len(memory)), dim=1)
    weight = (similarity / TEMPERATURE).softmax(dim=1)
    return torch.einsum("nj,njk->nk", weight, classes[nearest])


def whitening(moments: Tensor) -> Callable[[Tensor], Tensor]:
    """The map from features (n, d) to whitened ones of length 1 (n, d).

    Args:
        moments: Gram matrix (1 + d, 1 + d) of rows [1, x].
    """
    mean = moments[1:, 0] / moments[0, 0]
    values, vectors = eigh(moments[1:, 1:] / moments[0, 0] - torch.outer(mean, mean))
    scale = (values / values.mean().clamp(min=torch.finfo(values.dtype).tiny) + EPS).rsqrt()
    centre, transform = mean.float(), (vectors * scale).float()
    return lambda patches: F.normalize((patches.float() - centre) @ transform, dim=1)


def _unit(patches: Tensor) -> Tensor:
    return F.normalize(patches.float(), dim=1)


def _with_one(patches: Tensor) -> Tensor:
    return F.pad(patches.double(), (1, 0), value=1.0)
