"""The folder of one run: recipe, metrics, checkpoints and results; a reader never meets a half-written one.

A step counts finished optimizer steps: no line of ``metrics.jsonl`` has step 0, and the checkpoint of step k
holds the state after k steps.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glare.errors import UserError
from glare.recipes import to_dict, to_yaml
from glare.typed_values import written
from glare.yaml_files import flatten, read_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAY_DIFFER_ON_RESUME = frozenset(
    {
        "checkpoint_every",
        "compile",
        "device",
        "epochs",
        "log_every",
        "num_workers",
        "output",
        "report_to",
        "resume",
        "steps",
        "strict",
    }
)
"""Recipe keys that may change between a run and its ``--resume``."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimizer steps, on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class RunFolder:
    """A run's folder and how to write into it; made by ``create``.

    With ``write=False``, on all processes but the main one, it only reads.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self.write = write

    @staticmethod
    def check(path: Path, *, resume: bool | None = None) -> None:
        """Raise UserError if a run cannot write to ``path``; touches nothing, so a job begins with it.

        ``resume`` None is a job that cannot be resumed.
        """
        if path.exists() and not path.is_dir():
            raise UserError(f"the output {path} is a file; give a folder that is new or empty")
        if path.exists() and any(path.iterdir()):
            _check_used(path, resume=resume)
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"the output {path} cannot be made, {above} is no folder one may write to; give another")

    @classmethod
    def create(cls, path: Path, *, resume: bool | None = None, write: bool = True) -> "RunFolder":
        """Make the folder, once everything that the user may have got wrong is known to be right."""
        if write:
            cls.check(path, resume=resume)
            path.mkdir(parents=True, exist_ok=True)
        return cls(path, write=write)

    def write_recipe(self, recipe: "DataclassInstance", *, may_differ: frozenset[str] = frozenset()) -> list[str]:
        """Write ``recipe.yaml``; in a resumed folder, bring the metrics back to the latest checkpoint.

        Returns what changed of the keys ``may_differ`` that matter, which stands as comments above the recipe, too.
        Raises UserError, with nothing changed, where the run was made with other values of other keys that matter.
        """
        file = self.path / "recipe.yaml"
        changes, comments = [], ""
        if file.exists():
            changes = _check_same(file, recipe, may_differ)
            comments = "".join(line for line in file.read_text("utf-8").splitlines(True) if line.startswith("#"))
        if self.write:
            self._clear_leftovers()
            self._rewind()
            comments += "".join(f"# after step {next(iter(self.checkpoint_steps()), 0)}: {text}\n" for text in changes)
            atomic_write_text(file, comments + to_yaml(recipe))
        return changes

    def log(self, step: int, **values: object) -> None:
        """Add a line to ``metrics.jsonl``; numbers that are not finite become null."""
        if not self.write:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite({"step": step, **values})) + "\n")

    def lines(self) -> list[dict[str, float]]:
        """The numbers of each whole line of ``metrics.jsonl``, with its ``step``."""
        file = self.path / "metrics.jsonl"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = [json.loads(line) for line in text.splitlines() if math.isfinite(_step(line))]
        return [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in whole]

    def write_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        keep: int = 2,
        protected: Collection[int] = (),
    ) -> None:
        """Write ``checkpoints/step_<step>`` and remove all but the last ``keep`` and those of ``protected`` steps.

        Tensors may have any dtype, shape and device, and share memory; ``state`` is plain JSON, floats exact.
        """
        if not self.write:
            return
        (self.path / "checkpoints").mkdir(exist_ok=True)
        with self.publish(f"checkpoints/step_{step:06d}") as folder:
            # safetensors refuses tensors that share memory or have gaps
            packed = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            save_file(packed, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, "state": state}), encoding="utf-8")
        for old in self._checkpoints()[keep:]:
            if int(old.name[5:]) not in protected:
                shutil.rmtree(old)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The last complete checkpoint, None where there is none; warns of one that cannot be read."""
        for folder in self._checkpoints():
            try:
                return _read_checkpoint(folder)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                warnings.warn(f"{folder} is left out, it cannot be read: {error}", stacklevel=2)
        return None

    def checkpoint(self, step: int) -> Checkpoint:
        """One of ``checkpoint_steps``."""
        return _read_checkpoint(self.path / "checkpoints" / f"step_{step:06d}")

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints, the latest first."""
        return [int(path.name[5:]) for path in self._checkpoints()]

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Give an empty folder to fill, which replaces ``name`` in the run folder at the end.

        After an error nothing of it is left. On the writing process only.
        """
        target = self.path / name
        partial = _partial(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                _sync(file)
            _sync(partial)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)

    def _checkpoints(self) -> list[Path]:
        """Folders of checkpoints, the latest first."""
        found = [path for path in (self.path / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    def _clear_leftovers(self) -> None:
        """Remove what a killed run was writing."""
        for pattern in (".*.partial", "checkpoints/.*.partial"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _rewind(self) -> None:
        """Drop the metrics of steps that are done again, and a line that a killed run left unfinished."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        checkpoint = self.latest_checkpoint()
        last = 0 if checkpoint is None else checkpoint.step
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step(line) <= last]
        atomic_write_text(file, "".join(f"{line}\n" for line in kept))


def _read_checkpoint(folder: Path) -> Checkpoint:
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(step=saved["step"], tensors=load_file(folder / "state.safetensors"), state=saved["state"])


def run_folder_of(path: str) -> Path | None:
    """The run folder that ``path`` is or lies in directly, such as a ``model`` folder; None where it is in none."""
    return next((folder for folder in (Path(path), Path(path).parent) if (folder / "recipe.yaml").is_file()), None)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was before."""
    _atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def atomic_write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture so that its file is there whole or as it was before."""
    _atomic_write(path, lambda partial: picture.save(partial, format="PNG"))


def _atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    partial = _partial(path)
    try:
        write(partial)
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def atomic_write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``atomic_write_text`` of indented JSON; numbers that are not finite become null."""
    atomic_write_text(path, json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sync(path: Path) -> None:
    """Wait until the disk has the file, or the entries of the folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_used(path: Path, *, resume: bool | None) -> None:
    """Raise UserError for a folder with something in it, unless it is a run to go on with."""
    if not resume:
        remedy = "give a new or empty one" if resume is None else "give another --output, or --resume to go on with it"
        raise UserError(f"the output folder {path} is in use; {remedy}")
    if not (path / "recipe.yaml").exists():
        raise UserError(f"the output folder {path} holds no run to --resume (no recipe.yaml); give another --output")


def _check_same(file: Path, recipe: "DataclassInstance", may_differ: frozenset[str]) -> list[str]:
    """What changed of the keys ``may_differ``; UserError where the recipes differ in another key that matters."""
    old, new = flatten(read_mapping(file)), flatten(to_dict(recipe))
    changes = {
        name: f"{name} was {written(old.get(name))} and is {written(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name.split(".")[0] not in MAY_DIFFER_ON_RESUME
    }
    wrong = [text for name, text in changes.items() if name not in may_differ]
    if wrong:
        raise UserError(
            f"the run in {file.parent} has another recipe: {'; '.join(wrong)}; "
            "give --resume with the old values, or another --output without it"
        )
    return list(changes.values())


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    """The step of a line of metrics, infinite for a broken line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
