import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from tiny_models import WHOLE_BLOCKS, adapter_layers, tokens, train_a_little
from transformers import PreTrainedModel, ViTForImageClassification

from glare import UniAdapterConfig, uniadapter
from glare.uniadapter import default_target_modules

# PEFT asks transformers 5.23 for a property that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeVit = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("targets", [None, WHOLE_BLOCKS], ids=["attention", "block"])
def test_disable_and_unload_give_the_base_back(
    family: str, targets: str | None, make_vit: MakeVit, images: torch.Tensor
) -> None:
    vit = make_vit(family)
    untouched = copy.deepcopy(vit)
    before = tokens(vit, images)
    model = get_peft_model(vit, UniAdapterConfig(r=4, target_modules=targets)).eval()
    train_a_little(model)
    adapted = tokens(model, images)
    assert not torch.equal(adapted, before)
    with model.disable_adapter():
        assert torch.equal(tokens(model, images), before)
    assert torch.equal(tokens(model, images), adapted)
    bare = model.unload()
    assert bare is vit
    assert [name for name, _ in bare.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert torch.equal(tokens(bare, images), before)
    again = get_peft_model(bare, UniAdapterConfig(r=4, target_modules=targets)).eval()
    assert torch.equal(tokens(again, images), before)


def test_several_adapters(make_vit: MakeVit, images: torch.Tensor) -> None:
    model = get_peft_model(make_vit("vit"), UniAdapterConfig(r=4), adapter_name="one").eval()
    base = tokens(model, images)
    model.add_adapter("two", UniAdapterConfig(r=6, scale=0.2))
    train_a_little(model, adapter="one", seed=1)
    train_a_little(model, adapter="two", seed=2)
    one = tokens(model, images)
    assert {p.requires_grad for n, p in model.named_parameters() if ".one." in n} == {True}
    assert {p.requires_grad for n, p in model.named_parameters() if ".two." in n} == {False}
    model.set_adapter("two")
    two = tokens(model, images)
    assert not torch.equal(one, two)

    # both at once: the terms add up
    model.base_model.set_adapter(["one", "two"])
    both = tokens(model, images)
    assert not torch.equal(both, one)
    assert not torch.equal(both, two)
    layer = adapter_layers(model)[0]
    y = torch.randn(3, 32)
    terms = []
    for name in ("one", "two"):
        down, up = layer.uniadapter_down[name], layer.uniadapter_up[name]
        terms.append(up(layer.scale[name] * torch.relu(down(y))))
    torch.testing.assert_close(layer.adapt(y), y + terms[0] + terms[1])

    model.base_model.set_adapter("two")
    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    assert not [name for name, _ in model.named_parameters() if ".one." in name]
    assert torch.equal(tokens(model, images), two)
    assert torch.equal(tokens(model.unload(), images), base)


def test_a_second_adapter_elsewhere_waits_for_its_turn(make_vit: MakeVit, images: torch.Tensor) -> None:
    model = get_peft_model(make_vit("vit"), UniAdapterConfig(r=4), adapter_name="one").eval()
    train_a_little(model)
    one = tokens(model, images)
    model.add_adapter("two", UniAdapterConfig(r=4, target_modules=["fc1"]))
    train_a_little(model, adapter="two")
    assert torch.equal(tokens(model, images), one)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".one." in name}
    model.set_adapter("two")
    assert not torch.equal(tokens(model, images), one)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".two." in name}


def test_copies_are_independent(make_vit: MakeVit, images: torch.Tensor) -> None:
    for targets in (None, WHOLE_BLOCKS):
        student = get_peft_model(make_vit("vit"), UniAdapterConfig(r=4, target_modules=targets)).eval()
        train_a_little(student, seed=1)
        teacher = copy.deepcopy(student)
        kept = tokens(student, images)
        train_a_little(student, seed=2)
        assert torch.equal(tokens(teacher, images), kept)
        assert not torch.equal(tokens(student, images), kept)


def test_merging_is_refused_and_harms_nothing(make_vit: MakeVit, images: torch.Tensor) -> None:
    config = UniAdapterConfig(r=4, modules_to_save=["patch_embeddings"])  # replaced first when unloading
    model = get_peft_model(make_vit("vit"), config).eval()
    train_a_little(model)
    modules = [name for name, _ in model.named_modules()]
    before = tokens(model, images)
    layer = adapter_layers(model)[0]
    for refused in (
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        model.merge_adapter,
        model.unmerge_adapter,
        layer.merge,
    ):
        with pytest.raises(ValueError, match=r"cannot be merged: its ReLU.*`unload\(\)`.*`peft.LoraConfig`"):
            refused()
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(tokens(model, images), before)
    blocks = get_peft_model(make_vit("vit"), UniAdapterConfig(r=4, target_modules=WHOLE_BLOCKS))
    with pytest.raises(ValueError, match="cannot be merged"):
        adapter_layers(blocks)[0].unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)


def test_lora_takes_its_place_and_merges(make_vit: MakeVit, images: torch.Tensor) -> None:
    vit = make_vit("vit")
    config = LoraConfig(r=4, target_modules=default_target_modules(vit), init_lora_weights=False)
    model = get_peft_model(vit, config).eval()
    adapted = tokens(model, images)
    torch.testing.assert_close(tokens(model.merge_and_unload(), images), adapted)


