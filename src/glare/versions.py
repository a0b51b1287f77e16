"""Versions of what computed a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("glare-ssl", "torch", "transformers", "peft", "accelerate")


def version_of(package: str) -> str:
    """The installed version of a package, "not installed" for one that is only on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
