"""The plain way of a step is the package's own in every number."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.builders import noise_image, packed
from reference.glare_cases import randomise
from test_no_class_token import tiny_ijepa
from tiny_models import FAMILIES, adapted_model, tiny_vit, train_a_little
from torch import Tensor, nn

from glare.backbones import adapt
from glare.draws import Draws
from glare.modeling_glare import GlareModel
from glare.objectives.base import Terms
from glare.objectives.glare import GlareObjective, GlareSettings
from glare.plain_step import (
    PlainState,
    anchor_term,
    loss_terms,
    plain_step,
    student_features,
    teacher_features,
)
from glare.pretrain import PretrainRecipe
from glare.pretrain_plan import Plan
from glare.pretrain_step import OBJECTIVE, train_step
from glare.regions import RegionConfig
from glare.runtime import Clock, make_accelerator, seeded
from glare.student import Student
from glare.teacher import averaged_parameters, make_teacher
from glare.train_state import TrainState
from glare.views import Normalisation, ViewConfig, Views, make_views
from glare.weight_decay import parameter_groups

TEMPERATURE = 0.06
SETTINGS = GlareSettings(prototypes=24, head_hidden=16, head_bottleneck=8, regions=RegionConfig(min_side=1, max_side=3))


def in_blocks() -> GlareModel:
    model = adapt(GlareModel.from_backbone(tiny_vit()), "uniadapter", rank=4, scale=1.0, place="block")
    train_a_little(model)
    return model


MODELS: dict[str, Callable[[], GlareModel]] = {
    **{family: lambda family=family: adapted_model(tiny_vit(family)) for family in FAMILIES},
    "no-class-token": lambda: adapted_model(tiny_ijepa()),
    "adapters-after-blocks": in_blocks,
    "lora": lambda: adapted_model(tiny_vit("dinov2"), "lora"),
    "full": lambda: adapted_model(tiny_vit("dinov3_vit"), "full"),
}


def make_batch(**changes: Any) -> Views:
    """Four images, two of whose views have no changed patches; global views of 6 x 6 patches, local ones of 2 x 2."""
    config = ViewConfig(num_local=3, global_size=24, local_size=8, global_area=(0.5, 1.0), patch_prob=0.7)
    sizes = [(60, 40), (33, 50), (64, 64), (20, 30)]
    return make_views(
        packed([noise_image(*size, seed) for seed, size in enumerate(sizes)]),
        torch.arange(4),
        replace(config, **changes),
        patch_size=4,
        normalise=Normalisation(),
        draws=Draws(torch.Generator().manual_seed(0), 4),
    )


def apart(views: Views) -> Views:
    """The same with global views that have no place in common."""
    crops = views.global_crops
    crops.offset.copy_(torch.tensor([[0.0, 0.0], [0.5, 0.5]]).unsqueeze(1).expand(2, 4, 2))
    crops.scale.fill_(0.4)
    return views


@pytest.fixture
def batch() -> Views:
    return make_batch()


def networks(model: GlareModel, settings: GlareSettings = SETTINGS) -> tuple[Student, Student]:
    """A student whose adapters, heads and centres have random values, and a teacher that has moved away from it."""
    objective = GlareObjective(32, 2, settings)
    randomise(objective, 1)
    anchor = 0.5 if model.config.adapter_config is not None else 0.0
    student = Student(model.backbone, objective, mask_token=False, anchor=anchor)
    teacher = make_teacher(student)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, ours, _ in averaged_parameters(teacher, student):
            ours.add_(0.1 * torch.randn(ours.shape, generator=generator))
    return student, teacher


def plain(student: Student, teacher: Student) -> PlainState:
    return PlainState.of(student, teacher, learning_rate=1e-3, weight_decay=0.1)


def own_terms(student: Student, teacher: Student, views: Views) -> Terms:
    features = teacher.target_features(views)
    places = student.objective.places(features, views, Draws(seeded(3), 4))
    return student(views, features, places, counts=places.counts(), target=teacher, temperature=TEMPERATURE)


def plain_terms(state: PlainState, views: Views) -> Terms:
    target, features = teacher_features(state.teacher, views), student_features(state.student, views)
    terms = loss_terms(state, features, target, views, temperature=TEMPERATURE, draws=Draws(seeded(3), 4))
    if state.student.anchor:
        terms.losses["anchor"] = anchor_term(state.student, features[0], views)
    return terms


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")


def assert_same_loss(student: Student, teacher: Student, views: Views) -> Terms:
    """Terms, batch sums and the gradient of everything that trains; returns the package's own terms."""
    state = plain(student, teacher)
    own, ours = own_terms(student, teacher, views), plain_terms(state, views)
    assert list(own.losses) == list(ours.losses)
    for name, expected in own.losses.items():
        assert_close(ours.losses[name], expected, name)
    assert own.batch_sums.keys() == ours.batch_sums.keys()
    for level, (total, rows) in own.batch_sums.items():
        assert_close(ours.batch_sums[level][0], total, level)
        assert ours.batch_sums[level][1] == rows, level
    own.total.backward()
    ours.total.backward()
    pairs = [
        *zip(student.backbone.named_parameters(), state.student.backbone.parameters(), strict=True),
        *zip(student.objective.named_parameters(), state.student.objective.parameters(), strict=True),
    ]
    for (name, theirs), parameter in pairs:
        assert (parameter.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert_close(parameter.grad, theirs.grad, name)
    assert sum(theirs.grad is not None for (_, theirs), _ in pairs) > 15
    return own


@pytest.mark.parametrize("name", MODELS)
def test_terms_sums_and_gradients_are_the_packages(name: str, batch: Views) -> None:
    student, teacher = networks(MODELS[name]())
    own = assert_same_loss(student, teacher, batch)
    assert all(value > 0.01 for value in own.losses.values())
    assert {"glob", "reg", "loc1", "loc2"} <= own.losses.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"terms": ("glob", "loc1")},
        {"terms": ("loc2",)},
        {"terms": ("reg",)},
        {"min_overlap": 0.5},
        {"regions": RegionConfig(count=1, min_side=2, max_side=4, anchor="centre")},
        {"regions": RegionConfig(count=3, sampling="random", min_side=1, max_side=2)},
    ],
    ids=str,
)
def test_they_are_with_other_settings(changes: dict[str, Any], batch: Views) -> None:
    assert_same_loss(*networks(adapted_model(tiny_vit()), replace(SETTINGS, **changes)), batch)


