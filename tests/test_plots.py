import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from glare.plots import (
    CHART_TITLES,
    EDGE,
    FRAME,
    MAX_POINTS,
    Axis,
    Mark,
    axis_of,
    axis_svg,
    chart_svg,
    charts,
    direction,
    mark_svg,
    read_charts,
)
from glare.report_text import MINUS

AXIS = Axis([-2.0, 0.0, 2.0, 4.0])


def percent(value: float, low: float = -2.0, high: float = 4.0) -> float:
    """Where a value of the axis is, in % of the box, written out."""
    return 6 + 88 * (value - low) / (high - low)


def parts(svg: str, name: str) -> list[dict[str, str]]:
    """Attributes of the elements that have a class."""
    found = [element.attrib for element in ElementTree.fromstring(svg).iter()]
    return [attributes for attributes in found if name in attributes.get("class", "").split()]


def place(attributes: dict[str, str], key: str) -> float:
    assert attributes[key].endswith("%")
    return float(attributes[key][:-1])


def test_an_axis_goes_from_edge_to_edge() -> None:
    assert AXIS.place(-2) == EDGE and AXIS.place(4) == 100 - EDGE
    assert AXIS.place(1) == pytest.approx(50)
    assert AXIS.place(99) == AXIS.place(4) and AXIS.place(-99) == AXIS.place(-2)


def test_a_mark_is_drawn_where_its_numbers_are() -> None:
    svg = mark_svg(Mark("a", "", 1.5, -0.7, 3.1, dots=(0.4, 2.6)), AXIS)
    (line,), (value,), dots = parts(svg, "interval"), parts(svg, "value"), parts(svg, "dot")
    assert place(line, "x1") == pytest.approx(percent(-0.7), abs=0.01)
    assert place(line, "x2") == pytest.approx(percent(3.1), abs=0.01)
    assert place(value, "cx") == pytest.approx(percent(1.5), abs=0.01)
    assert [place(dot, "cx") for dot in dots] == pytest.approx([percent(0.4), percent(2.6)], abs=0.01)
    assert [place(cap, "x") for cap in parts(svg, "cap")] == pytest.approx([percent(-0.7), percent(3.1)], abs=0.01)


def test_the_zero_line_is_at_zero_and_the_grid_at_the_other_ticks() -> None:
    svg = mark_svg(Mark("a", "", 1.0), AXIS)
    (zero,) = parts(svg, "zero")
    assert place(zero, "x1") == place(zero, "x2") == pytest.approx(percent(0), abs=0.01)
    assert [place(line, "x1") for line in parts(svg, "grid")] == pytest.approx(
        [percent(v) for v in (-2, 2, 4)], abs=0.01
    )
    labels = [(element.text, place(element.attrib, "x")) for element in ElementTree.fromstring(axis_svg(AXIS))]
    assert [text for text, _ in labels] == [f"{MINUS}2", "0", "+2", "+4"]
    assert [x for _, x in labels] == pytest.approx([percent(v) for v in (-2, 0, 2, 4)], abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0.1, 1, "above"), (-1, -0.1, "below"), (-0.1, 1, "around"), (0, 1, "around"), (None, None, "around")],
)
def test_colours_say_on_which_side_of_zero_an_interval_is(low: float | None, high: float | None, found: str) -> None:
    mark = Mark("a", "", 0.5, low, high)
    assert direction(mark) == found
    assert found in parts(mark_svg(mark, AXIS), "value")[0]["class"].split()


def test_an_interval_beyond_the_axis_ends_in_an_arrow() -> None:
    svg = mark_svg(Mark("a", "", 1.0, -0.5, 40.0), AXIS)
    assert place(parts(svg, "interval")[0], "x2") == pytest.approx(percent(4), abs=0.01)
    tags = [element.tag for element in ElementTree.fromstring(svg).iter() if element.get("class", "").startswith("cap")]
    assert tags == ["rect", "polygon"]


