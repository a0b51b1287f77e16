import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
from transformers.utils import logging

logging.disable_progress_bar()

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
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    # weights large enough that a wrong one shows
    return config_class(**(sizes | {"initializer_range": 0.2} | own | fields))


def tiny_vit(family: str = "vit", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModel.from_config(tiny_config(family, **fields)).eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the five ViT families in turn."""
    return str(request.param)


@pytest.fixture
def make_vit() -> Callable[..., PreTrainedModel]:
    """`make_vit(family="vit", *, seed=0, **config_fields)`: a random ViT of 3 blocks x 32 dims, patch 4."""
    return tiny_vit


@pytest.fixture
def make_vit_config() -> Callable[..., PreTrainedConfig]:
    """`make_vit_config(family="vit", **config_fields)`: the configuration of that ViT."""
    return tiny_config


@pytest.fixture
def prefix_tokens() -> dict[str, int]:
    """Number of tokens before the patches, by family."""
    return {name: count for name, (_, _, count) in FAMILIES.items()}


@pytest.fixture
def images() -> torch.Tensor:
    """Two random images (2, 3, 16, 24): not square, 4 x 6 patches."""
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
