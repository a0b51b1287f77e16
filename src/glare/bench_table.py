"""The figures of ``glare bench`` as a table for people."""

from collections.abc import Mapping
from typing import Any

from glare.report_text import size

LOVEDA_VISITS = 252_000  # images seen by the paper's job on LoveDA, 100 passes over 2,522


def table(values: Mapping[str, Any]) -> str:
    """Both ways side by side, phase by phase, and what follows for a long run."""
    columns = 4 if "plain_images_per_second" in values else 2
    rows = [row[:columns] for row in (("", "glare", "plain", "ratio"), *(_row(*line) for line in _lines(values)))]
    name, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
    shown = [
        "  ".join([first.ljust(name), *(cell.rjust(width) for cell, width in zip(rest, numbers, strict=True))]).rstrip()
        for first, *rest in rows
    ]
    return "\n".join([_what(values), *(f"  {line}" for line in shown), *_notes(values)])


def _what(values: Mapping[str, Any]) -> str:
    views = values["views"]
    return (
        f"{values['backbone']} on {values['device']}, {values['precision']}, batch {values['batch_size']}, "
        f"2 x {views['global_size']} + {views['num_local']} x {views['local_size']} px, K {values['prototypes']}"
    )


def _lines(values: Mapping[str, Any]) -> list[tuple[str, float, float | None, str]]:
    """(name, own, plain, unit) of each line."""

    def pair(key: str) -> tuple[Any, Any]:
        return values[key], values.get(f"plain_{key}")

    phases, plain_phases = values["phases_ms"], values.get("plain_phases_ms")
    return [
        ("images a second", *pair("images_per_second"), "rate"),
        ("waiting for views", *pair("data_wait"), "share"),
        ("memory at most", *pair("peak_memory_bytes"), "bytes"),
        *((f"{name}, ms", value, plain_phases and plain_phases[name], "ms") for name, value in phases.items()),
    ]


def _row(name: str, own: float, plain: float | None, unit: str) -> tuple[str, str, str, str]:
    if plain is None:
        return name, _written(own, unit), "", ""
    ratio = {"rate": own / plain, "share": None}.get(unit, plain / own if own else None)
    return name, _written(own, unit), _written(plain, unit), "" if ratio is None else f"{ratio:.2f}"


def _written(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(int(value))
    return {"rate": f"{value:.3g}", "share": f"{value:.1%}", "ms": f"{value:,.0f}"}[unit]


def _notes(values: Mapping[str, Any]) -> list[str]:
    work, rate = values["gflop_per_image"], values["flops_per_second"]
    total = sum(work.values())
    minutes = LOVEDA_VISITS / values["images_per_second"] / 60
    lines = []
    if "speedup" in values:
        rounds = " and ".join(f"{ratio:.2f}" for ratio in values["speedups"])
        lines.append(f"glare makes {values['speedup']:.2f} steps in the time of one plain step ({rounds} in two turns)")
    return [
        *lines,
        f"{total:.0f} GFLOP an image ({', '.join(f'{name} {value:.0f}' for name, value in work.items())}); "
        f"{rate / 1e12:.3g} TFLOP/s, {values['flop_utilisation']:.0%} of {values['peak_flops_per_second'] / 1e12:.3g} "
        f"({values['peak_from']})",
        f"{values['decoded_images_per_second']:.0f} images a second are decoded, once; at this speed the paper's "
        f"{LOVEDA_VISITS:,} visits take {minutes:,.1f} minutes",
    ]
