import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from labelled_samples import CLASSES, write_labelled, write_yolo
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel, pipeline

from glare import GlareForSemanticSegmentation, GlareModel, UniAdapterConfig, UserError, finetune
from glare.cli import main as glare_main
from glare.dense_inference import sweep_of
from glare.finetune import FinetuneRecipe, learning_rates
from glare.finetune_data import open_data
from glare.finetune_plan import Plan, make_plan
from glare.inference import load_segmenter
from glare.segmenters import load_pretrained, parameter_groups, select_trained, set_training
from glare.weight_decay import decays

ROOT = Path(__file__).parents[1]
MakeVit = Callable[..., PreTrainedModel]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = write_labelled(tmp_path / "data" / "train", 8)
    write_labelled(tmp_path / "data" / "val", 4, size=(36, 28))
    return folder.parent


@pytest.fixture
def vit(tmp_path: Path, make_vit: MakeVit) -> Path:
    make_vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def adapted(tmp_path: Path, make_vit: MakeVit) -> Path:
    """A GlareModel whose adapters do something."""
    model = GlareModel.from_backbone(make_vit(), UniAdapterConfig(r=4, scale=1.0))
    for name, parameter in model.named_parameters():
        if "uniadapter_up" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapted")
    model.save_adapter(tmp_path / "adapter", base_model=None)
    return tmp_path / "adapted"


@pytest.fixture
def recipe(tmp_path: Path, data: Path, vit: Path) -> FinetuneRecipe:
    return FinetuneRecipe(
        model=str(vit),
        data=str(data),
        output=tmp_path / "run",
        steps=6,
        crop_size=16,
        log_every=1,
        precision="fp32",
        report_to="none",
        num_workers=2,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("head", ["linear", "pixel", "fpn"])
def test_a_learnable_task_is_learned(recipe: FinetuneRecipe, head: str) -> None:
    run = finetune.run(replace(recipe, head=head, steps=40, batch_size=8, learning_rate=1e-2))
    assert np.mean(losses(run)[-5:]) < 0.5 * np.mean(losses(run)[:3])
    assert json.loads((run / "eval.json").read_text())["miou"] > 0.5


def test_the_run_folder_holds_what_was_promised(recipe: FinetuneRecipe) -> None:
    run = finetune.run(replace(recipe, checkpoint_every=2, eval_every=3, report_to="tensorboard"))
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "metrics.jsonl", "eval.json", "model/config.json", "model/model.safetensors"} <= files
    assert "model/preprocessor_config.json" in files and any("tfevents" in name for name in files)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    assert not [name for name in files if "partial" in name]
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "miou" in line] == [3]
    assert 0 <= lines[0]["data_wait"] <= 1 and lines[0]["images_per_second"] > 0
    scores = json.loads((run / "eval.json").read_text())
    assert {"miou", "aacc", "macc", "iou", "num_images", "data", "split", "model", "seed", "versions"} <= scores.keys()
    assert scores["num_images"] == 4 and scores["split"] == "val" and list(scores["iou"]) == CLASSES


def test_the_model_works_with_transformers_alone(recipe: FinetuneRecipe) -> None:
    run = finetune.run(recipe)
    image = Image.open(Path(recipe.data) / "val" / "images" / "scene_0.png")
    processor = AutoImageProcessor.from_pretrained(run / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(run / "model").eval()
    assert isinstance(model, GlareForSemanticSegmentation)
    assert list(model.config.id2label.values()) == CLASSES and model.config.label2id["grass"] == 2
    inputs = processor(image, return_tensors="pt")
    assert all(side % 4 == 0 for side in inputs["pixel_values"].shape[-2:])
    found = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(28, 36)])[0]
    assert found.shape == (28, 36)
    segments = pipeline("image-segmentation", model=model, image_processor=processor)(image)
    assert {segment["label"] for segment in segments} <= set(CLASSES)


