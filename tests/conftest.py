import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator

import pytest
import torch
from forks import Forks
from hypothesis import HealthCheck, settings
from tiny_models import FAMILIES, tiny_config, tiny_vit
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from glare.data.notices import say_once

logging.disable_progress_bar()
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "many", max_examples=1500, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """What is said once is said once in each test, also where its folder has the name of an earlier one's."""
    say_once.cache_clear()


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


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, which it keeps from pytest by default."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes of ``glare`` without the seconds of their imports."""
    with Forks() as made:
        yield made
