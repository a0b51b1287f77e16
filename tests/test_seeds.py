"""Runs with several seeds: what they sum up to, and how they go on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_samples import CLASSES, write_labelled
from tiny_models import tiny_vit

from glare import UserError, finetune
from glare.cli import main as glare_main
from glare.finetune import FinetuneRecipe, run_seeds
from glare.recipes import to_yaml
from glare.seeds import summary, table


def evaluation(seed: int, miou: float | None, **iou: float | None) -> dict[str, Any]:
    scores = {"miou": miou, "aacc": 0.5, "macc": 0.25, "iou": iou}
    facts = {"num_images": 4, "data": "d", "split": "val", "match": None, "inference": {}, "versions": {}}
    return {**scores, **facts, "model": f"seed_{seed}/model", "seed": seed}


@pytest.fixture
def recipe(tmp_path: Path) -> FinetuneRecipe:
    write_labelled(tmp_path / "data" / "train", 4)
    write_labelled(tmp_path / "data" / "val", 2)
    tiny_vit().save_pretrained(tmp_path / "vit")
    return FinetuneRecipe(
        model=str(tmp_path / "vit"),
        data=str(tmp_path / "data"),
        output=tmp_path / "runs",
        head="linear",
        steps=2,
        crop_size=16,
        batch_size=2,
        seed=3,
        seeds=2,
        precision="fp32",
        report_to="none",
    )


def test_the_deviation_is_that_of_the_sample() -> None:
    values = [0.512, 0.498, 0.523]
    found = summary([evaluation(seed, value, road=value / 2) for seed, value in enumerate(values)])
    assert found["miou"]["mean"] == pytest.approx(np.mean(values))
    assert found["miou"]["std"] == pytest.approx(np.std(values, ddof=1)) and found["miou"]["values"] == values
    assert found["iou"]["road"]["std"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert found["aacc"] == {"mean": 0.5, "std": 0.0, "values": [0.5] * 3}
    assert found["seeds"] == [0, 1, 2] and found["models"][1] == "seed_1/model" and found["split"] == "val"


def test_a_class_that_is_not_in_all_runs_has_no_mean_and_one_run_no_deviation() -> None:
    found = summary([evaluation(0, 0.4, sea=None, road=0.4), evaluation(1, 0.2, sea=0.0, road=0.4)])
    assert found["iou"]["sea"] == {"mean": None, "std": None, "values": [None, 0.0]}
    lines = [line.split() for line in table(found).splitlines()]
    assert lines[:3] == [["class", "IoU"], ["sea", "-"], ["road", "40.0", "±", "0.0"]]
    assert table(found).splitlines()[3] == "mIoU 30.0 ± 14.1  aAcc 50.0 ± 0.0  mAcc 25.0 ± 0.0"
    assert "seeds 0, 1 (4 images)" in table(found)
    alone = summary([evaluation(5, 0.4, sea=None)])
    assert alone["miou"] == {"mean": 0.4, "std": None, "values": [0.4]} and "mIoU 40.0  aAcc" in table(alone)


def test_every_seed_is_the_run_it_would_be_alone(recipe: FinetuneRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_seeds(recipe)
    assert json.loads((recipe.output / "seeds.json").read_text()) == found
    assert found["seeds"] == [3, 4] and list(found["iou"]) == CLASSES and found["miou"]["std"] > 0
    assert "mean and sample standard deviation of seeds 3, 4 (2 images)" in capsys.readouterr().out
    alone = finetune.run(replace(recipe, seeds=1, seed=4, output=recipe.output.with_name("alone")))
    evaluations = [json.loads((run / "eval.json").read_text()) for run in (alone, recipe.output / "seed_4")]
    assert evaluations[0]["iou"] == evaluations[1]["iou"]


def test_a_stopped_job_goes_on_and_may_get_more_seeds(
    recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = finetune.train_step

    def stop_in_the_second_run(*args: Any, **kwargs: Any) -> float:
        if kwargs["seed"] == 4 and kwargs["step"] == 1:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    recipe = replace(recipe, checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "train_step", stop_in_the_second_run)
        run_seeds(recipe)
    assert not (recipe.output / "seeds.json").exists()
    with pytest.raises(UserError, match="is in use; give another --output, or --resume"):
        run_seeds(recipe)
    first = (recipe.output / "seed_3" / "eval.json").stat().st_mtime_ns
    capsys.readouterr()
    found = run_seeds(replace(recipe, seeds=3, resume=True))
    out = capsys.readouterr().out
    assert "seed 3:" not in out and "seed 4:" in out and "seed 5:" in out and found["seeds"] == [3, 4, 5]
    assert (recipe.output / "seed_3" / "eval.json").stat().st_mtime_ns == first
    with pytest.raises(UserError, match="has another recipe: head was linear"):
        run_seeds(replace(recipe, head="fpn", resume=True))


def test_a_job_that_was_killed_before_a_card_still_writes_it(
    recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(finetune, "write_card", None)
        run_seeds(recipe)
    assert (recipe.output / "seed_3" / "eval.json").exists()
    monkeypatch.setattr(finetune, "train_step", lambda *_, seed, **__: 0.0 if seed == 4 else pytest.fail("a step"))
    run_seeds(replace(recipe, resume=True))
    assert all((recipe.output / f"seed_{seed}" / "model" / "README.md").exists() for seed in (3, 4))


def begun(run: Path, recipe: FinetuneRecipe, *, done: bool = False) -> None:
    """What a run leaves that was stopped before its first checkpoint, or that is done."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    if done:
        (run / "eval.json").write_text(json.dumps(evaluation(recipe.seed, 0.5)))
        (run / "model").mkdir()
        (run / "model" / "README.md").write_text("a card")


