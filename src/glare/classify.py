"""``glare classify``: train a ViT to tell classes of images apart, a step between pre-training and fine-tuning.

The classes are read from the mean of the patches after the final norm, since SimMIM does not train the [CLS] token.
What is handed on is the ViT alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from glare import ranges, recipes
from glare.agreement import check_agreement
from glare.class_images import ClassCrops, ClassImages, check_apart, check_pairs, class_names, cut_batch, labelled
from glare.crops import cut, fits, subset
from glare.data.cache import Packed, pack, skipped_lines
from glare.data.sources import open_source
from glare.disk_space import room_for
from glare.errors import NotFiniteError, UserError
from glare.figures import write_report
from glare.health_check import centre_crops
from glare.model_card import write_card
from glare.modeling_glare import GlareModel
from glare.preemption import Signals, stoppable
from glare.recipes import option, required
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
    seeded,
)
from glare.schedules import warmup_poly
from glare.segmenters import SegmenterState, image_processor, image_side, load_pretrained
from glare.shares import check_shares
from glare.versions import versions
from glare.views import Normalisation
from glare.weight_decay import parameter_groups

DROPOUT = 3  # a part of the seed of its generator
EVALUATED = 64  # images in a pass
MAY_DIFFER_ON_RESUME = frozenset({"learning_rate", "precision"})
"""Recipe keys that are a remedy for a run whose loss became infinite, and so may change with its ``--resume``."""


@dataclass(frozen=True)
class ClassifyRecipe:
    """Train a ViT to tell classes of images apart."""

    model: str = required(
        "run folder of glare pretrain, folder or Hub id of a ViT, config.json, or PEFT adapter folder"
    )
    data: str = required("folder of images that has a folder for each class")
    output: Path = required("run folder to write")
    val_data: str | None = option(None, "such a folder of other images, to measure the accuracy on")
    mixup: float = option(0.2, "alpha of MixUp of neighbours in a batch, 0 for none")
    epochs: int = option(20, "passes over the images")
    steps: int | None = option(None, "optimizer steps, instead of epochs")
    batch_size: int | None = option(None, "images a step over all processes; 8 on a CPU, 64 on a GPU where not given")
    crop_size: int | None = option(None, "side of the crops in px; that of the ViT's configuration where not given")
    area: tuple[float, float] = option((0.25, 1.0), "share of the image a crop covers, low and high")
    learning_rate: float = option(8e-4, "peak, of all weights")
    warmup_steps: int | None = option(None, "linear warm-up; a tenth of the steps, at most 1500, where not given")
    weight_decay: float = option(0.01, "of matrices; biases, norms, position embedding and class token have none")
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    seed: int = option(0, "of all draws")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    checkpoint_every: int = option(500, "steps between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay; one more has to fit on the disk")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    num_workers: int | None = option(None, "threads that decode images; one a core where not given")
    report_to: str = option("tensorboard", "trackers besides metrics.jsonl", choices=TRACKERS)
    resume: bool = option(False, "go on from the last checkpoint of the output folder")

    def __post_init__(self) -> None:
        ranges.check(self)


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare classify``."""
    run(recipes.parse(ClassifyRecipe, argv, prog="glare classify"))


class Classifier(nn.Module):
    """A ViT and a linear layer on the mean of its patches."""

    def __init__(self, vit: GlareModel, classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.config.backbone_config.hidden_size, classes)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("mask_token" not in name)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        tokens = self.vit(pixels).last_hidden_state
        logits: Tensor = self.head(tokens[:, self.vit.num_prefix_tokens(tokens, pixels) :].mean(dim=1))
        return logits


