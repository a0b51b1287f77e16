"""Checkpoints of a run: one folder for each, whole or not there, verified by hash.

``checkpoints/step_<step>`` holds the tensors, ``state.json`` and ``SHA256SUMS``, the hashes of both, in the format of
``sha256sum --check``. A checkpoint counts only where these two are listed and have their hashes: a list that was cut
off, or is not there, makes it as unusable as a changed tensor.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glare.errors import UserError

FOLDER = "checkpoints"
TENSORS, STATE, HASHES = "state.safetensors", "state.json", "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimizer steps, on the CPU; ``metrics_bytes`` is how long the log was then.

    ``images``: names of what the run trains on, in their order; ``frozen``: digest of the weights that do not train
    and that no checkpoint holds; None where it was not said.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    metrics_bytes: int
    images: list[str] | None = None
    frozen: str | None = None


class DamagedError(Exception):
    """A checkpoint that cannot be used; the message says why."""


def name_of(step: int) -> str:
    """Of the checkpoint after ``step`` steps, in the run folder."""
    return f"{FOLDER}/step_{step:06d}"


def folders(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, usable or not, the latest first."""
    found = [path for path in (run / FOLDER).glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name[5:])


def fill(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    metrics_bytes: int,
    images: Sequence[str] | None = None,
    frozen: str | None = None,
) -> None:
    """Write a checkpoint, with the fields of ``Checkpoint``, into an empty folder.

    Tensors may have any dtype, shape and device, and share memory; ``state`` is plain JSON, floats exact.
    """
    # safetensors refuses tensors that share memory or have gaps
    packed = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(packed, folder / TENSORS)
    content = {"step": step, "metrics_bytes": metrics_bytes, "state": state, "images": images, "frozen": frozen}
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")
    lines = [f"{_hash(folder / name)}  {name}\n" for name in (TENSORS, STATE)]
    (folder / HASHES).write_text("".join(lines), encoding="utf-8")


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises DamagedError unless every byte is as it was written."""
    try:
        lines = (folder / HASHES).read_text(encoding="utf-8").splitlines()
        for name in (TENSORS, STATE):
            if f"{_hash(folder / name)}  {name}" not in lines:
                raise DamagedError(f"{name} does not have the hash in {HASHES}")
        saved = dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
        tensors = load_file(folder / TENSORS)
        said = saved.get("images"), saved.get("frozen")
        return Checkpoint(saved["step"], tensors, saved["state"], saved["metrics_bytes"], *said)
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"it cannot be read: {error}") from error


def latest(run: Path) -> Checkpoint | None:
    """The last usable checkpoint of a run, with a warning for each that is left out; None where there is none at all.

    Raises UserError where there are some, but none is usable.
    """
    refused = []
    for folder in folders(run):
        try:
            return read(folder)
        except DamagedError as damage:
            refused.append(f"{folder.name}: {damage}")
            warnings.warn(f"the checkpoint {folder} is left out: {damage}", stacklevel=2)
    if refused:
        raise UserError(
            f"no checkpoint in {run / FOLDER} can be used ({'; '.join(refused)}); "
            "put back a copy, or remove that folder to let --resume begin at the first step"
        )
    return None


def prune(run: Path, step: int, keep: int, protected: Collection[int] = ()) -> None:
    """Remove all checkpoints but that of ``step``, the ``keep`` - 1 before it and those of ``protected`` steps.

    Later ones go, too: a run only comes to write an earlier step where they could not be used.
    """
    earlier = [folder for folder in folders(run) if step_of(folder) < step]
    later = [folder for folder in folders(run) if step_of(folder) > step]
    for folder in (*earlier[keep - 1 :], *later):
        if step_of(folder) not in protected:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder so that it is never there in part; what a kill leaves of it has the name of a partial one."""
    aside = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