def refused(recipe: FinetuneRecipe, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in recipe.output.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(finetune, "run", lambda *_, **__: pytest.fail("it trains"))
        run_seeds(replace(recipe, resume=True))
    assert said in str(caught.value)
    assert {path: path.read_bytes() for path in recipe.output.rglob("*") if path.is_file()} == before


def test_a_run_that_is_done_holds_the_others_to_its_steps(
    recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(recipe.output, recipe)
    run = recipe.output / "seed_3"
    begun(run, replace(recipe, seeds=1, output=run), done=True)
    said = f"the run in {run} has another recipe: steps was 2 and is 9; give --resume with the old values"
    refused(replace(recipe, steps=9), said, monkeypatch)
    said = f"the run in {recipe.output} has another recipe: steps was 2 and is null"
    refused(replace(recipe, steps=None), said, monkeypatch)


def test_a_run_that_went_on_alone_with_another_rate_is_not_like_the_others(
    recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, learning_rate=1e-3)
    begun(recipe.output, recipe)
    begun(recipe.output / "seed_3", replace(recipe, seeds=1, learning_rate=1e-4))
    refused(recipe, "has another recipe: learning_rate was 0.0001 and is 0.001;", monkeypatch)


def test_all_runs_go_on_with_more_steps_where_none_is_done(recipe: FinetuneRecipe) -> None:
    begun(recipe.output, recipe)
    begun(recipe.output / "seed_3", replace(recipe, seeds=1, warmup_steps=0))
    assert run_seeds(replace(recipe, steps=3, resume=True))["seeds"] == [3, 4]
    recipes = [(recipe.output / f"seed_{seed}" / "recipe.yaml").read_text() for seed in (3, 4)]
    assert all("\nsteps: 3\n" in text for text in recipes)


def test_the_folder_of_a_single_run_is_not_taken_over(recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(recipe.output, replace(recipe, seeds=1))
    said = (
        f"{recipe.output} is the folder of a single run, not of several seeds; give --seeds 2 another --output, or go "
        "on with that run without --seeds"
    )
    refused(recipe, said, monkeypatch)


def test_seeds_need_something_to_evaluate_on(
    recipe: FinetuneRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["finetune", "--model", recipe.model, "--data", str(tmp_path / "data" / "train")]
    assert glare_main([*argv, "--output", str(tmp_path / "no"), "--seeds", "2"]) == 2
    assert "--seeds needs images to evaluate on: give --val-split" in capsys.readouterr().err
    assert glare_main([*argv, "--output", str(tmp_path / "no"), "--seeds", "0"]) == 2
    assert "seeds is 0; give at least 1" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
