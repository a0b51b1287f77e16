"""Tables of pictures: parquet files, tar shards and data sets of the Hub, through `datasets`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfFileSystem, snapshot_download
from PIL import Image

from glare.data.catalog import named
from glare.data.listing import LABELS, extension_of, image_names
from glare.data.notices import say_once
from glare.data.opening import check_archive, open_picture
from glare.errors import UserError, first_line
from glare.model_names import is_repo_id
from glare.paths import kind_of, local_path

SHARDS = {"parquet": "parquet", "tar": "webdataset"}
"""File extension -> the builder of `datasets` that reads it."""

REMOTE = ("https://", "http://", "hf://")
HUB_FILE = "hf://datasets/"
CONFIGURATIONS = re.compile(r"Please pick one among the available configs: \[(.*)\]")
PARQUET = "refs/convert/parquet"
"""The branch with the tables that the Hub itself makes of a data set: <configuration>/<split>/*.parquet."""


@dataclass(frozen=True)
class Table:
    """Rows that have a column of encoded images, and no other.

    ``rows`` is a Dataset, or an IterableDataset that is read as it comes. Images that lie in files beside the table lie
    in ``folder``; None for a table of the Hub.
    """

    rows: Any
    column: str
    folder: Path | None

    def open(self, row: Mapping[str, Any]) -> Image.Image:
        """The image of a row, not decoded yet. Raises ValueError without one, and whatever `open_picture` lets out."""
        return open_picture(picture_file(row[self.column], self.folder))


def open_table(data: str, *, split: str | None = None, streaming: bool = False) -> Table:
    """The images of a parquet file, tar shard, folder or address of them, or Hub id (``owner/name[:configuration]``).

    ``split`` is one of those that `datasets` finds there; None takes train, or the largest without it. ``streaming``
    leaves them where they are; else what is remote is downloaded, and all is converted to memory-mapped Arrow files.
    Raises UserError where there is no such table or split, or no image in it.
    """
    builder, where = _builder(data)
    of_files, remote = builder in SHARDS.values(), data.startswith(REMOTE)
    try:
        if builder == SHARDS["tar"] and not remote:
            for file in filter(Path.is_file, [local_path(data), *sorted(local_path(data).rglob("*"))]):
                check_archive(file)
        splits = datasets.load_dataset(builder, **({"streaming": True} if streaming else {}), **where)
        rows = splits[_split(splits, split, data=data, streaming=streaming)]
        features = rows.features or {}
    except UserError:
        raise
    except Exception as error:  # no connection, no such data set, several configurations, a broken file, ...
        if of_files:
            raise UserError(
                f"data {data!r} cannot be read ({first_line(error)}); repair it or write it again"
            ) from error
        if choice := CONFIGURATIONS.search(str(error)):
            raise UserError(f"data set {data!r} has configurations {choice[1]}; give one as {data}:NAME") from error
        raise UserError(
            f"data {data!r} is neither an existing path nor a loadable Hub data set ({first_line(error)}); "
            "check the spelling and the connection"
        ) from error
    column = _image_column(features, data=data)
    if isinstance(features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return Table(rows.select_columns([column]), column, _folder(data) if of_files and not remote else None)


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


def picture_file(cell: Mapping[str, Any] | None, folder: Path | None) -> Path | BytesIO:
    """The file of a cell as stored; ``folder`` is that of the table, None for the Hub's. ValueError for none."""
    if cell is None:
        raise ValueError("the row has no image")
    if cell["bytes"] is not None:
        return BytesIO(cell["bytes"])
    path = str(cell["path"])
    if folder is not None:
        return _inside(folder, path)
    if "://" not in path:
        return Path(path)
    if not path.startswith(HUB_FILE):
        raise ValueError(f"its path {path!r} is not streamed; put the image into the table")
    with HfFileSystem().open(path, "rb") as file:
        return BytesIO(file.read())


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


def streamable(data: str) -> bool:
    """Whether ``data`` names a table: an address, a file or folder of shards without images, or a Hub id.

    A data set of the catalog is none, though its name may have the form of a Hub id.
    """
    if named(data) is not None:
        return False
    path = local_path(data)
    kind = kind_of(path)
    if kind == "folder":
        return not image_names(path) and has_shards(path)
    if kind == "file":
        return extension_of(path.name) in SHARDS
    return data.startswith(REMOTE) or is_repo_id(data.partition(":")[0])


def has_shards(folder: Path) -> bool:
    """Whether there are parquet files or tar shards in a folder, at any depth."""
    return any(next(folder.rglob(f"*.{extension}"), None) for extension in SHARDS)


def _builder(data: str) -> tuple[str, dict[str, str]]:
    """The builder of `datasets` and its files; a Hub id is its own builder, of one of its configurations."""
    if kind_of(local_path(data)) == "folder":
        for extension, builder in SHARDS.items():
            if next(local_path(data).rglob(f"*.{extension}"), None):
                return builder, {"data_dir": str(local_path(data))}
        raise UserError(f"folder {data!r} holds no {' or '.join(SHARDS)} files; give one that does")
    remote = data.startswith(REMOTE)
    if remote or kind_of(local_path(data)) == "file":
        extension = data.rpartition(".")[2].lower()
        if extension not in SHARDS:
            raise UserError(f"data {data!r} is no table by its name; give one that ends in .parquet or .tar")
        return SHARDS[extension], {"data_files": data if remote else str(local_path(data))}
    hub_id, _, configuration = data.partition(":")
    return hub_id, {"name": configuration} if configuration else {}


def _folder(data: str) -> Path:
    path = local_path(data)
    return path if path.is_dir() else path.parent


def _split(splits: Any, wanted: str | None, *, data: str, streaming: bool) -> str:
    """The wanted split, else train, or the largest one; of a stream, whose sizes nobody knows, the first."""
    names: list[str] = list(splits)
    if wanted is not None and wanted not in names:
        raise UserError(f"data {data!r} has no split {wanted!r}; it has {', '.join(names)}")
    if wanted is not None or "train" in names:
        return wanted or "train"
    return names[0] if streaming else max(names, key=lambda name: len(splits[name]))


def _inside(folder: Path, name: str) -> Path:
    """The file that a table of this folder names. Raises ValueError where that is a file of somewhere else."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"its path {name!r} leads out of the folder of the table; put the image into the table")
    return file


def _image_column(features: Any, *, data: str) -> str:
    """The column of images: the one called image, or the first of that type that is not called like labels."""
    columns = picture_columns(features)
    if not columns:
        raise UserError(
            f"data {data!r} has no column of images, only {', '.join(features)}; give a data set with an Image column"
        )
    pictures = [name for name in columns if not LABELS & set(re.split("[^a-z]+", name.lower()))] or columns
    chosen = "image" if "image" in pictures else pictures[0]
    if len(columns) > 1:
        others = ", ".join(name for name in columns if name != chosen)
        say_once(f"the images of {data!r} are its column {chosen!r}, not {others}")
    return chosen
