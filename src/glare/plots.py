"""Plots as inline SVG: differences with their intervals around a zero line, and the curves of a training run.

Colours are classes of the page's style sheet, so that a plot is readable on light, dark and paper. A difference is
drawn in percent of its box and so keeps the size of dots and lines at any width; the text beside it is the page's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from xml.sax.saxutils import quoteattr

from glare.curves import Point, read_curves
from glare.figures import smooth, ticks
from glare.report_text import MINUS

EDGE = 6.0  # % of a box at both sides, which a centred number at the end of the axis needs
CROWDED = 5  # times the median bound: what is farther out is cut, with an arrow
CHART = (320, 170)  # px
FRAME = (48, 10, 312, 146)  # px: left, top, right, bottom of the lines in a chart
MAX_POINTS = 200  # of a line
NUM_COLOURS = 6  # of lines in the style sheet; from the seventh on they are dashed
NOT_CURVES = frozenset({"loss", "images_per_second", "data_wait"})
"""Values of metrics.jsonl without a chart: the total loss is no measure of progress, speed says nothing of learning."""

CHART_TITLES = {
    "loss_glob": "Loss, global",
    "loss_reg": "Loss, regional",
    "loss_loc1": "Loss, local, augmented patches",
    "loc1_per_patch": "Loss, local, by augmented patch",
    "loss_loc2": "Loss, local, across views",
    "loss_anchor": "Loss, anchor (1 - cosine to the untouched features)",
    "information": "Information in the targets (nats; near 0 for long: none)",
    "teacher_entropy": "Mean entropy of the teacher's targets",
    "marginal_entropy": "Entropy of the teacher's mean target",
    "rankme_patches": "Effective rank (RankMe) of patches",
    "rankme_cls": "Effective rank (RankMe) of [CLS]",
    "feature_std": "Standard deviation of patch features",
    "cosine_to_base": "Mean cosine of patches to the untouched model",
    "matched_share": "Share of patches with a match in the other view",
    "centre_norm_cls": "Norm of the centre, [CLS]",
    "centre_norm_region": "Norm of the centre, regions",
    "centre_norm_patch": "Norm of the centre, patches",
    "grad_norm": "Gradient norm",
    "grad_norm_backbone": "Gradient norm, backbone",
    "grad_norm_heads": "Gradient norm, heads",
    "learning_rate": "Learning rate",
    "teacher_momentum": "Teacher momentum",
}
"""Value -> title of its chart, in their order on the page."""


@dataclass(frozen=True)
class Mark:
    """A difference to draw, in points: its value, its interval if it has one, and single runs or draws behind it.

    ``text`` stands beside it; ``kind`` is the class of the dot: "row", "control" or "group".
    """

    name: str
    text: str
    value: float
    low: float | None = None
    high: float | None = None
    dots: Sequence[float] = ()
    kind: str = "row"


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` with round ``ticks``; ``low`` and ``high`` are the outer ticks."""

    ticks: Sequence[float]

    def place(self, value: float) -> float:
        """Horizontal position of a value in % of the box; beyond the ends, at the end."""
        low, high = self.ticks[0], self.ticks[-1]
        return EDGE + (100 - 2 * EDGE) * (min(max(value, low), high) - low) / (high - low)


def axis_of(marks: Sequence[Mark]) -> Axis:
    """An axis with room for 0, all values and dots, and all intervals but those that would crowd the others."""
    values = [v for mark in marks for v in (mark.value, *mark.dots) if math.isfinite(v)]
    edges = [e for mark in marks for e in (mark.low, mark.high) if e is not None and math.isfinite(e)]
    far = CROWDED * median(map(abs, edges)) if edges else 0.0
    far = max(far, 1.1 * max(map(abs, values), default=0.0))
    low = min([0.0, *values, *(max(edge, -far) for edge in edges)])
    high = max([0.0, *values, *(min(edge, far) for edge in edges)])
    return Axis(ticks(low, high, about=5) if high > low else [-1.0, 0.0, 1.0])


