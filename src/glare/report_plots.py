"""The plots of a comparison: which differences are drawn together, and what is said about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glare.comparison import Comparison, DataResult, ProbeResult
from glare.intervals import Estimate
from glare.plots import Axis, Mark, axis_of, axis_svg, mark_svg
from glare.report_text import controls_of, interval, main_probe, others, points, random_gain, untouched_name

MAX_MARKS = 20  # of classes or groups in a plot


@dataclass(frozen=True)
class Drawn:
    """A difference as the page shows it: its name, its numbers, its SVG."""

    name: str
    text: str
    svg: str


@dataclass(frozen=True)
class Forest:
    """Differences on one axis under headings; ``note`` says what is left out, or how to read it."""

    title: str
    note: str
    groups: Mapping[str, Sequence[Drawn]]
    axis: str


def _forest(title: str, note: str, groups: Mapping[str, Sequence[Mark]], axis: Axis | None = None) -> Forest:
    axis = axis or axis_of([mark for marks in groups.values() for mark in marks])
    drawn = {
        heading: [Drawn(mark.name, mark.text, mark_svg(mark, axis)) for mark in marks]
        for heading, marks in groups.items()
    }
    return Forest(title, note, drawn, axis_svg(axis))


def _mark(name: str, estimate: Estimate, *, kind: str = "row", dots: Sequence[float] = ()) -> Mark:
    value, low, high = (100 * edge for edge in (estimate.value, estimate.low, estimate.high))
    return Mark(name, interval(estimate), value, low, high, dots, kind)


def difference_forest(result: Comparison, data: DataResult, probe: ProbeResult) -> Forest:
    """Every row against the untouched model and against its control, and the control against the untouched model."""
    base = probe.scores[untouched_name(result)].miou
    groups = {}
    for row in result.rows:
        finding = probe.findings[row.name]
        runs = [100 * (probe.scores[name].miou - base) for name in row.members] if len(row.members) > 1 else []
        draws = [100 * (probe.scores[n].miou - base) for n in controls_of(result, row) if n in probe.scores]
        gain = random_gain(finding)
        groups[row.name] = [
            _mark("against untouched", finding.against_untouched, dots=runs),
            _mark("against random adapters", finding.against_control),
            Mark("random adapters themselves", points(gain), 100 * gain, dots=draws, kind="control"),
        ]
    note = "Lines are intervals; small dots are single runs, or single draws of random adapters."
    return _forest(f"{data.data} under {probe.probe}: difference of mIoU in points", note, groups)


def class_forests(result: Comparison, probe: ProbeResult) -> list[Forest]:
    """For every row, the classes whose IoU changed most."""
    marks = {}
    for row in result.rows:
        classes = probe.findings[row.name].classes.items()
        marks[row.name] = [_mark(name, estimate) for name, estimate in classes if estimate is not None]
    return _largest_by_row(marks, "classes", dict.fromkeys(marks, ""))


def group_forests(result: Comparison, probe: ProbeResult) -> list[Forest]:
    """For every row, the groups of images that changed most; none where images are not grouped."""
    marks, notes = {}, {}
    for row in result.rows:
        groups = probe.findings[row.name].groups
        marks[row.name] = [Mark(name, points(value), 100 * value, kind="group") for name, value in groups.items()]
        better = sum(value > 0 for value in groups.values())
        notes[row.name] = f"Better on {better} of {len(groups)} groups. A group alone has no interval."
    return _largest_by_row(marks, "groups", notes)


def _largest_by_row(marks: Mapping[str, Sequence[Mark]], what: str, notes: Mapping[str, str]) -> list[Forest]:
    """A plot a row, all on one axis, of at most ``MAX_MARKS`` differences, the largest gain first."""
    largest = {name: sorted(found, key=lambda mark: -abs(mark.value))[:MAX_MARKS] for name, found in marks.items()}
    axis = axis_of([mark for found in largest.values() for mark in found])
    forests = []
    for name, found in largest.items():
        left_out = len(marks[name]) - len(found)
        said = f"The {len(found)} of {len(marks[name])} {what} with the largest changes in either direction. "
        ordered = sorted(found, key=lambda mark: -mark.value)
        note = (said if left_out else "") + notes[name]
        forests += [_forest(name, note, {"": ordered}, axis)] if found else []
    return forests


def split_forest(result: Comparison, data: DataResult, probe: ProbeResult) -> Forest | None:
    """Tuning and domain, which add up to the difference to the untouched model; None where that is unknown."""
    groups = {}
    for row in result.rows:
        finding = probe.findings[row.name]
        if finding.tuning is not None and finding.domain is not None:
            whole = _mark("altogether", finding.against_untouched)
            groups[row.name] = [whole, _mark("tuning", finding.tuning), _mark("domain", finding.domain)]
    title = f"{data.data} under {probe.probe}: difference of mIoU in points"
    return _forest(title, "", groups) if groups else None


def forgetting_forest(result: Comparison) -> Forest | None:
    """Every row on data it was not adapted to, against the untouched model; None where there is no such data."""
    groups = {}
    for data in others(result):
        probe = main_probe(result, data)
        groups[f"{data.data} under {probe.probe}"] = [
            _mark(row.name, probe.findings[row.name].against_untouched) for row in result.rows
        ]
    return _forest("Data that was not adapted to: difference of mIoU in points", "", groups) if groups else None