@room_for("the files of the run")
@released()
@stoppable
def run(signals: Signals, recipe: ClassifyRecipe) -> Path:
    """Train, measure the accuracy where there are images for it, and return the run folder."""
    RunFolder.check(recipe.output, resume=recipe.resume)
    accelerator = make_accelerator(
        device=recipe.device, precision=recipe.precision, report_to=recipe.report_to, output=recipe.output
    )

    # data, model, and the settings that depend on them
    torch.manual_seed(recipe.seed)  # of a config.json the weights are drawn
    vit, normalise = load_pretrained(recipe.model)
    recipe = replace(recipe, crop_size=recipe.crop_size or image_side(vit))
    packed = read(recipe, recipe.data, show=accelerator.is_main_process)
    classes = class_names(packed.names, recipe.data)
    train = labelled(packed, classes, recipe.data)
    val = held_out = None
    if recipe.val_data is not None:
        held_out = read(recipe, recipe.val_data, show=accelerator.is_main_process)
        check_apart(packed.names, recipe.data, held_out.names, recipe.val_data)
        val = labelled(held_out, classes, recipe.val_data)
    recipe = resolve(recipe, len(packed.names), patch=vit.patch_size, accelerator=accelerator)
    check_agreement(accelerator, recipe, packed.names, None if held_out is None else held_out.names)
    accelerator.print("\n".join([describe(recipe, packed, classes), *skipped_lines(packed.skipped)]))
    size, steps, batch_size, warmup = sizes(recipe)

    # classifier, optimizer
    torch.manual_seed(recipe.seed)
    model = Classifier(vit, len(classes)).to(accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=0.0)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = SegmenterState(model, optimizer)

    # run folder, resume
    folder = RunFolder.create(recipe.output, resume=recipe.resume, write=accelerator.is_main_process)
    start = 0
    checkpoint, changes = folder.begin(recipe, images=packed.names, may_differ=MAY_DIFFER_ON_RESUME)
    for change in changes:
        accelerator.print(f"resumed with another recipe: {change}")
    accelerator.init_trackers("")
    if checkpoint is not None:
        start = checkpoint.step
        state.restore(checkpoint.tensors)
        restore_scaler(accelerator, checkpoint.state.get("scaler"))

    # the loop
    crops = ClassCrops(size, recipe.area, recipe.mixup, normalise)
    if fits(train.images.pixels.nbytes, accelerator.device):
        train = replace(train, images=train.images.to(accelerator.device))
    batches = epoch_batches(len(train.labels), batch_size, seed=recipe.seed, start=start)
    bar = tqdm(total=steps, initial=start, desc="classify", disable=not accelerator.is_main_process)
    signals.hold(folder.path, bar)
    clock, logged = Clock(), start
    wrapped.train()
    for step, index in zip(range(start, steps), batches, strict=False):
        with clock.measure("data"):
            pixels, targets = cut_batch(train, index, crops, accelerator, seed=recipe.seed, step=step)
        rate = warmup_poly(step, steps=steps, warmup=warmup, peak=recipe.learning_rate)
        with folder.pointing_back():
            loss = train_step(wrapped, optimizer, pixels, targets, accelerator, seed=recipe.seed, step=step, rate=rate)
        bar.update()
        done, stopping = step + 1, signals.asked(accelerator)
        if done == steps or done % recipe.log_every == 0:
            speed = {
                "images_per_second": (done - logged) * batch_size / clock.elapsed,
                "data_wait": clock.share("data"),
            }
            values = {"loss": loss, "learning_rate": rate, **speed}
            folder.log(done, **values)
            accelerator.log(values, step=done)
            bar.set_postfix_str(f"loss {loss:.3f}")
            clock, logged = Clock(), done
        if stopping or done == steps or done % recipe.checkpoint_every == 0:
            others = {"scaler": scaler_state(accelerator)}
            with folder.pointing_back():
                check_weights(tensors := state.tensors(), done)
                folder.write_checkpoint(done, tensors, others, keep=recipe.keep_checkpoints)
        if stopping:
            break
    bar.close()
    signals.release(accelerator)
    right = None if val is None else accuracy(model, val, size, normalise, accelerator)
    if folder.write:
        finish(vit, recipe, folder, normalise, classes=classes, right=right)
    accelerator.wait_for_everyone()  # one that leaves while another still writes may keep it from ending
    accelerator.end_training()
    return folder.path


def read(recipe: ClassifyRecipe, data: str, *, show: bool) -> Packed:
    """All images of ``data``, reduced to twice the crops."""
    source = open_source(data, labels=True)  # a class may be called mask
    side = 2 * (recipe.crop_size or 0)
    return pack(source, short_side=side, strict=recipe.strict, workers=recipe.num_workers, progress=show)


