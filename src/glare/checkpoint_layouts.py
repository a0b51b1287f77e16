"""ViT checkpoints of DINO, iBOT, UDI, FLSL, DINOv2 and timm: which tensor is what, by names and shapes.

All descend from one implementation and share its names: ``patch_embed.proj``, ``pos_embed``, ``blocks.i.attn.qkv`` and
so on. They differ in the tokens before the patches, in the MLP, and in what else is in a file:

* DINO, iBOT: one class token; heads; iBOT's student has a mask token.
* UDI: two class tokens, each with its position. Its wrapper holds a region attention and a norm, whose keys ``attn.*``
  and ``norm1.*`` are those of a block but for the ``blocks.i.`` before them.
* FLSL: no class token, although an unused ``cls_token`` is in the file; positions are those of the patches alone.
* DINOv2: layer scale, a mask token, registers without positions, SwiGLU in the giant model; training files number
  their blocks ``blocks.chunk.i``.
* timm: registers with positions, or no positions for any token before the patches (``no_embed_class``); SwiGLU
  as ``fc1`` of twice the width.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glare.checkpoint_keys import ANCHOR, SOURCES, TOKENS, SortedKeys, Source, complaint, sort_keys, vit_prefix
from glare.errors import UserError

HEAD_WIDTH = 64  # of every ViT of these repositories
FIRST_MLP = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")


@dataclass(frozen=True)
class Architecture:
    """What the shapes say of the blocks, and the number of heads, which they do not."""

    width: int
    depth: int
    heads: int
    patch: int
    mlp_width: int
    qkv_bias: bool
    layer_scale: bool
    gated_mlp: bool


@dataclass(frozen=True)
class Tokens:
    """``prefix`` (1, k, d), what stands before the patches; ``prefix_positions``, zero for a token without one;
    ``patch_positions`` (1, n, d), n a square.
    """

    prefix: Tensor
    prefix_positions: Tensor
    patch_positions: Tensor

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return math.isqrt(self.patch_positions.shape[1])


@dataclass(frozen=True)
class ViTWeights:
    """A ViT out of a foreign file.

    ``tensors``: patch embedding, blocks, final norm and, where there is one, mask token (1, d), under the names used
    here; ``region_attention``: UDI's, by the names of ``CrossAttention``, or empty; ``used``, ``left_out``: keys of the
    file.
    """

    architecture: Architecture
    tokens: Tokens
    tensors: dict[str, Tensor]
    region_attention: dict[str, Tensor]
    used: list[str]
    left_out: list[str]


def read_vit(content: Mapping[str, Any], source: str, *, role: str | None, num_heads: int | None) -> ViTWeights:
    """The ViT in a table of tensors.

    Args:
        content: keys and tensors of a file.
        source: one of ``SOURCES``.
        role: whose weights, where the table itself holds both: ``teacher``, which None means, too, or ``student``.
        num_heads: of the attention; width / 64 where None.

    Raises UserError, with the keys, for anything missing, unknown or of another shape than the rest says.
    """
    layout = SOURCES[source]
    keys = sort_keys(content, layout, prefix=vit_prefix(content, role))
    tensors = _with_gate({name: content[key] for name, key in keys.vit.items()}, layout)
    region = {name: content[key] for name, key in keys.region.items()}
    _check_anchors(tensors, keys, source)
    architecture = _architecture(tensors, layout, num_heads)
    _check(tensors, _expected(architecture, tensors, layout), keys.vit, keys, source)
    if region:
        _check(region, _expected_region(architecture.width), keys.region, keys, source)
    tokens = _tokens(tensors, layout)
    unused = {"cls_token"} & tensors.keys() if layout.class_token_unused and not tokens.prefix.shape[1] else set()
    return ViTWeights(
        architecture,
        tokens,
        tensors,
        region,
        used=[key for name, key in keys.vit.items() if name not in unused] + list(keys.region.values()),
        left_out=[keys.vit[name] for name in unused] + keys.left_out,
    )


def _with_gate(tensors: dict[str, Tensor], layout: Source) -> dict[str, Tensor]:
    """timm's SwiGLU, ``fc1`` with the gate above the value, under DINOv2's names."""
    first, second = (tuple(tensors[name].shape) if name in tensors else () for name in FIRST_MLP)
    if "gated_mlp" not in layout.optional or len(first) != 2 or len(second) != 2 or first[0] != 2 * second[1]:
        return tensors
    return {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): x for name, x in tensors.items()}


def _is_gated(tensors: Mapping[str, Tensor], layout: Source) -> bool:
    return "gated_mlp" in layout.optional and "blocks.0.mlp.w3.weight" in tensors


def _check_anchors(tensors: Mapping[str, Tensor], keys: SortedKeys, source: str) -> None:
    """Raise UserError where a tensor from which the architecture is read is missing, or has other dimensions."""
    last = "w3" if _is_gated(tensors, SOURCES[source]) else "fc2"
    anchors = {ANCHOR: 4, "pos_embed": 3, f"blocks.0.mlp.{last}.weight": 2}
    missing = [keys.prefix + name for name in anchors if name not in tensors]
    wrong = [
        f"{keys.vit.get(name, name)} is {tuple(tensors[name].shape)}, expected {count} dimensions"
        for name, count in {**anchors, **dict.fromkeys(TOKENS, 3)}.items()
        if name in tensors and tensors[name].ndim != count
    ]
    if missing or wrong:
        raise UserError(complaint(source, missing=missing, unknown=keys.unknown, wrong=wrong))


def _architecture(tensors: Mapping[str, Tensor], layout: Source, num_heads: int | None) -> Architecture:
    """Raises UserError where the heads do not divide the width or the images are not RGB."""
    width, channels, patch, _ = tensors[ANCHOR].shape
    if channels != 3:
        raise UserError(f"the ViT reads images of {channels} channels; only those of RGB images (3) are supported")
    heads = num_heads or width // HEAD_WIDTH
    if num_heads is None and width % HEAD_WIDTH:
        raise UserError(f"the width {width} is no multiple of {HEAD_WIDTH}; say how many heads it has with --num-heads")
    if width % heads:
        raise UserError(f"num_heads is {heads}; it has to divide the width {width}")
    gated = _is_gated(tensors, layout)
    return Architecture(
        width=width,
        depth=len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)}),
        heads=heads,
        patch=patch,
        mlp_width=tensors[f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"].shape[1],
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        layer_scale="layer_scale" in layout.optional and "blocks.0.ls1.gamma" in tensors,
        gated_mlp=gated,
    )


def _expected(vit: Architecture, tensors: Mapping[str, Tensor], layout: Source) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors; a token that a source may have is expected where it is."""
    d, hidden = vit.width, vit.mlp_width
    first, last = ("w12", "w3") if vit.gated_mlp else ("fc1", "fc2")
    rows = 2 * hidden if vit.gated_mlp else hidden
    block = {
        **dict.fromkeys(("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias"), (d,)),
        "attn.qkv.weight": (3 * d, d),
        **({"attn.qkv.bias": (3 * d,)} if vit.qkv_bias else {}),
        "attn.proj.weight": (d, d),
        f"mlp.{first}.weight": (rows, d),
        f"mlp.{first}.bias": (rows,),
        f"mlp.{last}.weight": (d, hidden),
        f"mlp.{last}.bias": (d,),
        **({"ls1.gamma": (d,), "ls2.gamma": (d,)} if vit.layer_scale else {}),
    }
    tokens: dict[str, tuple[int, ...]] = {
        name: (1, d) if name == "mask_token" else (1, tensors[name].shape[1], d)
        for name in ("cls_token", *layout.optional)
        if name in tensors
    }
    return {
        **tokens,
        "pos_embed": (1, tensors["pos_embed"].shape[1], d),
        ANCHOR: (d, 3, vit.patch, vit.patch),
        **dict.fromkeys(("patch_embed.proj.bias", "norm.weight", "norm.bias"), (d,)),
        **{f"blocks.{i}.{name}": shape for i in range(vit.depth) for name, shape in block.items()},
    }


