"""A picture of scores against numbers of labels: a line for each start, through the means of its seeds."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

from glare.errors import UserError
from glare.figures import (
    GAP,
    INK,
    LINES,
    MARGIN,
    PAPER,
    RULE,
    SMALL,
    SOFT,
    SUPERSAMPLING,
    TEXT,
    Colour,
    Frame,
    legend,
    ticks,
)

Scores = Mapping[int, Sequence[float]]
"""Number of labels -> the score of each seed, in percent."""

DOT, CENTRE = 2.5, 4.5  # radius in px of a seed's score and of a mean


def budget_curves(curves: Mapping[str, Scores], *, label: str, size: tuple[int, int] = (900, 480)) -> Image.Image:
    """Scores against label budgets, whose axis is logarithmic, with a dot for each seed; ``label`` names the scores.

    Raises UserError where there are no scores.
    """
    points = [(budget, score) for scores in curves.values() for budget, found in scores.items() for score in found]
    if not points:
        raise UserError("there are no scores to draw; give at least one budget and seed")
    budgets, values = sorted({budget for budget, _ in points}), [score for _, score in points]
    marks = ticks(min(values), max(values))
    left, right = MARGIN + 40, size[0] - MARGIN - 20
    colours = {name: _colour(number) for number, name in enumerate(curves)}
    names = legend(colours, width=right - left)
    frame = (left, MARGIN + names.height + 17, right, size[1] - MARGIN - 40)
    place = _Place(frame, (log2(budgets[0]), log2(budgets[-1])), (marks[0], marks[-1]))
    canvas = Image.new("RGB", size, PAPER)
    _axes(ImageDraw.Draw(canvas), place, budgets, marks, label=label)
    layer = Image.new("RGBA", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), (*PAPER, 0))
    for name, scores in curves.items():
        _line(ImageDraw.Draw(layer), place, scores, colours[name])
    layer = layer.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(layer, (0, 0), layer)
    canvas.paste(names, (left - GAP, MARGIN - GAP))
    return canvas


def _colour(number: int) -> Colour:
    """Of a line: the darker half of each colour once all are taken."""
    red, green, blue = (value // (1 + number // len(LINES)) for value in LINES[number % len(LINES)])
    return red, green, blue


class _Place:
    """Pixels of (budget, score) in a frame whose axes go from low to high in log2 of budgets and in scores."""

    def __init__(self, frame: Frame, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.frame, self.x, self.y = frame, x, y

    def __call__(self, budget: float, score: float) -> tuple[float, float]:
        left, top, right, bottom = self.frame
        inset = 20  # so that dots at the ends keep clear of the axis
        width, height = right - left - 2 * inset, bottom - top
        across = (log2(budget) - self.x[0]) / (self.x[1] - self.x[0]) if self.x[1] > self.x[0] else 0.5
        return left + inset + across * width, bottom - (score - self.y[0]) / (self.y[1] - self.y[0]) * height


def _axes(
    draw: ImageDraw.ImageDraw, place: _Place, budgets: Sequence[int], marks: Sequence[float], *, label: str
) -> None:
    left, top, right, bottom = place.frame
    small, text = ImageFont.load_default(SMALL), ImageFont.load_default(TEXT)
    for mark in marks:
        _, y = place(budgets[0], mark)
        draw.line((left, y, right, y), fill=RULE)
        draw.text((left - 8, y), f"{mark:g}", fill=SOFT, font=small, anchor="rm")
    for budget in budgets:
        x, _ = place(budget, marks[0])
        draw.line((x, bottom, x, bottom + 5), fill=SOFT)
        draw.text((x, bottom + 8), f"{budget:,}", fill=SOFT, font=small, anchor="mt")
    draw.line((left, bottom, right, bottom), fill=SOFT)
    draw.text((MARGIN, top - 12), label, fill=INK, font=text, anchor="ls")
    draw.text(((left + right) / 2, bottom + 26), "labelled images", fill=INK, font=text, anchor="mt")


def _line(draw: ImageDraw.ImageDraw, place: _Place, scores: Scores, colour: tuple[int, int, int]) -> None:
    """The line through the means, which have a dot each, and a small, pale dot for each seed."""
    means = [place(budget, fmean(scores[budget])) for budget in sorted(scores) if scores[budget]]
    large = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in means]
    for start, end in pairwise(large):
        draw.line((start, end), fill=(*colour, 255), width=2 * SUPERSAMPLING)
    single = [place(budget, score) for budget, found in scores.items() for score in found if len(found) > 1]
    for dots, radius, alpha in ((single, DOT, 120), (means, CENTRE, 255)):
        for x, y in dots:
            box = [SUPERSAMPLING * value for value in (x - radius, y - radius, x + radius, y + radius)]
            draw.ellipse(box, fill=(*colour, alpha))
