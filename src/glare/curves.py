"""The curves in a run's ``metrics.jsonl``."""

import json
import math
from pathlib import Path

Point = tuple[float, float]
"""(step, value)."""


def read_curves(metrics: Path) -> dict[str, list[Point]]:
    """Every finite number of the log but the step itself, by name; a line that a killed run left unfinished is none."""
    curves: dict[str, list[Point]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step = float(entry.pop("step"))
        for name, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((step, float(value)))
    return curves
