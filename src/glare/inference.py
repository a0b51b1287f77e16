"""Segment whole images of any size, and ``glare predict``.

An image is padded on the right and at the bottom to a multiple of the patch, and its logits are cut back; one that
is too large for a single pass is covered by overlapping windows, whose logits are averaged.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from glare import recipes
from glare.backbones import read_config, read_normalisation
from glare.configuration_glare import GlareConfig
from glare.data.geotiff import Raster
from glare.data.labelled import MAX_CLASSES, distinct_colours
from glare.data.raster_windows import WHOLE, RasterReading
from glare.data.sources import BadImage, open_source
from glare.errors import UserError
from glare.figures import annotated
from glare.model_names import explained, place_of
from glare.raster_prediction import predict_raster
from glare.recipes import option, required
from glare.run_folder import RunFolder, atomic_write_png
from glare.runtime import DEVICES, PRECISIONS, make_accelerator
from glare.views import Normalisation

WHOLE_LIMIT_PX = 1536  # longer side up to which an image is segmented in one pass
WINDOW_PX = 1024  # side of the windows of larger images
WINDOW_BATCH = 4
ENDINGS = (".png", "_overlay.png")  # of the label map and of the picture for people
LONGEST_STEM = 200  # bytes: a file name has 255 at most, with a number, an ending and, while it is written, a mark


@dataclass(frozen=True)
class Tiling:
    """How large images are covered.

    ``window``: side in px; None segments images of up to 1536 px in one pass and takes 1024 px above.
    ``stride``: distance of windows in px, two thirds of the window where None.
    """

    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; give a side in px of at least 1")
        if self.stride is not None and not 1 <= self.stride <= (self.window or WINDOW_PX):
            raise ValueError(
                f"stride is {self.stride}; give 1 to {self.window or WINDOW_PX}, so that windows leave no gap"
            )

    def windows(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Windows of equal size that cover an image of ``size`` (height, width); one for the whole if it fits."""
        if max(size) <= (self.window or WHOLE_LIMIT_PX):
            return [(slice(0, size[0]), slice(0, size[1]))]
        side = self.window or WINDOW_PX
        stride = self.stride or max(1, side * 2 // 3)
        return list(product(_spans(size[0], side, stride), _spans(size[1], side, stride)))


def _spans(length: int, side: int, stride: int) -> list[slice]:
    """Spans of one axis, the last one moved back inside."""
    side = min(side, length)
    steps = math.ceil((length - side) / stride)
    starts = (min(i * stride, length - side) for i in range(steps + 1))
    return [slice(start, start + side) for start in starts]


@dataclass(frozen=True)
class PredictRecipe:
    """Segment images: for each a label map (palette PNG of class indices) and an overlay with the shares of classes."""

    model: str = required("run folder of glare finetune, its model folder, or a Hub id")
    output: Path = required("new folder for the pictures")
    images: tuple[str, ...] = required("images, or folders of them", positional=True)
    window: int | None = option(None, "side in px of sliding windows; by default only above 1536 px, of 1024 px")
    stride: int | None = option(None, "distance of sliding windows in px; two thirds of the window by default")
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    raster: RasterReading = option(RasterReading(), "GeoTIFFs")

    def __post_init__(self) -> None:
        Tiling(self.window, self.stride)
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
    whole = replace(recipe.raster, tile=WHOLE)
    sources = [open_source(images, raster=whole) for images in recipe.images]
    accelerator = make_accelerator(device=recipe.device, precision=recipe.precision, report_to="none", output=Path())
    model, normalise = load_segmenter(recipe.model, device=accelerator.device)
    tiling = Tiling(recipe.window, recipe.stride)
    taken: set[str] = set()
    skipped: list[tuple[str, str]] = []
    total = sum(map(len, sources))
    for source, index in tqdm([(s, i) for s in sources for i in range(len(s))], desc="predict", unit="image"):
        try:
            if (raster := source.raster(index)) is not None:
                recipe.output.mkdir(parents=True, exist_ok=True)
                with accelerator.autocast():
                    stem = recipe.output / free_stem(source.name(index), taken)
                    write_raster_prediction(stem, raster, model=model, normalise=normalise, tiling=tiling)
                continue
            image = source.read(index)
        except BadImage as bad:
            if recipe.strict:
                raise UserError(f"{bad}; repair or remove it, or leave --strict out to skip it") from None
            skipped.append((bad.name, bad.reason))
            continue
        recipe.output.mkdir(parents=True, exist_ok=True)
        with accelerator.autocast():
            label = segment(model, [image], normalise=normalise, tiling=tiling)[0]
        write_prediction(recipe.output, free_stem(source.name(index), taken), image, label, model=model)
    if len(skipped) == total:
        raise UserError(f"none of the {total} images can be read; {skipped[0][0]}, for example: {skipped[0][1]}")
    print(f"{total - len(skipped)} images segmented into {recipe.output}, {len(skipped)} skipped")
    for name, reason in skipped:
        print(f"  skipped {name}: {reason}")
    return skipped


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
    folder: Path, stem: str, image: Image.Image, label: NDArray[np.uint8], *, model: PreTrainedModel
) -> None:
    """Write the label map, a PNG of class indices that shows their colours, and the annotated overlay."""
    colours = palette(model)
    indices = Image.fromarray(label)
    indices.putpalette(colours.tobytes())
    for ending, picture in zip(ENDINGS, (indices, annotated(image, label, class_names(model), colours)), strict=True):
        atomic_write_png(folder / f"{stem}{ending}", picture)


