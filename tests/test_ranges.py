"""Every number of a recipe has its interval, and what lies outside is refused by name before anything is made."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from glare import pretrain, ranges
from glare.bench import BenchRecipe
from glare.classify import ClassifyRecipe
from glare.comparison_recipe import CompareRecipe
from glare.demo import DemoRecipe
from glare.errors import UserError
from glare.finetune import FinetuneRecipe
from glare.inspect import InspectRecipe
from glare.pretrain import PretrainRecipe
from glare.ranges import RANGES, inside
from glare.recipes import from_dict
from glare.train_state import clip_each

ELSEWHERE = {"window", "stride"}
"""Numbers that ``dense_inference.Sweep`` checks, the one beside the other."""

NEEDED: dict[type[Any], dict[str, Any]] = {
    PretrainRecipe: {"backbone": "b", "data": "d", "output": Path("o")},
    FinetuneRecipe: {"model": "m", "data": "d", "output": Path("o")},
    ClassifyRecipe: {"model": "m", "data": "d", "output": Path("o")},
    CompareRecipe: {"base": "b", "adapted": ["a"], "data": "d", "output": Path("o")},
    InspectRecipe: {"data": "d", "output": Path("o")},
    BenchRecipe: {},
    DemoRecipe: {},
}


def kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation, those in lists and unions too."""
    inner = get_args(annotation)
    return set().union(*map(kinds, inner)) if inner else {annotation}


def numeric(recipe: type[Any], where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and annotation of all fields that hold numbers, nested ones too."""
    for name, annotation in get_type_hints(recipe).items():
        if dataclasses.is_dataclass(annotation):
            yield from numeric(annotation, (*where, name))  # type: ignore[arg-type]
        elif kinds(annotation) & {int, float}:
            yield (*where, name), annotation


def outside(name: str, annotation: Any) -> list[Any]:
    """Values just outside the interval, and the open ends themselves."""
    interval = RANGES[name]
    low, high = map(float, interval[1:-1].split(", "))
    values = [low - 1, -1e9] + ([low] if interval[0] == "(" else [])
    if math.isfinite(high):
        values += [high + 1] + ([high] if interval[-1] == ")" else [])
    whole = float not in kinds(annotation)
    length = str(annotation).count("float") or str(annotation).count("int")
    typed = [int(value) if whole else value for value in values]
    return [[value] * length for value in typed] if "tuple" in str(annotation) else typed


FIELDS = [(recipe, path, annotation) for recipe in NEEDED for path, annotation in numeric(recipe)]


@pytest.mark.parametrize(("recipe", "path", "annotation"), FIELDS, ids=lambda item: getattr(item, "__name__", None))
def test_every_number_is_bounded(recipe: type[Any], path: tuple[str, ...], annotation: Any) -> None:
    assert path[-1] in RANGES or path[-1] in ELSEWHERE, f"give {'.'.join(path)} an interval in ranges.RANGES"
    for value in outside(path[-1], annotation) if path[-1] in RANGES else [-1, 0]:
        given = value
        for name in reversed(path):
            given = {name: given}
        with pytest.raises(UserError, match=rf"^(.*: )?{path[-1]} is .*; give "):
            from_dict(recipe, {**NEEDED[recipe], **given})


def test_there_is_something_to_bound() -> None:
    names = {".".join(path) for _, path, _ in FIELDS}
    assert {"steps", "views.jitter", "glare.regions.count", "scale", "warmup_steps"} <= names and len(names) > 40


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ("[1, inf)", "at least 1"),
        ("(0, inf)", "more than 0"),
        ("[0, 1]", "0 to 1"),
        ("(0, 1]", "more than 0 and at most 1"),
        ("[0, 1)", "at least 0 and less than 1"),
        ("[0.001, inf)", "at least 0.001"),
    ],
)
def test_an_interval_is_read_and_said(interval: str, words: str) -> None:
    assert ranges.in_words(interval) == words
    low, high = map(float, interval[1:-1].split(", "))
    assert inside(interval, low) == (interval[0] == "[")
    assert inside(interval, high) == (interval[-1] == "]")
    assert inside(interval, low + 0.5) and not inside(interval, low - 0.5) and not inside(interval, math.nan)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps is 0; give at least 1"),
        ({"teacher_temperature": [0, 0.04]}, "teacher_temperature is 0.0,0.04; give at least 0.001 each"),
        ({"views": {"local_area": [0.5, 0.25]}}, "views: local_area is 0.5,0.25; give the lower one first"),
        ({"views": {"num_local": -1}}, "views: num_local is -1; give at least 0"),
        ({"glare": {"regions": {"count": 0}}}, "glare.regions: count is 0; give at least 1"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        pretrain.run({**NEEDED[PretrainRecipe], "output": tmp_path / "run", **given})
    assert str(caught.value) == said
    assert not (tmp_path / "run").exists()


def test_a_clip_of_nothing_leaves_gradients_as_they_are() -> None:
    weight = nn.Parameter(torch.zeros(2))
    for limit, expected in ((0.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (9.0, [3.0, 4.0])):
        weight.grad = torch.tensor([3.0, 4.0])
        assert clip_each([weight], limit) == 5
        torch.testing.assert_close(weight.grad, torch.tensor(expected), atol=1e-5, rtol=0)
