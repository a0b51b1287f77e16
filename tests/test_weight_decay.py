"""Which parameters decay, in every job."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from glare import UserError
from glare.runtime import optimizer_tensors, restore_optimizer
from glare.weight_decay import parameter_groups

MakeVit = Callable[..., PreTrainedModel]


def test_biases_norms_tokens_and_positions_do_not_decay(make_vit: MakeVit) -> None:
    model = make_vit()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, kept = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(decaying["params"]) + len(kept["params"]) == len(names)
    for parameter in decaying["params"]:
        assert names[id(parameter)].endswith("weight") and parameter.ndim > 1
    kept_names = {names[id(parameter)] for parameter in kept["params"]}
    assert {"embeddings.cls_token", "embeddings.position_embeddings"} <= kept_names


def test_an_optimizer_of_another_order_is_refused(make_vit: MakeVit) -> None:
    model = make_vit()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    groups = parameter_groups(model, 0.1)
    first, other = (torch.optim.AdamW(order) for order in (groups, groups[::-1]))
    first.step()
    restore_optimizer(torch.optim.AdamW(parameter_groups(model, 0.1)), optimizer_tensors(first))
    with pytest.raises(UserError, match="the checkpoint has the optimizer of other parameters"):
        restore_optimizer(other, optimizer_tensors(first))
    with pytest.raises(UserError, match="the checkpoint has the optimizer of other parameters"):
        restore_optimizer(torch.optim.AdamW([groups[0]["params"][0]]), optimizer_tensors(first))