def test_one_wide_interval_does_not_flatten_the_others() -> None:
    usual = [Mark(str(n), "", 1.0, -1.0, 3.0) for n in range(5)]
    assert axis_of(usual).ticks[-1] < 5
    assert axis_of([*usual, Mark("wide", "", 2.0, -300.0, 304.0)]).ticks[-1] < 30
    assert axis_of([*usual, Mark("far", "", 200.0, 190.0, 210.0)]).ticks[-1] >= 200


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_nothing_to_draw_is_an_axis_around_zero(value: float) -> None:
    mark = Mark("a", "", value, math.nan, math.inf)
    axis = axis_of([mark])
    assert axis.ticks[0] < 0 < axis.ticks[-1]
    svg = mark_svg(mark, axis)
    assert not parts(svg, "interval") and len(parts(svg, "value")) == (not math.isnan(value))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    lines = [
        {"step": 10, "loss": 9.0, "loss_glob": 4.0, "teacher_entropy": 1.0, "marginal_entropy": 1.5, "data_wait": 0.1},
        {"step": 20, "loss": 8.0, "loss_glob": None, "teacher_entropy": 1.2, "marginal_entropy": 1.3},
        {"step": 30, "loss": 7.0, "loss_glob": 2.0, "learning_rate": 1e-5, "note": "text", "new": 1},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_curves_are_the_finite_numbers_of_a_log(metrics: Path) -> None:
    curves = read_charts(metrics)
    assert curves["loss_glob"] == [(10, 4), (30, 2)]
    assert curves["learning_rate"] == [(30, 1e-5)] and curves["new"] == [(30, 1)]
    assert [step for step, _ in curves["information"]] == [10, 20]
    assert [value for _, value in curves["information"]] == pytest.approx([0.5, 0.1])
    assert not {"step", "loss", "data_wait", "note"} & curves.keys()


def test_a_chart_for_every_value_with_a_line_for_every_run(metrics: Path) -> None:
    drawn = charts({"a": {"new": [(1, 1), (2, 3)]}, "b": read_charts(metrics)})
    first, *_, last = drawn
    assert first == CHART_TITLES["loss_glob"] and last == "new"
    assert not parts(drawn[CHART_TITLES["loss_glob"]], "c0"), "a run keeps its colour where others have no line"
    assert len(parts(drawn[CHART_TITLES["loss_glob"]], "c1")) == 2
    assert {"c0", "c1"} <= {name for a in parts(drawn["new"], "line") for name in a["class"].split()}


def test_lines_go_through_their_values() -> None:
    svg = chart_svg([[(0, 1.0), (50, 3.0), (100, 2.0)]], name="x")
    left, top, right, bottom = FRAME
    strong = [line for line in parts(svg, "line") if "pale" not in line["class"].split()]
    points = [tuple(map(float, pair.split(","))) for pair in strong[0]["points"].split()]
    expected = [(left, bottom), ((left + right) / 2, top), (right, (top + bottom) / 2)]
    assert [xy for point in points for xy in point] == pytest.approx(
        [xy for point in expected for xy in point], abs=0.06
    )
    texts = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert texts[0] == "1.0" and "100" in texts


@pytest.mark.parametrize("line", [[(10, 0.991)], [(10, 5.0), (20, 5.0)], [(1, 0.0)], [(10, 1.5e-4), (20, 1e-6)]])
def test_charts_of_little_or_constant_data(line: list[tuple[float, float]]) -> None:
    svg = chart_svg([line, []], name='a "quoted" <name> & more')
    numbers = [float(v) for a in parts(svg, "line") for v in (a.get("points") or a["cx"]).replace(",", " ").split()]
    assert all(math.isfinite(v) and 0 <= v <= 320 for v in numbers)
    assert '"quoted" <name> & more' in ElementTree.fromstring(svg).attrib["aria-label"]


def test_long_runs_are_thinned_without_losing_their_level() -> None:
    svg = chart_svg([[(step, 3.0 + step % 2) for step in range(5000)]], name="x")
    points = parts(svg, "pale")[0]["points"].split()
    assert MAX_POINTS / 2 < len(points) <= MAX_POINTS
    assert len({point.split(",")[1] for point in points}) < 5
