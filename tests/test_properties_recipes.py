"""Properties of recipes: whatever a mapping, a YAML file or a command line holds, a recipe or one sentence."""

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glare import recipes, yaml_files
from glare.errors import UserError
from glare.finetune import FinetuneRecipe
from glare.inference import PredictRecipe
from glare.pretrain import PretrainRecipe

LONGEST = 700  # letters of a message, whatever was given
VALID: dict[type[Any], dict[str, Any]] = {
    PretrainRecipe: {"backbone": "b", "data": "d", "output": "o"},
    FinetuneRecipe: {"model": "m", "data": "d", "output": "o"},
    PredictRecipe: {"model": "m", "output": "o", "images": ["a"]},
}
NAMES = sorted({key.name for recipe_class in VALID for key in recipes._keys(recipe_class)} | {"views", "glare", "stps"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**63, 10**400]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e-3", ".nan", "nan", "inf", "null", "9" * 5000, "a\0b", "~", "~nobody/x", "\ud800", " "]),
    st.binary(max_size=4),
    st.dates(),
)
KEYS = st.one_of(st.sampled_from(NAMES), st.text(max_size=8), st.integers(), st.none(), st.just("x" * 9000))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


def is_one_sentence(error: UserError) -> bool:
    text = str(error)
    return bool(text.strip()) and "\n" not in text and len(text) <= LONGEST


@given(st.sampled_from(list(VALID)), st.dictionaries(KEYS, VALUES, max_size=4))
@example(PretrainRecipe, {"steps": float("nan")})
@example(PretrainRecipe, {"learning_rate": float("inf")})
@example(PretrainRecipe, {"batch_size": 10**30})
@example(PretrainRecipe, {"views": {"global_size": 10**30}})
def test_any_mapping_is_a_recipe_or_one_sentence(recipe_class: type[Any], given_values: dict[Any, Any]) -> None:
    try:
        recipe = recipes.from_dict(recipe_class, VALID[recipe_class] | given_values)
    except UserError as error:
        assert is_one_sentence(error), error
    else:
        text = recipes.to_yaml(recipe)
        assert recipes.from_dict(recipe_class, yaml_files.parse_yaml(text, "it") or {}) == recipe
        text.encode("utf-8", "backslashreplace")


ARGUMENTS = st.one_of(
    st.sampled_from(["--steps", "--recipe", "--output", "-", "--", "=", "steps=", "views.num_local=2", "a=b=c"]),
    st.text(max_size=10),
    st.builds("--{}={}".format, st.sampled_from(NAMES), st.text(max_size=6)),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.text(max_size=6)),
)


@given(st.sampled_from(list(VALID)), st.lists(ARGUMENTS, max_size=5))
def test_any_command_line_is_a_recipe_or_one_sentence(recipe_class: type[Any], argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            recipes.parse(recipe_class, argv, prog="glare job")
        except UserError as error:
            assert str(error).strip()
        except SystemExit as done:
            assert done.code == 0  # --help


PIECES = (
    """a: 1\n|&x |*x |!!int |!!timestamp |- |? |: |[|{|'|"|>|\t|\0|---\n|...\n|%YAML 9.9\n|<<: |0x|1:60|=|#|\ufeff"""
)
YAML = st.one_of(
    st.text(max_size=80),
    st.binary(max_size=80),
    st.dictionaries(KEYS.map(str), VALUES, max_size=3).map(lambda values: json.dumps(values, default=str)),
    st.lists(st.sampled_from(PIECES.split("|")), max_size=12).map("".join),
)


@given(YAML)
def test_any_file_is_a_mapping_or_one_sentence(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(yaml_files.read_mapping(file), dict)
        except UserError as error:
            assert str(file) in str(error) and is_one_sentence(error)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
ODDITIES = {
    "billion laughs": (LAUGHS, r"an alias \(\*a0\) in line 2"),
    "an alias of itself": ("a: &a [*a]", r"an alias \(\*a\)"),
    "merged keys": ("a: &a {b: 1}\nc: {<<: *a}", "an alias"),
    "deep lists": ("a: " + "[" * 100_000, "nested more than 32 deep|not valid YAML"),
    "deep groups": ("\n".join(" " * depth + "a:" for depth in range(300)), "nested more than 32 deep"),
    "a tag": ("a: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
    "a name of Python": ("a: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
    "two equal keys": ("a: 1\nb: 2\na: 3", "has 'a' twice, the second time in line 3"),
    "other letters than UTF-8": (b"a: \xff\xfe", "not text in UTF-8"),
    "a null byte": ("a: \0", "not valid YAML: unacceptable character"),
    "a tab": ("a:\n\t- b", "not valid YAML: found character '\\\\t'"),
    "no such day": ("a: 2001-99-99", "a value that cannot be read .*put text in quotes"),
    "no number": ("a: !!int x", "a value that cannot be read"),
    "no date": ("a: !!timestamp x", "a value that cannot be read"),
    "no truth": ("a: !!bool x", "a value that cannot be read"),
    "an empty number": ("a: !!int ''", "a value that cannot be read"),
    "too many digits": ("a: " + "9" * 5000, "a value that cannot be read"),
    "a key of many values": ("? [1, 2]\n: 3", "not valid YAML: found unhashable key"),
    "several documents": ("a: 1\n---\nb: 2", "not valid YAML: but found another document"),
    "a large file": ("a: 1\n#" + "x" * 2**18, "more than 256 KiB"),
    "a list": ("- a", "holds no keys"),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_oddities_of_yaml_are_refused_at_once(name: str, tmp_path: Path) -> None:
    content, message = ODDITIES[name]
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        yaml_files.read_mapping(tmp_path / "a.yaml")
    assert is_one_sentence(caught.value) and str(tmp_path / "a.yaml") in str(caught.value)
    assert time.process_time() - started < 5