# saving and loading


def test_saved_keys_are_pinned(make_vit: MakeVit, tmp_path: Path) -> None:
    model = get_peft_model(make_vit("vit", num_hidden_layers=2), UniAdapterConfig(r=4))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "base_model.model.layers.0.attention.o_proj.uniadapter_down.bias": (4,),
        "base_model.model.layers.0.attention.o_proj.uniadapter_down.weight": (4, 32),
        "base_model.model.layers.0.attention.o_proj.uniadapter_up.bias": (32,),
        "base_model.model.layers.0.attention.o_proj.uniadapter_up.weight": (32, 4),
        "base_model.model.layers.1.attention.o_proj.uniadapter_down.bias": (4,),
        "base_model.model.layers.1.attention.o_proj.uniadapter_down.weight": (4, 32),
        "base_model.model.layers.1.attention.o_proj.uniadapter_up.bias": (32,),
        "base_model.model.layers.1.attention.o_proj.uniadapter_up.weight": (32, 4),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    fields = ("peft_type", "r", "scale", "use_bias", "target_modules")
    assert [config[name] for name in fields] == ["UNIADAPTER", 4, 0.1, True, ["attention.o_proj"]]
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), UniAdapterConfig)


@pytest.mark.parametrize("targets", [None, WHOLE_BLOCKS], ids=["attention", "block"])
def test_every_way_to_load_gives_the_same_bits(
    family: str, targets: str | None, make_vit: MakeVit, images: torch.Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(make_vit(family), UniAdapterConfig(r=4, target_modules=targets)).eval()
    train_a_little(model)
    expected = tokens(model, images)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_vit(family), str(tmp_path))
    assert torch.equal(tokens(loaded, images), expected)

    meta = PeftModel.from_pretrained(make_vit(family), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(tokens(meta, images), expected)

    vit = make_vit(family)
    vit.load_adapter(str(tmp_path))
    assert torch.equal(tokens(vit, images), expected)


def test_add_adapter_of_transformers(make_vit: MakeVit, images: torch.Tensor, tmp_path: Path) -> None:
    vit = make_vit("dinov2")
    before = tokens(vit, images)
    vit.add_adapter(UniAdapterConfig(r=4), adapter_name="first")
    with pytest.warns(UserWarning, match="multiple adapters"):  # PEFT's reminder
        vit.add_adapter(UniAdapterConfig(r=8), adapter_name="second")
    assert torch.equal(tokens(vit, images), before)
    train_a_little(vit)
    second = tokens(vit, images)
    assert vit.active_adapters() == ["second"]
    vit.save_pretrained(tmp_path)
    vit.disable_adapters()
    assert torch.equal(tokens(vit, images), before)
    vit.enable_adapters()
    vit.set_adapter("first")
    first = tokens(vit, images)
    assert not torch.equal(first, second)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        vit.delete_adapter("first")
    assert torch.equal(tokens(vit, images), second)

    loaded = PeftModel.from_pretrained(make_vit("dinov2"), str(tmp_path))
    assert torch.equal(tokens(loaded, images), second)


def test_a_second_copy_of_the_file_leaves_the_first_in_charge(make_vit: MakeVit, images: torch.Tensor) -> None:
    # as when remote code is loaded where glare is installed
    spec = importlib.util.spec_from_file_location("second_copy", uniadapter.__file__)
    assert spec is not None
    assert spec.loader is not None
    second = importlib.util.module_from_spec(spec)
    sys.modules["second_copy"] = second
    try:
        spec.loader.exec_module(second)
        assert PEFT_TYPE_TO_CONFIG_MAPPING["UNIADAPTER"] is UniAdapterConfig
        vit = make_vit("vit")
        before = tokens(vit, images)
        model = get_peft_model(vit, second.UniAdapterConfig(r=4)).eval()
        model.add_adapter("other", UniAdapterConfig(r=4))
        assert len(adapter_layers(model)) == 3
        train_a_little(model)
        assert torch.equal(tokens(model.unload(), images), before)
    finally:
        del sys.modules["second_copy"]


def test_inject_adapter_in_model(make_vit: MakeVit, images: torch.Tensor) -> None:
    vit = make_vit("vit")
    before = tokens(vit, images)
    assert inject_adapter_in_model(UniAdapterConfig(r=4), vit) is vit
    assert len(adapter_layers(vit)) == 3
    assert torch.equal(tokens(vit, images), before)
    keys = get_peft_model_state_dict(vit)
    assert "layers.0.attention.o_proj.uniadapter_up.weight" in keys


def test_a_new_head_is_saved_with_the_adapter(make_vit_config: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = ViTForImageClassification(make_vit_config("vit", num_labels=5)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    model = get_peft_model(copy.deepcopy(base), UniAdapterConfig(r=4, modules_to_save=["classifier"])).eval()
    train_a_little(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(2)
        expected = model(pixels).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        assert torch.equal(loaded(pixels).logits, expected)
