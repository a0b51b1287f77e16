import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny_models import WHOLE_BLOCKS, adapter_layers, tokens, train_a_little
from torch import nn
from transformers import PreTrainedModel

from glare import UniAdapterConfig
from glare.modeling_glare import vit_blocks
from glare.uniadapter import UniAdapterBlock, UniAdapterLayer, UniAdapterLinear, default_target_modules

# PEFT asks transformers 5.23 for a property that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeVit = Callable[..., PreTrainedModel]


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
        adapted = adapter_layers(vit)[0].adapt(before[1])
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
            getattr(vit, "activation_checkpointing_enable", vit.gradient_checkpointing_enable)()  # the newer name
        model = get_peft_model(vit, UniAdapterConfig(r=4, target_modules=targets)).train()
        train_a_little(model)
        model(images, interpolate_pos_encoding=True).last_hidden_state.sin().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for targets in (None, WHOLE_BLOCKS):
        plain, checkpointed = gradients(False, targets), gradients(True, targets)
        assert len(plain) == 12
        assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
