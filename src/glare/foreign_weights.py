"""Reading checkpoint files of other projects, none of which is trusted.

A PyTorch file is a pickle, and unpickling runs whatever the file says. So it is read with ``weights_only=True``:
tensors and plain values, and of the classes that training scripts leave in it (their arguments, a best score) those
that cannot do anything, ``argparse.Namespace`` and numpy's scalars.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors.torch import load_file
from torch import Tensor

from glare.errors import UserError, first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")  # a folder is searched for these, in this order
ROLES = ("teacher", "student")
CONTAINERS = ("state_dict", "model", "module")
"""Keys under which training scripts put a table of tensors, besides ``ROLES``."""

HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # its name before numpy 2
]


def checkpoint_file(path: Path) -> Path:
    """``path`` itself, or the checkpoint in the folder ``path``. Raises UserError where there is none or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"the checkpoint {path} does not exist; give a file, or a folder that holds one")
    for suffix in SUFFIXES:
        found = sorted(file for file in path.iterdir() if file.suffix == suffix)
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"the folder {path} holds {listed([file.name for file in found])}; give one of these files")
    raise UserError(f"the folder {path} holds no checkpoint ({', '.join(SUFFIXES)}); give the file")


def read_checkpoint(file: Path) -> Any:
    """What a ``.safetensors`` or PyTorch file holds, on the CPU, without running anything in it.

    Raises UserError for a file that is damaged or needs more than tensors and plain values to be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a file is old
            # mapped, so that the optimizer's state, most of a full file, is never read
            return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(file, error)) from None
    except MemoryError:
        raise
    except Exception as error:  # the readers let almost any exception out on a damaged file
        raise UserError(
            f"{file} cannot be read ({first_line(error)}); is it a whole checkpoint? Download it again"
        ) from None


def _is_zip(file: Path) -> bool:
    """Whether it is in the format since PyTorch 1.6. Raises ValueError for one that would unpack to any size."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed inside, as PyTorch never writes it")
    return True


def _refusal(file: Path, error: pickle.UnpicklingError) -> str:
    """Why a pickle was not read: the foreign objects in it by name, or that it is none."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, pickle.UnpicklingError):  # of a file in the format before PyTorch 1.6
        foreign = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    if not foreign:
        return f"{file} is no PyTorch checkpoint, or a damaged one; give a .pth, .pt or .safetensors file of weights"
    return (
        f"{file} holds objects besides tensors and plain values ({listed(sorted(foreign))}); reading them would run "
        "code of the file, which is never done here: save its state dict alone, as .safetensors or with torch.save"
    )


def state_dict_in(content: Any, *, role: str | None) -> tuple[dict[str, Any], str]:
    """The table of tensors in the content of a file, and under which keys it was, joined by dots.

    ``role``: ``teacher`` or ``student``; None is the teacher where there is one. Raises UserError where there is no
    such table. Entries of the table that are no tensors are left in it, to be complained of by name.
    """
    keys = [role] if role else list(ROLES)
    way = []
    while isinstance(content, Mapping):
        key = next((key for key in (*keys, *CONTAINERS) if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        way.append(key)
        content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        found = listed(list(map(str, content))) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        wanted = " or ".join((*keys, *CONTAINERS))
        raise UserError(f"the checkpoint holds no table of tensors, also not under {wanted}; it holds: {found}")
    return {str(name): value for name, value in content.items()}, ".".join(way)


def listed(names: list[str], *, most: int = 10) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
