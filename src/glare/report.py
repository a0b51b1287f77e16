"""The report of a comparison: ``compare.json``, ``compare.md`` and a page that needs nothing but itself."""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from glare.comparison import Comparison, DataResult, ProbeResult
from glare.plots import charts, line_style, read_charts
from glare.report_plots import class_forests, difference_forest, forgetting_forest, group_forests, split_forest
from glare.report_tables import (
    Table,
    class_table,
    escape,
    forgetting_table,
    markdown,
    other_scores_table,
    pair_table,
    plain,
    price_table,
    score_tables,
    split_table,
)
from glare.report_text import (
    DEFINITIONS,
    MINUS,
    UNKNOWN,
    answers,
    facts,
    main_probe,
    measured,
    ordered_probes,
    price_text,
    tally,
    untouched_name,
)
from glare.run_folder import atomic_write_json, atomic_write_text

ASSETS = Path(__file__).parent / "assets"
TERMINAL = 120  # columns
PICTURE_BYTES = 3_000_000  # of all pictures, so that the page stays below 5 MB with them written in base64
PICTURE_WIDTH = 1500  # px at most
JPEG_QUALITY = 85
MAP_COLOURS = 4096  # a picture with more is a photo
FEW_ROWS = 3  # that are read at a glance

PICTURE_SECTIONS = {
    "gained": "Where it gained most",
    "lost": "Where it lost most",
    "pca": "Patch features",
    "attention": "Attention",
}
"""Section of a picture -> its heading, in their order on the page."""


@dataclass(frozen=True)
class Picture:
    """A picture for the page; ``section`` is a key of ``PICTURE_SECTIONS``."""

    title: str
    caption: str
    image: Image.Image
    section: str


def write_report(folder: Path, result: Comparison, pictures: Sequence[Picture], curves: Mapping[str, Path]) -> Path:
    """Write ``compare.json``, ``compare.md`` and ``report.html`` into ``folder``; returns the page.

    ``curves``: name of an adapted model -> the metrics.jsonl of its run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "compare.json", result.to_dict())
    atomic_write_text(folder / "compare.md", to_markdown(result))
    page = folder / "report.html"
    atomic_write_text(page, to_html(result, pictures, curves))
    return page


def summary(result: Comparison) -> str:
    """What the terminal shows, at most 120 columns wide: verdicts, scores, forgetting and price."""
    lines = [line for answer in answers(result) for line in _wrapped(f"{answer.name}: {answer.sentence}")]
    tables = [*score_tables(result, full=False), forgetting_table(result)]
    lines += [f"\n{plain(table)}" for table in tables if table.lines]
    lines += [""] if result.prices else []
    lines += [line for name, price in result.prices.items() for line in _wrapped(f"{name}: {price_text(price)}")]
    # not every terminal can show the signs of the page
    return "\n".join(lines).replace("`", "").replace(MINUS, "-").replace(UNKNOWN, "-")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, TERMINAL, subsequent_indent="  ", break_on_hyphens=False)


def to_markdown(result: Comparison) -> str:
    """Verdicts, scores, forgetting and price for a model card."""
    parts = ["\n".join(f"- **{escape(answer.name)}** is {escape(answer.sentence)}" for answer in answers(result))]
    splits = [split_table(result, data, main_probe(result, data)) for data in measured(result)]
    tables = [*score_tables(result, full=False), forgetting_table(result), *splits, price_table(result)]
    parts += [markdown(table) for table in tables if table.lines]
    parts += [escape(f"{term}: {text}") for term, text in facts(result).items()]
    return "\n\n".join(parts) + "\n"


def to_html(result: Comparison, pictures: Sequence[Picture], curves: Mapping[str, Path]) -> str:
    """The page: the answer first, then what it rests on."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    probed = [(data, probe) for data in measured(result) for probe in ordered_probes(result, data)]
    asked = [(data, main_probe(result, data)) for data in measured(result)]
    runs = {name: found for name, path in curves.items() if (found := read_charts(path))}
    pairs = [pair_table(probe, data) for data, probe in asked if probe.pairs]
    return environment.get_template("report.html").render(
        result=result,
        base=untouched_name(result),
        measured=measured(result),
        answers=answers(result),
        tally=tally(result) if len(result.rows) > FEW_ROWS else "",
        definitions=DEFINITIONS,
        scores=score_tables(result, full=True),
        other_scores=[other_scores_table(result, data, probe) for data, probe in probed],
        differences=[difference_forest(result, data, probe) for data, probe in probed],
        parts=[_parts(result, data, probe) for data, probe in asked],
        pairs=pairs,
        forgetting=_filled(forgetting_table(result)),
        forgetting_plot=forgetting_forest(result),
        splits=[plot for data, probe in asked if (plot := split_forest(result, data, probe))],
        price=_filled(price_table(result)),
        pictures=_by_section(pictures),
        charts=charts(runs) if runs else {},
        runs={name: line_style(number) for number, name in enumerate(runs)},
        facts=facts(result),
    )


def _parts(result: Comparison, data: DataResult, probe: ProbeResult) -> dict[str, object]:
    """What the page says of classes and groups of images of one data set."""
    return {
        "name": f"{data.data} under {probe.probe}",
        "classes": class_forests(result, probe),
        "class_table": class_table(result, data, probe),
        "groups": group_forests(result, probe),
    }


def _filled(table: Table) -> Table | None:
    return table if table.lines else None


@dataclass(frozen=True)
class _Shown:
    """A picture as the page holds it; ``wide`` ones may scroll on a phone."""

    title: str
    caption: str
    uri: str
    width: int
    height: int
    wide: bool


def _by_section(pictures: Sequence[Picture]) -> dict[str, list[_Shown]]:
    """Heading -> pictures, all scaled alike as far as the page has to stay small."""
    width = PICTURE_WIDTH
    encoded = [_encoded(picture.image, width) for picture in pictures]
    while (total := sum(len(content) for content, _, _ in encoded)) > PICTURE_BYTES:
        width = round(0.9 * width * (PICTURE_BYTES / total) ** 0.5)
        encoded = [_encoded(picture.image, width) for picture in pictures]
    sections: dict[str, list[_Shown]] = {}
    for section, heading in PICTURE_SECTIONS.items():
        for picture, (content, kind, (width, height)) in zip(pictures, encoded, strict=True):
            if picture.section == section:
                uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
                shown = _Shown(picture.title, picture.caption, uri, width, height, wide=width > 1.6 * height)
                sections.setdefault(heading, []).append(shown)
    return sections


def _encoded(image: Image.Image, width: int) -> tuple[bytes, str, tuple[int, int]]:
    """A picture of at most ``width`` px: maps as PNG, so that they stay sharp, photos as JPEG."""
    fitted = image.convert("RGB")
    kind = "jpeg" if fitted.getcolors(MAP_COLOURS) is None else "png"
    if fitted.width > width:
        fitted = fitted.resize((width, max(1, round(width * fitted.height / fitted.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    fitted.save(file, kind, quality=JPEG_QUALITY, optimize=True)
    return file.getvalue(), kind, fitted.size
