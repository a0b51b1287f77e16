"""The ViT an adaptation starts from: found, loaded in float32 and given what is to train (paper section 3.2)."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetForSemanticSegmentation,
)

from glare.errors import UserError, shortened
from glare.json_files import read_json
from glare.model_names import EMBEDDED, Place, explained, place_of
from glare.model_sizes import check_labels, oversize
from glare.modeling_glare import GlareModel, vit_blocks
from glare.uniadapter import UniAdapterConfig
from glare.views import Normalisation
from glare.weight_files import check_index

LARGEST_MEAN = 1e6  # of a channel, and of its standard deviation
ROTARY = ("dinov3_vit",)  # without position embeddings of a size
MAX_BLOCKS = 1000  # so that a wrong configuration does not build for ever
ADAPTERS = ("uniadapter", "lora", "full", "norm")
HINT = (
    "give a folder with config.json and model.safetensors of a ViT, DeiT, DINOv2 or DINOv3, a Hub id of one, or "
    f"{EMBEDDED!r} for the small ViT of this package"
)


def load_backbone(name: str) -> GlareModel:
    """A ViT as GlareModel, with the adapters it was saved with, if any; float32.

    ``name`` is a folder written by transformers or by a run of this package, a Hub id (``ID@revision`` for one
    revision), ``landcover-vit`` (the small ViT inside this package), or a ``config.json``, which gives a ViT of random
    weights. Raises UserError for anything else.
    """
    place = place_of(name)
    with explained("backbone", name, HINT):
        config = read_config(place)
        auto = AutoModelForSemanticSegmentation if config.model_type == "upernet" else AutoModel
        check_size(lambda: auto.from_config(config, trust_remote_code=False))
        if place.name.endswith(".json"):
            model = AutoModel.from_config(config, dtype=torch.float32)
        elif config.model_type == "upernet":
            model = _below_upernet(place)
        else:
            options = place.safe_options | without_pooler(config)
            model = AutoModel.from_pretrained(place.name, dtype=torch.float32, **options)
        if not isinstance(model, GlareModel):
            vit_blocks(model)
            model = GlareModel.from_backbone(model, None)
    model.backbone.name_or_path = name
    return model


def _below_upernet(place: Place) -> GlareModel:
    """The ViT below the UPerNet of ``glare finetune``, with its adapters."""
    segmenter = UperNetForSemanticSegmentation.from_pretrained(place.name, dtype=torch.float32, **place.safe_options)
    if not isinstance(segmenter.backbone, GlareModel):
        raise ValueError(f"the backbone of this UPerNet is a {type(segmenter.backbone).__name__}, not one of glare")
    model = GlareModel(segmenter.config.backbone_config)
    model.config.backbone_pyramid = False
    model.backbone.load_state_dict(segmenter.backbone.backbone.state_dict())
    return model


def read_config(place: Place) -> PreTrainedConfig:
    """The configuration of a model, of no more blocks and classes than a model may have; ValueError for others.

    The weights are to be where it is: what loads a model comes here first, so this raises as `check_index`, too.
    """
    check_labels(PreTrainedConfig.get_config_dict(place.name, **place.options)[0])
    check_index(place)
    config = AutoConfig.from_pretrained(place.name, trust_remote_code=False, **place.options)
    inner = getattr(config, "backbone_config", None)
    for part in (config, inner, getattr(inner, "backbone_config", None)):
        _check_numbers(part)
    return config


def _check_numbers(config: Any) -> None:
    """Raise ValueError where a configuration, an object or a dict, has numbers of which no ViT can be built."""

    def value(key: str, default: object = None) -> Any:
        return config.get(key, default) if isinstance(config, dict) else getattr(config, key, default)

    blocks = value("num_hidden_layers", 0)
    if not isinstance(blocks, int) or blocks > MAX_BLOCKS:
        raise ValueError(f"num_hidden_layers is {shortened(str(blocks))}, at most {MAX_BLOCKS} are built")
    for key in ("patch_size", "hidden_size", "num_attention_heads"):
        divisor = value(key)
        if isinstance(divisor, int) and divisor < 1:
            raise ValueError(f"{key} is {divisor}, it has to be at least 1")
    sides = value("image_size")
    if isinstance(sides, list | tuple) and len(set(sides)) != 1 and value("model_type") not in ROTARY:
        raise ValueError(f"image_size is {shortened(str(sides))}; position embeddings are resized of squares only")


def check_size(build: Callable[[], nn.Module]) -> None:
    """Raise ValueError where the model that ``build`` makes does not fit into memory; nothing is allocated."""
    if reason := oversize(build):
        raise ValueError(f"its {reason}")


def without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """ViT and DeiT would add a pooler of random weights, and report it as missing from self-supervised checkpoints."""
    model = MODEL_MAPPING.get(type(config), None)
    pools = model is not None and "add_pooling_layer" in inspect.signature(model.__init__).parameters
    return {"add_pooling_layer": False} if pools else {}


def adapt(model: GlareModel, kind: str, *, rank: int, scale: float, place: str = "attention") -> GlareModel:
    """Freeze what does not train and add fresh adapters; a model that already has adapters goes on training them.

    ``kind``: ``uniadapter`` (eq. 3), ``lora`` (on the linear projections of every attention layer), ``norm`` (the
    layer norms) or ``full`` (every weight). ``place``: of ``uniadapter``, after every ``attention`` layer as the
    paper's section 3.2 says, or after every whole ``block``, the other reading of its x.
    """
    backbone = model.backbone
    if model.config.adapter_config is not None:
        present = str(model.config.adapter_config["peft_type"]).lower()
        if present != kind:
            raise UserError(
                f"the backbone already has {present} adapters, --adapter {kind} is not possible: give {present}"
            )
    elif kind in ("uniadapter", "lora"):
        model = add_adapters(backbone, _adapter_config(backbone, kind, rank=rank, scale=scale, place=place))
    for name, parameter in model.backbone.named_parameters():
        trains = any(part in name for part in ("uniadapter_", "lora_")) or (kind == "full" and "mask_token" not in name)
        parameter.requires_grad_(trains)
    if kind == "norm":
        for module in model.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    return model


def add_adapters(backbone: PreTrainedModel, config: PeftConfig) -> GlareModel:
    """Fresh adapters in a ViT. Raises UserError where they do not fit into memory."""
    bare = deepcopy(backbone.config)
    reason = oversize(lambda: GlareModel.from_backbone(AutoModel.from_config(bare), deepcopy(config)))
    if reason:
        raise UserError(f"with the adapters {reason}; give a lower rank")
    return GlareModel.from_backbone(backbone, config)


def _adapter_config(backbone: PreTrainedModel, kind: str, *, rank: int, scale: float, place: str) -> PeftConfig:
    blocks = list(vit_blocks(backbone))
    if kind == "uniadapter":
        names = [name for name, module in backbone.named_modules() if any(module is block for block in blocks)]
        return UniAdapterConfig(r=rank, scale=scale, target_modules=names if place == "block" else None)
    attention = blocks[0].get_submodule("attention")
    targets = [name.rsplit(".", 1)[-1] for name, child in attention.named_modules() if isinstance(child, nn.Linear)]
    return LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=targets)


def read_normalisation(name: str) -> Normalisation:
    """Mean and standard deviation from the backbone's ``preprocessor_config.json``; ImageNet's where it has none."""
    path = place_of(name).file("preprocessor_config.json")
    if path is None:
        return Normalisation()
    settings = read_json(path)
    if "image_mean" not in settings or "image_std" not in settings:
        return Normalisation()
    mean, std = (_three_numbers(settings[key], key, path) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise UserError(f"image_std in {path} is {list(std)}; give three numbers above 0, or remove the file")
    return Normalisation(mean, std)


def _three_numbers(value: Any, key: str, path: Path) -> tuple[float, float, float]:
    """RGB of ``value``, one number standing for all three as in transformers. Raises UserError for anything else."""
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) == 3 and all(type(number) in (int, float) and abs(number) < LARGEST_MEAN for number in numbers):
        return float(numbers[0]), float(numbers[1]), float(numbers[2])
    raise UserError(f"{key} in {path} is {shortened(str(value))}; give three numbers, or remove the file")
