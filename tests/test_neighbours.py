"""Nearest neighbours against literal loops, and what they must not depend on."""

import math
from collections.abc import Sequence

import pytest
import torch
from frozen_samples import CLASSES, GRIDS, IGNORED, relabelled, sample
from torch import Tensor

from glare import neighbours
from glare.errors import UserError
from glare.frozen_features import PatchFeatures, PatchLabels, by_image
from glare.neighbours import EPS, draw, knn_counts, knn_scores, vote
from glare.splits import Fold, leave_one_group_out

FOLDS = leave_one_group_out(["a", "b", "a", "c", "b", "c", "c"])


def literal_votes(query: Tensor, memory: Tensor, classes: Tensor) -> list[float]:
    """Share of the votes of the 20 neighbours of one query (d,), similarity by similarity."""
    similarities = []
    for row in memory:
        dot = sum(a * b for a, b in zip(query.tolist(), row.tolist(), strict=True))
        similarities.append(dot / query.norm().item() / row.norm().item())
    nearest = sorted(range(len(memory)), key=lambda i: -similarities[i])[:20]
    weights = {i: math.exp(similarities[i] / 0.07) for i in nearest}
    total = sum(weights.values())
    return [sum(weights[i] * classes[i, k].item() for i in nearest) / total for k in range(classes.shape[1])]


def literal_whitening(x: Tensor, train: Tensor) -> Tensor:
    """Rows of ``x`` in the principal axes of ``train``, divided by their deviations."""
    mean = train.mean(dim=0)
    _, s, v = torch.linalg.svd(train - mean, full_matrices=True)
    variance = torch.zeros(train.shape[1], dtype=train.dtype)
    variance[: len(s)] = s**2 / len(train)
    return (x - mean) @ v.T / (variance + EPS * variance.mean()).sqrt()


def votes_of(
    features: PatchFeatures, labels: PatchLabels, folds: Sequence[Fold], *, whiten: bool = False, seed: int = 0
) -> list[Tensor]:
    """The votes of every test image."""
    return [votes for _, votes in knn_scores(features, labels, folds, whiten=whiten, seed=seed)]


