"""What a watch decides, on made-up lines without a run: when to end early, what to save, and the same after a stop."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glare import health_watch
from glare.alarms import EARLY_LINES, GRADIENT_LIMIT, IN_A_ROW, Line
from glare.checkpoints import Checkpoint, DamagedError
from glare.errors import UserError
from glare.health_watch import CHECK_EVERY, HealthWatch, WatchSettings, check_watch

HEALTH: Line = {"rankme_cls": 4.0, "rankme_patches": 20.0, "feature_std": 1.0, "cosine_to_base": 0.9}
SETTINGS = WatchSettings(
    backbone="vit",
    learning_rate=1e-3,
    batch_size=8,
    on_unhealthy="stop",
    select="last",
    patience=None,
    steps=1000,
    checkpoint_every=100,
)


class Folder:
    """What a watch asks of a run folder."""

    path = Path("run")

    def __init__(self, lines: Sequence[Line] = (), kept: Sequence[int] = (), damaged: Sequence[int] = ()) -> None:
        self._lines, self.kept, self.damaged = lines, kept, damaged

    def lines(self) -> list[Line]:
        # a number that is not finite is null in the log
        return [{name: value for name, value in line.items() if math.isfinite(value)} for line in self._lines]

    def checkpoint_steps(self) -> list[int]:
        return sorted(self.kept, reverse=True)

    def checkpoint(self, step: int) -> Checkpoint:
        if step in self.damaged:
            raise DamagedError(f"half of {step}")
        return Checkpoint(step, {}, {}, 0)

    def latest_checkpoint(self) -> Checkpoint | None:
        return self.checkpoint(max(self.kept)) if self.kept else None

    def place_of(self, checkpoint: Checkpoint) -> Path:
        return self.path / str(checkpoint.step)


class Check:
    """A check that always finds the same."""

    def __init__(self) -> None:
        self.untouched = dict(HEALTH)

    def measure(self, _: object) -> dict[str, float]:
        return dict(HEALTH)


def watch(*, fp16: bool = False, main: bool = True, **changes: Any) -> HealthWatch:
    accelerator: Any = SimpleNamespace(scaler=object() if fp16 else None, is_main_process=main)
    check: Any = Check()
    return HealthWatch(replace(SETTINGS, **changes), check, accelerator, prototypes=512)


def line(step: int, rank: float | None = None, **values: float) -> Line:
    found = {"step": step, "loss": 10.0, "grad_norm": 1.0, "teacher_entropy": 3.0, "marginal_entropy": 6.0, **values}
    return found if rank is None else {**found, **HEALTH, "rankme_patches": rank}


def judged(watched: HealthWatch, lines: Sequence[Line]) -> list[str | None]:
    folder: Any = Folder()
    return [watched.judge(one, folder) for one in lines]


def resumed(lines: Sequence[Line], kept: Sequence[int], start: int, **settings: Any) -> HealthWatch:
    folder: Any = Folder(lines, kept)
    found = watch(**settings)
    found.resume(folder, start)
    return found


@pytest.mark.parametrize("select", ["last", "health"])
def test_a_rank_that_rises_at_every_check_ends_no_run(select: str) -> None:
    watched = watch(select=select, patience=50)
    for step in range(10, 1000, 10):
        judged(watched, [line(step, 20 + step / 100 if step % 30 == 10 else None)])
        assert watched.enough is None


def test_patience_counts_all_checks_and_ends_with_a_checkpoint() -> None:
    watched = watch(select="health", patience=60)
    judged(watched, [line(100, 10.0), line(130, 30.0), line(160, 29.0), line(180)])
    assert watched.enough is None and not watched.writes(180, stopping=False)
    judged(watched, [line(190, 28.0)])
    assert watched.enough == "the effective rank of the patches did not rise above the 30 of step 130"
    assert watched.writes(190, stopping=False)
    assert watched.saved == {100: 10.0, 190: 28.0}, "the end is one of the checkpoints to choose from"


def test_at_its_last_step_a_run_does_not_end_early() -> None:
    watched = watch(patience=60, steps=190)
    judged(watched, [line(130, 30.0), line(190, 28.0)])
    assert watched.enough is None and watched.writes(190, stopping=False)


@pytest.mark.parametrize(
    ("patience", "log_every", "checkpoint_every", "least"), [(29, 10, 100, 30), (24, 1, 100, 25), (9, 10, 10, 10)]
)
def test_a_patience_that_no_check_can_meet_is_refused(
    patience: int, log_every: int, checkpoint_every: int, least: int
) -> None:
    recipe = SimpleNamespace(select="last", patience=patience, log_every=log_every, checkpoint_every=checkpoint_every)
    with pytest.raises(UserError, match=rf"patience is {patience} steps.*every {least} steps; give at least {least}"):
        check_watch(recipe)
    recipe.patience = least
    check_watch(recipe)


def test_a_bad_line_keeps_back_only_what_may_be_written_later() -> None:
    watched = watch()
    judged(watched, [line(step) for step in (10, 20, 30, 40)])
    judged(watched, [line(100, 20.0, grad_norm=1e4)])
    assert watched.writes(100, stopping=True), "a signal: the steps would be lost"
    said = "step 100: no checkpoint is written, as the run may have diverged: the gradient norm is 1e"
    with pytest.warns(UserWarning, match=said):
        assert not watched.writes(100, stopping=False)
    judged(watched, [line(1000, 20.0, grad_norm=1e4)])
    assert watched.writes(1000, stopping=False), "the last step"
    assert watched.saved == {}, "but none to be chosen for its health"


def test_after_a_stop_in_doubt_the_remedy_does_not_call_its_checkpoint_healthy() -> None:
    lines = [line(step) for step in (10, 20, 30)] + [line(40, loss=99.0)]
    folder: Any = Folder(lines, kept=[44])
    watched = watch()
    watched.resume(folder, 44)
    assert watched.judge(line(50, loss=99.0), folder) is None
    said = str(watched.judge(line(60, loss=99.0), folder))
    assert "the last checkpoint is run/44, when this had begun (remove it" in said and "last healthy" not in said


def test_of_the_loss_scaled_for_fp16_an_overflow_says_nothing() -> None:
    norms = [math.inf, 1.0, math.nan, 1.0, 1.0, *[GRADIENT_LIMIT + 1] * IN_A_ROW]
    lines = [line(10 * n + 10, 20.0 if n == 0 else None, grad_norm=norm) for n, norm in enumerate(norms)]
    watched = watch(fp16=True)
    found = judged(watched, lines)
    assert found[:-1] == [None] * (len(lines) - 1)
    assert "gradient norm is 101, more than 100 times the 1 it began with" in str(found[-1])
    again = resumed(lines, [], 80, fp16=True)
    assert again.early == watched.early and len(again.early) == EARLY_LINES
    assert list(again.recent) == list(watched.recent)


def test_an_overflow_keeps_no_checkpoint_back() -> None:
    watched = watch(fp16=True)
    judged(watched, [line(step, grad_norm=math.inf if step == 100 else 1.0) for step in (10, 20, 30, 100)])
    assert watched.writes(100, stopping=False)


def test_the_checkpoint_of_a_signal_is_not_chosen_after_it() -> None:
    lines = [line(100, 30.0), line(130, 90.0), line(200, 20.0, grad_norm=1e4), line(300, 25.0)]
    lines = [*(line(step) for step in (10, 20, 30)), *lines]
    straight = watch(select="health")
    judged(straight, lines)
    found = resumed(lines, [100, 130, 200, 300], 300, select="health")
    assert found.saved == straight.saved == {100: 30.0, 300: 25.0}
    assert found.protected() == {100}
    assert resumed(lines, [300], 300, select="health").protected() == {300}, "of those that are there"


def test_an_early_end_is_the_same_after_a_stop() -> None:
    lines = [line(100, 30.0), line(130, 29.0), line(160, 28.0)]
    straight = watch(patience=60, select="health")
    judged(straight, lines)
    found = resumed(lines, [100, 160], 160, patience=60, select="health")
    assert found.enough == straight.enough is not None
    assert found.saved == straight.saved == {100: 30.0, 160: 28.0}
    assert resumed(lines, [100, 160], 160, patience=90, select="health").enough is None


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best() -> None:
    watched = watch(select="health")
    judged(watched, [line(100, 20.0), line(200, 40.0), line(300, 30.0), line(400, 10.0)])
    folder: Any = Folder(kept=[200, 300, 400])
    best = watched.chosen(folder, 400)
    assert best is not None and best.step == 200
    folder.damaged = [200]
    with pytest.warns(UserWarning, match=r"best checkpoint, of step 200, is left out: half of 200"):
        best = watched.chosen(folder, 400)
    assert best is not None and best.step == 300
    folder.damaged, folder.kept = [200], [200, 400]
    with pytest.warns(UserWarning, match="step 200"):
        assert watched.chosen(folder, 400) is None, "the last step"


def test_all_processes_check_after_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shared-out blocks each measures; another one may see a log that the first has not brought back yet."""
    sent: list[Any] = []
    first = watch()
    monkeypatch.setattr(health_watch, "broadcast_object_list", lambda values: sent.append(values) or values)
    rewound: Any = Folder([])
    first.resume(rewound, 0)
    other = watch(main=False)
    monkeypatch.setattr(health_watch, "broadcast_object_list", lambda _: sent[0])
    stale: Any = Folder([line(10, 20.0), line(30, 20.0)])
    other.resume(stale, 0)
    student: Any = SimpleNamespace(backbone=None)
    for step in range(10, 100, 10):
        assert bool(first.measure(student, step)) == bool(other.measure(student, step)) == (step % 30 == 10)
    assert CHECK_EVERY == 25
