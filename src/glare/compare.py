"""``glare compare``: did the adaptation help, by how much, against what, and at what price.

Untouched, adapted, foreign and control models are measured on the same images with the same splits, heads and seeds.
A control is the untouched model with random adapters that move its features as far as the adaptation did: what it
gains is no merit of the adaptation.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from glare import recipes
from glare.backbones import load_backbone, read_normalisation
from glare.comparison import CONTROL, UNTOUCHED, Comparison, DataResult, Health, Model, Price
from glare.comparison_data import Pool, SplitPlan, check_chosen, open_pool, sample
from glare.comparison_finetuning import FineTuning, finetuned_areas, finetuned_predictions
from glare.comparison_models import WEIGHTS, Group, check_same_weights, file_name, groups_of, load, untouched
from glare.comparison_pictures import Side, draw
from glare.comparison_probes import PROBES, Subject, frozen_areas, frozen_predictions, health_of, read_subject
from glare.comparison_recipe import CompareRecipe
from glare.controls import patch_tokens, random_adapters
from glare.errors import UserError
from glare.frozen_features import PatchFeatures, extract
from glare.health import collapse, mean_cosine
from glare.modeling_glare import GlareModel
from glare.price import inference_overhead, price
from glare.report import Picture, summary, write_report
from glare.resuming import CHANGE_NO_RESULT, frozen_digest
from glare.run_folder import RunFolder, atomic_write_json, run_folder_of
from glare.run_lock import released
from glare.runtime import make_accelerator
from glare.verdicts import Measured, confidence_of, probe_result, row_verdict
from glare.versions import versions
from glare.views import Normalisation

PATCHES = {"linear": 28, "knn": 20, "fpn": 28}
"""On the short side of the images that probes see: as pre-training keeps them, fewer for the protocol that is quick."""

CALIBRATION, CALIBRATION_PATCHES = 32, 8  # images, and patches on their sides, that set the strength of random adapters
TIMED_PAIRS = 12
SEEDS = {"linear": 3, "knn": 1, "fpn": 3}
CONTROLS = {"linear": 5, "knn": 3, "fpn": 3}


@dataclass(frozen=True)
class Job:
    """What stays the same during a comparison."""

    recipe: CompareRecipe
    accelerator: Accelerator
    base: GlareModel
    normalise: Normalisation
    folder: RunFolder

    def normalised(self, pixels: Tensor) -> Tensor:
        """Images (n, 3, h, w) uint8 as the models take them, on their device."""
        return self.normalise(pixels.to(self.accelerator.device).float().div(255))


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare compare``."""
    run(recipes.parse(CompareRecipe, argv, prog="glare compare"))


@released()
def run(recipe: CompareRecipe) -> Comparison:
    """Measure, judge, write the report and return what it says."""
    started = time.perf_counter()
    RunFolder.check(recipe.output, resume=recipe.resume)
    accelerator = make_accelerator(device=recipe.device, precision=recipe.precision, report_to="none", output=Path())

    # models and data
    rows, foreign = groups_of(recipe.adapted, recipe.foreign)
    torch.manual_seed(recipe.seed)  # of a config.json the weights are drawn
    base = load_backbone(recipe.base).eval().requires_grad_(False).to(accelerator.device)
    if base.config.adapter_config is not None:
        raise UserError(f"the base {recipe.base!r} has adapters already; give the ViT that it was adapted from")
    given = [model for group in (*rows, foreign) if group for model in group.members]
    digests = {str(model.path): frozen_digest(load(model, base)) for model in given}
    digests[recipe.base] = frozen_digest(base)
    check_same_weights(recipe.output, digests)
    data = (recipe.data, *recipe.forgetting)
    pools = [
        open_pool(name, match=recipe.match if name == recipe.data else None, raster=recipe.raster) for name in data
    ]
    folder = RunFolder(recipe.output, write=True)
    job = Job(recipe, accelerator, base, read_normalisation(recipe.base), folder)
    subjects = [open_subject(job, number, *named) for number, named in enumerate(zip(data, pools, strict=True))]
    RunFolder.create(recipe.output, resume=recipe.resume).begin(recipe, free=free_on_resume(recipe.protocol))
    atomic_write_json(folder.path / WEIGHTS, digests)

    # controls, measurements, verdicts
    draws = {row.name: make_controls(job, row, subjects[0], number) for number, row in enumerate(rows)}
    models = [untouched(recipe.base), *given, *(model for drawn in draws.values() for model in drawn)]
    controls = {name: [model.name for model in drawn] for name, drawn in draws.items()}
    shown: dict[str, PatchFeatures | None] = {UNTOUCHED: None, rows[0].members[0].name: None}
    measured = [measure(job, number, subject, models, shown) for number, subject in enumerate(subjects)]
    results = [
        judged(subject, *values, controls, rows, foreign, main=subject is subjects[0])
        for subject, values in zip(subjects, measured, strict=True)
    ]
    health = results[0].health
    verdicts = [row_verdict(row, results[0].probes, collapse_of(row, health)) for row in rows]

    # price, report
    comparison = Comparison(
        protocol=recipe.protocol,
        base=recipe.base,
        confidence=confidence_of(len(rows)),
        seeds=len(subjects[0].folds),
        models=models,
        rows=verdicts,
        data=results,
        prices={model.name: price_of(job, model, subjects[0]) for model in given},
        seconds=time.perf_counter() - started,
        command=recipe.command(),
        versions=versions(),
    )
    curves = {model.name: run / "metrics.jsonl" for model in given if (run := run_folder_of(str(model.path)))}
    pictures = pictures_of(job, subjects[0], measured[0][0], rows[0].members[0], shown)
    page = write_report(folder.path, comparison, pictures, curves)
    print(summary(comparison))
    print(f"report: {page}")
    return comparison


