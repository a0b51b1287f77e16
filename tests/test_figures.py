import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glare import UserError
from glare.figures import (
    IGNORED,
    LINES,
    annotated,
    colourise,
    legend,
    loss_curves,
    overlay,
    panel,
    read_losses,
    smooth,
    ticks,
)

PALETTE = [(200, 10, 20), (10, 220, 30), (20, 30, 240)]
NAMES = ["building", "road", "water"]


def colours_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}


def label() -> np.ndarray:
    made = np.zeros((40, 60), dtype=np.uint8)
    made[:, 30:] = 1
    made[30:, :10] = 255
    return made


def test_classes_have_their_colours_and_the_rest_is_grey() -> None:
    picture = colourise(label(), PALETTE)
    assert picture.size == (60, 40)
    assert picture.getpixel((15, 5)) == PALETTE[0] and picture.getpixel((45, 5)) == PALETTE[1]
    assert picture.getpixel((5, 35)) == IGNORED


def test_an_overlay_blends_and_outlines_and_leaves_the_unlabelled_alone() -> None:
    image = Image.new("RGB", (60, 40), (100, 100, 100))
    blended = overlay(image, label(), PALETTE, alpha=0.5)
    assert blended.getpixel((15, 5)) == (150, 55, 60)
    assert blended.getpixel((5, 36)) == (100, 100, 100)
    assert blended.getpixel((29, 5)) == (190, 19, 28)  # an outline, in nine tenths of its colour
    solid = np.asarray(overlay(image, label(), PALETTE, alpha=1.0))
    known = label() != 255
    assert np.array_equal(solid[known], np.asarray(colourise(label(), PALETTE))[known])


def test_an_annotated_overlay_names_the_classes_found_with_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[str, tuple[int, int, int]] = {}

    def record(given: dict[str, tuple[int, int, int]], *, width: int, size: int) -> Image.Image:
        entries.update(given)
        return legend(given, width=width, size=size)

    monkeypatch.setattr("glare.figures.legend", record)
    picture = annotated(Image.new("RGB", (60, 40)), label(), NAMES, PALETTE)
    assert list(entries) == ["road 50%", "building 46%"]
    assert entries["road 50%"] == PALETTE[1]
    assert picture.height > 40 and picture.width >= 60
    assert {PALETTE[0], PALETTE[1]} <= colours_in(picture.crop((0, 40, *picture.size)))


def test_a_legend_breaks_lines_and_stays_within_its_width() -> None:
    entries = dict(zip([f"a class number {i}" for i in range(9)], PALETTE * 3, strict=True))
    narrow, wide = legend(entries, width=200), legend(entries, width=2000)
    assert narrow.width == 200 and wide.width == 2000 and narrow.height > 3 * wide.height
    for strip in (narrow, wide):
        pixels = np.asarray(strip)
        assert (pixels[:, -4:] == 255).all() and set(PALETTE) <= colours_in(strip)


def test_a_panel_holds_every_picture_in_its_cell() -> None:
    shades = [[(10 * (3 * row + column) + 5,) * 3 for column in range(3)] for row in range(2)]
    rows = [[Image.new("RGB", (30, 20), shade) for shade in line] for line in shades]
    made = panel(
        rows,
        columns=["image", "truth", "a prediction with a long name"],
        scores=["", "", "mIoU 41.3"],
        row_names=["first", "a scene whose name is much too long for its row"],
        legend_entries=dict(zip(NAMES, PALETTE, strict=True)),
        cell=90,
    )
    pixels = np.asarray(made)
    boxes = []
    for shade in [shade for line in shades for shade in line]:
        y, x = np.nonzero((pixels == shade).all(axis=-1))
        boxes.append((x.min(), y.min()))
        assert len(x) >= 88 * 58  # all of the cell but its frame
    columns, lines = sorted({x for x, _ in boxes}), sorted({y for _, y in boxes})
    assert len(columns) == 3 and len(lines) == 2
    assert columns[1] - columns[0] == columns[2] - columns[1] >= 90 and lines[1] - lines[0] >= 60
    assert set(PALETTE) <= colours_in(made)
    plain = panel(rows, columns=["a", "b", "c"], cell=90)
    assert plain.height < made.height and plain.width < made.width


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_are_the_terms_of_the_loss_or_the_loss(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"step": 10, "loss": 3.0, "loss_glob": 2.0, "loss_reg": 1.0, "learning_rate": 0.1},
        {"step": 20, "loss": None, "loss_glob": None, "loss_reg": 0.5},
        {"step": 20, "miou": 0.4},
    ]
    terms = read_losses(write(tmp_path / "a.jsonl", lines))
    assert terms == {"loss_glob": [(10, 2.0)], "loss_reg": [(10, 1.0), (20, 0.5)]}
    assert read_losses(write(tmp_path / "b.jsonl", [{"step": 1, "loss": 2}])) == {"loss": [(1, 2.0)]}


@pytest.mark.parametrize("count", [1, 2, 300])
def test_loss_curves_are_drawn_in_their_colours(tmp_path: Path, count: int) -> None:
    lines: list[dict[str, object]] = [
        {"step": i + 1, "loss_a": 2.0 / (i + 1), "loss_b": 1.0 + 1e9 * (i == 5)} for i in range(count)
    ]
    picture = loss_curves(write(tmp_path / "m.jsonl", lines), size=(600, 300))
    assert picture.size == (600, 300)
    drawn = np.asarray(picture)[46:]  # below the legend
    for colour in LINES[:2]:
        assert (np.abs(drawn.astype(int) - colour).sum(axis=-1) < 120).sum() > 10
    assert not (np.abs(drawn.astype(int) - LINES[2]).sum(axis=-1) < 30).any()


def test_a_log_without_losses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m\.jsonl has no losses to draw; give the metrics\.jsonl of a run"):
        loss_curves(write(tmp_path / "m.jsonl", [{"step": 1, "miou": 0.5}]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7.3), (0, 1500), (-0.2, 0.4), (0, 1e-5), (3, 3)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9 and 2 <= len(marks) <= 9
    assert float(f"{step:.2g}") == pytest.approx(step)
    assert np.allclose(np.diff(marks), step)


def test_smoothing_keeps_constants_and_lines_in_the_middle() -> None:
    flat = [(float(i), 2.0) for i in range(100)]
    assert smooth(flat) == flat
    slope = [(float(i), float(i)) for i in range(100)]
    assert smooth(slope)[50] == (50.0, 50.0) and smooth(slope)[0] == (0.0, 2.0)
