"""A checkpoint gives back the bits it was given, or is not used; a full disk leaves the one before it."""

import errno
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from glare import checkpoints
from glare.checkpoints import Checkpoint
from glare.disk_space import room_for
from glare.errors import UserError
from glare.run_folder import RunFolder, atomic_write_text
from glare.runtime import restore_scaler, scaler_state

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, write=True)


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def found(folder: RunFolder) -> Checkpoint:
    checkpoint = folder.latest_checkpoint()
    assert checkpoint is not None
    return checkpoint


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_gives_back_the_same_bits(folder: RunFolder) -> None:
    shared = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "whole": shared,
        "view": shared[1:3],
        "transposed": shared.t(),
        "again": shared,
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "count": torch.tensor(2**60),
        "random": torch.Generator().manual_seed(1).get_state(),
        "half": shared.to(torch.bfloat16),
        "mask": shared > 0,
        "empty": torch.empty(0, 3),
        "trained": torch.nn.Parameter(torch.tensor([math.nan, -0.0])),
    }
    folder.write_checkpoint(120, tensors, {"momentum": 0.1 + 0.2, "best": math.inf, "step": "mine"})
    assert names(folder) == ["step_000120"]
    read = found(folder)
    assert read.step == 120
    assert read.state == {"momentum": 0.1 + 0.2, "best": math.inf, "step": "mine"}
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert read.tensors[name].shape == tensor.shape
        assert bits(read.tensors[name]) == bits(tensor)


def test_anybody_can_check_the_hashes(folder: RunFolder) -> None:
    folder.write_checkpoint(3, {"a": torch.zeros(2)}, {})
    command = ["sha256sum", "--check", "--strict", checkpoints.HASHES]
    done = subprocess.run(command, cwd=folder.path / "checkpoints/step_000003", capture_output=True, check=False)
    assert done.stdout.decode().splitlines() == ["state.safetensors: OK", "state.json: OK"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_all_files_obey_the_umask(folder: RunFolder, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder.write_checkpoint(3, {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.path / "checkpoints/step_000003").iterdir()}
    assert modes == dict.fromkeys((checkpoints.TENSORS, checkpoints.STATE, checkpoints.HASHES), 0o666 & ~mask)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept_and_one_may_be_written_again(folder: RunFolder, keep: int) -> None:
    for step in (5, 900, 1_000_000, 1_100_000, 1_100_000):
        folder.write_checkpoint(step, {"a": torch.tensor(step)}, {}, keep=keep)
    kept = ["step_000900", "step_1000000", "step_1100000"][-keep:]
    assert names(folder) == sorted(kept)
    assert int(found(folder).tensors["a"]) == 1_100_000


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "short":
        file.write_bytes(content[:-3])
    elif how == "half":
        file.write_bytes(content[: len(content) // 2])
    else:  # one bit in the middle, which no reader of JSON or safetensors has to notice
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.HASHES])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "half", "bit"])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(folder: RunFolder, name: str, how: str) -> None:
    for step in (1, 2):
        folder.write_checkpoint(step, {"a": torch.arange(100)}, {"b": step})
    damage(folder.path / "checkpoints/step_000002" / name, how)
    with pytest.warns(UserWarning, match=r"step_000002 is left out: .*(hash|No such file)"):
        read = found(folder)
    assert (read.step, read.state) == (1, {"b": 1})


def test_the_list_of_hashes_may_be_cut_anywhere(folder: RunFolder) -> None:
    folder.write_checkpoint(1, {"a": torch.arange(3)}, {})
    whole = folder.path / "checkpoints/step_000001"
    listed = (whole / checkpoints.HASHES).read_bytes()
    for length in range(len(listed) - 1):  # without the last line break nothing is missing
        (whole / checkpoints.HASHES).write_bytes(listed[:length])
        with pytest.raises(checkpoints.DamagedError):
            checkpoints.read(whole)


@pytest.mark.parametrize("state", ["3.5", '"x"', "null", "[]", '{"step": 1}'])
def test_a_state_of_another_form_is_damage_though_its_hash_is_right(folder: RunFolder, state: str) -> None:
    folder.write_checkpoint(1, {"a": torch.arange(3)}, {})
    whole = folder.path / "checkpoints/step_000001"
    before = checkpoints._hash(whole / checkpoints.STATE)
    (whole / checkpoints.STATE).write_text(state)
    listed = (whole / checkpoints.HASHES).read_text()
    (whole / checkpoints.HASHES).write_text(listed.replace(before, checkpoints._hash(whole / checkpoints.STATE)))
    with pytest.raises(checkpoints.DamagedError, match="cannot be read"):
        checkpoints.read(whole)


def test_checkpoints_without_a_usable_one_are_no_fresh_start(folder: RunFolder) -> None:
    assert folder.latest_checkpoint() is None
    for step in (1, 2):
        folder.write_checkpoint(step, {"a": torch.arange(100)}, {})
        damage(folder.path / f"checkpoints/step_00000{step}" / checkpoints.TENSORS, "bit")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError) as caught:
        folder.latest_checkpoint()
    text = str(caught.value)
    assert text.startswith(f"no checkpoint in {folder.path}/checkpoints can be used (step_000002: state.safetensors")
    assert "step_000001: " in text and text.endswith("remove that folder to let --resume begin at the first step")


