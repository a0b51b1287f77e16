"""Heads that turn the feature maps of a ViT into class logits.

The semantic FPN is that of the ViT fine-tuning configuration used by UDI, FLSL and SelfPatch: the tapped
blocks enter the FPN as they are, all at the stride of the patch; the head after it treats them as if they had
strides 4, 8, 16 and 32, and its logits have the size of the first level. With `pyramid` the maps get these
strides first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_glare import GlareConfig


class Classifier(nn.Conv2d):
    """A 1x1 convolution to the logits of the classes; a class of its own, for its initial weights."""

    def __init__(self, in_channels: int, num_labels: int) -> None:
        super().__init__(in_channels, num_labels, kernel_size=1)


class LinearHead(nn.Module):
    """Dropout and a 1x1 convolution on the last map it is given."""

    def __init__(self, config: GlareConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(config.head_dropout)
        self.classifier = Classifier(config.hidden_size, config.num_labels)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map [..., (b, d, h, w)] to logits (b, classes, h, w)."""
        logits: torch.Tensor = self.classifier(self.dropout(maps[-1]))
        return logits


class PixelHead(nn.Module):
    """Dropout and one linear layer from a token of the last map to the classes of every pixel of its patch.

    SimMIM's decoder with classes in place of colours.
    """

    def __init__(self, config: GlareConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.dropout = nn.Dropout2d(config.head_dropout)
        self.classifier = Classifier(config.hidden_size, config.num_labels * config.patch_size**2)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map [..., (b, d, h, w)] to logits (b, classes, patch h, patch w)."""
        return F.pixel_shuffle(self.classifier(self.dropout(maps[-1])), self.patch_size)


class RescalingPyramid(nn.ModuleList):
    """Rescale up to four maps of one size by 4, 2, 1 and 1/2 (mmsegmentation's Feature2Pyramid)."""

    def __init__(self, channels: int, levels: int) -> None:
        up4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
        )
        up2 = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        # ceil_mode keeps a map that is one patch wide; it changes nothing at even sizes
        half = nn.MaxPool2d(kernel_size=2, ceil_mode=True)
        super().__init__([up4, up2, nn.Identity(), half][:levels])

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map levels x (b, d, h, w) to (b, d, 4h, 4w), (b, d, 2h, 2w), (b, d, h, w), (b, d, h/2, w/2)."""
        return [rescale(level) for rescale, level in zip(self, maps, strict=True)]


class FeaturePyramid(nn.Module):
    """FPN without norm or activation: 1x1 laterals, top-down nearest addition, 3x3 outputs."""

    def __init__(self, in_channels: int, channels: int, levels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(in_channels, channels, kernel_size=1) for _ in range(levels))
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(levels))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map levels x (b, d, h_i, w_i) to levels x (b, channels, h_i, w_i)."""
        laterals = [conv(level) for conv, level in zip(self.lateral, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            size = laterals[i - 1].shape[-2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=size, mode="nearest")
        return [conv(level) for conv, level in zip(self.output, laterals, strict=True)]


class ScaleHead(nn.Sequential):
    """Bring a level of nominal stride 4 * 2**level to stride 4 in steps of convolution and doubling."""

    def __init__(self, in_channels: int, channels: int, level: int) -> None:
        layers: list[nn.Module] = []
        for step in range(max(1, level)):
            layers += [
                nn.Conv2d(in_channels if step == 0 else channels, channels, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            if level > 0:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        super().__init__(*layers)

    def forward(self, level: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Map (b, in_channels, h, w) to (b, channels, 2**level * h, 2**level * w), resized to `size` where given.

        Maps of one stride are doubled up to three times only to be made small again. If the last doubling came from a
        map an even number of times as fine as `size`, resizing that map gives the same, as both read the mean of the
        middle 2 x 2 cells; where these are few of all, evaluation computes no others.
        """
        if size is None:
            grown: torch.Tensor = super().forward(level)  # type: ignore[no-untyped-call]
            return grown
        *growing, conv, norm, relu, double = self
        assert isinstance(conv, nn.Conv2d)
        x = level
        for layer in growing:
            x = layer(x)
        times = x.shape[-1] // size[1]
        if times % 2 or x.shape[-2:] != (times * size[0], times * size[1]):
            return _resized(double(relu(norm(conv(x)))), size)
        if self.training or times == 2:
            return _resized(relu(norm(conv(x))), size)
        first = times // 2 - 2  # row and column that the kernel reads first, of every cell
        corners = (x[..., first + row :, first + column :] for row in (0, 1) for column in (0, 1))
        read = [relu(norm(F.conv2d(corner, conv.weight, stride=times))) for corner in corners]
        return torch.stack(read).mean(dim=0)


def _resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class FPNHead(nn.Module):
    """Semantic FPN: an FPN on the tapped blocks and the head of Kirillov et al. (2019) on its levels."""

    def __init__(self, config: GlareConfig) -> None:
        super().__init__()
        levels = len(config.out_indices)
        if levels > 4:
            raise ValueError(f"{levels} taps given; the FPN head takes up to 4: shorten `out_indices`.")
        self.pyramid = RescalingPyramid(config.hidden_size, levels) if config.pyramid else None
        self.fpn = FeaturePyramid(config.hidden_size, config.fpn_channels, levels)
        self.scale_heads = nn.ModuleList(
            ScaleHead(config.fpn_channels, config.head_channels, level) for level in range(levels)
        )
        self.dropout = nn.Dropout2d(config.head_dropout)
        self.classifier = Classifier(config.head_channels, config.num_labels)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map levels x (b, d, h, w) to logits (b, classes, h, w); 4h x 4w with the pyramid."""
        levels = self.fpn(maps if self.pyramid is None else self.pyramid(maps))
        total = self.scale_heads[0](levels[0])
        size = (total.shape[-2], total.shape[-1])
        for scale_head, level in zip(list(self.scale_heads)[1:], levels[1:], strict=True):
            total = total + scale_head(level, size)
        logits: torch.Tensor = self.classifier(self.dropout(total))
        return logits


HEADS: dict[str, type[LinearHead] | type[PixelHead] | type[FPNHead]] = {
    "linear": LinearHead,
    "pixel": PixelHead,
    "fpn": FPNHead,
}
