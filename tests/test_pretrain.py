"""The pre-training job: what moves and what does not, exact resume, derived settings, bad input, and the command."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import PRETRAIN, SHARED, write_photos
from transformers import AutoModel, PreTrainedModel

from glare import pretrain, recipes
from glare.errors import UserError
from glare.plots import CHART_TITLES, NOT_CURVES
from glare.pretrain import PretrainRecipe
from glare.pretrain_plan import Plan
from glare.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
SMALL = {**SHARED, **PRETRAIN, "steps": 4, "checkpoint_every": 2}


@pytest.fixture
def vit(tmp_path: Path, make_vit: Callable[..., PreTrainedModel]) -> Path:
    make_vit("dinov2").save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 7)


@pytest.fixture
def given(tmp_path: Path, vit: Path, photos: Path) -> Callable[..., dict[str, Any]]:
    def make(output: str, **changes: Any) -> dict[str, Any]:
        return {**SMALL, "backbone": str(vit), "data": str(photos), "output": tmp_path / output, **changes}

    return make


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_000004" / "state.safetensors")


def logged(folder: Path) -> list[dict[str, float]]:
    timing = {"images_per_second", "data_wait"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_only_adapters_and_heads_move(given: Callable[..., dict[str, Any]], vit: Path) -> None:
    folder = pretrain.run(given("run"))
    before, after = load_file(vit / "model.safetensors"), AutoModel.from_pretrained(folder / "model").backbone
    adapted = {name.replace(".base_layer", ""): value for name, value in after.state_dict().items()}
    untouched = AutoModel.from_pretrained(vit).state_dict()
    assert len(untouched) == len(before)
    for name, value in untouched.items():
        assert torch.equal(value, adapted[name]), name
    moved = [value for name, value in after.state_dict().items() if "uniadapter_up" in name]
    assert moved and all(value.abs().sum() > 0 for value in moved)
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "adapter",
        "report",
        "health.json",
        "price.json",
    }


def test_a_run_records_what_it_cost(given: Callable[..., dict[str, Any]], photos: Path) -> None:
    folder = pretrain.run(given("run"))
    adapter = folder / "adapter" / "adapter_model.safetensors"
    cost = json.loads((folder / "price.json").read_text())
    assert cost["parameters_trained"] == sum(value.numel() for value in load_file(adapter).values())
    assert cost["adapter_bytes"] == adapter.stat().st_size
    assert cost["device"].startswith("cpu") and cost["peak_memory_bytes"] > 0
    assert (cost["steps"], cost["images"]) == (4, len(list(photos.iterdir())))


def test_a_resumed_run_adds_the_seconds_up(
    given: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost_after(**saved: float) -> dict[str, Any]:
        run = RunFolder(folder, write=True)
        last = run.latest_checkpoint()
        assert last is not None
        run.write_checkpoint(last.step, last.tensors, saved)
        pretrain.run(given("run", resume=True))
        values: dict[str, Any] = json.loads((folder / "price.json").read_text())
        return values

    folder = pretrain.run(given("run"))
    monkeypatch.setattr("glare.runtime.time.perf_counter", itertools.count().__next__)
    assert 1000 < cost_after(seconds=1000.0)["seconds"] < 1100  # on a clock that goes on by 1 when it is asked
    assert cost_after()["seconds"] is None  # a checkpoint from before seconds were counted


def test_the_saved_model_the_adapter_and_peft_give_the_same_features(
    given: Callable[..., dict[str, Any]], vit: Path, images: torch.Tensor
) -> None:
    folder = pretrain.run(given("run"))
    whole = AutoModel.from_pretrained(folder / "model").eval()
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(vit), folder / "adapter").eval()
    with torch.no_grad():
        expected, untouched = peft(images).last_hidden_state, AutoModel.from_pretrained(vit).eval()(images)[0]
        assert torch.equal(whole(images).last_hidden_state, expected)
    assert not torch.equal(expected, untouched)


def test_same_seed_same_bits_other_seed_other_bits(given: Callable[..., dict[str, Any]]) -> None:
    first, second, other = (pretrain.run(given(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_same(final_tensors(first), final_tensors(second))
    assert logged(first) == logged(second)
    assert not torch.equal(final_tensors(first)["objective.centre_cls"], final_tensors(other)["objective.centre_cls"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stop_and_resume_equal_the_run_without_a_stop(
    given: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    straight = pretrain.run(given("straight", precision=precision))
    monkeypatch.setattr(Plan, "learning_rate_at", stop_at(3, Plan.learning_rate_at))
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(given("stopped", precision=precision))
    monkeypatch.undo()
    resumed = pretrain.run(given("stopped", precision=precision, resume=True))
    assert_same(final_tensors(straight), final_tensors(resumed))
    assert logged(straight) == logged(resumed)
    assert_same(load_file(straight / "model/model.safetensors"), load_file(resumed / "model/model.safetensors"))


def stop_at(step: int, function: Callable[[Plan, int], float]) -> Callable[[Plan, int], float]:
    def stopping(plan: Plan, now: int) -> float:
        if now == step:
            raise KeyboardInterrupt
        return function(plan, now)

    return stopping


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2_with_registers", "dinov3_vit"])
def test_every_family_trains(
    given: Callable[..., dict[str, Any]], make_vit: Callable[..., PreTrainedModel], tmp_path: Path, family: str
) -> None:
    make_vit(family).save_pretrained(tmp_path / family)
    folder = pretrain.run(given("run", backbone=str(tmp_path / family), steps=2))
    assert len(logged(folder)) == 2
    assert AutoModel.from_pretrained(folder / "model").config.backbone_config.model_type == family


@pytest.mark.parametrize("adapter", ["lora", "norm", "full"])
def test_other_things_to_train(given: Callable[..., dict[str, Any]], vit: Path, adapter: str) -> None:
    folder = pretrain.run(given("run", adapter=adapter, scale=1.0))
    before, after = AutoModel.from_pretrained(vit).state_dict(), AutoModel.from_pretrained(folder / "model").backbone
    changed = {
        name for name, value in after.state_dict().items() if name not in before or not torch.equal(value, before[name])
    }
    if adapter == "lora":
        assert all("lora_" in name or "base_layer" in name for name in changed)
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
    elif adapter == "norm":
        assert changed and all("norm" in name for name in changed)
    else:
        assert len(changed) > len(before) // 2
        assert not (folder / "adapter").exists()
        cost = json.loads((folder / "price.json").read_text())
        assert cost["adapter_bytes"] == (folder / "model" / "model.safetensors").stat().st_size
        assert cost["parameters_trained"] > sum(value.numel() for value in before.values()) / 2


def test_in_the_warm_up_of_the_head_the_adapters_stay(given: Callable[..., dict[str, Any]]) -> None:
    folder = pretrain.run(given("run", head_warmup_steps=2))
    early, late = (load_file(folder / "checkpoints" / f"step_00000{step}" / "state.safetensors") for step in (2, 4))
    ups = [name for name in early if "uniadapter_up.default.weight" in name and name.startswith("student")]
    heads = [name for name in early if "head" in name and name.endswith("weight") and name.startswith("student")]
    assert ups and all(not early[name].any() and late[name].any() for name in ups)
    assert heads and any(not torch.equal(early[name], late[name]) for name in heads)


def test_an_anchor_holds_the_features(given: Callable[..., dict[str, Any]]) -> None:
    free, held = (pretrain.run(given(f"anchor{weight}", anchor=weight, learning_rate=0.05)) for weight in (0.0, 100.0))
    assert "loss_anchor" not in logged(free)[-1]
    assert set(logged(held)[-1]) - NOT_CURVES - {"step"} <= CHART_TITLES.keys(), "every curve of a report has a title"
    distance = logged(held)[-1]["loss_anchor"] / 100
    assert 0 < distance < 0.1
    with pytest.raises(UserError, match="needs the backbone without adapters"):
        pretrain.run(given("full", anchor=1.0, adapter="full"))


def test_short_runs_start_with_a_head_fitted_to_the_images(given: Callable[..., dict[str, Any]]) -> None:
    plain, fitted = (
        pretrain.run(given(init, glare={**SMALL["glare"], "head_init": init})) for init in ("random", "data")
    )
    recipe = recipes.read_yaml(pretrain.run(given("derived")) / "recipe.yaml", PretrainRecipe)
    assert recipe["glare"]["head_init"] == "data" and recipe["anchor"] == 1.0
    informed, uninformed = (
        logged(folder)[0]["marginal_entropy"] - logged(folder)[0]["teacher_entropy"] for folder in (fitted, plain)
    )
    assert informed > uninformed


def test_adapters_after_whole_blocks(given: Callable[..., dict[str, Any]]) -> None:
    folder = pretrain.run(given("run", adapter_place="block"))
    names = {name for name in load_file(folder / "adapter/adapter_model.safetensors") if "uniadapter_up" in name}
    assert len(names) == 6 and all(".layer." in name and ".attention." not in name for name in names)


def test_adapters_go_on_training(given: Callable[..., dict[str, Any]]) -> None:
    first = pretrain.run(given("first"))
    second = pretrain.run(given("second", backbone=str(first)))
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {
        n for n in ours if "uniadapter_" in n
    }
    with pytest.raises(UserError, match=r"already has uniadapter adapters"):
        pretrain.run(given("third", backbone=str(first), adapter="lora"))


@pytest.mark.parametrize("augmentation", ["mask", "noise", "rotation", "none"])
def test_patch_augmentations_run(given: Callable[..., dict[str, Any]], augmentation: str) -> None:
    views = {**SMALL["views"], "patch_augmentation": augmentation, "patch_sampling": "block", "patch_prob": 1.0}
    folder = pretrain.run(given("run", views=views))
    assert all(np.isfinite(line["loss"]) for line in logged(folder))
    assert (logged(folder)[0]["loss_loc1"] == 0) == (augmentation == "none")
    assert ("student.mask_token" in final_tensors(folder)) == (augmentation == "mask")


def test_settings_are_derived_from_the_data_and_said(
    given: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = given("run")
    for key in ("batch_size", "views"):
        asked.pop(key)
    folder = pretrain.run(asked)
    text = capsys.readouterr().out
    assert "batch_size=7" in text and "momentum=0.75" in text and "views.global_size=56" in text
    assert "glare.prototypes" not in text.split("chosen from the data")[1]
    resolved = recipes.read_yaml(folder / "recipe.yaml", PretrainRecipe)
    assert resolved["batch_size"] == 7 and resolved["warmup_steps"] == 1 and resolved["glare"]["prototypes"] == 32


def test_a_split_is_trained_on_and_stays_the_same(given: Callable[..., dict[str, Any]], photos: Path) -> None:
    """Also where the images of another split have the same names."""
    for split in ("train", "val"):
        copytree(photos, photos.parent / "scenes" / split / "images")
    (photos.parent / "scenes" / "train" / "images" / "0.png").unlink()
    copytree(photos.parent / "scenes" / "train", photos.parent / "scenes" / "other")
    scenes = {"data": str(photos.parent / "scenes"), "steps": 1}
    folder = pretrain.run(given("run", **scenes, split="train"))
    recorded = json.loads((folder / "price.json").read_text())
    assert recorded["images"] == len(list(photos.iterdir())) - 1
    assert "| Split | train |" in (folder / "model" / "README.md").read_text()
    for split, message in (
        ("other", "split was train and is other"),
        ("val", "was made with other images: 1 .* came in"),
        ("nowhere", "has no split 'nowhere', which would be nowhere/images; it has other, train, val"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain.run(given("run", **scenes, split=split, resume=True))


def test_bad_images_are_skipped_and_counted_or_stop_a_strict_run(
    given: Callable[..., dict[str, Any]], photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (photos / "note.png").write_text("no image")
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    pretrain.run(given("run", steps=1))
    text = capsys.readouterr().out
    assert "7 images" in text and "2 skipped" in text and "note.png" in text and "cut.png" in text
    with pytest.raises(UserError, match=r"cut\.png"):
        pretrain.run(given("strict", strict=True))
    assert not (tmp_path / "strict").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    given: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Plan.temperature_at
    monkeypatch.setattr(Plan, "temperature_at", lambda plan, step: float("nan") if step == 2 else real(plan, step))
    asked = given("run")
    with pytest.raises(UserError, match=r"nan at step 3 .*learning_rate.*--resume"):
        pretrain.run(asked)
    assert (asked["output"] / "checkpoints" / "step_000002").exists()
    assert not (asked["output"] / "model").exists()
    monkeypatch.undo()
    assert len(logged(pretrain.run({**asked, "resume": True}))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "no/such-vit"}, r"backbone 'no/such-vit' cannot be loaded .*landcover-vit"),
        ({"data": "no-such-folder"}, r"no-such-folder"),
        ({"views": {"global_size": 17}}, r"views.global_size 17 is no multiple of the patch size 4; give 16"),
        ({"views": {"num_locals": 2}}, r"unknown key 'views.num_locals'; the nearest is 'views.num_local'"),
        ({"glare": {"terms": ["glob", "local"]}}, r"glare.terms"),
        ({"device": "cuda"}, r"'cuda' is not available"),
        ({"precision": "fp16"}, r"fp16.*GPU"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(
    given: Callable[..., dict[str, Any]], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        change, message = {"device": "mps"}, r"'mps' is not available"
    with pytest.raises(UserError, match=message):
        pretrain.run(given("run", **change))
    assert not (tmp_path / "run").exists()


def test_an_output_in_use_is_left_alone(given: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"run"):
            pretrain.run(given("run", resume=resume))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_accelerate_launch_with_the_recipe_of_a_run_is_the_same_run(
    given: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    here, there = pretrain.run(given("here")), tmp_path / "there"
    script = str(ROOT / "training" / "pretrain.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script]
    command += ["--recipe", str(here / "recipe.yaml"), "--output", str(there)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr and "waiting for data" in done.stderr
    assert_same(final_tensors(here), final_tensors(there))
    assert logged(here) == logged(there)
