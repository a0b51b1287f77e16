"""What pyproject.toml allows, for ``.ci/versions``: nothing about versions is written twice.

allowed.py oldest   requirements for pip: every dependency at its lower bound
allowed.py newest   requirements for pip: every dependency as pyproject.toml has it
allowed.py table    name, what is allowed and what this interpreter has
"""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> Iterator[Requirement]:
    """All dependencies, those of the extras too, without the extras' references to the project itself."""
    extras = (line for extra in PROJECT["optional-dependencies"].values() for line in extra)
    for line in (*PROJECT["dependencies"], *extras):
        found = Requirement(line)
        if found.name != PROJECT["name"]:
            yield found


def oldest(requirement: Requirement) -> str:
    """The lower bound as a pin; the requirement itself where it has none."""
    bounds = [part.version for part in requirement.specifier if part.operator == ">="]
    return f"{requirement.name}=={bounds[0]}" if bounds else str(requirement)


def used(name: str) -> str:
    """The installed version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def table() -> Iterator[str]:
    """Name, allowed, used, a line each."""
    rows = [("name", "allowed", "used"), ("python", PROJECT["requires-python"], sys.version.split()[0])]
    rows += [(found.name, str(found.specifier) or "any", used(found.name)) for found in requirements()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return (f"{name:<{widths[0]}}  {bounds:<{widths[1]}}  {have}" for name, bounds, have in rows)


def main(what: str) -> None:
    """Print what is asked for, a line each."""
    lines = {"oldest": map(oldest, requirements()), "newest": map(str, requirements()), "table": table()}
    print("\n".join(lines[what]))


if __name__ == "__main__":
    main(sys.argv[1])
