"""Writes the checkpoints of a format that later versions must go on loading: ``python tests/pinned/write.py``.

Run once for each new ``configuration_glare.FORMAT``; what an earlier version has written is never written again.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, Dinov2Config, PreTrainedModel

from glare import GlareForSemanticSegmentation, GlareModel, UniAdapterConfig
from glare.configuration_glare import FORMAT

HERE = Path(__file__).parent


def vit() -> PreTrainedModel:
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )
    return AutoModel.from_config(config).eval()


def main() -> None:
    folder = HERE / f"format_{FORMAT}"
    folder.mkdir()
    torch.manual_seed(FORMAT)
    backbone = vit()
    backbone.save_pretrained(folder / "vit")
    model = GlareModel.from_backbone(backbone, UniAdapterConfig(r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "uniadapter_" in name:
                parameter.normal_(std=0.5)
    model.save_adapter(folder / "adapter", base_model="vit")
    labels = {0: "water", 1: "land", 2: "road"}
    segmenter = GlareForSemanticSegmentation.from_model(model, id2label=labels, fpn_channels=8, head_channels=8).eval()
    segmenter.save_pretrained(folder / "segmenter")
    for file in (folder / "segmenter").glob("*.py"):
        file.unlink()  # the package itself is what has to load it
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected = {
            "images": images,
            "tokens": model(images).last_hidden_state.contiguous(),
            "logits": segmenter(images).logits.contiguous(),
        }
    save_file(expected, folder / "expected.safetensors")
    shutil.rmtree(HERE / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    main()
