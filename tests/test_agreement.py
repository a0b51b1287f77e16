"""Processes that would not do the same stop before the first step, all with the same sentence."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glare import agreement
from glare.agreement import check_agreement
from glare.errors import UserError
from glare.finetune import FinetuneRecipe

RECIPE = FinetuneRecipe(model="m", data="d", output=Path("o"), steps=60)
NAMES = ["a", "b", "c"]


def together(monkeypatch: pytest.MonkeyPatch, *processes: tuple[FinetuneRecipe, list[str] | None]) -> list[str]:
    """What each process says when these check at once; nothing of one that goes on."""
    sent: list[Any] = []
    monkeypatch.setattr(agreement, "gather_object", lambda own: sent.extend(own) or sent)
    accelerator: Any = SimpleNamespace(num_processes=len(processes))
    for recipe, names in processes:  # the first round collects what the second gathers
        try:
            check_agreement(accelerator, recipe, names)
        except UserError:
            continue
    found = sent[: len(processes)]
    monkeypatch.setattr(agreement, "gather_object", lambda _: found)
    said = []
    for recipe, names in processes:
        try:
            check_agreement(accelerator, recipe, names)
        except UserError as error:
            said.append(str(error))
    return said


def test_processes_with_the_same_go_on_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(RECIPE, data="/scratch/1", model="/scratch/vit", num_workers=2)
    assert not together(monkeypatch, (RECIPE, NAMES), (elsewhere, NAMES), (RECIPE, NAMES))
    assert not together(monkeypatch, (RECIPE, None), (RECIPE, None))


@pytest.mark.parametrize(
    ("recipe", "names", "said"),
    [
        (RECIPE, ["a", "b"], "processes 0 and 1 are not about to do the same: they have 3 and 2 images, or others;"),
        (RECIPE, ["a", "c", "b"], "they have 3 and 3 images, or others; give all of them"),
        (RECIPE, ["a", "b,c"], "they have 3 and 2 images"),
        (replace(RECIPE, steps=58), NAMES, "the same: steps is 60 and 58; give all of them the same data, readable"),
        (replace(RECIPE, steps=58), ["a"], "they have 3 and 1 images, or others; steps is 60 and 58; give"),
        (replace(RECIPE, seed=1), NAMES, "seed is 0 and 1;"),
    ],
)
def test_others_stop_with_one_sentence_on_all(
    monkeypatch: pytest.MonkeyPatch, recipe: FinetuneRecipe, names: list[str], said: str
) -> None:
    first, second = together(monkeypatch, (RECIPE, NAMES), (recipe, names))
    assert first == second and said in first


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "gather_object", None)
    check_agreement(SimpleNamespace(num_processes=1), RECIPE, NAMES)  # type: ignore[arg-type]
