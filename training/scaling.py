"""What a step costs at several sizes, and the law that fits: ``python training/scaling.py [--device cuda]``.

Each line changes one thing of the paper's recipe: images a step, local views, prototypes or the ViT. Fitted is
seconds a step = fixed + images x GFLOP an image / rate, by least squares of the relative error.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from glare import bench
from glare.run_folder import atomic_write_json

VITS = {"ViT-Ti/16": (192, 3), "ViT-S/16": (384, 6), "ViT-B/16": (768, 12)}
SIZES: list[tuple[str, dict[str, Any]]] = [
    ("ViT-S/16", {"batch_size": 2}),
    ("ViT-S/16", {"batch_size": 4}),
    ("ViT-S/16", {"batch_size": 8}),
    ("ViT-S/16", {"batch_size": 4, "views": {"num_local": 0}}),
    ("ViT-S/16", {"batch_size": 4, "views": {"num_local": 4}}),
    ("ViT-S/16", {"batch_size": 4, "glare": {"prototypes": 512}}),
    ("ViT-S/16", {"batch_size": 4, "glare": {"prototypes": 2048}}),
    ("ViT-S/16", {"batch_size": 4, "glare": {"prototypes": 32768}}),
    ("ViT-Ti/16", {"batch_size": 4}),
    ("ViT-B/16", {"batch_size": 4}),
]


def main() -> None:
    """Measure all sizes, fit, print and, with ``--json``, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--factor", type=int, default=1, help="times the images a step, 16 or more for a GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as scratch:
        for vit, size in SIZES:
            given = {**size, "batch_size": args.factor * size["batch_size"], "plain": False}
            given |= {"backbone": write_config(Path(scratch), *VITS[vit]), "device": args.device, "steps": args.steps}
            rows.append({"vit": vit, **size, **row_of(bench.run(given))})
    fixed, rate = fit(rows)
    for row in rows:
        what = f"{row['vit']:10} {row['images']:4} images, {row['local']:2} local, K {row['prototypes']:5}"
        fitted = fixed + row["images"] * row["gflop"] / rate
        print(f"{what}: {row['gflop']:4.0f} GFLOP an image, {row['seconds']:6.2f} s a step, fitted {fitted:6.2f}")
    print(f"seconds a step = {fixed:.3f} + images x GFLOP / {rate:.0f}")
    if args.json:
        atomic_write_json(args.json, {"rows": rows, "fixed_seconds": fixed, "gflop_per_second": rate})


def write_config(folder: Path, width: int, heads: int) -> str:
    """The configuration of a ViT with random weights."""
    config = json.loads(bench.VIT_SMALL.read_text())
    file = folder / f"vit_{width}.json"
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    file.write_text(json.dumps(config | sizes))
    return str(file)


def row_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the law is about."""
    return {
        "images": values["batch_size"],
        "local": values["views"]["num_local"],
        "prototypes": values["prototypes"],
        "gflop": sum(values["gflop_per_image"].values()),
        "seconds": values["batch_size"] / values["images_per_second"],
    }


def fit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Fixed seconds of a step and GFLOP a second."""
    seconds = np.array([row["seconds"] for row in rows])
    work = np.array([row["images"] * row["gflop"] for row in rows])
    design = np.stack([np.ones_like(work), work], axis=1) / seconds[:, None]
    fixed, slope = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)[0]
    return float(fixed), float(1 / slope)


if __name__ == "__main__":
    main()
