"""A recipe: one dataclass is one YAML file is the command line of one job.

Values come from the defaults, then ``--recipe FILE``, then options, then ``key=value`` at the end.
Each is read as the type of its field: ``--match 123`` is text, ``learning_rate: 1e-3`` a number.
A frozen dataclass validates itself in ``__post_init__``; a ValueError raised there is the user's mistake.
"""

import argparse
import copy
import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from glare.errors import UserError, redacted, shortened
from glare.spelling import nearest
from glare.typed_values import MismatchError, Text, expected, members, plain, read, written
from glare.yaml_files import dump, read_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
R = TypeVar("R", bound="DataclassInstance")

OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def option(default: T, help: str, *, choices: Sequence[object] | None = None, positional: bool = False) -> T:
    """A field with a default. ``choices`` holds for the value, or for each item of a list.

    ``positional``: a list that takes the arguments without a name; a job has one at most.
    """
    metadata = {"help": help, "choices": choices, "positional": positional}
    if type(default).__hash__ is None:
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, choices: Sequence[object] | None = None, positional: bool = False) -> Any:
    """A field that the user must give, passed by keyword only; the other arguments as in ``option``."""
    return dataclasses.field(kw_only=True, metadata={"help": help, "choices": choices, "positional": positional})


def parse(recipe_class: type[R], argv: Sequence[str], *, prog: str, description: str = "") -> R:
    """The recipe that a command line asks for; ``--help`` prints and raises SystemExit(0).

    Raises UserError for anything the user can put right. The class docstring describes the job where
    ``description`` does not.
    """
    return _parse(recipe_class, argv, prog=prog, description=description)[0]


def parse_given(recipe_class: type[R], argv: Sequence[str], *, prog: str, description: str = "") -> dict[str, Any]:
    """As ``parse``, but only the keys the user set, typed, nested ones as dicts; for ``from_dict``."""
    recipe, values = _parse(recipe_class, argv, prog=prog, description=description)
    return _pick(recipe, values)


def from_dict(recipe_class: type[R], mapping: Mapping[str, Any]) -> R:
    """The recipe of values as YAML holds them, nested ones as mappings; keys left out keep their defaults."""
    _check_keys(recipe_class, mapping, where="")
    recipe: R = _build(recipe_class, mapping, prefix="", base=None)
    return recipe


def to_dict(recipe: "DataclassInstance") -> dict[str, Any]:
    """The recipe as plain values: ``from_dict(type(recipe), to_dict(recipe)) == recipe``."""
    return {name: plain(value) for name, value in dataclasses.asdict(recipe).items()}


def to_yaml(recipe: "DataclassInstance") -> str:
    """The recipe as YAML text, which ``--recipe`` reads back to an equal recipe."""
    return dump(to_dict(recipe))


def read_yaml(path: str | Path, recipe_class: type[R]) -> dict[str, Any]:
    """The mapping in a recipe file, its keys checked against the dataclass."""
    values = read_mapping(path)
    _check_keys(recipe_class, values, where=f" in {path}")
    return values


def _parse(recipe_class: type[R], argv: Sequence[str], *, prog: str, description: str) -> tuple[R, dict[str, Any]]:
    keys = list(_keys(recipe_class))
    description = description or (recipe_class.__doc__ or "").strip()
    known, extra = _parser(keys, prog=prog, description=description).parse_known_intermixed_args(list(argv))
    if extra:
        unknown = extra[0].partition("=")[0]
        likely = nearest(unknown.lstrip("-").replace("-", "_"), ["recipe", *(key.name for key in keys)])
        raise UserError(f"unknown option {unknown}; the nearest is {_as_argument(likely)}")
    given = vars(known)
    free = given.pop("_free")
    values = read_yaml(given.pop("recipe"), recipe_class) if "recipe" in given else {}
    for name, value in given.items():
        own = _own_values(value, free, keys) if isinstance(value, list) else value
        values[name] = Text(own) if isinstance(own, str) else own
    _place(values, free, keys)
    return from_dict(recipe_class, values), values


def _own_values(items: Sequence[str], free: list[str], keys: Sequence["_Key"]) -> str | list[Text]:
    """The values of a list option, one alone may hold several between commas; ``key=value`` among them goes to free."""
    names = [key.name for key in keys]
    free += [item for item in items if "=" in item and item.partition("=")[0] in names]
    own = [Text(item) for item in items if item not in free]
    return own[0] if len(own) == 1 else own


