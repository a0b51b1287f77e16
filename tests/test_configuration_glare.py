import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tiny_models import tiny_config
from transformers import AutoConfig

from glare import GlareConfig


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (5, [1, 2, 3, 4]), (2, [0, 1]), (1, [0])]
)
def test_default_taps(depth: int, taps: list[int], make_vit_config: Callable[..., Any]) -> None:
    config = GlareConfig(backbone_config=make_vit_config(num_hidden_layers=depth))
    assert config.out_indices == taps
    assert config.out_features == [f"stage{block + 1}" for block in taps]


def test_configuration_round_trip(family: str, make_vit_config: Callable[..., Any], tmp_path: Path) -> None:
    config = GlareConfig(
        backbone_config=make_vit_config(family),
        adapter_config=LoraConfig(r=4, target_modules=["o_proj", "fc1"]).to_dict(),
        head="linear",
        out_features=["stage2"],
        id2label={0: "water", 1: "land"},
    )
    config.save_pretrained(tmp_path)
    for loaded in (GlareConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GlareConfig
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.adapter_config["peft_type"] == "LORA"
        assert loaded.adapter_config["target_modules"] == ["fc1", "o_proj"]
        assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.patch_size) == (32, 3, 4)


def test_stage_names_follow_the_vit(make_vit_config: Callable[..., Any]) -> None:
    fields = GlareConfig(backbone_config=make_vit_config(num_hidden_layers=2)).to_dict()
    deeper = GlareConfig(**(fields | {"backbone_config": make_vit_config(num_hidden_layers=4)}))
    assert deeper.stage_names == ["stage1", "stage2", "stage3", "stage4"]


def test_configuration_defaults() -> None:
    config = GlareConfig()
    assert (config.backbone_config.model_type, config.patch_size, config.adapter_config) == ("vit", 16, None)
    assert (config.head, config.fpn_channels, config.head_channels, config.pyramid) == ("fpn", 256, 128, False)
    assert (config.head_dropout, config.ignore_index, config.num_labels) == (0.1, 255, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "upernet"}, "head='upernet' given; choose 'linear', 'pixel' or 'fpn'"),
        ({"head_dropout": 1.0}, "head_dropout=1.0 given"),
        ({"adapter_config": {"r": 4}}, r"no `peft_type`.*`to_dict\(\)`"),
        ({"backbone_config": {"hidden_size": 32}}, r"no `model_type`.*'vit', 'deit' or 'dinov2'"),
        ({"backbone_config": {"model_type": "vit", "patch_size": [4, 8]}}, "only square patches"),
        ({"out_indices": [12]}, "out_indices must be valid indices"),
        ({"out_features": ["stem"]}, "out_features must be a subset"),
    ],
)
def test_bad_configurations_say_what_to_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlareConfig(**fields)


def test_no_folder_of_this_machine_is_written_down(tmp_path: Path) -> None:
    def written(name: str) -> dict[str, Any]:
        vit = tiny_config()
        vit._name_or_path = name
        GlareConfig(backbone_config=vit).save_pretrained(tmp_path / "saved")
        backbone: dict[str, Any] = json.loads((tmp_path / "saved" / "config.json").read_text())["backbone_config"]
        return backbone

    assert "_name_or_path" not in written(str(tmp_path))
    assert written("facebook/dinov2-small")["_name_or_path"] == "facebook/dinov2-small"
