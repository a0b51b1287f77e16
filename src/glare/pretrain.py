"""``glare pretrain``: adapt a self-supervised ViT to unlabelled images (paper sections 3.2, 4 and 5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from glare import checkpoints, ranges, recipes, region_attention
from glare.agreement import check_agreement
from glare.backbones import ADAPTERS, adapt, load_backbone, read_normalisation
from glare.data.sources import Images, RasterReading
from glare.disk_space import room_for
from glare.errors import UserError
from glare.feed import open_feed, open_images
from glare.figures import write_report
from glare.head_start import fit_head
from glare.health_watch import MAY_DIFFER_ON_RESUME, HealthWatch, check_watch
from glare.model_card import write_card
from glare.model_sizes import oversize
from glare.modeling_glare import GlareModel
from glare.objectives.base import Objective
from glare.objectives.glare import GlareObjective, GlareSettings
from glare.objectives.simmim import SimMIMObjective
from glare.preemption import Signals, stoppable
from glare.pretrain_log import describe, measurements, progress_text
from glare.pretrain_plan import Plan, check_sizes, derive_model, derive_optimisation, derive_steps, overlay
from glare.pretrain_step import cut_views, train_step
from glare.price import Meter, trained_parameters
from glare.recipes import option, required
from glare.resuming import frozen_digest
from glare.run_folder import RunFolder
from glare.run_lock import released
from glare.runtime import (
    DEVICES,
    PRECISIONS,
    TRACKERS,
    Clock,
    check_weights,
    make_accelerator,
    restore_scaler,
    scaler_state,
)
from glare.segmenters import image_processor
from glare.sharding import check_precision, shard_blocks
from glare.shares import check_shares, same_everywhere
from glare.student import Student
from glare.teacher import make_teacher
from glare.train_state import TrainState, make_optimizer
from glare.views import Normalisation, ViewConfig
from glare.yaml_files import flatten

OBJECTIVES: dict[str, type[Objective]] = {"glare": GlareObjective, "simmim": SimMIMObjective}
"""Objective -> its module; its settings, if it has any, are the recipe key of the same name."""

LARGE = 10**6  # batches in a pass over a table that nobody has counted
ANCHORED = ("uniadapter", "lora")  # adapters that leave the features without them at hand


@dataclass(frozen=True)
class PretrainRecipe:
    """Adapt a self-supervised ViT to unlabelled images."""

    backbone: str = required("folder or Hub id of a ViT, 'landcover-vit', or a config.json for random weights")
    data: str = required("folder, Hub id, parquet or tar shards, landcover:<domain>[:count[:seed]], loveda:FOLDER")
    output: Path = required("run folder to write")
    split: str | None = option(None, "sub-folder of a folder, or split of other data; all of a folder, else train")
    match: str | None = option(None, "globs on file stems, or paths with a /, comma-separated, ! excludes")
    fraction: float = option(1.0, "train on this share of the images only, as 0.1 or 1/32, drawn with the seed")
    objective: str = option("glare", "what is learned", choices=tuple(OBJECTIVES))
    adapter: str = option("uniadapter", "what trains in the backbone", choices=ADAPTERS)
    adapter_place: str = option(
        "attention", "where uniadapter sits, after each attention layer or each block", choices=("attention", "block")
    )
    rank: int = option(64, "width of the adapters")
    scale: float = option(0.1, "factor on the adapters' output")
    steps: int | None = option(None, "optimizer steps; derived from the number of images where not given")
    epochs: int | None = option(None, "passes over the images, instead of steps")
    batch_size: int | None = option(None, "images a step over all processes; 8 on a CPU, 64 on a GPU where not given")
    gradient_accumulation_steps: int = option(1, "parts of a batch that are computed one after another, to save memory")
    learning_rate: float | None = option(None, "peak; derived where not given, 1e-4 for all weights with simmim")
    min_learning_rate: float = option(1e-6, "at the end of the cosine")
    warmup_steps: int | None = option(None, "linear warm-up; derived where not given")
    weight_decay: float = option(0.1, "of matrices; biases and norms have none")
    clip: float = option(3.0, "largest gradient norm of each parameter; 0 for no clipping")
    freeze_last_layer_steps: int | None = option(None, "steps in which prototypes hold; an epoch, at most a tenth")
    head_warmup_steps: int = option(0, "steps in which only the objective's heads learn")
    anchor: float = option(0.0, "weight of a term that holds patches near their features without adapters")
    momentum: float | None = option(None, "of the teacher, at the start; derived where not given")
    momentum_end: float | None = option(None, "at the end of its cosine; derived where not given")
    teacher_temperature: tuple[float, float] = option((0.04, 0.07), "at the start, and after its linear ramp")
    temperature_ramp: float = option(0.3, "share of the steps the ramp takes")
    export: str = option("student", "whose weights to save", choices=("student", "teacher"))
    image_size: int | None = option(
        None,
        "images are kept with at most this short side in px, 0 for native; twice the global views where not given",
    )
    streaming: bool | None = option(
        None, "read images anew for each step; by default only if decoded they fit neither memory nor disk"
    )
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    seed: int = option(0, "of all draws")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    shard: bool = option(False, "share the blocks of the ViT out over processes, for weights that fill a GPU (FSDP2)")
    compile: bool = option(False, "torch.compile the blocks of the ViT, for long runs on a GPU")
    checkpoint_every: int = option(100, "steps between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay; one more has to fit on the disk")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    on_unhealthy: str = option(
        "stop", "what to do when features collapse or the loss diverges", choices=("stop", "warn")
    )
    select: str = option(
        "last",
        "what becomes the model: the last step, or the checkpoint whose patches have the largest effective rank, which "
        "was no reliable guide where it was measured",
        choices=("last", "health"),
    )
    patience: int | None = option(None, "end early after so many steps in which that rank did not rise")
    num_workers: int | None = option(None, "threads that decode images; one a core where not given")
    report_to: str = option("tensorboard", "trackers besides metrics.jsonl", choices=TRACKERS)
    resume: bool = option(False, "go on from the last checkpoint of the output folder")
    raster: RasterReading = option(RasterReading(), "GeoTIFFs")
    views: ViewConfig = option(ViewConfig(), "views")
    glare: GlareSettings = option(GlareSettings(), "objective")

    def __post_init__(self) -> None:
        ranges.check(self)


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare pretrain`` and of ``accelerate launch training/pretrain.py``."""
    run(recipes.parse_given(PretrainRecipe, argv, prog="glare pretrain"))