def resolve(recipe: ClassifyRecipe, num_images: int, *, patch: int, accelerator: Accelerator) -> ClassifyRecipe:
    """The complete recipe. Raises UserError for sizes that do not fit."""
    size = recipe.crop_size or patch
    if size % patch:
        fitting = max(1, round(size / patch)) * patch
        raise UserError(f"crop_size {size} is no multiple of the patch size {patch}; give {fitting}")
    batch_size = recipe.batch_size or min(num_images, 8 if accelerator.device.type == "cpu" else 64)
    check_shares(batch_size, accelerator.num_processes, 1)
    if recipe.mixup:
        check_pairs(batch_size, accelerator.num_processes)
    steps = recipe.steps or recipe.epochs * max(1, num_images // batch_size)
    warmup = min(1500, steps // 10) if recipe.warmup_steps is None else recipe.warmup_steps
    return replace(recipe, crop_size=size, batch_size=batch_size, steps=steps, warmup_steps=warmup)


def sizes(recipe: ClassifyRecipe) -> tuple[int, int, int, int]:
    """Crop size, steps, batch size and warm-up of a complete recipe."""
    return recipe.crop_size or 0, recipe.steps or 0, recipe.batch_size or 0, recipe.warmup_steps or 0


def describe(recipe: ClassifyRecipe, packed: Packed, classes: Sequence[str]) -> str:
    """What is about to happen, for the user."""
    size, steps, batch_size, _ = sizes(recipe)
    count = len(packed.names)
    return (
        f"{count} images of {len(classes)} classes ({', '.join(classes)}), {len(packed.skipped)} skipped\n"
        f"{steps} steps of {batch_size} crops of {size} px = {steps * batch_size / count:.1f} passes"
    )


def train_step(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    targets: Tensor,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
    rate: float,
) -> float:
    """One optimizer step; returns the mean loss of the batch. Raises NotFiniteError, with nothing changed."""
    torch.manual_seed(seeded(seed, step, DROPOUT, accelerator.process_index).initial_seed())
    with accelerator.autocast():
        loss = cross_entropy(wrapped(pixels).float(), targets)
    accelerator.backward(loss)
    value = float(accelerator.reduce(loss.detach(), reduction="mean"))
    if not math.isfinite(value):
        raise NotFiniteError(
            f"the loss became {value} at step {step + 1}; lower learning_rate, or give --precision fp32"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return value


@torch.no_grad()
def accuracy(
    model: nn.Module, data: ClassImages, size: int, normalise: Normalisation, accelerator: Accelerator
) -> float:
    """Share of the images whose class is found in their middle square, each process counting its share of them."""
    model.eval()
    right = torch.zeros((), device=accelerator.device)
    own = torch.arange(accelerator.process_index, len(data.labels), accelerator.num_processes)
    for index in own.split(EVALUATED) if len(own) else ():  # there may be fewer images than processes
        images = subset(data.images, index)
        pixels = cut(images, torch.arange(len(index)), centre_crops(images), size=(size, size))
        with accelerator.autocast():
            found = model(normalise(pixels).to(accelerator.device)).argmax(dim=1)
        right += (found.cpu() == data.labels[index]).sum().item()
    model.train()
    return float(accelerator.reduce(right, reduction="sum")) / len(data.labels)


def finish(
    vit: GlareModel,
    recipe: ClassifyRecipe,
    folder: RunFolder,
    normalise: Normalisation,
    *,
    classes: Sequence[str],
    right: float | None,
) -> None:
    """Write ``model/``, the ViT without its classifier, ``report/`` and, where it was measured, ``accuracy.json``."""
    with folder.publish("model") as path:
        vit.save_pretrained(path)
        image_processor(normalise, size=recipe.crop_size or 0, patch=vit.patch_size).save_pretrained(path)
    write_report(folder)
    print(f"the model is in {folder.path / 'model'}")
    if right is None:
        print("no accuracy: there are no images to measure it on (--val-data)")
    else:
        print(f"accuracy {100 * right:.2f}")
        about = {"data": recipe.val_data, "model": str(folder.path / "model"), "seed": recipe.seed}
        values = {"accuracy": right, "classes": list(classes), **about, "versions": versions()}
        atomic_write_json(folder.path / "accuracy.json", values)
    write_card(folder.path)
