"""An interpreter that has imported everything once, and forks a process for each program asked of it.

A forked process is as real as one started anew: it has its own memory, exit code and outputs, and can be killed. It
costs hundredths of a second in place of the seconds that torch, transformers and PEFT take to import. That the
entry points work in an interpreter started anew is the subject of test_cli, test_import, test_pretrain,
test_finetune, test_distributed and test_space.
"""

import json
import os
import resource
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

POLL_SECONDS = 0.05


class Forks:
    """Starts processes of ``glare``, or of scripts, from one interpreter; a context that ends it.

    What must be in the environment before the imports, such as the address of the Hub, is given here.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        inherited = os.environ if environment is None else environment
        path = os.pathsep.join(place for place in sys.path if place)
        variables = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=variables)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def start(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        errors: Path | None = None,
        script: Path | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        file_bytes: int = -1,
    ) -> int:
        """Start ``glare ARGV``, or ``python SCRIPT ARGV``; returns its process id.

        Args:
            argv: the words after the program.
            log: where stdout and stderr are appended.
            errors: where stderr goes instead.
            script: a Python file to run in place of ``glare``.
            folder: the working directory.
            environment: variables in addition.
            file_bytes: the largest file it may write, -1 for any.
        """
        request = {
            "argv": list(argv),
            "log": str(log),
            "errors": str(errors or log),
            "script": str(script) if script else None,
            "folder": str(folder) if folder else None,
            "environment": dict(environment or {}),
            "file_bytes": file_bytes,
        }
        return self._ask(request)

    def wait(self, pid: int) -> int:
        """Its exit code, once it has ended; minus the signal that killed it."""
        return self._ask({"wait": pid})

    def run(self, *argv: str, folder: Path, script: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``glare ARGV``, or a script, in ``folder`` to its end."""
        log, errors = (folder.with_name(f"{folder.name}.{name}") for name in ("stdout", "stderr"))
        code = self.wait(self.start(argv, log, errors=errors, script=script, folder=folder))
        said = [file.read_text() for file in (log, errors)]
        log.unlink()
        errors.unlink()
        return subprocess.CompletedProcess(argv, code, *said)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def ended(pid: int) -> bool:
    """Whether a process has ended and waits to be asked for its exit code."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(pids: Sequence[int], *, seconds: float) -> None:
    """Until all have ended; AssertionError where it takes longer."""
    limit = time.monotonic() + seconds
    while not all(map(ended, pids)):
        assert time.monotonic() < limit, f"processes still running after {seconds} s"
        time.sleep(POLL_SECONDS)


def _serve() -> None:
    """Import all but glare.hub, whose waiting a program may replace before it imports it; then fork as asked."""
    import torch
    from PIL import Image
    from tiny_models import tiny_vit

    import glare.compare
    import glare.convert
    import glare.export
    import glare.finetune
    import glare.inspect
    import glare.pretrain  # noqa: F401

    tiny_vit("dinov2")
    Image.init()
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            _run(request)
        print(pid, flush=True)


def _run(request: dict[str, Any]) -> None:
    """The forked process, which never returns."""
    code = 1
    try:
        for number, name in ((1, "log"), (2, "errors")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(request["environment"])
        if request["folder"]:
            os.chdir(request["folder"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], -1))
        code = _main(request["script"], request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(script: str | None, argv: list[str]) -> int:
    """What ``python -m glare ARGV`` and ``python SCRIPT ARGV`` do; returns the exit code."""
    from glare import cli

    sys.argv = [script or "glare", *argv]
    try:
        if script is None:
            return cli.main(argv)
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    _serve()
