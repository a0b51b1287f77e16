"""Which parameters decay, in every job."""

from collections.abc import Callable

from transformers import PreTrainedModel

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
