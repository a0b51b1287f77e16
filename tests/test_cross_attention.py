import math

import pytest
import torch
from reference import glare_terms as literal
from reference.glare_cases import DIM, randomise
from torch import nn

from glare.objectives.glare import CrossAttention


def attention_module(heads: int = 2, dim: int = DIM) -> CrossAttention:
    made = CrossAttention(dim, heads)
    randomise(made, 3)
    return made


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (2, 8), (4, 16), (6, 24)])
def test_cross_attention_is_equation_5(heads: int, dim: int):
    made, generator = attention_module(heads, dim), torch.Generator().manual_seed(0)
    query, context = (torch.randn(3, size, dim, generator=generator) for size in (4, 7))
    valid = torch.rand(3, 7, generator=generator) < 0.5
    valid[:, 2] = True
    parameters = {f"cross_attention.{name}": value for name, value in made.state_dict().items()}
    for mask in (None, valid):
        found = made(query, context) if mask is None else made(query, context, mask)
        assert found.shape == query.shape
        for image in range(3):
            keys = [c for k, c in enumerate(context[image]) if mask is None or mask[image, k]]
            for number in range(4):
                expected = literal.cross_attention(query[image, number], keys, parameters, heads)
                torch.testing.assert_close(found[image, number].double(), expected, atol=1e-5, rtol=1e-4)


def test_cross_attention_of_nothing_is_finite():
    made, query = attention_module(), torch.randn(2, 3, DIM)
    result = made(query, torch.randn(2, 5, DIM), torch.zeros(2, 5, dtype=torch.bool))
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_cross_attention_starts_as_two_norms():
    made, query = CrossAttention(DIM, 2), torch.randn(2, 3, DIM)
    found = made(query, torch.randn(2, 5, DIM))
    norm = nn.LayerNorm(DIM, eps=1e-6)
    torch.testing.assert_close(found, norm(norm(query)))
    assert made.qkv.weight.std() > 0


def test_cross_attention_has_udis_parameters():
    names = {name: tuple(p.shape) for name, p in CrossAttention(384, 6).state_dict().items()}
    assert names == {
        "norm1.weight": (384,),
        "norm1.bias": (384,),
        "qkv.weight": (1152, 384),
        "qkv.bias": (1152,),
        "proj.weight": (384, 384),
        "proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    assert sum(math.prod(size) for size in names.values()) == 592_896
