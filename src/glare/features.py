"""One encoder's view of a batch: global and local crops in one packed pass, with the attention of the last block.

Crops of different sizes are embedded apart, laid end to end as one sequence, and go through all linear layers
together; only the attention splits them again. That needs no fork of a model: every ViT of transformers passes
its keyword arguments down to the attention function, which is registered here as ``glare_packed``. Called without
a packing (any ordinary forward pass) that function is SDPA.

What the [CLS] token attends to in the last block is computed from that block's query and keys, for the one row
needed, instead of asking all blocks for their attention maps. A ViT without class token (FLSL, I-JEPA) has the mean of
its patches in place of [CLS], and in place of its row what a patch receives from all patches on average.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from glare.modeling_glare import final_norm, vit_blocks

ATTENTION = "glare_packed"


@dataclass(frozen=True)
class Features:
    """Features of v views of b images after the final norm.

    ``cls`` (v, b, d); ``patches`` (v, b, n, d), row-major; ``attention`` (v, b, heads, n): softmax of the last
    block's [CLS] query over all tokens, columns of prefix tokens removed, or None where not asked for. Without class
    token: mean of the patches, and mean over the queries of all patches.
    """

    cls: Tensor
    patches: Tensor
    attention: Tensor | None = None

    def of(self, images: slice) -> Self:
        """The features of some of the images."""
        attention = None if self.attention is None else self.attention[:, images]
        return type(self)(self.cls[:, images], self.patches[:, images], attention)


@dataclass
class _Packing:
    """How a packed sequence splits, (images, tokens) of each group, and the attention of ``queries`` to record."""

    groups: list[tuple[int, int]]
    queries: slice
    record: bool = False
    attention: Tensor | None = None


def encode(
    model: PreTrainedModel,
    views: Sequence[Tensor],
    *,
    attention: bool = False,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> list[Features]:
    """Features of several groups of views, each group of one size, in one pass.

    Args:
        model: a ViT of transformers prepared by ``use_packed_attention``.
        views: tensors (v, b, 3, h, w), sides divisible by the patch size; groups may be empty (v = 0).
        attention: whether the first group's ``Features.attention`` is wanted.
        mask: (v, b, n) bool for the first group: patches whose embedding is replaced by ``mask_token`` (d,).
        mask_token: see ``mask``.
    """
    embedded = []
    for number, group in enumerate(views):
        token = mask_token if number == 0 and mask is not None else None
        with _mask_token(model, token, mask.flatten(0, 1) if mask is not None else None):
            embedded.append(_embed(model, group.flatten(0, 1)))
    has_prefix = embedded[0].shape[1] > _num_patches(model, views[0])
    packing = _Packing(
        [(len(tokens), tokens.shape[1]) for tokens in embedded], queries=slice(1) if has_prefix else slice(None)
    )
    rotary = _rotary(model, [group.flatten(0, 1) for group in views], packing)
    hidden = torch.cat([tokens.flatten(0, 1) for tokens in embedded]).unsqueeze(0)
    *blocks, last = vit_blocks(model)
    for block in blocks:
        hidden = block(hidden, packing=packing, **rotary)
    packing.record = attention
    hidden = last(hidden, packing=packing, **rotary)
    split = final_norm(model)(hidden).squeeze(0).split([images * tokens for images, tokens in packing.groups])
    return [
        _features(
            rows.view(*group.shape[:2], tokens, rows.shape[-1]),
            patches=_num_patches(model, group),
            attention=packing.attention if n == 0 else None,
        )
        for n, (rows, group, (_, tokens)) in enumerate(zip(split, views, packing.groups, strict=True))
    ]


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let ``encode`` pack crops of several sizes; ordinary forward passes go on as under SDPA."""
    model.set_attn_implementation(ATTENTION)


def _features(tokens: Tensor, *, patches: int, attention: Tensor | None) -> Features:
    """``tokens`` (v, b, prefix + patches, d), ``attention`` (v * b, heads, prefix + patches)."""
    if attention is not None:
        attention = attention[..., -patches:].unflatten(0, tokens.shape[:2])
    cls = tokens[:, :, 0] if tokens.shape[2] > patches else tokens.mean(dim=2)
    return Features(cls=cls, patches=tokens[:, :, -patches:], attention=attention)


def _num_patches(model: PreTrainedModel, group: Tensor) -> int:
    side: int = model.config.patch_size
    return (group.shape[-2] // side) * (group.shape[-1] // side)


def _embed(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Images (n, 3, h, w) -> tokens (n, prefix + patches, d) with their positions added where the model adds them."""
    embeddings = model.embeddings
    if "interpolate_pos_encoding" in inspect.signature(embeddings.forward).parameters:
        tokens: Tensor = embeddings(images, interpolate_pos_encoding=True)
    else:
        tokens = embeddings(images)
    return tokens


def _rotary(model: PreTrainedModel, groups: Sequence[Tensor], packing: "_Packing") -> dict[str, Any]:
    """Rotary embeddings of the packed sequence for models that have them; prefix tokens are turned by nothing."""
    if not hasattr(model, "rope_embeddings"):
        return {}
    packed: tuple[list[Tensor], list[Tensor]] = ([], [])
    for images, (count, tokens) in zip(groups, packing.groups, strict=True):
        for values, parts, still in zip(model.rope_embeddings(images), packed, (1.0, 0.0), strict=True):
            prefix = values.new_full((tokens - len(values), values.shape[1]), still)
            parts.append(torch.cat([prefix, values]).repeat(count, 1))
    return {"position_embeddings": (torch.cat(packed[0]), torch.cat(packed[1]))}


@contextmanager
def _mask_token(model: PreTrainedModel, token: Tensor | None, mask: Tensor | None) -> Iterator[None]:
    """While open, the patch embedding gives ``token`` (d,) at the patches of ``mask`` (n, patches)."""
    if token is None or mask is None:
        yield
        return

    def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if output.ndim == 4:  # DINOv3 embeds with a bare convolution: (n, d, rows, columns)
            return torch.where(mask.view(len(output), 1, *output.shape[2:]), token.view(-1, 1, 1).to(output), output)
        return torch.where(mask.unsqueeze(-1), token.to(output), output)

    hook = model.embeddings.patch_embeddings.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: "_Packing | None" = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each image of a packed sequence: query, key, value (1, heads, all tokens, head_dim)."""
    if packing is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    lengths = [images * tokens for images, tokens in packing.groups]
    outputs = []
    for number, parts in enumerate(zip(*(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True)):
        q, k, v = (x.unflatten(1, packing.groups[number]).transpose(0, 1) for x in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (images * tokens, heads, head_dim)
        if number == 0 and packing.record:
            logits = (q[:, :, packing.queries].float() * (scaling or q.shape[-1] ** -0.5)) @ k.float().transpose(-1, -2)
            packing.attention = logits.softmax(dim=-1).mean(dim=2)
    return torch.cat(outputs).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _packed_attention)
