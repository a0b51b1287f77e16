"""Real processes, killed and stopped at any moment: what --resume makes of them equals the run without a stop.

A process is killed by SIGKILL: it can neither finish a write nor tidy up. The moments are drawn with a seed; where in
the work they fall depends on the machine, besides those that wait for a checkpoint that is being written.
"""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Forks, ended
from small_runs import arguments, assert_same_run, logged, ranks_of_two, write_inputs

from glare.checkpoints import TENSORS, folders, read, step_of

POLL_SECONDS = 0.001


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@dataclass(frozen=True)
class Moment:
    """When to kill: ``seconds`` after ``event``, or once ``most`` further steps are in checkpoints."""

    event: str
    seconds: float
    most: int = 1

    def wait(self, run: Path, pid: int) -> None:
        before, began = newest(run), None
        while not ended(pid) and newest(run) <= before + self.most:
            if began is None and self.reached(run, before):
                began = time.monotonic()
            if began is not None and time.monotonic() >= began + self.seconds:
                return
            time.sleep(POLL_SECONDS)

    def reached(self, run: Path, before: int) -> bool:
        return {
            "start": lambda: True,
            "step": lambda: newest(run) > before,
            "checkpoint": lambda: any((run / "checkpoints").glob(".step_*[0-9].partial")),
            "model": lambda: (run / ".model.partial").exists() or (run / "model").exists(),
            "after the model": lambda: (run / "model").exists(),
        }[self.event]()


def newest(run: Path) -> int:
    found = folders(run)
    return step_of(found[0]) if found else 0


def moments(count: int, *, seed: int) -> list[Moment]:
    """Two fifths in the writing of a checkpoint, the others after the start or after a step."""
    rng = random.Random(seed)
    events = [("checkpoint", 0.001), ("step", 0.05), ("checkpoint", 0.002), ("start", 0.6), ("step", 0.15)]
    drawn = [(event, rng.uniform(0, longest)) for event, longest in (events * count)[:count]]
    rng.shuffle(drawn)
    return [Moment(event, seconds) for event, seconds in drawn]


def kill(forks: Forks, command: list[str], run: Path, log: Path, moment: Moment) -> bool:
    """Run until the moment; returns whether the process was killed, which it is unless it had ended."""
    pid = forks.start(command, log)
    moment.wait(run, pid)
    alive = not ended(pid)
    if alive:
        os.kill(pid, signal.SIGKILL)
    code = forks.wait(pid)
    assert code == (-signal.SIGKILL if alive else 0), log.read_text()
    return alive


@pytest.mark.parametrize(("job", "count", "steps"), [("pretrain", 20, 40), ("finetune", 6, 12)])
def test_killed_at_random_moments(forks: Forks, inputs: Path, tmp_path: Path, job: str, count: int, steps: int) -> None:
    keys = {"steps": steps, "checkpoint_every": 1} | ({"eval_every": 2} if job == "finetune" else {})
    straight, run, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    pid = forks.start(arguments(job, inputs, straight, **keys), log)
    again = arguments(job, inputs, run, resume=True, **keys)
    writing = 0
    for moment in moments(count, seed=count):
        assert kill(forks, again, run, log, moment), f"it ended before {moment}"
        writing += any((run / "checkpoints").glob(".step_*[0-9].partial"))
    assert writing >= count // 5, "too few of them fell into the writing of a checkpoint"
    for event in ("model", "after the model"):
        kill(forks, again, run, log, Moment(event, 0.0, most=steps))  # or it was faster, and is done
        assert newest(run) == steps
    last = forks.start(again, log)
    assert (forks.wait(pid), forks.wait(last)) == (0, 0), log.read_text()
    assert_same_run(run, straight)
    assert "is left out" not in log.read_text(), "no kill may harm a checkpoint that was written"


