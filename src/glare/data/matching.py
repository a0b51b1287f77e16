"""Which images a list of globs selects, by their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from glare.errors import UserError


def matching(names: Sequence[str], match: str | None, *, data: str) -> list[int]:
    """Indices of the names that fit ``match`` (see `glare.data.sources.open_source`), of all of them without one.

    Raises UserError if none does.
    """
    patterns = [pattern for part in (match or "").split(",") if (pattern := part.strip())]
    if not patterns:
        return list(range(len(names)))
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]

    def fits(name: str) -> bool:
        path = PurePosixPath(name)
        included = not wanted or any(_fits(path, pattern) for pattern in wanted)
        return included and not any(_fits(path, pattern) for pattern in unwanted)

    kept = [index for index, name in enumerate(names) if fits(name)]
    if not kept:
        raise UserError(
            f"match {match!r} selects none of the {len(names)} images of {data!r}; "
            f"give comma-separated globs on file stems such as {PurePosixPath(names[0]).stem!r}, or on paths with a /"
        )
    return kept


def _fits(path: PurePosixPath, pattern: str) -> bool:
    """Whether a glob fits the stem or, if it has a slash, the path from some folder on, with or without extension."""
    if "/" not in pattern:
        return fnmatchcase(path.stem, pattern)
    return any(fnmatchcase(f"/{end}", f"*/{pattern}") for end in (path, path.with_suffix("")))
