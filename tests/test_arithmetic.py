"""The arithmetic of a step against what torch counts in real steps of tiny models, and the models of time by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from reference.builders import noise_image, packed
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_flop_count
from transformers import AutoConfig, AutoModel, IJepaConfig, PreTrainedConfig

from glare import losses, recipes
from glare.arithmetic import Cluster, Rows, Shape, Work, arithmetic, efficiency, kept_bytes, reduced_bytes, ring_seconds
from glare.backbones import adapt
from glare.draws import Draws
from glare.features import Features, encode
from glare.geometry import match, random_resized_crops
from glare.modeling_glare import GlareModel
from glare.objectives import glare as objective_file
from glare.objectives.glare import GlareSettings
from glare.patch_augmentation import sample_patch_mask
from glare.pretrain import PretrainRecipe, make_student
from glare.pretrain_plan import Plan
from glare.pretrain_step import train_step
from glare.regions import RegionConfig, sample_regions
from glare.runtime import Clock, make_accelerator, seeded
from glare.student import Student, without_adapters
from glare.teacher import make_teacher
from glare.train_state import TrainState
from glare.views import Normalisation, ViewConfig, Views, make_views
from glare.weight_decay import parameter_groups

IMAGES = 2
VIT_S = Shape(blocks=12, width=384, mlp_width=1536, heads=6, patch=16, prefix=1)
CLUSTER = Cluster(gpus_per_node=4, intra_node=100e9, inter_node=10e9, latency=1e-3)
MASKED = {"patch_augmentation": "mask"}


def tiny_config(family: str = "vit", **fields: Any) -> PreTrainedConfig:
    """Of two blocks: the first is unlike all others."""
    return tiny_models.tiny_config(family, num_hidden_layers=2, **fields)


OTHER_LAYOUTS = {
    "swiglu": tiny_config("dinov2", use_swiglu_ffn=True, mlp_ratio=3),
    "gated": tiny_config("dinov3_vit", use_gated_mlp=True),
    "without class token": IJepaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    ),
}
RECIPE: dict[str, Any] = {
    "backbone": "",
    "data": "",
    "output": Path(),
    "rank": 4,
    "steps": 10,
    "batch_size": IMAGES,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "freeze_last_layer_steps": 1,
    "momentum": 0.9,
    "momentum_end": 1.0,
    "views": {"num_local": 3, "global_size": 20, "local_size": 8, "patch_prob": 1.0},
    "glare": {"prototypes": 48, "head_hidden": 24, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 3}},
}


def recipe_of(**changes: Any) -> PretrainRecipe:
    nested = {key: {**RECIPE[key], **changes.pop(key, {})} for key in ("views", "glare")}
    return recipes.from_dict(PretrainRecipe, {**RECIPE, **nested, **changes})


@dataclass
class Step:
    """A student on the point of its first step."""

    recipe: PretrainRecipe
    config: PreTrainedConfig
    student: Student
    teacher: Student
    views: Views

    @classmethod
    def of(cls, config: PreTrainedConfig, recipe: PretrainRecipe, images: int = IMAGES) -> "Step":
        torch.manual_seed(0)
        model = GlareModel.from_backbone(AutoModel.from_config(config), None)
        model = adapt(model, recipe.adapter, rank=recipe.rank, scale=1.0, place=recipe.adapter_place)
        student = make_student(model, recipe)
        views = make_views(
            packed([noise_image(50, 40, seed) for seed in range(images)]),
            torch.arange(images),
            recipe.views,
            patch_size=config.patch_size,
            normalise=Normalisation(),
            draws=Draws(seeded(0), images),
        )
        return cls(recipe, config, student, make_teacher(student), views)

    def encode(self) -> list[Features]:
        views, student = self.views, self.student
        groups = [views.augmented, views.local]
        return encode(student.backbone, groups, mask=views.patch_mask, mask_token=student.mask_token)

    def terms(self, student: tuple[Features, Features], teacher: Features) -> Tensor:
        target = self.teacher.objective
        places = self.student.objective.places(teacher, self.views, Draws(seeded(1), len(teacher.cls[0])))
        counts = places.counts()
        objective = partial(self.student.objective, counts=counts, target=target, temperature=0.04)
        return objective(student, teacher, places).total

    def clean(self) -> None:
        with torch.no_grad(), without_adapters(self.student.backbone):
            encode(self.student.backbone, [self.views.global_])

    def predicted(self, rows: Rows) -> Work:
        recipe = self.recipe
        shape = Shape.of(self.config, recipe)
        return arithmetic(shape, recipe.views, recipe.glare, rows, images=IMAGES, anchor=recipe.anchor > 0)


def flops(work: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call and its result: attention costs twice as much backward, products summed in place as others."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    def in_place(_sum: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
        return mm_flop(a, b)

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        aten.addmm_: in_place,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        result = work()
    return counter.get_total_flops(), result


@contextmanager
def counted_rows(step: Step) -> Iterator[tuple[list[int], list[int]]]:
    """While open, the pairs of each call of ``summed_cross_entropy``, and the rows of each of the student's head."""
    pairs: list[int] = []
    seen: list[int] = []

    def spy(student: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pairs.append(len(student))
        return losses.summed_cross_entropy(student, *args, **kwargs)

    def watch(_head: Any, inputs: tuple[Tensor]) -> None:
        seen.append(len(inputs[0].flatten(0, -2)))

    watched = step.student.objective.head.register_forward_pre_hook(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective_file, "summed_cross_entropy", spy)
        yield pairs, seen
    watched.remove()


def rows_of(calls: tuple[list[int], list[int]], terms: tuple[str, ...]) -> Rows:
    """Rows per image from those of the calls, which come in the order of the terms."""
    heads = [("glob", "glob" in terms), ("reg", "reg" in terms), ("local", "loc1" in terms or "loc2" in terms)]
    pairs = dict(zip([term for term in ("reg", "loc1", "loc2") if term in terms], calls[0], strict=True))
    seen = dict(zip([name for name, runs in heads if runs], calls[1], strict=True))
    numbers = [pairs.get(term, 0) for term in ("loc1", "loc2", "reg")] + [
        seen.get(name, 0) for name in ("local", "reg")
    ]
    return Rows(*(number / IMAGES for number in numbers))


def measured(step: Step) -> tuple[Work, Rows]:
    """FLOPs per image by phase, counted, and the rows."""
    teacher, target = flops(lambda: step.teacher.target_features(step.views))
    student, features = flops(step.encode)
    ours = [value for group in features for value in (group.cls, group.patches)]
    leaves = [value.detach().requires_grad_() for value in ours]
    pair = Features(*leaves[:2]), Features(*leaves[2:])
    with counted_rows(step) as calls:
        forward, loss = flops(lambda: step.terms(pair, target))
    differentiate, _ = flops(loss.backward)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    backward, _ = flops(lambda: torch.autograd.backward(ours, gradients))
    anchor = flops(step.clean)[0] if step.recipe.anchor else 0
    phases = (teacher, student, backward, forward + differentiate, anchor)
    return Work(*(phase / IMAGES for phase in phases)), rows_of(calls, step.recipe.glare.terms)


def assert_as_counted(config: PreTrainedConfig, **changes: Any) -> None:
    step = Step.of(config, recipe_of(**changes))
    expected, rows = measured(step)
    found = step.predicted(rows)
    assert rows.augmented * IMAGES == step.views.patch_mask.sum().item()
    assert rows.patches < rows.augmented + rows.matched and 0 < rows.region_patches < rows.region
    for phase in ("teacher", "student", "backward", "heads", "anchor"):
        assert getattr(found, phase) == pytest.approx(getattr(expected, phase)), phase


# FLOPs


def test_every_phase_of_every_family_is_as_counted(family: str) -> None:
    assert_as_counted(tiny_config(family), anchor=1.0)


@pytest.mark.parametrize("config", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_every_phase_of_other_layouts_is_as_counted(config: PreTrainedConfig) -> None:
    assert_as_counted(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_place": "block"},
        {"adapter": "full"},
        {"views": MASKED},
        {"views": MASKED, "adapter": "full"},
        {"glare": {"region_target": "udi"}},
        {"glare": {"region_target": "eq6", "regions": {"count": 5}}},
        {"glare": {"local_queries": True}},
    ],
    ids=str,
)
def test_every_setting_that_changes_the_products_is_as_counted(changes: dict[str, Any]) -> None:
    assert_as_counted(tiny_config(), **changes)


@pytest.mark.parametrize("chunk", [8, 1024])
def test_a_training_step_does_this_work_and_no_other(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK_LOGITS", chunk * RECIPE["glare"]["prototypes"])
    recipe = recipe_of(anchor=1.0)
    step = Step.of(tiny_config(), recipe)
    accelerator = make_accelerator(device="cpu", precision="fp32", report_to="none", output=Path())
    optimizer = accelerator.prepare(torch.optim.AdamW(parameter_groups(step.student, 0.1), lr=1e-3))
    state, plan = TrainState(step.student, step.teacher, optimizer), Plan.of(recipe)
    with counted_rows(step) as calls:
        counted, _ = flops(
            lambda: train_step(state, step.student, step.views, plan, accelerator, step=0, clock=Clock())
        )
    rows = rows_of(calls, recipe.glare.terms)
    assert min(rows.augmented, rows.matched, rows.region) * IMAGES > 8
    assert step.predicted(rows).total * IMAGES == pytest.approx(counted)


@pytest.mark.parametrize("terms", [["glob", "loc1"], ["reg", "loc2"], ["loc1", "loc2"], ["reg"]], ids=str)
def test_some_of_the_terms_are_as_counted(terms: list[str]) -> None:
    step = Step.of(tiny_config(), recipe_of(glare={"terms": terms}))
    expected, rows = measured(step)
    assert step.predicted(rows).heads == pytest.approx(expected.heads)


def test_a_step_of_the_paper() -> None:
    views, objective = ViewConfig(), GlareSettings()
    rows = Rows.expected(VIT_S, views, objective)
    work = arithmetic(VIT_S, views, objective, rows, images=64)
    linear = 12 * (12 * 384**2 + 2 * 384 * 64)
    globals_, locals_ = (2 * t * linear + 12 * 4 * t**2 * 384 + 2 * (t - 1) * 768 * 384 for t in (197, 37))
    assert work.teacher == 2 * (globals_ + 2 * 197 * 384)
    assert work.student == 2 * globals_ + 10 * locals_
    giga = {name: round(value / 1e9, 1) for name, value in vars(work).items()}
    assert giga == {"teacher": 18.9, "student": 35.5, "backward": 36.4, "heads": 35.8, "anchor": 0}
    assert work.total / 1e9 == pytest.approx(126.6, abs=0.1)


# Rows


def counted_patches(index: Tensor, wanted: Tensor) -> float:
    """Mean number of distinct patches among ``index`` (b, ...) where ``wanted``."""
    seen = torch.zeros(len(index), 197, dtype=torch.bool)
    seen.scatter_(1, torch.where(wanted, index, 196).flatten(1), True)
    return seen[:, :196].sum().item() / len(index)


def test_expected_rows_are_those_of_many_random_crops() -> None:
    count, views, objective = 1000, ViewConfig(), GlareSettings(local_queries=True)
    crop = partial(random_resized_crops, torch.tensor([[512, 512]]).repeat(count, 1), flip_prob=0.5)
    draws = Draws(seeded(0), count)
    a, b = (crop(area=views.global_area, draws=draws) for _ in range(2))
    found = match(a, b, (14, 14))
    inside = crop(area=views.local_area, draws=draws)
    in_a, in_b = (match(inside, view, (6, 6), (14, 14))[1] for view in (a, b))
    mask = sample_patch_mask(draws, (14, 14), prob=views.patch_prob, ratio=views.patch_ratio, block=False)
    rows = Rows.expected(VIT_S, views, objective)
    pairs = 2 * found[1].sum() + 10 * (in_a.sum() + in_b.sum())
    patches = 2 * (found[1] | mask).sum() + 10 * (in_a | in_b).sum()
    assert rows.matched == pytest.approx(pairs.item() / count, rel=0.02)
    assert rows.augmented == pytest.approx(2 * mask.sum().item() / count, rel=0.05)
    assert rows.patches == pytest.approx(patches.item() / count, rel=0.02)
    for heads, tolerance in ((6, 0.03), (12, 0.07)):
        attention = draws.rand(heads, 196)
        regions = sample_regions(attention, found, (14, 14), RegionConfig(), draws=draws)
        rows = Rows.expected(replace(VIT_S, heads=heads), views, objective)
        assert rows.region == pytest.approx(2 * regions.matched.sum().item() / count, rel=0.02)
        distinct = 2 * counted_patches(regions.index, regions.matched)
        assert rows.region_patches == pytest.approx(distinct, rel=tolerance)


def test_rows_follow_the_settings() -> None:
    expected = partial(Rows.expected, VIT_S)
    assert expected(ViewConfig(patch_augmentation="none"), GlareSettings()).augmented == 0
    none = expected(ViewConfig(num_local=0), GlareSettings(local_queries=True))
    assert none == expected(ViewConfig(), GlareSettings())
    assert expected(ViewConfig(), GlareSettings(), matched=0.5).matched == 196
    by_term = {term: expected(ViewConfig(), GlareSettings(terms=(term,))) for term in ("glob", "loc1", "loc2")}
    assert by_term["glob"].patches == 0
    assert by_term["loc1"].patches == pytest.approx(by_term["loc1"].augmented)
    assert by_term["loc2"].patches == pytest.approx(by_term["loc2"].matched)
    fixed = GlareSettings(regions=RegionConfig(count=2, min_side=30, max_side=40))
    assert expected(ViewConfig(), fixed).region == pytest.approx(2 * 2 * 196 * 0.88)  # a region is a whole view
    assert expected(ViewConfig(), fixed).region_patches == pytest.approx(2 * 196 * 0.88)  # the same one twice


# Shapes of real models


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "vit"}, {"mlp_width": 3072, "prefix": 1, "gated": False}),
        ({"model_type": "deit"}, {"mlp_width": 3072, "prefix": 2, "gated": False}),
        ({"model_type": "ijepa"}, {"mlp_width": 3072, "prefix": 0, "gated": False}),
        ({"model_type": "dinov2"}, {"mlp_width": 3072, "prefix": 1, "gated": False}),
        (
            {"model_type": "dinov2_with_registers", "hidden_size": 1536, "use_swiglu_ffn": True},
            {"mlp_width": 4096, "prefix": 5, "gated": True},
        ),
        (
            {"model_type": "dinov3_vit", "use_gated_mlp": True, "intermediate_size": 1536, "num_register_tokens": 4},
            {"mlp_width": 1536, "prefix": 5, "gated": True},
        ),
    ],
    ids=lambda value: value.get("model_type", "shape"),
)
def test_shapes_of_configurations(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    shape = Shape.of(AutoConfig.for_model(**fields), recipe_of())
    assert {name: getattr(shape, name) for name in expected} == expected


def test_only_adapters_with_known_arithmetic_have_a_shape() -> None:
    with pytest.raises(ValueError, match="'lora'"):
        Shape.of(tiny_config(), recipe_of(adapter="lora"))


# Bytes


@pytest.mark.parametrize("changes", [{}, {"adapter_place": "block"}], ids=str)
def test_reduced_bytes_are_those_of_all_that_trains(changes: dict[str, Any]) -> None:
    step = Step.of(tiny_config("dinov2"), recipe_of(**changes), images=1)
    trained = sum(value.numel() for value in step.student.parameters() if value.requires_grad)
    assert reduced_bytes(Shape.of(step.config, step.recipe)) == 4 * trained


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit"])
def test_reduced_bytes_of_full_fine_tuning_are_nearly_those_of_all_weights(name: str) -> None:
    config = AutoConfig.for_model(name, hidden_size=384, num_attention_heads=6)
    if name != "dinov2":
        config.intermediate_size = 1536
    with torch.device("meta"):
        weights = sum(value.numel() for value in AutoModel.from_config(config).parameters())
        weights -= 384 * 385 * (name == "vit")  # its pooler is no part of a GLARE model
    recipe = recipe_of(adapter="full")
    heads = replace(Shape.of(config, recipe), blocks=0, rank=1)
    found = reduced_bytes(Shape.of(config, recipe)) - reduced_bytes(heads)
    assert 0.97 < found / (4 * weights) < 1


@pytest.mark.parametrize(
    ("name", "changes", "element"),
    [
        ("vit", {}, 4),
        ("vit", {}, 2),
        ("vit", {"adapter_place": "block"}, 2),
        ("vit", {"views": MASKED}, 4),
        ("swiglu", {}, 2),
        ("dinov3_vit", {}, 4),
    ],
    ids=str,
)
def test_kept_bytes_are_those_that_autograd_saves(name: str, changes: dict[str, Any], element: int) -> None:
    config, recipe = OTHER_LAYOUTS.get(name) or tiny_config(name), recipe_of(**changes)
    fewer, more = (saved_bytes(Step.of(config, recipe, images), element=element) for images in (2, 4))
    expected = (more - fewer) / 2  # without weights, which are saved once
    found = kept_bytes(Shape.of(config, recipe), recipe.views, element=element)
    assert found == pytest.approx(expected, rel=0.1 if name == "dinov3_vit" else 0.001)


def saved_bytes(step: Step, *, element: int) -> int:
    """Bytes of all tensors that autograd saves in the student's pass, each piece of memory once."""
    saved: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        saved[value.untyped_storage().data_ptr()] = value
        return value

    with saved_tensors_hooks(pack, lambda value: value), torch.autocast("cpu", torch.bfloat16, enabled=element == 2):
        _ = step.encode()
    return sum(value.untyped_storage().nbytes() for value in saved.values())


def test_kept_bytes_need_adapters() -> None:
    with pytest.raises(ValueError, match="adapters"):
        kept_bytes(replace(VIT_S, rank=0), ViewConfig(), element=2)


# Time


def test_time_of_a_ring() -> None:
    assert ring_seconds(4e9, 1, CLUSTER) == 0
    assert ring_seconds(4e9, 2, CLUSTER) == pytest.approx(2 * (2e9 / 100e9 + 1e-3))
    assert ring_seconds(4e9, 4, CLUSTER) == pytest.approx(6 * (1e9 / 100e9 + 1e-3))  # the last within a node
    assert ring_seconds(4e9, 8, CLUSTER) == pytest.approx(14 * (0.5e9 / 10e9 + 1e-3))
    slow_inside = replace(CLUSTER, intra_node=1e9)
    assert ring_seconds(4e9, 8, slow_inside) == pytest.approx(14 * (0.5e9 / 1e9 + 1e-3))


def test_efficiency() -> None:
    work = Work(teacher=1e9, student=2e9, backward=3e9, heads=4e9)
    expected = partial(efficiency, work, 4e9, CLUSTER, rate=100e9)
    # 4 GPUs: a ring of 66 ms; an image takes 100 ms, the backward pass of its backbone 30 ms of these
    assert expected(gpus=4, images=1, overlap=False) == pytest.approx(100 / 166)
    assert expected(gpus=4, images=1) == pytest.approx(100 / 136)
    assert expected(gpus=4, images=3, overlap=False) == pytest.approx(300 / 366)
    assert expected(gpus=4, images=3) == 1
    assert expected(gpus=1, images=1, overlap=False) == 1