def test_resume_equals_the_run_without_a_stop(recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe, pyramid=True, checkpoint_every=2)
    straight = finetune.run(replace(recipe, output=recipe.output.with_name("straight")))
    step = finetune.train_step

    def stop_at_fifth(*args: Any, **kwargs: Any) -> float:
        if kwargs["step"] == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "train_step", stop_at_fifth)
        finetune.run(recipe)
    assert not (recipe.output / "model").exists()
    with pytest.raises(UserError, match="is in use; give another --output, or --resume"):
        finetune.run(recipe)
    resumed = finetune.run(replace(recipe, resume=True))
    assert equal(weights(resumed), weights(straight))
    assert losses(resumed) == losses(straight)


def test_the_seed_fixes_every_bit(recipe: FinetuneRecipe) -> None:
    runs = [
        finetune.run(replace(recipe, output=recipe.output.with_name(name), seed=seed, num_workers=workers))
        for name, seed, workers in (("a", 3, 1), ("b", 3, 4), ("c", 4, 1))
    ]
    first, again, other = map(weights, runs)
    assert equal(first, again) and losses(runs[0]) == losses(runs[1])
    assert not equal(first, other)


@pytest.mark.parametrize("train_on", ["full", "adapter", "head"])
def test_only_what_was_chosen_trains(recipe: FinetuneRecipe, adapted: Path, train_on: str) -> None:
    run = finetune.run(replace(recipe, model=str(adapted), train_on=train_on, steps=2))
    before = load_file(adapted / "model.safetensors")
    after = {name.removeprefix("glare."): value for name, value in weights(run).items() if name.startswith("glare.")}
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "full": {name for name in before if "mask_token" not in name and not name.startswith("backbone.layernorm")},
        "adapter": {name for name in before if "uniadapter_" in name},
        "head": set(),
    }[train_on]
    # a key bias shifts all scores of a query alike: its gradient is zero
    assert {name for name in changed ^ expected if "key.bias" not in name} == set()


def test_adapters_cannot_train_where_there_are_none(recipe: FinetuneRecipe) -> None:
    with pytest.raises(UserError, match="--train-on adapter needs a model with adapters, this one has none"):
        finetune.run(replace(recipe, train_on="adapter"))
    assert not recipe.output.exists()


def test_features_that_are_frozen_are_those_of_evaluation(make_vit: MakeVit) -> None:
    vit = GlareModel.from_backbone(make_vit(hidden_dropout_prob=0.5))
    segmenter = GlareForSemanticSegmentation.from_model(vit, num_labels=3, head="fpn")
    pixels = torch.rand(1, 3, 16, 16)
    for train_on, alike in (("head", True), ("full", False)):
        select_trained(segmenter, train_on)
        set_training(segmenter)
        first, second = (segmenter.glare(pixels).last_hidden_state for _ in range(2))
        assert torch.equal(first, second) == alike
        assert segmenter.head.training


def test_head_and_backbone_have_their_rates_and_only_matrices_decay(make_vit: MakeVit) -> None:
    model = GlareForSemanticSegmentation.from_model(GlareModel.from_backbone(make_vit()), num_labels=3, head="linear")
    select_trained(model, "full")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.01)
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["head"] == name.startswith("head.")
            matrix = name.endswith("weight") and "norm" not in name
            assert group["weight_decay"] == (0.01 if matrix else 0.0)
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert decays("head.weight", torch.nn.Parameter(torch.zeros(2, 2)))


def test_what_fine_tuning_can_start_from(tmp_path: Path, adapted: Path, vit: Path) -> None:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def features(name: Path) -> torch.Tensor:
        with torch.inference_mode():
            return load_pretrained(str(name))[0].eval()(pixels).last_hidden_state

    expected = features(adapted)
    (tmp_path / "pretrained" / "model").mkdir(parents=True)
    (tmp_path / "pretrained" / "recipe.yaml").write_text("seed: 0\n")
    for file in adapted.iterdir():
        (tmp_path / "pretrained" / "model" / file.name).write_bytes(file.read_bytes())
    assert torch.equal(features(tmp_path / "pretrained"), expected)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(vit)}))
    torch.testing.assert_close(features(tmp_path / "adapter"), expected)
    assert not torch.allclose(features(vit), expected)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say for which model it is; put base_model_name_or_path"):
        load_pretrained(str(tmp_path / "adapter"))


