"""What a check of health measures: the same few images, against the model before its first step."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_no_class_token import tiny_ijepa
from tiny_models import tiny_vit, train_a_little
from transformers import PreTrainedModel

from glare.backbones import adapt
from glare.crops import PackedImages, subset
from glare.features import use_packed_attention
from glare.health import feature_std, mean_cosine, rankme
from glare.health_check import HealthCheck, centre_crops, check_views
from glare.modeling_glare import GlareModel
from glare.runtime import make_accelerator
from glare.views import Normalisation


@pytest.fixture
def accelerator() -> Accelerator:
    # not that of an earlier test, whose precision another one made in this process would take over
    return make_accelerator(device="cpu", precision="fp32", report_to="none", output=Path())


def packed(sizes: list[tuple[int, int]]) -> PackedImages:
    size = torch.tensor(sizes)
    pixels = torch.randint(0, 256, (int(size.prod(1).sum()), 3), dtype=torch.uint8, generator=torch.Generator())
    return PackedImages(pixels, size.prod(1).cumsum(0) - size.prod(1), size)


def some_views(count: int = 6) -> torch.Tensor:
    images = packed([(20 + n, 33 - n) for n in range(count)])
    return check_views(images, batch_size=4, size=16, normalise=Normalisation())


def backbone(kind: str = "uniadapter", vit: PreTrainedModel | None = None) -> PreTrainedModel:
    model = GlareModel.from_backbone(vit or tiny_vit("dinov2"), None)
    torch.manual_seed(0)
    found = adapt(model, kind, rank=4, scale=1.0).backbone.eval()
    use_packed_attention(found)
    return found


def test_crops_are_the_square_in_the_middle() -> None:
    crops = centre_crops(packed([(41, 30), (30, 30), (8, 10)]))
    edges = torch.stack([crops.offset, crops.offset + crops.scale]) * torch.tensor([[41, 30], [30, 30], [8, 10]])
    torch.testing.assert_close(edges[0], torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(edges[1], torch.tensor([[35.0, 30.0], [30.0, 30.0], [8.0, 9.0]]))


@pytest.mark.parametrize(("images", "batch_size", "count"), [(100, 64, 32), (100, 8, 16), (100, 1, 8), (5, 8, 5)])
def test_a_few_of_the_first_images(images: int, batch_size: int, count: int) -> None:
    few = packed([(9, 8)] * images)
    views = check_views(few, batch_size=batch_size, size=8, normalise=Normalisation())
    assert views.shape == (1, count, 3, 8, 8)
    alone = check_views(subset(few, torch.arange(count)), batch_size=batch_size, size=8, normalise=Normalisation())
    assert torch.equal(views, alone)


@pytest.mark.parametrize("kind", ["uniadapter", "lora", "norm", "full"])
def test_the_reference_is_the_model_without_its_adapters(kind: str, accelerator: Accelerator) -> None:
    views, plain, adapted = some_views(), tiny_vit("dinov2"), backbone(kind)
    if kind in ("uniadapter", "lora"):  # as where adapters that have learned go on
        train_a_little(adapted)
    check = HealthCheck.of(adapted, views, accelerator)
    with torch.no_grad():
        expected = plain(views[0]).last_hidden_state
    torch.testing.assert_close(check.patches, expected[:, 1:], atol=1e-4, rtol=1e-4)
    assert check.untouched["cosine_to_base"] == pytest.approx(1)
    assert check.untouched["rankme_cls"] == pytest.approx(rankme(expected[:, 0]), rel=1e-4)


def test_values_are_those_of_the_measures(accelerator: Accelerator) -> None:
    views, model = some_views(), backbone()
    check = HealthCheck.of(model, views, accelerator)
    train_a_little(model)
    with torch.no_grad():
        tokens = model(views[0]).last_hidden_state
    found, patches = check.measure(model), tokens[:, 1:]
    assert found == pytest.approx(
        {
            "rankme_cls": rankme(tokens[:, 0]),
            "rankme_patches": rankme(patches.flatten(0, 1)),
            "feature_std": feature_std(patches.flatten(0, 1)),
            "cosine_to_base": mean_cosine(patches, check.patches),
        },
        rel=1e-3,
    )
    assert found["cosine_to_base"] < 0.99


def test_without_a_class_token_the_mean_of_the_patches_stands_for_it(accelerator: Accelerator) -> None:
    views, model = some_views(), backbone("full", tiny_ijepa())
    check = HealthCheck.of(model, views, accelerator)
    assert check.measure(model) == check.untouched
    assert check.untouched["rankme_cls"] == pytest.approx(rankme(check.patches.mean(dim=1)), rel=1e-4)


def test_features_that_are_not_finite_are_nan(accelerator: Accelerator) -> None:
    model = backbone()
    check = HealthCheck.of(model, some_views(), accelerator)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
    assert all(math.isnan(value) for value in check.measure(model).values())


def test_compiled_blocks_are_checked_as_they_are(accelerator: Accelerator) -> None:
    traced: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(1)
        return graph

    model = backbone()
    check = HealthCheck.of(model, some_views(), accelerator)
    for block in model.modules():
        if "Layer" in type(block).__name__:
            block.compile(backend=backend)
    assert check.measure(model) == check.untouched
    assert not traced
