"""The curves in a run's ``metrics.jsonl``."""

import json
import math
from pathlib import Path
from typing import Any

Point = tuple[float, float]
"""(step, value)."""


def read_lines(metrics: Path) -> list[dict[str, float]]:
    """The finite numbers of each line with a ``step``; a line that a killed run left unfinished is none."""
    lines = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            lines.append({name: number for name, value in entry.items() if (number := _number(value)) is not None})
    return [line for line in lines if "step" in line]


def read_curves(metrics: Path) -> dict[str, list[Point]]:
    """Every number of the log but the step itself, by name."""
    curves: dict[str, list[Point]] = {}
    for line in read_lines(metrics):
        step = line.pop("step")
        for name, value in line.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def _number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None
