"""What users call a model: the embedded ViT, a folder, a run folder, or a Hub id, perhaps with a revision."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__
from safetensors import SafetensorError
from transformers.utils import cached_file

from glare.errors import UserError, first_line

EMBEDDED = "landcover-vit"
EMBEDDED_FOLDER = Path(__file__).parent / "assets" / EMBEDDED

CONFIGURATIONS = ("config.json", "adapter_config.json", "model/config.json", "adapter/adapter_config.json")
"""Files one of which each folder of a model has."""

REFUSED = {
    401: "the Hub does not accept the token (401); log in with `hf auth login`",
    403: "the token may not read it (403); ask its owner for access, or use another token",
    429: "the Hub is busy (429); try again later",
}
"""Status of the Hub's answer -> what it means."""


@dataclass(frozen=True)
class Place:
    """Where a model is: a folder or file, or a Hub id at a ``revision`` (branch, tag or commit; None for main)."""

    name: str
    revision: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """The arguments of ``from_pretrained`` besides the name."""
        return {} if self.revision is None else {"revision": self.revision}

    @property
    def safe_options(self) -> dict[str, Any]:
        """Those of ``from_pretrained`` of a model: safetensors alone, and never code that came with it."""
        return {**self.options, "use_safetensors": True, "trust_remote_code": False}

    def file(self, name: str) -> Path | None:
        """A file of the model, fetched from the Hub where it is there; None where there is no such file to be had."""
        if self.name.endswith(".json"):
            return None  # a configuration alone
        try:
            found = cached_file(self.name, name, **self.options)
        except (OSError, HFValidationError):
            return None
        return None if found is None else Path(found)


def place_of(name: str) -> Place:
    """Where the model is that a user calls ``name``.

    ``landcover-vit`` is the small ViT inside this package, a run folder stands for the ``model`` in it, ``ID@revision``
    is a revision of a Hub id; anything else is a folder, a file or a Hub id as it is. Raises UserError for a run that
    is not among the others of its folder, which may have the form of a Hub id, too, and for a folder of several runs.
    """
    if name == EMBEDDED:
        return Place(str(EMBEDDED_FOLDER))
    folder = Path(name)
    if (folder / "recipe.yaml").exists() and (folder / "model" / "config.json").exists():
        return Place(str(folder / "model"))
    repository, at, revision = name.partition("@")
    if at and revision and not folder.exists():
        return Place(repository, revision)
    if not folder.exists():
        _check_not_a_missing_run(folder)
    elif name:
        check_one_run(folder)
    return Place(name)


def check_one_run(folder: Path) -> None:
    """Raise UserError for a folder that has no model but runs in it, such as those of several seeds."""
    runs = _runs_in(folder)
    if runs and not any((folder / file).exists() for file in CONFIGURATIONS):
        raise UserError(
            f"{str(folder)!r} is the folder of several runs ({', '.join(runs)}) and no model itself; give one of them, "
            f"such as {str(folder / runs[0])!r}"
        )


def _runs_in(folder: Path) -> list[str]:
    """Names of the run folders in a folder, seed_2 before seed_10."""
    return sorted((recipe.parent.name for recipe in folder.glob("*/recipe.yaml")), key=lambda name: (len(name), name))


def _check_not_a_missing_run(path: Path) -> None:
    runs = _runs_in(path.parent)
    if runs:
        raise UserError(f"there is no {str(path)!r}; the runs in {str(path.parent)!r} are {', '.join(runs)}")


def is_repo_id(name: str) -> bool:
    """Whether the Hub allows this as the name of a repository, with or without an owner."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


FAILURES: tuple[type[Exception], ...] = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, AssertionError),
    *(ArithmeticError, SafetensorError, StrictDataclassError),
)
"""What a configuration may make the code that reads it fail with; a fault of another kind stays what it is."""


@contextmanager
def explained(kind: str, name: str, hint: str) -> Iterator[None]:
    """Turn what goes wrong while a model is read into a UserError: the ``kind`` of that ``name`` and why; ``hint``."""
    try:
        yield
    except FAILURES as error:
        raise UserError(f"{kind} {name!r} cannot be loaded ({_reason(place_of(name), error)}); {hint}") from error


def _reason(place: Place, error: Exception) -> str:
    here = place.name and Path(place.name).exists()
    if not here and not is_repo_id(place.name):
        return "no such folder, and not of the form of a Hub id"
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in REFUSED:
        return REFUSED[cause.response.status_code]
    reason = first_line(error).rstrip(".")
    return f"its weights are damaged or cut short: {reason}" if isinstance(error, SafetensorError) else reason
