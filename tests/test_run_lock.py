"""Two runs never write into one folder, and the lock that sees to it leaves nothing behind."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glare import run_lock
from glare.errors import UserError
from glare.run_folder import RunFolder

HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print('held', flush=True); input()"


def free(folder: Path) -> bool:
    """Whether somebody else could lock it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-S", "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_folder_that_another_run_writes_into_is_refused_until_that_has_died(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: 1")
    with held_by_another(tmp_path) as other:
        for refused in (RunFolder.check, RunFolder.create):
            for resume in (True, False):
                with pytest.raises(UserError) as caught:
                    refused(tmp_path, resume=resume)
                assert str(caught.value) == (
                    f"another run is writing into {tmp_path}; wait until it has ended, or stop it, and go on with "
                    "--resume, or give another --output"
                )
        other.kill()
        other.wait()
        RunFolder.check(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_run_holds_its_folder_until_the_job_is_left_whatever_way(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_lock.released():
        RunFolder.create(tmp_path / "run")
        assert not free(tmp_path / "run") and not list((tmp_path / "run").iterdir())
        with run_lock.released():
            RunFolder.create(tmp_path / "inner")
        assert free(tmp_path / "inner") and not free(tmp_path / "run")
        RunFolder.check(tmp_path / "run")  # its own lock is in nobody's way
        RunFolder.create(tmp_path / "run")
        raise KeyboardInterrupt
    assert free(tmp_path / "run")


def test_processes_that_only_read_lock_nothing_and_may_all_ask_at_once(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as another process of the same run that asks
    RunFolder.check(tmp_path)
    os.close(handle)
    with run_lock.released():
        RunFolder.create(tmp_path, write=False)
        assert free(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with run_lock.released():
        RunFolder.create(tmp_path / "run")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
