"""A step is the same however a batch is shared out: over processes, and over passes whose gradients are accumulated."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_vit
from torch import Tensor
from transformers import AutoModel

from glare import finetune, pretrain, recipes
from glare.errors import UserError
from glare.finetune import FinetuneRecipe

ROOT = Path(__file__).parents[1]
STEPS = 3
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "rank": 4,
    "learning_rate": 1e-3,
    "log_every": 1,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
    "anchor": 0.5,
    "views": {"num_local": 2, "global_size": 16, "local_size": 8},
    "glare": {
        "prototypes": 32,
        "head_hidden": 16,
        "head_bottleneck": 8,
        "local_queries": True,
        "regions": {"min_side": 1, "max_side": 2},
    },
}
Given = Callable[..., dict[str, Any]]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    tiny_vit("dinov2").save_pretrained(tmp_path / "vit")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(11):
        noise = rng.integers(0, 256, (30 + number, 41, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")

    def make(output: str, **changes: Any) -> dict[str, Any]:
        places = {"backbone": str(tmp_path / "vit"), "data": str(tmp_path / "photos"), "output": tmp_path / output}
        return {**SETTINGS, **places, **changes}

    return make


def launched(
    given: dict[str, Any], script: Path = ROOT / "training" / "pretrain.py"
) -> subprocess.CompletedProcess[str]:
    """A recipe on two processes without a GPU; ``accelerate launch --cpu`` starts several only through MPI."""
    file = given["output"].with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**given, "output": str(given["output"])}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), "--recipe", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


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


def test_two_processes_and_accumulated_passes_compute_what_one_process_does(given: Given) -> None:
    one = pretrain.run(given("one"))
    assert_same_run(pretrain.run(given("passes", gradient_accumulation_steps=2)), one)
    done = launched(given("two"))
    assert done.returncode == 0, done.stderr
    assert_same_run(given("two")["output"], one)
    done = launched(given("both", gradient_accumulation_steps=4))
    assert done.returncode == 0, done.stderr
    assert_same_run(given("both")["output"], one)


def test_sharded_blocks_compute_the_same(given: Given) -> None:
    done = launched(given("sharded", shard=True))
    assert done.returncode == 0, done.stderr
    assert_same_run(given("sharded")["output"], pretrain.run(given("whole")))


def test_a_fully_trained_sharded_vit_resumes_and_is_saved_whole(given: Given) -> None:
    full = {"adapter": "full", "anchor": 0.0, "checkpoint_every": 2}
    for changes in ({"steps": STEPS - 1, "warmup_steps": 1}, {"steps": STEPS, "warmup_steps": 1, "resume": True}):
        done = launched(given("sharded", shard=True, momentum=0.9, momentum_end=0.9, **full, **changes))
        assert done.returncode == 0, done.stderr
    straight = {"steps": STEPS - 1, "warmup_steps": 1, "momentum": 0.9, "momentum_end": 0.9}
    pretrain.run(given("whole", **full, **straight))
    whole = pretrain.run(given("whole", **full, **straight | {"steps": STEPS, "resume": True}))
    assert_same_run(given("sharded")["output"], whole)
    AutoModel.from_pretrained(given("sharded")["output"] / "model")


def test_terms_that_leave_parameters_out_train_on_two_processes(given: Given) -> None:
    """Without L_reg the cross-attention has no gradients, which DDP would wait for."""
    glare = {**SETTINGS["glare"], "terms": ["glob", "loc1"]}
    done = launched(given("two", glare=glare))
    assert done.returncode == 0, done.stderr
    assert_same_run(given("two")["output"], pretrain.run(given("one", glare=glare)))


FAILING = """
import os, sys
from glare import finetune, pretrain, recipes
from glare.errors import UserError
from glare.finetune import FinetuneRecipe
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
    done = launched(given("run", checkpoint_every=1), script=script)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    done = launched(recipe("two", gradient_accumulation_steps=2), script=script)
    assert done.returncode == 0, done.stderr
    assert_same(recipe("two")["output"])
