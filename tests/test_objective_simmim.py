"""SimMIM: its loss against a transcription, what it sees and does not see, and runs without a teacher."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference.simmim_terms import encode_masked, reconstruction_loss
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_vit
from torch import Tensor, nn
from transformers import AutoModel

from glare import pretrain
from glare.checkpoints import TENSORS, folders
from glare.draws import Draws
from glare.errors import UserError
from glare.features import Features
from glare.geometry import Crop
from glare.objectives.base import Terms
from glare.objectives.simmim import SimMIMObjective
from glare.patch_augmentation import sample_square_mask
from glare.student import Student
from glare.views import Views

PATCH, GRID, DIM = 4, (3, 3), 32
SIDE = PATCH * GRID[0]
Given = Callable[..., dict[str, Any]]


def views(images: int = 3) -> Views:
    generator = torch.Generator().manual_seed(0)
    global_ = torch.randn(2, images, 3, SIDE, SIDE, generator=generator)
    place, patches = torch.zeros(2, images, 2), GRID[0] * GRID[1]
    mask = torch.rand(2, images, patches, generator=generator) < 0.5
    return Views(global_, global_, global_[:0], Crop(place, place), Crop(place[:0], place[:0]), mask, GRID)


def student() -> Student:
    torch.manual_seed(0)
    vit = tiny_vit(image_size=SIDE)
    vit.pooler = None
    made = Student(vit, SimMIMObjective(DIM, PATCH), mask_token=True)
    assert made.mask_token is not None
    nn.init.normal_(made.mask_token)
    return made


def terms_of(model: Student, seen: Views) -> Terms:
    features = model.target_features(seen)
    places = model.objective.places(features, seen, Draws(torch.Generator(), seen.global_.shape[1]))
    terms: Terms = model(seen, features, places, counts=places.counts(), target=model, temperature=0.0)
    return terms


def loss_from(objective: SimMIMObjective, features: Tensor, seen: Views) -> Tensor:
    none = Features(features[:0, :, 0], features[:0])
    places = objective.places(none, seen, Draws(torch.Generator(), seen.global_.shape[1]))
    of_views = (Features(features[:, :, 0], features), none)
    return objective(of_views, none, places, counts=places.counts(), target=objective, temperature=0.0).total


def test_values_and_gradients_are_those_of_the_transcription() -> None:
    ours, theirs, seen = student(), student(), views()
    ours.requires_grad_(True)
    theirs.requires_grad_(True)
    terms = terms_of(ours, seen)
    images, mask = seen.global_.flatten(0, 1), seen.patch_mask.flatten(0, 1)
    vit, decoder = theirs.backbone, theirs.objective.decoder
    vit.set_attn_implementation("eager")
    features = torch.stack([encode_masked(vit, x, m, theirs.mask_token) for x, m in zip(images, mask, strict=True)])
    expected = reconstruction_loss(features, images, mask, decoder.weight, decoder.bias, patch=PATCH)
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-5)
    terms.total.backward()
    expected.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name != "backbone.embeddings.mask_token":
            assert a.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: name + text)
    assert terms.health["masked_share"].item() == pytest.approx(mask.float().mean().item())


def test_the_decoder_is_a_convolution_and_a_pixel_shuffle() -> None:
    objective, seen = SimMIMObjective(DIM, PATCH), views()
    features = torch.randn(2, 3, 9, DIM)
    weight = objective.decoder.weight.view(-1, DIM, 1, 1)
    maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, GRID)
    rebuilt = nn.functional.pixel_shuffle(nn.functional.conv2d(maps, weight, objective.decoder.bias), PATCH)
    mask = seen.patch_mask.view(6, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    expected = ((seen.global_.flatten(0, 1) - rebuilt).abs() * mask).sum() / (mask.sum() + 1e-5) / 3
    torch.testing.assert_close(loss_from(objective, features, seen), expected)


def test_visible_patches_have_no_part_in_the_loss() -> None:
    objective, seen = SimMIMObjective(DIM, PATCH), views()
    features = torch.randn(2, 3, 9, DIM, requires_grad=True)
    loss = loss_from(objective, features, seen)
    (slope,) = torch.autograd.grad(loss, features)
    assert not slope[~seen.patch_mask].any() and slope[seen.patch_mask].any(dim=-1).all()
    visible = ~seen.patch_mask.view(2, 3, 1, *GRID).repeat_interleave(PATCH, 3).repeat_interleave(PATCH, 4)
    changed = replace(seen, global_=seen.global_ + 9 * visible)
    assert torch.equal(loss_from(objective, features, changed), loss)
    assert not torch.equal(loss_from(objective, features, replace(seen, global_=seen.global_ + 9 * ~visible)), loss)


def test_the_encoder_does_not_see_masked_pixels() -> None:
    model, seen = student(), views()
    masked = seen.patch_mask.view(2, 3, 1, *GRID).repeat_interleave(PATCH, 3).repeat_interleave(PATCH, 4)
    other = replace(seen, augmented=seen.augmented + 9 * masked)
    assert torch.equal(terms_of(model, other).total, terms_of(model, seen).total)
    assert not torch.equal(
        terms_of(model, replace(seen, augmented=seen.augmented + 9 * ~masked)).total, terms_of(model, seen).total
    )


def test_a_batch_without_masked_patches_costs_nothing() -> None:
    seen = views()
    terms = terms_of(student(), replace(seen, patch_mask=torch.zeros_like(seen.patch_mask)))
    assert terms.total.item() == 0.0
    terms.total.backward()


@pytest.mark.parametrize(
    ("grid", "side", "ratio", "squares"),
    [((14, 14), 2, 0.6, 30), ((8, 8), 1, 0.5, 32), ((5, 1), 1, 0.6, 3), ((4, 4), 4, 0.1, 1), ((6, 4), 2, 1.0, 6)],
)
def test_the_mask_is_made_of_whole_squares(grid: tuple[int, int], side: int, ratio: float, squares: int) -> None:
    """30 of 49 and 32 of 64 are the numbers of SimMIM at 224 px and of the study at 128 px."""
    draws = Draws(torch.Generator().manual_seed(0), 50)
    mask = sample_square_mask(draws, grid, prob=1.0, ratio=(ratio, ratio), side=side).view(-1, *grid)
    assert (mask.sum(dim=(1, 2)) == squares * side**2).all()
    cells = mask.view(50, grid[0] // side, side, grid[1] // side, side).transpose(2, 3).flatten(3)
    assert (cells.all(dim=-1) == cells.any(dim=-1)).all()
    if 0 < squares < grid[0] * grid[1] // side**2:
        assert len(mask.flatten(1).unique(dim=0)) > min(10, squares)
        share = cells.all(dim=-1).float().mean(dim=0)
        assert share.amin() > 0 and share.amax() < 1


def test_squares_that_do_not_fit_are_cut_off_and_some_views_may_be_left_alone() -> None:
    draws = Draws(torch.Generator().manual_seed(0), 400)
    mask = sample_square_mask(draws, (5, 5), prob=0.25, ratio=(1.0, 1.0), side=2)
    assert mask.shape == (400, 25)
    assert set(mask.sum(dim=1).tolist()) == {0, 25}
    assert 0.15 < mask.float().mean() < 0.35


@pytest.fixture
def given(tmp_path: Path) -> Given:
    config = tiny_config(num_hidden_layers=1)
    (tmp_path / "vit.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        noise = rng.integers(0, 256, (24 + number, 31, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")

    def make(output: str, **changes: Any) -> dict[str, Any]:
        fixed = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "log_every": 1}
        fixed |= {"report_to": "none", "device": "cpu", "precision": "fp32"}
        fixed |= {"objective": "simmim", "adapter": "full", "views": {"global_size": 16, "local_size": 16}}
        places = {"backbone": str(tmp_path / "vit.json"), "data": str(tmp_path / "photos")}
        return {**fixed, **places, "output": tmp_path / output, **changes}

    return make


def state(run: Path) -> dict[str, Tensor]:
    return load_file(folders(run)[0] / TENSORS)


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def model(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_a_batch_may_be_computed_in_passes(given: Given) -> None:
    """The masks of the parts have different numbers of patches, of which the mean is one."""
    views = {"global_size": 16, "local_size": 16, "patch_ratio": [0.1, 0.9]}
    one, parts = (
        pretrain.run(given(name, views=views, gradient_accumulation_steps=number))
        for name, number in (("a", 1), ("b", 2))
    )
    ours, theirs = state(one), state(parts)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not name.endswith("k_proj.bias"):  # changes nothing: its gradient is rounding alone
            torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)
    assert [line["loss"] for line in logged(one)] == pytest.approx([line["loss"] for line in logged(parts)], rel=1e-5)


def test_a_run_has_no_teacher(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher was made, asked or moved")

    passes: list[int] = []

    def counted(self: Student, *args: Any, **options: Any) -> Any:
        block = self.backbone.layers[0]
        hook = block.register_forward_hook(lambda *_: passes.append(1))
        try:
            return forward(self, *args, **options)
        finally:
            hook.remove()

    forward = Student.forward
    monkeypatch.setattr(Student, "forward", counted)
    monkeypatch.setattr(pretrain, "make_teacher", never)
    monkeypatch.setattr("glare.pretrain_step.update_teacher", never)
    run = pretrain.run(given("run", log_every=3))
    assert len(passes) == 3
    assert not [name for name in state(run) if name.startswith("teacher")]
    (line,) = logged(run)
    assert "teacher_momentum" not in line and line["loss"] == line["loss_reconstruction"]
    assert line["masked_share"] == pytest.approx(1.0)  # a square of 32 px is the whole view
    saved = AutoModel.from_pretrained(run / "model").state_dict()
    trained = {name: v for name, v in state(run).items() if name.startswith("student.backbone.")}
    assert len(trained) > 10
    assert all(torch.equal(saved[name.removeprefix("student.")], value) for name, value in trained.items())


def test_target_features_are_of_no_views_and_cost_no_pass() -> None:
    made, seen = student(), views()
    made.backbone.register_forward_hook(lambda *_: pytest.fail("a forward pass"))
    made.backbone.layers[0].register_forward_hook(lambda *_: pytest.fail("a forward pass"))
    found = made.target_features(seen)
    assert found.cls.shape == (0, 3, DIM) and found.patches.shape == (0, 3, 9, DIM) and found.attention is None


def test_random_weights_follow_the_seed_and_a_run_resumes_bit_for_bit(given: Given) -> None:
    constant = {"min_learning_rate": 1e-3, "checkpoint_every": 1}  # the rate would follow the number of steps
    whole = model(pretrain.run(given("whole", **constant)))
    torch.randn(5)  # whatever was drawn before a run
    pretrain.run(given("parts", **constant, steps=2))
    parts = model(pretrain.run(given("parts", **constant, resume=True)))
    other = model(pretrain.run(given("other", **constant, seed=1)))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    position = "backbone.embeddings.position_embeddings"
    assert (whole[position] - other[position]).abs().max() > 0.1  # drawn anew, not only trained otherwise


@pytest.mark.parametrize(
    ("adapter", "batch_size", "rate"),
    [("full", 8, 1e-4), ("full", 512, 1e-4), ("full", 2048, 4e-4), ("uniadapter", 8, 5e-3)],
)
def test_all_weights_learn_at_the_rate_of_simmim(adapter: str, batch_size: int, rate: float) -> None:
    given = {"backbone": "v", "data": "d", "output": "o", "objective": "simmim", "batch_size": batch_size}
    place = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    sizes: dict[str, Any] = {"num_images": 64, "patch_size": 16, "accelerator": place}
    recipe, derived = pretrain.resolve({**given, "adapter": adapter}, **sizes)
    assert recipe.learning_rate == derived["learning_rate"] == pytest.approx(rate)
    told, derived = pretrain.resolve({**given, "adapter": adapter, "learning_rate": 3e-4}, **sizes)
    assert told.learning_rate == 3e-4 and "learning_rate" not in derived


def test_what_cannot_be_learned_from_is_refused(given: Given) -> None:
    sizes = {"global_size": 16, "local_size": 16}
    for changes, message in (
        ({"export": "teacher"}, "objective simmim has no teacher to export; give --export student"),
        ({"views": {**sizes, "patch_augmentation": "blur"}}, "patch_augmentation 'blur' .* there are none; give mask"),
        ({"views": {**sizes, "patch_prob": 0.0}}, "patch_prob 0.0 there are none"),
        ({"views": {**sizes, "patch_square": 0}}, "patch_square is 0; give at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain.run(given("run", **changes))
    assert not given("run")["output"].exists()
