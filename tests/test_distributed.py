"""A step is the same however a batch is shared out: over processes, and over passes whose gradients are accumulated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import Forks, wait_until
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file
from small_runs import PRETRAIN, Given, pretraining, ranks_of_two, write_photos
from tiny_models import tiny_vit
from torch import Tensor
from transformers import AutoModel

from glare import classify, finetune, pretrain, recipes
from glare.classify import ClassifyRecipe
from glare.errors import UserError
from glare.finetune import FinetuneRecipe

ROOT = Path(__file__).parents[1]
STEPS = 3


@pytest.fixture
def given(tmp_path: Path) -> Given:
    glare = {**PRETRAIN["glare"], "local_queries": True}
    fixed = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "anchor": 0.5, "glare": glare}
    return pretraining(tmp_path, photos=11, **fixed)


def launched(given: dict[str, Any], script: Path = ROOT / "training" / "pretrain.py") -> Path:
    """A recipe on two processes of torchrun, without a GPU; ``accelerate launch --cpu`` needs MPI for several."""
    done = torchrun(given, script)
    assert done.returncode == 0, done.stderr
    output: Path = given["output"]
    return output


def torchrun(given: dict[str, Any], script: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), "--recipe", str(written(given))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def written(given: dict[str, Any]) -> Path:
    file: Path = given["output"].with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**given, "output": str(given["output"])}))
    return file


def forked(forks: Forks, given: dict[str, Any], script: Path = ROOT / "training" / "pretrain.py") -> Path:
    """The same processes, with the same variables as of torchrun, without its seconds of imports."""
    argv, log = ["--recipe", str(written(given))], given["output"].with_suffix(".log")
    pids = [forks.start(argv, log, script=script, environment=rank) for rank in ranks_of_two()]
    wait_until(pids, seconds=300)
    assert [forks.wait(pid) for pid in pids] == [0, 0], log.read_text()
    output: Path = given["output"]
    return output


def state(run: Path) -> dict[str, Tensor]:
    """Student, teacher, centres and optimizer at the end."""
    return load_file(run / "checkpoints" / f"step_{STEPS:06d}" / "state.safetensors")


def logged(run: Path) -> list[dict[str, float]]:
    timing = {"images_per_second", "data_wait"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("k_proj.bias"):
            continue  # it changes nothing, so its gradient is rounding alone, of which AdamW makes whole steps
        torch.testing.assert_close(
            ours[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len(logged(found)) == STEPS
    for line, other in zip(logged(found), logged(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_two_processes_and_accumulated_passes_compute_what_one_process_does(given: Given, forks: Forks) -> None:
    one = pretrain.run(given("one"))
    assert_same_run(pretrain.run(given("passes", gradient_accumulation_steps=2)), one)
    assert_same_run(launched(given("two")), one)
    assert_same_run(forked(forks, given("both", gradient_accumulation_steps=4)), one)


OTHER_WEIGHTS = """
import os, sys
from glare import pretrain

def load(name, load_backbone=pretrain.load_backbone):
    model = load_backbone(name)
    if os.environ["RANK"] == "1":
        for parameter in model.parameters():
            parameter.data += 0.1
    return model

pretrain.load_backbone = load
pretrain.main(sys.argv[1:])
"""


def test_sharded_blocks_compute_the_same(given: Given, forks: Forks, tmp_path: Path) -> None:
    """Also where a process has found other weights than the main one."""
    script = tmp_path / "other_weights.py"
    script.write_text(OTHER_WEIGHTS)
    assert_same_run(forked(forks, given("sharded", shard=True), script), pretrain.run(given("whole")))


def test_a_fully_trained_sharded_vit_resumes_and_is_saved_whole(given: Given, forks: Forks) -> None:
    """Also where an earlier checkpoint becomes the model."""
    full = {"adapter": "full", "anchor": 0.0, "checkpoint_every": 1, "warmup_steps": 1, "select": "health"}
    # AdamW magnifies the rounding of gradients that are nearly zero, in proportion to the rate
    full |= {"momentum": 0.9, "momentum_end": 0.9, "learning_rate": 1e-4}
    for changes in ({"steps": STEPS - 1}, {"steps": STEPS, "resume": True}):
        sharded = forked(forks, given("sharded", shard=True, **full, **changes))
        whole = pretrain.run(given("whole", **full, **changes))
    assert_same_run(sharded, whole)
    exported = [json.loads((run / "health.json").read_text())["exported_step"] for run in (sharded, whole)]
    assert exported[0] == exported[1] < STEPS
    ours, theirs = (AutoModel.from_pretrained(run / "model").state_dict() for run in (sharded, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-3 if name.endswith("k_proj.bias") else 1e-5, rtol=1e-5)


def test_terms_that_leave_parameters_out_train_on_two_processes(given: Given, forks: Forks) -> None:
    """Without L_reg the cross-attention has no gradients, which DDP would wait for."""
    glare = {**given("")["glare"], "terms": ["glob", "loc1"]}
    assert_same_run(forked(forks, given("two", glare=glare)), pretrain.run(given("one", glare=glare)))


FAILING = """
import os, sys
from glare import pretrain
from glare.pretrain_plan import Plan

