import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from reference import glare_terms as literal
from reference.builders import crop_of
from reference.correspondence import Box, correspondence
from torch import Tensor, nn

from glare import losses
from glare.features import Features
from glare.geometry import Crop
from glare.objectives import glare as module
from glare.objectives.base import Terms
from glare.objectives.glare import DIRECTIONS, LEVELS, CrossAttention, GlareObjective, GlareSettings
from glare.regions import RegionConfig, Regions
from glare.views import Views

DIM, K, TEMPERATURE = 8, 6, 0.06
SOURCE = (100, 100)
SETTINGS = GlareSettings(prototypes=K, head_hidden=10, head_bottleneck=5, regions=RegionConfig(min_side=2, max_side=3))
READINGS = ("text", "eq6", "udi")

OVERLAPPING = (Box(3.1, 7.3, 71.7, 64.9, False), Box(21.3, 15.9, 60.2, 77.7, True))
APART = (Box(0.0, 0.0, 41.0, 40.0, True), Box(55.0, 0.0, 40.0, 80.0, False))
A_CORNER = (Box(0.0, 0.0, 60.3, 58.7, False), Box(43.9, 42.1, 51.0, 55.1, False))
INSIDE = (Box(1.3, 2.2, 95.1, 93.9, False), Box(40.6, 30.2, 25.3, 28.1, True))


@dataclass
class Case:
    """Random features of a batch, random parameters, and where its two global views were cut from."""

    student: GlareObjective
    target: GlareObjective
    features: Features
    local: Features
    teacher: Features
    views: Views
    boxes: Sequence[tuple[Box, Box]]
    ca_heads: int

    def terms(self, seed: int = 0, **changes: object) -> Terms:
        given = {"student": (self.features, self.local), "teacher": self.teacher, "views": self.views} | changes
        return self.student(
            **given, target=self.target, temperature=TEMPERATURE, generator=torch.Generator().manual_seed(seed)
        )

    def matches(self) -> dict[tuple[int, int], list[list[int | None]]]:
        grid = self.views.grid
        return {(a, b): [correspondence(pair[a], pair[b], grid, grid) for pair in self.boxes] for a, b in DIRECTIONS}

    @property
    def parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self.student.state_dict()), dict(self.target.state_dict())


def randomise(objective: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*objective.parameters(), *objective.buffers()]:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)


