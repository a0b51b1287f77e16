"""The files of a model's weights: one safetensors file, or shards that an index names."""

import hashlib
from pathlib import Path

from glare.errors import shortened
from glare.json_files import read_json
from glare.model_names import Place

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_index(place: Place) -> None:
    """Raise ValueError where the index of a model names anything but safetensors files beside it."""
    index = place.file(INDEX)
    if index is not None:
        _shards(index)


def weights_digest(place: Place) -> str | None:
    """The sha256 of a model's ``model.safetensors``; None without weights.

    Of shards it is that of their list, as ``sha256sum`` writes it, in the order of their names.
    """
    single = place.file(SINGLE)
    if single is not None:
        return _sha256(single)
    index = place.file(INDEX)
    if index is None:
        return None
    found = [(name, place.file(name)) for name in _shards(index)]
    lines = [f"{_sha256(file)}  {name}\n" for name, file in found if file is not None]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _shards(index: Path) -> list[str]:
    """Names of the shards of an index, sorted. Raises ValueError unless each is a safetensors file beside it."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{INDEX} has no weight_map")
    for name in named.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {shortened(repr(name))}, which is no safetensors file beside it")
    return sorted(set(named.values()))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
