"""Random adapters: they turn the features as far as they are told to, by chance alone, and touch nothing else."""

import math
from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from tiny_models import WHOLE_BLOCKS, same_weights, tiny_vit, tokens
from torch import Tensor

from glare import GlareModel, UniAdapterConfig, UserError, controls
from glare.controls import find_factor, patch_tokens, random_adapters
from glare.uniadapter import default_target_modules

LIKE: dict[str, PeftConfig | None] = {
    "uniadapter": UniAdapterConfig(r=4, scale=1.0),
    "small scale": UniAdapterConfig(r=4, scale=0.01),
    "without biases": UniAdapterConfig(r=4, use_bias=False),
    "whole blocks": UniAdapterConfig(r=4, target_modules=WHOLE_BLOCKS),
    "lora": LoraConfig(r=4, target_modules=default_target_modules(tiny_vit("dinov2"))),
    "all weights": None,
}


def untouched(family: str = "dinov2") -> GlareModel:
    return GlareModel.from_backbone(tiny_vit(family))


def drawn(
    base: GlareModel, like: PeftConfig | None, images: Tensor, target: float, *, seed: int
) -> tuple[GlareModel, float]:
    return random_adapters(base, like, images, patch_tokens(base, images), target, seed=seed)


def literal_cosine(model: GlareModel, base: GlareModel, images: Tensor, *, prefix: int) -> float:
    ours, theirs = tokens(model, images).double(), tokens(base, images).double()
    cosines = [
        float(a @ b / (a.norm() * b.norm()))
        for first, second in zip(ours, theirs, strict=True)
        for a, b in zip(first[prefix:], second[prefix:], strict=True)
    ]
    assert len(cosines) == 2 * 4 * 6
    return sum(cosines) / len(cosines)


def in_adapters(name: str, *parts: str) -> bool:
    return any(part in name for part in parts or ("uniadapter_", "lora_"))


@pytest.mark.parametrize("target", [0.95, 0.5])
def test_the_cosine_is_reached_in_every_family(
    family: str, target: float, images: Tensor, prefix_tokens: dict[str, int]
) -> None:
    base = untouched(family)
    model, cosine = drawn(base, LIKE["uniadapter"], images, target, seed=0)
    assert abs(cosine - target) <= 0.002
    assert literal_cosine(model, base, images, prefix=prefix_tokens[family]) == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize("target", [0.9999, 0.84])
def test_the_cosine_is_reached_with_every_kind_of_adapter(kind: str, target: float, images: Tensor) -> None:
    base = untouched()
    model, cosine = drawn(base, LIKE[kind], images, target, seed=1)
    assert abs(cosine - target) <= min(0.002, (1 - target) / 10)
    assert literal_cosine(model, base, images, prefix=1) == pytest.approx(cosine, abs=1e-5)
    assert any(in_adapters(name, "lora_B" if kind == "lora" else "uniadapter_up") for name in model.state_dict())


@pytest.mark.parametrize("kind", LIKE)
def test_the_base_and_the_global_draws_are_as_before(kind: str, images: Tensor) -> None:
    base, like = untouched(), LIKE[kind]
    fields = None if like is None else like.to_dict()
    state = torch.get_rng_state()
    model, _ = drawn(base, like, images, 0.8, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(base, untouched()) and base.config.adapter_config is None
    assert (None if like is None else like.to_dict()) == fields
    inside = {
        name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if not in_adapters(name)
    }
    assert inside.keys() == base.state_dict().keys()
    for name, value in base.state_dict().items():
        assert torch.equal(inside[name], value), name
        assert inside[name].data_ptr() != value.data_ptr(), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["uniadapter", "whole blocks", "lora"])
def test_the_directions_come_from_the_seed(kind: str, images: Tensor) -> None:
    draws = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        draws.append(drawn(untouched(), LIKE[kind], images, 0.8, seed=seed)[0])
    assert same_weights(draws[0], draws[1])
    other = draws[2].state_dict()
    weights = {n: v for n, v in draws[0].state_dict().items() if in_adapters(n) and n.endswith("weight")}
    for name, value in weights.items():
        together = torch.stack([value.flatten(), other[name].flatten()])
        assert torch.corrcoef(together)[0, 1].abs() < 0.5, name


