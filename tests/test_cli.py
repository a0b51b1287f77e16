"""The command line as a user meets it: exit codes, one line for a mistake, and the jobs behind it."""

import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from glare import cli
from glare.errors import UserError


def glare(*argv: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, where a warning ends it, with ``folder`` as the current one."""
    source = str(Path(cli.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "glare", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[list[str]]]:
    """Put a job in the place of ``demo`` that notes its arguments, then raises what it is given."""

    def install(error: BaseException | None) -> list[list[str]]:
        calls: list[list[str]] = []

        def job(argv: Sequence[str]) -> None:
            calls.append(list(argv))
            if error is not None:
                raise error

        module = types.ModuleType("fake_job")
        module.main = job  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_job", module)
        monkeypatch.setitem(cli.JOBS, "demo", ("fake_job:main", "nothing"))
        return calls

    return install


def test_help_has_one_line_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for job in cli.JOBS:
        assert sum(line.startswith(f"  {job} ") for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("glare ")


def test_job_gets_its_arguments(fake: Callable[..., list[list[str]]]) -> None:
    calls = fake(None)
    assert cli.main(["demo", "--output", "o", "a=1"]) == 0
    assert calls == [["--output", "o", "a=1"]]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["pretain"],
            "glare: error: there is no job 'pretain'; the nearest is 'pretrain'; `glare --help` lists the jobs",
        ),
        ([], "glare: error: no job was given; `glare --help` lists the jobs"),
        (["--steps", "3"], "glare: error: the option --steps comes after a job; `glare --help` lists the jobs"),
    ],
)
def test_no_such_job(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no images in\n  photos"), 2, "glare demo: error: no images in photos"),
        (KeyboardInterrupt(), 130, "glare demo: error: stopped by Ctrl-C"),
        (OSError(errno.ENOSPC, "No space left on device", "o/a"), 1, "glare demo: error: o/a: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 1, "glare demo: error: Input/output error"),
        (OSError("the Hub cannot be reached"), 1, "glare demo: error: the Hub cannot be reached"),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    line: str,
    fake: Callable[..., list[list[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake(error)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_ours_keeps_its_traceback(fake: Callable[..., list[list[str]]]) -> None:
    fake(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize("job", cli.JOBS)
def test_every_job_has_help_and_refuses_unknown_options(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([job, "--help"])
    assert caught.value.code == 0
    assert f"usage: glare {job} " in capsys.readouterr().out
    assert cli.main([job, "--no-such-option", "1"]) == 2
    assert f"glare {job}: error: unknown option --no-such-option; the nearest is " in capsys.readouterr().err


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    mistake = glare("pretrain", "--backbone", "b", "--data", "d", "--output", "o", "stps=3", folder=tmp_path)
    assert mistake.returncode == 2
    assert mistake.stdout == ""
    assert mistake.stderr == "glare pretrain: error: unknown key 'stps'; the nearest is 'steps'\n"
    assert list(tmp_path.iterdir()) == []
