"""The folder of one run: recipe, metrics, checkpoints and results; a reader never meets a half-written one.

A step counts finished optimizer steps: no line of ``metrics.jsonl`` has step 0, and the checkpoint of step k
holds the state after k steps.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from glare import checkpoints, run_lock
from glare.checkpoints import Checkpoint
from glare.curves import read_lines
from glare.disk_space import room_for
from glare.errors import NotFiniteError, UserError
from glare.recipes import to_yaml
from glare.resuming import (
    MAY_DIFFER_ON_RESUME,
    PLACES,
    check_same_frozen,
    check_same_images,
    check_same_recipe,
    check_steps,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class RunFolder:
    """A run's folder and how to write into it; made by ``create``.

    With ``write=False``, on all processes but the main one, it only reads.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self.write = write
        self.images: list[str] | None = None  # of the run, by name, for its checkpoints
        self.frozen: str | None = None  # digest of the weights that do not train, likewise

    @staticmethod
    def check(path: Path, *, resume: bool | None = None) -> None:
        """Raise UserError if a run cannot write to ``path``; touches nothing, so a job begins with it.

        ``resume`` None is a job that cannot be resumed.
        """
        if path.exists() and not path.is_dir():
            raise UserError(f"the output {path} is a file; give a folder that is new or empty")
        if path.exists():
            run_lock.check_free(path)
            if not all(map(_is_leftover, path.iterdir())):
                _check_used(path, resume=resume)
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"the output {path} cannot be made, {above} is no folder one may write to; give another")

    @classmethod
    def create(cls, path: Path, *, resume: bool | None = None, write: bool = True) -> "RunFolder":
        """Make the folder and lock it, once everything that the user may have got wrong is known to be right."""
        if write:
            cls.check(path, resume=resume)
            with room_for(path):
                path.mkdir(parents=True, exist_ok=True)
                _sync(path.parent)
            run_lock.take(path)
        return cls(path, write=write)

    def begin(
        self,
        recipe: "DataclassInstance",
        *,
        images: Sequence[str] | None = None,
        frozen: str | None = None,
        derived: Collection[str] = (),
        may_differ: frozenset[str] = frozenset(),
        free: frozenset[str] = MAY_DIFFER_ON_RESUME,
    ) -> tuple[Checkpoint | None, list[str]]:
        """Write ``recipe.yaml``; return the checkpoint to go on from, None where there is none, and what is different.

        That is what changed of the keys ``may_differ``, which stands as comments above the recipe, too. In a resumed
        folder, what a killed run was writing goes, and the metrics are brought back to the checkpoint. Raises
        UserError, with nothing changed, where the checkpoint was made with other ``images`` (by name, in the order in
        which the run counts them), with other ``frozen`` weights (``resuming.frozen_digest``) or has more steps than
        the recipe, where the run was made with other values of other keys that are not ``free`` (those ``derived``
        were not given), or has checkpoints of which none is usable.
        """
        file = self.path / "recipe.yaml"
        changes, comments = [], ""
        self.images, self.frozen = None if images is None else list(images), frozen
        checkpoint = self.latest_checkpoint()
        if checkpoint is not None:
            # before the recipe, of which much follows from these two
            check_same_images(self.path, checkpoint.images, self.images)
            check_steps(self.path, checkpoint.step, getattr(recipe, "steps", None))
        if file.exists():
            own = frozenset() if self.write else PLACES
            changes = check_same_recipe(file, recipe, may_differ, derived, free | own)
            comments = "".join(line for line in file.read_text("utf-8").splitlines(True) if line.startswith("#"))
        if checkpoint is not None:
            check_same_frozen(self.path, checkpoint.frozen, frozen)  # of another backbone the recipe tells more
        if self.write:
            self._clear_leftovers()
            self._rewind(checkpoint)
            step = 0 if checkpoint is None else checkpoint.step
            comments += "".join(f"# after step {step}: {text}\n" for text in changes)
            atomic_write_text(file, comments + to_yaml(recipe))
        return checkpoint, changes

    def log(self, step: int, **values: object) -> None:
        """Add a line to ``metrics.jsonl``; numbers that are not finite become null."""
        if not self.write:
            return
        with room_for(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite({"step": step, **values})) + "\n")

    def lines(self) -> list[dict[str, float]]:
        """The finite numbers of each whole line of ``metrics.jsonl``, with its ``step``."""
        return read_lines(self._metrics) if self._metrics.exists() else []

    def write_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        keep: int = 2,
        protected: Collection[int] = (),
    ) -> None:
        """Write the checkpoint of ``step``; once it is there for good, remove all but ``protected`` and ``keep`` last.

        ``tensors`` and ``state`` as in ``checkpoints.fill``.
        """
        if not self.write:
            return
        logged = 0
        if self._metrics.exists():
            _sync(self._metrics)
            logged = self._metrics.stat().st_size
        with self.publish(checkpoints.name_of(step)) as folder:
            checkpoints.fill(folder, step, tensors, state, logged, self.images, self.frozen)
        checkpoints.prune(self.path, step, keep, protected)

    def latest_checkpoint(self) -> Checkpoint | None:
        """As ``checkpoints.latest`` of this folder."""
        return checkpoints.latest(self.path)

    @contextmanager
    def pointing_back(self) -> Iterator[None]:
        """Add to a NotFiniteError in this block where the last healthy checkpoint is, or that there is none yet."""
        try:
            yield
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; {self._way_back()}") from None

    def _way_back(self) -> str:
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return "no checkpoint was written yet, so --resume begins at the first step"
        return f"the last healthy checkpoint is {self.place_of(checkpoint)}: go on from there with --resume"

    def place_of(self, checkpoint: Checkpoint) -> Path:
        """The folder of a checkpoint."""
        return self.path / checkpoints.name_of(checkpoint.step)

    def checkpoint(self, step: int) -> Checkpoint:
        """One of ``checkpoint_steps``."""
        return checkpoints.read(self.path / checkpoints.name_of(step))

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints, the latest first."""
        return [checkpoints.step_of(folder) for folder in checkpoints.folders(self.path)]

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Give an empty folder to fill, which replaces ``name`` in the run folder at the end.

        After an error nothing of it is left. On the writing process only. Raises UserError where the disk is full.
        """
        target = self.path / name
        partial = _partial(target)
        shutil.rmtree(partial, ignore_errors=True)
        with room_for(target):
            try:
                partial.mkdir(parents=True)
                yield partial
                _settle(partial)
                if target.exists():
                    checkpoints.remove(target)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        _sync(target.parent)
        _sync(self.path)

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _clear_leftovers(self) -> None:
        """Remove what a killed run was writing."""
        for folder in (self.path, self.path / checkpoints.FOLDER):
            for path in filter(_is_leftover, folder.glob(".*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _rewind(self, checkpoint: Checkpoint | None) -> None:
        """Drop the metrics of steps that are done again, and a line that a killed run left unfinished."""
        if not self._metrics.exists():
            return
        last, size = (0, 0) if checkpoint is None else (checkpoint.step, checkpoint.metrics_bytes)
        text = self._metrics.read_bytes()[:size].decode(errors="replace")
        kept = [line for line in text.splitlines() if _step(line) <= last]
        atomic_write_text(self._metrics, "".join(f"{line}\n" for line in kept))


def run_folder_of(path: str) -> Path | None:
    """The run folder that ``path`` is or lies in directly, such as a ``model`` folder; None where it is in none."""
    return next((folder for folder in (Path(path), Path(path).parent) if (folder / "recipe.yaml").is_file()), None)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was before."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def atomic_write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture so that its file is there whole or as it was before."""
    atomic_write(path, lambda partial: picture.save(partial, format="PNG"))


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or as it was before; ``write`` gets the name to write it under."""
    partial = _partial(path)
    with room_for(path):
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


def _is_leftover(path: Path) -> bool:
    """Whether a killed process was writing, or removing, this file or folder."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _settle(folder: Path) -> None:
    """Give the files of a new folder the usual mode (those of safetensors have 0600) and wait for the disk."""
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with suppress(PermissionError):  # there are file systems without modes
                path.chmod(mode)
        _sync(path)
    _sync(folder)


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
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