def _as_argument(name: str) -> str:
    """How a key is given on the command line."""
    return f"{name}=VALUE" if "." in name else f"--{name.replace('_', '-')}"


def _pick(recipe: "DataclassInstance", values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``recipe`` holds under the keys of ``values``."""
    typed = {name: getattr(recipe, name) for name in values}
    return {
        name: _pick(typed[name], value) if isinstance(value, dict) else typed[name] for name, value in values.items()
    }


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


@dataclass(frozen=True)
class _Key:
    """One leaf of a recipe: its dotted name and what its field says."""

    name: str
    annotation: Any
    default: Any
    help: str
    choices: tuple[Any, ...]
    positional: bool

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def several(self) -> bool:
        """Whether it is a list of any length, whose items may be separate arguments."""
        return any(get_origin(member) is tuple and Ellipsis in get_args(member) for member in members(self.annotation))

    @property
    def described(self) -> str:
        """Help with the default, as it would be written on the command line."""
        if self.required:
            return self.help
        return self.help if self.default in (None, ()) else f"{self.help} (default: {written(self.default)})"

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(map(str, self.choices)) + "}"
        words, many = {int: "N", float: "X", str: "TEXT", Path: "PATH"}, "A" if self.several else "A,B,..."
        return next(words.get(member, many) for member in members(self.annotation) if member is not type(None))


def _keys(recipe_class: type[Any], prefix: str = "", base: Any = None) -> Iterator[_Key]:
    """All leaves, nested dataclasses opened, with the defaults of ``base`` where there is one."""
    hints = get_type_hints(recipe_class)
    for field in _fields(recipe_class):
        default = _default(field) if base is None else getattr(base, field.name)
        annotation = hints[field.name]
        nested = _nested(annotation)
        if nested is not None:
            inner = default if dataclasses.is_dataclass(default) else None
            yield from _keys(nested, f"{prefix}{field.name}.", inner)
            continue
        yield _Key(
            name=prefix + field.name,
            annotation=annotation,
            default=default,
            help=field.metadata.get("help", ""),
            choices=_choices(field, annotation),
            positional=field.metadata.get("positional", False),
        )


def _fields(recipe_class: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(recipe_class) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _nested(annotation: Any) -> type[Any] | None:
    """The dataclass of a nested field, also of an optional one."""
    found = [member for member in members(annotation) if dataclasses.is_dataclass(member)]
    return cast(type[Any], found[0]) if found else None


def _choices(field: dataclasses.Field[Any], annotation: Any) -> tuple[Any, ...]:
    literal = [member for member in members(annotation) if get_origin(member) is Literal]
    return tuple(field.metadata.get("choices") or (get_args(literal[0]) if literal else ()))


def _parser(keys: Sequence[_Key], *, prog: str, description: str) -> _Parser:
    own = [key for key in keys if "." not in key.name and not key.positional]
    free = next((key for key in keys if key.positional), None)
    names = [f"{_as_argument(key.name)} {key.metavar}" for key in own if key.required]
    words = [prog, *names, "[options]", *([f"{free.name.upper()}..."] if free else []), "[KEY=VALUE ...]"]
    parser = _Parser(
        prog=prog,
        usage=" ".join(words),
        description=description,
        epilog=_epilog(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {must: parser.add_argument_group("required" if must else "options") for must in (True, False)}
    groups[False].add_argument("-h", "--help", action="help", help="show this and exit")
    groups[False].add_argument("--recipe", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of these keys")
    for key in own:
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if bool not in members(key.annotation):
            form = {"metavar": key.metavar, **({"nargs": "+"} if key.several else {})}
        text = key.described.replace("%", "%%")
        groups[key.required].add_argument(_as_argument(key.name), default=argparse.SUPPRESS, help=text, **form)
    parser.add_argument(
        "_free",
        nargs="*",
        metavar=free.name.upper() if free else "KEY=VALUE",
        help=free.help if free else "any key, set after everything else",
    )
    return parser


def _epilog(keys: Sequence[_Key]) -> str:
    nested = [key for key in keys if "." in key.name]
    if not nested:
        return ""
    lines = ["further keys, in a recipe or as KEY=VALUE:"]
    for key in nested:
        allowed = f": {', '.join(map(str, key.choices))}" if key.choices else ""
        text = f"{key.help}{allowed}{key.described.removeprefix(key.help)}"
        lines += [
            f"  {key.name}",
            *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines)


def _place(values: dict[str, Any], free: Sequence[str], keys: Sequence[_Key]) -> None:
    """Put arguments without a name into ``values``: ``key=value`` by key, others into the positional list."""
    overrides = [item for item in free if OVERRIDE.match(item)]
    others = [Text(item) for item in free if not OVERRIDE.match(item)]
    target = next((key.name for key in keys if key.positional), None)
    if others and target is None:
        raise UserError(f"unexpected argument {str(others[0])!r}; overrides are written key=value")
    if others and target is not None:
        values[target] = others
    names = [key.name for key in keys]
    for item in overrides:
        name, _, text = item.partition("=")
        if name not in names:
            hint = f" (the file is written ./{item})" if target is not None and Path(item).exists() else ""
            raise UserError(f"unknown key {name!r}; the nearest is {nearest(name, names)!r}{hint}")
        *groups, leaf = name.split(".")
        inner = values
        for group in groups:
            if not isinstance(inner.get(group), dict):
                inner[group] = {}
            inner = inner[group]
        inner[leaf] = Text(text)


def _check_keys(recipe_class: type[Any], mapping: Mapping[str, Any], *, where: str, prefix: str = "") -> None:
    hints = get_type_hints(recipe_class)
    names = [field.name for field in _fields(recipe_class)]
    for name, value in mapping.items():
        if name not in names:
            likely = nearest(str(name), [key.name for key in _keys(recipe_class)])
            raise UserError(f"unknown key {shortened(prefix + str(name))!r}{where}; the nearest is {prefix + likely!r}")
        nested = _nested(hints[name])
        if nested is not None and isinstance(value, Mapping):
            _check_keys(nested, value, where=where, prefix=f"{prefix}{name}.")


def _build(recipe_class: type[Any], mapping: Mapping[str, Any], *, prefix: str, base: Any) -> Any:
    hints = get_type_hints(recipe_class)
    values = {}
    for field in _fields(recipe_class):
        if field.name in mapping:
            default = _default(field) if base is None else getattr(base, field.name)
            values[field.name] = _value(field, hints[field.name], mapping[field.name], prefix=prefix, base=default)
    missing = [
        field.name.upper() if field.metadata.get("positional") else _as_argument(prefix + field.name)
        for field in _fields(recipe_class)
        if base is None and field.name not in values and _default(field) is MISSING
    ]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; give it as an option or as a key of a recipe")
    try:
        return recipe_class(**values) if base is None else dataclasses.replace(base, **values)
    except ValueError as error:
        raise UserError(f"{prefix[:-1]}: {error}" if prefix else str(error)) from None


def _value(field: dataclasses.Field[Any], annotation: Any, value: Any, *, prefix: str, base: Any) -> Any:
    name, nested = prefix + field.name, _nested(annotation)
    if nested is not None:
        if value is None:
            return None if type(None) in members(annotation) else base
        if isinstance(value, nested):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {shortened(written(value))!r}; expected keys and values")
        base = base if dataclasses.is_dataclass(base) else None
        return _build(nested, value, prefix=f"{name}.", base=base)
    try:
        result = read(annotation, value)
    except MismatchError:
        raise UserError(f"{name} is {shortened(written(value))!r}; expected {expected(annotation)}") from None
    _check_no_secret(name, result)
    _check_choices(name, result, _choices(field, annotation))
    return result


def _check_no_secret(name: str, value: Any) -> None:
    """UserError for a password or an access token: a recipe is written into files that are passed on."""
    text = written(value)
    if redacted(text) != text:
        raise UserError(
            f"{name} is {shortened(redacted(text))!r}, which holds a password or an access token and would be written "
            "into files; log in with `hf auth login`, or download what it leads to and give the folder"
        )


def _check_choices(name: str, value: Any, choices: Sequence[Any]) -> None:
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if choices and item is not None and item not in choices:
            likely = nearest(str(item), [str(choice) for choice in choices])
            raise UserError(
                f"{name} is {shortened(repr(item))}; choose from {', '.join(map(str, choices))}; "
                f"the nearest is {likely!r}"
            )
