"""A ViT without class token: what stands for [CLS], on every way through it."""

from pathlib import Path

import pytest
import torch
from tiny_models import tokens, train_a_little
from transformers import AutoModel, IJepaConfig, IJepaModel

from glare import GlareForSemanticSegmentation, GlareModel, UniAdapterConfig
from glare.features import encode, use_packed_attention


def tiny_ijepa(**options: str) -> IJepaModel:
    config = IJepaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModel.from_config(config, **options).eval()


@pytest.fixture
def views() -> list[torch.Tensor]:
    """(v, b, 3, h, w): not square, then smaller."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in ((2, 3, 3, 16, 24), (4, 3, 3, 8, 8))]


def test_packed_features_equal_separate_passes(views: list[torch.Tensor]) -> None:
    model = tiny_ijepa()
    expected = [tokens(model, group.flatten(0, 1)).unflatten(0, group.shape[:2]) for group in views]
    use_packed_attention(model)
    for found, wanted in zip(encode(model, views, attention=True), expected, strict=True):
        torch.testing.assert_close(found.patches, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.cls, wanted.mean(dim=2), atol=1e-5, rtol=1e-5)


def test_attention_is_what_a_patch_receives_on_average(views: list[torch.Tensor]) -> None:
    eager = tiny_ijepa(attn_implementation="eager")
    maps = eager(views[0].flatten(0, 1), output_attentions=True, interpolate_pos_encoding=True).attentions[-1]
    model = tiny_ijepa()
    use_packed_attention(model)
    first, second = encode(model, views, attention=True)
    assert second.attention is None and first.attention is not None
    assert first.attention.shape == (2, 3, 2, 24)
    torch.testing.assert_close(first.attention.flatten(0, 1), maps.mean(dim=2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.attention.sum(dim=-1), torch.ones(2, 3, 2))


def test_models_with_adapters(views: list[torch.Tensor], tmp_path: Path) -> None:
    images = views[0][0]
    plain = tokens(tiny_ijepa(), images)
    fresh = GlareModel.from_backbone(tiny_ijepa(), UniAdapterConfig(r=4)).eval()
    with torch.no_grad():
        assert torch.equal(fresh(images).last_hidden_state, plain)
        torch.testing.assert_close(fresh(images).pooler_output, plain.mean(dim=1))
        train_a_little(fresh)
        adapted = fresh(images)
        assert not torch.equal(adapted.last_hidden_state, plain)
        fresh.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)(images)
        assert torch.equal(again.pooler_output, adapted.pooler_output)
        maps = fresh.patch_maps(adapted.last_hidden_state, images)
        assert maps.shape == (3, 32, 4, 6) and torch.equal(maps[1, :, 2, 3], adapted.last_hidden_state[1, 15])
        segmenter = GlareForSemanticSegmentation.from_model(fresh, num_labels=5, fpn_channels=16, head_channels=8)
        assert segmenter.eval()(images).logits.shape == (3, 5, 4, 6)
