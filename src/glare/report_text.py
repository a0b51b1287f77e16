"""Numbers and sentences of a comparison, the same on the page, in Markdown and in the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glare.comparison import (
    BETTER,
    CONTROL,
    SAME,
    UNTOUCHED,
    WORSE,
    Comparison,
    DataResult,
    Finding,
    Price,
    ProbeResult,
    Row,
)
from glare.intervals import Estimate, Needed

MINUS = "\N{MINUS SIGN}"
UNKNOWN = UNTIL = "\N{EN DASH}"
ALL_TOGETHER = 0.95
COLLAPSED = "collapsed"
"""What takes the place of the verdict on a model whose features collapsed."""


PROBE_DESCRIPTIONS = {
    "linear": "a ridge classifier on the frozen patch features, classes weighted by the inverse root of their "
    "frequency, its strength chosen inside the training part",
    "knn": "20 nearest training patches by cosine, on the frozen patch features",
    "whitened knn": "the same after whitening, which hides what a mere rescaling of directions does",
    "fpn": "a segmentation model, fine-tuned on the training part",
}
"""Probe -> what it is."""


DEFINITIONS = {
    "mIoU": "intersection over union of predicted and true pixels, mean over classes; pixels of all images pooled",
    "aAcc, mAcc": "share of pixels that are right: of all, and mean over classes",
    "RankMe": "effective number of directions that the patch features use; half of the untouched model's or less "
    "counts as collapsed",
    "std": "standard deviation of the features over patches, mean over dimensions; near 0 all patches look alike",
    "cosine": "of a patch's features to the untouched model's, mean over patches; 1 is unchanged",
    "Control": "the same adapters with random weights, as far from the untouched model (equal cosine): "
    "what they gain too was not learned from the images",
}
"""Word of the tables -> what it means."""


@dataclass(frozen=True)
class Answer:
    """What was found of one row: ``sentence`` goes on from its name, ``notes`` are sentences of their own."""

    name: str
    verdict: str
    sentence: str
    notes: Sequence[str]


def score(value: float | None) -> str:
    """A fraction in percent: ``42.6``."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of fractions in points: ``+0.6``; what is rounded to zero keeps its sign, exactly zero has none."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{100 * value:+.1f}".replace("-", MINUS) if value else "0.0"


def interval(estimate: Estimate) -> str:
    """A difference with its interval in points: ``+0.6 [-1.2, +2.4]``."""
    if not math.isfinite(estimate.value):
        return UNKNOWN
    return f"{points(estimate.value)} {bounds(estimate)}"


def bounds(estimate: Estimate) -> str:
    """An interval in points: ``[-1.2, +2.4]``."""
    return f"[{points(estimate.low)}, {points(estimate.high)}]"


def sure(confidence: float) -> str:
    """A confidence: ``95 %``, ``98.3 %``."""
    return f"{100 * confidence:.3g} %"


def size(number: int | None) -> str:
    """Bytes: ``1.2 MB``."""
    if number is None:
        return UNKNOWN
    power = next(p for p in (9, 6, 3, 0) if number >= 10**p or p == 0)
    return f"{number / 10**power:.{1 if power else 0}f} { {9: 'GB', 6: 'MB', 3: 'kB', 0: 'B'}[power] }"


def duration(seconds: float | None) -> str:
    """A time: ``45 s``, ``2.1 min``, ``3.4 h``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def measured(result: Comparison) -> list[DataResult]:
    """The data that the models were adapted to."""
    return [data for data in result.data if data.adapted_to]


def others(result: Comparison) -> list[DataResult]:
    """The data that tell what was forgotten."""
    return [data for data in result.data if not data.adapted_to]


def main_probe(result: Comparison, data: DataResult) -> ProbeResult:
    """The probe that the comparison was asked for, or the first."""
    return next((probe for probe in data.probes if probe.probe == result.protocol), data.probes[0])


def ordered_probes(result: Comparison, data: DataResult) -> list[ProbeResult]:
    """All probes, the one asked for first."""
    main = main_probe(result, data)
    return [main, *(probe for probe in data.probes if probe is not main)]


def untouched_name(result: Comparison) -> str:
    """The untouched model's name."""
    return next(model.name for model in result.models if model.role == UNTOUCHED)


def controls_of(result: Comparison, row: Row) -> list[str]:
    """Names of the random adapters of a row."""
    return [model.name for model in result.models if model.role == CONTROL and model.of == row.name]


def random_gain(finding: Finding) -> float:
    """How much better than the untouched model its random adapters are."""
    return finding.against_untouched.value - finding.against_control.value


def verdict(row: Row) -> str:
    """The verdict on a row, ``COLLAPSED`` where its features did."""
    return COLLAPSED if row.collapsed else row.verdict


def answers(result: Comparison) -> list[Answer]:
    """What was found of every row, in their order."""
    return [Answer(row.name, verdict(row), _sentence(result, row), _notes(result, row)) for row in result.rows]


def tally(result: Comparison) -> str:
    """How many rows have which verdict."""
    found = [verdict(row) for row in result.rows]
    counts = {name: found.count(name) for name in (BETTER, WORSE, SAME, COLLAPSED)}
    return f"Of {len(found)}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count) + "."


def _sentence(result: Comparison, row: Row) -> str:
    """The answer on the data adapted to, with the probe asked for; other data and probes are notes."""
    several = len(measured(result)) > 1
    parts = []
    for data in measured(result):
        probe = main_probe(result, data)
        finding = probe.findings[row.name]
        place = f"on {data.data} under `{probe.probe}`" if several else f"under `{probe.probe}`"
        parts.append(f"{_lead(finding, place, row)}: {_numbers(finding, result.confidence)}")
        if finding.verdict == SAME and finding.against_untouched.low <= 0 and not row.collapsed:
            parts.append(_what_would_tell(finding.needed))
    return " ".join(part for part in parts if part)


