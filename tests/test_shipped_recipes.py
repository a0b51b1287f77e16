"""Every recipe that is shipped can be read by its job, and the paper's hold the paper's numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from glare.backbones import load_backbone
from glare.classify import ClassifyRecipe
from glare.dense_inference import asked
from glare.finetune import FinetuneRecipe
from glare.finetune_plan import make_plan
from glare.finetune_step import learning_rates
from glare.labelled_crops import scaled_sizes
from glare.pretrain import PretrainRecipe, resolve
from glare.pretrain_plan import Plan
from glare.recipes import parse, read_yaml

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
PRETRAIN = ["--backbone", "b", "--data", "d", "--output", "o"]
FINETUNE = ["--model", "m", "--data", "d", "--output", "o"]


def job_of(file: Path) -> type[Any]:
    if file.stem.startswith(("fpn_", "finetune")):
        return FinetuneRecipe
    return ClassifyRecipe if file.stem == "classify" else PretrainRecipe


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RECIPES)))
def test_the_recipe_is_read_and_its_header_has_the_command(file: Path) -> None:
    parse(
        job_of(file), ["--recipe", str(file), *(PRETRAIN if job_of(file) is PretrainRecipe else FINETUNE)], prog="test"
    )
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(str(file.relative_to(RECIPES.parents[1])) in line for line in header)


@pytest.mark.parametrize(("name", "images", "steps"), [("loveda", 2522, 400), ("ade20k", 20210, 3900)])
def test_the_paper_s_schedule(name: str, images: int, steps: int) -> None:
    recipe = parse(PretrainRecipe, ["--recipe", str(RECIPES / f"udi_glare_{name}.yaml"), *PRETRAIN], prog="test")
    assert recipe.batch_size == 512 and recipe.epochs == 100
    per_epoch = images // recipe.batch_size
    assert recipe.epochs * per_epoch == steps
    assert recipe.warmup_steps == recipe.freeze_last_layer_steps == per_epoch
    assert recipe.glare.prototypes == 8192 and recipe.glare.regions.count == 6 and recipe.views.num_local == 10
    values = {name: getattr(recipe, name) for name in Plan.__dataclass_fields__} | {"steps": steps}
    plan = Plan(**values)
    assert plan.learning_rate_at(per_epoch) == pytest.approx(1.5e-4)
    assert plan.momentum_at(0) == 0.996 and plan.momentum_at(steps - 1) == 1.0
    assert plan.temperature_at(round(0.3 * steps)) == pytest.approx(0.07)


@pytest.mark.parametrize("file", [file for file in FILES if file.name.startswith("fpn_")], ids=lambda file: file.stem)
def test_the_fine_tunings_are_those_of_the_literature(file: Path) -> None:
    """UDI's configuration of semantic FPN, and the sizes that mmsegmentation gives each data set."""
    recipe = parse(FinetuneRecipe, ["--recipe", str(file), *FINETUNE], prog="test")
    name, _, schedule = file.stem.removeprefix("fpn_").rpartition("_")
    sizes = {
        "ade20k": ((2048, 512), (2048, 512)),
        "loveda": ((2048, 512), (1024, 1024)),
        "cityscapes": ((2048, 1024), (2048, 1024)),
        "pascal_context": ((520, 520), (520, 520)),
    }
    assert (recipe.base_scale, recipe.test_scale) == sizes[name]
    assert recipe.steps == 1000 * int(schedule.removesuffix("k")) and recipe.seeds == 3
    assert recipe.head == "fpn" and not recipe.pyramid and recipe.train_on == "full"
    assert (recipe.crop_size, recipe.scale, recipe.dominant_share) == (512, (0.5, 2.0), 0.75)
    assert recipe.drop_path == 0.1 and recipe.weight_decay == 0.01 and recipe.batch_size == 32
    plan = make_plan(recipe, num_images=1, short_side=1, patch=16, on_cpu=False)
    assert plan.warmup_steps == (200 if name == "loveda" else 1500)
    assert learning_rates(plan, plan.steps // 2) == pytest.approx((3e-5, 3e-5))
    # whole images, as their test mode is
    assert len(asked(recipe).windows((1024, 2048) if name == "cityscapes" else (1024, 1024))) == 1


@pytest.mark.parametrize(("name", "images"), [("dubai", 45), ("camvid", 367)])
def test_the_measured_settings_are_what_is_derived(name: str, images: int) -> None:
    written = read_yaml(RECIPES / f"{name}.yaml", PretrainRecipe)
    sizes = {"num_images": images, "patch_size": 14, "accelerator": Accelerator(cpu=True)}
    needed = {"backbone": "b", "data": "d", "output": Path("o")}
    assert resolve(needed, **sizes)[0] == resolve({**needed, **written}, **sizes)[0]


def test_the_study_of_pets_masks_half_of_64_patches_of_a_vit_of_2_5_million_weights() -> None:
    given = {**read_yaml(RECIPES / "pets" / "simmim.yaml", PretrainRecipe), "data": "d", "output": Path("o")}
    recipe, _ = resolve(given, num_images=45_000, patch_size=16, accelerator=Accelerator(cpu=True))
    assert recipe.steps == 50 * (45_000 // 128)
    assert recipe.views.global_size // 16 == 8 and recipe.views.patch_ratio == (0.5, 0.5)
    vit = load_backbone(str(RECIPES / "pets" / "vit.json"))
    assert sum(parameter.numel() for parameter in vit.parameters()) == pytest.approx(2.5e6, rel=0.02)


@pytest.mark.parametrize("size", [(500, 375), (500, 333), (333, 500), (300, 300), (600, 160)])
def test_the_study_s_photographs_fill_its_crops(size: tuple[int, int]) -> None:
    recipe = parse(FinetuneRecipe, ["--recipe", str(RECIPES / "pets" / "finetune.yaml"), *FINETUNE], prog="test")
    scaled = scaled_sizes(torch.tensor([size]), recipe.base_scale)
    assert scaled.min().item() == pytest.approx(recipe.crop_size) and recipe.scale[0] == 1
