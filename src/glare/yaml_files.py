"""YAML files of plain values: no tag in one can build an object, no key counts twice, and none takes long to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from glare.errors import UserError, first_line

MAX_BYTES = 2**18  # a recipe has some thousand
MAX_DEPTH = 32  # of lists and groups in one another


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """The mapping in a file, empty for an empty file; UserError names the file, and the line of bad YAML."""
    values = parse_yaml(_text(path), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys; expected lines of the form `key: value`")
    return values


def parse_yaml(text: str, name: str) -> Any:
    """The plain values in YAML text, None for none; UserError, with ``name`` and the line, for bad YAML.

    Aliases are refused: a few lines of them can stand for more values than fit into memory.
    """
    try:
        _check_events(text, name)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node, name)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {_problem(error)}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # of scalars that are not what their tag or form says, such as the date 2001-99-99
        raise UserError(f"{name} holds a value that cannot be read ({first_line(error)}); put text in quotes") from None


def dump(values: Mapping[str, Any]) -> str:
    """YAML text in the order of the keys, lists on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, and what occurs twice in full."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _text(path: str | Path) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES // 1024} KiB, which is no recipe; give another file")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; give a YAML file") from None
    except ValueError as error:  # a null byte in the path
        raise UserError(f"{str(path)!r} cannot be read: {error}; give a YAML file") from None


def _check_events(text: str, name: str) -> None:
    """UserError for aliases and for deep nesting, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{name} has an alias (*{event.anchor}) in line {line}; write the value out instead")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{name} is nested more than {MAX_DEPTH} deep in line {line}; recipes need 3 at most")


def _refuse_duplicates(node: yaml.Node | None, name: str) -> None:
    """YAML lets the last of two equal keys win without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            line = key.start_mark.line + 1
            raise UserError(f"{name} has {key.value!r} twice, the second time in line {line}; leave one")
        seen.add(str(key.value))
        _refuse_duplicates(value, name)


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return str(error).splitlines()[0]


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``, the keys as the command line writes them."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