def _lead(finding: Finding, place: str, row: Row) -> str:
    difference = finding.against_untouched
    if row.collapsed:
        return f"collapsed: {row.collapsed.rstrip('.')}. Do not use it, whatever its score; {row.verdict} {place}"
    if finding.verdict != row.verdict:
        return f"{row.verdict}, as the probes disagree; {finding.verdict} {place}"
    if finding.verdict in (BETTER, WORSE):
        return f"{finding.verdict} than the untouched model {place}"
    if difference.low > 0:
        return f"above the untouched model, but not distinguishable from random adapters, {place}"
    return f"not distinguishable from the untouched model {place}"


def _numbers(finding: Finding, confidence: float) -> str:
    difference, control = finding.against_untouched, finding.against_control
    text = f"{points(difference.value)} points of mIoU, {sure(confidence)} interval {bounds(difference)}"
    if math.isfinite(control.value):
        text += f"; random adapters of the same strength: {points(random_gain(finding))}"
        if finding.verdict != SAME or difference.low > 0:
            text += f", so {interval(control)} against them"
    return text + "."


def _what_would_tell(needed: Needed | None) -> str:
    """How large a comparison would have to be."""
    if needed is None:
        return ""
    counts = {"images": needed.images, "seeds": needed.seeds}
    known = [f"{_about(count)} {what}" for what, count in counts.items() if count is not None]
    if not known:
        return "Neither more images nor more seeds alone would tell."
    return f"About {' or '.join(known)} would be needed to tell."


def _about(count: int) -> str:
    """Two leading digits: ``1,200``."""
    power = max(0, len(str(count)) - 2)
    return f"{round(count, -power):,}"


def _notes(result: Comparison, row: Row) -> list[str]:
    notes = [] if row.collapsed or not row.reason else [f"Why: {row.reason.rstrip('.')}."]
    for data in result.data:
        main, *rest = ordered_probes(result, data)
        shown = rest if data.adapted_to else [main]
        found = [(probe, probe.findings[row.name]) for probe in shown]
        texts = [
            (f"`{probe.probe}` " if data.adapted_to else "") + f"{interval(f.against_untouched)}, {f.verdict}"
            for probe, f in found
        ]
        where = f"Other probes on {data.data}" if data.adapted_to else f"On {data.data}, not adapted to"
        notes += [f"{where}: {'; '.join(texts)}."] if texts else []
    notes += [f"{data.data}: {_repeats_text(data)[2:]}." for data in measured(result) if data.repeats]
    if len(row.members) > 1:
        notes.append(f"{len(row.members)} runs: {', '.join(row.members)}.")
    else:
        notes.append(
            "One run: how another run of the recipe would differ is not in the interval to the untouched model."
        )
    return notes


def price_text(price: Price, *, verb: str = "adapted") -> str:
    """What a model costs, in a line; ``verb`` is what was done to it."""
    overhead = price.overhead
    parts = [
        (price.adapter_bytes, f"{size(price.adapter_bytes)} stored"),
        (price.parameters_trained, f"{price.parameters_trained or 0:,} parameters trained"),
        (price.seconds, f"{verb} in {duration(price.seconds)}" + (f" on {price.device}" if price.device else "")),
        (price.peak_memory_bytes, f"{size(price.peak_memory_bytes)} of memory at most"),
        (overhead, f"{overhead_text(overhead)} time a forward pass"),
    ]
    return ", ".join(text for value, text in parts if value is not None) or "not known"


def overhead_text(overhead: Estimate | None) -> str:
    """Additional time: ``+3.2 % [+2.9, +3.5]``."""
    return UNKNOWN if overhead is None else f"{points(overhead.value)} % {bounds(overhead)}"


def facts(result: Comparison) -> dict[str, str]:
    """How it was measured."""
    probes = dict.fromkeys(probe.probe for data in result.data for probe in data.probes)
    controls = [model for model in result.models if model.role == CONTROL]
    together = f"each holds with {sure(result.confidence)}, so that all verdicts together hold with 95 %"
    return {
        **{f"Data {data.data}": _data_text(data) for data in result.data},
        **{f"Probe {probe}": PROBE_DESCRIPTIONS[probe] for probe in probes if probe in PROBE_DESCRIPTIONS},
        "Seeds": f"{result.seeds}, of what a split or a probe draws",
        "Intervals": "over test images drawn anew, the same for both models, and over seeds and runs where there are "
        f"several; {together if result.confidence > ALL_TOGETHER else sure(result.confidence)}",
        "Needed to tell": "so many that a difference of this size would be found in 4 of 5 repetitions",
        "Control": f"{DEFINITIONS['Control']}; {len(controls)} models in all" if controls else "none",
        **{f"Model {model.name}": f"{model.role}, {model.path}" for model in result.models if model.role != CONTROL},
        "Time": duration(result.seconds),
        "Versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }


def _data_text(data: DataResult) -> str:
    role = "adapted to" if data.adapted_to else "not adapted to"
    return f"{role}; {data.num_images} test images, {len(data.classes)} classes; {data.split}{_repeats_text(data)}"


def _repeats_text(data: DataResult) -> str:
    if not data.repeats:
        return ""
    return (
        f"; {data.repeats} of the test images repeat another one (frames of a film, copies), and intervals that take "
        "them for independent are too narrow: use fewer of them (--match, --num-images)"
    )
