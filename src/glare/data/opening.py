"""Opening what nobody vouches for: pictures of known formats and a bounded size alone, archives that unpack to one."""

import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO

from datasets.filesystems import EXTENSION_TO_COMPRESSION_FS_FILE_CLS as UNPACKERS
from PIL import Image, ImageFile, UnidentifiedImageError

from glare.errors import first_line, shortened
from glare.paths import kind_of

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS, where Pillow refuses, too; 13,377 px square
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Pillow's readers of these formats; others would run other programs (EPS) or are of no use here."""

MAX_GROWTH = 2**30  # bytes: a picture of MAX_PIXELS has half as many, in 8-bit RGB
ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
"""How a zip file may begin."""

PIECE = 2**20  # bytes that are unpacked at once


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


def is_zip(file: Path) -> bool:
    """Whether `datasets` takes a file for a zip file: by how it begins, or how it is called."""
    with file.open("rb") as opened:
        return opened.read(len(ZIP[0])) in ZIP or file.suffix.lower() == ".zip"


def check_archive(file: Path) -> None:
    """Raise ValueError where a tar, zip or compressed file unpacks to over ``MAX_GROWTH`` bytes more than it has.

    `datasets` unpacks a member that is compressed, or has holes, whole into memory, whatever its size, and what is
    compressed as a whole onto the disk. Raises TarError, BadZipFile, OSError, or what the unpackers let out, for a
    damaged file.
    """
    with file.open("rb") as opened:  # a compressed file of zeros is an empty tar file, too
        _check_growth(file, [(file.name, 0, opened)])
    _check_growth(file, _members(file))


def _check_growth(file: Path, parts: Iterable[tuple[str, int, IO[bytes]]]) -> None:
    """Raise ValueError where ``parts`` of a file, each with name, size and content, unpack to too much together."""
    left = file.stat().st_size + MAX_GROWTH
    for part in parts:
        for size in _sizes(*part):
            left -= size
            if left < 0:
                raise ValueError(
                    f"up to its member {shortened(part[0])!r} {file.name} unpacks to more than "
                    f"{MAX_GROWTH / 2**30:g} GiB beyond its own size; leave that out, or unpack it yourself"
                )


def _members(file: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each file in a tar or zip file; none of any other file."""
    if is_zip(file):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    # others are unpacked beyond the size that the entry says
                    name = shortened(entry.filename)
                    raise ValueError(f"its member {name!r} is not deflated; write {file.name} anew")
                with archive.open(entry) as content:
                    yield entry.filename, entry.file_size, content
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                part = tar.extractfile(member)
                assert part is not None, "of a regular file"
                yield member.name, member.size, part


def _sizes(name: str, size: int, content: IO[bytes]) -> Iterator[int]:
    """Bytes of a member, and those of each piece that it unpacks to by the ending of its name."""
    yield size
    unpacker = UNPACKERS.get("." + name.rpartition(".")[2].lower())
    if unpacker is not None:
        with unpacker(content, mode="rb") as unpacked:
            while piece := unpacked.read(PIECE):
                yield len(piece)


def reason_of(error: Exception) -> str:
    """Why a picture cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that Pillow cannot read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"{first_line(error).partition(',')[0]}. Cut it into tiles"
    return first_line(error)
