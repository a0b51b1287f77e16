import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from reference import glare_terms as literal
from reference.glare_cases import CASES, READINGS, SETTINGS, TEMPERATURE, Case, Drawn, K, all_logits, approx
from torch import nn

from glare import losses
from glare.features import Features
from glare.geometry import Crop
from glare.objectives.base import Terms
from glare.objectives.glare import LEVELS, GlareObjective, GlareSettings
from glare.objectives.places import DIRECTIONS
from glare.regions import RegionConfig


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


# Each term against its equation


def test_global_term_is_equation_4(case: Case):
    student, target = case.parameters
    expected = literal.global_term(
        student,
        target,
        [*case.features.cls, *case.local.cls],
        case.teacher.cls,
        case.student.centre("cls"),
        TEMPERATURE,
    )
    assert case.terms().losses["glob"].item() == approx(expected)


def test_augmented_patch_term_is_equation_8(case: Case):
    expected = literal.augmented_patch_term(
        *case.parameters,
        case.features.patches,
        case.teacher.patches,
        case.views.patch_mask,
        case.student.centre("patch"),
        TEMPERATURE,
    )
    assert case.terms().losses["loc1"].item() == approx(expected)


def test_cross_view_patch_term_is_equation_9(case: Case):
    expected = literal.cross_view_patch_term(
        *case.parameters,
        case.features.patches,
        case.teacher.patches,
        case.matches(),
        case.student.centre("patch"),
        TEMPERATURE,
    )
    assert case.terms().losses["loc2"].item() == approx(expected)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", CASES)
def test_regional_term_is_equations_5_to_7(name: str, reading: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name](settings=replace(SETTINGS, region_target=reading))
    drawn = Drawn(monkeypatch)
    found = case.terms()
    expected, targets = literal.regional_term(
        *case.parameters,
        case.features.patches,
        case.teacher.patches,
        case.matches(),
        drawn.patches(),
        case.student.centre("region"),
        TEMPERATURE,
        num_heads=case.ca_heads,
        reading=reading,
    )
    assert found.losses["reg"].item() == approx(expected)
    total, rows = found.batch_sums["region"]
    assert int(rows) == len(targets)
    if targets:
        torch.testing.assert_close(total.double(), torch.stack(targets).sum(dim=0), atol=1e-4, rtol=1e-4)


def test_regions_start_from_the_teachers_attention_in_the_students_view(monkeypatch: pytest.MonkeyPatch):
    case, drawn = CASES["batch"](), Drawn(monkeypatch)
    case.terms()
    assert case.teacher.attention is not None
    matches = case.matches()
    for number, (a, b) in enumerate(DIRECTIONS):
        assert torch.equal(drawn.attention[number], case.teacher.attention[a])
        index, valid = drawn.match[number]
        found = [[int(i) if v else None for i, v in zip(*row, strict=True)] for row in zip(index, valid, strict=True)]
        assert found == matches[a, b]
    assert drawn.regions[0].index.shape[:2] == (3, 3), "one region a head"


def test_the_cases_are_what_they_are_called():
    def matched(name: str) -> list[int]:
        found = CASES[name]().matches()
        return [sum(p is not None for p in image) for direction in found.values() for image in direction]

    assert min(matched("batch")) > 0 and len(matched("batch")) == 6
    assert sum(matched("no-overlap")) == 0
    assert sorted(x > 0 for x in matched("one-without-overlap")) == [False, False, True, True]


def test_the_total_is_the_plain_sum(case: Case):
    terms = case.terms()
    assert list(terms.losses) == ["glob", "reg", "loc1", "loc2"]
    assert terms.total.item() == pytest.approx(sum(term.item() for term in terms.losses.values()), rel=1e-6)


@pytest.mark.parametrize("chosen", [("glob",), ("reg",), ("loc1",), ("loc2",), ("glob", "loc2")])
def test_terms_can_be_left_out(chosen: tuple[str, ...]):
    whole = CASES["batch"]().terms()
    part = CASES["batch"](settings=replace(SETTINGS, terms=chosen)).terms()
    assert tuple(part.losses) == chosen
    for name in chosen:
        assert part.losses[name].item() == pytest.approx(whole.losses[name].item(), rel=1e-5)
    needed = {"glob": "cls", "reg": "region", "loc1": "patch", "loc2": "patch"}
    assert set(part.batch_sums) == {needed[name] for name in chosen}


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = CASES["batch"]().terms()
    monkeypatch.setattr(losses, "CPU_CHUNK_LOGITS", 7 * K)
    found = CASES["batch"]().terms()
    for name, term in whole.losses.items():
        assert found.losses[name].item() == pytest.approx(term.item(), rel=1e-5)


def test_uniform_teacher_and_student_give_log_k_each():
    case = CASES["full-mask"]()
    for objective in (case.student, case.target):
        nn.init.zeros_(objective.head.last_layer.weight_g)
    for level in LEVELS:
        case.student.centre(level).fill_(0.3)
    for term in case.terms().losses.values():
        assert term.item() == pytest.approx(math.log(K), rel=1e-5)


# Batch sums and the centres


