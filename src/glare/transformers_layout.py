"""A ViT out of a foreign checkpoint as transformers has it: configuration, and tensors under the names it has on disk.

| tokens before the patches | blocks | class |
|---|---|---|
| none | plain | ``IJepaModel``, a ViT without class token |
| 1 | plain | ``ViTModel`` |
| 2 | plain | ``DeiTModel``: the second is its distillation token |
| 1 | layer scale, SwiGLU | ``Dinov2Model`` |
| more | any | ``Dinov2WithRegistersModel`` |

Names on disk are those that checkpoints on the Hub have; they have not changed since transformers 4, unlike the names
in memory. All of this is exact: a token without a position gets a position of zeros; a register's position, which no
interpolation changes, is added to the register; blocks without layer scale get one of ones.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    PreTrainedConfig,
    ViTConfig,
)

from glare.checkpoint_layouts import Architecture, ViTWeights
from glare.errors import UserError

EPS = 1e-6  # of the layer norms of all sources; transformers' default of 1e-12 gives other features
PLAIN = {0: (IJepaConfig, "IJepaModel"), 1: (ViTConfig, "ViTModel"), 2: (DeiTConfig, "DeiTModel")}
"""Number of tokens before the patches -> class of a ViT with plain blocks."""

PLAIN_BLOCK = {
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2_BLOCK = {"attn.proj": "attention.output.dense", "norm1": "norm1", "norm2": "norm2"}
DINOV2_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
DINOV2_SWIGLU = {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}

Named = Iterator[tuple[str, Tensor]]


def to_transformers(vit: ViTWeights) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Configuration and state dict, in the dtype of the file, no two tensors of one memory.

    Raises UserError for a ViT that no class of transformers computes.
    """
    shape, count = vit.architecture, vit.tokens.prefix.shape[1]
    plain = count in PLAIN and not shape.layer_scale and not shape.gated_mlp
    if not plain and not count:
        raise UserError("the ViT has layer scale or SwiGLU but no class token; transformers has no model of that kind")
    config = _plain_config(vit) if plain else _dinov2_config(vit)
    block = _plain_block if plain else _dinov2_block
    named = chain(
        _plain_tokens(vit) if plain else _dinov2_tokens(vit),
        _patch_embedding_and_norm(vit),
        *(block(vit.tensors, i, shape) for i in range(shape.depth)),
    )
    state = dict(named)
    dtype = state["layernorm.weight"].dtype
    for tensor in state.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    config.dtype = dtype
    # safetensors refuses tensors that share memory, as the thirds of qkv do
    return config, {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in state.items()}


def _common(vit: ViTWeights) -> dict[str, object]:
    shape = vit.architecture
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "image_size": vit.tokens.grid * shape.patch,
        "patch_size": shape.patch,
        "qkv_bias": shape.qkv_bias,
        "layer_norm_eps": EPS,
    }


def _plain_config(vit: ViTWeights) -> PreTrainedConfig:
    config_class, name = PLAIN[vit.tokens.prefix.shape[1]]
    return config_class(**_common(vit), intermediate_size=vit.architecture.mlp_width, architectures=[name])


def _dinov2_config(vit: ViTWeights) -> PreTrainedConfig:
    fields = {**_common(vit), "mlp_ratio": _mlp_ratio(vit.architecture), "use_swiglu_ffn": vit.architecture.gated_mlp}
    registers = vit.tokens.prefix.shape[1] - 1
    if registers:
        return Dinov2WithRegistersConfig(
            **fields, num_register_tokens=registers, architectures=["Dinov2WithRegistersModel"]
        )
    return Dinov2Config(**fields, use_mask_token="mask_token" in vit.tensors, architectures=["Dinov2Model"])


def _mlp_ratio(shape: Architecture) -> int:
    """The whole number from which DINOv2's configuration computes the width of the MLP."""
    for ratio in range(1, 17):
        width = shape.width * ratio
        if shape.gated_mlp:
            width = (int(width * 2 / 3) + 7) // 8 * 8  # as transformers rounds it
        if width == shape.mlp_width:
            return ratio
    raise UserError(
        f"the MLP is {shape.mlp_width} wide, which DINOv2 in transformers cannot have at a width of {shape.width}: it "
        "takes whole multiples, two thirds of them for SwiGLU"
    )


def _patch_embedding_and_norm(vit: ViTWeights) -> Named:
    for kind in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.projection.{kind}", vit.tensors[f"patch_embed.proj.{kind}"]
        yield f"layernorm.{kind}", vit.tensors[f"norm.{kind}"]


def _plain_tokens(vit: ViTWeights) -> Named:
    tokens = vit.tokens
    for place, name in enumerate(("cls_token", "distillation_token")[: tokens.prefix.shape[1]]):
        yield f"embeddings.{name}", tokens.prefix[:, place : place + 1]
    yield "embeddings.position_embeddings", torch.cat([tokens.prefix_positions, tokens.patch_positions], dim=1)


def _dinov2_tokens(vit: ViTWeights) -> Named:
    tokens = vit.tokens
    yield "embeddings.cls_token", tokens.prefix[:, :1]
    yield "embeddings.position_embeddings", torch.cat([tokens.prefix_positions[:, :1], tokens.patch_positions], dim=1)
    registers = (tokens.prefix + tokens.prefix_positions)[:, 1:]
    if registers.shape[1]:
        yield "embeddings.register_tokens", registers
    if "mask_token" in vit.tensors:
        yield "embeddings.mask_token", vit.tensors["mask_token"]
    elif registers.shape[1]:
        yield "embeddings.mask_token", torch.zeros_like(tokens.prefix[:, 0])  # that class always has one


def _attention(tensors: dict[str, Tensor], block: int, shape: Architecture) -> Named:
    ours, theirs = f"blocks.{block}.attn.qkv", f"encoder.layer.{block}.attention.attention"
    for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
        for name, third in zip(("query", "key", "value"), tensors[f"{ours}.{kind}"].chunk(3), strict=True):
            yield f"{theirs}.{name}.{kind}", third


def _renamed(tensors: dict[str, Tensor], block: int, names: dict[str, str]) -> Named:
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            yield f"encoder.layer.{block}.{theirs}.{kind}", tensors[f"blocks.{block}.{ours}.{kind}"]


def _plain_block(tensors: dict[str, Tensor], block: int, shape: Architecture) -> Named:
    yield from _attention(tensors, block, shape)
    yield from _renamed(tensors, block, PLAIN_BLOCK)


def _dinov2_block(tensors: dict[str, Tensor], block: int, shape: Architecture) -> Named:
    yield from _attention(tensors, block, shape)
    yield from _renamed(tensors, block, {**DINOV2_BLOCK, **(DINOV2_SWIGLU if shape.gated_mlp else DINOV2_MLP)})
    for number in (1, 2):
        ones = torch.ones_like(tensors[f"blocks.{block}.norm{number}.weight"])
        scale = tensors.get(f"blocks.{block}.ls{number}.gamma", ones)
        yield f"encoder.layer.{block}.layer_scale{number}.lambda1", scale
