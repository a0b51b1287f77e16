"""The picture of ``glare inspect``: what the views of an image are, and what the terms of the loss compare in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from glare.figures import GAP, INK, MARGIN, PAPER, SOFT, TEXT, TITLE, Colour, panel
from glare.geometry import Crop, Grid, match, patch_centres
from glare.regions import Regions
from glare.views import Normalisation, Views

Pixels = NDArray[np.uint8]
"""A picture (h, w, 3)."""

CELL = 280  # side of a cell in px, about: a whole number of px for each patch
LINE = 26  # height of a line of text in px
VIVID: tuple[Colour, ...] = (
    (0, 190, 255),
    (255, 140, 0),
    (255, 70, 160),
    (90, 230, 70),
    (255, 230, 40),
    (170, 120, 255),
)
"""Colours that stand out from photographs; the first two are those of the global views."""

CORNERS = ((235, 50, 50), (250, 215, 30)), ((60, 60, 235), (30, 200, 100))
"""Colours at the corners of what two views share, top and bottom; between them they blend."""

TINT = 0.62
UNMATCHED = 0.22  # brightness that is left to patches without a match
HEAT: Colour = (255, 176, 40)
CHANGED: Colour = (255, 230, 40)
HEADS = 4  # maps of attention in a cell, two by two
CHANGES = {
    "blur": "blurred patches framed",
    "inner_blur": "blurred patches framed",
    "mask": "masked patches framed",
    "noise": "noisy patches framed",
    "rotation": "rotated patches framed",
    "none": "no patch is changed",
}
"""Patch augmentation -> what the last column shows."""

NOTES = (
    "L_glob: from each of its views, global or local, the student predicts what the teacher makes of the other global "
    "view.",
    "L_reg: a region starts at the patch that a head attends to most among those with a match; its patches, seen in "
    "their view, predict those they match.",
    "L_loc1: a changed patch of the student predicts what the teacher makes of the same patch, unchanged.",
    "L_loc2: a patch of the student predicts the teacher's patch of the same colour in the other view; "
    "dark patches have none.",
)


@dataclass(frozen=True)
class Sampled:
    """What was drawn from b images: their ``pictures``, their views, and the regions of both global views.

    ``attention`` (2, b, m, n) has the map of the head of each of the m regions.
    """

    names: list[str]
    pictures: list[Pixels]
    views: Views
    attention: Tensor
    regions: tuple[Regions, ...]


def sheet(
    sampled: Sampled, *, normalise: Normalisation, min_overlap: float, changes: str, lines: Sequence[str]
) -> Image.Image:
    """All images below each other, under ``lines`` of text and above an explanation of the terms.

    Args:
        sampled: on the CPU or not.
        normalise: what the views went through.
        min_overlap: of matching patches, as ``min_iou`` of ``geometry.match``.
        changes: the patch augmentation of the views.
        lines: the first is the title.
    """
    columns = {
        "image and crops": f"2 global, {len(sampled.views.local)} local; arrow: flipped",
        "teacher's views": "L_glob: cut and augmented",
        "matched patches": "L_loc2: same colour, same place",
        "attention and regions": f"L_reg: the first {min(HEADS, sampled.attention.shape[2])} regions",
        "student's views": f"L_loc1: {CHANGES[changes]}",
    }
    blocks = []
    for place, (name, picture) in enumerate(zip(sampled.names, sampled.pictures, strict=True)):
        table = panel(
            _rows(sampled, place, normalise=normalise, min_overlap=min_overlap),
            columns=list(columns),
            scores=list(columns.values()),
            row_names=("global view 1", "global view 2"),
            cell=_side(sampled.views.grid),
        )
        title = f"{name}  ({picture.shape[1]} x {picture.shape[0]} px)"
        blocks.append(_below([(title, INK, TITLE)], table))
    notes = _below([(note, INK, TEXT) for note in NOTES], Image.new("RGB", (blocks[0].width, MARGIN), PAPER))
    head = [(line, SOFT if number else INK, TEXT if number else TITLE) for number, line in enumerate(lines)]
    return _below(head, _stacked([*blocks, notes]))


def _rows(sampled: Sampled, place: int, *, normalise: Normalisation, min_overlap: float) -> list[list[Image.Image]]:
    """The cells of one image: a row for each global view."""
    views, grid = sampled.views, sampled.views.grid
    side = _side(grid)
    crops, local = (
        Crop(found.offset[:, place], found.scale[:, place]) for found in (views.global_crops, views.local_crops)
    )
    boxed = (crops, VIVID[:2]), (local, VIVID[2:])
    rows = []
    for view, places in enumerate(matched_colours(crops[0], crops[1], grid, min_overlap=min_overlap)):
        seen = to_pixels(views.global_[view, place], normalise)
        changed = to_pixels(views.augmented[view, place], normalise)
        regions = sampled.regions[view]
        rows.append(
            [
                with_boxes(sampled.pictures[place], *boxed[view], side=side),
                _framed(seen, VIVID[view], side=side),
                with_places(seen, *places, grid, side=side),
                with_regions(
                    seen,
                    sampled.attention[view, place],
                    places[1],
                    regions.index[place],
                    regions.valid[place],
                    grid,
                    side=side,
                ),
                with_changed(changed, views.patch_mask[view, place], grid, side=side),
            ]
        )
    return rows


def to_pixels(view: Tensor, normalise: Normalisation) -> Pixels:
    """A normalised view (3, h, w) as a picture."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (normalise.mean, normalise.std))
    values = (view.float().cpu() * std + mean).clamp(0, 1) * 255
    return values.round().to(torch.uint8).permute(1, 2, 0).numpy()


