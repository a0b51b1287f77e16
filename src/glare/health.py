"""Whether a model's patch features are still alive, without labels: a probe alone may not notice a collapse."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glare.comparison import Health
from glare.gram import eigh, gram

COLLAPSED = 0.5  # of the untouched model's value
ROWS = 2048  # that are held in a wider type at once


def rankme(features: Tensor) -> float:
    """Effective rank of features (n, d), from 1 to min(n, d): RankMe, Garrido et al. 2023, eq. 1.

    The exponential of the entropy of the singular values over their sum; they are the square roots of the
    eigenvalues of the Gram matrix. Features are not centred.
    """
    values, _ = eigh(gram(features.split(ROWS)))
    singular = values.sqrt().flip(0)[: min(features.shape)]
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny) + 1e-7
    return math.exp(-(share * share.log()).sum().item())


def feature_std(features: Tensor) -> float:
    """Standard deviation over patches of features (n, d), mean over the dimensions."""
    parts = [columns.float().std(dim=0, correction=0) for columns in features.split(64, dim=1)]
    return torch.cat(parts).mean().item()


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the features of ``a`` and ``b``, both (..., d); ValueError where their shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"features have shapes {tuple(a.shape)} and {tuple(b.shape)}; they must be equal")
    pairs = zip(*(features.flatten(0, -2).split(ROWS) for features in (a, b)), strict=True)
    return torch.cat([F.cosine_similarity(x.float(), y.float(), dim=1) for x, y in pairs]).mean().item()


def collapse(ours: Health, untouched: Health, *, share: float = COLLAPSED) -> str | None:
    """Why features have collapsed, in words: effective rank or deviation below ``share`` of the untouched model's."""
    limit = "half" if share == COLLAPSED else f"{share:.0%}"
    for name, value, reference in (
        ("effective rank", ours.rankme, untouched.rankme),
        ("standard deviation", ours.std, untouched.std),
    ):
        if not value >= share * reference:  # also where it is not a number
            return (
                f"the {name} of its patch features is {value:.3g}, "
                f"less than {limit} of the untouched model's {reference:.3g}"
            )
    return None
