import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, ViTForImageClassification

from glare import uniadapter
from glare.uniadapter import (
    UniAdapterBlock,
    UniAdapterConfig,
    UniAdapterLayer,
    UniAdapterLinear,
    default_target_modules,
    vit_blocks,
)

# PEFT asks transformers 5.23 for a property that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeVit = Callable[..., PreTrainedModel]
WHOLE_BLOCKS = r".*layers?\.\d+"


def tokens(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images, interpolate_pos_encoding=True).last_hidden_state


def train_a_little(model: nn.Module, *, seed: int = 0, adapter: str = "") -> None:
    """Stand for training: give the adapter's weights random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "uniadapter_" in name and adapter in name:
                parameter.normal_(std=0.5, generator=generator)


def layers(model: nn.Module) -> list[UniAdapterLayer]:
    return [module for module in model.modules() if isinstance(module, UniAdapterLayer)]


# the equation


@pytest.mark.parametrize("use_bias", [True, False])
def test_output_is_equation_3(use_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    layer = UniAdapterLinear(linear, "a", UniAdapterConfig(r=3, scale=0.3, use_bias=use_bias))
    train_a_little(layer)
    down, up = layer.uniadapter_down["a"], layer.uniadapter_up["a"]
    x = torch.randn(2, 7, 6)
    expected = torch.empty(2, 7, 5)
    for b in range(2):
        for t in range(7):
            y = linear.weight @ x[b, t] + linear.bias
            hidden = down.weight @ y + (down.bias if use_bias else 0)
            hidden = torch.stack([max(value, torch.tensor(0.0)) for value in hidden])
            expected[b, t] = y + 0.3 * (up.weight @ hidden) + (up.bias if use_bias else 0)
    torch.testing.assert_close(layer(x), expected)


def test_defaults_and_initial_values() -> None:
    config = UniAdapterConfig()
    assert (config.r, config.scale, config.use_bias, config.peft_type) == (64, 0.1, True, "UNIADAPTER")
    layer = UniAdapterLinear(nn.Linear(6, 32), "default", config)
    down, up = layer.uniadapter_down["default"], layer.uniadapter_up["default"]
    assert down.weight.shape == (64, 32)
    assert up.weight.shape == (32, 64)
    bound = 1 / math.sqrt(32)  # Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < down.weight.abs().max() <= bound
    assert not down.bias.any()
    assert not up.weight.any()
    assert not up.bias.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0 given.*at least 1, e\.g\. r=64"),
        ({"r": 2.5}, "r=2.5 given"),
        ({"r": True}, "r=True given"),
        ({"scale": math.nan}, r"scale=nan given.*finite.*scale=0\.1"),
        ({"scale": math.inf}, "scale=inf given"),
        ({"scale": "0.1"}, "scale='0.1' given"),
        ({"use_bias": "none"}, "use_bias='none' given.*True or False"),
    ],
)
def test_bad_fields_say_what_to_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniAdapterConfig(**fields)


# finding the modules


def test_targets_are_found_by_structure(family: str, make_vit: MakeVit) -> None:
    vit = make_vit(family)
    model = get_peft_model(vit, UniAdapterConfig(r=4))
    adapted = [name for name, module in vit.named_modules() if isinstance(module, UniAdapterLayer)]
    assert len(adapted) == len(vit_blocks(vit)) == 3
    assert all(name.endswith(".attention.o_proj") for name in adapted)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".uniadapter_" in name}
    assert len(trainable) == 3 * 4


def test_the_projection_is_found_whatever_its_name() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.ModuleDict({"norm": nn.LayerNorm(8), "mix": nn.Linear(8, 8), "drop": nn.Dropout()})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.mlp = nn.Linear(8, 8)

    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([Block(), Block()]))
    assert default_target_modules(model) == {"attention.out.mix"}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no list of blocks.*pass `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), UniAdapterConfig())


def test_a_module_without_dense_layer_is_refused(make_vit: MakeVit) -> None:
    with pytest.raises(ValueError, match=r"cannot adapt LayerNorm.*change `target_modules`"):
        get_peft_model(make_vit("vit"), UniAdapterConfig(target_modules=["layernorm_before"]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["fc1", "v_proj"]}, ["layers.{}.attention.v_proj", "layers.{}.mlp.fc1"]),
        ({"target_modules": r".*mlp\.fc\d"}, ["layers.{}.mlp.fc1", "layers.{}.mlp.fc2"]),
        ({"target_modules": ["fc2"], "exclude_modules": ["layers.1.mlp.fc2"]}, ["layers.{}.mlp.fc2"]),
        ({"target_modules": WHOLE_BLOCKS}, ["layers.{}"]),
    ],
)
def test_explicit_targets(fields: dict[str, Any], expected: list[str], make_vit: MakeVit) -> None:
    vit = make_vit("vit")
    get_peft_model(vit, UniAdapterConfig(r=4, **fields))
    names = [name for name, module in vit.named_modules() if isinstance(module, UniAdapterLayer)]
    blocks = [0, 2] if "exclude_modules" in fields else [0, 1, 2]
    assert names == [name.format(block) for block in blocks for name in expected]


# identity and precision


@pytest.mark.parametrize("targets", [None, WHOLE_BLOCKS], ids=["attention", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fresh_adapters_change_no_bit(
    family: str, dtype: torch.dtype, targets: str | None, make_vit: MakeVit, images: torch.Tensor
) -> None:
    vit = make_vit(family).to(dtype)
    before = tokens(vit, images.to(dtype))
    model = get_peft_model(vit, UniAdapterConfig(r=4, target_modules=targets)).eval()
    after = tokens(model, images.to(dtype))
    assert after.dtype == dtype
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fresh_adapters_change_no_bit_under_autocast(
    family: str, dtype: torch.dtype, make_vit: MakeVit, images: torch.Tensor
) -> None:
    vit = make_vit(family)
    with torch.autocast("cpu", dtype):
        before = tokens(vit, images)
        model = get_peft_model(vit, UniAdapterConfig(r=4)).eval()
        assert torch.equal(before, tokens(model, images))


def test_half_precision_models_get_float32_adapters(make_vit: MakeVit, images: torch.Tensor) -> None:
    vit = make_vit("vit").to(torch.bfloat16)
    model = get_peft_model(vit, UniAdapterConfig(r=4))
    train_a_little(model)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "uniadapter_" in name}
    assert dtypes == {torch.float32}
    output = model(images.bfloat16(), interpolate_pos_encoding=True).last_hidden_state
    assert output.dtype == torch.bfloat16
    output.float().sin().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    for targets in (None, WHOLE_BLOCKS):
        vit = make_vit("vit").to(torch.bfloat16)
        config = UniAdapterConfig(r=4, target_modules=targets)
        lean = get_peft_model(vit, config, autocast_adapter_dtype=False)
        assert {parameter.dtype for parameter in lean.parameters()} == {torch.bfloat16}


def test_the_block_reading_adapts_hidden_states_too(family: str, make_vit: MakeVit, images: torch.Tensor) -> None:
    vit = make_vit(family)
    options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
    with torch.no_grad():
        before = vit(images, **options).hidden_states  # installs the hooks of transformers first
        get_peft_model(vit, UniAdapterConfig(r=4, target_modules=WHOLE_BLOCKS))
        assert all(isinstance(block, UniAdapterBlock) for block in vit_blocks(vit))
        train_a_little(vit)
        outputs = vit(images, **options)
        norm = [child for child in vit.children() if isinstance(child, nn.LayerNorm)][-1]
        assert torch.equal(norm(outputs.hidden_states[-1]), outputs.last_hidden_state)
        # block 1 has seen nothing but its own adapter
        adapted = layers(vit)[0].adapt(before[1])
    assert torch.equal(outputs.hidden_states[1], adapted)
    assert not torch.equal(adapted, before[1])


# training


@pytest.mark.parametrize("targets", [None, WHOLE_BLOCKS], ids=["attention", "block"])
def test_training_moves_only_adapters(
    family: str, targets: str | None, make_vit: MakeVit, images: torch.Tensor
) -> None:
    vit = make_vit(family)
    frozen = {name: parameter.clone() for name, parameter in vit.named_parameters()}
    model = get_peft_model(vit, UniAdapterConfig(r=4, target_modules=targets)).train()
    fresh = get_peft_model_state_dict(copy.deepcopy(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the down projection moves once the up projection is no longer zero
        optimizer.zero_grad()
        model(images, interpolate_pos_encoding=True).last_hidden_state.sin().sum().backward()
        optimizer.step()
    for name, value in get_peft_model_state_dict(model).items():
        assert not torch.equal(value, fresh[name]), name
    unloaded = dict(model.unload().named_parameters())
    assert all(torch.equal(value, unloaded[name]) for name, value in frozen.items())


def test_gradient_checkpointing_gives_the_same_gradients(family: str, make_vit: MakeVit, images: torch.Tensor) -> None:
    def gradients(checkpointing: bool, targets: str | None) -> list[torch.Tensor]:
        vit = make_vit(family, pos_embed_rescale=None) if family == "dinov3_vit" else make_vit(family)
        if checkpointing:
            vit.activation_checkpointing_enable()
        model = get_peft_model(vit, UniAdapterConfig(r=4, target_modules=targets)).train()
        train_a_little(model)
        model(images, interpolate_pos_encoding=True).last_hidden_state.sin().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for targets in (None, WHOLE_BLOCKS):
        plain, checkpointed = gradients(False, targets), gradients(True, targets)
        assert len(plain) == 12
        assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


# life cycle


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
    layer = layers(model)[0]
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
    layer = layers(model)[0]
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
        layers(blocks)[0].unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)


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
        assert len(layers(model)) == 3
        train_a_little(model)
        assert torch.equal(tokens(model.unload(), images), before)
    finally:
        del sys.modules["second_copy"]


def test_inject_adapter_in_model(make_vit: MakeVit, images: torch.Tensor) -> None:
    vit = make_vit("vit")
    before = tokens(vit, images)
    assert inject_adapter_in_model(UniAdapterConfig(r=4), vit) is vit
    assert len(layers(vit)) == 3
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
