"""Tables of a comparison, and how they look in Markdown and in the terminal."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from glare.comparison import FOREIGN, Comparison, DataResult, ProbeResult
from glare.report_text import (
    COLLAPSED,
    UNKNOWN,
    UNTIL,
    controls_of,
    duration,
    interval,
    main_probe,
    measured,
    ordered_probes,
    others,
    overhead_text,
    points,
    score,
    size,
    untouched_name,
)

NAME_WIDTH = 32  # of the first column in the terminal
MARKDOWN = re.compile(r"[\\|<>&*~]|(?<!\w)_|_(?!\w)|\](?=[(\[])")
"""What Markdown would read as more than text; an underscore inside a word it leaves alone."""


@dataclass(frozen=True)
class Line:
    """A line of a table; ``kind`` says what it tells of: untouched, row, collapsed, member, control or foreign."""

    cells: Sequence[str]
    kind: str = "row"


@dataclass(frozen=True)
class Table:
    """Lines of text under column titles; the first cell of a line names it."""

    caption: str
    columns: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class _Scores:
    """Makes the lines of a table of scores; ``full`` with aAcc and mAcc, ``health`` with the state of features."""

    data: DataResult
    probe: ProbeResult
    base: str
    full: bool
    health: bool

    def line(self, name: str, members: Sequence[str], differences: Sequence[str], kind: str) -> Line:
        """Means of ``members``; ``differences`` to the untouched model and to the control, as text."""
        known = [self.probe.scores[member] for member in members]
        cells = [name, score(fmean(s.miou for s in known)), *differences]
        if self.full:
            cells += [score(fmean(s.aacc for s in known)), score(fmean(s.macc for s in known))]
        return Line([*cells, *(self.state(members) if self.health else [])], kind)

    def gained(self, name: str, members: Sequence[str], kind: str) -> Line:
        """A line with the bare difference to the untouched model."""
        gain = fmean(self.probe.scores[member].miou for member in members) - self.probe.scores[self.base].miou
        return self.line(name, members, [points(gain), ""], kind)

    def state(self, members: Sequence[str]) -> list[str]:
        """RankMe, standard deviation and cosine, from the lowest to the highest of several models."""
        known = [self.data.health[name] for name in members if name in self.data.health]
        return [
            _span([health.rankme for health in known], 0),
            _span([health.std for health in known], 2),
            _span([health.cosine for health in known], 2),
        ]


def _span(values: Sequence[float], digits: int) -> str:
    texts = [f"{value:.{digits}f}" for value in sorted(values)]
    if not texts:
        return UNKNOWN
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]}{UNTIL}{texts[-1]}"


def score_table(result: Comparison, data: DataResult, probe: ProbeResult, *, full: bool) -> Table:
    """mIoU and what it is compared with; beside the probe asked for, the state of the features too.

    ``full``: also the members of rows, aAcc and mAcc.
    """
    base = untouched_name(result)
    scores = _Scores(data, probe, base, full=full, health=probe is main_probe(result, data))
    columns = ["model", "mIoU", "against untouched", "against control", *(["aAcc", "mAcc"] if full else [])]
    columns += ["RankMe", "std", "cosine"] if scores.health else []
    lines = [scores.line(base, [base], ["", ""], "untouched")]
    for row in result.rows:
        finding = probe.findings[row.name]
        differences = [interval(finding.against_untouched), interval(finding.against_control)]
        lines.append(scores.line(row.name, row.members, differences, COLLAPSED if row.collapsed else "row"))
        if full and len(row.members) > 1:
            lines += [scores.gained(name, [name], "member") for name in row.members]
        draws = [name for name in controls_of(result, row) if name in probe.scores]
        if draws:
            lines.append(scores.gained(f"random adapters like it ({len(draws)})", draws, "control"))
    foreign = [model.name for model in result.models if model.role == FOREIGN and model.name in probe.scores]
    lines += [scores.gained(f"{name} (foreign)", [name], FOREIGN) for name in foreign]
    return Table(f"{data.data} under {probe.probe}: scores in %, differences in points", columns, lines)


def other_scores_table(result: Comparison, data: DataResult, probe: ProbeResult) -> Table:
    """Differences of pixel accuracy and mean accuracy to the untouched model."""
    findings = {row.name: probe.findings[row.name] for row in result.rows}
    lines = [Line([name, interval(f.aacc), interval(f.macc)]) for name, f in findings.items()]
    return Table(f"{data.data} under {probe.probe}: against untouched, in points", ["model", "aAcc", "mAcc"], lines)


def class_table(result: Comparison, data: DataResult, probe: ProbeResult) -> Table:
    """IoU of the untouched model by class, and every row's difference to it; * where its interval is without 0."""
    base = probe.scores[untouched_name(result)].iou
    lines = []
    for name in data.classes:
        differences = [probe.findings[row.name].classes.get(name) for row in result.rows]
        cells = [
            UNKNOWN if d is None else points(d.value) + ("*" if d.low > 0 or d.high < 0 else "") for d in differences
        ]
        lines.append(Line([name, score(base.get(name)), *cells]))
    columns = ["class", "untouched", *(row.name for row in result.rows)]
    return Table("IoU of the untouched model in %, differences to it in points; *: interval without 0", columns, lines)


