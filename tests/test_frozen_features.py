"""Images and labels on the grid of patches, features against plain forward passes, counts against slow loops."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from frozen_samples import CLASSES, GRIDS, IGNORED, PATCH, relabelled, sample
from labelled_samples import COLOURS, write_labelled
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from glare import frozen_features
from glare.data.labelled import open_labelled
from glare.errors import UserError
from glare.frozen_features import PatchFeatures, by_image, check_folds, class_shares, extract, pixel_counts, read_images
from glare.metrics import confusion_matrix
from glare.modeling_glare import GlareModel
from glare.splits import Fold
from glare.views import Normalisation

MakeVit = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
NORMALISE = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short_side", "height", "width"), [(32, 32, 40), (16, 16, 20), (58, 56, 72), (64, 64, 80)])
def test_both_sides_are_multiples_of_the_patch(tmp_path: Path, short_side: int, height: int, width: int) -> None:
    data = open_labelled(str(write_labelled(tmp_path, 2, size=(40, 32))))
    images, labels, names, skipped = read_images(data, patch=4, short_side=short_side, strict=True)
    assert [image.shape for image in images] == [(3, height, width)] * 2
    assert [label.shape for label in labels.maps] == [(height, width)] * 2
    assert all(image.dtype == torch.uint8 and image.is_contiguous() for image in images)
    assert labels.shares.shape == (2 * height * width // 16, 3)
    assert names == list(data.names)
    assert skipped == []


@pytest.mark.parametrize("size", [(40, 24), (24, 40)])
def test_images_and_labels_stay_together(tmp_path: Path, size: tuple[int, int]) -> None:
    data = open_labelled(str(write_labelled(tmp_path, 3, size=size)))
    images, labels, _, _ = read_images(data, patch=4, short_side=48, strict=True)
    for image, label in zip(images, labels.maps, strict=True):
        distance = image.permute(1, 2, 0).numpy().astype(int)[:, :, None] - COLOURS.astype(int)
        assert ((distance**2).sum(axis=3).argmin(axis=2) == label).mean() > 0.97


def test_shares_count_pixels_of_each_class() -> None:
    label = np.random.default_rng(0).choice([0, 1, 2, 255], (8, 12)).astype(np.uint8)
    expected = [
        [(label[y : y + 4, x : x + 4] == k).sum() / 16 for k in range(3)]
        for y in range(0, 8, 4)
        for x in range(0, 12, 4)
    ]
    assert torch.equal(class_shares(label, patch=4, num_classes=3), torch.tensor(expected, dtype=torch.float32))


def test_ignored_pixels_have_no_share(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path, 1, size=(32, 32))
    label = np.zeros((32, 32), np.uint8)
    label[:16] = 255
    label[16:, :2] = 255
    Image.fromarray(label).save(folder / "labels" / "scene_0.png")
    _, labels, _, _ = read_images(open_labelled(str(folder)), patch=16, short_side=32, strict=True)
    assert labels.shares.tolist() == [[0, 0, 0], [0, 0, 0], [0.875, 0, 0], [1, 0, 0]]


def test_labels_are_not_mixed_where_they_are_resized(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path, 1, size=(32, 32))
    label = np.where(np.arange(32) % 6 < 3, 0, 2).astype(np.uint8).repeat(32).reshape(32, 32)
    Image.fromarray(label).save(folder / "labels" / "scene_0.png")
    _, labels, _, _ = read_images(open_labelled(str(folder)), patch=4, short_side=44, strict=True)
    assert set(np.unique(labels.maps[0]).tolist()) == {0, 2}


def test_unreadable_images_are_reported(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path, 3)
    (folder / "images" / "scene_1.png").write_bytes(b"no picture")
    data = open_labelled(str(folder))
    images, labels, names, skipped = read_images(data, patch=4, short_side=16, strict=False)
    assert names == ["scene_0.png", "scene_2.png"]
    assert len(images) == len(labels.maps) == 2
    assert [name for name, _ in skipped] == ["scene_1.png"]
    assert "not an image" in skipped[0][1]
    with pytest.raises(UserError, match=r"scene_1\.png.*repair"):
        read_images(data, patch=4, short_side=16, strict=True)


def test_a_short_side_below_the_patch_is_refused(tmp_path: Path) -> None:
    data = open_labelled(str(write_labelled(tmp_path, 1)))
    with pytest.raises(UserError, match=r"short side of 13 px.*give 14 or more"):
        read_images(data, patch=14, short_side=13, strict=True)


def test_small_class_indices_are_never_taken_for_ignored(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path, 1, size=(8, 8))
    names = [f"class {k}" for k in range(255)]
    (folder / "classes.json").write_text(json.dumps({"classes": names}))
    label = np.full((8, 8), 254, np.uint8)
    Image.fromarray(label).save(folder / "labels" / "scene_0.png")
    _, labels, _, _ = read_images(open_labelled(str(folder)), patch=8, short_side=8, strict=True)
    assert labels.shares[0].nonzero().tolist() == [[254]]


# --- features ------------------------------------------------------------------------------------------------------


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def features_of(model: GlareModel, images: list[Tensor]) -> PatchFeatures:
    return extract(model, images, normalise=NORMALISE, device=CPU, autocast=nullcontext)


def test_features_are_those_of_a_plain_forward_pass(
    family: str, make_vit: MakeVit, prefix_tokens: dict[str, int]
) -> None:
    model = GlareModel.from_backbone(make_vit(family))
    images = pictures((16, 24), (24, 16), (16, 24), (8, 12), (24, 16), (16, 24))
    found = features_of(model, images)
    assert found.features.dtype == torch.float16
    assert found.cls.dtype == torch.float32
    assert found.grids == [(4, 6), (6, 4), (4, 6), (2, 3), (6, 4), (4, 6)]
    for image, patches, cls in zip(images, by_image(found.features, found.grids), found.cls, strict=True):
        with torch.no_grad():
            tokens = model(NORMALISE(image.unsqueeze(0).float() / 255)).last_hidden_state[0]
        torch.testing.assert_close(patches, tokens[prefix_tokens[family] :].half(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(cls, tokens[0], atol=1e-4, rtol=1e-4)


def test_many_images_are_encoded_in_several_passes(make_vit: MakeVit, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GlareModel.from_backbone(make_vit())
    images = pictures(*[(16, 16)] * 5)
    together = features_of(model, images)
    passes = []
    monkeypatch.setattr(frozen_features, "PASS_PATCHES", 2 * 16 + 1)
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    apart = features_of(model, images)
    assert passes == [2, 2, 1]
    torch.testing.assert_close(apart.features, together.features, atol=2e-3, rtol=2e-3)


def test_features_are_of_the_model_in_evaluation(make_vit: MakeVit) -> None:
    vit = make_vit(hidden_dropout_prob=0.5)
    quiet = features_of(GlareModel.from_backbone(vit), pictures((16, 16)))
    again = features_of(GlareModel.from_backbone(vit).train(), pictures((16, 16)))
    assert torch.equal(quiet.features, again.features)
    assert not again.features.requires_grad


def test_autocast_is_open_during_forward_passes(make_vit: MakeVit) -> None:
    model = GlareModel.from_backbone(make_vit())
    seen = []
    model.register_forward_hook(lambda *_: seen.append(inside))
    inside = False

    @contextmanager
    def autocast() -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False

    extract(model, pictures((16, 16), (8, 8)), normalise=NORMALISE, device=CPU, autocast=autocast)
    assert seen == [True, True]


def test_too_many_images_are_refused_before_the_first_pass(make_vit: MakeVit, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GlareModel.from_backbone(make_vit())
    needed = 2 * 16 * 32 * 2  # images x patches x dims x bytes
    monkeypatch.setattr(frozen_features, "memory_budget", lambda: needed)
    features_of(model, pictures((16, 16), (16, 16)))
    monkeypatch.setattr(frozen_features, "memory_budget", lambda: needed - 1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass has begun"))
    with pytest.raises(UserError, match=r"features of 2 images take 0\.0 GiB.*lower the number of images"):
        features_of(model, pictures((16, 16), (16, 16)))


def test_features_that_are_not_finite_are_refused(make_vit: MakeVit) -> None:
    model = GlareModel.from_backbone(make_vit())
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        features_of(model, pictures((16, 16)))


# --- counts --------------------------------------------------------------------------------------------------------


def slow_bilinear(scores: Tensor, y: float, x: float) -> Tensor:
    """Value at (y, x), in units of patches, of scores (rows, columns, k) at the centres of patches."""
    rows, columns, _ = scores.shape
    y, x = (min(max(place - 0.5, 0), length - 1) for place, length in ((y, rows), (x, columns)))
    top, left = int(y), int(x)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    down, along = y - top, x - left
    upper = (1 - along) * scores[top, left] + along * scores[top, right]
    lower = (1 - along) * scores[bottom, left] + along * scores[bottom, right]
    return (1 - down) * upper + down * lower


def test_pixels_are_predicted_by_interpolated_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, CLASSES, generator=generator)
    label = torch.randint(0, CLASSES, (2 * PATCH, 3 * PATCH), generator=generator).to(torch.uint8).numpy()
    label[0, :5] = IGNORED
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            if label[y, x] != IGNORED:
                predicted = slow_bilinear(scores, (y + 0.5) / PATCH, (x + 0.5) / PATCH).argmax()
                expected[label[y, x], predicted] += 1
    assert torch.equal(pixel_counts(scores.flatten(0, 1), (2, 3), label), expected)


def test_counts_of_images_add_up_to_those_of_all_pixels() -> None:
    features, labels = sample()
    scores = by_image(features.features[:, :CLASSES], GRIDS)
    counts = sum(pixel_counts(s, g, m) for s, g, m in zip(scores, GRIDS, labels.maps, strict=True))
    found = [
        torch.nn.functional.interpolate(s.T.view(1, CLASSES, *g), scale_factor=PATCH, mode="bilinear").argmax(dim=1)
        for s, g in zip(scores, GRIDS, strict=True)
    ]
    together = torch.cat([f.flatten() for f in found]), np.concatenate([m.ravel() for m in labels.maps])
    assert torch.equal(counts, confusion_matrix(*together, num_classes=CLASSES))


def test_an_image_without_labelled_pixels_counts_nothing() -> None:
    label = np.full((8, 8), IGNORED, np.uint8)
    assert torch.equal(pixel_counts(torch.randn(4, 3), (2, 2), label), torch.zeros(3, 3, dtype=torch.int64))


def test_training_parts_need_labels() -> None:
    _, labels = sample()
    shares = by_image(relabelled(labels, 0, IGNORED).shares, GRIDS)
    check_folds(shares, [Fold([0, 1], [2])])
    with pytest.raises(UserError, match="1 training images of a fold have no labelled pixel"):
        check_folds(shares, [Fold([0, 1], [2]), Fold([0], [2])])


def test_rows_of_images_are_views() -> None:
    features, _ = sample()
    parts = by_image(features.features, features.grids)
    assert [len(part) for part in parts] == [rows * columns for rows, columns in GRIDS]
    assert parts[1].data_ptr() == features.features[GRIDS[0][0] * GRIDS[0][1]].data_ptr()
    with pytest.raises(RuntimeError):
        by_image(features.features, replace(features, grids=GRIDS[:-1]).grids)