def _expected_region(d: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of UDI's region attention."""
    vectors = dict.fromkeys(("norm1.weight", "norm1.bias", "norm.weight", "norm.bias", "proj.bias"), (d,))
    return {**vectors, "qkv.weight": (3 * d, d), "qkv.bias": (3 * d,), "proj.weight": (d, d)}


def _check(
    found: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    origin: Mapping[str, str],
    keys: SortedKeys,
    source: str,
) -> None:
    """Raise UserError unless names and shapes are those expected, and the file holds nothing unknown.

    ``origin``: name -> key of the file, which is what the user reads.
    """
    where = keys.prefix if origin is keys.vit else "the region attention's "
    missing = [where + name for name in expected if name not in found]
    surplus = [origin.get(name, where + name) for name in found if name not in expected]
    wrong = [
        f"{origin.get(name, where + name)} is {tuple(found[name].shape)}, expected {size}"
        for name, size in expected.items()
        if name in found and found[name].shape != size
    ]
    if missing or surplus or wrong or keys.unknown:
        raise UserError(complaint(source, missing=missing, unknown=[*surplus, *keys.unknown], wrong=wrong))


def _tokens(tensors: Mapping[str, Tensor], layout: Source) -> Tokens:
    """Split the table of positions; the patches' share has to be a square. Raises UserError where there is no way."""
    table = tensors["pos_embed"]
    present = [tensors[name] for name in TOKENS if name in tensors]
    prefix = torch.cat([table[:, :0], *present], dim=1)
    class_tokens = tensors["cls_token"].shape[1] if "cls_token" in tensors else 0
    counts = {"all": prefix.shape[1], "class": class_tokens, "none": 0}
    for which in layout.positions:
        patches = table.shape[1] - counts[which]
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            if which == "none" and layout.class_token_unused:
                prefix = prefix[:, :0]
            positions = torch.zeros_like(prefix)
            positions[:, : counts[which]] = table[:, : counts[which]]
            return Tokens(prefix, positions, table[:, counts[which] :])
    names = ", ".join(name for name in TOKENS if name in tensors) or "no cls_token"
    raise UserError(
        f"pos_embed holds {table.shape[1]} positions, which is no square grid of patches with {prefix.shape[1]} tokens "
        f"before them ({names}); give the --source that wrote the file, only ViTs of square images are supported"
    )
