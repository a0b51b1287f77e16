"""Pictures of label maps, beside their images, and of training curves; drawn with Pillow alone."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from glare.curves import Point, read_curves
from glare.errors import UserError
from glare.run_folder import RunFolder

Colour = tuple[int, int, int]
Label = NDArray[np.uint8]
Frame = tuple[int, int, int, int]

IGNORED: Colour = (44, 44, 48)
PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 28, 32)
SOFT: Colour = (110, 112, 120)
RULE: Colour = (224, 226, 230)
MARGIN = 20
GAP = 10
SWATCH = 16
TITLE, TEXT, SMALL = 20, 16, 13  # px
LINES: tuple[Colour, ...] = (
    (38, 84, 160),
    (214, 96, 20),
    (30, 132, 84),
    (150, 62, 150),
    (176, 138, 10),
    (70, 160, 190),
    (228, 128, 160),
    (98, 100, 108),
)
HEALTH = {
    "rankme_patches": "RankMe of patches",
    "rankme_cls": "RankMe of [CLS]",
    "feature_std": "standard deviation",
    "cosine_to_base": "cosine",
}
"""Value of a health check -> its name in a picture."""

SMOOTHING = 0.04  # share of the lines of a log that a curve averages over
SUPERSAMPLING = 3  # of lines, which Pillow draws without antialiasing


def colourise(label: Label, palette: ArrayLike) -> Image.Image:
    """RGB picture of class indices (h, w); indices without a colour, such as 255, are dark grey."""
    return Image.fromarray(_table(palette)[label])


def _table(palette: ArrayLike) -> NDArray[np.uint8]:
    """Colours of all 256 indices."""
    table = np.full((256, 3), IGNORED, dtype=np.uint8)
    colours = np.asarray(palette, dtype=np.uint8).reshape(-1, 3)
    table[: len(colours)] = colours
    return table


def overlay(image: Image.Image, label: Label, palette: ArrayLike, *, alpha: float = 0.45) -> Image.Image:
    """The image tinted by class, with outlines in the full colour; pixels without a class stay as they are.

    ``label`` (h, w) of the image's size; ``alpha`` from 0 (image alone) to 1 (colours alone).
    """
    colours = _table(palette)[label].astype(np.float32)
    known = label < len(np.asarray(palette).reshape(-1, 3))
    strength = np.where(_edges(label, max(1, max(label.shape) // 400)), max(alpha, 0.9), alpha) * known
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    blended = pixels + strength[..., None] * (colours - pixels)
    return Image.fromarray(blended.round().astype(np.uint8))


def _edges(label: Label, width: int) -> NDArray[np.bool_]:
    """Pixels within ``width`` px of one of another class to the right or below."""
    edges = np.zeros(label.shape, dtype=bool)
    for shift in range(1, width + 1):
        edges[:-shift] |= label[:-shift] != label[shift:]
        edges[:, :-shift] |= label[:, :-shift] != label[:, shift:]
    return edges


def annotated(image: Image.Image, label: Label, classes: Sequence[str], palette: ArrayLike) -> Image.Image:
    """The overlay above a strip that names the classes found and their share of the pixels, the largest first."""
    picture = overlay(image, label, palette)
    colours = _table(palette)
    counts = np.bincount(label.ravel(), minlength=256)[: len(classes)]
    order = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
    entries = {f"{classes[i]} {_share(counts[i] / label.size)}": _colour(colours[i]) for i in order}
    size = max(11, min(28, round(max(picture.size) / 48)))
    strip = legend(entries, width=max(picture.width, 220), size=size)
    canvas = Image.new("RGB", (strip.width, picture.height + strip.height), PAPER)
    canvas.paste(picture, (0, 0))
    canvas.paste(strip, (0, picture.height))
    return canvas


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0095 else "<1%"


def _colour(row: Sequence[int]) -> Colour:
    red, green, blue = (int(value) for value in row)
    return red, green, blue


def legend(entries: Mapping[str, Colour], *, width: int, size: int = TEXT) -> Image.Image:
    """Swatches with names, in as many lines as ``width`` px need."""
    font = _font(size)
    swatch, gap = round(size * SWATCH / TEXT), round(size * 0.6)
    lines: list[list[tuple[str, Colour]]] = [[]]
    x = gap
    for name, colour in entries.items():
        step = swatch + gap * 2 // 3 + _width(name, font) + 2 * gap
        if lines[-1] and x + step - gap > width:
            lines.append([])
            x = gap
        lines[-1].append((name, colour))
        x += step
    height = round(size * 1.7)
    strip = Image.new("RGB", (width, height * len(lines) + gap), PAPER)
    draw = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        x, middle = gap, gap // 2 + row * height + height // 2
        for name, colour in line:
            box = (x, middle - swatch // 2, x + swatch, middle - swatch // 2 + swatch)
            draw.rectangle(box, fill=colour, outline=SOFT)
            draw.text((x + swatch + gap * 2 // 3, middle), name, fill=INK, font=font, anchor="lm")
            x += swatch + gap * 2 // 3 + _width(name, font) + 2 * gap
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return math.ceil(font.getlength(text))


def panel(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    scores: Sequence[str] = (),
    row_names: Sequence[str] = (),
    legend_entries: Mapping[str, Colour] | None = None,
    cell: int = 256,
) -> Image.Image:
    """A table of pictures under column titles.

    Args:
        rows: pictures, row by row; the first of a row sets its height.
        columns: title of each column.
        scores: a line under each title, "" for none.
        row_names: written upwards along the left side.
        legend_entries: class name -> colour, for the line at the bottom.
        cell: width of a column in px.
    """
    heights = [round(cell * row[0].height / row[0].width) for row in rows]
    left = MARGIN + (SMALL + GAP if any(row_names) else 0)
    top = MARGIN + TITLE + (TEXT + GAP // 2 if any(scores) else 0) + GAP
    width = left + len(columns) * (cell + GAP) - GAP + MARGIN
    strip = legend(legend_entries, width=width - 2 * MARGIN) if legend_entries else None
    height = top + sum(heights) + GAP * (len(rows) - 1) + MARGIN + (strip.height if strip else 0)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    _head(draw, columns, scores, left=left, cell=cell)
    y = top
    for number, (row, row_height) in enumerate(zip(rows, heights, strict=True)):
        for column, picture in enumerate(row):
            fitted = picture.convert("RGB").resize((cell, row_height), Image.Resampling.LANCZOS)
            x = left + column * (cell + GAP)
            canvas.paste(fitted, (x, y))
            draw.rectangle((x, y, x + cell - 1, y + row_height - 1), outline=SOFT)
        if number < len(row_names) and row_names[number]:
            name = _upwards(row_names[number], row_height)
            canvas.paste(name, (MARGIN, y + (row_height - name.height) // 2))
        y += row_height + GAP
    if strip:
        canvas.paste(strip, (MARGIN, y))
    return canvas


def _head(draw: ImageDraw.ImageDraw, columns: Sequence[str], scores: Sequence[str], *, left: int, cell: int) -> None:
    """Column titles, shrunk where they are wider than their column, and the scores under them."""
    for column, title in enumerate(columns):
        x = left + column * (cell + GAP) + cell // 2
        size = TITLE
        while size > 8 and _width(title, _font(size)) > cell:
            size -= 1
        draw.text((x, MARGIN + TITLE), title, fill=INK, font=_font(size), anchor="ms")
        if column < len(scores):
            draw.text((x, MARGIN + TITLE + GAP // 2 + TEXT), scores[column], fill=SOFT, font=_font(TEXT), anchor="ms")


def _upwards(text: str, limit: int, *, size: int = SMALL, colour: Colour = SOFT) -> Image.Image:
    """Text turned by 90 degrees, cut to ``limit`` px."""
    font = _font(size)
    while len(text) > 1 and _width(text, font) > limit:
        text = text[:-2].rstrip() + "…"
    line = Image.new("RGB", (_width(text, font) + 2, size + 4), PAPER)
    ImageDraw.Draw(line).text((1, 1), text, fill=colour, font=font)
    return line.rotate(90, expand=True)


def loss_curves(metrics: Path, *, size: tuple[int, int] = (900, 480)) -> Image.Image:
    """Loss against steps from a run's ``metrics.jsonl``: the raw values pale, their running mean strong.

    Each of the terms ``loss_...`` has its curve, or ``loss`` where there are none. Raises UserError where the file
    has no losses.
    """
    curves = read_losses(metrics)
    if not curves:
        raise UserError(f"{metrics} has no losses to draw; give the metrics.jsonl of a run")
    named = {name.removeprefix("loss_"): points for name, points in curves.items()}
    return curves_picture(named, label="loss", size=size)


def health_curves(metrics: Path, untouched: Mapping[str, float], *, size: tuple[int, int] = (900, 480)) -> Image.Image:
    """Checks of a run's health against steps, as shares of the ``untouched`` model's values, which is 1 throughout.

    That shares the axis with the mean cosine of its patches to those of the untouched model.
    """
    curves = read_curves(metrics)
    named = {
        title: [(0.0, 1.0), *((step, value / untouched[name]) for step, value in curves.get(name, ()))]
        for name, title in HEALTH.items()
        if untouched[name]
    }
    return curves_picture(named, label="share of the untouched model's value", size=size)


def curves_picture(curves: Mapping[str, Sequence[Point]], *, label: str, size: tuple[int, int]) -> Image.Image:
    """Values against steps by name, with axes and a legend; ``label`` is that of the upright axis."""
    everything = [point for points in curves.values() for point in points]
    steps, values = ([point[axis] for point in everything] for axis in (0, 1))
    x_ticks, y_ticks = ticks(0, max(steps)), ticks(min(0.0, *values), _robust_top(values))
    frame = (MARGIN + 56, MARGIN + 34, size[0] - MARGIN, size[1] - MARGIN - 40)
    canvas = Image.new("RGB", size, PAPER)
    bounds = ((x_ticks[0], max(steps)), (y_ticks[0], y_ticks[-1]))
    _axes(ImageDraw.Draw(canvas), frame, bounds, (x_ticks, y_ticks))
    name = _upwards(label, frame[3], size=TEXT, colour=INK)
    canvas.paste(name, (MARGIN - 6, (frame[1] + frame[3] - name.height) // 2))
    layer = Image.new("RGBA", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), (*PAPER, 0))
    colours = [LINES[i % len(LINES)] for i in range(len(curves))]
    for pale in (True, False):
        for colour, points in zip(colours, curves.values(), strict=True):
            drawn = [_place(point, frame, bounds) for point in (points if pale else smooth(points))]
            _curve(layer, drawn, colour, pale=pale)
    layer = layer.reduce(SUPERSAMPLING).crop((0, frame[1] - 4, *size))
    canvas.paste(layer, (0, frame[1] - 4), layer)
    names = dict(zip(curves, colours, strict=True))
    canvas.paste(legend(names, width=frame[2] - frame[0]), (frame[0] - GAP, MARGIN - GAP))
    return canvas


def write_report(folder: RunFolder) -> None:
    """Write the pictures of a run: ``report/loss.png``, and ``report/health.png`` where its health was checked."""
    metrics, health = folder.path / "metrics.jsonl", folder.path / "health.json"
    with folder.publish("report") as path:
        loss_curves(metrics).save(path / "loss.png")
        if health.is_file():
            health_curves(metrics, json.loads(health.read_text(encoding="utf-8"))["untouched"]).save(
                path / "health.png"
            )


def read_losses(metrics: Path) -> dict[str, list[Point]]:
    """The loss terms in a metrics.jsonl, or the loss itself where there are no terms."""
    curves = {name: points for name, points in read_curves(metrics).items() if name.startswith("loss")}
    return {name: points for name, points in curves.items() if name.startswith("loss_")} or curves


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean over the neighbours on both sides, of which there are fewer at the ends."""
    reach = round(len(points) * SMOOTHING)
    windows = (points[max(0, place - reach) : place + reach + 1] for place in range(len(points)))
    means = [sum(value for _, value in window) / len(window) for window in windows]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def ticks(low: float, high: float, *, about: int = 6) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    raw = max(high - low, 1e-9) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _robust_top(values: Sequence[float]) -> float:
    """The largest value, unless a few outliers would flatten everything else."""
    ordered = sorted(values)
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    return min(ordered[-1], usual + abs(usual))


