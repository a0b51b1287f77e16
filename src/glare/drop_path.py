"""Stochastic depth (Huang et al. 2016) for the ViTs of transformers, most of which have none of their own.

In training, each residual branch, attention or MLP with the adapters in it, is left out for an image with a probability
that grows from 0 at the first block to the rate at the last, and counts for more where it is kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glare.uniadapter import unwrapped, vit_blocks


def drop_paths(vit: nn.Module, rate: float) -> None:
    """Add stochastic depth to a ViT; nothing of it is in its configuration or weights. ``rate`` in [0, 1)."""
    blocks = vit_blocks(vit)
    for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        if probability:
            for name in ("attention", "mlp"):
                unwrapped(block).get_submodule(name).register_forward_hook(_dropping(probability))


def _dropping(probability: float) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook for modules that return a branch (images, tokens, d), or a tuple that begins with it."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (_drop(output[0], probability), *output[1:])
        return _drop(output, probability)

    return hook


def _drop(branch: Tensor, probability: float) -> Tensor:
    kept = torch.rand(len(branch), device=branch.device) >= probability
    return branch * (kept / (1 - probability)).to(branch.dtype).view(-1, 1, 1)