@room_for("the files of the run")
@released()
@stoppable
def run(signals: Signals, given: Mapping[str, Any]) -> Path:
    """Adapt; ``given`` are the recipe keys the user set, the others are derived from the data or the paper's.

    Returns the run folder. Raises Stopped after SIGTERM and SIGUSR1, KeyboardInterrupt after Ctrl-C, with a checkpoint
    of all finished steps.
    """
    recipe = recipes.from_dict(PretrainRecipe, given)
    RunFolder.check(recipe.output, resume=recipe.resume)
    accelerator = make_accelerator(
        device=recipe.device, precision=recipe.precision, report_to=recipe.report_to, output=recipe.output
    )
    if recipe.shard:
        check_precision(accelerator)
    meter = Meter(accelerator)

    # data, model, and the settings that depend on them
    torch.manual_seed(recipe.seed)  # of a config.json the weights are drawn
    model, normalise = load_backbone(recipe.backbone), read_normalisation(recipe.backbone)
    source = open_images(recipe)
    num_images = len(source) if isinstance(source, Images) else None
    recipe, derived = resolve(given, num_images=num_images, patch_size=model.patch_size, accelerator=accelerator)
    plan, feed = Plan.of(recipe), open_feed(source, recipe, accelerator)
    check_agreement(accelerator, recipe, feed.names)
    accelerator.print(describe(plan, feed, derived))

    # student, teacher, optimizer
    torch.manual_seed(recipe.seed)
    model = adapt(model, recipe.adapter, rank=recipe.rank, scale=recipe.scale, place=recipe.adapter_place)
    student = make_student(model, recipe).to(accelerator.device)
    if isinstance(student.objective, GlareObjective):
        started = region_attention.start(student.objective.cross_attention, recipe.backbone)
        if started:
            accelerator.print(started)
    resuming = recipe.resume and checkpoints.folders(recipe.output)
    if student.objective.head is not None and recipe.glare.head_init == "data" and not resuming:
        # a checkpoint has all that this would change
        fit_head(student, feed.sample, recipe, accelerator, patch_size=model.patch_size, normalise=normalise)
    same_everywhere(student)
    frozen = frozen_digest(student.backbone)
    teacher = make_teacher(student) if student.objective.needs_teacher else student
    if recipe.compile:
        student.compile_blocks()
        teacher.compile_blocks()
    watch = HealthWatch.of(student, feed.sample, recipe, normalise, accelerator)
    wrapped, optimizer = prepare(student, teacher, recipe, accelerator)
    state = TrainState(student, teacher, optimizer)

    # run folder, resume
    folder = RunFolder.create(recipe.output, resume=recipe.resume, write=accelerator.is_main_process)
    checkpoint, changes = folder.begin(
        recipe, images=feed.names, frozen=frozen, derived=derived, may_differ=MAY_DIFFER_ON_RESUME
    )
    for change in changes:
        accelerator.print(f"resumed with another recipe: {change}")
    accelerator.init_trackers("")
    start = 0
    if checkpoint is not None:
        state.restore(checkpoint.tensors)
        restore_scaler(accelerator, checkpoint.state.get("scaler"))
        start, meter.earlier = checkpoint.step, checkpoint.state.get("seconds", math.nan)
    accelerator.wait_for_everyone()  # the main process has brought the log back to the checkpoint
    watch.resume(folder, start)

    # the loop
    shares = feed.shares(start)
    clock, done, logged = Clock(), start, start
    bar = tqdm(total=plan.steps, initial=start, desc="pretrain", disable=not accelerator.is_main_process)
    signals.hold(folder.path, bar)
    for step in range(start, plan.steps):
        if watch.enough:
            break
        with clock.measure("data"):
            images, index = next(shares)
            views = cut_views(
                images,
                index,
                recipe.views,
                accelerator,
                batch_size=plan.batch_size,
                seed=recipe.seed,
                step=step,
                patch_size=model.patch_size,
                normalise=normalise,
            )
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(step)
        with folder.pointing_back():
            terms, grad_norms = train_step(state, wrapped, views, plan, accelerator, step=step, clock=clock)
        bar.update()
        done, stopping = step + 1, signals.asked(accelerator)
        if watch.regular(done) or done % recipe.log_every == 0:
            values = measurements(terms, grad_norms, student.objective, plan, step, clock, steps=done - logged)
            values |= watch.measure(student, done)
            folder.log(done, **values)
            accelerator.log(values, step=done)
            bar.set_postfix_str(progress_text({**watch.latest, **values}, watch.untouched))
            trouble = watch.judge({"step": done, **values}, folder)
            if trouble is not None:
                bar.close()
                raise UserError(trouble)
            clock, logged = Clock(), done
        elif step == start:
            clock, logged = Clock(), done  # a process takes longer for its first step
        if watch.writes(done, stopping=stopping):
            others, keep = {"seconds": meter.seconds, "scaler": scaler_state(accelerator)}, recipe.keep_checkpoints
            with clock.paused(), folder.pointing_back():
                check_weights(tensors := state.tensors(), done)
                folder.write_checkpoint(done, tensors, others, keep=keep, protected=watch.protected())
        if stopping:
            break
    bar.close()
    shares.close()
    signals.release(accelerator)
    if watch.enough:
        accelerator.print(f"ended early after step {done}: {watch.enough} (patience {recipe.patience})")
    state.join()
    seconds = meter.seconds
    if accelerator.is_main_process:
        best = watch.chosen(folder, done)
        if best is not None:
            state.restore_weights(best.tensors)
        watch.write(folder, exported=done if best is None else best.step, last=done)
        save(model, state, recipe, folder, normalise)
        meter.write(folder, model, seconds=seconds, steps=done, images=num_images)
        write_card(folder.path)
    accelerator.wait_for_everyone()  # one that leaves while another still writes may keep it from ending
    accelerator.end_training()
    return folder.path


