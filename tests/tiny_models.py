"""Random models of 3 blocks x 32 dims for the tests, and what the tests do with them."""

from typing import Any

import torch
from labelled_samples import CLASSES, COLOURS
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import (
    AutoModel,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from glare import GlareConfig, GlareForSemanticSegmentation, GlareModel, UniAdapterConfig
from glare.uniadapter import UniAdapterLayer, default_target_modules

# configuration and the number of tokens before the patches
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], int]] = {
    "vit": (ViTConfig, {"intermediate_size": 64}, 1),
    "deit": (DeiTConfig, {"intermediate_size": 64}, 2),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2}, 1),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, {"mlp_ratio": 2, "num_register_tokens": 4}, 5),
    "dinov3_vit": (DINOv3ViTConfig, {"intermediate_size": 64, "num_register_tokens": 4}, 5),
}


def tiny_config(family: str = "vit", **fields: Any) -> PreTrainedConfig:
    config_class, own, _ = FAMILIES[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    # weights large enough that a wrong one shows
    return config_class(**(sizes | {"initializer_range": 0.2} | own | fields))


def tiny_vit(family: str = "vit", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModel.from_config(tiny_config(family, **fields)).eval()


WHOLE_BLOCKS = r".*layers?\.\d+"  # target_modules of the second reading of eq. 3
ADAPTERS = ["uniadapter", "lora", "full"]
FRESH_HEAD = {"num_labels": 5, "fpn_channels": 16, "head_channels": 8}


def adapter_config(kind: str, vit: PreTrainedModel) -> PeftConfig | None:
    if kind == "full":
        return None
    if kind == "lora":
        return LoraConfig(r=4, target_modules=default_target_modules(vit))
    return UniAdapterConfig(r=4)


def train_a_little(model: nn.Module, *, seed: int = 0, adapter: str = "") -> None:
    """Stand for training: give the weights of the adapter, or of all adapters, random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("uniadapter_" in name or "lora_" in name) and adapter in name:
                parameter.normal_(std=0.5, generator=generator)


def adapted_model(vit: PreTrainedModel, kind: str = "uniadapter") -> GlareModel:
    model = GlareModel.from_backbone(vit, adapter_config(kind, vit)).eval()
    train_a_little(model)
    return model


def segmenter(vit: PreTrainedModel, kind: str = "uniadapter", **options: Any) -> GlareForSemanticSegmentation:
    torch.manual_seed(0)
    return GlareForSemanticSegmentation.from_model(adapted_model(vit, kind), **(FRESH_HEAD | options)).eval()


def varied_segmenter() -> GlareForSemanticSegmentation:
    """A random segmenter of ``CLASSES``, with weights so large that classes vary over an image."""
    config = GlareConfig(backbone_config=tiny_config(), id2label=dict(enumerate(CLASSES)))
    torch.manual_seed(0)
    made = GlareForSemanticSegmentation(config)
    torch.nn.init.normal_(made.head.classifier.weight, std=0.1)
    made.config.palette = COLOURS.tolist()
    return made.eval()


def tokens(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images, interpolate_pos_encoding=True).last_hidden_state


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def adapter_layers(model: nn.Module) -> list[UniAdapterLayer]:
    return [module for module in model.modules() if isinstance(module, UniAdapterLayer)]
