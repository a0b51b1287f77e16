"""A head fitted to its first rows: white, centred, and otherwise the same head."""

import torch
from reference.glare_cases import SETTINGS
from tiny_models import adapted_model, tiny_vit

from glare.draws import Draws
from glare.geometry import Crop
from glare.head_start import FLOOR, start_head, whiten
from glare.objectives.base import ProjectionHead
from glare.objectives.glare import GlareObjective
from glare.student import Student
from glare.views import Views


def test_the_bottleneck_of_the_rows_is_white_up_to_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 12, generator=generator) * torch.linspace(0.01, 3, 12) + 5
    torch.manual_seed(0)
    head = ProjectionHead(12, hidden=16, bottleneck=6, prototypes=8)
    before = torch.cov(head.mlp(rows).detach().double().T, correction=0)
    whiten(head, rows)
    after = head.mlp(rows).detach().double()
    values, vectors = torch.linalg.eigh(before)
    expected = vectors @ torch.diag(values / (values + FLOOR * values.mean())) @ vectors.T
    torch.testing.assert_close(after.mean(dim=0), torch.zeros(6).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(after.T, correction=0), expected, atol=1e-3, rtol=0)
    assert (torch.linalg.eigvalsh(before)[-1] / values.clamp(min=0).mean()) > 2  # it was not white


def test_rows_that_are_all_the_same_leave_a_finite_head() -> None:
    head = ProjectionHead(4, hidden=4, bottleneck=4, prototypes=4)
    whiten(head, torch.ones(10, 4))
    assert all(parameter.isfinite().all() for parameter in head.parameters())


def seen() -> Views:
    generator = torch.Generator().manual_seed(0)
    global_ = torch.randn(2, 3, 3, 16, 16, generator=generator)
    local = torch.randn(1, 3, 3, 8, 8, generator=generator)
    origin, side = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    mask = torch.zeros(2, 3, 16, dtype=torch.bool)
    mask[:, :, :4] = True
    return Views(global_, global_, local, Crop(origin, side), Crop(origin[:1], side[:1] / 2), mask, (4, 4))


def student() -> Student:
    torch.manual_seed(0)
    backbone = adapted_model(tiny_vit()).backbone
    return Student(backbone, GlareObjective(32, 2, SETTINGS), mask_token=False)


def test_centres_are_the_mean_logits_and_the_targets_say_more() -> None:
    ours, views = student(), seen()
    with torch.no_grad():
        features = ours.target_features(views)

    def information() -> float:
        with torch.no_grad():
            places = ours.objective.places(features, views, Draws(torch.Generator().manual_seed(1), 3))
            terms = ours(views, features, places, counts=places.counts(), target=ours, temperature=0.04)
        assert terms.marginal is not None
        total, rows = terms.marginal
        return (torch.special.entr(total / rows).sum() - terms.health["teacher_entropy"]).item()

    before = information()
    start_head(ours, views, temperature=0.04, draws=Draws(torch.Generator().manual_seed(1), 3))
    head = ours.objective.head
    with torch.no_grad():
        for level, tokens in (("cls", features.cls.flatten(0, 1)), ("patch", features.patches.flatten(0, 2))):
            expected = head.prototypes(head(tokens)).mean(dim=0)
            torch.testing.assert_close(ours.objective.centre(level), expected, atol=1e-4, rtol=1e-3)
    assert information() > before + 0.2


def test_under_autocast_the_centres_are_those_of_the_fitted_head() -> None:
    """Autocast keeps what it has cast of a layer, and would compute the centres with the layer as it was."""
    plain, cast = student(), student()
    for ours, enabled in ((plain, False), (cast, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            start_head(ours, seen(), temperature=0.04, draws=Draws(torch.Generator().manual_seed(1), 3))
    for level in ("cls", "patch", "region"):
        torch.testing.assert_close(cast.objective.centre(level), plain.objective.centre(level), atol=0.03, rtol=0)
