"""``glare predict``: segment images of any size; and what a segmentation model has to be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel

from glare import recipes
from glare.backbones import check_size, read_config, read_normalisation
from glare.configuration_glare import GlareConfig
from glare.data.catalog import named
from glare.data.geotiff import Raster
from glare.data.labelled import MAX_CLASSES, distinct_colours
from glare.data.raster_windows import WHOLE, KeepingPlace, RasterReading
from glare.data.sources import BadImage, Images, open_source
from glare.dense_inference import WINDOW_PX, Sweep, Window, asked, segment, sweep_for, sweep_of
from glare.errors import UserError
from glare.figures import annotated
from glare.geometry import factor_to_fit
from glare.model_names import explained, place_of
from glare.raster_prediction import predict_raster
from glare.recipes import option, required
from glare.run_folder import RunFolder, atomic_write_png
from glare.runtime import DEVICES, PRECISIONS, make_accelerator
from glare.views import Normalisation

ENDINGS = (".png", "_overlay.png")  # of the label map and of the picture for people
MAX_READ_PX = 2 * WINDOW_PX  # side of the windows of a raster that are brought to a test scale
LONGEST_STEM = 200  # bytes: a file name has 255 at most, with a number, an ending and, while it is written, a mark


@dataclass(frozen=True)
class PredictRecipe:
    """Segment images: for each a label map (palette PNG of class indices) and an overlay with the shares of classes."""

    model: str = required("run folder of glare finetune, its model folder, or a Hub id")
    output: Path = required("new folder for the pictures")
    images: tuple[str, ...] = required("images, folders of them, or of the catalog (loveda:FOLDER)", positional=True)
    split: str | None = option(None, "sub-folder of a folder, or split of other data; all of a folder, else val")
    window: int | None = option(None, "side in px of sliding windows; by default only above 1536 px, of 1024 px")
    stride: int | None = option(None, "distance of sliding windows in px; two thirds of the window by default")
    test_scale: tuple[int, int] | None = option(None, "bring images to fit these two sides in px first, as 2048,512")
    ratios: tuple[float, ...] = option((1.0,), "factors on the images' size, as 0.5,1,1.5; the mean of the softmax")
    flip: bool = option(False, "the mean with the mirror images, too")
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    raster: RasterReading = option(RasterReading(), "GeoTIFFs")

    def __post_init__(self) -> None:
        asked(self)
        if self.raster.tile is not None:
            raise ValueError(f"raster.tile is {self.raster.tile}, but windows are those of --window here; give that")


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare predict``."""
    predict(recipes.parse(PredictRecipe, argv, prog="glare predict"))


def predict(recipe: PredictRecipe) -> list[tuple[str, str]]:
    """Segment all images and return (name, reason) of those that could not be read.

    Writes ``<stem>.png`` and ``<stem>_overlay.png``; a stem that is taken gets a number. Raises UserError where there
    is nothing to segment or the output folder is in use.
    """
    RunFolder.check(recipe.output)
    whole = KeepingPlace(tile=WHOLE, bands=recipe.raster.bands)
    sources = [open_source(data, split=recipe.split or usual_split(data), raster=whole) for data in recipe.images]
    accelerator = make_accelerator(device=recipe.device, precision=recipe.precision, report_to="none", output=Path())
    model, normalise = load_segmenter(recipe.model, device=accelerator.device)
    sweep = sweep_for(model, recipe)
    taken: set[str] = set()
    skipped: list[tuple[str, str]] = []
    total = sum(map(len, sources))

    def write(source: Images, index: int) -> None:
        picture = source.raster(index) or source.read(index)
        recipe.output.mkdir(parents=True, exist_ok=True)
        stem = recipe.output / free_stem(source.name(index), taken)
        if isinstance(picture, Raster):
            write_raster_prediction(stem, picture, model=model, normalise=normalise, sweep=sweep)
        else:
            write_prediction(stem, picture, model=model, normalise=normalise, sweep=sweep)

    for source, index in tqdm([(s, i) for s in sources for i in range(len(s))], desc="predict", unit="image"):
        try:
            with accelerator.autocast():
                write(source, index)
        except BadImage as bad:
            if recipe.strict:
                raise UserError(f"{bad}; repair or remove it, or leave --strict out to skip it") from None
            skipped.append((bad.name, bad.reason))
    if len(skipped) == total:
        raise UserError(f"none of the {total} images can be read; {skipped[0][0]}, for example: {skipped[0][1]}")
    print(f"{total - len(skipped)} images segmented into {recipe.output}, {len(skipped)} skipped")
    for name, reason in skipped:
        print(f"  skipped {name}: {reason}")
    return skipped


def usual_split(data: str) -> str | None:
    """Of a data set of the catalog the split that is measured on; None for other images, which are all segmented."""
    wanted = named(data)
    return None if wanted is None else wanted.entry.split("val")


