"""Intermediate classification: classes from folders, MixUp, a run that learns, stops, goes on and hands on its ViT."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_vit
from torch import Tensor

from glare import classify, export, finetune, recipes
from glare.checkpoints import TENSORS, folders
from glare.class_images import check_pairs, class_names, mixed, mixup_factors
from glare.classify import Classifier, ClassifyRecipe, accuracy
from glare.errors import UserError
from glare.finetune import FinetuneRecipe
from glare.modeling_glare import GlareModel
from glare.segmenters import load_pretrained
from glare.yaml_files import read_mapping

Given = Callable[..., dict[str, Any]]


def write_classes(folder: Path, count: int, *, seed: int) -> None:
    """Reddish and bluish noise."""
    rng = np.random.default_rng(seed)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (20 + number, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def given(tmp_path: Path) -> Given:
    (tmp_path / "vit.json").write_text(json.dumps(tiny_config(num_hidden_layers=1).to_dict()))
    write_classes(tmp_path / "train", 6, seed=0)
    write_classes(tmp_path / "val", 5, seed=1)

    def make(output: str, **changes: Any) -> dict[str, Any]:
        fixed = {"steps": 3, "batch_size": 4, "log_every": 1, "report_to": "none", "device": "cpu", "precision": "fp32"}
        places = {"model": str(tmp_path / "vit.json"), "data": str(tmp_path / "train"), "output": tmp_path / output}
        return {**fixed, **places, **changes}

    return make


def run(given: dict[str, Any]) -> Path:
    return classify.run(recipes.from_dict(ClassifyRecipe, given))


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folders(folder)[0] / TENSORS)


@pytest.mark.parametrize("count", [6, 5])
def test_mixup_is_its_formula(count: int) -> None:
    """Neighbours are partners, and the last of an odd number stays as it is."""
    pixels, targets = torch.randn(count, 3, 2, 2), torch.eye(count)
    factors = mixup_factors(count, 0.4, seed=3, step=7)
    x, y = mixed(pixels, targets, factors)
    for i, j in enumerate((1, 0, 3, 2, 5, 4) if count == 6 else (1, 0, 3, 2, 4)):
        portion = float(factors[i])
        assert portion == factors[j]
        torch.testing.assert_close(x[i], portion * pixels[i] + (1 - portion) * pixels[j])
        torch.testing.assert_close(y[i], portion * targets[i] + (1 - portion) * targets[j])
    assert len(factors.unique()) == 3
    torch.testing.assert_close(y.sum(dim=0), torch.ones(count))  # each image counts as much as another


@pytest.mark.parametrize(("alpha", "spread"), [(0.2, 0.423), (1.0, 0.289), (50.0, 0.05)])
def test_the_factors_of_mixup_are_of_the_beta_distribution(alpha: float, spread: float) -> None:
    """Of Beta(a, a) the mean is 1/2 and the variance 1 / (8 a + 4)."""
    factors = mixup_factors(8000, alpha, seed=0, step=0)
    assert factors.mean().item() == pytest.approx(0.5, abs=0.03)
    assert factors.std().item() == pytest.approx(spread, abs=0.02)
    assert not torch.equal(factors, mixup_factors(8000, alpha, seed=0, step=1))


def test_a_batch_is_the_same_however_many_processes_share_it(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 5, seed=0)
    packed = classify.pack(classify.open_source(str(tmp_path / "train")))
    data = classify.labelled(packed, ["blue", "red"], "train")
    crops = classify.ClassCrops(16, (0.25, 1.0), 0.4, classify.Normalisation())

    def cut(rank: int, processes: int) -> tuple[Tensor, Tensor]:
        place = SimpleNamespace(device=torch.device("cpu"), num_processes=processes, process_index=rank)
        index = torch.tensor([9, 0, 3, 7, 2, 8, 1, 5])
        return classify.cut_batch(data, index, crops, place, seed=1, step=2)  # type: ignore[arg-type]

    whole = cut(0, 1)
    for processes in (2, 4):
        shares = [cut(rank, processes) for rank in range(processes)]
        for part, expected in zip(zip(*shares, strict=True), whole, strict=True):
            torch.testing.assert_close(torch.cat(part), expected)
    assert ((whole[1] > 0) & (whole[1] < 1)).any()


def test_a_pair_of_two_processes_is_refused() -> None:
    check_pairs(5, 1)
    check_pairs(8, 2)
    with pytest.raises(UserError, match="batch_size of 6 gives each of 2 processes 3; give a multiple of 4, or --mix"):
        check_pairs(6, 2)


def test_it_learns_classes_and_hands_on_the_vit_alone(given: Given, tmp_path: Path) -> None:
    folder = run(given("run", steps=40, learning_rate=3e-3, val_data=str(tmp_path / "val")))
    found = json.loads((folder / "accuracy.json").read_text())
    assert found["accuracy"] == 1.0 and found["classes"] == ["blue", "red"]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and min(losses[-5:]) < 0.5 < losses[0]
    vit, _ = load_pretrained(str(folder))
    assert isinstance(vit, GlareModel)
    trained = {n.removeprefix("model.vit."): v for n, v in state(folder).items() if n.startswith("model.vit.")}
    assert len(trained) > 10 and all(torch.equal(vit.state_dict()[name], value) for name, value in trained.items())
    scenes = write_labelled(tmp_path / "scenes", 4)
    small = {"steps": 1, "batch_size": 2, "crop_size": 16, "report_to": "none", "device": "cpu", "precision": "fp32"}
    tuned = {"model": str(folder), "data": str(scenes), "output": tmp_path / "tuned", **small}
    assert (finetune.run(recipes.from_dict(FinetuneRecipe, tuned)) / "model").is_dir()


def test_accuracy_counts_every_image_once(tmp_path: Path) -> None:
    accelerator = classify.make_accelerator(device="cpu", precision="fp32", report_to="none", output=tmp_path)
    write_classes(tmp_path / "val", 5, seed=1)
    packed = classify.pack(classify.open_source(str(tmp_path / "val")))
    data = classify.labelled(packed, ["blue", "red"], "val")
    model = Classifier(GlareModel.from_backbone(tiny_vit()), 2)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 1.0]))  # red, whatever the image
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    for wanted, expected in ((data.labels, 0.5), (torch.ones(10, dtype=torch.int64), 1.0)):
        shown = replace(data, labels=wanted)
        assert accuracy(model, shown, 16, classify.Normalisation(), accelerator) == expected


def test_a_run_resumes_bit_for_bit(given: Given) -> None:
    dropout = {"model": given("x")["model"].replace("vit.json", "dropout.json")}
    Path(dropout["model"]).write_text(json.dumps(tiny_config(num_hidden_layers=1, hidden_dropout_prob=0.3).to_dict()))
    constant = {**dropout, "checkpoint_every": 2, "warmup_steps": 0}
    whole = state(run(given("whole", **constant, steps=4)))

    class StoppedError(Exception):
        pass

    real = classify.train_step

    def failing(*args: Any, **options: Any) -> float:
        if options["step"] == 3:
            raise StoppedError
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "train_step", failing)
        with pytest.raises(StoppedError):
            run(given("parts", **constant, steps=4))
    torch.randn(3)
    parts = state(run(given("parts", **constant, steps=4, resume=True)))
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_run_that_broke_goes_on_with_the_remedy(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"checkpoint_every": 2, "warmup_steps": 0, "mixup": 0.0}
    run(given("run", **keys, steps=2))
    keys["steps"] = 5
    broken = given("run", **keys, learning_rate=1e30, resume=True)
    place = broken["output"] / "checkpoints" / "step_000002"
    with pytest.raises(UserError, match=rf"became nan at step \d; lower learning_rate.*checkpoint is {place}: go on"):
        run(broken)
    run(given("run", **keys, learning_rate=1e-4, resume=True))
    assert "resumed with another recipe: learning_rate was 1e+30 and is 0.0001" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"mixup was 0\.0 and is 0\.4"):
        run(given("run", **{**keys, "mixup": 0.4}, resume=True))


def test_classes_are_the_folders_that_images_lie_in() -> None:
    assert class_names(["seg/sea/1.jpg", "seg/forest/2.jpg", "forest/3.jpg"], "d") == ["forest", "sea"]
    for names in (["1.jpg", "sea/2.jpg"], ["sea/1.jpg", "sea/2.jpg"]):
        with pytest.raises(UserError, match="data 'd' has no two classes: each image has to lie in a folder"):
            class_names(names, "d")


def test_a_configuration_may_give_both_sides_of_the_images(given: Given, tmp_path: Path) -> None:
    file = tmp_path / "vit.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "image_size": [24, 24]}))
    folder = run(given("run", steps=1))
    assert read_mapping(folder / "recipe.yaml")["crop_size"] == 24
    exported = export.export(export.ExportRecipe(model=str(folder), output=tmp_path / "exported"))
    assert list(exported.config.image_size) == [24, 24]
    file.write_text(json.dumps({**config, "image_size": [24, 16]}))
    with pytest.raises(UserError, match=r"image_size is \[24, 16\]; position embeddings are resized of squares only"):
        run(given("other", steps=1))


def test_mistakes_are_named_before_anything_is_written(given: Given, tmp_path: Path) -> None:
    write_classes(tmp_path / "other", 1, seed=0)
    (tmp_path / "other" / "red").rename(tmp_path / "other" / "green")
    write_classes(tmp_path / "linked", 2, seed=7)
    (tmp_path / "linked" / "red" / "again.png").symlink_to(tmp_path / "train" / "red" / "3.png")
    for changes, message in (
        ({"val_data": str(tmp_path / "other")}, "has the class 'green', the training data has blue, red"),
        ({"val_data": str(tmp_path / "train")}, "12 of the 12 images to measure the accuracy on are among those to tr"),
        ({"val_data": str(tmp_path / "val" / ".." / "train")}, "12 of the 12 images .* give others by --val-data"),
        ({"val_data": str(tmp_path / "linked")}, "1 of the 5 images to measure the accuracy on"),
        ({"data": str(tmp_path / "train" / "red")}, "has no two classes"),
        ({"crop_size": 18}, "crop_size 18 is no multiple of the patch size 4; give 16"),
        ({"mixup": -1.0}, "mixup is -1.0; give at least 0"),
        ({"area": [0.5, 0.2]}, "area is"),
        ({"steps": 0}, "steps is 0; give at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(given("run", **changes))
    assert not (tmp_path / "run").exists()
