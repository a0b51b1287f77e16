"""Both trainings: what --resume refuses, what a run that broke says of its checkpoints, the speed after a resume."""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from labelled_samples import write_labelled
from PIL import Image
from small_runs import arguments, write_inputs
from tiny_models import tiny_vit

from glare import finetune, finetune_step, pretrain, pretrain_step, runtime
from glare.checkpoints import folders
from glare.cli import main
from glare.errors import NotFiniteError
from glare.resuming import frozen_digest
from glare.runtime import Clock, check_weights

JOBS: dict[str, ModuleType] = {"pretrain": pretrain, "finetune": finetune}
BATCH = {"pretrain": 3, "finetune": 2}
STEADY: dict[str, dict[str, float]] = {
    "pretrain": {
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "momentum": 0.9,
        "momentum_end": 0.9,
        "freeze_last_layer_steps": 0,
    },
    "finetune": {"learning_rate": 1e-3, "backbone_learning_rate": 1e-4, "warmup_steps": 1},
}
"""Keys that would follow from the number of steps."""


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(job: str, tmp_path: Path) -> Callable[..., int]:
    """`run(**keys)`: the exit code of a run in the folder ``run``."""
    write_inputs(tmp_path)
    return lambda **keys: main(arguments(job, tmp_path, tmp_path / "run", **keys))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_resume_refuses_leaves_the_run_as_it_is(
    job: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, **keys: Any) -> None:
        before = contents(tmp_path / "run")
        assert run(resume=True, **keys) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert contents(tmp_path / "run") == before

    assert run(steps=3, checkpoint_every=1) == 0
    refused("has 3 steps, more than the 2 that were asked for", steps=2)
    if job == "pretrain":
        Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "new.png")
    else:
        write_labelled(tmp_path / "scenes" / "train", 6)
    refused("was made with other images: 1 (", steps=3)


def test_parts_of_a_batch_may_differ_where_no_batch_norm_sees_them(
    job: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"steps": 1, "batch_size": 2}
    assert run(**keys) == 0
    before = contents(tmp_path / "run")
    code = run(**keys, gradient_accumulation_steps=2, resume=True)
    if job == "pretrain":
        assert code == 0
        return
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "gradient_accumulation_steps was 1 and is 2; give --resume with the old values" in said
    assert contents(tmp_path / "run") == before


FROZEN = {"pretrain": {"adapter": "uniadapter"}, "finetune": {"train_on": "head"}}


