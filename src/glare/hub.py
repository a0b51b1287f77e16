"""``glare push``: publish a model or adapter on the Hugging Face Hub.

Everything goes up in one commit, so that the latest revision is the old one or the new one, never a part of it. Blobs
are sent before that; the Hub keeps those that arrived, so the same command goes on where it was stopped.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,  # of httpx, whichever release of it huggingface_hub is built on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from glare import licences, recipes
from glare.card_scores import RESULTS, result_files
from glare.errors import UserError
from glare.lineage import LookUp, offline
from glare.model_card import Facts, Said, card, facts_of
from glare.model_names import is_repo_id
from glare.paths import local_path
from glare.publication import ADAPTER_FILES, MODEL_FILES, WEIGHTS, Publication, check, find, stage
from glare.recipes import option, required
from glare.report_text import size
from glare.run_folder import atomic_write_text

OURS = (*MODEL_FILES, *ADAPTER_FILES, *WEIGHTS, *(f"adapter/{name}" for name in ADAPTER_FILES), "report/*.png", RESULTS)
"""Files of a repository that this command writes, and removes where there is no such file any more."""

WAITS_S = (2, 8, 30)  # between attempts, unless the Hub names a time
LONGEST_WAIT_S = 120
TRANSIENT = {408, 429, 500, 502, 503, 504}
CONFLICT = {409, 412}

UNREADABLE = (ConnectionError, TimeoutError, JSONDecodeError, RuntimeError)
"""Without a status of the Hub: no connection, a page of a proxy in place of its answer, a fault of the xet client."""

T = TypeVar("T")


@dataclass(frozen=True)
class PushRecipe:
    """Publish a model or adapter with its card, licences and scores on the Hugging Face Hub.

    DIR is the folder of a finished run, its model folder or its adapter folder; REPO_ID is owner/name.
    """

    target: tuple[str, ...] = required("DIR REPO_ID", positional=True)
    private: bool = option(False, "make the repository private, if it is new")
    revision: str | None = option(None, "existing branch to write to; main where not given")
    comparison: Path | None = option(None, "output folder of glare compare, whose verdicts go into the card")
    base_model: str | None = option(None, "Hub id of the base model, where the run had a folder of it")
    data_name: str | None = option(None, "what to call the run's data, or their Hub id")
    base_license: str | None = option(None, "of the base model; from its card where not given")
    data_license: str | None = option(None, "of the run's data; from their card where not given")
    license: str | None = option(None, "of these weights; follows from the other two where not given")
    tags: tuple[str, ...] = option((), "of the card, besides the usual ones")
    dry_run: bool = option(False, "write the card into the folder and list what would go up, without network")

    def __post_init__(self) -> None:
        if len(self.target) != 2:
            raise ValueError(f"{len(self.target)} arguments were given; give two: the folder and owner/name")
        if not is_repo_id(self.repo_id):
            raise ValueError(f"{self.repo_id!r} is no id of a repository; give owner/name")

    @property
    def folder(self) -> Path:
        """What is published."""
        return local_path(self.target[0])

    @property
    def repo_id(self) -> str:
        """Where to."""
        return self.target[1]

    def said(self) -> Said:
        """What the user says of the model."""
        return Said(**{field.name: getattr(self, field.name) for field in fields(Said)})


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare push``."""
    run(recipes.parse(PushRecipe, argv, prog="glare push"))


def run(recipe: PushRecipe) -> CommitInfo | None:
    """Publish; the commit, None for a dry run. Raises UserError, OSError where the network or the Hub fails."""
    publication = find(recipe.folder)
    api = HfApi(library_name="glare-ssl")
    if recipe.dry_run:
        with prepared(publication, recipe, offline) as (facts, staged):
            print(describe(facts, staged))
            atomic_write_text(publication.card, (staged / "README.md").read_text(encoding="utf-8"))
        print(f"nothing was sent; the card is in {publication.card}")
        return None
    with prepared(publication, recipe, _look_up(api)) as (facts, staged):
        print(describe(facts, staged))
        message = f"Publish {recipe.folder.absolute().name} with glare push"
        commit = upload(api, staged, recipe, commit_message=message)
    print(f"published: {commit.commit_url}")
    return commit


def publish(api: HfApi, publication: Publication, recipe: PushRecipe, **commit: Any) -> CommitInfo:
    """Send a publication without a word; ``commit`` are options of ``HfApi.create_commit``. Raises as ``run`` does."""
    with prepared(publication, recipe, _look_up(api)) as (_, staged):
        return upload(api, staged, recipe, **commit)


@contextmanager
def prepared(publication: Publication, recipe: PushRecipe, look_up: LookUp) -> Iterator[tuple[Facts, Path]]:
    """What the card says, and a folder with exactly what goes up, checked."""
    facts = facts_of(publication, recipe.said(), look_up)
    with tempfile.TemporaryDirectory(prefix="glare-push-") as name:
        staged = Path(name)
        stage(publication, staged, card=card(facts), results=result_files(facts.evaluation), base=facts.base.hub_id)
        check(publication, staged)
        yield facts, staged