def boxes(crops: Crop, size: tuple[int, int]) -> Tensor:
    """Left, top, right and bottom edge (k, 4) of crops (k, 2) in px of a picture of ``size`` (width, height)."""
    ends = torch.stack([crops.offset, crops.offset + crops.scale]).cpu() * torch.tensor(size)
    return torch.cat([ends.amin(dim=0), ends.amax(dim=0)], dim=-1)


def matched_colours(a: Crop, b: Crop, grid: Grid, *, min_overlap: float) -> list[tuple[Tensor, Tensor]]:
    """Of both views of one image, crops (2,): the colours (n, 3) of its patches, and (n,) bool which have a match.

    A patch of ``a`` has the colour of its place in the source, a patch of ``b`` that of the patch of ``a`` that it
    matches.
    """
    _, matched_a = match(a, b, grid, min_iou=min_overlap)
    index, matched_b = match(b, a, grid, min_iou=min_overlap)
    colours = place_colours(a.to_source(patch_centres(grid, device=a.offset.device)), matched_a)
    return [(colours, matched_a), (colours[index], matched_b)]


def place_colours(points: Tensor, among: Tensor) -> Tensor:
    """Colours (n, 3) of points (n, 2) by their place in the bounding box of those ``among`` (n,) bool."""
    shared = points[among] if among.any() else points
    low, high = shared.amin(dim=0), shared.amax(dim=0)
    x, y = ((points - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).split(1, dim=-1)
    top, bottom = (left + (right - left) * x for left, right in points.new_tensor(CORNERS))
    colours: Tensor = top + (bottom - top) * y
    return colours


def with_boxes(picture: Pixels, crops: Crop, colours: Sequence[Colour], *, side: int) -> Image.Image:
    """The picture fitted into a square of ``side`` px, with frames around crops (k, 2), numbered."""
    height, width = picture.shape[:2]
    size = round(side * width / max(width, height)), round(side * height / max(width, height))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    canvas = Image.new("RGB", (side, side), PAPER)
    canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), (left, top))
    draw = ImageDraw.Draw(canvas)
    found = boxes(crops, size) + torch.tensor([left, top, left - 1, top - 1])
    shown = [colours[number % len(colours)] for number in range(len(found))]
    for box, colour in zip(found.tolist(), shown, strict=True):
        _frame(draw, box, colour)
    for number, (box, colour) in enumerate(zip(found.tolist(), shown, strict=True)):
        _chip(draw, box, str(number + 1), colour, flipped=bool(crops.scale[number, 0] < 0))
    return canvas


def with_places(picture: Pixels, colours: Tensor, matched: Tensor, grid: Grid, *, side: int) -> Image.Image:
    """A view whose ``matched`` patches (n,) have their colours (n, 3); the others are dark."""
    pixels = _enlarged(picture, side).astype(np.float32)
    tinted = (1 - TINT) * pixels.mean(axis=-1, keepdims=True) + TINT * _on_pixels(colours, grid, side)
    shown = np.where(_on_pixels(matched[:, None], grid, side), tinted, UNMATCHED * pixels)
    step = side // grid[1]
    shown[::step] *= 0.75
    shown[:, ::step] *= 0.75
    return Image.fromarray(shown.astype(np.uint8))


