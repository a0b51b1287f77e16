"""From an uploaded file to class maps before and after adaptation, and what they say in pictures and numbers."""

import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glare.data.opening import open_picture
from glare.data.sources import BadImage, Images
from glare.dense_inference import Sweep, segment
from glare.errors import UserError
from glare.figures import overlay
from pairs import DEVICE, Pair, Segmenter

MAX_PIXELS = 50_000_000  # of a file that is decoded at all: 150 MB as RGB
LONG_SIDE = 1024  # px that are segmented; what is larger is reduced
WINDOW_PATCHES = 48  # side of a pass: attention costs the square of the patches

Label = NDArray[np.uint8]
"""Class indices (h, w)."""


@dataclass(frozen=True)
class Map:
    """One segmenter's class indices (h, w) of an image, and the seconds that the passes took."""

    label: Label
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What the page shows: overlays of the image's size, the table of class shares (HTML), and a text (Markdown)."""

    before: Image.Image | None
    after: Image.Image
    table: str
    text: str


def read_picture(path: str) -> tuple[Image.Image, str]:
    """An image file as RGB of at most ``LONG_SIDE`` px a side, and a notice where it was larger, else "".

    Raises UserError for a file that is no image, that is broken, or that has more than ``MAX_PIXELS`` pixels.
    """
    file = Path(path)
    try:
        image = Images([file.name], lambda _: _checked(file)).read(0)
    except BadImage as bad:
        raise UserError(f"{bad}; give a JPEG, PNG, TIFF or WebP picture") from None
    scale = LONG_SIDE / max(image.size)
    if scale >= 1:
        return image, ""
    width, height = (max(1, round(side * scale)) for side in image.size)
    notice = f"The image of {image.width} x {image.height} px was reduced to {width} x {height} px. "
    return image.resize((width, height), Image.Resampling.LANCZOS), notice


def _checked(file: Path) -> Image.Image:
    """The file, opened but not decoded, so that a bomb is refused before it takes memory."""
    image = open_picture(file)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"{image.width} x {image.height} px are more than the {MAX_PIXELS // 10**6} million that are read here, "
            "cut or reduce it"
        )
    return image


def run(segmenter: Segmenter, image: Image.Image) -> Map:
    """Segment one image, in windows where it has too many patches for one pass."""
    # a visitor's model has no say in the size of what is computed
    sweep = Sweep(window=WINDOW_PATCHES * segmenter.patch_size)
    started = time.perf_counter()
    label = segment(segmenter.model, [image], normalise=segmenter.normalise, sweep=sweep)[0]
    return Map(label, time.perf_counter() - started)


def answer(pair: Pair, image: Image.Image, notice: str = "") -> Answer:
    """Segment an image with both models of a pair."""
    before = None if pair.before is None else run(pair.before, image)
    after = run(pair.after, image)
    classes, colours = pair.after.classes, pair.after.colours
    return Answer(
        before=None if before is None else overlay(image, before.label, colours),
        after=overlay(image, after.label, colours),
        table=share_table(None if before is None else before.label, after.label, classes, colours),
        text=f"{notice}{summary(before, after)}\n\n{pair.about}",
    )


def summary(before: Map | None, after: Map) -> str:
    """How far the two agree, and the time each took."""
    height, width = after.label.shape
    if before is None:
        return f"{width} x {height} px in {after.seconds:.2f} s on {DEVICE.type}."
    same = float((before.label == after.label).mean())
    return (
        f"Adapting changed the class of **{1 - same:.1%}** of the pixels. {width} x {height} px in "
        f"{before.seconds:.2f} s before and {after.seconds:.2f} s after adaptation on {DEVICE.type}."
    )


def shares(label: Label, num_classes: int) -> NDArray[np.float64]:
    """Share of the pixels of each class: (num_classes,), sum 1."""
    return np.bincount(label.ravel(), minlength=num_classes) / label.size


def share_table(before: Label | None, after: Label, classes: list[str], colours: NDArray[np.uint8]) -> str:
    """The classes found, those with the largest share after adaptation first: the legend of both overlays, in HTML."""
    columns = [shares(label, len(classes)) for label in (before, after) if label is not None]
    found = [i for i in np.argsort(-columns[-1], kind="stable") if any(column[i] > 0 for column in columns)]
    heads = ("Share of pixels",) if before is None else ("Before", "After")
    rows = "".join(_row(classes[i], colours[i], [float(column[i]) for column in columns]) for i in found)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Class", *heads))
    return f'<table class="shares"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _row(name: str, colour: NDArray[np.uint8], values: list[float]) -> str:
    # names come from the configuration of a model that anybody may have written
    swatch = f'<span class="swatch" style="background:#{bytes(colour).hex()}"></span>'
    cells = "".join(f"<td>{value:.1%}</td>" for value in values)
    return f'<tr><th scope="row">{swatch}{escape(name)}</th>{cells}</tr>'
