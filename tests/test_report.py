import base64
import io
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glare import report
from glare.comparison import (
    ADAPTED,
    BETTER,
    CONTROL,
    FOREIGN,
    SAME,
    UNTOUCHED,
    WORSE,
    Comparison,
    DataResult,
    Finding,
    Health,
    Model,
    Pair,
    Price,
    ProbeResult,
    Row,
    Scores,
)
from glare.intervals import Estimate, Needed
from glare.report import Picture, summary, write_report
from glare.report_tables import Line, Table, escape, markdown, plain, shorten
from glare.report_text import MINUS, UNKNOWN, answers, duration, interval, points, price_text, score, size, sure

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "a <b>\"bold\"</b> | & 'x' {{ 1 }}"


class Page(HTMLParser):
    """Tags with attributes in their order, text without tags; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half, half**2, 0.0, 72, 3)


def finding(value: float, half: float, control: float, names: Sequence[str], *, foreign: bool, groups: int) -> Finding:
    draw = random.Random(repr(value))
    verdict = BETTER if value > half and control > half else WORSE if value < -half else SAME
    classes = {name: estimate(value + draw.gauss(0, 0.05), half) for name in names}
    part = estimate(value / 2, half) if foreign else None
    return Finding(
        verdict=verdict,
        reason="",
        against_untouched=estimate(value, half),
        aacc=estimate(value, half),
        macc=estimate(value, half),
        against_control=estimate(control, half),
        needed=Needed(412, None) if verdict == SAME else None,
        classes={**classes, names[-1]: None} if len(names) > 1 else classes,
        tuning=part,
        domain=part,
        groups={f"tile{n}": value + draw.gauss(0, 0.05) for n in range(groups)},
    )


def compared(
    gains: Sequence[tuple[str, float, float]],
    *,
    classes: Sequence[str] = ("road", "water"),
    probes: Sequence[str] = ("linear",),
    others: Sequence[str] = (),
    runs: int = 1,
    foreign: bool = False,
    groups: int = 0,
    price: Price | None = None,
) -> Comparison:
    """A comparison of rows (name, gain over untouched, gain over control), each with an interval of ± 0.02."""
    rows = {name: [name] if runs == 1 else [f"{name}_{n}" for n in range(runs)] for name, _, _ in gains}
    models = [Model("untouched", UNTOUCHED, "base")]
    models += [Model(member, ADAPTED, f"runs/{member}") for members in rows.values() for member in members]
    models += [Model(f"control of {name}", CONTROL, "controls/x", name) for name in rows]
    models += [Model("other domain", FOREIGN, "runs/other")] if foreign else []

    def scores(miou: float) -> Scores:
        return Scores(miou, miou + 0.2, miou + 0.1, {name: miou if n else None for n, name in enumerate(classes)})

    def probed(probe: str) -> ProbeResult:
        found = {name: finding(g, 0.02, c, classes, foreign=foreign, groups=groups) for name, g, c in gains}
        measured = {"untouched": scores(0.4), "other domain": scores(0.41)}
        measured |= {member: scores(0.4 + g) for name, g, _ in gains for member in rows[name]}
        measured |= {f"control of {name}": scores(0.4 + g - c) for name, g, c in gains}
        names = list(rows)
        pairs = [Pair(names[0], name, estimate(0.01, 0.02), SAME) for name in names[1:]]
        return ProbeResult(probe, measured, found, pairs)

    def measured_on(data: str, adapted_to: bool) -> DataResult:
        health = {model.name: Health(100.0, 0.57, 0.9) for model in models}
        return DataResult(data, "8 groups", 72, 0, classes, adapted_to, health, [probed(probe) for probe in probes])

    def row(name: str) -> Row:
        found = finding(*next((g, 0.02, c) for n, g, c in gains if n == name), classes, foreign=False, groups=0)
        return Row(name, rows[name], found.verdict, f"why {name}", None)

    return Comparison(
        protocol=probes[-1],
        base="facebook/dinov2-small",
        confidence=0.95,
        seeds=3,
        models=models,
        rows=[row(name) for name in rows],
        data=[measured_on("dubai", True), *(measured_on(name, False) for name in others)],
        prices={member: price for members in rows.values() for member in members} if price else {},
        seconds=754.0,
        command="glare compare --base x",
        versions={"torch": "2.13.0"},
    )


PRICE = Price(1_254_400, 304_128, 132.4, 1_310_000_000, "cpu", estimate(0.041, 0.012))
GAINS = [("good", 0.051, 0.047), ("same", 0.006, 0.002), ("bad", -0.043, -0.041), ("drift", 0.034, 0.001)]
LONG = "runs/of a very long name that nobody would give to anything, except a sweep over learning rates"


def many() -> Comparison:
    gains = [(f"{LONG} {n}", random.Random(n).gauss(0, 0.04), 0.01) for n in range(12)]
    classes = [f"class {n}" for n in range(150)]
    probes = ("knn", "whitened knn", "linear")
    return compared(gains, classes=classes, probes=probes, others=["camvid", "ade"], runs=3, foreign=True, groups=30)


def collapsed(result: Comparison) -> Comparison:
    """The comparison with its first row collapsed."""
    first = replace(result.rows[0], collapsed="RankMe fell from 104 to 8")
    return replace(result, rows=[first, *result.rows[1:]])


CASES = {
    "one": lambda: compared(GAINS[1:2], classes=["field"]),
    "four": lambda: compared(GAINS, probes=("linear", "knn"), others=["camvid"], foreign=True, groups=8, price=PRICE),
    "collapsed": lambda: collapsed(compared(GAINS, price=Price(None, None, None, None, None, None))),
    "many": many,
}


def pictures() -> list[Picture]:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 1700, 3), np.uint8))
    flat = Image.new("RGB", (200, 200), (10, 20, 30))
    return [
        Picture("attention of good", "Heads.", flat, "attention"),
        Picture(HOSTILE, "More right.", photo, "gained"),
        Picture("tile 9", "Less right.", flat, "lost"),
    ]


def page_of(result: Comparison, folder: Path, shown: Sequence[Picture] = ()) -> Page:
    return Page(write_report(folder, result, shown, {}).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A comparison and the folder of its report with pictures."""
    result, folder = CASES[request.param](), tmp_path_factory.mktemp("report")
    write_report(folder, result, pictures(), {})
    return result, folder