@pytest.mark.parametrize(
    "views",
    [
        pytest.param(lambda: make_batch(num_local=0), id="no-local-views"),
        pytest.param(lambda: make_batch(patch_augmentation="none"), id="no-changed-patches"),
        pytest.param(lambda: apart(make_batch()), id="nothing-corresponds"),
    ],
)
def test_they_are_with_other_views(views: Callable[[], Views]) -> None:
    assert_same_loss(*networks(adapted_model(tiny_vit())), views())


def small_recipe(output: Path) -> PretrainRecipe:
    return PretrainRecipe(
        backbone="",
        data="",
        output=output,
        steps=3,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=0,
        momentum=0.9,
        momentum_end=0.9,
        teacher_temperature=(TEMPERATURE, TEMPERATURE),
        freeze_last_layer_steps=0,
        clip=0.3,
    )


@pytest.mark.parametrize("kind", ["uniadapter", "full"])
def test_whole_steps_lead_to_the_same_weights_averages_and_centres(kind: str, batch: Views, tmp_path: Path) -> None:
    student, teacher = networks(adapted_model(tiny_vit("dinov2"), kind))
    recipe = small_recipe(tmp_path)
    accelerator = make_accelerator(device="cpu", precision="fp32", report_to="none", output=tmp_path)
    plain_state = plain(student, teacher)
    before = {name: value.clone() for name, value in student.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.1), lr=1e-3)
    for group in (*optimizer.param_groups, *plain_state.optimizer.param_groups):
        group["eps"] = 1e-3  # with AdamW's 1e-8 a gradient of nothing but rounding makes a whole step
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    state = TrainState(student, teacher, optimizer)
    for step in range(3):
        own, _ = train_step(state, wrapped, batch, Plan.of(recipe), accelerator, step=step, clock=Clock())
        ours = plain_step(
            plain_state,
            batch,
            temperature=TEMPERATURE,
            momentum=0.9,
            clip=0.3,
            draws=Draws(seeded(0, step, OBJECTIVE), 4),
        )
        assert_close(ours.total, own.total, f"loss at step {step}")
    for part, copy in ((student, plain_state.student), (teacher, plain_state.teacher)):
        theirs = copy.state_dict()
        assert theirs.keys() == part.state_dict().keys()
        for name, value in part.state_dict().items():
            assert_close(theirs[name], value, name)
    moved = [name for name, value in student.named_parameters() if not torch.equal(value, before[name])]
    assert {name for name, value in student.named_parameters() if value.requires_grad} >= set(moved)
    assert len(moved) > 20
    assert all(parameter.grad is None for parameter in plain_state.student.parameters())


