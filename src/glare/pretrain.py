"""``glare pretrain``: adapt a self-supervised ViT to unlabelled images (paper sections 3.2, 4 and 5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from glare import checkpoints, head_start, recipes, region_attention
from glare.backbones import ADAPTERS, adapt, load_backbone, read_normalisation
from glare.crops import PackedImages, fits, subset
from glare.data.cache import pack
from glare.data.sources import RasterReading, open_source
from glare.disk_space import room_for
from glare.draws import Draws
from glare.errors import UserError
from glare.figures import write_report
from glare.health_watch import MAY_DIFFER_ON_RESUME, HealthWatch
from glare.model_card import write_card
from glare.modeling_glare import GlareModel
from glare.objectives.glare import GlareObjective, GlareSettings
from glare.preemption import Signals, stoppable
from glare.pretrain_log import describe, measurements, progress_text
from glare.pretrain_plan import Plan, derive_model, derive_optimisation, derive_steps, overlay
from glare.pretrain_step import cut_views, train_step
from glare.price import Meter, trained_parameters
from glare.recipes import option, required
from glare.run_folder import RunFolder
from glare.runtime import (
    DEVICES,
    PRECISIONS,
    TRACKERS,
    Clock,
    epoch_batches,
    make_accelerator,
    restore_scaler,
    scaler_state,
    seeded,
)
from glare.segmenters import image_processor
from glare.sharding import shard_blocks
from glare.shares import check_shares
from glare.student import Student
from glare.teacher import make_teacher
from glare.train_state import TrainState, make_optimizer
from glare.views import Normalisation, ViewConfig, make_views
from glare.yaml_files import flatten

OBJECTIVES = {"glare": GlareObjective}
"""Objective -> its module; its settings are the recipe key of the same name."""

ANCHORED = ("uniadapter", "lora")  # adapters that leave the features without them at hand


@dataclass(frozen=True)
class PretrainRecipe:
    """Adapt a self-supervised ViT to unlabelled images."""

    backbone: str = required("folder or Hub id of a ViT, 'landcover-vit', or a config.json for random weights")
    data: str = required("folder of images, Hub id, parquet or tar shards, or landcover:<domain>[:count[:seed]]")
    output: Path = required("run folder to write")
    match: str | None = option(None, "globs on file stems, comma-separated, ! excludes")
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
    learning_rate: float | None = option(None, "peak; derived where not given")
    min_learning_rate: float = option(1e-6, "at the end of the cosine")
    warmup_steps: int | None = option(None, "linear warm-up; derived where not given")
    weight_decay: float = option(0.1, "of matrices; biases and norms have none")
    clip: float = option(3.0, "largest gradient norm of each parameter")
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
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare pretrain`` and of ``accelerate launch training/pretrain.py``."""
    run(recipes.parse_given(PretrainRecipe, argv, prog="glare pretrain"))


