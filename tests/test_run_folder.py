"""Nothing half-written, nothing overwritten, and a resumed folder equals one that never stopped."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from glare.errors import UserError
from glare.pretrain import PretrainRecipe
from glare.recipes import from_dict, option, required, to_yaml
from glare.run_folder import RunFolder, atomic_write_json, atomic_write_text
from glare.yaml_files import read_mapping


@dataclass(frozen=True)
class Views:
    num_local: int = option(10, "local views")


@dataclass(frozen=True)
class Job:
    output: Path = required("folder")
    learning_rate: float = option(1e-3, "peak")
    steps: int = option(10, "steps")
    log_every: int = option(1, "steps")
    resume: bool = option(False, "go on")
    views: Views = option(Views(), "views")


def started(path: Path, **changes: object) -> RunFolder:
    recipe = from_dict(Job, {"output": path, **changes})
    folder = RunFolder.create(path, resume=recipe.resume)
    folder.begin(recipe)
    return folder


def everything(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_check_touches_nothing(tmp_path: Path) -> None:
    RunFolder.check(tmp_path / "a" / "b")
    RunFolder.check(tmp_path)
    assert everything(tmp_path) == set()


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("mine")
    for resume, remedy in ((False, "--resume to go on"), (None, "give a new or empty one")):
        with pytest.raises(UserError, match=f"{tmp_path} is in use.*{remedy}"):
            RunFolder.create(tmp_path, resume=resume)
    with pytest.raises(UserError, match=r"holds no run to --resume \(no recipe.yaml\)"):
        RunFolder.create(tmp_path, resume=True)
    assert everything(tmp_path) == {"picture.png"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file; give a folder"):
        RunFolder.check(tmp_path / "file")
    with pytest.raises(UserError, match=r"file is no folder one may write to"):
        RunFolder.check(tmp_path / "file" / "run")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is no folder one may write to"):
        RunFolder.check(tmp_path / "run")


def test_resume_of_nothing_starts_from_nothing(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", resume=True)
    assert folder.latest_checkpoint() is None


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_recipe_was_there(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.partial").write_text("output: o")
    folder = started(tmp_path / "run", resume=resume)
    assert everything(folder.path) == {"recipe.yaml"}


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    folder.log(1, loss=1.0)
    (folder.path / "checkpoints" / ".step_000001.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="run is in use; give another --output, or --resume to go on with it"):
        started(tmp_path / "run")
    resumed = started(tmp_path / "run", resume=True)
    assert resumed.latest_checkpoint() is None
    assert everything(resumed.path) == {"recipe.yaml", "metrics.jsonl", "checkpoints"}
    assert (resumed.path / "metrics.jsonl").read_text() == ""


def test_a_resumed_run_has_the_metrics_that_its_checkpoint_has_seen(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    folder.log(1, loss=1.0)
    folder.write_checkpoint(1, {"a": torch.zeros(1)}, {})
    seen = (folder.path / "metrics.jsonl").read_bytes()
    folder.log(1, miou=0.5)  # of the same step, after the checkpoint: it comes again
    started(tmp_path / "run", resume=True)
    assert (folder.path / "metrics.jsonl").read_bytes() == seen


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    folder.log(1, loss=1.0)
    folder.write_checkpoint(1, {"a": torch.zeros(1)}, {})
    (folder.path / "checkpoints/step_000001/SHA256SUMS").write_text("")
    before = files(folder.path)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UserError, match=r"no checkpoint in .* can be used"),
    ):
        started(tmp_path / "run", resume=True)
    assert files(folder.path) == before


def test_recipe_is_resolved_yaml(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", steps=3)
    assert from_dict(Job, read_mapping(folder.path / "recipe.yaml")) == Job(output=tmp_path / "run", steps=3)


def test_metrics_are_json_even_when_numbers_are_not(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    folder.log(1, loss=0.5, grad=math.nan, text="ä")
    folder.log(2, loss=-math.inf, parts={"a": [math.nan, 1]})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5, "grad": None, "text": "ä"}
    assert json.loads(lines[1]) == {"step": 2, "loss": None, "parts": {"a": [None, 1]}}


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    folder.write_checkpoint(1, {"a": torch.zeros(1)}, {})
    before = everything(folder.path)
    with pytest.raises(TypeError):
        folder.write_checkpoint(2, {"a": torch.zeros(1)}, {"not json": {1, 2}})
    with pytest.raises(RuntimeError, match="full"), folder.publish("model") as path:
        (path / "half").write_text("half")
        raise RuntimeError("full")
    with pytest.raises(TypeError):
        atomic_write_json(folder.path / "eval.json", {"a": {1}})
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(folder.path / "recipe.yaml", "\udc80")
    assert everything(folder.path) == before
    assert read_mapping(folder.path / "recipe.yaml")["steps"] == 10


def train(path: Path, *, start: int, end: int, resume: bool) -> RunFolder:
    folder = started(path, resume=resume)
    for step in range(start + 1, end + 1):
        folder.log(step, loss=1 / step)
        if step % 4 == 0:
            folder.write_checkpoint(step, {"a": torch.tensor(step)}, {})
    return folder


def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", start=0, end=10, resume=False)
    stopped = train(tmp_path / "stopped", start=0, end=6, resume=False)
    with (stopped.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    (stopped.path / "checkpoints" / ".step_000008.partial").mkdir()
    (stopped.path / "checkpoints" / ".step_000008.partial" / "state.json").touch()
    (stopped.path / ".eval.json.partial").touch()
    train(stopped.path, start=4, end=10, resume=True)
    assert everything(stopped.path) == everything(straight.path)
    assert (stopped.path / "metrics.jsonl").read_bytes() == (straight.path / "metrics.jsonl").read_bytes()


def test_resume_before_the_first_checkpoint_starts_the_metrics_again(tmp_path: Path) -> None:
    train(tmp_path / "run", start=0, end=3, resume=False)
    folder = started(tmp_path / "run", resume=True)
    assert (folder.path / "metrics.jsonl").read_text() == ""


def test_resume_with_another_recipe(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", start=0, end=3, resume=False)
    metrics = (folder.path / "metrics.jsonl").read_text()
    recipe = Job(output=folder.path, resume=True, learning_rate=0.1, views=Views(num_local=2), log_every=7)
    with pytest.raises(UserError) as caught:
        folder.begin(recipe)
    message = str(caught.value)
    assert "learning_rate was 0.001 and is 0.1; views.num_local was 10 and is 2;" in message
    assert "log_every" not in message
    assert (folder.path / "metrics.jsonl").read_text() == metrics
    same = replace(recipe, learning_rate=1e-3, views=Views(), steps=20)
    folder.begin(same)
    assert (folder.path / "recipe.yaml").read_text() == to_yaml(same)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (["a", "b", "c", "d"], "other images: 1 (d) came in;"),
        (["a"], "other images: 2 (b, c) dropped out;"),
        (["b", "c", "x"], "other images: 1 (x) came in, 1 (a) dropped out;"),
        (["a", "c", "b"], "other images: they have another order;"),
        (list("abcdefgh"), "other images: 5 (d, e, f, ...) came in;"),
    ],
)
def test_resume_with_other_images(tmp_path: Path, images: list[str], said: str) -> None:
    folder, recipe = started(tmp_path / "run"), Job(output=tmp_path / "run", resume=True)
    folder.begin(recipe, images=["a", "b", "c"])
    folder.begin(recipe, images=images)  # before the first checkpoint the run begins anew
    folder.begin(recipe, images=["a", "b", "c"])
    folder.write_checkpoint(1, {"a": torch.zeros(1)}, {})
    (folder.path / ".model.partial").mkdir()
    before = files(folder.path)
    with pytest.raises(UserError) as caught:
        folder.begin(replace(recipe, learning_rate=0.1), images=images)
    assert str(caught.value) == (
        f"the run in {folder.path} was made with {said} "
        "give --resume with the images as they were, or another --output without it"
    )
    assert files(folder.path) == before and (folder.path / ".model.partial").exists()
    checkpoint, _ = folder.begin(recipe, images=["a", "b", "c"])
    assert checkpoint is not None and checkpoint.images == ["a", "b", "c"]


def test_a_checkpoint_that_knows_no_images_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", start=0, end=4, resume=False)
    checkpoint, _ = folder.begin(Job(output=folder.path, resume=True), images=["a"])
    assert checkpoint is not None and checkpoint.images is None


def test_resume_with_fewer_steps_than_there_are(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", start=0, end=9, resume=False)
    (folder.path / ".model.partial").mkdir()
    before = files(folder.path)
    with pytest.raises(UserError) as caught:
        folder.begin(Job(output=folder.path, resume=True, steps=7))
    assert str(caught.value) == (
        f"the last checkpoint in {folder.path} has 8 steps, more than the 7 that were asked for (--steps or --epochs); "
        "give --resume with --steps 8 or more, or another --output without it"
    )
    assert files(folder.path) == before and (folder.path / ".model.partial").exists()
    checkpoint, _ = folder.begin(Job(output=folder.path, resume=True, steps=8))
    assert checkpoint is not None and checkpoint.step == 8


def test_a_folder_is_published_whole_over_an_older_one(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    for name in ("old", "new"):
        with folder.publish("model") as path:
            (path / "deep").mkdir()
            (path / "deep" / name).touch()
            assert not (folder.path / "model" / "deep" / name).exists()
    assert everything(folder.path / "model") == {"deep", "deep/new"}


def test_other_processes_may_have_the_data_elsewhere(tmp_path: Path) -> None:
    """Whether the main process has written its recipe by then or not."""
    recipe = PretrainRecipe(backbone="/node1/vit", data="/node1/photos", output=tmp_path)
    elsewhere = replace(recipe, backbone="/node2/vit", data="/node2/photos", resume=True)
    RunFolder.create(tmp_path).begin(recipe)
    RunFolder.create(tmp_path, write=False).begin(elsewhere)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        RunFolder.create(tmp_path, write=False).begin(replace(elsewhere, seed=1))
    with pytest.raises(UserError, match="data was /node1/photos and is /node2/photos"):
        RunFolder.create(tmp_path, resume=True).begin(elsewhere)


def test_other_processes_only_read(tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "run", write=False)
    other.begin(Job(output=tmp_path / "run"))
    other.log(1, loss=1.0)
    other.write_checkpoint(1, {"a": torch.zeros(1)}, {})
    assert everything(tmp_path) == set()
    main = started(tmp_path / "run")
    main.write_checkpoint(3, {"a": torch.zeros(1)}, {})
    read = other.latest_checkpoint()
    assert read is not None
    assert read.step == 3
