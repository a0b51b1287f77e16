import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig

from glare.configuration_glare import GlareConfig
from glare.segmentation_heads import FeaturePyramid, FPNHead, LinearHead, PixelHead, RescalingPyramid


def config(layers: int = 12, **fields: Any) -> GlareConfig:
    vit = ViTConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64)
    sizes = {"fpn_channels": 16, "head_channels": 8, "num_labels": 5, "head": "fpn"}
    return GlareConfig(backbone_config=vit, **(sizes | fields))


def maps(levels: int, height: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 32, height, width, generator=generator) for _ in range(levels)]


def test_linear_head_is_a_matrix_on_the_last_map() -> None:
    head = LinearHead(config(head="linear")).eval()
    levels = maps(2, 3, 5)
    expected = torch.einsum("cd,bdhw->bchw", head.classifier.weight[:, :, 0, 0], levels[-1])
    expected = expected + head.classifier.bias[None, :, None, None]
    torch.testing.assert_close(head(levels), expected)


def test_pixel_head_is_a_matrix_on_each_token() -> None:
    head = PixelHead(config(head="pixel")).eval()
    (last,) = maps(1, 2, 3)
    weight, bias = head.classifier.weight[:, :, 0, 0].view(5, 16, 16, 32), head.classifier.bias.view(5, 16, 16)
    logits = head([last])
    assert logits.shape == (2, 5, 32, 48)
    for row, column, i, j in ((0, 0, 0, 0), (1, 2, 3, 15), (0, 2, 15, 0)):
        expected = last[:, :, row, column] @ weight[:, i, j].T + bias[:, i, j]
        torch.testing.assert_close(logits[:, :, 16 * row + i, 16 * column + j], expected)


# 512 pixels at patch 16 are 32 cells; the logits stay there, or are four times finer with the pyramid
@pytest.mark.parametrize(("pyramid", "size"), [(False, (32, 32)), (True, (128, 128))])
def test_fpn_logits_of_a_512_image(pyramid: bool, size: tuple[int, int]) -> None:
    head = FPNHead(config(pyramid=pyramid)).eval()
    assert head(maps(4, 32, 32)).shape == (2, 5, *size)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 7), (1, 1)])
@pytest.mark.parametrize("pyramid", [False, True])
def test_fpn_takes_any_grid(grid: tuple[int, int], pyramid: bool) -> None:
    head = FPNHead(config(pyramid=pyramid)).eval()
    finer = 4 if pyramid else 1
    assert head(maps(4, *grid)).shape == (2, 5, finer * grid[0], finer * grid[1])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("pyramid", [False, True])
def test_fpn_of_a_shallow_vit_has_fewer_levels(layers: int, pyramid: bool) -> None:
    shallow = config(layers, pyramid=pyramid)
    assert len(shallow.out_indices) == layers
    head = FPNHead(shallow)
    logits = head(maps(layers, 4, 6))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_fpn_refuses_more_than_four_taps() -> None:
    with pytest.raises(ValueError, match=r"5 taps given.*up to 4.*`out_indices`"):
        FPNHead(config(out_indices=[1, 2, 3, 4, 5]))


def test_feature_pyramid_adds_top_down_and_is_linear() -> None:
    fpn = FeaturePyramid(32, 16, 3)
    assert not [module for module in fpn.modules() if isinstance(module, nn.BatchNorm2d | nn.ReLU)]
    levels = [torch.randn(1, 32, 8, 12), torch.randn(1, 32, 4, 6), torch.randn(1, 32, 2, 3)]
    top = fpn.lateral[2](levels[2])
    middle = fpn.lateral[1](levels[1]) + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
    bottom = fpn.lateral[0](levels[0]) + middle.repeat_interleave(2, 2).repeat_interleave(2, 3)
    outputs = fpn(levels)
    for output, conv, merged in zip(outputs, fpn.output, (bottom, middle, top), strict=True):
        torch.testing.assert_close(output, conv(merged))


def test_rescaling_pyramid_sizes() -> None:
    pyramid = RescalingPyramid(32, 4).eval()
    sizes = [tuple(level.shape) for level in pyramid(maps(4, 6, 4))]
    assert sizes == [(2, 32, 24, 16), (2, 32, 12, 8), (2, 32, 6, 4), (2, 32, 3, 2)]
    level = maps(4, 6, 4)[3]
    assert torch.equal(pyramid[3](level), F.max_pool2d(level, 2))
    kinds = [type(layer) for layer in pyramid[0]]
    assert kinds == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.GELU, nn.ConvTranspose2d]


def test_fpn_head_steps_follow_the_nominal_strides() -> None:
    head = FPNHead(config())
    convolutions = [[m for m in level if isinstance(m, nn.Conv2d)] for level in head.scale_heads]
    doublings = [[m for m in level if isinstance(m, nn.Upsample)] for level in head.scale_heads]
    assert [len(level) for level in convolutions] == [1, 1, 2, 3]
    assert [len(level) for level in doublings] == [0, 1, 2, 3]
    assert all(conv.kernel_size == (3, 3) for level in convolutions for conv in level)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == 7


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("pyramid", "grid"), [(False, (4, 6)), (False, (5, 3)), (False, (1, 1)), (True, (4, 6)), (True, (3, 5))]
)
def test_fpn_head_sums_its_levels(training: bool, pyramid: bool, grid: tuple[int, int]) -> None:
    """What is left out as without effect has none: not on the logits, not on gradients, not on running averages."""
    torch.manual_seed(0)
    fast = FPNHead(config(pyramid=pyramid, head_dropout=0.0)).train(training)
    plain = copy.deepcopy(fast)
    inputs = maps(4, *grid)
    levels = plain.fpn(inputs if plain.pyramid is None else plain.pyramid(inputs))
    total = plain.scale_heads[0](levels[0])
    for scale_head, level in zip(plain.scale_heads[1:], levels[1:], strict=True):
        total = total + F.interpolate(scale_head(level), size=total.shape[-2:], mode="bilinear", align_corners=False)
    expected, logits = plain.classifier(total), fast(inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for output in (logits, expected):
        output.square().sum().backward()
    for (name, parameter), other in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
    for buffer, other in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


@pytest.mark.parametrize("head_class", [LinearHead, FPNHead])
def test_dropout_only_in_training(head_class: type[LinearHead] | type[FPNHead]) -> None:
    torch.manual_seed(0)
    head = head_class(config(head_dropout=0.5))
    assert head.dropout.p == 0.5
    head.eval()
    assert torch.equal(head(maps(4, 4, 6)), head(maps(4, 4, 6)))
    head.dropout.train()
    assert not torch.equal(head(maps(4, 4, 6)), head(maps(4, 4, 6)))