def with_regions(
    picture: Pixels, attention: Tensor, matched: Tensor, index: Tensor, valid: Tensor, grid: Grid, *, side: int
) -> Image.Image:
    """What each of the first heads of ``attention`` (m, n) looks at, two by two, with its region (m, l) framed.

    Where there is no match, no region starts, and the map is dark.
    """
    half = side // 2
    canvas = Image.new("RGB", (side, side), PAPER)
    grey = _enlarged(picture, half).astype(np.float32).mean(axis=-1, keepdims=True)
    light = np.where(_on_pixels(matched[:, None], grid, half), 1.0, 0.45)
    for number in range(min(HEADS, len(attention))):
        heat = _on_pixels((attention[number] / attention[number].max())[:, None].float(), grid, half)
        shown = light * ((1 - heat) * 0.45 * grey + heat * np.array(HEAT, dtype=np.float32))
        tile = Image.fromarray(shown.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(tile)
        _frame(draw, region_box(index[number][valid[number]], grid, step=half // grid[1]), PAPER)
        _chip(draw, (0, 0), str(number + 1), PAPER)
        canvas.paste(tile, (number % 2 * half, number // 2 * half))
    lines = ImageDraw.Draw(canvas)
    lines.line((half, 0, half, side), fill=PAPER, width=4)
    lines.line((0, half, side, half), fill=PAPER, width=4)
    return canvas


def region_box(patches: Tensor, grid: Grid, *, step: int) -> tuple[int, int, int, int]:
    """Outermost pixels (left, top, right, bottom) of the patches (l,) of a rectangular region, each ``step`` px."""
    rows, columns = patches // grid[1], patches % grid[1]
    first, last = (int(columns.min()), int(rows.min())), (int(columns.max()), int(rows.max()))
    return first[0] * step, first[1] * step, (last[0] + 1) * step - 1, (last[1] + 1) * step - 1


def with_changed(picture: Pixels, mask: Tensor, grid: Grid, *, side: int) -> Image.Image:
    """The student's view with a frame just inside each changed patch of ``mask`` (n,) bool."""
    canvas = Image.fromarray(_enlarged(picture, side))
    draw = ImageDraw.Draw(canvas)
    for patch in mask.nonzero():
        draw.rectangle(region_box(patch, grid, step=side // grid[1]), outline=CHANGED)
    return canvas


def _framed(picture: Pixels, colour: Colour, *, side: int) -> Image.Image:
    canvas = Image.fromarray(_enlarged(picture, side))
    _frame(ImageDraw.Draw(canvas), (0, 0, side - 1, side - 1), colour)
    return canvas


def _side(grid: Grid) -> int:
    """Side of a cell: an even number of px for each patch, so that half a cell has whole ones too."""
    return 2 * grid[1] * max(1, round(CELL / 2 / grid[1]))


def _enlarged(picture: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def _on_pixels(values: Tensor, grid: Grid, side: int) -> NDArray[Any]:
    """(n, c) of patches -> (side, side, c), each patch's values on all of its pixels."""
    step = side // grid[1]
    return values.cpu().view(*grid, -1).numpy().repeat(step, axis=0).repeat(step, axis=1)


def _frame(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: Colour) -> None:
    """A line of 2 px in a dark one of 4 px, just inside the box."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right, bottom), outline=INK, width=4)
    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=2)


def _chip(
    draw: ImageDraw.ImageDraw, corner: Sequence[float], text: str, colour: Colour, *, flipped: bool = False
) -> None:
    """A small label at the top left of a box, with an arrow to both sides where the crop is flipped."""
    x, y = corner[:2]
    draw.rectangle((x, y, x + (34 if flipped else 16), y + 16), fill=colour, outline=INK)
    draw.text((x + 8, y + 8), text, fill=INK, font=ImageFont.load_default(13), anchor="mm")
    if flipped:
        draw.line((x + 17, y + 8, x + 30, y + 8), fill=INK, width=2)
        draw.polygon([(x + 14, y + 8), (x + 19, y + 4), (x + 19, y + 12)], fill=INK)
        draw.polygon([(x + 32, y + 8), (x + 27, y + 4), (x + 27, y + 12)], fill=INK)


def _below(lines: Sequence[tuple[str, Colour, int]], picture: Image.Image) -> Image.Image:
    """The picture below lines of (text, colour, size)."""
    top = GAP + LINE * len(lines)
    canvas = Image.new("RGB", (picture.width, top + picture.height), PAPER)
    canvas.paste(picture, (0, top))
    draw = ImageDraw.Draw(canvas)
    for number, (text, colour, size) in enumerate(lines):
        draw.text((MARGIN, GAP + LINE * number), text, fill=colour, font=ImageFont.load_default(size))
    return canvas


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    canvas = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    return canvas
