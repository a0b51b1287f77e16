from dataclasses import replace

import pytest
import torch
from reference import glare_terms as literal
from reference.glare_cases import (
    CASES,
    DIM,
    OVERLAPPING,
    READINGS,
    SETTINGS,
    TEMPERATURE,
    Case,
    Drawn,
    disturb,
    make_case,
)
from torch import Tensor, nn

from glare.objectives.places import DIRECTIONS


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


# Gradients


def test_gradients_exist_and_are_finite(case: Case):
    """Also where a term has nothing to average: its parameters must take part in backward for DDP's sake."""
    for features in (case.features, case.local):
        features.cls.requires_grad_()
        features.patches.requires_grad_()
    case.terms().total.backward()
    for name, parameter in case.student.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for tensor in (case.features.cls, case.features.patches, case.local.cls):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    assert case.features.cls.grad.any()


@pytest.mark.parametrize(
    ("name", "silent"),
    [("no-overlap", {"reg", "loc2"}), ("no-overlap-batch-1", {"reg", "loc2"}), ("empty-mask", {"loc1"})],
)
def test_a_term_without_pairs_is_zero_with_zero_gradients(name: str, silent: set[str]):
    case = CASES[name]()
    for term, value in case.terms().losses.items():
        assert (value.item() == 0) == (term in silent)
        case.student.zero_grad()
        value.backward(retain_graph=True)
        grads = [p.grad for p in case.student.head.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        assert any(g.any() for g in grads) == (term not in silent)


@pytest.mark.parametrize("reading", READINGS)
def test_the_teachers_side_has_no_gradient(reading: str):
    case = CASES["batch"](settings=replace(SETTINGS, region_target=reading))
    case.teacher.cls.requires_grad_()
    case.teacher.patches.requires_grad_()
    case.terms().total.backward()
    assert case.teacher.cls.grad is None and case.teacher.patches.grad is None
    assert all(p.grad is None for p in case.target.parameters())


@pytest.mark.parametrize("reading", READINGS)
def test_the_regional_target_is_a_constant_for_the_students_gradient(reading: str, monkeypatch: pytest.MonkeyPatch):
    """sg() of eq. 7: also where the target is read through, or from, the student's own patches.

    Autograd against the central difference of the transcription with the target held fixed.
    """
    case = CASES["batch-1"](settings=replace(SETTINGS, region_target=reading))
    drawn = Drawn(monkeypatch)
    z = case.features.patches.requires_grad_()
    case.terms().losses["reg"].backward()
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    student, target = case.parameters
    matches, regions = case.matches(), drawn.patches()

    def pairs(moved: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        return [
            [
                pair
                for region in regions[a, b][0]
                for pair in literal.regional_pairs(
                    student,
                    target,
                    moved[a, 0],
                    case.teacher.patches[b, 0],
                    region,
                    matches[a, b][0],
                    num_heads=case.ca_heads,
                    reading=reading,
                )
            ]
            for a, b in DIRECTIONS
        ]

    still = pairs(z.detach().double())

    def loss(step: float) -> float:
        moved = pairs(z.detach().double() + step * direction.double())
        terms = [
            literal.mean(
                [
                    literal.entropy(mine, theirs, case.student.centre("region"), TEMPERATURE)
                    for (mine, _), (_, theirs) in zip(*both, strict=True)
                ]
            )
            for both in zip(moved, still, strict=True)
        ]
        return literal.mean(terms)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert z.grad is not None
    assert (z.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3)


# Invariants


def test_loc1_is_zero_without_augmented_patches():
    assert CASES["empty-mask"]().terms().losses["loc1"].item() == 0


def test_loc1_depends_on_augmented_patches_only():
    case = CASES["batch"]()
    before = case.terms().losses["loc1"].item()
    mask = case.views.patch_mask
    for features in (case.features, case.teacher):
        disturb(features.patches, ~mask)
    assert case.terms().losses["loc1"].item() == pytest.approx(before, rel=1e-6)
    disturb(case.features.patches, mask)
    assert case.terms().losses["loc1"].item() != pytest.approx(before, rel=1e-3)


def test_loc1_weighs_images_not_patches():
    """An image with one augmented patch counts as much as one with all of them (iBOT)."""
    case = make_case([OVERLAPPING, OVERLAPPING])
    mask = torch.zeros_like(case.views.patch_mask)
    mask[:, 0, 3] = True
    mask[:, 1] = True
    image = torch.arange(2).view(1, 2, 1)
    masks = (mask & (image == 0), mask & (image == 1), mask)
    values = [case.terms(views=replace(case.views, patch_mask=m)).losses["loc1"].item() for m in masks]
    assert min(values) > 0
    assert values[0] + values[1] == pytest.approx(values[2], rel=1e-5)


def test_loc2_depends_on_matched_patches_only():
    case = CASES["one-without-overlap"]()
    before = case.terms().losses["loc2"].item()
    asking, answering = (torch.zeros(2, 2, 20, dtype=torch.bool) for _ in range(2))
    for (a, b), found in case.matches().items():
        for image, row in enumerate(found):
            asking[a, image] = torch.tensor([other is not None for other in row])
            answering[b, image, [other for other in row if other is not None]] = True
    disturb(case.features.patches, ~asking)
    disturb(case.teacher.patches, ~answering)
    assert case.terms().losses["loc2"].item() == pytest.approx(before, rel=1e-6)
    disturb(case.features.patches, asking)
    assert case.terms().losses["loc2"].item() != pytest.approx(before, rel=1e-3)


def test_region_patches_without_a_match_do_not_enter(monkeypatch: pytest.MonkeyPatch):
    """With the output projection at zero CA(z) depends on its query alone, so that a query shows if it enters."""
    case, drawn = CASES["one-without-overlap"](), Drawn(monkeypatch)
    for objective in (case.student, case.target):
        nn.init.zeros_(objective.cross_attention.proj.weight)
    before = case.terms().losses["reg"].item()
    matched = torch.zeros(2, 2, 20, dtype=torch.bool)
    for (a, _), regions in zip(DIRECTIONS, drawn.regions, strict=True):
        for image in range(2):
            matched[a, image, regions.index[image][regions.matched[image]]] = True
    assert 0 < matched.sum() < matched.numel()
    disturb(case.features.patches, ~matched)
    assert case.terms().losses["reg"].item() == pytest.approx(before, rel=1e-6)
    disturb(case.features.patches, matched)
    assert case.terms().losses["reg"].item() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(("reading", "depends"), [("text", False), ("eq6", False), ("udi", True)])
def test_only_udis_reading_sees_the_teachers_patches_outside_the_region(
    reading: str, depends: bool, monkeypatch: pytest.MonkeyPatch
):
    case, drawn = CASES["one-without-overlap"](settings=replace(SETTINGS, region_target=reading)), Drawn(monkeypatch)
    before = case.terms().losses["reg"].item()
    outside = torch.ones(2, 2, 20, dtype=torch.bool)
    for (_, b), regions in zip(DIRECTIONS, drawn.regions, strict=True):
        for image in range(2):
            outside[b, image, regions.match_index[image][regions.matched[image]]] = False
    disturb(case.teacher.patches, outside)
    changed = case.terms().losses["reg"].item() != pytest.approx(before, rel=1e-6)
    assert changed == depends


def test_locals_enter_the_global_term_only():
    case = CASES["batch"]()
    before = case.terms().losses
    case.local.cls[0] += torch.linspace(0, 1, DIM)
    case.local.patches[0] += torch.linspace(0, 1, DIM)
    after = case.terms().losses
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"glob"}


def test_with_two_equal_views_both_local_terms_are_one():
    """The same window twice, all patches augmented: each patch then matches itself in either view."""
    settings = replace(SETTINGS, terms=("loc1", "loc2"))
    case = make_case([(OVERLAPPING[0], OVERLAPPING[0])], mask_share=1.1, settings=settings)
    student, teacher = (f.patches[:1].expand(2, -1, -1, -1) for f in (case.features, case.teacher))
    found = case.terms(
        student=(replace(case.features, patches=student), case.local), teacher=replace(case.teacher, patches=teacher)
    ).losses
    assert found["loc1"].item() == pytest.approx(found["loc2"].item(), rel=1e-5)


def test_regions_need_attention():
    case = CASES["batch"]()
    with pytest.raises(ValueError, match="attention"):
        case.terms(teacher=replace(case.teacher, attention=None))
