"""Cells of tables that `datasets` loads (Hub, parquet, tar): which columns hold pictures, and a picture's file."""

from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download

PARQUET = "refs/convert/parquet"
"""The branch with the tables that the Hub itself makes of a data set: <configuration>/<split>/*.parquet."""


def picture_columns(features: Any) -> list[str]:
    """Names of the columns of pictures."""
    return [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})
    ]


def undecoded(rows: Any, columns: list[str]) -> Any:
    """Only these columns of pictures, whose cells are left as they are stored."""
    for column in columns:
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.select_columns(columns)


def picture_file(cell: dict[str, Any] | None, folder: Path | None) -> Path | BytesIO:
    """The file of a cell as stored; ``folder`` is that of the table, None for the Hub's. ValueError for none."""
    if cell is None:
        raise ValueError("the row has no image")
    if cell["bytes"] is not None:
        return BytesIO(cell["bytes"])
    return Path(cell["path"]) if folder is None else _inside(folder, cell["path"])


def load_hub_split(hub_id: str, config: str | None, split: str) -> Any:
    """The rows of one split of a data set of the Hub; of one that is a program, the tables that the Hub made of it.

    Raises whatever `datasets` does.
    """
    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception:  # a program is refused with an error that depends on what is in the cache
        wanted = f"{config or 'default'}/{split}/*.parquet"
        folder = snapshot_download(hub_id, repo_type="dataset", revision=PARQUET, allow_patterns=wanted)
        return datasets.load_dataset("parquet", data_files={split: f"{folder}/{wanted}"}, split=split)


def _inside(folder: Path, name: str) -> Path:
    """The file that a table of this folder names. Raises ValueError where that is a file of somewhere else."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"its path {name!r} leads out of the folder of the table; put the image into the table")
    return file
