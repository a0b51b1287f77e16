"""``glare export``: an adapted ViT as a plain checkpoint of transformers, which loads without this package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from glare import recipes
from glare.errors import UserError
from glare.recipes import required
from glare.run_folder import RunFolder
from glare.segmenters import image_processor, image_side, load_pretrained

NOT_MERGED = (
    "the adapters of {name!r} cannot be merged into the weights ({reason}); for a plain checkpoint adapt with "
    "--adapter lora, norm or full, or publish the model with its code by glare push"
)


@dataclass(frozen=True)
class ExportRecipe:
    """Write the ViT of an adapted model as a plain checkpoint of transformers, its adapters merged into the weights."""

    model: str = required(help="run folder, model or PEFT adapter folder, or Hub id; with LoRA adapters or none")
    output: Path = required(help="folder to write")


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare export``."""
    recipe = recipes.parse(ExportRecipe, argv, prog="glare export")
    vit = export(recipe)
    print(f"{type(vit).__name__} in {recipe.output}; AutoModel.from_pretrained loads it without glare")


def export(recipe: ExportRecipe) -> PreTrainedModel:
    """Merge, write, and return what was written.

    Raises UserError where there is no such model, its adapters cannot be merged, or the output folder is in use.
    """
    RunFolder.check(recipe.output)
    model, normalise = load_pretrained(recipe.model)
    size = image_side(model)
    try:
        vit = model.merge_and_unload()
    except ValueError as error:
        raise UserError(NOT_MERGED.format(name=recipe.model, reason=str(error).split(";")[0].split(". ")[0])) from error
    with RunFolder(recipe.output.parent, write=True).publish(recipe.output.name) as path:
        vit.save_pretrained(path)
        image_processor(normalise, size=size, patch=model.patch_size).save_pretrained(path)
    return vit
