"""The study's script: what it runs, leaves out and writes; and that its budgets are parts of each other."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from labelled_samples import write_labelled
from PIL import Image
from tiny_models import tiny_config

SCRIPT = Path(__file__).parents[1] / "training" / "pets_study.py"
SMALL = ["steps=2", "batch_size=2", "report_to=none", "device=cpu", "precision=fp32", "log_every=1"]
NO_SPLITS = ("--train-split=", "--test-split=")


def study(tmp_path: Path, *given: str, also: tuple[str, ...] = ()) -> None:
    jobs = {name: [f"{name}.{item}" for item in SMALL] for name in ("simmim", "classify", "finetune")}
    settings = [*jobs["simmim"], *jobs["classify"], *jobs["finetune"], "classify.crop_size=16", "finetune.crop_size=16"]
    settings += ["simmim.views.global_size=16", "simmim.views.local_size=16"]
    places = ["--data", str(tmp_path / "labelled"), "--train-split", "train", "--test-split", "test"]
    places += ["--vit", str(tmp_path / "vit.json"), "--output", str(tmp_path / "runs")]
    sys.argv = [str(SCRIPT), *places, *given, "--set", *settings, *also]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "vit.json").write_text(json.dumps(tiny_config(num_hidden_layers=1).to_dict()))
    write_labelled(tmp_path / "labelled" / "train", 5)
    write_labelled(tmp_path / "labelled" / "test", 2)
    rng = np.random.default_rng(0)
    for folder in ("scenes/forest", "scenes/street", "others/forest", "others/street"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(2):
            noise = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / f"{number}.png")
    return tmp_path


def test_it_runs_what_is_not_done_and_writes_table_and_picture(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes, others = str(data / "scenes"), str(data / "others")
    given = ["--pretrain", f"small={scenes}", "--classify-data", scenes, "--classify-val", others, "--seeds", "0"]
    study(data, *given, "--budgets", "2")
    runs = data / "runs"
    assert capsys.readouterr().out.count("== ") == 5
    before = {file: file.read_bytes() for file in runs.rglob("*.safetensors")}
    (runs / "simmim_small.yaml").unlink()  # its resolved recipe has to do
    study(data, *given, "--budgets", "2", "4")
    assert capsys.readouterr().out.count("== ") == 3  # the second budget of each start
    assert all(file.read_bytes() == content for file, content in before.items())
    found = json.loads((runs / "study.json").read_text())
    starts = ["none", "small", "small, then classes"]
    assert [(row["start"], row["budget"]) for row in found["rows"]] == [(s, b) for s in starts for b in (2, 4)]
    assert all(row["num_images"] == 2 and 0 <= row["miou"] <= 1 for row in found["rows"])
    assert found["accuracy"].keys() == {"classify_small"}
    with Image.open(runs / "study.png") as picture:
        assert picture.size == (900, 480)
    recipe = (runs / "finetune" / "small_then_classes_4_0" / "recipe.yaml").read_text()
    assert "num_images: 4" in recipe and "model: " + str(runs / "classify_small") in recipe


def test_a_job_that_fails_ends_it_with_its_code(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        study(data, "--budgets", "2", "--seeds", "0", also=("finetune.crop_size=17",))
    assert stopped.value.code == 2 and "crop_size 17 is no multiple" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--budgets", "2", "6"), "num_images is 6, but there are only 5 images"),
        (("--budgets", "2", "--train-split", "{part}"), "no split '{part}'"),
        (("--budgets", "2", "--test-split", "train"), "images to evaluate on are among those to train on"),
        (("--budgets", "2", "--data", "landcover:arid:2:1", *NO_SPLITS), "no images to test on; give --test-data or"),
        (("--budgets", "2", "2"), "two runs would share the folder {runs}/finetune/none_2_0;"),
        (("--budgets", "2", "--pretrain", "none={scenes}"), "the folder {runs}/finetune/none_2_0;"),
        (("--budgets", "2", "--pretrain", "a={scenes}", "a={others}"), "the folder {runs}/simmim_a;"),
        (("--budgets", "2", "--pretrain", "../a={scenes}"), "'../a={scenes}' is neither NAME=DATA"),
        (("--budgets", "2", "--pretrain", "={scenes}"), "'={scenes}' is neither NAME=DATA"),
        (("--budgets", "2", "--epochs", "0"), "--epochs is 0; give at least 1"),
        (("--budgets",), "--budgets: expected at least one argument"),
        (("--budgets", "2", "--seeds"), "--seeds: expected at least one argument"),
    ],
)
def test_what_cannot_be_a_study_is_said_before_anything_is_trained(
    data: Path, given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"scenes": data / "scenes", "others": data / "others", "runs": data / "runs", "part": "{part}"}
    with pytest.raises(SystemExit) as stopped:
        study(data, "--pretrain", f"a={data / 'scenes'}", "--seeds", "0", *(item.format(**places) for item in given))
    assert stopped.value.code == 2 and said.format(**places) in capsys.readouterr().err.splitlines()[-1]
    assert not (data / "runs").exists()


def test_one_table_holds_runs_of_the_same_settings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--seeds", "0", "--budgets"]
    study(data, *given, "2", also=("finetune.warmup_steps=1",))
    run = data / "runs" / "finetune" / "none_2_0"
    before = {path: path.read_bytes() for path in (data / "runs").rglob("*") if path.is_file()}
    for also, said in {
        ("finetune.warmup_steps=1", "finetune.learning_rate=1e-2"): "learning_rate was 0.002 and is 0.01",
        ("finetune.warmup_steps=1", "finetune.steps=1"): "steps was 2 and is 1",
        (): "warmup_steps was 1 and is null",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            study(data, *given, "4", "2", also=also)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"pets_study: the run in {run} has another recipe: {said}; give the old values, or another --output, "
            "as one table holds runs of the same settings"
        )
    assert {path: path.read_bytes() for path in (data / "runs").rglob("*") if path.is_file()} == before
    run.with_name("none_2_0.yaml").unlink()
    with pytest.raises(SystemExit):
        study(data, *given, "2", also=("finetune.learning_rate=1e-2",))
    assert "learning_rate was 0.002 and is 0.01;" in capsys.readouterr().err
    study(data, *given, "2", also=("finetune.num_workers=1",))
