"""Watching a pre-training run: when its health is checked, when it stops, and which of its steps is exported.

All that is decided follows from the lines of the log, so that a resumed run decides as one that never stopped. The main
process measures and decides, the others hear of it.
"""

import warnings
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from glare import alarms
from glare.alarms import CHECKED, EARLY_LINES, IN_A_ROW, LIMITS, Line
from glare.checkpoints import Checkpoint, DamagedError
from glare.crops import PackedImages
from glare.errors import UserError
from glare.health_check import HealthCheck, check_views
from glare.run_folder import RunFolder, atomic_write_json
from glare.student import Student
from glare.views import Normalisation

FILE = "health.json"
CHECK_EVERY = 25  # steps: a check took 0.19 of a step (ViT-S/14, batch 8, one core), so 1 % of the time
LOWER = 5  # what a learning rate is divided by in a remedy
MAY_DIFFER_ON_RESUME = frozenset(
    {"clip", "learning_rate", "min_learning_rate", "on_unhealthy", "patience", "precision", "select"}
)
"""Recipe keys that are a remedy for a run that was stopped, and so may change with its ``--resume``."""


@dataclass(frozen=True)
class WatchSettings:
    """What a watch has to know of the recipe."""

    backbone: str
    learning_rate: float
    batch_size: int
    on_unhealthy: str
    select: str
    patience: int | None
    steps: int
    checkpoint_every: int

    @classmethod
    def of(cls, recipe: Any) -> Self:
        """Of a resolved recipe, which has fields of the same names."""
        return cls(**{name: getattr(recipe, name) for name in cls.__dataclass_fields__})