def test_the_page_is_sound_and_needs_nothing_else(written: tuple[Comparison, Path]) -> None:
    text = (written[1] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text and len(text) < 5e6
    assert page.all("html")[0]["lang"] == "en" and len(page.all("title")) == len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    assert all("aria-hidden" in svg or "aria-label" in svg for svg in page.all("svg") if "overflow" not in svg)


def test_every_row_has_its_verdict_and_its_numbers_everywhere(written: tuple[Comparison, Path]) -> None:
    result, folder = written
    page = Page((folder / "report.html").read_text(encoding="utf-8")).text
    card = (folder / "compare.md").read_text(encoding="utf-8").replace("**", "").replace("`", "")
    for text, verb in ((page, ":"), (card, " is"), (summary(result), ":")):
        said = " ".join(text.replace(MINUS, "-").split())
        for answer in answers(result):
            sentence = answer.sentence.replace("`", "").replace(MINUS, "-")
            assert f"{answer.name}{verb} {sentence}" in said
            assert answer.verdict in said
        for row in result.rows:
            for probe in result.data[0].probes:
                assert interval(probe.findings[row.name].against_untouched).replace(MINUS, "-") in said
                assert interval(probe.findings[row.name].against_control).replace(MINUS, "-") in said


def test_the_page_begins_with_the_answer(tmp_path: Path) -> None:
    page = page_of(compared(GAINS), tmp_path)
    body = page.text[page.text.index("Did adapting help?", page.text.index("}")) :]
    first = body.index("good: better than the untouched model under linear")
    assert first < body.index("Scores") < body.index("How this was measured")
    assert "controls/x" not in body and "runs/good" in body
    assert "Of 4: 1 better, 1 worse, 2 not distinguishable." in body[:first]


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        (
            GAINS[0],
            "better than the untouched model under `linear`: +5.1 points of mIoU, 95 % interval [+3.1, +7.1]; "
            "random adapters of the same strength: +0.4, so +4.7 [+2.7, +6.7] against them.",
        ),
        (
            GAINS[1],
            "not distinguishable from the untouched model under `linear`: +0.6 points of mIoU, 95 % interval "
            "[-1.4, +2.6]; random adapters of the same strength: +0.4. About 410 images would be needed to tell.",
        ),
        (
            GAINS[2],
            "worse than the untouched model under `linear`: -4.3 points of mIoU, 95 % interval [-6.3, -2.3]; "
            "random adapters of the same strength: -0.2, so -4.1 [-6.1, -2.1] against them.",
        ),
        (
            GAINS[3],
            "above the untouched model, but not distinguishable from random adapters, under `linear`: +3.4 points of "
            "mIoU, 95 % interval [+1.4, +5.4]; random adapters of the same strength: +3.3, so +0.1 [-1.9, +2.1] "
            "against them.",
        ),
    ],
)
def test_the_answer_in_words(gains: tuple[str, float, float], sentence: str) -> None:
    assert answers(compared([gains]))[0].sentence.replace(MINUS, "-") == sentence