def resolve(
    given: Mapping[str, Any], *, num_images: int | None, patch_size: int, accelerator: Accelerator
) -> tuple[PretrainRecipe, dict[str, Any]]:
    """The complete recipe, and the keys of it that were derived from the data; ``num_images`` None: nobody knows."""
    asked = recipes.from_dict(PretrainRecipe, given)
    if num_images is None and asked.steps is None:
        raise UserError(f"how many images {asked.data!r} has is not known before it is streamed; give --steps")
    usual = min(num_images or LARGE, 8 if accelerator.device.type == "cpu" else 64)
    batch_size = usual if asked.batch_size is None else asked.batch_size
    check_shares(batch_size, accelerator.num_processes, asked.gradient_accumulation_steps)
    count = num_images or LARGE * batch_size
    per_epoch = max(1, count // batch_size)
    usual = derive_steps(count, batch_size) if asked.epochs is None else asked.epochs * per_epoch
    steps = usual if asked.steps is None else asked.steps
    derived: dict[str, Any] = {
        "batch_size": batch_size,
        "steps": steps,
        "freeze_last_layer_steps": min(per_epoch, steps // 10),
        **derive_optimisation(steps),
        **derive_model(steps, batch_size, patch_size=patch_size, anchored=asked.adapter in ANCHORED),
    }
    derived = OBJECTIVES[asked.objective].derive(derived, adapter=asked.adapter)
    known = {key: value for key, value in given.items() if value is not None}
    recipe = recipes.from_dict(PretrainRecipe, overlay(derived, known))
    OBJECTIVES[recipe.objective].check(recipe)
    if recipe.anchor and recipe.adapter not in ANCHORED:
        raise UserError(
            f"anchor {recipe.anchor} needs the backbone without adapters, which adapter {recipe.adapter!r} changes; "
            "give --adapter uniadapter or lora, or leave anchor out"
        )
    check_watch(recipe)
    check_sizes(recipe.views, patch_size)
    return recipe, {key: value for key, value in flatten(derived).items() if key not in flatten(known)}


def make_student(model: GlareModel, recipe: PretrainRecipe) -> Student:
    """The adapted backbone with a fresh objective. Raises UserError where that does not fit into memory."""
    settings = getattr(recipe, recipe.objective, None)
    objective = partial(OBJECTIVES[recipe.objective].of, model.config.backbone_config, settings)
    if reason := oversize(objective):
        raise UserError(f"the objective's {reason}; give fewer prototypes or a narrower head")
    mask_token = recipe.views.patch_augmentation == "mask"
    return Student(model.backbone, objective(), mask_token=mask_token, anchor=recipe.anchor)


def prepare(
    student: Student, teacher: Student, recipe: PretrainRecipe, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The student as its gradients are averaged over processes, and its optimizer."""
    if recipe.shard and accelerator.num_processes > 1:
        for part in dict.fromkeys((student, teacher)):
            shard_blocks(part.backbone)
        return student, accelerator.prepare(make_optimizer(student, recipe.weight_decay))
    wrapped, optimizer = accelerator.prepare(student, make_optimizer(student, recipe.weight_decay))
    return wrapped, optimizer


def save(
    model: GlareModel, state: TrainState, recipe: PretrainRecipe, folder: RunFolder, normalise: Normalisation
) -> None:
    """Write ``model/`` and, where there are adapters, ``adapter/``; both appear whole or not at all."""
    if recipe.export == "teacher":
        state.export_teacher()
    model.backbone.set_attn_implementation("sdpa")
    with folder.publish("model") as path:
        model.save_pretrained(path)
        image_processor(normalise, size=recipe.views.global_size, patch=model.patch_size).save_pretrained(path)
    if model.config.adapter_config is not None:
        with folder.publish("adapter") as path:
            model.save_adapter(path, base_model=recipe.backbone)
    write_report(folder)
    print(f"{recipe.export} weights in {folder.path / 'model'} ({trained_parameters(model):,} parameters trained)")
