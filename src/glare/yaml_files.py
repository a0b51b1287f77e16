"""YAML files of plain values: no tag in one can build an object, and no key counts twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from glare.errors import UserError


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """The mapping in a file, empty for an empty file; UserError names the file, and the line of bad YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), path)
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys; expected lines of the form `key: value`")
    return values


def dump(values: Mapping[str, Any]) -> str:
    """YAML text in the order of the keys, lists on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _refuse_duplicates(node: yaml.Node | None, path: str | Path) -> None:
    """YAML lets the last of two equal keys win without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            line = key.start_mark.line + 1
            raise UserError(f"{path} has {key.value!r} twice, the second time in line {line}; leave one")
        seen.add(str(key.value))
        _refuse_duplicates(value, path)


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
