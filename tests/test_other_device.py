"""Every part does on a device what it does on the CPU, and mixes no tensors of both."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from labelled_samples import write_labelled
from other_device import OTHER, other_device
from reference.builders import noise_image, packed
from reference.glare_cases import randomise
from test_plain_step import assert_close, make_batch
from tiny_models import adapted_model, segmenter, tiny_vit
from torch import Tensor

from glare import crops
from glare.crops import PackedImages
from glare.data.labelled import LabelledSet, PackedLabelled, open_labelled, pack_labelled
from glare.dense_inference import Sweep, logits
from glare.draws import Draws
from glare.evaluate import confusion
from glare.finetune_plan import Plan as FinetunePlan
from glare.finetune_step import train_step as finetune_step
from glare.frozen_features import extract, read_images
from glare.head_start import start_head
from glare.labelled_crops import TrainingCrops, training_batch
from glare.objectives.glare import GlareObjective, GlareSettings
from glare.plain_step import PlainState, plain_step
from glare.plain_views import LoadedViews
from glare.pretrain_plan import Plan
from glare.pretrain_step import cut_views, train_step
from glare.regions import RegionConfig
from glare.run_folder import RunFolder
from glare.runtime import Clock, make_accelerator, seeded
from glare.segmenters import SegmenterState
from glare.segmenters import parameter_groups as segmenter_groups
from glare.student import Student
from glare.teacher import make_teacher
from glare.train_state import TrainState, make_optimizer
from glare.views import PATCH_AUGMENTATIONS, Normalisation, ViewConfig, Views, make_views

CPU = torch.device("cpu")
SETTINGS = GlareSettings(prototypes=24, head_hidden=16, head_bottleneck=8, regions=RegionConfig(min_side=1, max_side=3))
LABELLED = TrainingCrops(size=16, scale=(0.5, 2.0), dominant_share=0.9, normalise=Normalisation())
SIZES = [(60, 40), (33, 50), (64, 64), (20, 30)]


def places() -> Sequence[torch.device]:
    """The CPU and the device, which exists inside ``other_device()`` only."""
    return CPU, OTHER


def values(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(values(found[name]), values(value), name)


def of_views(views: Views) -> dict[str, Tensor]:
    tensors = {field.name: getattr(views, field.name) for field in fields(views)}
    crops = {name: tensors.pop(name) for name in ("global_crops", "local_crops")}
    del tensors["grid"]
    return tensors | {
        f"{name}.{part}": getattr(crop, part) for name, crop in crops.items() for part in ("offset", "scale")
    }


def images(device: torch.device) -> PackedImages:
    return packed([noise_image(*size, seed) for seed, size in enumerate(SIZES)]).to(device)


@pytest.fixture
def one_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU cuts as a device does, not with its own kernel, whose results are rounded."""
    monkeypatch.setattr(crops, "_whole_pixels", lambda *_: None)


def accelerate(device: torch.device, folder: Path) -> Accelerator:
    accelerator = make_accelerator(device="cpu", precision="fp32", report_to="none", output=folder)
    accelerator.state.device = device
    return accelerator


# --- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_filter")
@pytest.mark.parametrize("kind", PATCH_AUGMENTATIONS)
def test_views(kind: str) -> None:
    config = ViewConfig(num_local=3, global_size=24, local_size=8, patch_prob=0.7, patch_augmentation=kind)
    made = {}
    with other_device():
        for device in places():
            made[device] = make_views(
                images(device),
                torch.arange(4),
                config,
                patch_size=4,
                normalise=Normalisation(),
                draws=Draws(torch.Generator().manual_seed(0), 4),
            )
        assert {value.device.type for value in of_views(made[OTHER]).values()} == {OTHER.type}
        same(of_views(made[OTHER]), of_views(made[CPU]))


@pytest.mark.usefixtures("one_filter")
@pytest.mark.parametrize("resident", [True, False])
def test_batches_of_packed_images_that_live_there_or_not(resident: bool, tmp_path: Path) -> None:
    config = ViewConfig(num_local=1, global_size=16, local_size=8)
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "step": 1, "patch_size": 4, "normalise": Normalisation()}
    with other_device():
        made = [
            cut_views(images(pack), torch.tensor([2, 0]), config, accelerate(device, tmp_path), **settings)
            for device, pack in ((CPU, CPU), (OTHER, OTHER if resident else CPU))
        ]
        same(of_views(made[1]), of_views(made[0]))