@pytest.mark.parametrize("kind", ["uniadapter", "lora"])
def test_only_the_up_projections_are_not_those_of_a_fresh_adapter(kind: str, images: Tensor) -> None:
    near, far = (drawn(untouched(), LIKE[kind], images, target, seed=0)[0] for target in (0.99, 0.3))
    changed = {name for name, value in near.state_dict().items() if not torch.equal(value, far.state_dict()[name])}
    ups = {name for name in near.state_dict() if in_adapters(name, *controls.UP_PROJECTIONS)}
    assert changed == ups and len(ups) == (6 if kind == "uniadapter" else 3)
    ratios = torch.cat([(far.state_dict()[name] / near.state_dict()[name]).flatten() for name in ups])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)
    values = torch.cat([far.state_dict()[name].flatten() for name in ups])
    values = values / values.std()
    assert abs(values.mean()) < 0.15 and abs((values.abs() < 1).float().mean() - 0.683) < 0.06  # a normal distribution
    width = 32
    for name, value in far.state_dict().items():
        if in_adapters(name, "uniadapter_down", "lora_A"):
            if name.endswith("bias"):
                assert not value.any()
            else:
                assert 0.8 / math.sqrt(width) < value.abs().max() <= 1 / math.sqrt(width)


@pytest.mark.parametrize("kind", LIKE)
def test_without_a_factor_the_features_are_the_untouched_ones(
    kind: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "find_factor", lambda cosine_at, _: (0.0, cosine_at(3.0)))
    model, cosine = drawn(untouched(), LIKE[kind], images, 1.0, seed=0)
    assert cosine < 0.999
    assert torch.equal(tokens(model, images), tokens(untouched(), images))


@pytest.mark.parametrize("target", [1.0, 1.0000001])
def test_an_adaptation_that_did_nothing_has_a_control_that_does_hardly_more(target: float, images: Tensor) -> None:
    model, cosine = drawn(untouched(), LIKE["uniadapter"], images, target, seed=0)
    assert 1 - cosine <= 1e-5
    assert any(value.any() for name, value in model.state_dict().items() if in_adapters(name, "uniadapter_up"))


@pytest.mark.parametrize("kind", ["uniadapter", "whole blocks", "lora"])
@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_a_cosine_out_of_reach_gives_a_model_with_numbers(kind: str, target: float, images: Tensor) -> None:
    model, cosine = drawn(untouched(), LIKE[kind], images, target, seed=0)
    assert math.isnan(target) or cosine < 0.2
    assert tokens(model, images).isfinite().all()


def test_adapters_without_up_projections_are_refused(images: Tensor) -> None:
    names = list(default_target_modules(tiny_vit("dinov2")))
    with pytest.raises(UserError, match=r"IA3Config given.*UniAdapterConfig or LoraConfig"):
        drawn(untouched(), IA3Config(target_modules=names, feedforward_modules=[]), images, 0.8, seed=0)


def counted(curve: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    asked: list[float] = []

    def wrapped(factor: float) -> float:
        asked.append(factor)
        return curve(factor)

    return wrapped, asked


@pytest.mark.parametrize("stretch", [5e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.99999, 0.9999, 0.99, 0.95, 0.84, 0.6, 0.3])
def test_the_search_takes_few_trials(stretch: float, target: float) -> None:
    def cosine_at(factor: float) -> float:  # of an angle that grows with the factor
        return 1 / math.hypot(1, factor / stretch)

    wrapped, asked = counted(cosine_at)
    factor, cosine = find_factor(wrapped, target)
    assert cosine == cosine_at(factor) and abs(cosine - target) <= min(0.002, max((1 - target) / 10, 1e-5))
    assert len(asked) <= 8


@pytest.mark.parametrize(
    ("curve", "target", "answer"),
    [
        (lambda _: 1.0, 0.5, 1.0),  # nothing moves the features
        (lambda factor: 0.2 + 0.8 * math.exp(-factor), 0.0, 0.2),  # saturates above the target
        (lambda factor: 0.2 + 0.8 * math.exp(-factor) if factor < 5 else math.nan, 0.205, 0.205),  # overflows
        (lambda factor: 1.0 if factor < 0.01 else math.nan, 0.5, 1.0),
        (lambda factor: 1.0 if factor < 0.7 else 0.1, 0.5, 0.1),  # a jump across the target
        (lambda factor: math.exp(-factor) * math.cos(9 * factor), 0.5, 0.5),  # does not fall steadily
        (lambda _: math.nan, 0.5, 1.0),
    ],
)
def test_the_search_ends_with_the_nearest(curve: Callable[[float], float], target: float, answer: float) -> None:
    wrapped, asked = counted(curve)
    factor, cosine = find_factor(wrapped, target)
    assert cosine == pytest.approx(answer, abs=0.002)
    assert len(asked) <= 16 and 0 <= factor <= 1e4
