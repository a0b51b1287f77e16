"""Stochastic depth: which branches are left out, how often, and only in training."""

from typing import Any

import pytest
import torch
from tiny_models import adapted_model, tiny_vit
from torch import Tensor, nn

from glare.drop_path import drop_paths
from glare.uniadapter import unwrapped, vit_blocks


def branches(vit: nn.Module, images: Tensor) -> list[list[Tensor]]:
    """Attention and MLP output of every block, in one pass."""
    seen: list[list[Tensor]] = []
    hooks = []
    for block in vit_blocks(vit):
        pair: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any, pair: list[Tensor] = pair) -> None:
            pair.append(output[0] if isinstance(output, tuple) else output)

        hooks += [unwrapped(block).get_submodule(name).register_forward_hook(note) for name in ("attention", "mlp")]
        seen.append(pair)
    with torch.no_grad():
        vit(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_family_drops_in_training_alone(family: str, images: Tensor) -> None:
    model = adapted_model(tiny_vit(family))
    expected = model(images).last_hidden_state
    drop_paths(model, 0.9)
    assert torch.equal(model(images).last_hidden_state, expected)
    torch.manual_seed(0)
    dropped = model.train()(images).last_hidden_state
    assert not torch.allclose(dropped, expected)
    torch.manual_seed(0)
    assert torch.equal(model(images).last_hidden_state, dropped)
    assert not [name for name in model.state_dict() if "drop" in name]


def test_a_branch_is_left_out_more_often_the_deeper_it_lies_and_keeps_its_mean() -> None:
    vit = tiny_vit().train()
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(2000, -1, -1, -1)
    drop_paths(vit, 0.6)
    torch.manual_seed(0)
    found = branches(vit, images)
    rates = [[(branch == 0).flatten(1).all(dim=1).float().mean().item() for branch in pair] for pair in found]
    for pair, expected in zip(rates, (0.0, 0.3, 0.6), strict=True):
        assert pair == pytest.approx([expected, expected], abs=0.04)
    # the first block leaves nothing out, so that in the second all images are still alike
    attention = found[1][0]
    kept = attention[(attention != 0).flatten(1).any(dim=1)]
    plain = branches(vit.eval(), images[:1])[1][0]
    torch.testing.assert_close(kept, (plain / 0.7).expand_as(kept), rtol=1e-4, atol=1e-5)


def test_no_rate_changes_nothing() -> None:
    vit, images = tiny_vit().train(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = vit(images).last_hidden_state
    drop_paths(vit, 0.0)
    assert torch.equal(vit(images).last_hidden_state, expected)