def test_a_resident_pack_is_not_packed_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its tensors name the index of their device, the accelerator's device may name none."""
    monkeypatch.setattr("glare.pretrain_step.subset", None)
    config = ViewConfig(num_local=1, global_size=16, local_size=8)
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "step": 1, "patch_size": 4, "normalise": Normalisation()}
    with other_device():
        accelerator = accelerate(OTHER, tmp_path)
        cut_views(images(OTHER), torch.tensor([2, 0]), config, accelerator, **settings)


# --- pre-training --------------------------------------------------------------------------------------------------


def plan() -> Plan:
    return Plan(
        steps=3,
        batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        min_learning_rate=1e-6,
        warmup_steps=0,
        momentum=0.9,
        momentum_end=0.9,
        teacher_temperature=(0.06, 0.06),
        temperature_ramp=0.3,
        freeze_last_layer_steps=1,
        head_warmup_steps=0,
        clip=0.3,
        seed=0,
    )


def fresh(kind: str, settings: GlareSettings = SETTINGS, *, family: str = "dinov2", **options: Any) -> Student:
    objective = GlareObjective(32, 2, settings)
    randomise(objective, 1)
    return Student(adapted_model(tiny_vit(family), kind).backbone, objective, **{"mask_token": False, **options})


def trained(student: Student, batch: Views, device: torch.device, folder: Path, *, steps: int = 2) -> TrainState:
    """Some steps on ``device``, as the job makes them."""
    accelerator = accelerate(device, folder)
    student.to(device)
    state = TrainState(student, make_teacher(student), make_optimizer(student, 0.1))
    further(state, batch, accelerator, steps=range(steps))
    return state


def further(state: TrainState, batch: Views, accelerator: Accelerator, *, steps: range) -> None:
    for group in state.optimizer.param_groups:
        # with AdamW's 1e-8 a gradient of nothing but rounding makes a whole step
        group |= {"lr": 1e-3, "eps": 1e-3}
    for step in steps:
        train_step(state, state.student, batch, plan(), accelerator, step=step, clock=Clock())


