"""``glare inspect``: see what a pre-training would see, and check the data, before any training."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from glare import recipes
from glare.backbones import load_backbone, read_normalisation
from glare.data.cache import pack
from glare.data.sources import Images
from glare.data_advice import Needs, advice, describe, to_json
from glare.data_check import DataCheck, check_data
from glare.draws import Draws
from glare.errors import UserError
from glare.features import encode, use_packed_attention
from glare.feed import list_images
from glare.inspection_sheet import Sampled, sheet
from glare.model_names import EMBEDDED
from glare.modeling_glare import GlareModel
from glare.objectives.glare import GlareSettings
from glare.objectives.places import find_matches, find_regions
from glare.pretrain import PretrainRecipe, resolve
from glare.pretrain_step import OBJECTIVE, cut_views
from glare.recipes import option, required
from glare.regions import Regions
from glare.run_folder import atomic_write_json, atomic_write_png
from glare.runtime import epoch_batches, make_accelerator, seeded
from glare.views import Normalisation

OWN_KEYS = ("num_images", "json")


@dataclass(frozen=True)
class InspectRecipe(PretrainRecipe):
    """See what a pre-training would see, and check the data, before any training.

    Takes the recipes and all keys of glare pretrain; those that have to do with neither images nor views nor regions
    change nothing.
    """

    backbone: str = option(EMBEDDED, "folder or Hub id of a ViT, for the size of its patches and its attention")
    output: Path = required("PNG file to write")
    num_images: int = option(4, "images on the sheet")
    json: Path | None = option(None, "file to write the check of the data to")


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare inspect``."""
    run(recipes.parse_given(InspectRecipe, argv, prog="glare inspect"))


def run(given: Mapping[str, Any]) -> DataCheck:
    """Check the data and print what was found, then write the sheet; ``given`` are the recipe keys the user set."""
    recipe = recipes.from_dict(InspectRecipe, given)
    check_output(recipe.output, ".png")
    if recipe.json is not None:
        check_output(recipe.json, ".json")
    accelerator = make_accelerator(device=recipe.device, precision=recipe.precision, report_to="none", output=Path())
    model, normalise = load_backbone(recipe.backbone), read_normalisation(recipe.backbone)
    source = list_images(recipe)
    shared = {"backbone": recipe.backbone} | {key: value for key, value in given.items() if key not in OWN_KEYS}
    training, _ = resolve(shared, num_images=len(source), patch_size=model.patch_size, accelerator=accelerator)

    # the data
    short_side = training.image_size or None
    check = check_data(
        source,
        recipe.data,
        split=recipe.split,
        short_side=short_side,
        workers=recipe.num_workers,
        progress=True,
        raster=recipe.raster,
    )
    needs = Needs(global_size=training.views.global_size, image_size=training.image_size or 0)
    lines = advice(check, needs)
    print(describe(check, lines))
    if recipe.json is not None:
        recipe.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(recipe.json, to_json(check, lines, data=recipe.data))

    # the sheet
    if recipe.backbone == EMBEDDED:
        print(f"patches and attention are those of {EMBEDDED}, the small ViT of this package; --backbone takes another")
    usable = set(check.names)
    images = source.subset(index for index in range(len(source)) if source.name(index) in usable)
    sampled = draw(images, recipe.num_images, training, model, normalise, accelerator)
    picture = sheet(
        sampled,
        normalise=normalise,
        min_overlap=training.glare.min_overlap,
        changes=training.views.patch_augmentation,
        lines=headline(training, shown=len(sampled.names), total=len(images), grid=sampled.views.grid),
    )
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_png(recipe.output, picture)
    print(f"the sheet is in {recipe.output}")
    return check


def draw(
    images: Images,
    count: int,
    recipe: PretrainRecipe,
    model: GlareModel,
    normalise: Normalisation,
    accelerator: Accelerator,
) -> Sampled:
    """The first images that training would take, at most ``count``, and what it would cut and choose of them.

    With a batch of as many images, this is the first step of the training.
    """
    count = min(count, len(images))
    order = next(epoch_batches(len(images), count, seed=recipe.seed))
    chosen = images.subset(order.tolist())
    packed = pack(chosen, short_side=recipe.image_size or None, strict=True, workers=recipe.num_workers)
    views = cut_views(
        packed.images,
        torch.arange(count),
        recipe.views,
        accelerator,
        batch_size=count,
        seed=recipe.seed,
        step=0,
        patch_size=model.patch_size,
        normalise=normalise,
    )
    use_packed_attention(model.backbone)
    model.backbone.eval().to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        features = encode(model.backbone, [views.global_], attention=True)[0]
    assert features.attention is not None
    matches = find_matches(views, min_overlap=recipe.glare.min_overlap, local_queries=False)
    draws = Draws(seeded(recipe.seed, 0, OBJECTIVE), count)
    regions = find_regions(features, matches, views, recipe.glare.regions, draws)
    pictures = [packed.images.image(index).numpy() for index in range(count)]
    return Sampled(
        packed.names, pictures, views, maps_of_regions(features.attention, regions[0], recipe.glare), regions
    )


def maps_of_regions(attention: Tensor, regions: Regions, settings: GlareSettings) -> Tensor:
    """The map behind each region (2, b, m, n): of its head, or of all heads where these are drawn at random."""
    count, heads = regions.index.shape[1], attention.shape[2]
    if count < heads or settings.regions.sampling == "random":
        return attention.mean(dim=2, keepdim=True).expand(-1, -1, count, -1)
    return attention[:, :, torch.arange(count) % heads]


def headline(recipe: PretrainRecipe, *, shown: int, total: int, grid: tuple[int, int]) -> list[str]:
    """What the sheet shows and with which settings."""
    views, regions = recipe.views, recipe.glare.regions
    kept = f"kept at a short side of {recipe.image_size} px" if recipe.image_size else "kept at their size"
    return [
        f"What a pre-training on {recipe.data} sees",
        f"{shown} of {total} images, {kept}. 2 global views of {views.global_size} px, {grid[0]} x {grid[1]} patches, "
        f"on {_percent(views.global_area)} of an image; {views.num_local} local views of {views.local_size} px "
        f"on {_percent(views.local_area)}.",
        f"Patch augmentation {views.patch_augmentation}: {_percent(views.patch_ratio)} of the patches in "
        f"{100 * views.patch_prob:g} % of the views. Regions of {regions.min_side} to {regions.max_side} patches a "
        f"side, from the attention of {recipe.backbone}.",
    ]


def _percent(limits: tuple[float, float]) -> str:
    return f"{100 * limits[0]:g} to {100 * limits[1]:g} %"


def check_output(file: Path, extension: str) -> None:
    """UserError if a new file of this extension cannot be written there."""
    if file.suffix.lower() != extension:
        raise UserError(f"the output {file} is no {extension} file; give a name that ends in {extension}")
    if file.exists():
        kind = "folder" if file.is_dir() else "file"
        raise UserError(f"the output {file} is there already, a {kind}; give another name, or remove it")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"the output {file} cannot be made, {above} is no folder one may write to; give another")
