"""The ridge against literal weighted least squares, and what it must not depend on."""

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from frozen_samples import CLASSES, DIM, GRIDS, IGNORED, PATCH, relabelled, sample
from torch import Tensor

from glare import ridge
from glare.errors import UserError
from glare.frozen_features import PatchFeatures, PatchLabels, by_image
from glare.ridge import STRENGTHS, class_weights, image_moments, patch_counts, ridge_counts, ridge_scores, solve
from glare.splits import Fold, inner_folds, leave_one_group_out

GROUPS = ["a", "b", "a", "c", "b", "c", "c"]
FOLDS = leave_one_group_out(GROUPS)


def literal_ridge(x: Tensor, y: Tensor, weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights (d, k) and intercept (k,) that minimise Σ_i weight_i |x_i W + b - y_i|² + penalty |W|².

    Solved as one least-squares problem with rows appended for the penalty, and a column for the intercept.
    """
    d = x.shape[1]
    mean = (weight[:, None] * x).sum(0) / weight.sum()
    scatter = (weight[:, None] * (x - mean)).T @ (x - mean)
    penalty = strength * scatter.trace() / d
    rows = torch.cat([x - mean, torch.ones(len(x), 1)], dim=1) * weight.sqrt()[:, None]
    extra = torch.cat([penalty.sqrt() * torch.eye(d), torch.zeros(d, 1)], dim=1)
    targets = torch.cat([weight.sqrt()[:, None] * y, torch.zeros(d, y.shape[1])])
    solution = torch.linalg.lstsq(torch.cat([rows, extra]), targets).solution
    return solution[:d], solution[d] - mean @ solution[:d]


def pixels_of(features: PatchFeatures, labels: PatchLabels, images: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Features (n, d) and one-hot classes (n, k) of all labelled pixels of some images, pixel by pixel, float64."""
    patches = by_image(features.features.double(), features.grids)
    x, y = [], []
    for image in images:
        rows, columns = labels.maps[image].shape
        for row in range(rows):
            for column in range(columns):
                if (label := int(labels.maps[image][row, column])) != IGNORED:
                    x.append(patches[image][row // PATCH * (columns // PATCH) + column // PATCH])
                    y.append(F.one_hot(torch.tensor(label), CLASSES))
    return torch.stack(x), torch.stack(y).double()


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Transcriptions compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sample32(**options: float) -> tuple[PatchFeatures, PatchLabels]:
    torch.set_default_dtype(torch.float32)
    drawn = sample(**options)
    torch.set_default_dtype(torch.float64)
    return drawn


def test_all_strengths_are_the_least_squares_of_pixels() -> None:
    features, labels = sample32()
    patches, shares = by_image(features.features, GRIDS), by_image(labels.shares, GRIDS)
    by_class = torch.tensor([1.0, 0.25, 3.0])
    moments = [image_moments(*pair, by_class) for pair in zip(patches, shares, strict=True)]
    found = solve(sum(moments) - moments[2] - moments[4], STRENGTHS)
    x, y = pixels_of(features, labels, [0, 1, 3, 5, 6])
    assert found.weight.shape == (DIM, len(STRENGTHS), CLASSES)
    for number, strength in enumerate(STRENGTHS):
        weight, intercept = literal_ridge(x, y, y @ by_class, strength)
        torch.testing.assert_close(found.weight[:, number].double(), weight, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.intercept[number].double(), intercept, atol=1e-5, rtol=1e-4)


def test_weights_fall_with_the_root_of_the_frequency_and_are_1_on_average() -> None:
    shares = [torch.tensor([[4.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[5.0, 0.0, 0.0]])]
    found = class_weights(shares)
    assert found[0] * 3 == pytest.approx(found[1].item())
    assert found[2] == 0
    assert 9 * found[0] + found[1] == pytest.approx(10)


def test_patches_count_with_the_shares_of_their_pixels() -> None:
    scores = torch.tensor([[[1.0, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]])  # two patches, two strengths
    shares = torch.tensor([[0.5, 0.25, 0], [0, 0, 1]])
    strong = [[0.5, 0, 0], [0.25, 0, 0], [0, 1, 0]]
    weak = [[0, 0, 0.5], [0, 0, 0.25], [0, 1, 0]]
    assert patch_counts(scores, shares).tolist() == [strong, weak]


def literal_miou(predictions: Tensor, shares: Tensor) -> float:
    """mIoU over labelled classes of patches (n,) of one predicted class each, whose pixels are shares (n, k)."""
    values = []
    for k in range(shares.shape[1]):
        labelled = shares[:, k].sum()
        if labelled > 0:
            union = labelled + shares[predictions == k].sum() - shares[predictions == k, k].sum()
            values.append((shares[predictions == k, k].sum() / union).item())
    return sum(values) / len(values)


def literal_scores(
    features: PatchFeatures, labels: PatchLabels, fold: Fold, parts: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Scores (patches, k) of the test images of a fold, the strength chosen by leaving out one part after the other."""
    patches, shares = by_image(features.features.double(), GRIDS), by_image(labels.shares.double(), GRIDS)

    frequency = sum(shares[i].sum(0) for i in fold.train)
    by_class = torch.stack([1 / f.sqrt() if f > 0 else f for f in frequency])

    def fit(images: Sequence[int], strength: float) -> tuple[Tensor, Tensor]:
        x, y = torch.cat([patches[i] for i in images]), torch.cat([shares[i] for i in images]) * by_class
        weight = y.sum(1)
        kept = weight > 0
        return literal_ridge(x[kept], (y / weight[:, None])[kept], weight[kept], strength)

    quality = {}
    for strength in STRENGTHS:
        predictions, truth = [], []
        for part in parts:
            weight, intercept = fit([i for i in fold.train if i not in part], strength)
            predictions += [(patches[i] @ weight + intercept).argmax(1) for i in part]
            truth += [shares[i] for i in part]
        quality[strength] = literal_miou(torch.cat(predictions), torch.cat(truth))
    best = max(STRENGTHS, key=lambda strength: (round(quality[strength], 9), strength))
    weight, intercept = fit(fold.train, best)
    return {image: patches[image] @ weight + intercept for image in fold.test}


def scores_of(
    features: PatchFeatures,
    labels: PatchLabels,
    folds: Sequence[Fold],
    groups: Sequence[str] | None = None,
) -> list[Tensor]:
    """The scores of every test image."""
    return [scores for _, scores in ridge_scores(features, labels, folds, groups=groups, seed=0)]


@pytest.mark.parametrize("signal", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("groups", [GROUPS, None])
def test_every_fold_is_the_literal_ridge_with_the_strength_chosen_inside(
    signal: float, groups: list[str] | None
) -> None:
    features, labels = sample32(signal=signal)
    expected: dict[int, Tensor] = {}
    for fold in FOLDS:
        expected |= literal_scores(features, labels, fold, inner_folds(fold.train, groups, seed=0))
    order = [image for fold in FOLDS for image in fold.test]
    found = dict(zip(order, scores_of(features, labels, FOLDS, groups), strict=True))
    for image, scores in expected.items():
        torch.testing.assert_close(found[image].double(), scores, atol=1e-5, rtol=1e-4)


def test_counts_are_of_every_test_image_and_of_no_other() -> None:
    features, labels = sample32()
    counts = ridge_counts(features, labels, [Fold([0, 1, 2, 3], [4, 6])], groups=None, seed=0)
    assert counts.shape == (7, CLASSES, CLASSES)
    assert counts.dtype == torch.int64
    labelled = [int((label != IGNORED).sum()) for label in labels.maps]
    assert counts.sum(dim=(1, 2)).tolist() == [0, 0, 0, 0, labelled[4], 0, labelled[6]]


def test_clear_features_are_classified() -> None:
    features, labels = sample32(signal=10)
    counts = ridge_counts(features, labels, FOLDS, groups=GROUPS, seed=0).sum(dim=0)
    assert counts.diagonal().sum() / counts.sum() > 0.6  # a quarter of the pixels are of a random class


@pytest.mark.parametrize("factor", [1 / 64, 3.0, 1000.0])
def test_the_scale_of_the_features_changes_nothing(factor: float) -> None:
    features, labels = sample32(signal=0.5)
    scaled = PatchFeatures(features.features * factor, features.cls, features.grids)
    pairs = zip(scores_of(features, labels, FOLDS), scores_of(scaled, labels, FOLDS), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_dimensions_are_not_standardised() -> None:
    features, labels = sample32(signal=0.5)
    stretched = PatchFeatures(features.features * torch.tensor([100.0] + [1.0] * (DIM - 1)), features.cls, GRIDS)
    before, after = (torch.cat(scores_of(drawn, labels, FOLDS)) for drawn in (features, stretched))
    assert (before - after).abs().max() > 0.05


def test_labels_of_test_images_do_not_matter() -> None:
    features, labels = sample32(signal=0.5)
    fold = [Fold([0, 1, 2, 3, 5], [4, 6])]
    before = scores_of(features, labels, fold)
    after = scores_of(features, relabelled(relabelled(labels, 4, 0), 6, IGNORED), fold)
    assert all(map(torch.equal, before, after))
    trained = scores_of(features, relabelled(labels, 5, 0), fold)
    assert not torch.equal(before[0], trained[0])


def test_the_seed_draws_the_inner_folds() -> None:
    drawn = []

    def record(train: Sequence[int], groups: object, *, seed: int) -> list[list[int]]:
        drawn.append((groups, seed))
        return inner_folds(train, None, seed=seed)

    features, labels = sample32()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ridge, "inner_folds", record)
        ridge_counts(features, labels, FOLDS, groups=GROUPS, seed=7)
    assert drawn == [(GROUPS, 7)] * 3


def test_a_class_without_training_labels_is_never_predicted() -> None:
    features, labels = sample32()
    shares = labels.shares.clone()
    for image, label in enumerate(labels.maps[:4]):
        label[label == 2] = IGNORED
        by_image(shares, GRIDS)[image][:, 2] = 0
    counts = ridge_counts(
        features, PatchLabels(shares, labels.maps), [Fold([0, 1, 2, 3], [4, 5, 6])], groups=None, seed=0
    )
    assert counts[:, :, 2].sum() == 0
    assert counts[:, 2].sum() > 0


def test_images_without_labels_are_trained_and_tested_on() -> None:
    features, labels = sample32()
    bare = relabelled(relabelled(labels, 0, IGNORED), 3, IGNORED)
    counts = ridge_counts(features, bare, FOLDS, groups=GROUPS, seed=0)
    assert counts[0].sum() == counts[3].sum() == 0
    assert counts[1].sum() > 0
    with pytest.raises(UserError, match="no labelled pixel"):
        ridge_counts(features, bare, [Fold([0, 3], [1])], groups=None, seed=0)


@pytest.mark.parametrize("train", [[1], [1, 2]])
def test_few_training_images_are_enough(train: list[int]) -> None:
    features, labels = sample32()
    bare = relabelled(labels, 2, IGNORED)
    counts = ridge_counts(features, bare, [Fold(train, [3])], groups=None, seed=0)
    assert counts[3].sum() == int((bare.maps[3] != IGNORED).sum())


def test_constant_features_predict_what_is_most_frequent() -> None:
    features, labels = sample32()
    constant = PatchFeatures(torch.ones_like(features.features), features.cls, GRIDS)
    fold = Fold([0, 1, 2, 3], [4, 5])
    _, classes = pixels_of(features, labels, fold.train)
    counts = ridge_counts(constant, labels, [fold], groups=None, seed=0).sum(dim=(0, 1))
    assert counts.nonzero().flatten().tolist() == [int(classes.sum(0).argmax())]
