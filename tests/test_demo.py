"""The demo's words follow from its numbers, its recipe is the shipped one, and a tiny run of it goes through."""

import json
from pathlib import Path

import pytest
from PIL import Image

from glare import demo
from glare.demo import ADAPTATION, DemoRecipe, summary
from glare.errors import UserError
from glare.pretrain import PretrainRecipe
from glare.recipes import from_dict, read_yaml

SHIPPED = Path(__file__).parents[1] / "training" / "recipes" / "demo.yaml"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([0.30, 0.40], [0.31, 0.43], "Adaptation helped: +2.0 points"),
        ([0.30, 0.40], [0.29, 0.37], "Adaptation did not help: -2.0 points"),
        ([0.30, 0.40], [0.29, 0.43], "Adaptation made no clear difference: +1.0 points"),
        ([0.30, 0.40], [0.30, 0.40], "Adaptation made no clear difference: +0.0 points"),
    ],
)
def test_the_verdict_follows_from_the_scores(before: list[float], after: list[float], verdict: str) -> None:
    text = summary({"untouched": before, "adapted": after})
    assert verdict in text
    assert f"{100 * before[0]:.1f}" in text and f"{100 * after[1]:.1f}" in text


def test_the_shipped_recipe_is_what_the_demo_runs() -> None:
    shipped = read_yaml(SHIPPED, PretrainRecipe)
    assert shipped == ADAPTATION
    from_dict(PretrainRecipe, {**ADAPTATION, "output": "runs/arid"})


def test_a_tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    views = {**ADAPTATION["views"], "num_local": 2, "global_size": 40, "local_size": 24}
    small = {"data": "landcover:arid:3:1", "batch_size": 2, "views": views}
    monkeypatch.setattr(demo, "ADAPTATION", {**ADAPTATION, **small})
    monkeypatch.setattr(demo, "VALIDATION", "landcover:arid:2:3")
    monkeypatch.setattr(demo, "NUM_PICTURES", 2)
    monkeypatch.setattr(demo, "CROP_SIZE", 64)
    recipe = DemoRecipe(output=tmp_path / "demo", steps=2, finetune_steps=2, num_labels=2, num_seeds=1)
    result = demo.run(recipe)
    text = capsys.readouterr().out
    assert "Adaptation" in text and "demo.png" in text
    saved = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert saved["miou"] == result["miou"] and len(saved["miou"]["adapted"]) == 1
    evaluated = json.loads((tmp_path / "demo" / "adapted_seed0" / "eval.json").read_text())
    assert evaluated["miou"] == saved["miou"]["adapted"][0]
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert picture.width > 4 * 200 and picture.height > 2 * 200
    with pytest.raises(UserError, match="in use"):
        demo.run(recipe)