def free_stem(name: str, taken: set[str]) -> str:
    """A stem for the files of image ``name`` none of which is in ``taken``, to which they are added."""
    stem = PurePosixPath(name).stem.encode()[:LONGEST_STEM].decode(errors="ignore")

    def files(number: int) -> set[str]:
        numbered = stem if number == 1 else f"{stem}_{number}"
        return {f"{numbered}{ending}".casefold() for ending in ENDINGS}

    used, free = 0, 1
    while files(free) & taken:
        used, free = free, 2 * free
    while free - used > 1:  # halved, since a folder may have one image.png for each of 100,000 folders
        middle = (used + free) // 2
        used, free = (middle, free) if files(middle) & taken else (used, middle)
    taken |= files(free)
    return stem if free == 1 else f"{stem}_{free}"


def write_prediction(
    stem: Path, image: Image.Image, *, model: PreTrainedModel, normalise: Normalisation, sweep: Sweep
) -> None:
    """Segment an image into ``<stem>.png``, class indices that show their colours, and ``<stem>_overlay.png``."""
    label, colours = segment(model, [image], normalise=normalise, sweep=sweep)[0], palette(model)
    indices = Image.fromarray(label)
    indices.putpalette(colours.tobytes())
    for ending, picture in zip(ENDINGS, (indices, annotated(image, label, class_names(model), colours)), strict=True):
        atomic_write_png(stem.with_name(f"{stem.name}{ending}"), picture)


def write_raster_prediction(
    stem: Path, raster: Raster, *, model: PreTrainedModel, normalise: Normalisation, sweep: Sweep
) -> None:
    """Segment a raster by windows into ``<stem>.tif`` and ``<stem>_overlay.png``; BadImage if it cannot be read.

    A test scale is applied with the factor of the pictures that `glare evaluate` fits to it, to windows of this size.
    """
    windows, each = raster_sweep(raster, sweep)
    predict_raster(
        raster,
        windows,
        lambda window: segment(model, [window], normalise=normalise, sweep=each)[0],
        files=(stem.with_name(f"{stem.name}.tif"), stem.with_name(f"{stem.name}{ENDINGS[1]}")),
        classes=class_names(model),
        colours=palette(model),
    )


def raster_sweep(raster: Raster, sweep: Sweep) -> tuple[list[Window], Sweep]:
    """Windows that cover a raster, in its px, and how each is segmented: one factor for all in place of a test scale.

    Where images become smaller windows are larger by as much, up to `MAX_READ_PX`, so that they show as much.
    """
    size = raster.height, raster.width
    if sweep.test_scale is None:
        return sweep.windows(size), sweep
    factor = factor_to_fit(torch.tensor(raster.picture or size), sweep.test_scale).item()
    each = replace(sweep, test_scale=None, ratios=tuple(factor * ratio for ratio in sweep.ratios))
    side = min(MAX_READ_PX, max(WINDOW_PX, round(WINDOW_PX / factor)))
    return Sweep(window=side).windows(size), each


def load_segmenter(name: str, *, device: torch.device) -> tuple[PreTrainedModel, Normalisation]:
    """A segmentation model, ready to predict, and the normalisation of its input.

    ``name``: a ``model`` folder, the run folder of ``glare finetune`` or a Hub id, ``ID@revision`` for one
    revision. Raises UserError for others.
    """
    place = place_of(name)
    hint = "give a run folder of glare finetune, its model folder, or the Hub id of such a model"
    with explained("model", name, hint):
        asked = read_config(place)
    _check_kind(name, asked)
    with explained("model", name, hint):
        check_size(lambda: AutoModelForSemanticSegmentation.from_config(asked, trust_remote_code=False))
        model = AutoModelForSemanticSegmentation.from_pretrained(place.name, dtype=torch.float32, **place.safe_options)
    with explained("model", name, "give a model whose config.json is as glare finetune has written it"):
        _check_config(model)
    if model.config.model_type == "upernet":
        model.auxiliary_head = None  # has a part in training alone, and would be computed
    return model.to(device).eval(), read_normalisation(name)


def _check_kind(name: str, config: PreTrainedConfig) -> None:
    """Raise UserError unless a configuration is that of a segmentation model of this package."""
    named = config.architectures
    built = str(named[0]) if isinstance(named, list) and named else f"model of type {config.model_type}"
    inner = config.backbone_config if config.model_type == "upernet" else config
    if not isinstance(inner, GlareConfig):
        raise UserError(f"model {name!r} is a {built}; give a model that glare finetune has written")
    if named and "Segmentation" not in built:
        raise UserError(f"model {name!r} is a {built} without segmentation head; run glare finetune on it first")


def _check_config(model: PreTrainedModel) -> None:
    """ValueError unless names and colours of the classes are such that label maps can be written, and how is known."""
    sweep_of(model)
    names, colours = class_names(model), np.asarray(palette(model))
    if not all(isinstance(name, str) for name in names) or not 0 < len(names) <= MAX_CLASSES:
        raise ValueError(f"id2label has not 1 to {MAX_CLASSES} names")
    if colours.shape != (len(names), 3):
        raise ValueError("the palette has not three numbers for each class")


def class_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's classes in the order of its logits."""
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def palette(model: PreTrainedModel) -> NDArray[np.uint8]:
    """Colours (classes, 3) of the model's classes: those of the data it was fine-tuned on, where it knows them."""
    colours = getattr(model.config, "palette", None)
    return distinct_colours(model.config.num_labels) if colours is None else np.array(colours, dtype=np.uint8)