def free_on_resume(protocol: str) -> frozenset[str]:
    """Recipe keys that may change when a comparison goes on: fine-tunings take their batch and crop from the device."""
    return CHANGE_NO_RESULT - {"device"} if protocol == "fpn" else CHANGE_NO_RESULT


def open_subject(job: Job, number: int, name: str, pool: Pool) -> Subject:
    """Data set ``number``, read and divided; only the first one by the recipe's groups, folds and matches."""
    recipe = job.recipe
    if recipe.num_images is not None:
        pool = sample(pool, recipe.num_images, seed=recipe.seed)
    main = number == 0
    plan = SplitPlan(
        val_match=recipe.val_match if main else None,
        group_by=recipe.group_by if main else None,
        folds=recipe.folds if main else None,
        seeds=recipe.seeds or SEEDS[recipe.protocol],
        seed=recipe.seed,
    )
    if main:
        check_chosen(pool, plan, recipe.match, data=name)
    return read_subject(
        name,
        pool,
        plan,
        patch=job.base.patch_size,
        short_side=recipe.short_side or PATCHES[recipe.protocol] * job.base.patch_size,
        strict=recipe.strict,
        repeat=recipe.protocol != "linear",
    )


def make_controls(job: Job, row: Group, subject: Subject, place: int) -> list[Model]:
    """Random adapters that move the features as far as the row's adaptation did, saved in ``controls/``.

    ``place``: of the row among all rows, whose draws are independent.
    """
    count = job.recipe.controls or CONTROLS[job.recipe.protocol]
    names = [f"random {number + 1} like {row.name}" for number in range(count)]
    models = [Model(name, CONTROL, None, of=row.name) for name in names]
    models = [replace(model, path=str(job.folder.path / "controls" / file_name(model))) for model in models]
    missing = {number: model for number, model in enumerate(models) if not Path(str(model.path)).exists()}
    if not missing:
        return models
    images = job.normalised(subject.thumbnails(CALIBRATION, side=CALIBRATION_PATCHES * job.base.patch_size))
    members = [load(model, job.base).to(job.accelerator.device) for model in row.members]
    with torch.inference_mode(), job.accelerator.autocast():
        reference = patch_tokens(job.base, images)
        target = sum(mean_cosine(patch_tokens(model, images), reference) for model in members) / len(members)
    config = members[0].config.adapter_config
    like = None if config is None else PeftConfig.from_peft_type(**config)
    for number, model in missing.items():
        with job.accelerator.autocast():
            seed = job.recipe.seed + place * count + number
            adapted, reached = random_adapters(job.base, like, images, reference, target, seed=seed)
        with job.folder.publish(f"controls/{file_name(model)}") as path:
            adapted.save_adapter(path, base_model=job.recipe.base)
        print(f"{model.name}: mean cosine to the untouched features {reached:.3f}, wanted {target:.3f}")
    return models