def test_resume_on_another_backbone_in_the_same_place(
    job: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**STEADY[job], **FROZEN[job], "checkpoint_every": 1}
    assert run(steps=1, **keys) == 0
    (tmp_path / "vit").rename(tmp_path / "old")
    tiny_vit("dinov2", seed=1, num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    before = contents(tmp_path / "run")
    assert run(steps=2, resume=True, **keys) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"not those that the run in {tmp_path / 'run'} was made with: its backbone or model was replaced" in said
    assert contents(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "vit")
    (tmp_path / "old").rename(tmp_path / "vit")
    assert run(steps=2, resume=True, **keys) == 0


def test_resume_with_more_steps_names_what_follows_from_them(
    job: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    steps, key, old, new = {"pretrain": (4, "momentum", 0.75, 0.875), "finetune": (10, "warmup_steps", 1, 2)}[job]
    assert run(steps=steps) == 0
    assert run(steps=2 * steps, resume=True) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{key} was {old} and is {new}" in said
    assert f"follows from steps (was {steps} and is {2 * steps}): give --resume with --steps {steps}, or with" in said
    stated = dict(word.rstrip(",").split("=") for word in said.split("the old values: ")[1].split() if "=" in word)
    assert stated[key] == str(old)
    assert run(steps=steps + 1, resume=True, **stated) == 0, "the remedy is possible"


def test_a_run_is_alone_in_its_folder(
    job: str, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = JOBS[job], []
    real = module.train_step  # type: ignore[attr-defined]

    def train_step(*arguments: Any, **named: Any) -> Any:
        handle = os.open(tmp_path / "run", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        seen.append(handle)
        return real(*arguments, **named)

    monkeypatch.setattr(module, "train_step", train_step)
    assert run(steps=1) == 0 and len(seen) == 1
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again, though this process lives on
    os.close(handle)


def test_weights_that_do_not_train_are_told_apart_by_their_bits() -> None:
    layer = torch.nn.Linear(4, 3).requires_grad_(False)
    found = {frozen_digest(layer)}
    assert frozen_digest(layer) in found
    for change in ("a bit", "rows", "shape", "dtype", "a number"):
        other = torch.nn.Linear(4, 3).requires_grad_(False)
        other.load_state_dict(layer.state_dict())
        weight = other.weight.data
        if change == "a bit":
            weight.view(torch.int32)[1, 2] ^= 1
        elif change == "rows":
            other.weight.data = weight[[1, 0, 2]]
        elif change == "shape":
            other.weight.data = weight.reshape(4, 3)
        elif change == "dtype":
            other.bfloat16()
        else:
            other.bias.data[0] += 1
        found.add(frozen_digest(other))
    assert len(found) == 6
    layer.weight.requires_grad_(True)  # it is in the checkpoint now
    before = frozen_digest(layer)
    layer.weight.data += 1
    assert frozen_digest(layer) == before and before not in found


def test_scores_on_the_way_and_at_the_end_go_to_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    sent: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(finetune.Accelerator, "log", lambda _, values, step: sent.append((step, values)))
    assert main(arguments("finetune", tmp_path, tmp_path / "run", steps=3, eval_every=2)) == 0
    assert [step for step, values in sent if set(values) == {"miou", "aacc", "macc"}] == [2, 3]


def broken_after(job: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss be NaN after so many steps of this process."""
    module = pretrain_step if job == "pretrain" else finetune_step
    real, done = module.added_up, itertools.count()

    def added_up(values: dict[str, torch.Tensor], accelerator: Any) -> dict[str, torch.Tensor]:
        found = real(values, accelerator)
        losses = [name for name in found if name.startswith("loss")]
        if losses and next(done) >= steps:
            found[losses[0]] = found[losses[0]] * torch.nan
        return found

    monkeypatch.setattr(module, "added_up", added_up)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_that_broke_names_its_last_healthy_checkpoint(
    job: str,
    steps: int,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken_after(job, steps, monkeypatch)
    assert run(steps=5, checkpoint_every=2) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the loss became nan at step {steps + 1}" in said and "lower learning_rate (now" in said
    place = tmp_path / "run" / "checkpoints" / "step_000002"
    there = f"the last healthy checkpoint is {place}: go on from there with --resume"
    assert said.endswith(there if steps else "no checkpoint was written yet, so --resume begins at the first step")
    monkeypatch.undo()
    assert run(steps=5, checkpoint_every=2, learning_rate=1e-5, resume=True) == 0, "the remedy is possible"
    assert "resumed with another recipe: learning_rate was" in capsys.readouterr().out


def test_weights_that_are_not_finite_become_no_checkpoint(
    job: str,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = JOBS[job].TrainState if job == "pretrain" else JOBS[job].SegmenterState  # type: ignore[attr-defined]
    real, calls = state.tensors, itertools.count(1)

    def tensors(self: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = real(self)
        name = min(found)
        return found if next(calls) < 2 else {**found, name: torch.full_like(found[name], torch.inf)}

    monkeypatch.setattr(state, "tensors", tensors)
    assert run(steps=5, checkpoint_every=2) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 tensors, such as " in said and " not finite after step 4; lower the learning rate" in said
    assert f"the last healthy checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_000002'}: go on" in said
    assert [path.name for path in folders(tmp_path / "run")] == ["step_000002"]


def test_whole_numbers_are_finite() -> None:
    check_weights({"count": torch.tensor(3), "weight": torch.zeros(2)}, 1)
    with pytest.raises(NotFiniteError, match="such as weight"):
        check_weights({"count": torch.tensor(3), "weight": torch.tensor([0.0, torch.nan])}, 1)


def test_the_speed_after_a_resume_is_that_of_its_steps(
    job: str, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that the steps move: a second each, but fifty the first of a process; a checkpoint takes seven."""
    now, module = [0.0], JOBS[job]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])

    def takes(seconds: list[float], real: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **named: Any) -> Any:
            now[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]
            return real(*arguments, **named)

        return slow

    step, write = module.train_step, module.RunFolder.write_checkpoint  # type: ignore[attr-defined]
    monkeypatch.setattr(module.RunFolder, "write_checkpoint", takes([7.0], write))  # type: ignore[attr-defined]
    for steps in (4, 12):
        monkeypatch.setattr(module, "train_step", takes([50.0, 1.0], step))
        assert run(steps=steps, log_every=3, checkpoint_every=4, resume=steps > 4, **STEADY[job]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = {line["step"]: line["images_per_second"] for line in lines if "images_per_second" in line}
    assert set(speeds) >= {3, 6, 9, 12}
    assert speeds == pytest.approx(dict.fromkeys(speeds, BATCH[job]))


def test_a_clock_stands_still_while_it_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 9.0, 10.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(times))
    clock = Clock()
    with clock.paused():
        pass
    assert clock.elapsed == 3.0