@room_for("the files of the run")
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
    meter = Meter(accelerator)

    # data, model, and the settings that depend on them
    model, normalise = load_backbone(recipe.backbone), read_normalisation(recipe.backbone)
    source = open_source(recipe.data, match=recipe.match, raster=recipe.raster)
    recipe, derived = resolve(given, num_images=len(source), patch_size=model.patch_size, accelerator=accelerator)
    plan = Plan.of(recipe)
    packed = pack(
        source,
        short_side=recipe.image_size or None,
        strict=recipe.strict,
        workers=recipe.num_workers,
        progress=accelerator.is_main_process,
    )
    accelerator.print(describe(plan, packed, derived))

    # student, teacher, optimizer
    torch.manual_seed(recipe.seed)
    model = adapt(model, recipe.adapter, rank=recipe.rank, scale=recipe.scale, place=recipe.adapter_place)
    student = make_student(model, recipe).to(accelerator.device)
    if isinstance(student.objective, GlareObjective):
        started = region_attention.start(student.objective.cross_attention, recipe.backbone)
        if started:
            accelerator.print(started)
    resuming = recipe.resume and checkpoints.folders(recipe.output)
    if recipe.glare.head_init == "data" and not resuming:  # a checkpoint has all that this would change
        fit_head(student, packed.images, recipe, accelerator, patch_size=model.patch_size, normalise=normalise)
    teacher = make_teacher(student)
    if recipe.compile:
        student.compile_blocks()
        teacher.compile_blocks()
    watch = HealthWatch.of(student, packed.images, recipe, normalise, accelerator)
    wrapped, optimizer = prepare(student, teacher, recipe, accelerator)
    state = TrainState(student, teacher, optimizer)

    # run folder, resume
    folder = RunFolder.create(recipe.output, resume=recipe.resume, write=accelerator.is_main_process)
    checkpoint, changes = folder.begin(recipe, may_differ=MAY_DIFFER_ON_RESUME)
    for change in changes:
        accelerator.print(f"resumed with another recipe: {change}")
    accelerator.init_trackers("")
    start = 0
    if checkpoint is not None:
        state.restore(checkpoint.tensors)
        restore_scaler(accelerator, checkpoint.state.get("scaler"))
        start, meter.earlier = checkpoint.step, checkpoint.state.get("seconds", math.nan)
    watch.resume(folder, start)

    # the loop
    fitting = fits(packed.images.pixels.nbytes, accelerator.device)
    images = packed.images.to(accelerator.device) if fitting else packed.images
    batches = epoch_batches(len(packed.names), plan.batch_size, seed=recipe.seed, start=start)
    clock, done, logged = Clock(), start, start
    bar = tqdm(total=plan.steps, initial=start, desc="pretrain", disable=not accelerator.is_main_process)
    signals.hold(folder.path, bar)
    for step, batch in zip(range(start, plan.steps), batches, strict=False):
        if watch.enough:
            break
        with clock.measure("data"):
            views = cut_views(
                images,
                batch,
                recipe.views,
                accelerator,
                seed=recipe.seed,
                step=step,
                patch_size=model.patch_size,
                normalise=normalise,
            )
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(step)
        terms, grad_norms = train_step(state, wrapped, views, plan, accelerator, step=step, clock=clock)
        bar.update()
        done, stopping = step + 1, signals.asked(accelerator)
        saves = done % recipe.checkpoint_every == 0 or done == plan.steps
        if saves or done % recipe.log_every == 0:
            values = measurements(terms, grad_norms, student.objective, plan, step, clock, steps=done - logged)
            values |= watch.measure(student, done, saves=saves)
            folder.log(done, **values)
            accelerator.log(values, step=done)
            bar.set_postfix_str(progress_text({**watch.latest, **values}, watch.untouched))
            trouble = watch.judge({"step": done, **values}, folder, saves=saves)
            if trouble is not None:
                bar.close()
                raise UserError(trouble)
            clock, logged = Clock(), done
        if (saves or stopping) and watch.healthy:
            others, keep = {"seconds": meter.seconds, "scaler": scaler_state(accelerator)}, recipe.keep_checkpoints
            folder.write_checkpoint(done, state.tensors(), others, keep=keep, protected=watch.protected())
        if stopping:
            break
    bar.close()
    signals.release(accelerator)
    state.join()
    accelerator.wait_for_everyone()  # one that leaves while another still writes may keep it from ending
    accelerator.end_training()
    seconds = meter.seconds
    if accelerator.is_main_process:
        exported = watch.chosen(done)
        if exported != done:
            state.restore(folder.checkpoint(exported).tensors)
        watch.write(folder, exported=exported, last=done)
        save(model, state, recipe, folder, normalise)
        meter.write(folder, model, seconds=seconds, steps=done, images=len(packed.names))
        write_card(folder.path)
    return folder.path