def loaded(views: Views, device: torch.device) -> Views:
    """As the batches of the benchmark's plain way travel."""
    return LoadedViews(**{field.name: getattr(views, field.name) for field in fields(views)}).to(device)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # adapter, settings, student, views
    "uniadapter": ("uniadapter", {"local_queries": True, "min_overlap": 0.1}, {"anchor": 0.5}, {}),
    "lora": ("lora", {"region_target": "eq6"}, {"mask_token": True}, {"patch_augmentation": "mask"}),
    "full": ("full", {"region_target": "udi", "regions": RegionConfig(anchor="centre")}, {}, {"num_local": 0}),
    "rotary-positions": (
        "lora",
        {"regions": RegionConfig(count=1, sampling="random", max_side=3)},
        {"family": "dinov3_vit", "mask_token": True},
        {"patch_augmentation": "mask"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_of_pre_training(case: str, tmp_path: Path) -> None:
    kind, settings, options, changes = CASES[case]
    batch = make_batch(**changes)
    with other_device():
        on_cpu, elsewhere = (
            trained(fresh(kind, replace(SETTINGS, **settings), **options), loaded(batch, device), device, tmp_path)
            for device in places()
        )
        assert all(value.device.type == OTHER.type for name, value in elsewhere.tensors().items() if value.dim())
        same(elsewhere.tensors(), on_cpu.tensors())


def test_a_checkpoint_of_the_device_is_one_of_the_cpu(tmp_path: Path) -> None:
    batch = make_batch()
    with other_device():
        state = trained(fresh("lora"), loaded(batch, OTHER), OTHER, tmp_path)
        folder = RunFolder.create(tmp_path / "run")
        folder.write_checkpoint(2, state.tensors(), {})
        further(state, loaded(batch, OTHER), accelerate(OTHER, tmp_path), steps=range(2, 3))
        for device in places():
            resumed = trained(fresh("lora"), loaded(batch, device), device, tmp_path, steps=1)
            saved = folder.latest_checkpoint()
            assert saved is not None
            resumed.restore(saved.tensors)
            further(resumed, loaded(batch, device), accelerate(device, tmp_path), steps=range(2, 3))
            same(resumed.tensors(), state.tensors())
        resumed.export_teacher()


def test_a_head_fitted_to_the_images() -> None:
    batch = make_batch()
    with other_device():
        heads = []
        for device in places():
            student = fresh("uniadapter").to(device)
            start_head(student, loaded(batch, device), temperature=0.04, draws=Draws(seeded(0), 4))
            heads.append(student.objective.state_dict())
        same(heads[1], heads[0])


def test_steps_of_the_plain_way() -> None:
    batch = make_batch()
    with other_device():
        ends = []
        for device in places():
            student = fresh("uniadapter", anchor=0.5).to(device)
            state = PlainState.of(student, make_teacher(student), learning_rate=1e-3, weight_decay=0.1)
            for group in state.optimizer.param_groups:
                group["eps"] = 1e-3
            for step in range(2):
                plain_step(
                    state, loaded(batch, device), temperature=0.06, momentum=0.9, clip=0.3, draws=Draws(seeded(step), 4)
                )
            ends.append({**state.student.state_dict(), **{f"t.{k}": v for k, v in state.teacher.state_dict().items()}})
        same(ends[1], ends[0])


# --- segmentation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledSet:
    return open_labelled(str(write_labelled(tmp_path_factory.mktemp("data"), 4)))


def moved(packed: PackedLabelled, device: torch.device) -> PackedLabelled:
    return replace(packed, images=packed.images.to(device), labels=packed.labels.to(device))


@pytest.mark.usefixtures("one_filter")
@pytest.mark.parametrize("resident", [True, False])
def test_labelled_crops(resident: bool, data: LabelledSet, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_labelled(data)
    with other_device():
        batches = []
        for device, pack in ((CPU, CPU), (OTHER, OTHER if resident else CPU)):
            if resident and device == OTHER:  # "cuda" is not "cuda:0", and what lives there is not packed anew
                monkeypatch.setattr("glare.labelled_crops.subset", None)
            index, draws = torch.tensor([2, 0, 2]), Draws(seeded(1), 3)
            drawn = training_batch(moved(packed, pack), index, LABELLED, device, draws=draws)
            batches.append(dict(zip(("pixels", "labels"), drawn, strict=True)))
        assert batches[1]["pixels"].device.type == OTHER.type
        same(batches[1], batches[0])


def fine_tuned(head: str, device: torch.device, folder: Path) -> SegmenterState:
    """Some steps on random images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 16, 16, generator=generator).to(device)
    labels = torch.randint(0, 3, (4, 16, 16), generator=generator).to(device)
    numbers = FinetunePlan(
        3, batch_size=4, crop_size=16, warmup_steps=0, learning_rate=1e-3, backbone_learning_rate=1e-3
    )
    accelerator = accelerate(device, folder)
    model = segmenter(tiny_vit(), num_labels=3, head=head).to(device)
    optimizer = torch.optim.AdamW(segmenter_groups(model.train(), 0.1), eps=1e-3)
    for step in range(2):
        finetune_step(model, optimizer, (pixels, labels), numbers, accelerator, seed=0, step=step)
    return SegmenterState(model.eval(), optimizer)


@pytest.mark.parametrize("head", ["fpn", "linear"])
def test_steps_of_fine_tuning_and_evaluation(head: str, data: LabelledSet, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (1, 24, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"normalise": Normalisation(), "sweep": Sweep(16, 12, (40, 28), (1.0, 1.5), True)}
    with other_device():
        ends, maps, counts = [], [], []
        for device in places():
            state = fine_tuned(head, device, tmp_path)
            state.restore({name: values(value).clone() for name, value in state.tensors().items()})
            ends.append(state.tensors())
            maps.append({"logits": logits(state.segmenter, pixels, **settings)})
            counts.append(confusion(state.segmenter, data, range(2), **settings)[0])
        assert maps[1]["logits"].device.type == OTHER.type
        same(ends[1], ends[0])
        same(maps[1], maps[0])
        assert counts[0].sum() == 2 * 40 * 32
        assert (counts[1] - counts[0]).abs().sum() <= 4  # where two classes are equal up to rounding


# --- comparison ----------------------------------------------------------------------------------------------------


def test_frozen_features(data: LabelledSet) -> None:
    pictures = read_images(data, patch=4, short_side=16, strict=True)[0]
    with other_device():
        found = [
            extract(adapted_model(tiny_vit()), pictures, normalise=Normalisation(), device=device, autocast=nullcontext)
            for device in places()
        ]
    assert torch.equal(found[1].features, found[0].features) or (
        (found[1].features.float() - found[0].features.float()).abs().max() < 1e-2  # a step of float16
    )
    assert_close(found[1].cls, found[0].cls, "cls")
    assert found[1].features.device == CPU  # where the probes are