@pytest.mark.parametrize("memory_rows", [50, 7])
def test_votes_are_the_literal_loop(memory_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, memory = torch.randn(6, 5, generator=generator), torch.randn(memory_rows, 5, generator=generator)
    classes = torch.rand(memory_rows, 4, generator=generator)
    unit = torch.nn.functional.normalize
    found = vote(unit(queries, dim=1), unit(memory, dim=1), classes)
    expected = [literal_votes(query, memory, classes) for query in queries]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_every_fold_is_the_literal_loop(whiten: bool) -> None:
    features, labels = sample(signal=0.3)
    fold = Fold([0, 1, 3, 5], [2, 6])  # image 4 is in neither part
    patches, shares = by_image(features.features.double(), GRIDS), by_image(labels.shares, GRIDS)
    train = torch.cat([patches[i] for i in fold.train])
    found = votes_of(features, labels, [fold], whiten=whiten)
    for image, votes in zip(fold.test, found, strict=True):
        memory, queries = train, patches[image]
        if whiten:
            memory, queries = (literal_whitening(x, train) for x in (memory, queries))
        classes = torch.cat([shares[i] for i in fold.train])
        expected = torch.tensor([literal_votes(query, memory, classes) for query in queries])
        torch.testing.assert_close(votes, expected, atol=1e-4, rtol=1e-4)


def test_counts_are_of_every_test_image_and_of_no_other() -> None:
    features, labels = sample(signal=10)
    counts = knn_counts(features, labels, [Fold([0, 1, 2, 3], [4, 6])], whiten=False, seed=0)
    assert counts.shape == (7, CLASSES, CLASSES)
    assert counts.dtype == torch.int64
    labelled = [int((label != IGNORED).sum()) for label in labels.maps]
    assert counts.sum(dim=(1, 2)).tolist() == [0, 0, 0, 0, labelled[4], 0, labelled[6]]


def test_many_queries_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sample()
    whole = votes_of(features, labels, FOLDS)
    monkeypatch.setattr(neighbours, "QUERIES", 4)
    for ours, theirs in zip(whole, votes_of(features, labels, FOLDS), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_is_drawn_evenly_from_images() -> None:
    sizes = [50, 3, 20, 0, 50]
    rows = [100 * image + torch.arange(size) for image, size in enumerate(sizes)]
    drawn = draw(rows, limit=43, generator=torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 43
    assert set(drawn.tolist()) <= set(torch.cat(rows).tolist())
    counts = torch.bincount(drawn // 100, minlength=5).tolist()
    assert counts[1] == 3
    assert sorted(counts[i] for i in (0, 2, 4)) == [13, 13, 14]
    assert not torch.equal(
        drawn.sort().values, draw(rows, limit=43, generator=torch.Generator().manual_seed(1)).sort().values
    )
    assert len(draw(rows, limit=1000, generator=torch.Generator())) == sum(sizes)


def test_memory_of_more_images_than_rows_is_drawn_from_all_of_them() -> None:
    rows = [torch.tensor([image]) for image in range(200)]
    drawn = draw(rows, limit=100, generator=torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 100
    assert drawn.double().mean() == pytest.approx(100, abs=15)


def test_the_seed_draws_the_memory_and_the_features_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MEMORY_PATCHES", 8)
    features, labels = sample()
    drawn: list[Tensor] = []
    monkeypatch.setattr(neighbours, "vote", lambda _queries, _memory, classes: drawn.append(classes) or classes[:1])
    for other, seed in ((features, 0), (PatchFeatures(-features.features, features.cls, GRIDS), 0), (features, 1)):
        votes_of(other, labels, [Fold([0, 1, 3, 5], [2])], seed=seed)
    assert [len(classes) for classes in drawn] == [8, 8, 8]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_patches_without_labels_are_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sample()
    bare = relabelled(relabelled(labels, 0, IGNORED), 2, IGNORED)
    memories: list[Tensor] = []
    monkeypatch.setattr(neighbours, "vote", lambda _queries, _memory, classes: memories.append(classes) or classes[:1])
    votes_of(features, bare, [Fold([0, 1, 3], [2])])
    assert len(memories[0]) == 6 + 9
    assert (memories[0].sum(dim=1) > 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_the_scale_of_the_features_changes_nothing(whiten: bool) -> None:
    features, labels = sample(signal=0.5)
    scaled = PatchFeatures(features.features * 1000, features.cls, GRIDS)
    pairs = zip(
        votes_of(features, labels, FOLDS, whiten=whiten), votes_of(scaled, labels, FOLDS, whiten=whiten), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
def test_labels_of_test_images_do_not_matter(whiten: bool) -> None:
    features, labels = sample(signal=0.5)
    fold = [Fold([0, 1, 2, 3, 5], [4, 6])]
    changed = relabelled(relabelled(labels, 4, 0), 6, IGNORED)
    before, after = (votes_of(features, some, fold, whiten=whiten) for some in (labels, changed))
    assert all(map(torch.equal, before, after))
    assert not torch.equal(before[0], votes_of(features, relabelled(labels, 5, 0), fold, whiten=whiten)[0])


@pytest.mark.parametrize("whiten", [False, True])
def test_collapsed_features_give_numbers(whiten: bool) -> None:
    features, labels = sample()
    for value in (0.0, 1.0):
        flat = PatchFeatures(torch.full_like(features.features, value), features.cls, GRIDS)
        assert all(votes.isfinite().all() for votes in votes_of(flat, labels, FOLDS, whiten=whiten))


@pytest.mark.parametrize("whiten", [False, True])
def test_images_and_classes_without_labels_do_no_harm(whiten: bool) -> None:
    features, labels = sample()
    bare = relabelled(relabelled(labels, 0, IGNORED), 3, 1)
    counts = knn_counts(features, bare, [Fold([0, 3], [1, 2]), Fold([1, 2], [0, 3])], whiten=whiten, seed=0)
    assert counts[0].sum() == 0
    assert counts[1].sum() == counts[1, :, 1].sum() > 0  # image 3 has nothing but class 1
    with pytest.raises(UserError, match="no labelled pixel"):
        knn_counts(features, bare, [Fold([0], [1])], whiten=whiten, seed=0)