def fail(plan, step, rate=Plan.learning_rate_at):
    if os.environ["RANK"] == "1" and step == 1:
        raise MemoryError("no room left on this rank")
    return rate(plan, step)

Plan.learning_rate_at = fail
pretrain.main(sys.argv[1:])
"""


def test_a_rank_that_fails_ends_the_run_with_its_own_error(given: Given, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(given("run", checkpoint_every=1), script)
    assert done.returncode != 0
    assert "no room left on this rank" in done.stderr
    resumed = pretrain.run(given("run", resume=True))
    assert_same_run(resumed, pretrain.run(given("straight")))


def test_a_batch_that_cannot_be_shared_out_is_refused(given: Given) -> None:
    for changes, message in (
        ({"gradient_accumulation_steps": 3}, "batch_size 8 does not divide by 1 process times 3 .*a multiple of 3"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; give at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain.run(given("run", **changes))
    assert not given("run")["output"].exists()


WITHOUT_DROPOUT = """
import sys
from torch import nn
from glare import finetune

nn.Dropout2d.forward = lambda _, maps: maps
finetune.main(sys.argv[1:])
"""


def test_fine_tuning_is_the_same_on_two_processes_and_in_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks
) -> None:
    """Though one share of a batch has more labels than another; the linear head has no batch norm."""
    monkeypatch.setattr(torch.nn.Dropout2d, "forward", lambda _, maps: maps)
    tiny_vit().save_pretrained(tmp_path / "vit")
    masks = write_labelled(tmp_path / "data", 9) / "labels"
    for number, file in enumerate(sorted(masks.iterdir())):
        labels = np.array(Image.open(file))
        labels[: 4 * number] = 255
        Image.fromarray(labels).save(file)

    def recipe(output: str, **changes: Any) -> dict[str, Any]:
        fixed = {"head": "linear", "steps": STEPS, "batch_size": 8, "crop_size": 16, "log_every": 1}
        fixed |= {"report_to": "none", "device": "cpu", "precision": "fp32", "learning_rate": 1e-3}
        places = {"model": str(tmp_path / "vit"), "data": str(tmp_path / "data"), "output": tmp_path / output}
        return {**fixed, **places, **changes}

    def assert_same(found: Path) -> None:
        ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (found, one))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)
        for line, other in zip(logged(found), logged(one), strict=True):
            assert line == pytest.approx(other, rel=1e-5)

    one = finetune.run(recipes.from_dict(FinetuneRecipe, recipe("one")))
    assert_same(finetune.run(recipes.from_dict(FinetuneRecipe, recipe("passes", gradient_accumulation_steps=4))))
    script = tmp_path / "finetune.py"
    script.write_text(WITHOUT_DROPOUT)
    # the processes stay together from one seed to the next
    val = str(write_labelled(tmp_path / "val", 3))
    two = forked(forks, recipe("two", gradient_accumulation_steps=2, seeds=2, val_data=val), script)
    assert_same(two / "seed_0")
    assert json.loads((two / "seeds.json").read_text())["seeds"] == [0, 1]


CLASSIFY = "import sys; from glare import classify; classify.main(sys.argv[1:])"


def test_classification_with_mixup_is_the_same_on_two_processes(tmp_path: Path, forks: Forks) -> None:
    tiny_vit(num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    for name in ("field", "forest"):
        (tmp_path / "classes").mkdir(exist_ok=True)
        write_photos(tmp_path / "classes" / name, 5)

    def recipe(output: str) -> dict[str, Any]:
        fixed = {"steps": STEPS, "batch_size": 8, "crop_size": 16, "mixup": 1.0, "learning_rate": 1e-3, "log_every": 1}
        fixed |= {"report_to": "none", "device": "cpu", "precision": "fp32"}
        places = {name: str(tmp_path / folder) for name, folder in {"data": "classes", "val_data": "val"}.items()}
        return {**fixed, **places, "model": str(tmp_path / "vit"), "output": tmp_path / output}

    # of which one process has none
    (tmp_path / "val" / "field").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "val" / "field" / "0.png")
    script = tmp_path / "classify.py"
    script.write_text(CLASSIFY)
    one = classify.run(recipes.from_dict(ClassifyRecipe, recipe("one")))
    two = forked(forks, recipe("two"), script)
    assert_same_run(two, one)
    accuracies = [json.loads((run / "accuracy.json").read_text())["accuracy"] for run in (one, two)]
    assert accuracies[0] == accuracies[1] in (0.0, 1.0)
