"""Tables of pictures: parquet files, tar shards and data sets of the Hub, through `datasets`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
from huggingface_hub import HfFileSystem, snapshot_download
from PIL import Image

from glare.data import downloads
from glare.data.catalog import named
from glare.data.label_names import LABELS
from glare.data.listing import extension_of, image_names
from glare.data.notices import say_once
from glare.data.opening import open_picture
from glare.data.shards import SHARDS, check_shards, choose_split, find_shards, has_shards, split_of
from glare.data.tiff_header import header_in
from glare.errors import UserError, first_line
from glare.model_names import is_repo_id
from glare.paths import kind_of, local_path

REMOTE = ("https://", "http://", "hf://")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")  # a configuration after the colon
HUB_FILE = "hf://datasets/"
CONFIGURATIONS = re.compile(r"Please pick one among the available configs: \[(.*)\]")
PARQUET = "refs/convert/parquet"
"""The branch with the tables that the Hub itself makes of a data set: <configuration>/<split>/*.parquet."""


@dataclass(frozen=True)
class Table:
    """Rows that have a column of encoded images, and no other.

    ``rows`` is a Dataset, or an IterableDataset that is read as it comes, of ``count`` rows if that is known. Images
    that lie in files beside the table lie in ``folder``; None for a table of the Hub.
    """

    rows: Any
    column: str
    folder: Path | None
    count: int | None

    def open(self, row: Mapping[str, Any]) -> Image.Image:
        """The image of a row, not decoded yet. Raises ValueError without one, and whatever `open_picture` lets out."""
        if row[self.column] is None:
            raise ValueError(f"the row has no image in the column {self.column!r}, which is read of all rows")
        picture = open_picture(picture_file(row[self.column], self.folder))
        header = header_in(picture) if picture.format == "TIFF" else None
        if header is not None and (header.values or not header.whole):
            say_once(
                "TIFFs of more than 8 bits or 3 bands are read in full as files of a folder, not in a table like this"
            )
        return picture


def open_table(data: str, *, split: str | None = None, streaming: bool = False) -> Table:
    """The images of a parquet file, tar shard, folder or address of them, or Hub id (``owner/name[:configuration]``).

    ``split`` is one of the Hub's, or one that names of files tell (`find_shards`), by any usual name for it; None takes
    train, or the only one. ``streaming`` leaves them where they are; else what is remote is downloaded, and all is
    converted to memory-mapped Arrow files. Raises UserError where there is no such table or split, several splits
    without train, or no image.
    """
    path = local_path(data)
    if data.startswith(REMOTE):
        folder, count, rows = None, None, _open_address(data, split, streaming=streaming)
    elif kind_of(path) is not None:
        folder = path if path.is_dir() else path.parent
        rows, count = load_shards(path, split, data=data, streaming=streaming)
    else:
        folder, count, rows = None, None, open_hub(data, split, data=data, streaming=streaming)
    column = _image_column(rows.features or {}, data=data)
    return Table(undecoded(rows, [column]), column, folder, count if streaming else len(rows))


def load_shards(place: Path, split: str | None, *, data: str, streaming: bool = False) -> tuple[Any, int | None]:
    """The rows of one split of the shards at ``place``, and how many these are as far as the shards say it."""
    builder, shards = find_shards(place)
    files = shards[choose_split(shards, split, data=data)]
    count = check_shards(files)
    return _load(builder, [escape(str(file)) for file in files], data=data, streaming=streaming), count


def _load(builder: str, files: list[str], *, data: str, streaming: bool) -> Any:
    """The rows of files (patterns) of one kind. Raises UserError where they cannot be read."""
    try:
        return downloads.load(builder, data_files={"train": files}, streaming=streaming)["train"]
    except Exception as error:  # no connection, files of different columns, a broken file, ...
        said = first_line(error.__cause__ or error)
        remedy = "check the address and the connection" if data.startswith(REMOTE) else "repair it or write it again"
        raise UserError(f"data {data!r} cannot be read ({said}); {remedy}") from error


def _open_address(data: str, split: str | None, *, streaming: bool) -> Any:
    name = urlsplit(data).path.rpartition("/")[2]  # without a query such as ?download=true
    extension = extension_of(name)
    if extension not in SHARDS:
        raise UserError(f"data {data!r} is no table by its name; give one that ends in .parquet or .tar")
    choose_split([split_of(name) or "train"], split, data=data)
    return _load(SHARDS[extension], [data], data=data, streaming=streaming)


def open_hub(hub: str, split: str | None, *, data: str, streaming: bool = False) -> Any:
    """The rows of one split of ``owner/name[:configuration]`` on the Hub, which is what the user calls ``data``.

    Raises UserError where it cannot be loaded, or has no such split.
    """
    hub_id, _, configuration = hub.partition(":")
    chosen = {"name": configuration} if configuration else {}
    try:
        splits = downloads.load(hub_id, streaming=streaming, **chosen)
    except Exception as error:  # no connection, no such data set, several configurations, a broken file, ...
        if choice := CONFIGURATIONS.search(str(error)):
            raise UserError(f"data set {data!r} has configurations {choice[1]}; give one as {data}:NAME") from error
        raise UserError(
            f"data {data!r} is neither an existing path nor a loadable Hub data set ({first_line(error)}); "
            "check the spelling and the connection"
        ) from error
    return splits[choose_split(splits, split, data=data)]


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
