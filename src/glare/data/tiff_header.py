"""What the header of a TIFF says of how it is best read, as far as Pillow finds it there; no pixel is decoded."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from glare.data.opening import open_picture
from glare.paths import kind_of

SUFFIXES = (".tif", ".tiff")
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, ORIENTATION, SAMPLES, SAMPLE_FORMAT, GDAL_NODATA = 258, 262, 274, 277, 339, 42113
PLACE = (33550, 33922, 34264)  # scale, tie points and transform of GeoTIFF
PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "RGBX", "YCbCr", "I", "F")  # grey and colours without a palette
WITH_ALPHA = ("RGBA", "RGBa")
WHITE_IS_ZERO, UPRIGHT, SIGNED = 0, 1, 2


@dataclass(frozen=True)
class TiffHeader:
    """Of a TIFF.

    ``whole``: Pillow reads it, and all of its bands. ``plain``: GDAL gives the same pixels, since they are grey or
    colours and neither inverted nor turned. ``values``: they are of more than 8 bits or signed, or some have no data.
    ``placed``: it says where it lies. ``alpha``: it may have a fourth band that is declared as alpha.
    """

    whole: bool
    plain: bool = True
    values: bool = False
    placed: bool = False
    alpha: bool = True


def header_of(file: Path) -> TiffHeader | None:
    """The header of a file that is a TIFF by name and content, None of others."""
    if file.suffix.lower() not in SUFFIXES or not _is_tiff(file):
        return None
    try:
        with open_picture(file) as picture:
            return header_in(picture)
    except MemoryError:
        raise
    except Exception:  # Pillow's readers let almost any exception out on what they cannot read
        return TiffHeader(whole=False)


def nodata_of(picture: Image.Image) -> float | None:
    """The value of a picture's pixels without data, as GDAL notes it; None where there is no such number."""
    noted = getattr(picture, "tag_v2", {}).get(GDAL_NODATA)
    try:
        return None if noted is None else float(str(noted).strip("\0 "))
    except ValueError:
        return None


def header_in(picture: Image.Image) -> TiffHeader:
    """The header of an opened TIFF."""
    try:
        return _header(picture)
    except (TypeError, ValueError):  # a tag of another type
        return TiffHeader(whole=False)


def _header(picture: Image.Image) -> TiffHeader:
    tags = getattr(picture, "tag_v2", {})
    mode = picture.mode
    bits = tags.get(BITS, (1,))
    straight = tags.get(PHOTOMETRIC) != WHITE_IS_ZERO and tags.get(ORIENTATION, UPRIGHT) == UPRIGHT
    return TiffHeader(
        whole=not len(picture.getbands()) == 1 < tags.get(SAMPLES, 1),
        plain=straight and min(bits) >= 8 and mode.partition(";")[0] in PLAIN_MODES,
        values=max(bits) > 8 or SIGNED in tags.get(SAMPLE_FORMAT, ()) or nodata_of(picture) is not None,
        placed=any(tag in tags for tag in PLACE),
        alpha=mode in WITH_ALPHA,
    )


def _is_tiff(file: Path) -> bool:
    if kind_of(file) != "file":
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(4) in MAGIC
    except OSError:
        return False