def _place(point: Point, frame: Frame, bounds: tuple[Point, Point]) -> Point:
    """Pixel of a point; what is above the frame is drawn at its edge."""
    (x_low, x_high), (y_low, y_high) = bounds
    x = (point[0] - x_low) / max(x_high - x_low, 1e-9)
    y = (min(point[1], y_high) - y_low) / max(y_high - y_low, 1e-9)
    return frame[0] + x * (frame[2] - frame[0]), frame[3] - y * (frame[3] - frame[1])


def _curve(layer: Image.Image, points: Sequence[Point], colour: Colour, *, pale: bool) -> None:
    draw = ImageDraw.Draw(layer)
    large = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
    width, alpha = (SUPERSAMPLING, 70) if pale else (2 * SUPERSAMPLING, 255)
    if len(large) == 1:
        (x, y), radius = large[0], 2 * width
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, alpha))
    for start, end in pairwise(large):
        draw.line((start, end), fill=(*colour, alpha), width=width, joint="curve")


def _axes(
    draw: ImageDraw.ImageDraw, frame: Frame, bounds: tuple[Point, Point], marks: tuple[list[float], list[float]]
) -> None:
    """Grid, numbers and names of both axes; ``marks`` are the ticks of x and y."""
    left, _, right, bottom = frame
    for value in marks[1]:
        _, y = _place((0, value), frame, bounds)
        draw.line((left, y, right, y), fill=RULE)
        draw.text((left - 8, y), f"{value:g}", fill=SOFT, font=_font(SMALL), anchor="rm")
    for value in marks[0]:
        x, _ = _place((value, 0), frame, bounds)
        if x <= right:
            draw.line((x, bottom, x, bottom + 5), fill=SOFT)
            draw.text((x, bottom + 8), f"{value:g}", fill=SOFT, font=_font(SMALL), anchor="mt")
    draw.line((left, bottom, right, bottom), fill=SOFT)
    draw.text(((left + right) / 2, bottom + 26), "step", fill=INK, font=_font(TEXT), anchor="mt")