def test_batch_sums_are_over_all_teacher_outputs_of_a_level(case: Case):
    sums = case.terms().batch_sums
    assert set(sums) == set(LEVELS)
    for level, tokens in (("cls", case.teacher.cls), ("patch", case.teacher.patches)):
        logits = all_logits(tokens, case.parameters[1])
        total, rows = sums[level]
        assert int(rows) == len(logits)
        torch.testing.assert_close(total.double(), logits.sum(dim=0), atol=1e-4, rtol=1e-4)
        assert not total.requires_grad and not rows.requires_grad


def test_batch_sums_of_two_ranks_add_up():
    whole = CASES["batch"]().terms()
    case = CASES["batch"](settings=replace(SETTINGS, terms=("glob", "loc1", "loc2")))

    def part(images: slice) -> Terms:
        views, crops = case.views, case.views.global_crops
        return case.terms(
            student=(
                Features(case.features.cls[:, images], case.features.patches[:, images]),
                Features(case.local.cls[:, images], case.local.patches[:, images]),
            ),
            teacher=Features(case.teacher.cls[:, images], case.teacher.patches[:, images]),
            views=replace(
                views,
                global_crops=Crop(crops.offset[:, images], crops.scale[:, images]),
                patch_mask=views.patch_mask[:, images],
            ),
        )

    first, second = part(slice(0, 1)), part(slice(1, 3))
    for level in ("cls", "patch"):
        (a, count_a), (b, count_b) = first.batch_sums[level], second.batch_sums[level]
        torch.testing.assert_close(a + b, whole.batch_sums[level][0], atol=1e-4, rtol=1e-4)
        assert count_a + count_b == whole.batch_sums[level][1]


def test_update_moves_each_centre_towards_its_mean():
    case = CASES["batch"]()
    before = {level: case.student.centre(level).clone() for level in LEVELS}
    sums = case.terms().batch_sums
    case.student.update(sums)
    for level, (total, rows) in sums.items():
        torch.testing.assert_close(case.student.centre(level), 0.9 * before[level] + 0.1 * total / rows)


def test_a_centre_without_rows_stays():
    case = CASES["no-overlap"]()
    before = case.student.centre("region").clone()
    sums = case.terms().batch_sums
    assert int(sums["region"][1]) == 0 and not sums["region"][0].any()
    case.student.update(sums)
    assert torch.equal(case.student.centre("region"), before)
    assert torch.isfinite(case.student.centre("cls")).all()


def test_the_centre_that_counts_is_the_students_one_of_the_level():
    case = CASES["batch"]()
    before = {name: term.item() for name, term in case.terms().losses.items()}
    for level in LEVELS:
        case.target.centre(level).add_(torch.linspace(0, 1, K))
    assert {name: term.item() for name, term in case.terms().losses.items()} == before
    uses = {"cls": {"glob"}, "region": {"reg"}, "patch": {"loc1", "loc2"}}
    for level in LEVELS:
        case = CASES["batch"]()
        case.student.centre(level).add_(torch.linspace(0, 1, K))
        after = case.terms().losses
        assert {name for name in before if after[name].item() != before[name]} == uses[level]


def test_forward_changes_no_state(case: Case):
    before = {name: value.clone() for name, value in case.student.state_dict().items()}
    before_target = {name: value.clone() for name, value in case.target.state_dict().items()}
    first, again = case.terms(), case.terms()
    for name, term in first.losses.items():
        assert torch.equal(term, again.losses[name])
    assert all(torch.equal(value, before[name]) for name, value in case.student.state_dict().items())
    assert all(torch.equal(value, before_target[name]) for name, value in case.target.state_dict().items())


def test_only_the_regions_draw():
    case = CASES["batch"]()
    first, other = case.terms(seed=1).losses, case.terms(seed=2).losses
    assert {name for name in first if not torch.equal(first[name], other[name])} == {"reg"}


def test_autocast_changes_little_and_keeps_float32():
    case = CASES["batch"]()
    expected = case.terms().losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.terms()
    for name, term in found.losses.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(expected[name].item(), rel=0.1)
    assert all(total.dtype == torch.float32 for total, _ in found.batch_sums.values())


def test_health_is_measured():
    case = CASES["batch"]()
    health = case.terms().health
    matches = [p is not None for rows in case.matches().values() for row in rows for p in row]
    assert health["matched_share"].item() == pytest.approx(sum(matches) / len(matches))
    prob = [
        literal.softmax(((row - case.student.centre("cls").double()) / TEMPERATURE).tolist())
        for row in all_logits(case.teacher.cls, case.parameters[1])
    ]

    def entropy(p: Sequence[float]) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    assert health["teacher_entropy"].item() == approx(literal.mean([entropy(p) for p in prob]))
    marginal = [literal.mean(column) for column in zip(*prob, strict=True)]
    total, rows = case.terms().marginal
    assert (total / rows).tolist() == [approx(value) for value in marginal]
    assert not any(value.requires_grad for value in health.values())


def test_defaults_are_the_papers():
    settings = GlareSettings()
    assert settings.terms == ("glob", "reg", "loc1", "loc2")
    assert (settings.prototypes, settings.head_hidden, settings.head_bottleneck) == (8192, 2048, 256)
    assert settings.region_target == "text" and settings.regions == RegionConfig()
    objective = GlareObjective(12, 3, settings)
    assert not any(objective.centre(level).any() for level in LEVELS)
