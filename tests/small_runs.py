"""Runs of a second or two on the command line, and an interpreter that starts them as real processes without imports.

``python tests/small_runs.py`` imports everything once and then forks a process for each line of JSON on its stdin:
a run can be killed for good, at any moment, twenty times in the time of a few starts of Python.
"""

import json
import os
import resource
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_vit

from glare import cli
from glare.checkpoints import TENSORS, folders
from glare.yaml_files import dump

SHARED: dict[str, Any] = {
    "log_every": 1,
    "num_workers": 2,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
}
PRETRAIN: dict[str, Any] = {
    "batch_size": 3,
    "rank": 4,
    "views": {"num_local": 2, "global_size": 16, "local_size": 8},
    "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 2}},
}
FINETUNE: dict[str, Any] = {"batch_size": 2, "crop_size": 16}
TIMES = {"images_per_second", "data_wait"}


def write_inputs(folder: Path) -> None:
    """A ViT, photographs, labelled scenes, and the recipes ``pretrain.yaml`` and ``finetune.yaml``."""
    tiny_vit("dinov2", num_hidden_layers=1).save_pretrained(folder / "vit")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(7):
        image = Image.fromarray(rng.integers(0, 256, (30 + number, 41, 3), dtype=np.uint8))
        image.save(folder / "photos" / f"{number}.png")
    write_labelled(folder / "scenes" / "train", 5)
    write_labelled(folder / "scenes" / "val", 2)
    pretrain = {**SHARED, **PRETRAIN, "backbone": str(folder / "vit"), "data": str(folder / "photos")}
    finetune = {**SHARED, **FINETUNE, "model": str(folder / "vit"), "data": str(folder / "scenes")}
    (folder / "pretrain.yaml").write_text(dump(pretrain))
    (folder / "finetune.yaml").write_text(dump(finetune))


def arguments(job: str, inputs: Path, output: Path, **keys: object) -> list[str]:
    """The command line of a run of ``pretrain`` or ``finetune`` without its first word."""
    changes = [f"{name}={str(value).lower()}" for name, value in keys.items()]
    return [job, "--recipe", str(inputs / f"{job}.yaml"), "--output", str(output), *changes]


def logged(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    """Every bit of the model, of the last checkpoint and of the metrics, and the same files."""
    files = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*"))
    assert logged(run) == logged(other)
    ours, theirs = (load_file(folders(path)[0] / TENSORS) for path in (run, other))
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    for file in (path for path in files if path.suffix == ".safetensors" and path.parts[0] != "checkpoints"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


class Starter:
    """Starts runs in processes of their own; to be closed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment)

    def start(
        self, argv: list[str], log: Path, *, file_bytes: int = -1, environment: dict[str, str] | None = None
    ) -> int:
        """Start ``glare ARGV``; returns its process id. ``file_bytes`` is the largest file it may write."""
        request = {"argv": argv, "log": str(log), "file_bytes": file_bytes, "environment": environment or {}}
        return self._ask(request)

    def wait(self, pid: int) -> int:
        """Its exit code, once it has ended; minus the signal that killed it."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        """End the interpreter."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def ended(pid: int) -> bool:
    """Whether a process has ended and waits to be asked for its exit code."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _serve() -> None:
    import glare.finetune
    import glare.pretrain  # noqa: F401

    tiny_vit("dinov2")
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
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["environment"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], -1))
        code = cli.main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
