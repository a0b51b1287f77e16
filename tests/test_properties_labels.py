"""Properties of reading label maps: values, depths, palettes, colours and sizes, drawn by hypothesis."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from glare.data.labelled import LabelledSet, open_labelled
from glare.data.sources import BadImage
from glare.errors import UserError

IGNORE = st.sampled_from([0, 2, 7, 254, 255, 256, 4000, -1])
VALUES = st.one_of(st.integers(0, 6), st.sampled_from([253, 254, 255]), st.sampled_from([256, 4000, 65535]))


def opened(folder: Path, label: bytes, classes: object, *, size: tuple[int, int] = (4, 3)) -> LabelledSet:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    Image.new("RGB", size).save(folder / "images" / "a.png")
    (folder / "labels" / "a.png").write_bytes(label)
    (folder / "classes.json").write_text(json.dumps(classes))
    return open_labelled(str(folder))


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def by_a_loop(values: NDArray[Any], count: int, ignore: int) -> NDArray[Any] | None:
    """Class indices with 255 for what is ignored; None where a value is neither."""
    found = np.zeros(values.shape, np.uint8)
    for place, value in np.ndenumerate(values):
        if value != ignore and value >= count:
            return None
        found[place] = 255 if value == ignore else value
    return found


@given(st.lists(VALUES, min_size=12, max_size=12), st.integers(1, 5), IGNORE, st.sampled_from(["L", "P", "I;16"]))
def test_labels_are_read_by_value_or_refused_by_value(values: list[int], count: int, ignore: int, mode: str) -> None:
    deep = np.array(values).reshape(3, 4)
    array = deep.astype(np.uint16 if mode == "I;16" else np.uint8)
    picture = Image.fromarray(array)
    if mode == "P":
        picture.putpalette(bytes(range(256)) * 3)
    expected = by_a_loop(array, count, ignore)
    classes = {"classes": [f"class {i}" for i in range(count)], "ignore_index": ignore}
    with tempfile.TemporaryDirectory() as folder:
        found = opened(Path(folder), png(picture), classes)
        if expected is None:
            with pytest.raises(
                BadImage, match=rf"has the values .* allowed are 0 to {count - 1} and {ignore} to ignore"
            ):
                found.read(0)
        else:
            assert np.array_equal(found.read(0)[1], expected)


@given(st.sampled_from(["RGB", "RGBA", "LA"]), st.integers(1, 6), st.integers(1, 6))
def test_colours_and_other_sizes_are_refused_with_what_was_found(mode: str, width: int, height: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = opened(Path(folder), png(Image.new(mode, (width, height))), {"classes": ["a"]}, size=(3, 2))
        with pytest.raises(BadImage, match=rf"a\.png is a colour picture \(mode {mode}\)"):
            found.read(0)
        (Path(folder) / "labels" / "a.png").write_bytes(png(Image.new("L", (width, height))))
        if (width, height) == (3, 2):
            assert found.read(0)[1].tolist() == [[0] * 3] * 2
        else:
            with pytest.raises(BadImage, match=f"has {width} x {height} px, the image 3 x 2; give them the same size"):
                found.read(0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, JSON, JSON)
def test_any_classes_json_gives_classes_or_one_sentence(classes: Any, ignore: Any, palette: Any) -> None:
    content = {"classes": classes, "ignore_index": ignore, "palette": palette}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = opened(Path(folder), png(Image.new("L", (4, 3))), content)
        except UserError as error:
            assert "classes.json" in str(error) and "\n" not in str(error)
        else:
            assert found.classes == classes and found.palette.shape == (len(classes), 3)


def test_a_label_larger_than_its_image_is_not_decoded(tmp_path: Path) -> None:
    huge = Image.new("1", (13_000, 13_000))
    found = opened(tmp_path, png(huge)[:2000], {"classes": ["a"]})  # cut: to decode it would fail otherwise
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadImage, match=r"13000 x 13000 px, the image 4"):
        found.read(0)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\ud800", " ", ""])
def test_class_names_that_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give names without control characters"):
        opened(tmp_path, b"", {"classes": ["ok", name]})


def test_class_names_of_any_letters_are_kept(tmp_path: Path) -> None:
    names = ['with "quotes" and spaces', "道路", "रास्ता", "می‌خواهم", "<b>"]
    assert opened(tmp_path, b"", {"classes": names}).classes == names
