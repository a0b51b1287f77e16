"""SIGTERM, SIGUSR1 and Ctrl-C: the step is finished and saved, the message says how to go on, handlers come back."""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, assert_same_run, logged, write_inputs
from tqdm import tqdm

from glare import cli, finetune, preemption, pretrain
from glare.checkpoints import folders
from glare.errors import Stopped
from glare.preemption import Signals

CODES = [(signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1), (signal.SIGINT, 130)]
HANDLERS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,  # which a shell that starts the tests in the background sets to SIG_IGN
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``straight(job, **keys)``: the folder of a run without a stop, to be read only."""

    @cache
    def run(job: str, **keys: int) -> Path:
        folder = tmp_path_factory.mktemp(job) / "straight"
        assert cli.main(arguments(job, inputs, folder, **keys)) == 0
        return folder

    return run


@pytest.fixture(autouse=True)
def same_handlers_afterwards() -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == HANDLERS


def then_signal(function: Callable[..., Any], number: int, *, call: int = 1) -> Callable[..., Any]:
    """``function``, during whose ``call``-th call a signal comes."""
    calls: list[int] = []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*args, **kwargs)

    return signalled


@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize("job", [pretrain, finetune])
def test_the_step_is_finished_and_saved(
    inputs: Path,
    straight: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: Any,
    number: signal.Signals,
    code: int,
) -> None:
    name, run = job.__name__.removeprefix("glare."), tmp_path / "run"
    keys = {"steps": 4, "checkpoint_every": 3, "log_every": 2}
    expected = straight(name, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(job, "train_step", then_signal(job.train_step, number, call=2))
        assert cli.main(arguments(name, inputs, run, **keys)) == code
    said = capsys.readouterr().err.splitlines()[-1]
    who, start = ("Ctrl-C", f"glare {name}: error: ") if number == signal.SIGINT else (number.name, "")
    place = f"{run}/checkpoints/step_000002"
    assert said == f"{start}stopped by {who} with step 2 of 4 done; the checkpoint is {place}; go on with --resume"
    assert [line["step"] for line in logged(run)] == [2]
    assert cli.main(arguments(name, inputs, run, resume=True, **keys)) == 0
    assert_same_run(run, expected)


@pytest.mark.parametrize(("job", "reading"), [(pretrain, "open_feed"), (finetune, "pack_labelled")])
def test_before_the_first_step_a_run_ends_at_once(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: Any,
    reading: str,
) -> None:
    monkeypatch.setattr(job, reading, then_signal(getattr(job, reading), signal.SIGTERM))
    command = arguments(job.__name__.removeprefix("glare."), inputs, tmp_path / "run", steps=2)
    assert cli.main(command) == 143
    said = "stopped by SIGTERM before any step; nothing is lost, give the command again with --resume"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert cli.main([*command, "--resume"]) == 0


def test_a_signal_in_the_last_evaluation_loses_no_step(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments("finetune", inputs, tmp_path, steps=2, checkpoint_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "confusion", then_signal(finetune.confusion, signal.SIGTERM))
        assert cli.main(command) == 143
    assert "stopped by SIGTERM with step 2 of 2 done; the checkpoint is" in capsys.readouterr().err
    assert not (tmp_path / "eval.json").exists()
    monkeypatch.setattr(finetune, "train_step", None)
    assert cli.main([*command, "--resume"]) == 0
    assert (tmp_path / "eval.json").exists()


def test_an_evaluation_that_was_cut_off_is_done_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"steps": 4, "checkpoint_every": 2, "eval_every": 2}
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert cli.main(arguments("finetune", inputs, straight, **keys)) == 0

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("judge", "cut_batch"):  # in the evaluation, and after it
        with monkeypatch.context() as patch:
            patch.setattr(finetune, place, killed)
            if place == "judge":
                assert cli.main(arguments("finetune", inputs, run, **keys)) == 130
            else:
                assert cli.main(arguments("finetune", inputs, run, resume=True, **keys)) == 130
                assert "miou" in logged(run)[-1]
    assert cli.main(arguments("finetune", inputs, run, resume=True, **keys)) == 0
    assert [line["step"] for line in logged(straight) if "miou" in line] == [2]
    assert_same_run(run, straight)


def test_a_resumed_run_fits_no_head_that_the_checkpoint_replaces(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments("pretrain", inputs, tmp_path, steps=1)
    assert cli.main(command) == 0
    assert "head_init: data" in (tmp_path / "recipe.yaml").read_text()
    monkeypatch.setattr(pretrain, "fit_head", None)
    assert cli.main([*command, "--resume"]) == 0


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
@pytest.mark.parametrize("state", ["no model", "half a model", "a model without the rest"])
def test_after_the_last_step_the_model_is_made_without_a_step(
    straight: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, state: str
) -> None:
    run = tmp_path / "run"
    expected = straight(job, steps=2, checkpoint_every=2)
    shutil.copytree(expected, run)
    for made in (run / name for name in ("model", "adapter", "report", "price.json", "eval.json")):
        if made.is_dir() and not (made.name == "model" and state == "a model without the rest"):
            shutil.rmtree(made)
        elif made.is_file():
            made.unlink()
    if state == "half a model":
        (run / ".model.partial").mkdir()
        (run / ".model.partial" / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(f"glare.{job}.train_step", None)
    # the recipe that the run itself has written, with the output where it is now
    assert cli.main([job, "--recipe", str(run / "recipe.yaml"), "--output", str(run), "--resume"]) == 0
    assert_same_run(run, expected)


class OneProcess:
    num_processes, process_index = 1, 0
    ended = False

    def wait_for_everyone(self) -> None:
        """One process has nobody to wait for."""

    def end_training(self) -> None:
        self.ended = True


class Second(OneProcess):
    """The second of two processes, whose first has got a signal."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, of_the_first: int) -> None:
        self.of_the_first = of_the_first

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tensor([self.of_the_first]), mine])