def test_few_label_runs_train_on_a_part(recipe: FinetuneRecipe) -> None:
    whole, val = open_data(recipe)
    few, same_val = open_data(replace(recipe, fraction=1 / 4))
    many, _ = open_data(replace(recipe, num_images=5))
    others, _ = open_data(replace(recipe, num_images=5, seed=recipe.seed + 1))
    assert [len(part) for part in (few, many, whole)] == [2, 5, 8]
    assert set(few.names) < set(many.names) < set(whole.names) and many.names != others.names
    assert val is not None and same_val is not None and same_val.names == val.names
    with pytest.raises(UserError, match="num_images is 9, but there are only 8 images; give at most 8"):
        open_data(replace(recipe, num_images=9))


def test_parts_of_the_data(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    train, val = open_data(recipe)
    assert len(train) == 8 and val is not None and len(val) == 4
    flat = write_labelled(tmp_path / "flat", 6, prefix="tile2")
    recipe = replace(recipe, data=str(flat))
    assert open_data(recipe)[1] is None
    split = replace(recipe, match="!*_1,!*_4", val_match="*_1,*_4")
    train, val = open_data(split)
    assert val is not None and list(val.names) == ["tile2_1.png", "tile2_4.png"]
    assert list(train.names) == [f"tile2_{i}.png" for i in (0, 2, 3, 5)]
    _, val = open_data(replace(recipe, val_data="landcover:arid:2:1", data="landcover:arid:3"))
    assert val is not None and len(val) == 2
    with pytest.raises(UserError, match="the classes differ: the training data has soil, water, grass, the validation"):
        open_data(replace(recipe, val_data="landcover:arid:2"))
    with pytest.raises(UserError, match="eval_every needs a validation part: give --val-split"):
        open_data(replace(recipe, eval_every=1))


def test_folders_of_splits_below_images_have_to_be_chosen(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    write_yolo(tmp_path / "yolo", train=3, val=2)
    recipe = replace(recipe, data=str(tmp_path / "yolo"))
    message = "images/train and images/val, which would all train; give --match 'train/[*]' --val-match 'val/[*]'$"
    for unchosen in ({}, {"match": "!*_9"}, {"val_match": "scene_0"}):
        with pytest.raises(UserError, match=message):
            open_data(replace(recipe, **unchosen))
    with pytest.raises(UserError, match=r"which would all train; give --match 'train/[*]'$"):
        open_data(replace(recipe, val_data="landcover:arid:2"))
    with pytest.raises(UserError, match=r"has no split 'train'; leave split out and match 'train/\*'"):
        open_data(replace(recipe, train_split="train"))
    train, val = open_data(replace(recipe, match="train/*", val_match="val/*"))
    assert list(train.names) == [f"train/scene_{i}.png" for i in range(3)]
    assert val is not None and list(val.names) == ["val/scene_0.png", "val/scene_1.png"]
    assert len(open_data(replace(recipe, match="train/*,val/*"))[0]) == 5


def test_a_split_that_was_not_asked_for_is_said(
    recipe: FinetuneRecipe, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    data = write_labelled(tmp_path / "lone" / "test", 2).parent
    open_data(replace(recipe, data=str(data), train_split="test"))
    open_data(recipe)
    assert not log.messages
    open_data(replace(recipe, data=str(data)))
    assert log.messages == [f"trains on the split 'test' of {str(data)!r}; --train-split takes another one"]


def shared_images(recipe: FinetuneRecipe, **changes: Any) -> str:
    with pytest.raises(UserError, match="images to evaluate on are among those to train on") as caught:
        open_data(replace(recipe, **changes))
    return str(caught.value)


def test_images_to_train_on_are_not_evaluated_on(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    flat = write_labelled(write_labelled(tmp_path / "flat", 3, prefix="a"), 2, prefix="b")
    (tmp_path / "link").symlink_to(flat)
    split = replace(recipe, data=str(flat), val_match="b_*")
    assert shared_images(split).startswith("2 of the 2 images")
    assert "give --match '!b_*'" in shared_images(split)
    assert "give --match '!a_0,!b_*'" in shared_images(split, match="!a_0")
    assert "3 of the 5 images" in shared_images(split, val_match=None, num_images=3, val_data=str(tmp_path / "link"))
    assert "exclude each other" in shared_images(split, val_match="!a_*")
    assert "8 of the 8 images" in shared_images(recipe, val_split="train")
    assert "4 of the 4 images" in shared_images(recipe, data=f"{recipe.data}/val", val_data=recipe.data)
    arid = replace(recipe, data="landcover:arid:3")
    assert "3 of the 5 images" in shared_images(arid, val_data="landcover:arid:5")
    assert "--val-data landcover:arid:5:1" in shared_images(arid, val_data="landcover:arid:5")
    for apart in (
        replace(split, match="!b_*"),
        replace(recipe, val_data=f"{recipe.data}/val"),  # names are alike, images are not
        replace(arid, val_data="landcover:temperate:2"),
    ):
        assert open_data(apart)[1] is not None


def test_other_names_of_the_parts(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    for name, count in (("training", 3), ("valid", 2), ("test", 4)):
        write_labelled(tmp_path / "parts" / name, count)
    recipe = replace(recipe, data=str(tmp_path / "parts"))
    assert [len(part or []) for part in open_data(recipe)] == [3, 2]
    (tmp_path / "parts" / "valid").rename(tmp_path / "parts" / "validation")
    assert [len(part or []) for part in open_data(recipe)] == [3, 2]
    (tmp_path / "parts" / "validation").rename(tmp_path / "rest")
    assert [len(part or []) for part in open_data(recipe)] == [3, 4]
    (tmp_path / "parts" / "training").rename(tmp_path / "training")
    assert open_data(recipe)[1] is None  # the only part there is


def test_masks_of_0_and_255_have_one_class_alone(recipe: FinetuneRecipe) -> None:
    for file in (Path(recipe.data) / "train" / "labels").iterdir():
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
    with pytest.raises(
        UserError, match=r"8 images to train on hold no class but 'soil', .* 255 means ignored: write 1"
    ):
        finetune.run(recipe)
    assert not recipe.output.exists()


def test_classes_without_a_pixel_are_named(recipe: FinetuneRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        file = Path(recipe.data) / split / "classes.json"
        file.write_text(json.dumps({"classes": [*CLASSES, *(f"class {i}" for i in range(12))]}))
    finetune.run(replace(recipe, steps=1))
    names = ", ".join(f"class {i}" for i in range(10))
    assert f"no pixel is labelled with 12 of 15 classes: {names}, ...\n" in capsys.readouterr().out


def test_validation_labels_that_cannot_be_read(recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = sorted((Path(recipe.data) / "val" / "labels").iterdir())
    good = {file: file.read_bytes() for file in labels}
    for file in labels[:3]:
        Image.new("RGBA", (36, 28)).save(file)
    assert open_data(recipe)[1] is not None
    with pytest.raises(UserError, match=r"scene_0\.png: .* leave --strict out to skip it"):
        open_data(replace(recipe, strict=True))
    Image.new("RGBA", (36, 28)).save(labels[3])
    with pytest.raises(UserError, match=r"none of the 4 images to evaluate on can be used; scene_0\.png, for example"):
        finetune.run(recipe)
    assert not recipe.output.exists()

    for file, content in good.items():
        file.write_bytes(content)
    step = finetune.train_step

    def lose_labels(*args: Any, **kwargs: Any) -> float:
        for file in labels:
            file.unlink(missing_ok=True)
        return step(*args, **kwargs)

    monkeypatch.setattr(finetune, "train_step", lose_labels)
    with pytest.raises(UserError, match=r"none of the 4 images to evaluate on .*; the model is kept, score it with"):
        finetune.run(replace(recipe, steps=1))
    assert (recipe.output / "model" / "model.safetensors").exists() and not (recipe.output / "eval.json").exists()


def test_a_new_model_is_never_beside_the_scores_of_an_old_one(
    recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finetune.run(recipe)
    first = json.loads((run / "eval.json").read_text())
    digest = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert first["weights_sha256"] == digest and "has not been evaluated" not in (run / "model/README.md").read_text()

    def stop(*_args: Any) -> None:
        raise KeyboardInterrupt

    more, judge = replace(recipe, steps=8, resume=True), finetune.judge
    monkeypatch.setattr(finetune, "judge", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(more)
    assert hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest() != digest
    assert not (run / "eval.json").exists()
    monkeypatch.setattr(finetune, "judge", judge)
    finetune.run(more)
    assert json.loads((run / "eval.json").read_text())["weights_sha256"] != digest


def test_scores_of_the_same_weights_stay(recipe: FinetuneRecipe) -> None:
    run = finetune.run(recipe)
    scores = (run / "eval.json").read_text()
    (run / "eval.json").write_text(own := json.dumps({**json.loads(scores), "data": "by hand"}))
    finetune.drop_scores_of_others(run)
    assert (run / "eval.json").read_text() == own
    for others in (json.dumps({**json.loads(scores), "weights_sha256": "0"}), "broken"):
        (run / "eval.json").write_text(others)
        finetune.drop_scores_of_others(run)
        assert not (run / "eval.json").exists()


def test_a_run_without_validation_says_so(recipe: FinetuneRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune.run(replace(recipe, data=str(Path(recipe.data) / "train"), steps=1))
    assert not (run / "eval.json").exists()
    assert "no scores: there are no images to evaluate on" in capsys.readouterr().out


def test_unset_numbers_are_derived(recipe: FinetuneRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(num_images: int, *, short_side: int = 600, on_cpu: bool = False, **given: Any) -> Plan:
        open_recipe = replace(recipe, **({"steps": None, "crop_size": None} | given))
        return make_plan(open_recipe, num_images=num_images, short_side=short_side, patch=14, on_cpu=on_cpu)

    assert plan(45) == Plan(225, 8, 504, 22, 1e-3, 3e-5)
    assert plan(45, on_cpu=True) == Plan(450, 4, 252, 45, 1e-3, 3e-5)
    assert plan(20_000, batch_size=32) == Plan(25_000, 32, 504, 1500, 6e-5, 6e-5)
    assert plan(10**6).steps == 40_000 and plan(3).steps == 200
    assert plan(45, head="linear", train_on="head").learning_rate == 2e-2
    assert plan(45, head="fpn", train_on="head").learning_rate == 1e-3
    assert plan(45, short_side=9).crop_size == 14
    assert plan(45, learning_rate=0.5, steps=7, warmup_steps=0) == Plan(7, 8, 504, 0, 0.5, 3e-5)
    finetune.run(replace(recipe, steps=1, crop_size=None))
    out = capsys.readouterr().out
    assert "chosen from the data: batch_size=4, crop_size=32, warmup_steps=0, learning_rate=0.001" in out
    assert "crop_size: 32" in (recipe.output / "recipe.yaml").read_text()


def test_the_base_scale_is_where_crops_and_scores_begin(recipe: FinetuneRecipe) -> None:
    recipe = replace(recipe, crop_size=None, steps=1, base_scale=(80, 64), drop_path=0.1)
    run = finetune.run(recipe)
    # images of 40 x 32 px are twice as large now: crops of their short side
    assert "crop_size: 64" in (run / "recipe.yaml").read_text()
    assert "test_scale: [80, 64]" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "eval.json").read_text())["inference"]["test_scale"] == [80, 64]
    model, _ = load_segmenter(str(run), device=torch.device("cpu"))
    assert sweep_of(model).test_scale == (80, 64)
    other = finetune.run(replace(recipe, output=run.with_name("other"), test_scale=(40, 32), window=32))
    said = json.loads((other / "model" / "config.json").read_text())["inference"]
    assert said == {"window": 32, "test_scale": [40, 32]}


def test_the_rates_warm_up_and_fall_to_their_floor() -> None:
    plan = Plan(100, 8, 16, 10, 1.0, 0.1, poly_power=0.9, min_learning_rate=0.2)
    rates = [learning_rates(plan, step) for step in range(100)]
    assert rates[50] == (pytest.approx(0.2 + 0.8 * 0.5**0.9), pytest.approx(0.1))
    assert min(head for head, _ in rates[10:]) == pytest.approx(0.2 + 0.8 * 0.01**0.9)


def test_the_rates_warm_up_and_fall_to_zero() -> None:
    plan = Plan(100, 8, 16, 10, 1.0, 0.1)
    head = [learning_rates(plan, step)[0] for step in range(100)]
    assert head[0] == pytest.approx(0.1) and head[9] == pytest.approx(0.91) and head[-1] == pytest.approx(0.01)
    assert learning_rates(plan, 50) == pytest.approx((0.5, 0.05))


def test_a_broken_loss_stops_the_run_and_leaves_no_model(recipe: FinetuneRecipe) -> None:
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d; lower learning_rate \(now 1e\+30\)"):
        finetune.run(replace(recipe, learning_rate=1e30, backbone_learning_rate=1e30, checkpoint_every=1))
    assert {path.name for path in recipe.output.iterdir()} == {"recipe.yaml", "metrics.jsonl", "checkpoints"}


@pytest.mark.parametrize("strict", [False, True])
def test_a_bad_label_is_skipped_or_named(
    recipe: FinetuneRecipe, strict: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(recipe.data) / "train" / "labels" / "scene_2.png").unlink()
    Image.new("L", (40, 32), 7).save(Path(recipe.data) / "val" / "labels" / "scene_1.png")
    if strict:
        with pytest.raises(UserError, match=r"scene_2\.png: it has no label .*; add that file or remove the image"):
            finetune.run(replace(recipe, strict=True))
        assert not recipe.output.exists()
        return
    run = finetune.run(replace(recipe, steps=1))
    out = capsys.readouterr().out
    assert "7 labelled images of 3 classes, 1 skipped" in out and "skipped scene_2.png: it has no label" in out
    assert json.loads((run / "eval.json").read_text())["num_images"] == 3
    assert "skipped scene_1.png" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at-all"}, "backbone 'nowhere/at-all' cannot be loaded"),
        ({"data": "nowhere"}, "labelled data 'nowhere' is not a folder"),
        ({"val_split": "test"}, "has no split 'test'; it has train, val"),
        ({"crop_size": 18}, "crop_size 18 is no multiple of the patch size 4; give 16"),
        ({"match": "zebra*"}, "match 'zebra[*]' selects none of the 8 images"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    recipe: FinetuneRecipe, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        finetune.run(replace(recipe, **changes))
    assert not recipe.output.exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=0", "steps is 0; give at least 1"),
        ("scale=2,1", "scale is 2.0,1.0; give the lower one first"),
        ("crop_size=10000000", "crop_size is 10000000; give 1 to 16384"),
        ("window=4", None),
        ("stride=2000", "stride is 2000; give 1 to 1024"),
        ("base_scale=0,5", "base_scale is (0, 5); give two sides of 1 to 16384 px, such as 2048,512"),
        ("test_scale=5", "test_scale is '5'; expected"),
        ("drop_path=1", "drop_path is 1.0; give at least 0 and less than 1"),
        ("head=unet", "head is 'unet'; choose from fpn, linear, pixel, upernet"),
    ],
)
def test_values_are_checked(argument: str, message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["finetune", "--model", "m", "--data", "nowhere", "--output", "o", argument]
    assert glare_main(argv) == 2
    assert (message or "labelled data 'nowhere' is not a folder") in capsys.readouterr().err


def test_a_resumed_run_must_be_the_same_one(recipe: FinetuneRecipe) -> None:
    finetune.run(replace(recipe, steps=2))
    with pytest.raises(UserError, match="has another recipe: head was fpn and is linear"):
        finetune.run(replace(recipe, steps=4, head="linear", resume=True, warmup_steps=0))


def test_the_entry_points_people_use(recipe: FinetuneRecipe, tmp_path: Path, forks: Forks) -> None:
    run = tmp_path / "run"
    argv = ["--model", recipe.model, "--data", recipe.data, "--output", str(run), "--steps", "2", "--crop-size", "16"]
    command = [sys.executable, str(ROOT / "training" / "finetune.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout and "images/s" in done.stderr and "Traceback" not in done.stderr
    again = forks.run("finetune", *argv, folder=tmp_path)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith(f"glare finetune: error: the output folder {run} is in use")
