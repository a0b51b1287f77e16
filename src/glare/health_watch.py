"""Watching a pre-training run: when its health is checked, when it stops, and which of its steps is exported.

All that is decided follows from the lines of the log, so that a resumed run decides as one that never stopped. The main
process measures and decides, the others hear of it.
"""

import math
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, Self

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from glare import alarms
from glare.alarms import CHECKED, EARLY_LINES, IN_A_ROW, Line
from glare.crops import PackedImages
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

    @classmethod
    def of(cls, recipe: Any) -> Self:
        """Of a resolved recipe, which has fields of the same names."""
        return cls(**{name: getattr(recipe, name) for name in cls.__dataclass_fields__})


class HealthWatch:
    """The watch of one run over the lines of its log.

    ``healthy``: the last line gave no cause for concern, so a checkpoint may be written. ``enough``: the run is to end
    early, the same on all processes. ``latest``: the values of the last check. ``best``: (step, score) of the
    check that scores best so far.
    """

    def __init__(
        self, settings: WatchSettings, check: HealthCheck | None, accelerator: Accelerator, *, prototypes: int
    ) -> None:
        """``check``: on the main process at least; ``prototypes`` are those of the objective's head, if it has one."""
        self.settings, self.check, self.accelerator, self.prototypes = settings, check, accelerator, prototypes
        self.healthy, self.enough = True, False
        self.latest: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
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
        """Take up the log of the ``start`` steps that a resumed run has behind it."""
        if self.check is not None:
            kept = folder.checkpoint_steps()
            for line in folder.lines():
                self._remember(line)
                self._consider(line, saved=line["step"] in kept)
                if CHECKED[0] in line:
                    self.checked = int(line["step"])
        self._end_early(start)

    def measure(self, student: Student, done: int, *, saves: bool) -> dict[str, float]:
        """A check where one is due after ``done`` steps, else nothing.

        One is due before a checkpoint (``saves``), on the first line of the log, and ``CHECK_EVERY`` steps after the
        last one.
        """
        if self.check is None or not (saves or done - self.checked >= CHECK_EVERY):
            return {}
        self.checked = done
        self.latest = self.check.measure(student.backbone)
        return self.latest

    def judge(self, line: Line, folder: RunFolder, *, saves: bool) -> str | None:
        """What follows from the newest line: nothing, a warning, or, on all processes alike, why the run stops.

        That is the cause, the step, the last healthy checkpoint and the remedy.
        """
        cause = None
        if self.check is not None:
            self._remember(line)
            cause = self._cause(line)
            warn_only = self.settings.on_unhealthy == "warn"
            self.healthy = warn_only or not (cause or alarms.over_limit(self.early, line))
            self._consider(line, saved=saves and self.healthy)
        cause, self.healthy = broadcast_object_list([cause, self.healthy])
        self._end_early(int(line["step"]))
        if cause is None:
            return None
        kind = cause.partition(":")[0]
        if self.settings.on_unhealthy == "stop" or kind == "not finite":
            return f"step {line['step']:.0f}: {cause}; {self._remedy(folder)}"
        if kind not in self.warned and self.check is not None:
            self.warned.add(kind)
            warnings.warn(f"step {line['step']:.0f}: {cause}; the run goes on", stacklevel=2)
        return None

    def _remember(self, line: Line) -> None:
        if len(self.early) < EARLY_LINES:
            self.early.append(line)
        self.recent.append(line)

    def _cause(self, line: Line) -> str | None:
        assert self.check is not None
        if self.accelerator.scaler is not None and not math.isfinite(line["grad_norm"]):
            line = {**line, "grad_norm": 0.0}  # of fp16: the step was left out, the scale lowered
        cause = alarms.not_finite(line)
        if cause is None and CHECKED[0] in line:
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
        return (
            f"the last healthy checkpoint is {folder.place_of(checkpoint)}: to go on from there give the same command "
            f"with {lower}, or with --resume --on-unhealthy warn to go on as it is"
        )

    def _consider(self, line: Line, *, saved: bool) -> None:
        """Whether a line with a check is the best so far; what is to be exported has to have its checkpoint."""
        found = score(line)
        if found is None or not (saved or self.settings.select == "last"):
            return
        if self.best is None or found > self.best[1]:
            self.best = int(line["step"]), found

    def _end_early(self, done: int) -> None:
        patience = self.settings.patience
        waited = patience is not None and self.best is not None and done - self.best[0] >= patience
        (self.enough,) = broadcast_object_list([waited])

    def protected(self) -> set[int]:
        """Steps of checkpoints to keep, however old."""
        return {self.best[0]} if self.settings.select == "health" and self.best else set()

    def chosen(self, last: int) -> int:
        """The step whose weights are to be exported, ``last`` or the best checkpoint's."""
        return self.best[0] if self.settings.select == "health" and self.best else last

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