@pytest.mark.parametrize(("job", "number"), [("pretrain", signal.SIGTERM), ("finetune", signal.SIGUSR1)])
def test_a_signal_saves_what_was_done(
    forks: Forks, inputs: Path, tmp_path: Path, job: str, number: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = arguments(job, inputs, run, steps=500, checkpoint_every=3)
    pid = forks.start(command, log)
    Moment("step", 0.05).wait(run, pid)
    os.kill(pid, number)
    assert forks.wait(pid) == 128 + number
    step = newest(run)
    said = log.read_text().splitlines()[-1]
    place = f"{run}/checkpoints/step_{step:06d}"
    assert (
        said == f"stopped by {number.name} with step {step} of 500 done; the checkpoint is {place}; go on with --resume"
    )
    assert [line["step"] for line in logged(run)] == list(range(1, step + 1)), "no finished step is lost"
    assert "Traceback" not in log.read_text()


def test_one_of_two_processes_gets_the_signal_and_both_stop_after_the_same_step(
    forks: Forks, inputs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments("pretrain", inputs, run, steps=500, checkpoint_every=1, batch_size=4)
    pids = [
        forks.start(command, tmp_path / f"log{rank}", environment=environment)
        for rank, environment in enumerate(ranks_of_two())
    ]
    Moment("step", 0.0).wait(run, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert [forks.wait(pid) for pid in pids] == [143, 143], [(tmp_path / f"log{rank}").read_text() for rank in (0, 1)]
    text = (tmp_path / "log0").read_text()
    assert f"stopped by SIGTERM with step {newest(run)} of 500 done" in text
    assert "stopped by" not in (tmp_path / "log1").read_text()


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_no_room_on_the_disk(forks: Forks, inputs: Path, tmp_path: Path, job: str) -> None:
    """The system refuses files above a size, as a full disk does, in the middle of a write."""
    straight, run, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    keys = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1}
    pid = forks.start(arguments(job, inputs, straight, **keys), log)
    again = arguments(job, inputs, run, resume=True, **keys)

    def refused(what: str, file_bytes: int) -> None:
        there, short_log = contents(run), tmp_path / f"refused {Path(what).name}"
        assert forks.wait(forks.start(again, short_log, file_bytes=file_bytes)) == 2
        said = short_log.read_text().splitlines()[-1]
        assert said.startswith(
            f"glare {job}: error: there is no room for {run}/{what} (File too large); what was there"
        )
        assert "Traceback" not in short_log.read_text()
        assert contents(run) == there, "what was there is whole, and nothing half-written is left"

    assert kill(forks, again, run, log, Moment("step", 0.0, most=1))
    done = newest(run)
    size = (folders(run)[0] / TENSORS).stat().st_size
    refused(f"checkpoints/step_{done + 1:06d}", size // 2)
    assert read(folders(run)[0]).step == done
    kill(forks, again, run, log, Moment("model", 0.0, most=4))
    refused("model", 9000)
    last = forks.start(again, log)
    assert (forks.wait(pid), forks.wait(last)) == (0, 0), log.read_text()
    assert_same_run(run, straight)


def test_no_room_for_the_curves_of_tensorboard(forks: Forks, inputs: Path, tmp_path: Path) -> None:
    """Its thread finds that out, and would print a traceback."""
    command = arguments("pretrain", inputs, tmp_path / "run", steps=40, report_to="tensorboard")
    assert forks.wait(forks.start(command, tmp_path / "log", file_bytes=2000)) == 2
    *progress, said = (tmp_path / "log").read_text().splitlines()
    assert said.startswith(
        "glare pretrain: error: there is no room for the files of the run (File too large); what was"
    )
    assert not any("Traceback" in line or "Error" in line for line in progress)


def contents(run: Path) -> dict[str, bytes]:
    """Files in a run folder, without what a killed process was writing and the log, which goes on."""
    files = (path for path in run.rglob("*") if path.is_file() and ".partial" not in str(path))
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.name != "metrics.jsonl"}