def check_watch(recipe: Any) -> None:
    """Raise UserError where there is nothing to choose from, or a patience is over before there is a second check."""
    if recipe.select == "health" and recipe.checkpoint_every >= recipe.steps:
        raise UserError(
            f"select health chooses among checkpoints, and with checkpoint_every {recipe.checkpoint_every} a run of "
            f"{recipe.steps} steps writes one; give --checkpoint-every {max(1, recipe.steps // 6)}"
        )
    patience = recipe.patience
    if patience is None:
        return
    interval = min(recipe.checkpoint_every, -(-CHECK_EVERY // recipe.log_every) * recipe.log_every)
    if patience < interval:
        raise UserError(
            f"patience is {patience} steps, but the rank it goes by is measured every {interval} steps; "
            f"give at least {interval}, or a smaller --checkpoint-every"
        )


class HealthWatch:
    """The watch of one run over the lines of its log.

    ``doubt``: what the last line gave cause for concern with, if anything; ``enough``: why the run is to end early, if
    it is; both are the same on all processes. ``latest``: the values of the last check. ``highest``: (step, score) of
    the check that scores best so far; ``saved``: the scores of checkpoints that may be exported, by step.
    """

    def __init__(
        self, settings: WatchSettings, check: HealthCheck | None, accelerator: Accelerator, *, prototypes: int
    ) -> None:
        """``check``: on the main process at least; ``prototypes`` are those of the objective's head, if it has one."""
        self.settings, self.check, self.accelerator, self.prototypes = settings, check, accelerator, prototypes
        self.doubt: str | None = None
        self.enough: str | None = None
        self.latest: dict[str, float] = {}
        self.highest: tuple[int, float] | None = None
        self.saved: dict[int, float] = {}
        self.doubtful_start: int | None = None
        self.checked = -CHECK_EVERY
        self.early: list[Line] = []
        self.recent: deque[Line] = deque(maxlen=IN_A_ROW)
        self.warned: set[str] = set()

    @classmethod
    def of(
        cls, student: Student, images: PackedImages, recipe: Any, normalise: Normalisation, accelerator: Accelerator
    ) -> Self:
        """The watch of a run with a resolved recipe, before the first step.

        Checks are the main process's, unless it has only its part of the blocks.
        """
        check = None
        if accelerator.is_main_process or recipe.shard:
            size = recipe.views.global_size
            views = check_views(images, batch_size=recipe.batch_size, size=size, normalise=normalise)
            check = HealthCheck.of(student.backbone, views.to(accelerator.device), accelerator)
        head = student.objective.head
        prototypes = len(head.last_layer.weight_g) if head is not None else 0
        return cls(WatchSettings.of(recipe), check, accelerator, prototypes=prototypes)

    @property
    def untouched(self) -> Line:
        """Values of the check before the first step; none but on the main process."""
        return self.check.untouched if self.check is not None else {}

    def resume(self, folder: RunFolder, start: int) -> None:
        """Take up the log of the ``start`` steps that a resumed run has behind it, as the main process finds it."""
        if self.accelerator.is_main_process:
            kept = folder.checkpoint_steps()
            for line in folder.lines():
                self._take(line, kept)
                if CHECKED[0] in line:
                    self.checked = int(line["step"])
            self.doubtful_start = start if self.doubt else None
        self.checked, self.enough = broadcast_object_list([self.checked, self.enough])

    def regular(self, done: int) -> bool:
        """Whether a checkpoint is due after ``done`` steps, whatever happens in the run."""
        return done % self.settings.checkpoint_every == 0 or done == self.settings.steps

    def measure(self, student: Student, done: int) -> dict[str, float]:
        """A check where one is due after ``done`` steps, else nothing.

        One is due before a regular checkpoint, on the first line of the log, and ``CHECK_EVERY`` steps after the last.
        """
        if self.check is None or not (self.regular(done) or done - self.checked >= CHECK_EVERY):
            return {}
        self.checked = done
        self.latest = self.check.measure(student.backbone)
        return self.latest

    def judge(self, line: Line, folder: RunFolder) -> str | None:
        """What follows from the newest line: nothing, a warning, or, on all processes alike, why the run stops.

        That is the cause, the step, the last healthy checkpoint and the remedy.
        """
        cause = self._take(line) if self.accelerator.is_main_process else None
        cause, self.doubt, self.enough = broadcast_object_list([cause, self.doubt, self.enough])
        if cause is None:
            return None
        kind = cause.partition(":")[0]
        if self.settings.on_unhealthy == "stop" or kind == "not finite":
            return f"step {line['step']:.0f}: {cause}; {self._remedy(folder)}"
        if kind not in self.warned and self.accelerator.is_main_process:
            self.warned.add(kind)
            warnings.warn(f"step {line['step']:.0f}: {cause}; the run goes on", stacklevel=2)
        return None

    def writes(self, done: int, *, stopping: bool) -> bool:
        """Whether to write a checkpoint after ``done`` steps: a regular one in doubt is left out, with a warning.

        At the end of the run, and on a signal (``stopping``), it is written all the same, as the steps would be lost.
        """
        if stopping or self.enough or done == self.settings.steps:
            return True
        if not self.regular(done):
            return False
        if self.doubt and self.accelerator.is_main_process:
            warnings.warn(f"step {done}: no checkpoint is written, as the run may have {self.doubt}", stacklevel=2)
        return not self.doubt

    def _take(self, line: Line, kept: Collection[int] | None = None) -> str | None:
        """What a line changes, be it new or read again from the log; returns the alarm it raises.

        ``kept``: steps of the checkpoints that are there, of a line that is read again.
        """
        if self.accelerator.scaler is not None:
            line = alarms.without_overflow(line)
        if len(self.early) < EARLY_LINES and LIMITS.keys() <= line.keys():
            self.early.append(line)
        self.recent.append(line)
        cause = self._cause(line)
        warn_only = self.settings.on_unhealthy == "warn"
        self.doubt = None if warn_only else cause or alarms.over_limit(self.early, line)
        self._rank(line, kept)
        return cause

    def _cause(self, line: Line) -> str | None:
        assert self.check is not None
        cause = alarms.not_finite(line)
        if cause is None and set(CHECKED) <= line.keys():
            from_scratch = self.settings.backbone.endswith(".json")
            cause = alarms.collapsed_features(line, self.check.untouched, from_scratch=from_scratch)
        recent = list(self.recent)
        return (
            cause
            or alarms.constant_targets(recent, images=self.settings.batch_size, prototypes=self.prototypes)
            or alarms.divergence(self.early, recent)
        )

    def _remedy(self, folder: RunFolder) -> str:
        checkpoint = folder.latest_checkpoint()
        lower = (
            f"--resume --learning-rate {self.settings.learning_rate / LOWER:.2g} (now {self.settings.learning_rate:g})"
        )
        if checkpoint is None:
            return f"no checkpoint was written yet: give the same command with {lower}, which begins again"
        place = folder.place_of(checkpoint)
        if checkpoint.step == self.doubtful_start:
            found = f"the last checkpoint is {place}, when this had begun (remove it to go on from the one before)"
        else:
            found = f"the last healthy checkpoint is {place}"
        return (
            f"{found}: to go on from there give the same command with {lower}, or with --resume --on-unhealthy warn to "
            "go on as it is"
        )

    def _rank(self, line: Line, kept: Collection[int] | None) -> None:
        """What a line with a check means for an early end and for what may be exported."""
        found, step, patience = score(line), int(line["step"]), self.settings.patience
        if found is None:
            return
        if self.highest is None or found > self.highest[1]:
            self.highest = step, found
        best, top = self.highest
        self.enough = None
        if patience is not None and step - best >= patience and step < self.settings.steps:
            self.enough = f"the effective rank of the patches did not rise above the {top:.3g} of step {best}"
        if (self.regular(step) or self.enough) and not self.doubt and (kept is None or step in kept):
            self.saved[step] = found

    @property
    def _best_first(self) -> list[int]:
        """Steps of the checkpoints that may be exported, of equal ones the earlier one first."""
        return sorted(self.saved, key=lambda step: (-self.saved[step], step))

    def protected(self) -> set[int]:
        """Steps of checkpoints to keep, however old."""
        return set(self._best_first[:1]) if self.settings.select == "health" else set()

    def chosen(self, folder: RunFolder, last: int) -> Checkpoint | None:
        """The best checkpoint that can be read, to be exported; None for the weights after the ``last`` step."""
        kept = folder.checkpoint_steps() if self.settings.select == "health" else []
        for step in self._best_first:
            if step == last:
                return None
            if step in kept:
                try:
                    return folder.checkpoint(step)
                except DamagedError as damage:
                    warnings.warn(f"the best checkpoint, of step {step}, is left out: {damage}", stacklevel=2)
        return None

    def write(self, folder: RunFolder, *, exported: int, last: int) -> None:
        """Write ``health.json``: the untouched model's values, and which of the steps was exported."""
        if self.check is not None and folder.write:
            values = {
                "images": self.check.views.shape[1],
                "untouched": self.check.untouched,
                "exported_step": exported,
                "last_step": last,
            }
            atomic_write_json(folder.path / FILE, values)


def score(line: Line) -> float | None:
    """What ``select`` health and ``patience`` go by, the larger the better; None for a line without a check.

    The effective rank of the patches: RankMe (Garrido et al. 2023) orders whole pre-training runs by it. Within the
    short adaptations of ``training/RESULTS.md`` it was no reliable guide, nor was anything else tried there.
    """
    return line.get("rankme_patches")
