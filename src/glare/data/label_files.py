"""The values in a label's file, whatever its depth: one channel, the size of its image."""

from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

from glare.data.notices import say_once
from glare.data.opening import open_picture, reason_of
from glare.data.tiff_header import nodata_of
from glare.paths import printable

GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow spreads grey PNGs and TIFFs of 2 and 4 bits to 0..255 by these factors."""
LOSSY = ("JPEG", "MPO", "PPM", "WEBP", "jpeg", "tiff_jpeg", "webp")
"""Formats, and compressions of TIFFs, of which Pillow may give other values than were written."""
_ONE_AT_A_TIME = Lock()


def read_indices(file: Path | BytesIO, name: str, size: tuple[int, int]) -> NDArray[np.int64]:
    """The values of a picture of one channel and this size; of a palette picture, the indices."""
    return _read(file, name, size)[0].astype(np.int64)


def read_classes(file: Path, size: tuple[int, int], *, num_classes: int, ignore: int) -> NDArray[np.int64]:
    """As ``read_indices``, with ``ignore`` where a TIFF has its nodata value, if that ``means_nothing``."""
    values, nodata = _read(file, printable(str(file)), size)
    return _without_nodata(values, nodata, file, num_classes=num_classes, ignore=ignore)


class LastLabel:
    """Reads parts of labels one at a time, whichever thread asks; the last label stays decoded for its next part.

    It is held in the type it has, at most 4 bytes a pixel.
    """

    def __init__(self) -> None:
        self._file: tuple[Any, ...] = ()
        self._label: tuple[NDArray[Any], float | None] | None = None

    def read_classes(
        self, file: Path, size: tuple[int, int], part: tuple[slice, slice], *, num_classes: int, ignore: int
    ) -> NDArray[np.int64]:
        """As the function of this name for the label of a picture of ``size``, of which rows and columns ``part``."""
        with _ONE_AT_A_TIME:
            state = file.stat() if file.is_file() else None
            asked = (file, size, state and (state.st_mtime_ns, state.st_size))
            if self._label is None or asked != self._file:
                self._label = None  # before the next one takes memory
                self._label, self._file = _read(file, printable(str(file)), size), asked
            values, nodata = self._label
        return _without_nodata(values[part], nodata, file, num_classes=num_classes, ignore=ignore)


def _without_nodata(
    values: NDArray[Any], nodata: float | None, file: Path, *, num_classes: int, ignore: int
) -> NDArray[np.int64]:
    """Values as whole numbers of 64 bits, with ``ignore`` for those that a TIFF says are no data."""
    classes = values.astype(np.int64)
    if nodata is not None and means_nothing(nodata, file, num_classes=num_classes, ignore=ignore):
        classes[values == nodata] = ignore
    return classes


def _read(file: Path | BytesIO, name: str, size: tuple[int, int]) -> tuple[NDArray[Any], float | None]:
    """The values in the type that they have in the file, and which of them a TIFF says is no data."""
    if isinstance(file, Path) and not file.is_file():
        raise ValueError(f"it has no label {name}; add that file or remove the image")
    try:
        label = open_picture(file)
    except Exception as error:  # Pillow's readers let almost any exception out on a broken file
        raise _unreadable(name, error) from error
    with label:
        coding = label.info.get("compression") if label.format == "TIFF" else label.format
        if coding in LOSSY:
            raise ValueError(
                f"its label {name} is {coding} inside, which may change the indices of classes; write it as PNG "
                "from what it was made of"
            )
        if len(label.getbands()) > 1 or label.mode == "F":
            raise ValueError(
                f"its label {name} is a colour picture (mode {label.mode}); "
                "write a PNG with one channel that holds the class index of every pixel"
            )
        if label.size != size:  # known before it is decoded
            raise ValueError(
                f"its label {name} has {label.width} x {label.height} px, the image {size[0]} x {size[1]}; "
                "give them the same size"
            )
        try:
            step = _grey_step(label)
            nodata = nodata_of(label)
            values = np.asarray(label, np.uint8 if label.mode == "1" else None)
        except Exception as error:
            raise _unreadable(name, error) from error
    return values // step if step > 1 else values, nodata


def _grey_step(label: ImageFile.ImageFile) -> int:
    """The factor by which Pillow spreads the values of a label that is not decoded yet."""
    args = label.tile[0].args if label.tile else None
    raw = args[0] if isinstance(args, tuple) and args else args  # a TIFF's are more than one
    return GREY_STEPS.get(str(raw)[:3], 1)  # with more letters where bits are in another order, or white is 0


def means_nothing(nodata: float, file: Path, *, num_classes: int, ignore: int) -> bool:
    """Whether the nodata value of a label's file is no index of a class; what is one is said once for its folder."""
    if nodata == ignore or nodata not in range(num_classes):
        return True
    say_once(
        f"{printable(str(file.parent))}: the nodata value {int(nodata)} of labels is the index of a class, whose "
        "pixels they count as; only the ignore_index of classes.json is ignored"
    )
    return False


def _unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(f"its label {name} cannot be read ({reason_of(error)}); write it again as PNG")
