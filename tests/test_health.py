"""Effective rank, deviation and cosine against their definitions; when features count as collapsed."""

import math

import pytest
import torch
from torch import Tensor

from glare import health
from glare.comparison import Health
from glare.gram import eigh, gram
from glare.health import collapse, feature_std, mean_cosine, rankme


def features(rows: int, columns: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -2, columns) + 0.5
    if rank is not None:
        values = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return values.half()


def literal_rankme(values: Tensor) -> float:
    """Garrido et al. 2023, eq. 1, from the singular values of the features themselves."""
    singular = torch.linalg.svdvals(values.double())
    p = singular / singular.sum() + 1e-7
    return math.exp(-sum(x * math.log(x) for x in p.tolist()))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(200, 12, None), (8, 12, None), (100, 12, 3), (50, 12, 1)])
def test_rankme_is_that_of_the_singular_values(rows: int, columns: int, rank: int | None) -> None:
    values = features(rows, columns, rank=rank)
    assert rankme(values) == pytest.approx(literal_rankme(values), rel=1e-4)


def test_rankme_counts_directions() -> None:
    assert rankme(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert rankme(torch.ones(20, 7)) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(20, 7)) == pytest.approx(1, rel=1e-4)


def test_rankme_does_not_depend_on_scale_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = features(50, 12).float()
    expected = rankme(values)
    assert rankme(values * 1000) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(health, "ROWS", 16)
    assert rankme(values) == pytest.approx(expected, rel=1e-9)


def test_deviation_is_over_patches() -> None:
    values = features(90, 130)
    assert feature_std(values) == pytest.approx(values.double().numpy().std(axis=0).mean(), rel=1e-5)
    assert feature_std(torch.arange(5.0).expand(9, 5)) == 0


def test_cosine_is_the_mean_over_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ROWS", 16)
    a, b = features(50, 12), features(50, 12, seed=1)
    pairs = zip(a.double(), b.double(), strict=True)
    expected = sum((x @ y / x.norm() / y.norm()).item() for x, y in pairs) / 50
    assert mean_cosine(a, b) == pytest.approx(expected, rel=1e-4)
    assert mean_cosine(a.view(5, 10, 12), b.view(5, 10, 12)) == pytest.approx(expected, rel=1e-4)
    assert mean_cosine(a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\(50, 12\) and \(49, 12\)"):
        mean_cosine(a, b[1:])


def test_collapse_is_below_half_of_the_untouched_model() -> None:
    untouched = Health(rankme=104, std=0.57, cosine=1)
    assert collapse(Health(rankme=52, std=0.285, cosine=0.01), untouched) is None
    assert collapse(Health(rankme=8, std=0.5, cosine=0.9), untouched) == (
        "the effective rank of its patch features is 8, less than half of the untouched model's 104"
    )
    assert "standard deviation of its patch features is 0.04" in str(
        collapse(Health(rankme=90, std=0.04, cosine=0.9), untouched)
    )
    assert "nan" in str(collapse(Health(rankme=math.nan, std=0.5, cosine=0.9), untouched))


def test_gram_matrices_are_summed_in_float64() -> None:
    blocks = [features(5, 3), features(7, 3, seed=1)]
    rows = torch.cat(blocks).double()
    torch.testing.assert_close(gram(blocks), rows.T @ rows, rtol=1e-12, atol=0)
    assert gram([]) == 0


def test_eigenvalues_are_not_negative_and_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        matrix = gram([features(2, 6)])
        values, vectors = eigh(matrix)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (values >= 0).all()
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)
