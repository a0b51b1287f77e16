"""A watched run: equal bits, alarms that stop it and keep its last healthy checkpoint, remedies that work."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small_runs import Given, pretraining
from test_no_class_token import tiny_ijepa

from glare import health_watch, pretrain
from glare.alarms import CHECKED
from glare.cli import main
from glare.errors import UserError
from glare.health_check import HealthCheck
from glare.objectives.base import Terms
from glare.pretrain_log import progress_text
from glare.pretrain_plan import Plan
from glare.pretrain_step import check_finite, terms_of_batch

CHECKS = set(CHECKED)


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return pretraining(tmp_path, steps=6, checkpoint_every=2, num_workers=1)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def weights(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "state.safetensors")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", ["uniadapter", "lora", "full"])
def test_a_watched_run_ends_with_the_same_bits(given: Given, monkeypatch: pytest.MonkeyPatch, adapter: str) -> None:
    asked = {"adapter": adapter, "head_warmup_steps": 1}
    watched = pretrain.run(given("watched", **asked))
    assert [line["step"] for line in lines(watched) if set(line) >= CHECKS] == [1, 2, 4, 6]
    assert set(lines(watched)[2]) & CHECKS == set()
    nothing = HealthCheck(torch.empty(1, 0), torch.empty(0), dict.fromkeys(CHECKED, 1.0), Accelerator(cpu=True))
    monkeypatch.setattr(HealthCheck, "of", lambda *_: nothing)
    monkeypatch.setattr(health_watch.HealthWatch, "measure", lambda *_, **__: {})
    alone = pretrain.run(given("alone", **asked))
    assert not any(CHECKS & set(line) for line in lines(alone))
    ours, theirs = weights(watched), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("adapter", ["uniadapter", "full"])
def test_a_vit_without_class_token_is_watched(given: Given, tmp_path: Path, adapter: str) -> None:
    tiny_ijepa().save_pretrained(tmp_path / "ijepa")
    asked = given("run", backbone=str(tmp_path / "ijepa"), adapter=adapter, learning_rate=5e-4)
    folder = pretrain.run(asked)
    last = lines(folder)[-1]
    assert set(last) >= CHECKS and last["cosine_to_base"] < 1


def test_every_line_has_the_norms_of_gradients_and_centres(given: Given) -> None:
    folder = pretrain.run(given("run"))
    for line in lines(folder):
        parts = line["grad_norm_backbone"], line["grad_norm_heads"]
        assert line["grad_norm"] == pytest.approx(np.hypot(*parts), rel=1e-5) and min(parts) > 0
    for level in ("cls", "region", "patch"):
        saved = weights(folder)[f"objective.centre_{level}"]
        assert saved.shape == (32,)
        assert lines(folder)[-1][f"centre_norm_{level}"] == pytest.approx(saved.norm().item(), rel=1e-5) != 0
    health = json.loads((folder / "health.json").read_text())
    assert health["untouched"]["rankme_patches"] == pytest.approx(lines(folder)[0]["rankme_patches"], rel=0.1)
    assert (health["images"], health["exported_step"], health["last_step"]) == (7, 6, 6)


def test_checks_are_few(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_watch, "CHECK_EVERY", 4)
    folder = pretrain.run(given("run", steps=16, log_every=3, checkpoint_every=11))
    assert [line["step"] for line in lines(folder)] == [3, 6, 9, 11, 12, 15, 16]
    assert [line["step"] for line in lines(folder) if set(line) >= CHECKS] == [3, 9, 11, 15, 16]


ABSURD = {"learning_rate": 1.0, "warmup_steps": 12, "steps": 12}
"""Learns nothing good, but slowly enough for a healthy checkpoint before."""


def command(asked: dict[str, Any], *more: str) -> list[str]:
    nested = [f"{group}.{key}={value}" for group in ("views", "glare") for key, value in asked[group].items()]
    nested = [text for text in nested if "regions" not in text]
    plain = {key: value for key, value in asked.items() if key not in ("views", "glare")}
    flags = [part for key, value in plain.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    regions = ["glare.regions.min_side=1", "glare.regions.max_side=2"]
    return ["pretrain", *flags, *more, *nested, *regions]


def test_an_absurd_learning_rate_stops_the_run_with_a_remedy_that_works(
    given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = given("run", **ABSURD)
    folder = asked["output"]
    assert main(command(asked)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    kept = checkpoints(folder)
    assert kept and max(kept) < lines(folder)[-1]["step"] < 12
    assert f"step {lines(folder)[-1]['step']}: collapsed: the " in said  # rounding decides which limit is met first
    assert "of its patch features is" in said
    assert f"the last healthy checkpoint is {folder / 'checkpoints' / f'step_{kept[-1]:06d}'}" in said
    assert "--resume --learning-rate 0.2 (now 1)" in said and "Traceback" not in said
    assert not (folder / "model").exists()

    assert main(command(asked, "--resume")) == 2, "the same settings come to the same end"
    assert capsys.readouterr().err.splitlines()[-1] == said and checkpoints(folder) == kept
    assert main(command({**asked, "momentum": 0.5}, "--resume")) == 2
    assert "momentum was" in capsys.readouterr().err
    assert main(command({**asked, "learning_rate": 0.01}, "--resume")) == 0
    assert "resumed with another recipe: learning_rate was 1.0 and is 0.01" in capsys.readouterr().out
    assert (folder / "model").exists() and len(lines(folder)) == 12
    recipe = (folder / "recipe.yaml").read_text()
    assert recipe.startswith(f"# after step {kept[-1]}: learning_rate was 1.0 and is 0.01\n")


def test_before_the_first_checkpoint_the_remedy_begins_again(given: Given) -> None:
    asked = given("run", learning_rate=10.0)
    with pytest.raises(UserError, match=r"step 1: collapsed: .*no checkpoint .* --resume --learning-rate 2 \(now 10\)"):
        pretrain.run(asked)
    folder = pretrain.run({**asked, "learning_rate": 0.01, "resume": True})
    assert len(lines(folder)) == 6


def test_on_request_it_only_warns(given: Given) -> None:
    with pytest.warns(UserWarning, match=r"collapsed: .*; the run goes on$") as caught:
        folder = pretrain.run(given("run", learning_rate=10.0, on_unhealthy="warn"))
    assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
    assert checkpoints(folder) == [4, 6] and (folder / "model").exists()


def test_no_checkpoint_is_written_while_the_run_is_suspect(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    above = {4: "diverged: at 4", 5: "diverged: at 5"}
    monkeypatch.setattr(health_watch.alarms, "over_limit", lambda _, line: above.get(line["step"]))
    with pytest.warns(UserWarning, match="no checkpoint is written") as caught:
        folder = pretrain.run(given("run", checkpoint_every=1))
    assert checkpoints(folder) == [3, 6]
    said = [str(warning.message) for warning in caught if "no checkpoint" in str(warning.message)]
    assert said == [f"step {n}: no checkpoint is written, as the run may have diverged: at {n}" for n in (4, 5)]


def test_gradients_that_are_not_finite_stop_the_run_before_a_checkpoint(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pretrain.measurements

    def broken(*arguments: Any, steps: int) -> dict[str, float]:
        values = real(*arguments, steps=steps)
        return {**values, "grad_norm": float("nan")} if arguments[4] == 3 else values

    monkeypatch.setattr(pretrain, "measurements", broken)
    asked = given("run", on_unhealthy="warn")
    with pytest.raises(UserError, match=r"step 4: not finite: grad_norm; the last healthy checkpoint is .*step_000002"):
        pretrain.run(asked)
    assert checkpoints(asked["output"]) == [2]


def test_random_weights_are_no_reference_for_the_rank(
    given: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = HealthCheck.measure

    def fallen(self: HealthCheck, backbone: Any) -> dict[str, float]:
        return {**real(self, backbone), "rankme_patches": self.untouched["rankme_patches"] / 3}

    monkeypatch.setattr(HealthCheck, "measure", fallen)
    folder = pretrain.run(given("scratch", backbone=str(tmp_path / "vit" / "config.json"), adapter="full"))
    assert (folder / "model").exists()
    with pytest.raises(UserError, match="collapsed"):
        pretrain.run(given("run"))


def prefer(step: int) -> Callable[[dict[str, float]], float]:
    return lambda line: -abs(line["step"] - step)


def test_the_checkpoint_of_the_best_score_is_kept_and_exported(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_watch, "score", prefer(2))
    constant = {"momentum": 0.9, "momentum_end": 0.9, "freeze_last_layer_steps": 0}
    folder = pretrain.run(given("run", steps=8, select="health", **constant))
    assert checkpoints(folder) == [2, 6, 8]
    assert json.loads((folder / "health.json").read_text())["exported_step"] == 2
    exported, best = load_file(folder / "adapter" / "adapter_model.safetensors"), weights(folder, 2)
    ups = [value for name, value in best.items() if name.startswith("student.") and "uniadapter_up" in name]
    saved = [value for name, value in exported.items() if "uniadapter_up" in name]
    assert len(ups) == len(saved) > 0
    assert all(any(torch.equal(one, other) for other in ups) for one in saved)
    again = pretrain.run(given("run", steps=10, select="health", resume=True, **constant))
    assert checkpoints(again) == [2, 8, 10]
    assert json.loads((again / "health.json").read_text())["exported_step"] == 2


def test_a_run_ends_early_where_nothing_gets_better(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    score = prefer(2)
    monkeypatch.setattr(health_watch, "score", lambda line: score(line) if set(line) >= CHECKS else None)
    folder = pretrain.run(given("run", steps=20, patience=4))
    assert len(lines(folder)) == 6 and checkpoints(folder) == [4, 6]
    health = json.loads((folder / "health.json").read_text())
    assert (health["exported_step"], health["last_step"]) == (6, 6)
    assert json.loads((folder / "price.json").read_text())["steps"] == 6
    assert len(lines(pretrain.run(given("run", steps=20, patience=4, resume=True)))) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patience": 0}, r"patience is 0; give at least 1"),
        ({"select": "health", "checkpoint_every": 6}, r"a run of 6 steps writes one; give --checkpoint-every 1"),
        ({"on_unhealthy": "sleep"}, r"on_unhealthy"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(given: Given, change: dict[str, Any], message: str) -> None:
    asked = given("run", **change)
    with pytest.raises(UserError, match=message):
        pretrain.run(asked)
    assert not asked["output"].exists()


def test_a_loss_that_is_not_finite_elsewhere_stops_every_process() -> None:
    class TwoProcesses:
        num_processes = 2

        def reduce(self, own: torch.Tensor, *, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return own + torch.tensor([0.0, torch.nan])

    terms = Terms({"glob": torch.tensor(1.0), "reg": torch.tensor(2.0)})
    recipe = pretrain.PretrainRecipe(backbone="", data="", output=Path())
    plan = replace(Plan.of(recipe), learning_rate=0.1)
    with pytest.raises(UserError, match=r"the loss became nan at step 8 \(terms: reg\); lower learning"):
        check_finite(terms_of_batch([terms], TwoProcesses()), plan, step=7)  # type: ignore[arg-type]


# what is said


def test_the_progress_bar_has_the_health_of_the_log() -> None:
    speed = {"images_per_second": 4.56, "data_wait": 0.06}
    values = {
        **{"loss": 7.1, "loss_glob": 3.8, "loss_reg": 3.3, "matched_share": 0.645, "teacher_entropy": 3.69},
        **{"centre_norm_cls": 0.883, "centre_norm_patch": 2.05, "grad_norm": 15.2, "grad_norm_heads": 15.1, **speed},
    }
    check = {"rankme_cls": 1.63, "rankme_patches": 46.1, "feature_std": 0.712, "cosine_to_base": 0.994}
    assert set(check) == set(CHECKED)
    step = "gradient 15 entropy 3.69 matched 64% centres 0.88/2 | 4.6 images/s, 6% waiting for data"
    assert progress_text(values, {}) == f"glob 3.80 reg 3.30 | {step}"
    health = "RankMe 46 of 80, cosine 0.99, std 0.71, [CLS] 1.6"
    assert progress_text({**check, **values}, {"rankme_patches": 80.2}) == f"glob 3.80 reg 3.30 | {health} | {step}"
    plain = progress_text({"loss_pixels": 0.5, "grad_norm": 1.0, **speed}, {})
    assert plain == "pixels 0.50 | gradient 1 | 4.6 images/s, 6% waiting for data"
