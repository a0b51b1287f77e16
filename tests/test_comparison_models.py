"""Names of compared models, and which of them are one recipe with several seeds."""

from pathlib import Path

import pytest
from tiny_models import adapted_model, tiny_vit

from glare.backbones import load_backbone
from glare.comparison import ADAPTED, FOREIGN, Model
from glare.comparison_models import distinct_names, groups_of, load, recipe_of
from glare.errors import UserError
from glare.run_folder import run_folder_of
from glare.yaml_files import dump


def run(folder: Path, **recipe: object) -> str:
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump({"steps": 10, "views": {"num_local": 4}, **recipe}))
    return str(folder)


def test_runs_that_differ_in_their_seed_alone_are_one_row(tmp_path: Path) -> None:
    paths = [run(tmp_path / f"dubai_{seed}", seed=seed, output=f"o{seed}", device="cpu") for seed in range(3)]
    other = run(tmp_path / "other", seed=3, views={"num_local": 5})
    again = run(tmp_path / "again", seed=0)
    rows, foreign = groups_of([*paths, other], [again])
    assert [row.name for row in rows] == ["dubai (3 seeds)", "other"]
    assert [[model.name for model in row.members] for row in rows] == [["dubai_0", "dubai_1", "dubai_2"], ["other"]]
    assert {model.role for row in rows for model in row.members} == {ADAPTED}
    assert foreign is not None and foreign.members == [Model("again", FOREIGN, again)]


def test_the_same_seed_twice_is_no_replicate(tmp_path: Path) -> None:
    rows, foreign = groups_of([run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=0)], [])
    assert [row.name for row in rows] == ["a", "b"] and foreign is None


def test_runs_whose_batches_were_computed_in_other_parts_are_one_row(tmp_path: Path) -> None:
    paths = [run(tmp_path / f"run_{seed}", seed=seed, gradient_accumulation_steps=1 + seed) for seed in range(2)]
    assert [row.name for row in groups_of(paths, [])[0]] == ["run (2 seeds)"]


def test_a_run_of_more_steps_is_no_replicate(tmp_path: Path) -> None:
    rows, _ = groups_of([run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=1, steps=20)], [])
    assert [row.name for row in rows] == ["a", "b"]


def test_models_without_a_run_folder_stand_alone(tmp_path: Path) -> None:
    rows, _ = groups_of(["org/one", "org/two"], [])
    assert [row.name for row in rows] == ["one", "two"]
    assert recipe_of("org/one") is None and run_folder_of("org/one") is None
    path = run(tmp_path / "run", seed=0)
    assert run_folder_of(f"{path}/model") == Path(path) == run_folder_of(path)


def test_names_are_distinct_and_short() -> None:
    assert distinct_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert distinct_names(["x/run/model", "y/run/model"]) == ["x/run", "y/run"]
    assert distinct_names(["runs/untouched"]) == ["runs/untouched"]
    assert distinct_names(["/run"]) == ["run"]
    with pytest.raises(UserError, match="given twice"):
        distinct_names(["a", "a"])


def test_a_model_of_another_backbone_is_refused(tmp_path: Path) -> None:
    for name, sizes in (("base", {}), ("wide", {"hidden_size": 64})):
        tiny_vit(**sizes).save_pretrained(tmp_path / name)
    adapted_model(tiny_vit()).save_pretrained(tmp_path / "adapted")
    base = load_backbone(str(tmp_path / "base"))
    loaded = load(Model("adapted", ADAPTED, str(tmp_path / "adapted")), base)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(UserError, match="hidden_size 64, the untouched model 32"):
        load(Model("wide", ADAPTED, str(tmp_path / "wide")), base)