def mark_svg(mark: Mark, axis: Axis) -> str:
    """One difference: grid and zero line over the whole height, the interval, single dots, the value on top."""
    parts = [_upright(axis.place(tick), "zero" if abs(tick) < 1e-9 else "grid") for tick in axis.ticks]
    tone = direction(mark)
    if mark.low is not None and mark.high is not None and math.isfinite(mark.low + mark.high):
        ends = axis.place(mark.low), axis.place(mark.high)
        parts.append(f'<line class="interval {tone}" x1="{ends[0]:.2f}%" x2="{ends[1]:.2f}%" y1="50%" y2="50%"/>')
        for end, outside in ((ends[0], mark.low < axis.ticks[0]), (ends[1], mark.high > axis.ticks[-1])):
            parts.append(_arrow(end, tone) if outside else _cap(end, tone))
    parts += [f'<circle class="dot" cx="{axis.place(dot):.2f}%" cy="50%" r="2.5"/>' for dot in mark.dots]
    if math.isfinite(mark.value):
        x = axis.place(mark.value)
        parts.append(f'<circle class="value {mark.kind} {tone}" cx="{x:.2f}%" cy="50%" r="5"/>')
    return f'<svg class="mark" aria-hidden="true">{"".join(parts)}</svg>'


def direction(mark: Mark) -> str:
    """``above`` or ``below`` where the whole interval is on that side of 0, otherwise ``around``."""
    if mark.low is not None and mark.low > 0:
        return "above"
    return "below" if mark.high is not None and mark.high < 0 else "around"


def axis_svg(axis: Axis) -> str:
    """The numbers under a stack of marks."""
    numbers = (_number(tick, axis.ticks[1] - axis.ticks[0], "+") for tick in axis.ticks)
    parts = [f'<text x="{axis.place(t):.2f}%" y="14">{n}</text>' for t, n in zip(axis.ticks, numbers, strict=True)]
    return f'<svg class="axis" aria-hidden="true">{"".join(parts)}</svg>'


def _number(value: float, step: float, sign: str = "") -> str:
    """A tick, with the decimals that its distance to the next one needs."""
    digits = next((count for count in range(5) if abs(step - round(step, count)) < 1e-6 * step), None)
    text = f"{value:{sign}.1e}".replace("e-0", "e-") if digits is None else f"{value:{sign}.{digits}f}"
    return text.replace("-", MINUS) if abs(value) > 1e-6 * step else "0"


def _upright(x: float, name: str) -> str:
    return f'<line class="{name}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>'


def _cap(x: float, tone: str) -> str:
    return f'<rect class="cap {tone}" x="{x:.2f}%" y="50%" width="2" height="10" transform="translate(-1 -5)"/>'


def _arrow(x: float, tone: str) -> str:
    """An interval goes on beyond the axis; its end gets a nested box, as polygons have no coordinates in %."""
    points = "0,0 7,6 0,12" if x > 50 else "0,0 -7,6 0,12"
    shape = f'<polygon class="cap {tone}" points="{points}" transform="translate(0 -6)"/>'
    return f'<svg x="{x:.2f}%" y="50%" overflow="visible">{shape}</svg>'


def read_charts(metrics: Path) -> dict[str, list[Point]]:
    """The curves of a metrics.jsonl that are drawn.

    Adds ``information``: entropy of the teacher's mean target minus the mean entropy of its targets, in nats.
    """
    curves = {name: points for name, points in read_curves(metrics).items() if name not in NOT_CURVES}
    mean_entropy = dict(curves.get("teacher_entropy", ()))
    known = [
        (step, value - mean_entropy[step]) for step, value in curves.get("marginal_entropy", ()) if step in mean_entropy
    ]
    return curves | ({"information": known} if known else {})