def holding(signals: Signals, run: Path) -> Signals:
    signals.hold(run, tqdm(total=5, disable=True))
    return signals


def test_all_processes_stop_when_one_has_the_signal(tmp_path: Path) -> None:
    with Signals() as signals:
        holding(signals, tmp_path)
        assert not signals.asked(Second(0))
        assert signals.asked(Second(signal.SIGTERM))
        signal.raise_signal(signal.SIGTERM)  # sent to all, it comes here a moment later and is no second one
        with pytest.raises(Stopped) as stopped:
            signals.release(Second(0))
    assert stopped.value.code == 143


def test_a_signal_that_comes_while_the_processes_agree_counts_after_the_next_step(tmp_path: Path) -> None:
    class Late(Second):
        def gather(self, mine: torch.Tensor) -> torch.Tensor:
            signal.raise_signal(signal.SIGTERM)
            return super().gather(mine)

    with Signals() as signals:
        holding(signals, tmp_path)
        assert not signals.asked(Late(0))
        assert signals.asked(Second(0))


def test_a_signal_after_the_last_step_waits_for_nobody(tmp_path: Path) -> None:
    class Alone(Second):
        def wait_for_everyone(self) -> None:
            raise AssertionError("the others go on and never come")

    with Signals() as signals:
        holding(signals, tmp_path)
        assert not signals.asked(Alone(0))
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signals.release(Alone(0))


def test_a_second_signal_ends_at_once_but_not_the_first_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    with Signals() as signals:
        holding(signals, tmp_path)
        signal.raise_signal(signal.SIGINT)
        assert "stopping after this step; Ctrl-C again stops at once" in capfd.readouterr().err
        now[0] += 1.9
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked(OneProcess())
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt, match=r"stopped by Ctrl-C in .*, before its first checkpoint; --resume"):
            signal.raise_signal(signal.SIGINT)


def test_without_a_signal_nothing_happens(tmp_path: Path) -> None:
    accelerator = OneProcess()
    with Signals() as signals:
        holding(signals, tmp_path)
        assert not signals.asked(accelerator)
        signals.release(accelerator)
        assert not accelerator.ended
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGUSR1)


def test_the_handler_of_a_scheduler_s_plug_in_comes_last(tmp_path: Path) -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
    try:
        with Signals() as signals:
            holding(signals, tmp_path)
            signal.raise_signal(signal.SIGUSR1)
            assert not taken
            with pytest.raises(Stopped):
                signals.release(OneProcess())
        assert taken == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_a_run_takes_no_signals(inputs: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(cli.main(arguments("pretrain", inputs, tmp_path / "run", steps=1)))
    )
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("job", [pretrain, finetune])
def test_the_number_of_checkpoints_may_change(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Any
) -> None:
    def kept(code: int, **keys: object) -> list[str]:
        name = job.__name__.removeprefix("glare.")
        assert cli.main(arguments(name, inputs, tmp_path, steps=5, checkpoint_every=1, **keys)) == code
        return [path.name for path in reversed(folders(tmp_path))]

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_step", then_signal(job.train_step, signal.SIGTERM, call=4))
        assert kept(143, keep_checkpoints=3) == ["step_000002", "step_000003", "step_000004"]
    assert kept(0, keep_checkpoints=1, resume=True) == ["step_000005"]


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_at_least_one_checkpoint_is_kept(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    assert cli.main(arguments(job, inputs, tmp_path, keep_checkpoints=0)) == 2
    assert capsys.readouterr().err == f"glare {job}: error: keep_checkpoints is 0; give at least 1\n"