def addresses(*modules: nn.Module) -> list[int]:
    return [
        value.data_ptr() for module in modules for value in (*module.parameters(), *module.buffers()) if value.numel()
    ]


def test_nothing_is_shared() -> None:
    student, teacher = networks(adapted_model(tiny_vit()))
    state = plain(student, teacher)
    copies = addresses(state.student, state.teacher)
    assert len(copies) == len(set(copies)) > 100
    assert not set(copies) & set(addresses(student, teacher))


def test_the_package_s_networks_stay_as_they_were(batch: Views) -> None:
    student, teacher = networks(adapted_model(tiny_vit()))
    before = own_terms(student, teacher, batch).losses
    plain_step(plain(student, teacher), batch, temperature=0.04, momentum=0.5, clip=3.0, draws=Draws(seeded(0), 4))
    after = own_terms(student, teacher, batch).losses
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert student.backbone.config._attn_implementation == "glare_packed"


def test_the_teacher_is_computed_without_gradients(batch: Views) -> None:
    state = plain(*networks(adapted_model(tiny_vit(), "full")))
    features = teacher_features(state.teacher, batch)
    assert features.attention is not None and features.attention.shape == (2, 4, 2, 36)
    assert not features.patches.requires_grad
    plain_step(state, batch, temperature=TEMPERATURE, momentum=0.9, clip=3.0, draws=Draws(seeded(0), 4))
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())


def test_under_autocast_the_loss_is_about_the_same_and_weights_stay_float32(batch: Views) -> None:
    student, teacher = networks(adapted_model(tiny_vit()))
    whole, half = (
        plain_step(
            plain(student, teacher),
            batch,
            temperature=TEMPERATURE,
            momentum=0.9,
            clip=3.0,
            draws=Draws(seeded(0), 4),
            dtype=dtype,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, value in whole.losses.items():
        assert half.losses[name].dtype == torch.float32
        assert half.losses[name].item() == pytest.approx(value.item(), rel=0.1), name
        assert half.losses[name] != value, name


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"region_target": "udi"}, "region_target 'udi'"), ({"local_queries": True}, "local_queries")],
)
def test_what_the_plain_way_lacks_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plain(*networks(adapted_model(tiny_vit()), replace(SETTINGS, **changes)))


def test_it_has_no_mask_token() -> None:
    student = Student(tiny_vit(), GlareObjective(32, 2, SETTINGS), mask_token=True)
    with pytest.raises(ValueError, match="mask token"):
        plain(student, make_teacher(student))
