"""The curves in a run's ``metrics.jsonl``."""

import json
import math
from pathlib import Path
from typing import Any

Point = tuple[float, float]
"""(step, value)."""


def read_curves(metrics: Path) -> dict[str, list[Point]]:
    """Every finite number of the log but the step itself, by name; a line that a killed run left unfinished is none."""
    curves: dict[str, list[Point]] = {}
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = _number(entry.pop("step", None)) if isinstance(entry, dict) else None
        if step is None:
            continue
        for name, value in entry.items():
            if (number := _number(value)) is not None:
                curves.setdefault(name, []).append((step, number))
    return curves


def _number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None
