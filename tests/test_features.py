from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glare.features import Features, encode, use_packed_attention
from glare.modeling_glare import GlareModel
from glare.uniadapter import UniAdapterConfig

PATCH = 4
INTERPOLATE_ON_REQUEST = ("vit", "deit")  # the other families always do
MakeVit = Callable[..., PreTrainedModel]

# (views, images, height, width) of each group; patches of 4 px, trained at 16 px
GROUPS = {
    "two-sizes": [(2, 3, 16, 16), (4, 3, 8, 8)],
    "one-group": [(2, 2, 16, 16)],
    "not-square": [(2, 2, 16, 24), (1, 2, 12, 8), (3, 2, 4, 4)],
    "one-image": [(1, 1, 20, 20), (1, 1, 8, 16)],
}


def pictures(shapes: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(v, b, 3, h, w, generator=generator) for v, b, h, w in shapes]


def ordinary(model: PreTrainedModel, images: Tensor, **inputs: object) -> Tensor:
    """Tokens of the ordinary forward pass, as anybody would call it."""
    if model.config.model_type in INTERPOLATE_ON_REQUEST:
        inputs["interpolate_pos_encoding"] = True
    return model(images, **inputs).last_hidden_state


def features_of(tokens: Tensor, group: Tensor) -> Features:
    """Tokens (v * b, t, d) -> cls and patches."""
    n = (group.shape[-2] // PATCH) * (group.shape[-1] // PATCH)
    tokens = tokens.unflatten(0, group.shape[:2])
    return Features(cls=tokens[:, :, 0], patches=tokens[:, :, tokens.shape[2] - n :])


def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Adapters that do something: at first they are the identity."""
    backbone = GlareModel.from_backbone(model, UniAdapterConfig(r=4)).backbone
    generator = torch.Generator().manual_seed(4)
    for name, parameter in backbone.named_parameters():
        if "adapter" in name.lower() and parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return backbone


def total(features: Sequence[Features]) -> Tensor:
    """A scalar that weighs every value differently."""
    parts = [part.flatten() for f in features for part in (f.cls, f.patches)]
    values = torch.cat(parts)
    return (values * torch.linspace(-1, 1, len(values)).sin()).sum()


@pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS.keys())
def test_packed_groups_equal_separate_passes(make_vit: MakeVit, family: str, shapes: list[tuple[int, int, int, int]]):
    model, groups = make_vit(family), pictures(shapes)
    expected = [features_of(ordinary(model, group.flatten(0, 1)), group) for group in groups]
    use_packed_attention(model)
    for found, wanted, group in zip(encode(model, groups), expected, groups, strict=True):
        assert found.cls.shape == (*group.shape[:2], 32)
        assert found.patches.shape[:2] == group.shape[:2]
        assert found.attention is None
        torch.testing.assert_close(found.cls, wanted.cls, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.patches, wanted.patches, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_separate_passes(make_vit: MakeVit, family: str):
    model, groups = make_vit(family), pictures(GROUPS["not-square"])
    total([features_of(ordinary(model, group.flatten(0, 1)), group) for group in groups]).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    use_packed_attention(model)
    total(encode(model, groups, attention=True)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 20
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_are_part_of_the_pass(make_vit: MakeVit, family: str):
    groups = pictures(GROUPS["two-sizes"])
    plain = make_vit(family)
    without = ordinary(plain, groups[0].flatten(0, 1))
    model = with_adapters(plain)
    expected = [features_of(ordinary(model, group.flatten(0, 1)), group) for group in groups]
    assert (expected[0].cls - without.unflatten(0, (2, 3))[:, :, 0]).abs().max() > 1e-2
    use_packed_attention(model)
    for found, wanted in zip(encode(model, groups), expected, strict=True):
        torch.testing.assert_close(found.patches, wanted.patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 16, 16), (2, 1, 16, 24), (1, 3, 8, 12)])
def test_attention_is_the_cls_row_of_the_last_block(
    make_vit: MakeVit, family: str, prefix_tokens: dict[str, int], shape: tuple[int, int, int, int]
):
    groups = pictures([shape, (3, 2, 8, 8)])
    eager = make_vit(family, attn_implementation="eager")
    images = groups[0].flatten(0, 1)
    inputs = {"interpolate_pos_encoding": True} if family in INTERPOLATE_ON_REQUEST else {}
    maps = eager(images, output_attentions=True, **inputs).attentions[-1]
    expected = maps[:, :, 0, prefix_tokens[family] :].unflatten(0, shape[:2])
    model = make_vit(family)
    use_packed_attention(model)
    first, second = encode(model, groups, attention=True)
    assert second.attention is None
    assert first.attention is not None
    n = shape[2] * shape[3] // PATCH**2
    assert first.attention.shape == (*shape[:2], 2, n)
    torch.testing.assert_close(first.attention, expected, atol=1e-5, rtol=1e-5)
    share = first.attention.sum(dim=-1)
    assert (share < 1).all() and (share > 0).all(), "the prefix tokens' share is left out"


def test_the_mask_token_stands_in_for_masked_patches_only(make_vit: MakeVit, family: str):
    """All families have a mask token of their own, unused by this package: the reference to compare with."""
    groups = pictures([(2, 2, 16, 24), (2, 2, 16, 24)])
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(2, 2, 24, generator=generator) < 0.4
    mask[1, 0] = False
    token = torch.randn(32, generator=generator)
    model = make_vit(family)
    clean = [features_of(ordinary(model, group.flatten(0, 1)), group) for group in groups]
    own = model.embeddings.mask_token
    model.embeddings.mask_token = nn.Parameter(token.view((1, 1, 32) if own is None else own.shape).clone())
    tokens = ordinary(model, groups[0].flatten(0, 1), bool_masked_pos=mask.flatten(0, 1))
    expected = features_of(tokens, groups[0])
    use_packed_attention(model)
    found, local = encode(model, groups, mask=mask, mask_token=token)
    torch.testing.assert_close(found.patches, expected.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.cls, expected.cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.patches[1, 0], clean[0].patches[1, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(local.patches, clean[1].patches, atol=1e-5, rtol=1e-5)
    assert (found.cls - clean[0].cls).abs().amax(dim=-1)[mask.any(dim=-1)].min() > 1e-3
    again = encode(model, groups)[0]
    torch.testing.assert_close(again.patches, clean[0].patches, atol=1e-5, rtol=1e-5)


def test_the_mask_token_learns_from_masked_patches_alone(make_vit: MakeVit, family: str):
    model = make_vit(family)
    use_packed_attention(model)
    groups, token = pictures([(1, 2, 16, 16)]), torch.zeros(32, requires_grad=True)
    none = torch.zeros(1, 2, 16, dtype=torch.bool)
    total(encode(model, groups, mask=none, mask_token=token)).backward()
    assert token.grad is not None and not token.grad.any()
    total(encode(model, groups, mask=~none, mask_token=token)).backward()
    assert token.grad.any()


def test_masked_pixels_do_not_matter(make_vit: MakeVit, family: str):
    model = make_vit(family)
    use_packed_attention(model)
    (group,) = pictures([(1, 2, 16, 16)])
    mask = torch.zeros(1, 2, 16, dtype=torch.bool)
    mask[..., 5] = True  # row 1, column 1
    other = group.clone()
    other[..., 4:8, 4:8] = 7.0
    token = torch.ones(32)
    first, second = (encode(model, [g], mask=mask, mask_token=token)[0] for g in (group, other))
    assert torch.equal(first.patches, second.patches)
    assert not torch.equal(encode(model, [group])[0].patches, encode(model, [other])[0].patches)


def test_images_of_a_pack_do_not_see_each_other(make_vit: MakeVit, family: str):
    model = make_vit(family)
    use_packed_attention(model)
    groups = pictures([(2, 2, 16, 16), (2, 2, 8, 8)])
    before = encode(model, groups, attention=True)
    groups[0][0, 1] = 5.0
    groups[1][1, 0] = -5.0
    after = encode(model, groups, attention=True)
    for number, changed in ((0, (0, 1)), (1, (1, 0))):
        same = torch.ones(2, 2, dtype=torch.bool)
        same[changed] = False
        assert torch.allclose(after[number].patches[same], before[number].patches[same], atol=1e-6)
        assert not torch.allclose(after[number].patches[changed], before[number].patches[changed], atol=1e-2)
    assert before[0].attention is not None and after[0].attention is not None
    assert torch.allclose(after[0].attention[1], before[0].attention[1], atol=1e-6)


def test_an_ordinary_pass_under_the_packed_attention_is_sdpa(make_vit: MakeVit, family: str):
    model, (group,) = make_vit(family), pictures([(1, 3, 16, 24)])
    assert model.config._attn_implementation == "sdpa"
    expected = ordinary(model, group[0])
    use_packed_attention(model)
    assert torch.equal(ordinary(model, group[0]), expected)


def test_a_group_may_be_empty(make_vit: MakeVit, family: str):
    model = make_vit(family)
    use_packed_attention(model)
    groups = [*pictures([(2, 2, 16, 16)]), torch.empty(0, 2, 3, 8, 8)]
    full, empty = encode(model, groups, attention=True)
    assert empty.cls.shape == (0, 2, 32) and empty.patches.shape == (0, 2, 4, 32)
    alone = encode(model, groups[:1])[0]
    torch.testing.assert_close(full.patches, alone.patches, atol=1e-6, rtol=1e-6)
    total([full, empty]).backward()


def test_no_hook_is_left_behind(make_vit: MakeVit, family: str):
    model = make_vit(family)
    use_packed_attention(model)
    groups, mask = pictures([(1, 1, 16, 16)]), torch.ones(1, 1, 16, dtype=torch.bool)
    encode(model, groups, mask=mask, mask_token=torch.zeros(32))
    with pytest.raises(RuntimeError):
        encode(model, groups, mask=mask[..., :3], mask_token=torch.zeros(32))
    assert not model.embeddings.patch_embeddings._forward_hooks