def make_case(
    boxes: Sequence[tuple[Box, Box]],
    *,
    seed: int = 0,
    grid: tuple[int, int] = (4, 5),
    num_local: int = 2,
    ca_heads: int = 2,
    attention_heads: int = 3,
    mask_share: float = 0.4,
    settings: GlareSettings = SETTINGS,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    b, n = len(boxes), grid[0] * grid[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    student, target = (GlareObjective(DIM, ca_heads, settings) for _ in range(2))
    randomise(student, seed + 1)
    randomise(target, seed + 2)
    crops = [crop_of([pair[view] for pair in boxes], [SOURCE] * b) for view in (0, 1)]
    nothing = torch.empty(0)
    views = Views(
        global_=nothing,
        augmented=nothing,
        local=nothing,
        global_crops=Crop(torch.stack([c.offset for c in crops]), torch.stack([c.scale for c in crops])),
        local_crops=Crop(nothing, nothing),
        patch_mask=torch.rand(2, b, n, generator=generator) < mask_share,
        grid=grid,
    )
    return Case(
        student=student,
        target=target,
        features=Features(normal(2, b, DIM), normal(2, b, n, DIM)),
        local=Features(normal(num_local, b, DIM), normal(num_local, b, 4, DIM)),
        teacher=Features(normal(2, b, DIM), normal(2, b, n, DIM), normal(2, b, attention_heads, n).softmax(dim=-1)),
        views=views,
        boxes=boxes,
        ca_heads=ca_heads,
    )


CASES = {
    "batch": lambda **given: make_case([OVERLAPPING, A_CORNER, INSIDE], **given),
    "batch-1": lambda **given: make_case([OVERLAPPING], seed=10, **given),
    "one-without-overlap": lambda **given: make_case([APART, A_CORNER], seed=20, **given),
    "no-overlap": lambda **given: make_case([APART, APART], seed=30, **given),
    "no-overlap-batch-1": lambda **given: make_case([APART], seed=40, **given),
    "empty-mask": lambda **given: make_case([A_CORNER, INSIDE], seed=50, mask_share=0.0, **given),
    "full-mask": lambda **given: make_case([INSIDE], seed=60, mask_share=1.1, **given),
    "no-locals": lambda **given: make_case([OVERLAPPING, INSIDE], seed=70, num_local=0, **given),
    "other-heads": lambda **given: make_case([OVERLAPPING], seed=80, ca_heads=4, attention_heads=1, **given),
    "other-grid": lambda **given: make_case([A_CORNER, OVERLAPPING], seed=90, grid=(7, 3), num_local=1, **given),
    "tiny-grid": lambda **given: make_case([INSIDE, OVERLAPPING], seed=100, grid=(1, 2), **given),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def approx(value: float) -> object:
    return pytest.approx(value, rel=2e-4, abs=1e-6)


class Drawn:
    """Stands before ``sample_regions`` and keeps what was asked and answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attention: list[Tensor] = []
        self.match: list[tuple[Tensor, Tensor]] = []
        self.regions: list[Regions] = []
        self.sample = module.sample_regions
        monkeypatch.setattr(module, "sample_regions", self)

    def __call__(self, attention: Tensor, match: tuple[Tensor, Tensor], *args: object, **named: object) -> Regions:
        self.attention.append(attention)
        self.match.append(match)
        self.regions.append(self.sample(attention, match, *args, **named))
        return self.regions[-1]

    def patches(self) -> dict[tuple[int, int], list[list[list[int]]]]:
        """Regions of each direction and image as lists of patches."""
        return {
            direction: [
                [index[valid].tolist() for index, valid in zip(*of_image, strict=True)]
                for of_image in zip(drawn.index, drawn.valid, strict=True)
            ]
            for direction, drawn in zip(DIRECTIONS, self.regions, strict=True)
        }


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
    monkeypatch.setattr(losses, "CHUNK_ROWS", 7)
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


def all_logits(tokens: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return torch.stack([literal.head_logits(token, parameters) for token in tokens.reshape(-1, DIM)])


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


def disturb(tokens: Tensor, where: Tensor) -> None:
    """Change the tokens at ``where``, and not by a constant, which a layer norm would take out again."""
    tokens[where] += torch.randn(tokens[where].shape, generator=torch.Generator().manual_seed(11))


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
    assert health["marginal_entropy"].item() == approx(entropy(marginal))
    assert not any(value.requires_grad for value in health.values())


# The cross-attention


def attention_module(heads: int = 2, dim: int = DIM) -> CrossAttention:
    made = CrossAttention(dim, heads)
    randomise(made, 3)
    return made


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (2, 8), (4, 16), (6, 24)])
def test_cross_attention_is_equation_5(heads: int, dim: int):
    made, generator = attention_module(heads, dim), torch.Generator().manual_seed(0)
    query, context = (torch.randn(3, size, dim, generator=generator) for size in (4, 7))
    valid = torch.rand(3, 7, generator=generator) < 0.5
    valid[:, 2] = True
    parameters = {f"cross_attention.{name}": value for name, value in made.state_dict().items()}
    for mask in (None, valid):
        found = made(query, context) if mask is None else made(query, context, mask)
        assert found.shape == query.shape
        for image in range(3):
            keys = [c for k, c in enumerate(context[image]) if mask is None or mask[image, k]]
            for number in range(4):
                expected = literal.cross_attention(query[image, number], keys, parameters, heads)
                torch.testing.assert_close(found[image, number].double(), expected, atol=1e-5, rtol=1e-4)


def test_cross_attention_of_nothing_is_finite():
    made, query = attention_module(), torch.randn(2, 3, DIM)
    result = made(query, torch.randn(2, 5, DIM), torch.zeros(2, 5, dtype=torch.bool))
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_cross_attention_starts_as_two_norms():
    made, query = CrossAttention(DIM, 2), torch.randn(2, 3, DIM)
    found = made(query, torch.randn(2, 5, DIM))
    norm = nn.LayerNorm(DIM, eps=1e-6)
    torch.testing.assert_close(found, norm(norm(query)))
    assert made.qkv.weight.std() > 0


def test_cross_attention_has_udis_parameters():
    names = {name: tuple(p.shape) for name, p in CrossAttention(384, 6).state_dict().items()}
    assert names == {
        "norm1.weight": (384,),
        "norm1.bias": (384,),
        "qkv.weight": (1152, 384),
        "qkv.bias": (1152,),
        "proj.weight": (384, 384),
        "proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    assert sum(math.prod(size) for size in names.values()) == 592_896


def test_defaults_are_the_papers():
    settings = GlareSettings()
    assert settings.terms == ("glob", "reg", "loc1", "loc2")
    assert (settings.prototypes, settings.head_hidden, settings.head_bottleneck) == (8192, 2048, 256)
    assert settings.region_target == "text" and settings.regions == RegionConfig()
    objective = GlareObjective(12, 3, settings)
    assert not any(objective.centre(level).any() for level in LEVELS)
