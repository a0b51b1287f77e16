"""SimMIM, one pixel at a time, in float64: what its encoder sees, what its decoder says and the loss of that."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def encode_masked(vit: PreTrainedModel, image: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """Patch tokens (patches, d) of one image (3, h, w) seen by a ViT of transformers, masked patches replaced."""
    embedded = vit.embeddings.patch_embeddings(image[None])[0]
    rows = [token if masked else row for row, masked in zip(embedded, mask.tolist(), strict=True)]
    tokens = torch.cat([vit.embeddings.cls_token[0], torch.stack(rows)]) + vit.embeddings.position_embeddings[0]
    hidden = tokens[None]
    for layer in vit.layers:
        hidden = layer(hidden)
    patches: Tensor = vit.layernorm(hidden)[0, 1:]
    return patches


def reconstruction_loss(
    features: Tensor, images: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *, patch: int
) -> Tensor:
    """The loss of images (n, 3, h, w) from patch tokens (n, patches, d); ``mask`` (n, patches).

    ``weight`` (3 p p, d) and ``bias`` are those of the 1x1 convolution. Pixel shuffle gives channel c, row i and column
    j of a patch the output c p p + i p + j.
    """
    n, channels, height, width = images.shape
    columns = width // patch
    loss, masked_pixels = torch.zeros((), dtype=torch.float64), 0
    for image in range(n):
        for y in range(height):
            for x in range(width):
                place = (y // patch) * columns + x // patch
                if not mask[image, place]:
                    continue
                masked_pixels += 1
                for c in range(channels):
                    row = c * patch * patch + (y % patch) * patch + x % patch
                    predicted = weight[row].double() @ features[image, place].double() + bias[row].double()
                    loss = loss + (images[image, c, y, x].double() - predicted).abs()
    return loss / (masked_pixels + 1e-5) / channels
