"""Labelled folders that a segmentation model learns in a few steps: the class of a pixel is its colour."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["soil", "water", "grass"]
COLOURS = np.array([[150, 90, 40], [30, 60, 190], [60, 180, 70]], dtype=np.uint8)


def write_labelled(
    folder: Path,
    count: int,
    *,
    size: tuple[int, int] = (40, 32),
    classes: list[str] | None = None,
    prefix: str = "scene",
) -> Path:
    """``count`` images of ``size`` (width, height), each two classes divided by a slanted line, with noise."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    for number in range(count):
        first, second = rng.permutation(3)[:2]
        slope, place = rng.normal(), rng.uniform(0.3, 0.7)
        side = (x / size[0] - place) + slope * (y / size[1] - 0.5) > 0
        label = np.where(side, first, second).astype(np.uint8)
        noise = rng.integers(-20, 21, (size[1], size[0], 3))
        image = np.clip(COLOURS[label].astype(int) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{prefix}_{number}.png")
        Image.fromarray(label).save(folder / "labels" / f"{prefix}_{number}.png")
    content = {"classes": classes or CLASSES, "ignore_index": 255, "palette": COLOURS.tolist()}
    (folder / "classes.json").write_text(json.dumps(content))
    return folder


def write_yolo(folder: Path, **counts: int) -> Path:
    """So many images of each split in ``images/<split>``, with their labels in ``labels/<split>``."""
    for split, count in counts.items():
        part = write_labelled(folder / "parts" / split, count)
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (part / kind).rename(folder / kind / split)
        (part / "classes.json").rename(folder / "classes.json")
    return folder
