"""What a comparison found: plain values, which ``compare.json``, the Markdown and the page are written from.

All scores and differences are fractions of 1. A *row* is what a verdict is given for: one adapted model, or all runs
of one recipe with different seeds together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from glare.intervals import Estimate, Needed

BETTER, WORSE, SAME = "better", "worse", "not distinguishable"
UNTOUCHED, ADAPTED, CONTROL, FOREIGN = "untouched", "adapted", "control", "foreign"
"""Roles of models."""


@dataclass(frozen=True)
class Health:
    """Label-free state of a model's patch features on one data set.

    ``rankme``: effective rank; ``std``: mean standard deviation of the dimensions over patches; ``cosine``: mean
    cosine of a patch to the same patch of the untouched model.
    """

    rankme: float
    std: float
    cosine: float


@dataclass(frozen=True)
class Scores:
    """Means over seeds; classes without labels have no ``iou`` and do not count in the means."""

    miou: float
    aacc: float
    macc: float
    iou: Mapping[str, float | None]


@dataclass(frozen=True)
class Finding:
    """One row on one data set with one probe.

    ``against_control`` is the row's score minus the mean of its random adapters. ``classes``: difference of IoU to
    the untouched model by class. ``tuning`` (foreign minus untouched) and ``domain`` (row minus foreign) add up to
    ``against_untouched``; None without a foreign model. ``groups``: difference of mIoU to the untouched model by
    group of images, empty where images are not grouped.
    """

    verdict: str
    reason: str
    against_untouched: Estimate
    aacc: Estimate
    macc: Estimate
    against_control: Estimate
    needed: Needed | None
    classes: Mapping[str, Estimate | None]
    tuning: Estimate | None
    domain: Estimate | None
    groups: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """Two rows against each other: ``difference`` is the first minus the second."""

    first: str
    second: str
    difference: Estimate
    verdict: str


@dataclass(frozen=True)
class ProbeResult:
    """One probe on one data set: scores by model name, findings by row name."""

    probe: str
    scores: Mapping[str, Scores]
    findings: Mapping[str, Finding]
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class DataResult:
    """Everything on one data set. ``adapted_to`` is false for those that tell what was forgotten.

    ``num_images`` are tested; ``repeats`` of them show what another one shows, which intervals do not know.
    """

    data: str
    split: str
    num_images: int
    repeats: int
    classes: Sequence[str]
    adapted_to: bool
    health: Mapping[str, Health]
    probes: Sequence[ProbeResult]


@dataclass(frozen=True)
class Model:
    """A compared model. ``of``: for a control, the row whose cosine it was given."""

    name: str
    role: str
    path: str | None
    of: str | None = None


@dataclass(frozen=True)
class Row:
    """What a verdict is given for: ``members`` are names of adapted models, ``collapsed`` says why or is None."""

    name: str
    members: Sequence[str]
    verdict: str
    reason: str
    collapsed: str | None


@dataclass(frozen=True)
class Price:
    """What a model costs; None where it is not known, as for a model without its run folder.

    ``adapter_bytes``: what is stored besides the untouched model; ``seconds`` and ``peak_memory_bytes`` of the
    adaptation; ``overhead``: time of a forward pass over that of the untouched model, minus 1.
    """

    adapter_bytes: int | None
    parameters_trained: int | None
    seconds: float | None
    peak_memory_bytes: int | None
    device: str | None
    overhead: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """The whole result. ``confidence``: of every interval, so that all verdicts together hold with 95 %."""

    protocol: str
    base: str
    confidence: float
    seeds: int
    models: Sequence[Model]
    rows: Sequence[Row]
    data: Sequence[DataResult]
    prices: Mapping[str, Price]
    seconds: float
    command: str
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
