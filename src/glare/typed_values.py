"""Reading a value from YAML or from the command line as an annotated type; recipes are made of these."""

import math
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**63 - 1  # of whole numbers, what 64 bits hold
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


class Text(str):
    """A value from the command line, of which only the annotation tells the type."""

    __slots__ = ()


class MismatchError(Exception):
    """A value that is not of the annotated type."""


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, None first; of any other annotation, itself."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(sorted(get_args(annotation), key=lambda member: member is not types.NoneType))


def read(annotation: Any, value: Any) -> Any:
    """``value`` as bool, int, float, str, Path, Literal or None; as a union, list or tuple of these.

    A Text is read by type: ``null`` for None, items of lists separated by commas. Raises MismatchError.
    """
    for member in members(annotation):
        try:
            return _read_member(member, value)
        except MismatchError:
            continue
    raise MismatchError


def expected(annotation: Any) -> str:
    """The annotated type in words, for an error."""
    return " or ".join(_expected_member(member) for member in reversed(members(annotation)))


def plain(value: Any) -> Any:
    """A value as YAML has it: paths as text, tuples as lists."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path | Text) else value


def written(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(written, value))
    words = {True: "true", False: "false", None: "null"}
    return words[value] if isinstance(value, bool | None) else str(value)


def _read_member(annotation: Any, value: Any) -> Any:
    origin = get_origin(annotation)
    if origin is Literal:
        return _read_literal(get_args(annotation), value)
    if origin in (list, tuple):
        return origin(_read_items(origin, get_args(annotation), value))
    return _READERS[annotation](value)


def _read_literal(allowed: tuple[Any, ...], value: Any) -> Any:
    for choice in allowed:
        if (isinstance(value, Text) and str(choice) == value) or (type(choice) is type(value) and choice == value):
            return choice
    raise MismatchError


def _read_items(origin: type, inner: tuple[Any, ...], value: Any) -> list[Any]:
    if isinstance(value, Text):
        value = [Text(item.strip()) for item in value.strip("[]()").split(",") if item.strip()]
    if not isinstance(value, list | tuple):
        raise MismatchError
    if origin is list or inner[-1] is Ellipsis:
        inner = inner[:1] * len(value)
    if len(inner) != len(value):
        raise MismatchError
    return [read(annotation, item) for annotation, item in zip(inner, value, strict=True)]


def _read_none(value: Any) -> None:
    if value is not None and not (isinstance(value, Text) and value == "null"):
        raise MismatchError


def _read_bool(value: Any) -> bool:
    if isinstance(value, Text) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    if isinstance(value, bool):
        return value
    raise MismatchError


def _read_int(value: Any) -> int:
    """Read a whole number of at most 64 bits."""
    if isinstance(value, Text):
        try:
            value = int(value)
        except ValueError:
            raise MismatchError from None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return value
    raise MismatchError


def _read_float(value: Any) -> float:
    """A number, also as text, since YAML 1.1 takes 1e-3 for text, or as 1/32; NaN and infinity are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise MismatchError
    try:
        number = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, ArithmeticError):
        raise MismatchError from None
    if not math.isfinite(number):
        raise MismatchError
    return number


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise MismatchError
    return str(value)


def _read_path(value: Any) -> Path:
    """Read a path; an empty one is refused, it would silently mean the current folder, and so is a null byte."""
    if not isinstance(value, Path) and not (isinstance(value, str) and value.strip() and "\0" not in value):
        raise MismatchError
    return Path(value)


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    Path: _read_path,
    types.NoneType: _read_none,
}

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (in quotes, in YAML)",
    Path: "a path",
    types.NoneType: "null",
}


def _expected_member(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        return f"a list of which each item is {expected(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} values: {', '.join(map(expected, inner))}"
    return _WORDS[annotation]
