"""Opening a picture that nobody vouches for: of known formats alone, of a bounded size, and never a pipe or device."""

from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

from glare.errors import first_line
from glare.paths import kind_of

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS, where Pillow refuses, too; 13,377 px square
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Pillow's readers of these formats; others would run other programs (EPS) or are of no use here."""


def open_picture(file: Path | BytesIO) -> ImageFile.ImageFile:
    """A picture whose header is read and whose pixels are not.

    Raises ValueError for what is no regular file, OSError for what cannot be opened or is of another format,
    DecompressionBombError for more than ``MAX_PIXELS``, and whatever else Pillow lets out on a broken file.
    """
    if isinstance(file, Path) and kind_of(file) in ("folder", "other"):
        raise ValueError("it is no regular file but a folder, a pipe or a device; remove it")
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:  # where somebody has switched Pillow's own limit off
        pixels = image.width * image.height
        image.close()
        raise Image.DecompressionBombError(f"Image size ({pixels} pixels) exceeds limit of {MAX_PIXELS} pixels")
    return image


def reason_of(error: Exception) -> str:
    """Why a picture cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that Pillow cannot read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"{first_line(error).partition(',')[0]}. Cut it into tiles"
    return first_line(error)