def measure(
    job: Job, number: int, subject: Subject, models: Sequence[Model], shown: dict[str, PatchFeatures | None]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Health]]:
    """Areas (seeds, images, 3, k) by probe and model, and the health of each model; what is on disk is not repeated.

    On the first data set, the features of the models in ``shown`` are put there, for the pictures.
    """
    found: dict[str, dict[str, Tensor]] = {probe: {} for probe in PROBES[job.recipe.protocol]}
    health: dict[str, Health] = {}
    reference: PatchFeatures | None = None
    for model in models:
        folder = f"scores/{number}_{file_name(model)}"
        saved = job.folder.path / folder
        if reference is None or not saved.exists():
            features = features_of(job, model, subject)
            reference = reference or features
            if number == 0 and model.name in shown:
                shown[model.name] = features
        if not saved.exists():
            print(f"{subject.name}: {model.name}", flush=True)
            state = health_of(features, reference)
            values = (
                {"fpn": finetuned_areas(subject, tuning_of(job, number, model), job.accelerator)}
                if job.recipe.protocol == "fpn"
                else frozen_areas(features, subject, job.recipe.protocol)
            )
            with job.folder.publish(folder) as path:
                save_file({probe: value.contiguous() for probe, value in values.items()}, path / "areas.safetensors")
                (path / "health.json").write_text(json.dumps(asdict(state)))
        for probe, value in load_file(saved / "areas.safetensors").items():
            found[probe][model.name] = value
        health[model.name] = Health(**json.loads((saved / "health.json").read_text()))
    return found, health


def features_of(job: Job, model: Model, subject: Subject) -> PatchFeatures:
    """Frozen features of a model on all images of a data set."""
    loaded = job.base if model.name == UNTOUCHED else load(model, job.base)
    return extract(
        loaded,
        subject.images,
        normalise=job.normalise,
        device=job.accelerator.device,
        autocast=job.accelerator.autocast,
    )


def tuning_of(job: Job, number: int, model: Model) -> FineTuning:
    """How a model is fine-tuned on data set ``number``."""
    recipe = job.recipe
    return FineTuning(
        folder=job.folder.path / "finetuned" / f"{number}_{file_name(model)}",
        model=str(model.path),
        head=recipe.head,
        steps=recipe.steps,
        seed=recipe.seed,
        device=recipe.device,
        precision=recipe.precision,
    )


def judged(
    subject: Subject,
    found: Mapping[str, Mapping[str, Tensor]],
    health: Mapping[str, Health],
    controls: Mapping[str, Sequence[str]],
    rows: Sequence[Group],
    foreign: Group | None,
    *,
    main: bool,
) -> DataResult:
    """What was measured on a data set, with verdicts."""
    classes = list(subject.pool.data.classes)
    probes = [
        probe_result(probe, Measured(values, controls, classes, subject.tested_groups), rows, foreign)
        for probe, values in found.items()
    ]
    return DataResult(
        data=subject.name,
        split=subject.division.text,
        num_images=len(subject.tested),
        repeats=subject.repeats(),
        classes=classes,
        adapted_to=main,
        health=health,
        probes=probes,
    )


def collapse_of(row: Group, health: Mapping[str, Health]) -> str | None:
    """In what a model of the row has collapsed, None if none has."""
    reasons = (collapse(health[model.name], health[UNTOUCHED]) for model in row.members)
    return next((reason for reason in reasons if reason), None)


def pictures_of(
    job: Job,
    subject: Subject,
    found: Mapping[str, Mapping[str, Tensor]],
    model: Model,
    shown: Mapping[str, PatchFeatures | None],
) -> list[Picture]:
    """Pictures of the untouched and one adapted model, of the images that changed most under the last probe."""
    areas = found[PROBES[job.recipe.protocol][-1]]
    right = [areas[name].sum(dim=0)[:, 0].sum(dim=1) for name in (UNTOUCHED, model.name)]
    labelled = areas[UNTOUCHED].sum(dim=0)[:, 1].sum(dim=1).clamp(min=1)

    def side(of: Model) -> Side:
        loaded = job.base if of.name == UNTOUCHED else load(of, job.base).to(job.accelerator.device)
        features = shown[of.name] or features_of(job, of, subject)
        return Side(of.name, loaded, features, partial(predictions, job, subject, of, features))

    return draw(
        subject,
        side(untouched(job.recipe.base)),
        side(model),
        (right[1] - right[0]) / labelled,
        normalise=job.normalise,
        autocast=job.accelerator.autocast,
    )


def predictions(
    job: Job, subject: Subject, model: Model, features: PatchFeatures, images: Sequence[int]
) -> list[NDArray[np.uint8]]:
    """Class indices (h, w) of some tested images at the size the frozen probes see."""
    if job.recipe.protocol == "fpn":
        return finetuned_predictions(subject, tuning_of(job, 0, model), images, job.accelerator.device)
    return frozen_predictions(features, subject, job.recipe.protocol, images)


def price_of(job: Job, model: Model, subject: Subject) -> Price:
    """What an adapted model costs, its overhead timed on this machine."""
    images = job.normalised(subject.images[0].unsqueeze(0))
    adapted = load(model, job.base).to(job.accelerator.device)
    with torch.inference_mode(), job.accelerator.autocast():
        overhead = inference_overhead(job.base, adapted, images, repeats=TIMED_PAIRS)
    return price(str(model.path), overhead=overhead)