def resolve(
    given: Mapping[str, Any], *, num_images: int, patch_size: int, accelerator: Accelerator
) -> tuple[PretrainRecipe, dict[str, Any]]:
    """The complete recipe, and the keys of it that were derived from the data."""
    asked = recipes.from_dict(PretrainRecipe, given)
    batch_size = asked.batch_size or min(num_images, 8 if accelerator.device.type == "cpu" else 64)
    check_shares(batch_size, accelerator.num_processes, asked.gradient_accumulation_steps)
    per_epoch = max(1, num_images // batch_size)
    steps = asked.steps or (asked.epochs * per_epoch if asked.epochs else derive_steps(num_images, batch_size))
    derived = {
        "batch_size": batch_size,
        "steps": steps,
        "freeze_last_layer_steps": min(per_epoch, steps // 10),
        **derive_optimisation(steps),
        **derive_model(steps, batch_size, patch_size=patch_size, anchored=asked.adapter in ANCHORED),
    }
    known = {key: value for key, value in given.items() if value is not None}
    recipe = recipes.from_dict(PretrainRecipe, overlay(derived, known))
    if recipe.anchor and recipe.adapter not in ANCHORED:
        raise UserError(
            f"anchor {recipe.anchor} needs the backbone without adapters, which adapter {recipe.adapter!r} changes; "
            "give --adapter uniadapter or lora, or leave anchor out"
        )
    if recipe.patience is not None and recipe.patience < 1:
        raise UserError(f"patience is {recipe.patience}; give the number of steps, at least 1, or leave it out")
    if recipe.select == "health" and recipe.checkpoint_every >= steps:
        raise UserError(
            f"select health chooses among checkpoints, and with checkpoint_every {recipe.checkpoint_every} a run of "
            f"{steps} steps writes one; give --checkpoint-every {max(1, steps // 6)}"
        )
    for name, size in (("global_size", recipe.views.global_size), ("local_size", recipe.views.local_size)):
        if size % patch_size:
            raise UserError(
                f"views.{name} {size} is no multiple of the patch size {patch_size}; "
                f"give {max(1, round(size / patch_size)) * patch_size}"
            )
    return recipe, {key: value for key, value in flatten(derived).items() if key not in flatten(known)}


def make_student(model: GlareModel, recipe: PretrainRecipe) -> Student:
    """The adapted backbone with a fresh objective."""
    config = model.config.backbone_config
    settings = getattr(recipe, recipe.objective)
    objective = OBJECTIVES[recipe.objective](config.hidden_size, config.num_attention_heads, settings)
    mask_token = recipe.views.patch_augmentation == "mask"
    return Student(model.backbone, objective, mask_token=mask_token, anchor=recipe.anchor)


def prepare(
    student: Student, teacher: Student, recipe: PretrainRecipe, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The student as its gradients are averaged over processes, and its optimizer."""
    if recipe.shard and accelerator.num_processes > 1:
        shard_blocks(student.backbone)
        shard_blocks(teacher.backbone)
        return student, accelerator.prepare(make_optimizer(student, recipe.weight_decay))
    wrapped, optimizer = accelerator.prepare(student, make_optimizer(student, recipe.weight_decay))
    return wrapped, optimizer


def fit_head(
    student: Student,
    images: PackedImages,
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    *,
    patch_size: int,
    normalise: Normalisation,
) -> None:
    """Fit the fresh head to the run's first images, the same on every process."""
    count = len(images)
    index = next(epoch_batches(count, min(count, head_start.IMAGES), seed=recipe.seed))
    first, draws = subset(images, index).to(accelerator.device), Draws(seeded(recipe.seed, 0), len(index))
    views = make_views(
        first, torch.arange(len(index)), recipe.views, patch_size=patch_size, normalise=normalise, draws=draws
    )
    with accelerator.autocast():
        temperature = Plan.of(recipe).temperature_at(0)
        head_start.start_head(student, views, temperature=temperature, draws=draws)


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