def write_raster_prediction(
    stem: Path, raster: Raster, *, model: PreTrainedModel, normalise: Normalisation, tiling: Tiling
) -> None:
    """Segment a raster by windows into ``<stem>.tif`` and ``<stem>_overlay.png``; BadImage if it cannot be read."""
    predict_raster(
        raster,
        tiling.windows((raster.height, raster.width)),
        lambda window: segment(model, [window], normalise=normalise, tiling=tiling)[0],
        files=(stem.with_name(f"{stem.name}.tif"), stem.with_name(f"{stem.name}{ENDINGS[1]}")),
        classes=class_names(model),
        colours=palette(model),
    )


def load_segmenter(name: str, *, device: torch.device) -> tuple[PreTrainedModel, Normalisation]:
    """A segmentation model, ready to predict, and the normalisation of its input.

    ``name``: a ``model`` folder, the run folder of ``glare finetune`` or a Hub id, ``ID@revision`` for one
    revision. Raises UserError for others.
    """
    place = place_of(name)
    hint = "give a run folder of glare finetune, its model folder, or the Hub id of such a model"
    with explained("model", name, hint):
        read_config(place)
        model = AutoModelForSemanticSegmentation.from_pretrained(place.name, dtype=torch.float32, **place.safe_options)
    config, named = model.config, model.config.architectures
    built = str(named[0]) if isinstance(named, list) and named else type(model).__name__
    if not isinstance(
        getattr(config, "backbone_config", None) if config.model_type == "upernet" else config, GlareConfig
    ):
        raise UserError(f"model {name!r} is a {built}; give a model that glare finetune has written")
    if "Segmentation" not in built:
        raise UserError(f"model {name!r} is a {built} without segmentation head; run glare finetune on it first")
    with explained("model", name, "give a model whose config.json is as glare finetune has written it"):
        _check_classes(model)
    return model.to(device).eval(), read_normalisation(name)


def _check_classes(model: PreTrainedModel) -> None:
    """ValueError unless names and colours of the classes are such that label maps can be written."""
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


def patch_size(model: PreTrainedModel) -> int:
    """Side of a patch in px; images are padded to a multiple of it."""
    config: Any = model.config
    return int((config if isinstance(config, GlareConfig) else config.backbone_config).patch_size)


DEFAULT_TILING = Tiling()


@torch.inference_mode()
def logits(
    model: PreTrainedModel, pixels: Tensor, *, normalise: Normalisation, tiling: Tiling = DEFAULT_TILING
) -> Tensor:
    """Class logits of images of one size.

    Args:
        model: a segmentation model in evaluation mode.
        pixels: (n, height, width, 3) uint8.
        normalise: of the model's input.
        tiling: how large images are covered.

    Returns:
        (n, classes, height, width) float32 on the model's device.
    """
    images, *size = pixels.shape[:3]
    windows = tiling.windows((size[0], size[1]))
    if len(windows) == 1:
        return _whole(model, pixels, normalise)
    total = torch.zeros((images, model.config.num_labels, *size), device=model.device)
    covered = torch.zeros(tuple(size), device=model.device)
    for image, chunk in product(range(images), _chunks(windows)):
        found = _whole(model, torch.stack([pixels[image][window] for window in chunk]), normalise)
        for window, part in zip(chunk, found, strict=True):
            total[image, :, *window] += part
    for window in windows:
        covered[window] += 1
    return total.div_(covered)


def _chunks(windows: Sequence[tuple[slice, slice]]) -> Iterator[Sequence[tuple[slice, slice]]]:
    return (windows[first : first + WINDOW_BATCH] for first in range(0, len(windows), WINDOW_BATCH))


def _whole(model: PreTrainedModel, pixels: Tensor, normalise: Normalisation) -> Tensor:
    """Logits (n, classes, height, width) of images (n, height, width, 3) in one pass."""
    height, width = pixels.shape[1:3]
    patch = patch_size(model)
    images = normalise(pixels.to(model.device).permute(0, 3, 1, 2).float().div(255))
    images = F.pad(images, (0, -width % patch, 0, -height % patch))
    coarse = model(pixel_values=images).logits.float()
    fine = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return fine[..., :height, :width]


def segment(
    model: PreTrainedModel,
    images: Sequence[Image.Image],
    *,
    normalise: Normalisation,
    tiling: Tiling = DEFAULT_TILING,
) -> list[NDArray[np.uint8]]:
    """Class index (height, width) of every pixel of RGB images of any sizes."""
    labels = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).unsqueeze(0)
        found = logits(model, pixels, normalise=normalise, tiling=tiling).max(dim=1).indices[0]
        labels.append(found.to(torch.uint8).cpu().numpy())
    return labels