def pair_table(probe: ProbeResult, data: DataResult) -> Table:
    """Rows against each other."""
    lines = [Line([f"{p.first} minus {p.second}", interval(p.difference), p.verdict]) for p in probe.pairs]
    return Table(f"{data.data} under {probe.probe}: mIoU in points", ["models", "difference", "the first is"], lines)


def split_table(result: Comparison, data: DataResult, probe: ProbeResult) -> Table:
    """The difference to the untouched model, divided into tuning and domain; without lines where that is unknown."""
    lines = [
        Line([row.name, interval(f.against_untouched), interval(f.tuning), interval(f.domain)])
        for row in result.rows
        if (f := probe.findings[row.name]).tuning is not None and f.domain is not None
    ]
    columns = ["model", "against untouched", "tuning", "domain"]
    return Table(f"{data.data} under {probe.probe}: mIoU in points", columns, lines)


def forgetting_table(result: Comparison) -> Table:
    """All rows on data they were not adapted to; without lines where none was given."""
    lines = []
    for data in others(result):
        probe = main_probe(result, data)
        before = probe.scores[untouched_name(result)].miou
        for row in result.rows:
            finding = probe.findings[row.name]
            after = fmean(probe.scores[name].miou for name in row.members)
            cells = [row.name, data.data, score(before), score(after), interval(finding.against_untouched)]
            lines.append(Line([*cells, finding.verdict], COLLAPSED if row.collapsed else "row"))
    columns = ["model", "data", "mIoU untouched", "mIoU", "difference", "verdict"]
    return Table("Data that was not adapted to: mIoU in %, differences in points", columns, lines)


def price_table(result: Comparison) -> Table:
    """What every model costs."""
    lines = [
        Line(
            [
                name,
                size(price.adapter_bytes),
                UNKNOWN if price.parameters_trained is None else f"{price.parameters_trained:,}",
                duration(price.seconds),
                size(price.peak_memory_bytes),
                price.device or UNKNOWN,
                overhead_text(price.overhead),
            ]
        )
        for name, price in result.prices.items()
    ]
    columns = ["model", "stored", "parameters trained", "adapted in", "peak memory", "on", "forward pass"]
    return Table(
        "Stored besides the untouched model; time of a forward pass over the untouched model's", columns, lines
    )


def score_tables(result: Comparison, *, full: bool) -> list[Table]:
    """One for each probe on the data adapted to, the probe asked for first."""
    probed = [(data, probe) for data in measured(result) for probe in ordered_probes(result, data)]
    return [score_table(result, data, probe, full=full) for data, probe in probed]


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown under its caption."""
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)]]
    lines = [[escape(cell) for cell in cells] for cells in [*lines, *(line.cells for line in table.lines)]]
    return f"{escape(table.caption)}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escape(text: str) -> str:
    r"""Text that Markdown shows as it is, in one line; code in backticks stays code: ``a|b`` is ``a\|b``."""
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def plain(table: Table) -> str:
    """A table in aligned columns under its caption."""
    rows = [table.columns, *(line.cells for line in table.lines)]
    rows = [[shorten(cells[0], NAME_WIDTH), *cells[1:]] for cells in rows]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(table.columns))]
    texts = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(cells, widths, strict=True)) for cells in rows)
    ]
    return "\n".join([table.caption, *(f"  {text.rstrip()}" for text in texts)])


def shorten(text: str, width: int) -> str:
    """Text without its middle where it is too long."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
