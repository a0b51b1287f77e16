"""Properties of reading pictures: every mode, depth, size and orientation, and damaged bytes, drawn by hypothesis."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
from fuzz_targets import KINDS, encoded
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image, ImageOps

from glare.data.opening import open_picture
from glare.data.sources import DEPTH_LIMITS, BadImage, Images, fit, to_rgb8

SIDES = st.integers(1, 40)
LOSSLESS = {"png": ("1", "L", "P", "RGB"), "tiff": ("1", "L", "P", "RGB", "CMYK"), "bmp": ("1", "L", "P", "RGB"),
            "ppm": ("L", "RGB"), "jpeg2000": ("L", "RGB")}  # fmt: skip
VALID = {kind: encoded(kind) for kind in set(KINDS.values())}


def source(data: bytes) -> Images:
    return Images(["it"], lambda _: open_picture(io.BytesIO(data)))


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A file of an opaque 8-bit picture, with an orientation where the format has one."""
    kind = draw(st.sampled_from(sorted(LOSSLESS)))
    width, height = draw(SIDES), draw(SIDES)
    noise = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise).convert(draw(st.sampled_from(LOSSLESS[kind])))
    options: dict[str, Any] = {}
    if kind in ("png", "tiff"):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))
        options["exif"] = exif.tobytes()
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@given(pictures(), st.one_of(st.none(), st.integers(1, 50)))
def test_a_picture_is_upright_rgb_of_the_size_asked_for(data: bytes, short_side: int | None) -> None:
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = source(data).read(0)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))
    reduced = source(data).read(0, short_side=short_side)
    assert reduced.size in (fit(expected.size, short_side), fit(expected.size[::-1], short_side)[::-1])
    assert min(reduced.size) == min(min(expected.size), short_side or 99)


def by_the_rules(value: float, values: list[float], *, whole: bool) -> int:
    """One value in 8 bits, as the docstring of ``to_rgb8`` says it."""
    finite = [v for v in values if np.isfinite(v)]
    if not np.isfinite(value) or not finite:
        return 0
    limits = DEPTH_LIMITS if whole else (1, *DEPTH_LIMITS)
    if min(finite) >= 0:
        for limit in limits:
            if max(finite) <= limit:
                return int(np.rint(value / limit * 255))
    span = max(finite) - min(finite)
    return int(np.rint((value - min(finite)) / span * 255)) if span else 0


GREYS = st.one_of(
    arrays.arrays(np.uint16, (2, 3)),
    arrays.arrays(np.int32, (2, 3)),
    arrays.arrays(np.float32, (3, 2), elements=st.floats(width=32)),
    arrays.arrays(np.float32, (3, 2), elements=st.floats(-2, 300, width=32)),
)


@given(GREYS)
def test_deep_grey_pictures_follow_the_rules(values: NDArray[Any]) -> None:
    found = np.asarray(to_rgb8(Image.fromarray(values)))
    whole = values.dtype.kind != "f"
    flat = [float(value) for value in values.ravel()]
    expected = np.array([by_the_rules(value, flat, whole=whole) for value in flat]).reshape(values.shape)
    assert np.array_equal(found, expected[..., None].repeat(3, axis=-1))


@given(st.sampled_from(sorted(VALID)), st.data())
def test_damaged_bytes_are_a_picture_or_a_bad_image_with_a_reason(kind: str, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(VALID[kind])))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = source(bytes(content[:cut])).read(0, short_side=8)
        except BadImage as bad:
            assert bad.name == "it" and bad.reason.strip() and "\n" not in bad.reason
        else:
            assert image.mode == "RGB" and min(image.size) >= 1


@given(st.binary(max_size=200))
@example(b"")
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
def test_bytes_of_anything_are_a_bad_image(content: bytes) -> None:
    with pytest.raises(BadImage, match="not an image, or of a format"):
        source(content).read(0)
