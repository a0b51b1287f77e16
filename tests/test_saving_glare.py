import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from tiny_models import ADAPTERS, adapted_model, same_weights, segmenter, tokens
from torch import nn
from transformers import AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel

from glare import GlareBackbone, GlareConfig, GlareForSemanticSegmentation, GlareModel

# PEFT asks transformers 5.23 for a property that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeVit = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_saved_and_loaded_is_the_same(
    family: str, kind: str, make_vit: MakeVit, images: torch.Tensor, tmp_path: Path
) -> None:
    model = adapted_model(make_vit(family), kind)
    expected = tokens(model, images)
    model.save_pretrained(tmp_path / "once")
    for auto in (GlareModel, AutoModel):
        loaded, info = auto.from_pretrained(tmp_path / "once", output_loading_info=True)
        assert type(loaded) is GlareModel
        assert loaded.config.backbone_config is loaded.backbone.config
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert same_weights(loaded, model)
        assert torch.equal(tokens(loaded, images), expected)
    loaded.save_pretrained(tmp_path / "twice")
    assert same_weights(GlareModel.from_pretrained(tmp_path / "twice"), model)


def test_what_is_saved(make_vit: MakeVit, tmp_path: Path) -> None:
    segmenter(make_vit()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "configuration_glare.py",
        "modeling_glare.py",
        "segmentation_heads.py",
        "uniadapter.py",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_glare.GlareConfig",
        "AutoModel": "modeling_glare.GlareModel",
        "AutoBackbone": "modeling_glare.GlareBackbone",
        "AutoModelForSemanticSegmentation": "modeling_glare.GlareForSemanticSegmentation",
    }
    assert config["architectures"] == ["GlareForSemanticSegmentation"]
    assert config["backbone_config"]["model_type"] == "vit"
    assert config["adapter_config"]["peft_type"] == "UNIADAPTER"


def test_dtype(make_vit: MakeVit, tmp_path: Path) -> None:
    def dtypes(folder: Path, **options: Any) -> set[torch.dtype]:
        return {parameter.dtype for parameter in AutoModel.from_pretrained(folder, **options).parameters()}

    model = adapted_model(make_vit("dinov2"))
    model.save_pretrained(tmp_path / "float32")
    assert dtypes(tmp_path / "float32") == {torch.float32}
    assert dtypes(tmp_path / "float32", dtype=torch.float16) == {torch.float16}
    model.half().save_pretrained(tmp_path / "float16")
    assert dtypes(tmp_path / "float16") == {torch.float16}
    assert dtypes(tmp_path / "float16", dtype=torch.float32) == {torch.float32}
    AutoModel.from_pretrained(tmp_path / "float16").save_pretrained(tmp_path / "again")
    rebuilt = GlareModel(GlareConfig.from_pretrained(tmp_path / "again"))
    assert {parameter.dtype for parameter in rebuilt.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["uniadapter", "lora"])
def test_save_adapter(family: str, kind: str, make_vit: MakeVit, images: torch.Tensor, tmp_path: Path) -> None:
    model = adapted_model(make_vit(family), kind)
    expected = tokens(model, images)
    model.save_adapter(tmp_path, base_model="someone/some-vit")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "someone/some-vit"

    def output(vit: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return vit(images, interpolate_pos_encoding=True).last_hidden_state

    assert torch.equal(output(PeftModel.from_pretrained(make_vit(family), str(tmp_path))), expected)
    vit = make_vit(family)
    vit.load_adapter(str(tmp_path))
    assert torch.equal(output(vit), expected)
    assert torch.equal(tokens(model, images), expected)


def test_save_adapter_names_the_loaded_base(make_vit: MakeVit, tmp_path: Path) -> None:
    make_vit().save_pretrained(tmp_path / "vit")
    vit = AutoModel.from_pretrained(tmp_path / "vit")
    adapted_model(vit).save_adapter(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(tmp_path / "vit")


def test_save_adapter_without_adapters(make_vit: MakeVit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapters to save.*save_pretrained"):
        adapted_model(make_vit(), "full").save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("head", ["linear", "pixel", "fpn"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_segmenter_saved_and_loaded_is_the_same(
    family: str, kind: str, head: str, make_vit: MakeVit, images: torch.Tensor, tmp_path: Path
) -> None:
    model = segmenter(make_vit(family), kind, head=head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    with torch.no_grad():
        expected = model(images).logits
    assert expected.shape == ((2, 5, 16, 24) if head == "pixel" else (2, 5, 4, 6))
    model.save_pretrained(tmp_path)
    for auto in (GlareForSemanticSegmentation, AutoModelForSemanticSegmentation):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert same_weights(loaded, model)
        with torch.no_grad():
            assert torch.equal(loaded(images).logits, expected)


def test_the_bare_model_of_a_segmenter(
    make_vit: MakeVit, images: torch.Tensor, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    model = segmenter(make_vit("deit"))
    model.save_pretrained(tmp_path)
    for auto, expected in ((AutoModel, GlareModel), (GlareBackbone, GlareBackbone)):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is expected
        assert not any(info.values())
        assert same_weights(loaded, model.glare)
    assert not log.records
    assert torch.equal(tokens(AutoModel.from_pretrained(tmp_path), images), tokens(model.glare, images))


def test_a_fresh_head_on_a_saved_model(make_vit: MakeVit, tmp_path: Path) -> None:
    model = adapted_model(make_vit())
    model.save_pretrained(tmp_path)
    loaded, info = GlareForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert loaded.config.num_labels == loaded.head.classifier.out_channels == 7
    assert info["missing_keys"] == {name for name in loaded.state_dict() if name.startswith("head.")}
    assert not info["unexpected_keys"]
    assert same_weights(loaded.glare, model)
    assert torch.isfinite(loaded(torch.zeros(1, 3, 16, 16)).logits).all()
