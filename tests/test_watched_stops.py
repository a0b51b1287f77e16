"""Watched runs that end early, stop on a signal, or find their best checkpoint damaged, as a user sees them."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import arguments, assert_same_run, logged, write_inputs

from glare import cli, health_watch, pretrain
from glare.checkpoints import TENSORS, folders, step_of

KEYS: dict[str, object] = {"steps": 6, "checkpoint_every": 4, "select": "health", "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def best_at_step_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line has a check, and that of step 3 is the best."""
    monkeypatch.setattr(health_watch, "CHECK_EVERY", 1)
    monkeypatch.setattr(health_watch, "score", lambda line: 10 - abs(line["step"] - 3))


def after(step: int, then: Callable[[], object]) -> Callable[..., Any]:
    """``train_step``, with something that happens at the end of one of the steps."""
    real = pretrain.train_step

    def stepping(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        if kwargs["step"] == step - 1:
            then()
        return found

    return stepping


def steps(run: Path) -> list[int]:
    return [step_of(folder) for folder in folders(run)]


def exported(run: Path) -> int:
    return int(json.loads((run / "health.json").read_text())["exported_step"])


def test_a_stop_by_a_signal_changes_no_choice(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert cli.main(arguments("pretrain", inputs, straight, **KEYS)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", after(3, lambda: signal.raise_signal(signal.SIGTERM)))
        assert cli.main(arguments("pretrain", inputs, run, **KEYS)) == 143
    assert steps(run) == [3]
    assert cli.main(arguments("pretrain", inputs, run, resume=True, **KEYS)) == 0
    assert exported(run) == exported(straight) == 4
    assert_same_run(run, straight)


def test_an_early_end_is_said_and_saved(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    keys = {"steps": 20, "checkpoint_every": 20, "patience": 2}
    assert cli.main(arguments("pretrain", inputs, run, **keys)) == 0
    said = (
        "ended early after step 5: the effective rank of the patches did not rise above the 10 of step 3 (patience 2)"
    )
    assert said in capsys.readouterr().out
    assert steps(run) == [5] and exported(run) == 5
    assert cli.main(arguments("pretrain", inputs, run, resume=True, **keys)) == 0
    assert said in capsys.readouterr().out and len(logged(run)) == 5


def test_a_damaged_best_checkpoint_costs_no_training(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage() -> None:
        (tmp_path / "checkpoints" / "step_000004" / TENSORS).write_bytes(b"half")

    monkeypatch.setattr(pretrain, "train_step", after(6, damage))
    with pytest.warns(UserWarning, match=r"best checkpoint, of step 4, is left out: .*hash"):
        assert cli.main(arguments("pretrain", inputs, tmp_path, **KEYS)) == 0
    assert exported(tmp_path) == 6 and (tmp_path / "model").exists()


def test_a_signal_saves_no_state_that_is_not_finite(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two lines of the log nothing has looked at the gradients yet."""
    real = Accelerator.backward

    def backward(self: Accelerator, loss: torch.Tensor) -> None:
        real(self, loss * torch.nan if started == 5 else loss)

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started = kwargs["step"] + 1
        return stopped(*args, **kwargs)

    started, stopped = 0, after(5, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(Accelerator, "backward", backward)
    monkeypatch.setattr(pretrain, "train_step", step)
    keys = {"steps": 8, "checkpoint_every": 2, "log_every": 8}
    assert cli.main(arguments("pretrain", inputs, tmp_path, **keys)) == 2
    said = capsys.readouterr().err
    assert "are not finite after step 5" in said and "the last healthy checkpoint is" in said
    assert steps(tmp_path) == [4, 2]
