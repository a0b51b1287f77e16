"""The two ways of a pre-training step that ``glare bench`` measures, from the same weights."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from glare import plain_step
from glare.backbones import adapt, load_backbone, read_normalisation
from glare.crops import PackedImages, fits
from glare.draws import Draws
from glare.modeling_glare import GlareModel
from glare.objectives.base import Terms
from glare.plain_step import PlainState
from glare.plain_views import LoadedViews, view_loader
from glare.pretrain import PretrainRecipe, make_student
from glare.pretrain_plan import Plan
from glare.pretrain_step import OBJECTIVE, cut_views, train_step
from glare.runtime import Clock, epoch_batches, seeded
from glare.shares import share_of
from glare.student import Student
from glare.teacher import make_teacher
from glare.train_state import TrainState, make_optimizer

MAX_WORKERS = 16


class Way(Protocol):
    """One way of making steps."""

    name: str

    def begin(self) -> None:
        """Get ready for some steps, of which the first warms up."""

    def end(self) -> None:
        """Stop whatever would go on between steps."""

    def step(self, clock: Clock) -> Terms:
        """The next step, its phases measured by ``clock``."""


def fresh_student(recipe: PretrainRecipe) -> tuple[GlareModel, Student]:
    """The model of a recipe and its student: the same weights whenever it is called."""
    torch.manual_seed(recipe.seed)
    model = adapt(
        load_backbone(recipe.backbone), recipe.adapter, rank=recipe.rank, scale=recipe.scale, place=recipe.adapter_place
    )
    return model, make_student(model, recipe)


class OwnWay:
    """Steps as ``glare pretrain`` makes them."""

    name = "glare"

    def __init__(self, recipe: PretrainRecipe, images: PackedImages, accelerator: Accelerator) -> None:
        self.recipe, self.plan, self.accelerator = recipe, Plan.of(recipe), accelerator
        self.model, student = fresh_student(recipe)
        self.normalise = read_normalisation(recipe.backbone)
        student.to(accelerator.device)
        teacher = make_teacher(student)
        if recipe.compile:
            student.compile_blocks()
            teacher.compile_blocks()
        optimizer = make_optimizer(student, recipe.weight_decay)
        for group in optimizer.param_groups:
            group["lr"] = self.plan.learning_rate
        self.wrapped, optimizer = accelerator.prepare(student, optimizer)
        self.state = TrainState(student, teacher, optimizer)
        self.images = images.to(accelerator.device) if fits(images.pixels.nbytes, accelerator.device) else images
        self.done = 0
        self._objective = _Measured()
        student.objective.register_forward_pre_hook(self._objective.enter)
        student.objective.register_forward_hook(self._objective.leave)

    def begin(self) -> None:
        """Nothing to start."""

    def end(self) -> None:
        """Nothing goes on."""

    def step(self, clock: Clock) -> Terms:
        """See ``Way``."""
        plan, self._objective.clock = self.plan, clock
        batch = next(epoch_batches(len(self.images), plan.batch_size, seed=plan.seed, start=self.done))
        with clock.measure("views"):
            views = cut_views(
                self.images,
                batch[share_of(self.accelerator, len(batch))],
                self.recipe.views,
                self.accelerator,
                batch_size=len(batch),
                seed=plan.seed,
                step=self.done,
                patch_size=self.model.patch_size,
                normalise=self.normalise,
            )
        terms, _ = train_step(self.state, self.wrapped, views, plan, self.accelerator, step=self.done, clock=clock)
        self.done += 1
        clock.seconds["student"] -= self._objective.seconds
        return terms


class _Measured:
    """Hooks around a module whose calls are a phase of their own, "heads and losses"."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds = 0.0
        self._open: AbstractContextManager[None] | None = None

    def enter(self, *_: object) -> None:
        """Before the module runs."""
        self._before = self.clock.seconds.get("heads and losses", 0.0)
        self._open = self.clock.measure("heads and losses")
        self._open.__enter__()

    def leave(self, *_: object) -> None:
        """After it; ``seconds`` is what this call took."""
        assert self._open is not None
        self._open.__exit__(None, None, None)
        self.seconds = self.clock.seconds["heads and losses"] - self._before


class PlainWay:
    """Steps as research code makes them."""

    name = "plain"

    def __init__(self, recipe: PretrainRecipe, files: Sequence[Path], accelerator: Accelerator) -> None:
        self.recipe, self.plan, self.device = recipe, Plan.of(recipe), accelerator.device
        model, student = fresh_student(recipe)
        student.to(self.device)
        self.state = PlainState.of(
            student, make_teacher(student), learning_rate=self.plan.learning_rate, weight_decay=recipe.weight_decay
        )
        self.make_loader = partial(
            view_loader,
            files,
            recipe.views,
            patch_size=model.patch_size,
            normalise=read_normalisation(recipe.backbone),
            batch_size=self.plan.batch_size,
            num_workers=min(os.cpu_count() or 1, MAX_WORKERS),
            pin_memory=self.device.type == "cuda",
        )
        self.autocast: dict[str, Any] = {
            "device_type": self.device.type,
            "dtype": torch.bfloat16,
            "enabled": accelerator.mixed_precision == "bf16",
        }
        self.batches: Iterator[LoadedViews] = iter(())
        self.done = 0

    def begin(self) -> None:
        """The workers start, and make their first batches."""
        self.batches = iter(self.make_loader(seed=self.plan.seed + self.done))

    def end(self) -> None:
        """The workers stop."""
        self.batches = iter(())

    def step(self, clock: Clock) -> Terms:
        """See ``Way``."""
        plan, state = self.plan, self.state
        with clock.measure("views"):
            views = next(self.batches).to(self.device)
        with torch.autocast(**self.autocast):
            with clock.measure("teacher"):
                teacher = plain_step.teacher_features(state.teacher, views)
            with clock.measure("student"):
                student = plain_step.student_features(state.student, views)
            with clock.measure("heads and losses"):
                draws = Draws(seeded(plan.seed, self.done, OBJECTIVE), plan.batch_size)
                temperature = plan.temperature_at(self.done)
                terms = plain_step.loss_terms(state, student, teacher, views, temperature=temperature, draws=draws)
        with clock.measure("backward"):
            terms.total.backward()
        with clock.measure("update"):
            plain_step.update(state, terms, momentum=plan.momentum_at(self.done), clip=plan.clip)
        self.done += 1
        return terms