def describe(facts: Facts, staged: Path) -> str:
    """The files that go up, and what the user may want to add."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    lines = [f"  {size(path.stat().st_size):>9}  {path.relative_to(staged)}" for path in files]
    lines.append(f"{len(files)} files, {size(sum(path.stat().st_size for path in files))}")
    if facts.base.hub_id is None and facts.base.licence != licences.OURS:
        lines.append(f"the card names no base model of the Hub ({facts.base.name}); if there is one: --base-model ID")
    flags = {data.name: "--data-license ID" for _, data in facts.stages[-1:]} | {facts.base.name: "--base-license ID"}
    by_file = "write `license: ID` into the front matter of a README.md beside the images"
    lines += [
        f"the licence of {origin.name} is unknown; if you know it: {flags.get(origin.name, by_file)}"
        for origin in (facts.base, *facts.data_sets)
        if origin.licence.id is None
    ]
    if facts.outdated:
        lines.append(
            "the scores in eval.json are of other weights and are left out; `glare evaluate --json RUN/eval.json` of "
            "this model makes new ones"
        )
    elif facts.evaluation is None and facts.publication.kind in ("segmenter", "upernet"):
        lines.append("the card says that there is no evaluation; `glare evaluate --json RUN/eval.json` makes one")
    return "\n".join(lines)


def upload(api: HfApi, staged: Path, recipe: PushRecipe, **commit: Any) -> CommitInfo:
    """Make the repository where there is none, and send all files of ``staged`` as one commit with these options."""
    repo_id = recipe.repo_id

    def attempt() -> CommitInfo:
        full = api.create_repo(repo_id, private=recipe.private or None, exist_ok=True).repo_id
        info = api.model_info(full, revision=recipe.revision)
        names = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
        present = {entry.rfilename for entry in info.siblings or []}
        gone = sorted(name for name in present - names if belongs(name))
        additions = [CommitOperationAdd(name, str(staged / name)) for name in sorted(names)]
        sent: CommitInfo = api.create_commit(
            full,
            [*additions, *(CommitOperationDelete(name) for name in gone)],
            revision=recipe.revision,
            parent_commit=info.sha if present else None,
            **commit,
        )
        return sent

    return with_patience(attempt, recipe)


def belongs(name: str) -> bool:
    """Whether this command writes files of this name; a pattern does not reach into sub-folders."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in OURS)


def with_patience(attempt: Callable[[], T], recipe: PushRecipe, *, sleep: Callable[[float], None] = time.sleep) -> T:
    """Attempt again after what passes by itself: a full Hub, a fault of its own, a lost connection.

    Raises UserError for what the user can put right, OSError where it did not pass.
    """
    for wait in (*WAITS_S, None):
        try:
            return attempt()
        except OfflineModeIsEnabled:
            raise UserError("HF_HUB_OFFLINE is set; unset it to push, or give --dry-run") from None
        except Exception as error:
            problem = _problem(error)
            if problem is None:
                raise
            status = _status(problem)
            if status is not None and status not in TRANSIENT:
                raise UserError(sentence(problem, recipe)) from error
            pause = _retry_after(problem) or wait
            if wait is None or pause is None or pause > LONGEST_WAIT_S:
                raise ConnectionError(_gave_up(problem, recipe)) from error
            print(f"{_what_happened(problem)}; trying again in {pause} s", flush=True)
            sleep(pause)
    raise AssertionError


def _problem(error: BaseException | None) -> Exception | None:
    """What went wrong on the way to the Hub; the client wraps it where it sends files in threads. None: not that."""
    cause = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    if isinstance(cause, Exception):
        return cause
    return error if isinstance(error, UNREADABLE) else None


def _status(problem: Exception) -> int | None:
    return int(problem.response.status_code) if isinstance(problem, HfHubHTTPError) else None


def _retry_after(problem: Exception) -> int | None:
    """Seconds that the Hub asks to wait."""
    text = problem.response.headers.get("Retry-After", "") if isinstance(problem, HfHubHTTPError) else ""
    return int(text) if text.isdigit() else None


def _what_happened(problem: Exception) -> str:
    status = _status(problem)
    if status == 429:
        return "the Hub asks for fewer requests (429)"
    return "the connection to the Hub failed" if status is None else f"the Hub failed ({status})"


def _gave_up(problem: Exception, recipe: PushRecipe) -> str:
    pause = _retry_after(problem)
    when = f"in {pause} s" if pause else "later"
    return (
        f"{_what_happened(problem)}, {recipe.repo_id} is as it was; give the same command again {when}, "
        "what has arrived is not sent again"
    )


def sentence(problem: Exception, recipe: PushRecipe) -> str:
    """What the Hub refused and what to do about it."""
    status, repo_id = _status(problem), recipe.repo_id
    if isinstance(problem, RevisionNotFoundError):
        branch = recipe.revision or "main"
        make = f"make it with `hf repos branch create {repo_id} {branch}`"
        return f"{repo_id} has no branch {branch!r}; {make}, or leave --revision out"
    if status == 401:
        given = "the Hub does not accept the token" if get_token() else "the Hub was given no token"
        return f"{given} (401); log in with `hf auth login`, or set HF_TOKEN to a token with write access"
    if status == 403:
        return f"the token may not write to {repo_id} (403); use one with write access to it, or another repository"
    if status == 404:
        return f"the Hub has no place for {repo_id} (404); check the owner's name, and that the token may see it"
    if status in CONFLICT:
        return f"{repo_id} was changed meanwhile ({status}); look at what is there, then give the same command again"
    said = getattr(problem, "server_message", None)
    return f"the Hub refused {repo_id} ({status}){f': {said}' if said else ''}; nothing was published"


def _look_up(api: HfApi) -> LookUp:
    """Cards of the Hub; {} for one that cannot be read now, which takes the id for existing."""

    def card_of(kind: str, hub_id: str) -> Mapping[str, Any] | None:
        try:
            info = api.model_info(hub_id) if kind == "model" else api.dataset_info(hub_id)
        except RepositoryNotFoundError:
            return None
        except (HTTPError, OSError):
            return {}
        return vars(info.card_data) if info.card_data else {}

    return card_of