def charts(runs: Mapping[str, Mapping[str, Sequence[Point]]]) -> dict[str, str]:
    """One chart for every value, with a line for each run: title -> SVG.

    ``runs``: run -> value -> (step, value); the colours of runs go by their order.
    """
    found = {name for curves in runs.values() for name in curves}
    order = [name for name in CHART_TITLES if name in found] + sorted(found - CHART_TITLES.keys())
    return {
        CHART_TITLES.get(name, name): chart_svg([list(curves.get(name, ())) for curves in runs.values()], name=name)
        for name in order
    }


def chart_svg(lines: Sequence[Sequence[Point]], *, name: str) -> str:
    """Lines over steps with axes: the raw values pale, their running mean strong; empty lines only keep a colour."""
    thin = [_thinned(line) for line in lines]
    everything = [point for line in thin for point in line]
    values = [value for _, value in everything]
    x_ticks = ticks(0, max(step for step, _ in everything), about=4)
    y_ticks = _value_ticks(values)
    last = max(step for step, _ in everything)
    bounds = ((0.0, last), (y_ticks[0], y_ticks[-1]))

    def place(point: Point) -> Point:
        return place_in_frame(point, bounds)

    parts = _chart_axes(x_ticks, y_ticks, last, place)
    for number, line in enumerate(thin):
        style = f"line {line_style(number)}"
        parts += [_path(line, place, f"{style} pale"), _path(smooth(line), place, style)] if line else []
    said = f"{name} over {last:g} steps, from {min(values):.3g} to {max(values):.3g}"
    size = f"0 0 {CHART[0]} {CHART[1]}"
    return f'<svg class="chart" viewBox="{size}" role="img" aria-label={quoteattr(said)}>{"".join(parts)}</svg>'


def line_style(number: int) -> str:
    """Classes of the line of run ``number``, the same in all charts and in their legend."""
    return f"c{number % NUM_COLOURS}" + (" dashed" if number // NUM_COLOURS % 2 else "")


def place_in_frame(point: Point, bounds: tuple[Point, Point]) -> Point:
    """Pixel of a (step, value) in a chart whose axes go over ``bounds`` (low, high) of x and y."""
    (x_low, x_high), (y_low, y_high) = bounds
    left, top, right, bottom = FRAME
    x = left + (right - left) * (point[0] - x_low) / max(x_high - x_low, 1e-12)
    return x, bottom - (bottom - top) * (point[1] - y_low) / (y_high - y_low)


def _value_ticks(values: Sequence[float]) -> list[float]:
    """Ticks around all values; a tenth to both sides of a value that never changes."""
    low, high = min(values), max(values)
    reach = 0.0 if high > low else 0.1 * abs(high) or 1.0
    return ticks(low - reach, high + reach, about=4)


def _thinned(line: Sequence[Point]) -> list[Point]:
    """At most ``MAX_POINTS`` means of neighbours."""
    size = math.ceil(len(line) / MAX_POINTS)
    parts = [line[start : start + size] for start in range(0, len(line), max(size, 1))]
    return [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]


def _chart_axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], last: float, place: Callable[[Point], Point]
) -> list[str]:
    left, _, right, bottom = FRAME
    parts = []
    for value in y_ticks:
        y = place((0, value))[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = _number(value, y_ticks[1] - y_ticks[0])
        parts.append(f'<text class="end" x="{left - 5}" y="{y + 4:.1f}">{text}</text>')
    for value in x_ticks:
        if value <= last:
            parts.append(f'<text x="{place((value, 0))[0]:.1f}" y="{bottom + 16}">{value:g}</text>')
    return parts


def _path(line: Sequence[Point], place: Callable[[Point], Point], style: str) -> str:
    """A line through points, or a dot for a single one."""
    pixels = [place(point) for point in line]
    if len(pixels) == 1:
        return f'<circle class="{style} single" cx="{pixels[0][0]:.1f}" cy="{pixels[0][1]:.1f}" r="3"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    return f'<polyline class="{style}" points="{points}"/>'
