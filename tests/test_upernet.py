"""UPerNet of transformers on a GLARE backbone, through all jobs: trained, read, evaluated, predicted with, exported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import CLASSES, write_labelled
from PIL import Image
from safetensors.torch import load_file
from tiny_models import adapted_model, same_weights, tiny_vit
from transformers import AutoModelForSemanticSegmentation, UperNetForSemanticSegmentation

from glare import GlareBackbone, UserError, finetune
from glare.cli import main as glare_main
from glare.dense_inference import Sweep, segment
from glare.finetune import FinetuneRecipe
from glare.finetune_plan import Plan
from glare.finetune_step import train_step
from glare.inference import load_segmenter
from glare.model_card import card, facts_of
from glare.publication import find
from glare.runtime import make_accelerator
from glare.segmenters import add_head, load_pretrained, parameter_groups, select_trained


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> FinetuneRecipe:
    folder = tmp_path_factory.mktemp("upernet")
    for split, count in (("train", 4), ("val", 2)):
        write_labelled(folder / "data" / split, count, size=(20, 12))
    adapted_model(tiny_vit("dinov2"), "lora").save_pretrained(folder / "adapted")
    return FinetuneRecipe(
        model=str(folder / "adapted"),
        data=str(folder / "data"),
        output=folder / "run",
        head="upernet",
        pyramid=True,
        train_on="head",
        base_scale=(32, 16),
        steps=1,
        batch_size=2,
        crop_size=8,
        precision="fp32",
        report_to="none",
    )


@pytest.fixture(scope="module")
def run(recipe: FinetuneRecipe) -> Path:
    return finetune.run(recipe)


def fresh(*, pyramid: bool, classes: int = 3) -> Any:
    model, names = adapted_model(tiny_vit("dinov2"), "lora"), [f"class {k}" for k in range(classes)]
    return add_head(model, "upernet", pyramid=pyramid, classes=names, palette=[[0, 0, 0]] * classes)


@pytest.mark.parametrize(("pyramid", "grids"), [(False, [(4, 6)] * 3), (True, [(16, 24), (8, 12), (4, 6)])])
def test_taps_have_one_size_or_the_strides_of_a_pyramid(
    pyramid: bool, grids: list[tuple[int, int]], images: torch.Tensor
) -> None:
    model = fresh(pyramid=pyramid).eval()
    assert [tuple(level.shape[2:]) for level in model.backbone(images).feature_maps] == grids
    assert same_weights(model.backbone.backbone, adapted_model(tiny_vit("dinov2"), "lora").backbone)
    assert model.config.auxiliary_loss_weight == 0.4 and model.auxiliary_head is not None


def test_the_pyramid_is_a_part_of_the_head() -> None:
    model = fresh(pyramid=True)
    select_trained(model, "head")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "decode_head", "auxiliary_head"}
    assert all(name.startswith("backbone.pyramid.") for name in trained if name.startswith("backbone."))
    assert all(group["head"] for group in parameter_groups(model, 0.01))


def test_what_was_saved_loads_as_it_was(run: Path) -> None:
    plain, problems = AutoModelForSemanticSegmentation.from_pretrained(run / "model", output_loading_info=True)
    assert not any(problems.values()) and isinstance(plain, UperNetForSemanticSegmentation)
    assert isinstance(plain.backbone, GlareBackbone) and list(plain.config.id2label.values()) == CLASSES
    saved = load_file(run / "model" / "model.safetensors")
    heads = {name: value for name, value in plain.state_dict().items() if "backbone.backbone" not in name}
    assert len(heads) > 50 and all(torch.equal(saved[name], value) for name, value in heads.items())
    model, normalise = load_segmenter(str(run), device=torch.device("cpu"))
    image = Image.open(run.parent / "data" / "val" / "images" / "scene_0.png")
    # the auxiliary head has no part in what is predicted
    assert model.auxiliary_head is None and plain.auxiliary_head is not None
    found, expected = (segment(one.eval(), [image], normalise=normalise)[0] for one in (model, plain))
    assert found.shape == (12, 20) and np.array_equal(found, expected)


def test_it_is_evaluated_as_it_was_fine_tuned(run: Path, tmp_path: Path) -> None:
    argv = ["evaluate", "--model", str(run), "--data", str(run.parent / "data"), "--precision", "fp32"]
    assert glare_main([*argv, "--json", str(tmp_path / "again.json")]) == 0
    assert glare_main([*argv, "--json", str(tmp_path / "more.json"), "--ratios", "0.5,1", "--flip"]) == 0
    first = json.loads((run / "eval.json").read_text())
    again, more = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("again", "more"))
    assert first["iou"] == again["iou"] and first["inference"] == again["inference"]
    assert first["inference"] == {
        "window": None,
        "stride": None,
        "test_scale": [32, 16],
        "ratios": [1.0],
        "flip": False,
    }
    assert more["inference"] == first["inference"] | {"ratios": [0.5, 1.0], "flip": True}


def test_it_predicts_and_its_card_says_how_it_was_evaluated(run: Path, tmp_path: Path) -> None:
    source = run.parent / "data" / "val" / "images"
    argv = ["predict", "--model", str(run), "--output", str(tmp_path / "out"), str(source), "--flip"]
    assert glare_main(argv) == 0 and len(list((tmp_path / "out").iterdir())) == 4
    publication = find(run)
    assert publication.kind == "upernet"
    assert "On 2 images of data, split val, fitted to 32 x 16 px; the training had seed 0." in card(
        facts_of(publication)
    )
    words = Sweep(512, 256, (2048, 512), (0.5, 1.0), True).described
    assert words == "fitted to 2048 x 512 px, in windows of 512 px, at 0.5 and 1 times that size, mirrored, too"


def test_its_vit_is_exported_and_goes_into_further_trainings(run: Path, tmp_path: Path, images: torch.Tensor) -> None:
    assert glare_main(["export", "--model", str(run), "--output", str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "dinov2"
    below, expected = load_pretrained(str(run))[0].eval(), adapted_model(tiny_vit("dinov2"), "lora")
    assert same_weights(below, expected) and not below.config.backbone_pyramid
    with torch.no_grad():
        tokens = load_pretrained(str(tmp_path / "plain"))[0].eval()(images).last_hidden_state
        torch.testing.assert_close(tokens, expected(images).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_pass_without_labels_changes_nothing() -> None:
    model = fresh(pyramid=False)
    accelerator = make_accelerator(device="cpu", precision="fp32", report_to="none", output=Path())
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=0.0)
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.full((4, 8, 8), 255)
    plan = Plan(2, 4, 8, 0, 0.1, 0.1, 2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert train_step(model.train(), optimizer, (pixels, labels), plan, accelerator, seed=0, step=0) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    labels[2:] = 1  # of the second pass alone
    assert 0 < train_step(model, optimizer, (pixels, labels), plan, accelerator, seed=0, step=1) < 10
    assert not torch.equal(model.decode_head.classifier.weight, before["decode_head.classifier.weight"])


def test_what_it_cannot_do_is_said_before_anything_is_written(recipe: FinetuneRecipe) -> None:
    elsewhere = replace(recipe, output=recipe.output.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"head upernet needs 2 crops in every pass, .* give a batch_size of 4 or more"):
        finetune.run(replace(elsewhere, gradient_accumulation_steps=2))
    assert not elsewhere.output.exists()
    with pytest.raises(UserError, match="head 'upernet' needs at least 2 classes; give fpn or linear"):
        fresh(pyramid=False, classes=1)
    with pytest.raises(ValueError, match="pyramid is on, but head 'pixel' has none; give --head fpn or upernet"):
        replace(recipe, head="pixel", pyramid=True)
    with pytest.raises(ValueError, match="pyramid is on, but head 'linear' has none"):
        replace(recipe, head="linear")
