"""Which of the images that a model is evaluated on it was trained on, as far as its run folder tells."""

from dataclasses import dataclass, fields
from pathlib import Path

from glare import recipes
from glare.data.catalog import named
from glare.data.labelled import LabelledSet
from glare.data.notices import quietly
from glare.data.raster_windows import AS_NEEDED, RasterReading
from glare.data.same_files import resolved
from glare.errors import UserError
from glare.finetune_data import open_train, train_split
from glare.paths import kind_of, local_path, printable
from glare.recipes import option, required
from glare.run_folder import run_folder_of
from glare.yaml_files import read_mapping


@dataclass(frozen=True)
class TrainedPart:
    """What a fine-tuning recipe says of the images to train on."""

    data: str = required("as that of the recipe; so are the others")
    train_split: str | None = option(None, "")
    match: str | None = option(None, "")
    fraction: float = option(1.0, "")
    num_images: int | None = option(None, "")
    seed: int = option(0, "")
    raster: RasterReading = option(RasterReading(), "")


def trained_on(
    model: str, evaluated: LabelledSet, *, data: str, split: str | None, raster: RasterReading = AS_NEEDED
) -> int:
    """How many images of ``evaluated``, which is ``data`` and ``split``, the recipe beside ``model`` trains on.

    Where GeoTIFFs are read by another ``raster`` than there, all windows of a file count that was trained on. 0 where
    there is no such recipe, or its data is elsewhere or gone.
    """
    run = run_folder_of(model)
    if run is None:
        return 0
    try:
        part = read_part(run / "recipe.yaml")
        if not _may_share(part, evaluated, data, split):
            return 0
        with quietly():
            trained = open_train(part)
        return evaluated.shared(trained, windows=part.raster == raster)
    except UserError:
        return 0


def read_part(file: Path) -> TrainedPart:
    """The images that a ``recipe.yaml`` trains on. Raises UserError for a file that is no such recipe."""
    names = {field.name for field in fields(TrainedPart)}
    return recipes.from_dict(TrainedPart, {key: value for key, value in read_mapping(file).items() if key in names})


def _may_share(part: TrainedPart, images: LabelledSet, data: str, split: str | None) -> bool:
    """Whether it is worth while to list what was trained on, and nothing is downloaded for it.

    It is where one place is in the other, or links lead from ``images``, which are of ``data``, to what was trained on.
    """
    if part.data.startswith("landcover:"):
        return data.startswith("landcover:")
    trained, evaluated = _place(part.data), _place(data)
    if kind_of(trained) != "folder":
        return part.data == data and train_split(part) == split
    if trained.is_relative_to(evaluated) or evaluated.is_relative_to(trained):
        return True
    return any(file.startswith(f"{printable(str(trained))}/") for file in resolved(images.origin, images.names))


def _place(data: str) -> Path:
    wanted = named(data)
    return local_path(data if wanted is None else wanted.place or "").resolve()
