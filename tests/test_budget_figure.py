"""The picture of scores against label budgets."""

import numpy as np
import pytest
from PIL import Image

from glare.budget_figure import budget_curves
from glare.errors import UserError
from glare.figures import LINES


def drawn(picture: Image.Image, colour: tuple[int, int, int], *, below: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of this colour, without those of the legend."""
    near = np.abs(np.asarray(picture).astype(int) - colour).sum(axis=-1) < 12
    rows, columns = np.nonzero(near)
    return rows[rows > below], columns[rows > below]


def test_a_line_goes_through_the_means_from_the_first_to_the_last_budget() -> None:
    picture = budget_curves({"none": {250: [10.0, 20.0], 1000: [40.0, 40.0]}, "ours": {250: [40.0]}}, label="mIoU, %")
    assert picture.size == (900, 480)
    rows, columns = drawn(picture, LINES[0])
    left, right = columns.min(), columns.max()
    assert rows[columns < left + 6].mean() > rows[columns > right - 6].mean() + 100  # 15 lies below 40
    middle = rows[np.abs(columns - (left + right) // 2) <= 1].mean()
    assert middle == pytest.approx((rows[columns < left + 6].mean() + rows[columns > right - 6].mean()) / 2, abs=8)
    ours_rows, ours_columns = drawn(picture, LINES[1])
    assert abs(ours_columns.mean() - left) < 8  # a dot above the first budget
    assert abs(ours_rows.mean() - rows[columns > right - 6].mean()) < 4  # at the height of the other 40


def test_budgets_are_as_far_apart_as_their_logarithms() -> None:
    scores = {name: {budget: [50.0]} for name, budget in (("a", 250), ("b", 1000), ("c", 4000))}
    places = [drawn(budget_curves(scores, label="x"), LINES[number])[1].mean() for number in range(3)]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=1)


def test_one_budget_is_a_dot_and_no_score_an_error() -> None:
    rows, _ = drawn(budget_curves({"none": {8: [50.0]}}, label="mIoU, %"), LINES[0])
    assert 20 < len(rows) < 120
    with pytest.raises(UserError, match="there are no scores to draw; give at least one budget and seed"):
        budget_curves({"none": {}}, label="mIoU, %")


def test_the_studys_seven_starts_have_seven_colours_and_their_names_cover_nothing() -> None:
    starts = ["none", *(f"{size}{step}" for size in ("45k", "100k", "200k") for step in ("", ", then classes"))]
    scores = {start: {250: [10.0 * number], 1000: [50.0]} for number, start in enumerate(starts)}
    few, many = (budget_curves({name: scores[name] for name in names}, label="mIoU, %") for names in (["none"], starts))
    assert all(len(drawn(many, colour, below=100)[0]) for colour in LINES[:7]) and len(set(LINES)) == len(LINES) > 6

    def label(picture: Image.Image) -> np.ndarray:
        """The name of the axis as far as the first swatch, without the white above and below."""
        dark = np.asarray(picture.convert("L"))[:100, :56] < 60  # not the numbers beside it
        return dark[dark.any(axis=1)]

    np.testing.assert_array_equal(label(many), label(few))


def test_more_starts_than_colours_have_darker_ones() -> None:
    names = [str(number) for number in range(len(LINES) + 1)]
    picture = budget_curves({name: {250: [float(name)], 500: [50.0]} for name in names}, label="x")
    assert len(drawn(picture, tuple(value // 2 for value in LINES[0]), below=100)[0])
