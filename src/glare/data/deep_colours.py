"""Colours of 16 bits in PNGs, of which Pillow keeps the high byte: the low one is read as if it were that."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from glare.data.opening import open_picture

LOW = {"RGB;16B": ("RGB;16L", (0, 1, 2)), "RGBA;16B": ("RGBA;16L", (0, 1, 2)), "LA;16B": ("RGBA", (1, 1, 1))}
"""How Pillow decodes a PNG of 16 bits -> how it decodes the low bytes, and which bands these are for red, green, blue.

The order of the bytes is turned around; of grey with alpha, each byte is a band.
"""
MAX_12_BITS = 4095


def file_of_deep_colours(image: Image.Image) -> Path | BytesIO | None:
    """The file of a PNG of 16-bit colours, or of grey and alpha, that is not decoded yet; None for anything else."""
    tile = getattr(image, "tile", None)
    if image.format != "PNG" or not tile or tile[0].args not in LOW:
        return None
    name, opened = getattr(image, "filename", ""), getattr(image, "fp", None)
    if name:
        return Path(name)
    return opened if isinstance(opened, BytesIO) else None


def scaled_colours(image: Image.Image, file: Path | BytesIO) -> Image.Image:
    """A decoded PNG of 16-bit colours, scaled by the depth that these use.

    Up to 255 they stay as they are, up to 4095 they are taken as 12 bits; of larger ones the high byte is enough.
    Transparency stays as it is.
    """
    high = np.asarray(image)[..., :3]
    most = int(high.max(initial=0)) * 256 + 255
    if most > MAX_12_BITS:
        return image
    scale = np.arange(256) if most == 255 else np.rint(np.arange(MAX_12_BITS + 1) * 255 / MAX_12_BITS)
    if isinstance(file, BytesIO):
        file.seek(0)
    with open_picture(file) as again:
        decoding, bands = LOW[str(again.tile[0].args)]
        again.tile = [tile._replace(args=decoding) for tile in again.tile]
        low = np.asarray(again)
    colours = np.empty(high.shape, np.uint8)
    for row in range(len(colours)):  # to save memory
        colours[row] = scale[high[row].astype(np.uint16) * 256 + low[row][:, bands]]
    found = Image.fromarray(colours)
    if "A" in image.getbands():
        found.putalpha(image.getchannel("A"))
    elif "transparency" in image.info:
        found.putalpha(image.convert("RGBA").getchannel("A"))
    return found
