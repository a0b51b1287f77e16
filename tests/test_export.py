"""Adapted models as plain checkpoints of transformers, by the command that people type."""

import json
from pathlib import Path

import pytest
import torch
from forks import Forks
from tiny_models import adapted_model, tiny_vit, tokens
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, Dinov2Model

from glare.errors import UserError
from glare.export import ExportRecipe, export


def test_lora_becomes_a_plain_checkpoint(images: Tensor, tmp_path: Path, forks: Forks) -> None:
    """That it needs no glare is the subject of test_hub_loading."""
    model = adapted_model(tiny_vit("dinov2"), "lora")
    expected = tokens(model, images)
    model.save_pretrained(tmp_path / "adapted")
    result = forks.run("export", "--model", "adapted", "--output", "plain", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Dinov2Model in plain" in result.stdout
    files = {file.name for file in (tmp_path / "plain").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "dinov2" and "auto_map" not in config
    assert AutoImageProcessor.from_pretrained(tmp_path / "plain").size == {"height": 16, "width": 16}

    vit, problems = AutoModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(vit) is Dinov2Model and not any(problems.values())
    torch.testing.assert_close(tokens(vit, images), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_folder_is_merged_into_its_base(images: Tensor, tmp_path: Path) -> None:
    tiny_vit("vit").save_pretrained(tmp_path / "vit")
    model = adapted_model(tiny_vit("vit"), "lora")
    model.save_adapter(tmp_path / "adapter", base_model=str(tmp_path / "vit"))
    vit = export(ExportRecipe(model=str(tmp_path / "adapter"), output=tmp_path / "plain"))
    torch.testing.assert_close(tokens(vit, images), tokens(model, images), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        tokens(AutoModel.from_pretrained(tmp_path / "plain", add_pooling_layer=False), images), tokens(vit, images)
    )


def test_a_bottleneck_is_refused_and_nothing_is_written(tmp_path: Path, forks: Forks) -> None:
    adapted_model(tiny_vit()).save_pretrained(tmp_path / "adapted")
    result = forks.run("export", "--model", "adapted", "--output", "plain", folder=tmp_path)
    assert result.returncode == 2
    assert "the adapters of 'adapted' cannot be merged" in result.stderr and "--adapter lora" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapted"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    adapted_model(tiny_vit(), "lora").save_pretrained(tmp_path / "adapted")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="used"):
        export(ExportRecipe(model=str(tmp_path / "adapted"), output=tmp_path / "used"))
    assert (tmp_path / "used" / "letter.txt").read_text() == "mine"