@pytest.mark.parametrize(
    ("needed", "text"),
    [
        (Needed(1234, 7), "About 1,200 images or 7 seeds would be needed to tell."),
        (Needed(None, 12), "About 12 seeds would be needed to tell."),
        (Needed(None, None), "Neither more images nor more seeds alone would tell."),
        (None, "+0.4."),
    ],
)
def test_what_would_tell(needed: Needed | None, text: str) -> None:
    result = compared(GAINS[1:2])
    probe = result.data[0].probes[0]
    found = {"same": replace(probe.findings["same"], needed=needed)}
    data = replace(result.data[0], probes=[replace(probe, findings=found)])
    assert answers(replace(result, data=[data]))[0].sentence.endswith(text)


def test_probes_that_disagree_are_said_to() -> None:
    result = compared(GAINS[:1], probes=("knn", "whitened knn"))
    unsure = replace(result, rows=[replace(result.rows[0], verdict=SAME)])
    answer = answers(unsure)[0]
    assert answer.verdict == SAME
    assert answer.sentence.startswith("not distinguishable, as the probes disagree; better under `whitened knn`: +5.1")
    assert f"Other probes on dubai: `knn` +5.1 [+3.1, +7.1], {BETTER}." in answer.notes


def test_a_collapsed_model_is_called_that_first_and_in_red(tmp_path: Path) -> None:
    result = collapsed(compared(GAINS))
    page = page_of(result, tmp_path)
    assert answers(result)[0].verdict == "collapsed"
    assert "good: collapsed: RankMe fell from 104 to 8. Do not use it, whatever its score; " in " ".join(
        page.text.split()
    )
    assert page.all("ul")[0]["class"] == "answers" and page.all("li")[0]["class"] == "collapsed"
    assert [row["class"] for row in page.all("tr") if "class" in row].count("collapsed") == 1
    assert summary(result).startswith("good: collapsed: RankMe fell from 104 to 8.")


def test_what_is_not_there_is_not_on_the_page(tmp_path: Path) -> None:
    parts = ("What was forgotten", "Is it the domain?", "Price", "Groups of images", "Training", "against each other")
    assert not any(part in page_of(CASES["one"](), tmp_path / "a").text for part in parts)
    found = page_of(CASES["four"](), tmp_path / "b").text
    assert all(part in found for part in parts if part != "Training")


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    result = compared([(HOSTILE, 0.01, 0.01)], classes=[HOSTILE, "_x_"], others=[HOSTILE + "2"], groups=2)
    result = replace(result, command="glare compare --x '<script>alert(1)</script>'")
    page = page_of(result, tmp_path, pictures())
    assert not page.all("b") and not page.all("script")
    assert page.text.count(HOSTILE) > 5
    assert any(HOSTILE in (image["alt"] or "") for image in page.all("img"))
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert not any(re.search(r"(?<!\\)<", line) for line in lines)
    for line in (line for line in lines if line.startswith("|")):
        assert line.endswith("|") and len(re.findall(r"(?<!\\)\|", line)) in (5, 7, 8)


def test_the_json_has_the_numbers(tmp_path: Path) -> None:
    result = CASES["four"]()
    unknown = replace(result.rows[0], reason="x")
    health = {**result.data[0].health, "good": Health(math.nan, 0.5, math.inf)}
    result = replace(result, rows=[unknown], data=[replace(result.data[0], health=health)])
    write_report(tmp_path, result, [], {})
    read = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert read["data"][0]["health"]["good"] == {"rankme": None, "std": 0.5, "cosine": None}
    assert read["data"][0]["probes"] == json.loads(json.dumps(result.to_dict()["data"][0]["probes"]))
    assert read["rows"] == [result.to_dict()["rows"][0]] and read["prices"] == result.to_dict()["prices"]


def test_the_summary_fits_the_terminal(written: tuple[Comparison, Path]) -> None:
    result, _ = written
    text = summary(result)
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii()
    assert text.startswith(result.rows[0].name.split()[0])


def test_the_tables_of_the_summary() -> None:
    lines = summary(compared(GAINS[:1], others=["camvid"], runs=2, price=PRICE)).splitlines()
    words = [" ".join(line.split()) for line in lines]
    assert "untouched 40.0 100 0.57 0.90" in words
    assert "good 45.1 +5.1 [+3.1, +7.1] +4.7 [+2.7, +6.7] 100 0.57 0.90" in words
    assert "random adapters like it (1) 40.4 +0.4 100 0.57 0.90" in words
    assert "good camvid 40.0 45.1 +5.1 [+3.1, +7.1] better" in words
    first = next(place for place, line in enumerate(lines) if line.startswith("  model"))
    assert len({len(line) for line in lines[first : first + 4]}) == 1, "columns are aligned"
    assert lines[-2].startswith("good_1: 1.3 MB stored, 304,128 parameters trained, adapted in 2.2 min on cpu, 1.3 GB")


