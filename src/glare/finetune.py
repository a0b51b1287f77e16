"""``glare finetune``: train a segmentation head, and what is below it, on labelled images.

Where this departs from the mmsegmentation configuration of the UDI line (ViT with semantic FPN): class and register
tokens stay in the sequence, since adapters were trained in their presence; biases and batch norms have no weight decay;
the loss is the mean over the labelled pixels of the batch, not over all; the warm-up is one step ahead. Where the
recipe leaves it open, more differs: head and backbone have learning rates of their own, equal only in long runs; the
warm-up is a tenth of the steps where that is less than 1500; images keep their native size, which the scale is relative
to; no drop path.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from glare import ranges, recipes
from glare.agreement import check_agreement
from glare.data.labelled import LabelledSet, PackedLabelled, pack_labelled
from glare.data.raster_windows import RasterReading
from glare.dense_inference import asked, check_scale, remember
from glare.disk_space import room_for
from glare.drop_path import drop_paths
from glare.errors import UserError
from glare.evaluate import confusion, describe, table
from glare.figures import write_report
from glare.finetune_data import absent_classes, open_data, unusable, val_part
from glare.finetune_log import describe_run, measurements, progress_text, summary
from glare.finetune_plan import Plan, make_plan
from glare.finetune_step import cut_batch, learning_rates, train_step
from glare.json_files import read_json
from glare.labelled_crops import TrainingCrops, scaled_sizes, to_device
from glare.metrics import SegmentationScores
from glare.model_card import write_card
from glare.model_names import place_of
from glare.preemption import Signals, stoppable
from glare.recipes import option, required
from glare.resuming import CHANGE_NO_RESULT, frozen_digest
from glare.run_folder import RunFolder, atomic_write_json
from glare.run_lock import released
from glare.runtime import (
    DEVICES,
    PRECISIONS,
    TRACKERS,
    Clock,
    check_weights,
    epoch_batches,
    make_accelerator,
    restore_scaler,
    scaler_state,
)
from glare.seeds import repeat
from glare.segmenters import (
    HEADS,
    TRAINED,
    SegmenterState,
    add_head,
    image_processor,
    load_pretrained,
    parameter_groups,
    select_trained,
    set_training,
    synchronised,
    vit_of,
)
from glare.shares import check_shares
from glare.views import Normalisation
from glare.weight_files import weights_digest

MAY_DIFFER_ON_RESUME = frozenset({"backbone_learning_rate", "learning_rate", "precision"})
"""Recipe keys that are a remedy for a run whose loss became infinite, and so may change with its ``--resume``."""

FREE_ON_RESUME = CHANGE_NO_RESULT | {"steps"}
"""Other keys that may; not the parts of a batch, which the batch norm of most heads sees one by one."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Train a segmentation head, and what is below it, on labelled images."""

    model: str = required("run folder of glare pretrain, folder or Hub id of a ViT, or a PEFT adapter folder")
    data: str = required("labelled folder, landcover:<domain>[:count[:seed]], or of the catalog (loveda:FOLDER)")
    output: Path = required("run folder to write")
    head: str = option("fpn", "what turns features into classes", choices=HEADS)
    pyramid: bool = option(False, "fpn, upernet: rescale the taps to 4, 2, 1 and 1/2 of the patch grid first")
    train_on: str = option("full", "what trains besides the head: everything, the adapters, nothing", choices=TRAINED)
    train_split: str | None = option(None, "sub-folder to train on; train where there is one")
    match: str | None = option(
        None, "globs on file stems, or paths as 'train/*', to train on, comma-separated, ! excludes"
    )
    fraction: float = option(1.0, "train on this share of the images only, as 0.1 or 1/32, drawn with the seed")
    num_images: int | None = option(None, "train on this many images only, drawn with the seed")
    val_data: str | None = option(None, "data to evaluate on, if it is not a part of --data")
    val_split: str | None = option(None, "sub-folder to evaluate on; val, or test, where there is one")
    val_match: str | None = option(None, "globs to evaluate on, as 'val/*'")
    eval_every: int | None = option(None, "evaluate every so many steps too, not only at the end")
    steps: int | None = option(None, "optimizer steps; derived from the number of images where not given")
    batch_size: int | None = option(None, "crops a step over all processes; 4 on a CPU, 8 on a GPU where not given")
    gradient_accumulation_steps: int = option(1, "parts of a batch that are computed one after another, to save memory")
    crop_size: int | None = option(None, "side of the crops in px; derived from the images' short side where not given")
    base_scale: tuple[int, int] | None = option(None, "bring images to fit these two sides in px first, as 2048,512")
    scale: tuple[float, float] = option((0.5, 2.0), "lowest and highest random factor on that size")
    dominant_share: float = option(
        0.75, "crops in which one class has this share are drawn anew, up to ten times; 1: none"
    )
    learning_rate: float | None = option(None, "peak, of the head; derived from the steps where not given")
    backbone_learning_rate: float | None = option(None, "peak, of everything else; derived where not given")
    warmup_steps: int | None = option(None, "linear warm-up; a tenth of the steps, at most 1500, where not given")
    min_learning_rate: float = option(0.0, "what the rates fall to")
    poly_power: float = option(1.0, "of the schedule; 1 is a straight line")
    drop_path: float = option(0.0, "stochastic depth at the last block of the ViT, less at the earlier ones")
    weight_decay: float = option(0.01, "of matrices; biases, norms, position embedding and class token have none")
    window: int | None = option(None, "evaluation: side in px of sliding windows; only above 1536 px where not given")
    stride: int | None = option(None, "evaluation: distance of the windows; two thirds of them where not given")
    test_scale: tuple[int, int] | None = option(None, "evaluation: as --base-scale, which stands where not given")
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    seed: int = option(0, "of all draws")
    seeds: int = option(1, "runs, each with the next seed, in folders seed_<seed> of the output; seeds.json sums up")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    checkpoint_every: int = option(500, "steps between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay; one more has to fit on the disk")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    num_workers: int = option(8, "threads that decode images")
    report_to: str = option("tensorboard", "trackers besides metrics.jsonl", choices=TRACKERS)
    resume: bool = option(False, "go on from the last checkpoint of the output folder")
    raster: RasterReading = option(RasterReading(), "GeoTIFFs")

    def __post_init__(self) -> None:
        asked(self)
        check_scale("base_scale", self.base_scale)
        ranges.check(self)
        if self.pyramid and self.head not in ("fpn", "upernet"):
            raise ValueError(f"pyramid is on, but head {self.head!r} has none; give --head fpn or upernet")


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare finetune`` and of ``accelerate launch training/finetune.py``."""
    recipe = recipes.parse(FinetuneRecipe, argv, prog="glare finetune")
    if recipe.seeds > 1:
        run_seeds(recipe)
    else:
        run(recipe)


@dataclass(frozen=True)
class Job:
    """What stays the same during a run."""

    recipe: FinetuneRecipe
    plan: Plan
    accelerator: Accelerator
    normalise: Normalisation
    val: LabelledSet | None


@room_for("the files of the run")
@released()
@stoppable
def run(signals: Signals, recipe: FinetuneRecipe, *, train: LabelledSet | None = None, more: bool = False) -> Path:
    """Fine-tune once, evaluate where there is something to evaluate on, and return the run folder.

    ``train``: images to train on in place of those the recipe names; then nothing is evaluated. ``more``: the processes
    stay together, as another run follows.
    """
    RunFolder.check(recipe.output, resume=recipe.resume)
    accelerator = make_accelerator(
        device=recipe.device, precision=recipe.precision, report_to=recipe.report_to, output=recipe.output
    )

    # data, model, and the settings that depend on them
    train, val = (train, None) if train is not None else open_data(recipe)
    torch.manual_seed(recipe.seed)  # of a config.json the weights are drawn
    pretrained, normalise = load_pretrained(recipe.model)
    show = accelerator.is_main_process
    packed = pack_labelled(train, strict=recipe.strict, workers=recipe.num_workers, progress=show)
    plan = resolve(recipe, packed, patch=pretrained.patch_size, accelerator=accelerator)
    accelerator.print(describe_run(recipe, packed, plan, absent=absent_classes(packed)))
    derived = [name for name in asdict(plan) if getattr(recipe, name) is None]
    recipe = replace(recipe, **asdict(plan), test_scale=recipe.test_scale or recipe.base_scale)
    check_agreement(accelerator, recipe, packed.names, val.names if val is not None else None)
    job = Job(recipe, plan, accelerator, normalise, val)

    # segmenter, optimizer
    torch.manual_seed(recipe.seed)
    palette = packed.palette.tolist()
    model = add_head(pretrained, recipe.head, pyramid=recipe.pyramid, classes=packed.classes, palette=palette)
    select_trained(model, recipe.train_on)
    drop_paths(vit_of(model), recipe.drop_path)
    remember(model, asked(recipe))
    model = synchronised(model.to(accelerator.device), processes=accelerator.num_processes)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = SegmenterState(model, optimizer)

    # run folder, resume
    folder = RunFolder.create(recipe.output, resume=recipe.resume, write=accelerator.is_main_process)
    start, frozen = 0, frozen_digest(model)
    checkpoint, changes = folder.begin(
        recipe,
        images=packed.names,
        frozen=frozen,
        derived=derived,
        may_differ=MAY_DIFFER_ON_RESUME,
        free=FREE_ON_RESUME,
    )
    for change in changes:
        accelerator.print(f"resumed with another recipe: {change}")
    accelerator.init_trackers("")
    if checkpoint is not None:
        start = checkpoint.step
        state.restore(checkpoint.tensors)
        restore_scaler(accelerator, checkpoint.state.get("scaler"))

    # the loop
    crops = TrainingCrops(plan.crop_size, recipe.scale, recipe.dominant_share, normalise, recipe.base_scale)
    packed = to_device(packed, accelerator.device)
    batches = epoch_batches(len(packed.names), plan.batch_size, seed=recipe.seed, start=start)
    bar = tqdm(total=plan.steps, initial=start, desc="finetune", disable=not show)
    signals.hold(folder.path, bar)
    clock, logged = Clock(), start
    set_training(model)
    for step, index in zip(range(start, plan.steps), batches, strict=False):
        if step and recipe.eval_every and step % recipe.eval_every == 0:
            # first here, after the checkpoint of these steps: a run that is stopped in it does it again
            scores, _ = judge(job, model)
            folder.log(step, **summary(scores))
            accelerator.log(summary(scores), step=step)
        with clock.measure("data"):
            batch = cut_batch(packed, index, crops, accelerator, seed=recipe.seed, step=step)
        with clock.measure("train"), folder.pointing_back():
            loss = train_step(wrapped, optimizer, batch, plan, accelerator, seed=recipe.seed, step=step)
        bar.update()
        done, last = step + 1, step + 1 == plan.steps
        if last or done % recipe.log_every == 0:
            values = measurements(plan, loss, clock, rates=learning_rates(plan, step), steps=done - logged)
            folder.log(done, **values)
            accelerator.log(values, step=done)
            bar.set_postfix_str(progress_text(values))
            clock, logged = Clock(), done
        elif step == start:
            clock, logged = Clock(), done  # a process takes longer for its first step
        stopping = signals.asked(accelerator)
        if stopping or last or done % recipe.checkpoint_every == 0:
            others = {"scaler": scaler_state(accelerator)}
            with folder.pointing_back():
                check_weights(tensors := state.tensors(), done)
                folder.write_checkpoint(done, tensors, others, keep=recipe.keep_checkpoints)
        if stopping:
            break
    bar.close()
    signals.release(accelerator)
    finish(job, model, folder)
    if folder.write:
        write_card(folder.path)
    accelerator.wait_for_everyone()  # one that leaves while another still writes may keep it from ending
    if more:
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()
    return folder.path


@released()
def run_seeds(recipe: FinetuneRecipe) -> dict[str, Any]:
    """Fine-tune with ``recipe.seeds`` seeds, as ``seeds.repeat`` does, and return what ``seeds.json`` holds."""
    if open_data(recipe)[1] is None:
        raise UserError("--seeds needs images to evaluate on: give --val-split, --val-match or --val-data")
    return repeat(recipe, partial(run, more=True))


def resolve(recipe: FinetuneRecipe, packed: PackedLabelled, *, patch: int, accelerator: Accelerator) -> Plan:
    """The numbers of the run, derived from the data where the recipe leaves them open."""
    short_side = int(scaled_sizes(packed.images.size, recipe.base_scale).amin(dim=1).median())
    on_cpu, processes = accelerator.device.type == "cpu", accelerator.num_processes
    plan = make_plan(recipe, num_images=len(packed.names), short_side=short_side, patch=patch, on_cpu=on_cpu)
    if plan.crop_size % patch:
        fitting = max(1, round(plan.crop_size / patch)) * patch
        raise UserError(f"crop_size {plan.crop_size} is no multiple of the patch size {patch}; give {fitting}")
    check_shares(plan.batch_size, processes, plan.gradient_accumulation_steps)
    alone = processes * plan.gradient_accumulation_steps if on_cpu else plan.gradient_accumulation_steps
    if recipe.head == "upernet" and plan.batch_size < 2 * alone:
        raise UserError(
            f"head upernet needs 2 crops in every pass, for its batch norm of one pooled cell; give a batch_size of "
            f"{2 * alone} or more (now {plan.batch_size})"
        )
    return plan


def judge(job: Job, model: PreTrainedModel) -> tuple[SegmentationScores, list[tuple[str, str]]]:
    """Scores of the model as it is, each process on its share of the images, and what was skipped."""
    assert job.val is not None
    accelerator, recipe = job.accelerator, job.recipe
    indices = range(accelerator.process_index, len(job.val), accelerator.num_processes)
    model.eval()
    with accelerator.autocast():
        matrix, skipped = confusion(
            model, job.val, indices, normalise=job.normalise, sweep=asked(recipe), strict=recipe.strict
        )
    set_training(model)
    total = accelerator.reduce(matrix.to(accelerator.device), reduction="sum").cpu()
    return SegmentationScores.from_confusion(total, job.val.classes), gather_object(skipped)


def drop_scores_of_others(run: Path) -> None:
    """Remove ``eval.json`` where it is of other weights than ``model/``, as that of a run that has gone on."""
    file = run / "eval.json"
    if not file.exists():
        return
    with suppress(UserError):  # a broken one goes
        if read_json(file).get("weights_sha256") == weights_digest(place_of(str(run))):
            return
    file.unlink()


def finish(job: Job, model: PreTrainedModel, folder: RunFolder) -> None:
    """Write ``model/``, then evaluate where there are labels for it and write ``eval.json``."""
    if folder.write:
        with folder.publish("model") as path:
            model.save_pretrained(path)
            patch = vit_of(model).patch_size
            image_processor(job.normalise, size=job.plan.crop_size, patch=patch).save_pretrained(path)
        drop_scores_of_others(folder.path)
        write_report(folder)
        print(f"the model is in {folder.path / 'model'}")
    if job.val is None:
        job.accelerator.print("no scores: there are no images to evaluate on (--val-split, --val-match or --val-data)")
        return
    scores, skipped = judge(job, model)
    num_images = len(job.val) - len(skipped)
    if not num_images:
        raise UserError(f"{unusable(len(job.val), *skipped[0])}; the model is kept, score it with glare evaluate")
    job.accelerator.log(summary(scores), step=job.plan.steps)
    if folder.write:
        print(table(scores, num_images=num_images, skipped=skipped))
        data, split = val_part(job.recipe)
        about = {"data": data, "split": split, "match": job.recipe.val_match, "model": str(folder.path / "model")}
        about["weights_sha256"] = weights_digest(place_of(str(folder.path)))
        seed, sweep = job.recipe.seed, asked(job.recipe)
        entry = describe(scores, num_images=num_images, seed=seed, about=about, sweep=sweep)
        atomic_write_json(folder.path / "eval.json", entry)
