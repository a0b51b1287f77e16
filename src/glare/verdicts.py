"""From per-image areas to verdicts: what a comparison concludes, and why.

*Better* is earned twice: the interval of the difference to the untouched model lies above zero, and so does that to
random adapters of the same strength. A model whose features have collapsed is never better, whatever a probe says.
All that is tested against zero together holds with 95 %: with m rows every interval has a confidence of 1 - 0.05 / m
(Bonferroni).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glare.comparison import BETTER, SAME, UNTOUCHED, WORSE, Finding, Pair, ProbeResult, Row, Scores
from glare.comparison_models import Group
from glare.intervals import (
    Estimate,
    Score,
    Spread,
    class_differences,
    class_iou,
    difference,
    mean_accuracy,
    mean_iou,
    needed,
    pixel_accuracy,
    spread_of,
)

ERROR_RATE = 0.05


@dataclass(frozen=True)
class Measured:
    """Areas (seeds, images, 3, k) by model name, on the same images with the same seeds; see ``intervals.areas``.

    ``controls``: names of the random-adapter models of each row, at least 2; ``groups``: of the images, None where
    they are not grouped.
    """

    areas: Mapping[str, Tensor]
    controls: Mapping[str, Sequence[str]]
    classes: Sequence[str]
    groups: Sequence[str] | None

    def runs(self, names: Sequence[str]) -> Tensor:
        """Areas (models, images, 3, k), pooled over seeds, of several models that are replicates of each other."""
        return torch.stack([self.areas[name].sum(dim=0) for name in names])


def confidence_of(rows: int) -> float:
    """Confidence of each interval so that those of all rows together hold with 95 %."""
    return 1 - ERROR_RATE / rows


def probe_result(probe: str, measured: Measured, rows: Sequence[Group], foreign: Group | None) -> ProbeResult:
    """Scores of all models and the findings of all rows with one probe."""
    confidence = confidence_of(len(rows))
    return ProbeResult(
        probe=probe,
        scores={name: _scores(areas, measured.classes) for name, areas in measured.areas.items()},
        findings={row.name: _finding(measured, row, foreign, confidence) for row in rows},
        pairs=[_pair(measured, a, b, confidence) for i, a in enumerate(rows) for b in rows[i + 1 :]],
    )


def row_verdict(row: Group, results: Sequence[ProbeResult], collapsed: str | None) -> Row:
    """The verdict of a row over all probes of the protocol, which have to agree."""
    findings = {result.probe: result.findings[row.name] for result in results}
    verdicts = {finding.verdict for finding in findings.values()}
    verdict = verdicts.pop() if len(verdicts) == 1 else SAME
    several = len(findings) > 1
    reason = "; ".join(f"{probe}: {found.reason}" if several else found.reason for probe, found in findings.items())
    if collapsed and verdict == BETTER:
        verdict = SAME
    members = [model.name for model in row.members]
    return Row(row.name, members, verdict, f"collapsed ({collapsed}); {reason}" if collapsed else reason, collapsed)


def _finding(measured: Measured, row: Group, foreign: Group | None, confidence: float) -> Finding:
    ours, base = _sides(measured, row)

    def gain(score: Score) -> Estimate:
        return difference(ours, base, score=score, confidence=confidence)

    to_base = gain(mean_iou)
    to_control = _against_control(measured, row, confidence)
    verdict, reason = judge(to_base, to_control)
    by_class = class_differences(ours, base, confidence=confidence)
    return Finding(
        verdict=verdict,
        reason=reason,
        against_untouched=to_base,
        aacc=gain(pixel_accuracy),
        macc=gain(mean_accuracy),
        against_control=to_control,
        needed=needed(to_base, confidence=confidence) if verdict == SAME else None,
        classes=dict(zip(measured.classes, by_class, strict=True)),
        tuning=difference(*_sides(measured, foreign), score=mean_iou, confidence=confidence) if foreign else None,
        domain=_between(measured, row, foreign, [row], confidence) if foreign else None,
        groups=_by_group(measured, ours, base),
    )


def judge(to_base: Estimate, to_control: Estimate) -> tuple[str, str]:
    """Verdict and reason from the differences to the untouched model and to its random adapters."""
    if to_base.high < 0:
        return WORSE, "below the untouched model"
    if to_base.low <= 0:
        return SAME, "the interval of the difference to the untouched model holds zero"
    if to_control.low <= 0:
        return SAME, "above the untouched model, but random adapters of the same strength may give as much"
    return BETTER, "above the untouched model and above random adapters of the same strength"


def _sides(measured: Measured, row: Group) -> tuple[Tensor, Tensor]:
    """Row and untouched model, (replicates, images, 3, k): pairs of seeds of a single model, or several runs."""
    if len(row.members) == 1:
        return measured.areas[row.members[0].name], measured.areas[UNTOUCHED]
    return _runs(measured, row), measured.runs([UNTOUCHED])


def _runs(measured: Measured, row: Group) -> Tensor:
    return measured.runs([model.name for model in row.members])


def _against_control(measured: Measured, row: Group, confidence: float) -> Estimate:
    """The row minus its random adapters; a single run is taken to vary from seed to seed as much as those do."""
    ours, controls = _runs(measured, row), measured.runs(measured.controls[row.name])
    spread = spread_of(controls, score=mean_iou) if len(ours) == 1 else None
    return difference(ours, controls, score=mean_iou, confidence=confidence, spread=spread)


def _pair(measured: Measured, first: Group, second: Group, confidence: float) -> Pair:
    found = _between(measured, first, second, [first, second], confidence)
    verdict = BETTER if found.low > 0 else WORSE if found.high < 0 else SAME
    return Pair(first.name, second.name, found, verdict)


def _between(measured: Measured, first: Group, second: Group, known: Sequence[Group], confidence: float) -> Estimate:
    """One row minus another; where one of them is a single run, both vary from run to run as the rows ``known`` do."""
    ours, theirs = _runs(measured, first), _runs(measured, second)
    single = min(len(ours), len(theirs)) == 1
    spread = _pooled([_spread(measured, row) for row in known]) if single else None
    return difference(ours, theirs, score=mean_iou, confidence=confidence, spread=spread)


def _spread(measured: Measured, row: Group) -> Spread:
    """How much runs of a row vary: its own runs, or its random adapters where there is only one."""
    runs = _runs(measured, row)
    return spread_of(runs if len(runs) > 1 else measured.runs(measured.controls[row.name]), score=mean_iou)


def _pooled(spreads: Sequence[Spread]) -> Spread:
    degrees = sum(spread.degrees for spread in spreads)
    return Spread(sum(spread.variance * spread.degrees for spread in spreads) / degrees, degrees)


def _by_group(measured: Measured, ours: Tensor, base: Tensor) -> dict[str, float]:
    """Difference of mIoU in each group of images."""
    if measured.groups is None:
        return {}
    found = {}
    for group in sorted(set(measured.groups)):
        place = torch.tensor([name == group for name in measured.groups])
        first, second = (mean_iou(side[:, place].sum(dim=1)).mean().item() for side in (ours, base))
        found[group] = first - second
    return found


def _scores(areas: Tensor, classes: Sequence[str]) -> Scores:
    """Mean scores over seeds of areas (seeds, images, 3, k)."""
    pooled = areas.sum(dim=1)
    iou = class_iou(pooled).mean(dim=0).tolist()
    return Scores(
        miou=mean_iou(pooled).mean().item(),
        aacc=pixel_accuracy(pooled).mean().item(),
        macc=mean_accuracy(pooled).mean().item(),
        iou={name: None if math.isnan(value) else value for name, value in zip(classes, iou, strict=True)},
    )