def test_ranges_of_several_runs_show_the_outlier() -> None:
    result = compared(GAINS[:1], runs=3)
    health = {**result.data[0].health, "good_1": Health(8.0, 0.04, 0.01)}
    text = summary(replace(result, data=[replace(result.data[0], health=health)]))
    assert "8-100  0.04-0.57  0.01-0.90" in text


def test_of_many_classes_the_largest_changes_are_drawn(tmp_path: Path) -> None:
    result = replace(many(), rows=many().rows[:1])
    text = " ".join(page_of(result, tmp_path).text.split())
    assert "The 20 of 149 classes with the largest changes in either direction." in text
    assert "The 20 of 30 groups with the largest changes" in text
    changes = result.data[0].probes[-1].findings[result.rows[0].name].classes
    largest, change = max(((n, e) for n, e in changes.items() if e), key=lambda item: abs(item[1].value))
    drawn = text[text.index("Classes, dubai under linear") : text.index("All classes in numbers")]
    assert f"{largest}{interval(change)}" in drawn
    assert drawn.count("class ") == 20


def test_pictures_are_on_the_page_as_they_are(tmp_path: Path) -> None:
    page = page_of(CASES["one"](), tmp_path, pictures())
    sources = [image["src"] or "" for image in page.all("img")]
    assert [source.split(";")[0] for source in sources] == ["data:image/jpeg", "data:image/png", "data:image/png"]
    photo, flat, _ = (Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources)
    assert photo.size == (1500, 265) and flat.getpixel((5, 5)) == (10, 20, 30)
    assert page.all("img")[0]["width"] == "1500"
    headings = [page.text.index(heading) for heading in ("Where it gained", "Where it lost", "Attention")]
    assert headings == sorted(headings)


def test_many_pictures_are_scaled_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURE_BYTES", 60_000)
    page = page_of(CASES["one"](), tmp_path, pictures())
    sizes = [len(base64.b64decode((image["src"] or "").split(",")[1])) for image in page.all("img")]
    assert len(sizes) == 3 and 20_000 < sum(sizes) <= 60_000


def test_curves_of_runs(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss_glob": 3.0, "grad_norm": 1.0}\n{"step": 2, "loss_glob": 2.0, "grad_norm": 1.5}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    path = write_report(tmp_path / "out", CASES["one"](), [], {HOSTILE: log, "nothing": empty})
    page = Page(path.read_text(encoding="utf-8"))
    assert len([svg for svg in page.all("svg") if svg.get("class") == "chart"]) == 2
    assert "Loss, global" in page.text and HOSTILE in page.text and "nothing" not in page.text


def test_numbers() -> None:
    assert [points(v) for v in (0.0061, -0.0123, 0.0, 0.0001, -0.0001, None, math.nan)] == [
        "+0.6",
        f"{MINUS}1.2",
        "0.0",
        "+0.0",
        f"{MINUS}0.0",
        UNKNOWN,
        UNKNOWN,
    ]
    assert [score(v) for v in (0.4261, None, math.nan)] == ["42.6", UNKNOWN, UNKNOWN]
    assert [size(v) for v in (12, 1500, 1_254_400, 2_500_000_000, None)] == [
        "12 B",
        "1.5 kB",
        "1.3 MB",
        "2.5 GB",
        UNKNOWN,
    ]
    assert [duration(v) for v in (45.2, 132.0, 7300.0, None)] == ["45 s", "2.2 min", "2.0 h", UNKNOWN]
    assert [sure(v) for v in (0.95, 0.975, 1 - 0.05 / 3)] == ["95 %", "97.5 %", "98.3 %"]
    assert price_text(Price(None, None, None, None, None, None)) == "not known"


def test_markdown_and_plain_tables() -> None:
    table = Table("a|b", ["x", "y"], [Line(["p|q", "1"]), Line(["snake_case and _under_", "22"])])
    assert markdown(table).splitlines() == [
        r"a\|b",
        "",
        "| x | y |",
        "| --- | ---: |",
        r"| p\|q | 1 |",
        r"| snake_case and \_under\_ | 22 |",
    ]
    assert plain(table).splitlines()[2] == "  p|q                      1"
    assert escape("[a](b) <c>\n*d*") == r"[a\](b) \<c\> \*d\*"
    assert shorten("abcdefghij", 7) == "ab...ij" and shorten("abc", 7) == "abc"


def test_test_images_that_repeat_each_other_are_said_to_narrow_the_intervals(tmp_path: Path) -> None:
    result = compared(GAINS)
    film = replace(result, data=[replace(result.data[0], repeats=40), *result.data[1:]])
    assert "repeat another one" not in page_of(result, tmp_path / "a").text
    text = page_of(film, tmp_path / "b").text
    assert text.count("40 of the test images repeat another one") >= 2
