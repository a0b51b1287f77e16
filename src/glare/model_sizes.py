"""How large a model may be that a configuration asks for: found out before memory is taken for it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glare.errors import shortened

MAX_LABELS = 2**16  # what a label map of 16 bits can tell apart; ImageNet-21k has 21,843 classes
BYTES = 4  # of a weight in float32
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the control group, "max" where there is none


def check_labels(fields: Any) -> None:
    """Raise ValueError where the fields of a config.json, or of a configuration inside, have too many classes.

    They are to be checked as they stand in the file: transformers makes a name for each class as soon as it reads one.
    """
    if not isinstance(fields, dict):
        return
    number, names = fields.get("num_labels"), fields.get("id2label")
    if isinstance(number, int | float) and number > MAX_LABELS:
        raise ValueError(f"num_labels is {shortened(str(number))}; a label map of 16 bits holds at most {MAX_LABELS}")
    if isinstance(names, dict | list) and len(names) > MAX_LABELS:
        raise ValueError(f"id2label has {len(names)} names; a label map of 16 bits holds at most {MAX_LABELS}")
    for inner in fields.values():
        check_labels(inner)


def oversize(build: Callable[[], nn.Module]) -> str | None:
    """Why the module that ``build`` makes cannot be held in float32, None where it can; nothing is allocated."""
    try:
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        return "weights are more than 64 bits can count"
    memory = total_memory()
    if BYTES * weights <= memory:
        return None
    return f"{weights:,} weights take {_gib(BYTES * weights)} in float32, and there are {_gib(memory)} of memory"


def total_memory() -> int:
    """Bytes of the machine's memory, of which the control group of this process may allow fewer."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.exists() else "max"
    return installed if limit == "max" else min(installed, int(limit))


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