@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_damaged_one_the_new_one_stays(folder: RunFolder, keep: int) -> None:
    for step in (4, 6):
        folder.write_checkpoint(step, {"a": torch.tensor(step)}, {})
    damage(folder.path / "checkpoints/step_000006" / checkpoints.TENSORS, "bit")
    with pytest.warns(UserWarning, match="step_000006 is left out"):
        assert found(folder).step == 4
    folder.write_checkpoint(5, {"a": torch.tensor(5)}, {}, keep=keep)
    assert names(folder) == ["step_000004", "step_000005"][-keep:]
    assert found(folder).step == 5


def fails(error: BaseException, *, after: int = 0) -> Callable[..., Any]:
    """A function that writes ``after`` bytes into its path, then fails."""

    def write(*arguments: Any, **_: Any) -> None:
        path = next(item for item in arguments if isinstance(item, Path))
        path.write_bytes(b"0" * after)
        raise error

    return write


FULL = {
    "ENOSPC": NO_SPACE,
    "EDQUOT": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "older safetensors": SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, m: "" })'),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL.keys())
def test_a_full_disk_leaves_the_checkpoint_before(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder.write_checkpoint(1, {"a": torch.arange(100)}, {}, keep=1)
    monkeypatch.setattr(checkpoints, "save_file", fails(error, after=50))
    with pytest.raises(
        UserError, match=r"there is no room for .*step_000002 \((No space|Disk quota).*--resume"
    ) as caught:
        folder.write_checkpoint(2, {"a": torch.arange(100)}, {}, keep=1)
    assert "\n" not in str(caught.value)
    assert names(folder) == ["step_000001"]
    assert found(folder).step == 1
    monkeypatch.undo()
    folder.write_checkpoint(2, {"a": torch.arange(100)}, {}, keep=1)
    assert names(folder) == ["step_000002"]


def test_old_ones_go_only_when_the_new_one_is_on_the_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_checkpoint(1, {"a": torch.arange(100)}, {}, keep=1)
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    def removed(path: Path) -> None:
        assert path.name == "step_000001"
        assert synced[-5:-2] == [checkpoints.STATE, checkpoints.TENSORS, ".step_000002.partial"]
        assert synced[-2] == "checkpoints"
        assert (path.parent / "step_000002").exists()
        synced.append("removed")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoints, "remove", removed)
    folder.write_checkpoint(2, {"a": torch.arange(100)}, {}, keep=1)
    assert synced[-1] == "removed"


def test_a_removal_that_was_cut_off_leaves_nothing_that_counts(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_checkpoint(1, {"a": torch.arange(100)}, {}, keep=1)
    real, calls = checkpoints.shutil.rmtree, []

    def stopped(path: Path, ignore_errors: bool = False) -> None:
        calls.append(path)
        if path.name.endswith(".old.partial") and not ignore_errors:
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        folder.write_checkpoint(2, {"a": torch.arange(100)}, {}, keep=1)
    assert names(folder) == [".step_000001.old.partial", "step_000002"]
    assert [checkpoints.step_of(path) for path in checkpoints.folders(folder.path)] == [2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.json", "model"])
def test_other_files_on_a_full_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    atomic_write_text(folder.path / "eval.json", "before")

    def full(*_: Any, **__: Any) -> int:
        raise NO_SPACE

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("json.dumps", full)  # stands for the write of a line, whose file is buffered
    with pytest.raises(UserError, match=f"there is no room for .*{name} .No space left on device.; what was there"):
        if name == "metrics.jsonl":
            folder.log(1, loss=1.0)
        elif name == "model":
            with folder.publish("model") as path:
                (path / "weights").write_text("half")
        else:
            atomic_write_text(folder.path / name, "after")
    assert {path.name for path in folder.path.iterdir()} <= {"eval.json", "metrics.jsonl"}
    assert (folder.path / "eval.json").read_text() == "before"


def test_the_scale_of_the_loss_under_fp16_comes_back(folder: RunFolder) -> None:
    before, after = (SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=scale)) for scale in (2.0**9, 1.0))
    folder.write_checkpoint(1, {"a": torch.zeros(1)}, {"scaler": scaler_state(before)})
    restore_scaler(after, found(folder).state["scaler"])
    assert after.scaler.state_dict() == before.scaler.state_dict() and after.scaler.get_scale() == 2.0**9
    plain = SimpleNamespace(scaler=None)
    assert scaler_state(plain) is None
    restore_scaler(plain, scaler_state(before))


def test_other_errors_stay_what_they_are() -> None:
    for error in (OSError(errno.EIO, "Input/output error"), SafetensorError("bad header"), ValueError("28")):
        with pytest.raises(type(error)) as caught, room_for("it"):
            raise error
        assert caught.value is error
