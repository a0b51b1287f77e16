"""Keys of foreign ViT checkpoints: which belong to the ViT, which to UDI's region attention, which are not needed.

Nothing is assumed about prefixes (``module.``, ``backbone.``, ``teacher.backbone.`` and so on): the ViT's is what
stands before ``patch_embed.proj.weight``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glare.errors import UserError
from glare.foreign_weights import ROLES, listed

ANCHOR = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Source:
    """What files of a repository hold besides the tensors that every ViT has.

    ``optional``: tokens under the names used here, and parts of a block. ``left_out``: beginnings of keys that are
    known and not needed. ``positions``: which of the tokens before the patches have one, alternatives in order: all,
    those of class, none. ``region_attention``: UDI's. ``class_token_unused``: where the class token has no position.
    """

    optional: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ("head.",)
    positions: tuple[str, ...] = ("all",)
    region_attention: bool = False
    class_token_unused: bool = False


SOURCES = {
    "dino": Source(),
    "ibot": Source(left_out=("head.", "masked_embed")),
    "udi": Source(region_attention=True),
    "flsl": Source(positions=("none", "all"), class_token_unused=True),
    "dinov2": Source(
        optional=("register_tokens", "mask_token", "layer_scale", "gated_mlp"),
        left_out=("head.", "dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss."),
        positions=("class",),
    ),
    "timm": Source(
        optional=("register_tokens", "dist_token", "layer_scale", "gated_mlp"),
        left_out=("head.", "head_dist."),
        positions=("all", "none"),
    ),
}
"""Value of ``--source`` -> what to expect."""

SYNONYMS = {"reg_token": "register_tokens", "masked_embed": "mask_token"}
TOKENS = ("cls_token", "register_tokens", "dist_token")  # in the order of the sequence
REGION_ATTENTION = {"attn.qkv": "qkv", "attn.proj": "proj", "attn.norm": "norm", "norm1": "norm1"}
"""UDI's modules -> those of ``objectives.glare.CrossAttention``."""


def vit_prefix(content: Mapping[str, Any], role: str | None) -> str:
    """What stands before the names of the ViT; of several, the role's."""
    found = [key.removesuffix(ANCHOR) for key in content if f".{key}".endswith(f".{ANCHOR}")]
    if len(found) > 1:
        by_role = (
            [prefix for prefix in found if wanted in prefix.split(".")] for wanted in ([role] if role else ROLES)
        )
        found = next(filter(None, by_role), found)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"the checkpoint holds several ViTs, under {listed(found)}; give a file with one")
    if any(key.endswith("patch_embeddings.projection.weight") for key in content):
        raise UserError(
            "the checkpoint is in the layout of transformers already; give its folder, with config.json, to --backbone"
        )
    raise UserError(f"the checkpoint holds no ViT, no key ends in {ANCHOR}; it holds: {listed(list(content))}")


@dataclass(frozen=True)
class SortedKeys:
    """Keys of a file: ``vit`` and ``region`` by the names used here, the others as they are."""

    prefix: str
    vit: dict[str, str] = field(default_factory=dict)
    region: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def sort_keys(content: Mapping[str, Any], layout: Source, *, prefix: str) -> SortedKeys:
    """Tell apart the keys of the ViT, of the region attention, those known not to be needed, and the others."""
    keys = SortedKeys(prefix)
    others = tuple(f"{role}." for role in ROLES)
    for key, value in content.items():
        rest = _beyond(key, prefix)
        module, _, kind = rest.rpartition(".")
        name = _name(key.removeprefix(prefix))
        region = f"{REGION_ATTENTION.get(module)}.{kind}"
        if rest.startswith((*layout.left_out, *others)):
            keys.left_out.append(key)
        elif not _is_weight(value):
            keys.unknown.append(key)
        elif layout.region_attention and module in REGION_ATTENTION and region not in keys.region:
            keys.region[region] = key
        elif key.startswith(prefix) and name not in keys.vit:
            keys.vit[name] = key
        else:
            keys.unknown.append(key)
    return keys


def _is_weight(value: Any) -> bool:
    """Whether this is a table of numbers that are all in the file: a view may repeat them to any size."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def _beyond(key: str, prefix: str) -> str:
    """``key`` without the parts between dots that it begins with in common with ``prefix``."""
    parts, above = key.split("."), prefix.split(".")
    same = next((i for i, (a, b) in enumerate(zip(parts, above, strict=False)) if a != b), 0)
    return ".".join(parts[same:])


def _name(key: str) -> str:
    """The name used here for a key of the ViT: DINO's, blocks numbered through."""
    return SYNONYMS.get(key, re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key))


def complaint(source: str, *, missing: list[str], unknown: list[str], wrong: list[str]) -> str:
    """The sentence for keys that are missing, unknown or of another shape than the rest says."""
    parts = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    lists = "; ".join(f"{what}: {listed(names)}" for what, names in parts.items() if names)
    return (
        f"the checkpoint is no ViT as {source} writes it ({lists}); give the whole file and the --source that wrote it"
    )
