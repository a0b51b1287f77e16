import math
from collections.abc import Callable

import pytest
import torch
from reference import glare_terms as literal
from torch import Tensor, nn

from glare import losses
from glare.losses import (
    cross_entropy,
    cross_entropy_rows,
    cross_view_entropy,
    masked_mean,
    teacher_probabilities,
    update_centre,
)
from glare.objectives.base import ProjectionHead, Prototypes

K = 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
@pytest.mark.parametrize("rows", [1, 5])
def test_cross_entropy_is_the_transcription(temperature: float, rows: int):
    student, teacher, centre = normal(rows, K), normal(rows, K, seed=1), normal(K, seed=2)
    found = cross_entropy(student, teacher_probabilities(teacher, centre, temperature))
    expected = [literal.entropy(s, t, centre, temperature) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=1e-5)


def test_teacher_probabilities_are_centred_and_sharpened():
    logits, centre = normal(3, K), normal(K, seed=1)
    found = teacher_probabilities(logits, centre, 0.5)
    for row, prob in zip(logits, found, strict=True):
        expected = literal.softmax([(float(x) - float(c)) / 0.5 for x, c in zip(row, centre, strict=True)])
        torch.testing.assert_close(prob, torch.tensor(expected))
    assert teacher_probabilities(logits, centre, 0.04).amax(dim=-1).min() > found.amax(dim=-1).min()
    assert torch.allclose(teacher_probabilities(logits + 3, centre + 3, 0.5), found, atol=1e-5)


def test_everything_is_float32_inside():
    """A temperature of 0.04 would turn bfloat16's steps of 0.004 at 1.0 into steps of a tenth."""
    logits = normal(4, K).bfloat16()
    prob = teacher_probabilities(logits, torch.zeros(K), 0.04)
    assert prob.dtype == torch.float32
    assert torch.equal(prob, teacher_probabilities(logits.float(), torch.zeros(K), 0.04))
    assert torch.equal(cross_entropy(logits, prob), cross_entropy(logits.float(), prob))
    assert cross_view_entropy(logits[None], prob[None].expand(2, -1, -1)).dtype == torch.float32


def test_extreme_logits_stay_finite():
    student = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    prob = teacher_probabilities(torch.tensor([[-80.0, 80.0, 0.0]]), torch.zeros(3), 0.04)
    entropy = cross_entropy(student, prob)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(1600.0)
    assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize(("views", "batch"), [(2, 3), (12, 2), (3, 1), (5, 4)])
def test_cross_view_entropy_is_the_mean_over_pairs_of_different_views(views: int, batch: int):
    student, teacher, centre = normal(views, batch, K), normal(2, batch, K, seed=1), normal(K, seed=2)
    found = cross_view_entropy(student, teacher_probabilities(teacher, centre, 0.05))
    terms = [
        literal.mean([literal.entropy(student[v, i], teacher[q, i], centre, 0.05) for i in range(batch)])
        for q in range(2)
        for v in range(views)
        if v != q
    ]
    assert len(terms) == 2 * views - 2
    assert found.item() == pytest.approx(literal.mean(terms), rel=1e-5)


def test_two_globals_and_ten_locals_make_22_pairs():
    """Each pair weighs 1 / 22: lift the entropy of one student view, and see how many pairs it is in."""
    teacher = teacher_probabilities(torch.tensor([1.0, 0.0]).expand(2, 1, 2), torch.zeros(2), 1.0)
    flat = torch.zeros(12, 1, 2)
    base = cross_view_entropy(flat, teacher)
    pairs = []
    for view in range(12):
        lifted = flat.clone()
        lifted[view, 0] = torch.tensor([0.1, 0.0])
        one = cross_entropy(lifted[view], teacher[0]) - cross_entropy(flat[view], teacher[0])
        pairs.append(float((cross_view_entropy(lifted, teacher) - base) / one * 22))
    assert pairs == pytest.approx([1.0] * 2 + [2.0] * 10, rel=1e-3)
    assert sum(pairs) == pytest.approx(22, rel=1e-3)


def test_a_view_is_not_compared_with_itself():
    """Another target from teacher view 0 leaves the gradient of student view 0 as it was, and of no other."""

    def gradient(teacher: Tensor) -> Tensor:
        student = normal(4, 1, K).requires_grad_()
        cross_view_entropy(student, teacher_probabilities(teacher, torch.zeros(K), 0.1)).backward()
        assert student.grad is not None
        return student.grad

    teacher = normal(2, 1, K, seed=1)
    other = teacher.clone()
    other[0] = normal(1, K, seed=2)
    unchanged = (gradient(teacher) == gradient(other)).flatten(1).all(dim=1)
    assert unchanged.tolist() == [True, False, False, False]


def test_uniform_teacher_and_student_give_log_k():
    for k in (2, 100, 8192):
        zeros = torch.zeros(3, 2, k)
        prob = teacher_probabilities(zeros[:2], torch.zeros(k), 0.04)
        assert cross_entropy(zeros[0], prob[0]).tolist() == pytest.approx([math.log(k)] * 2, rel=1e-5)
        assert cross_view_entropy(zeros, prob).item() == pytest.approx(math.log(k), rel=1e-5)
    assert math.log(8192) == pytest.approx(9.011, abs=1e-3)


def test_the_entropy_is_smallest_where_the_student_agrees():
    teacher = normal(6, K) * 0.3
    prob = teacher_probabilities(teacher, torch.zeros(K), 0.1)
    agreed = cross_entropy(teacher, prob)
    torch.testing.assert_close(agreed, -(prob * prob.log()).sum(dim=-1), atol=1e-5, rtol=1e-5)
    assert (cross_entropy(teacher + 0.1 * normal(6, K, seed=3), prob) > agreed).all()


# Rows in chunks


class Rows:
    """Student and teacher rows with their last layers."""

    def __init__(self, count: int) -> None:
        self.student, self.teacher = normal(count, 5).requires_grad_(), normal(count, 5, seed=1)
        self.layers = nn.ModuleList([Prototypes(5, K), Prototypes(5, K)])
        for layer in self.layers:
            nn.init.normal_(layer.weight_v, generator=generator(4))
        self.centre = normal(K, seed=2)

    def entropy(self) -> Tensor:
        return cross_entropy_rows(
            self.student,
            self.teacher,
            student_layer=self.layers[0],
            teacher_layer=self.layers[1],
            centre=self.centre,
            temperature=0.05,
        )


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 40])
def test_chunks_change_neither_values_nor_gradients(count: int, monkeypatch: pytest.MonkeyPatch):
    weights = torch.linspace(1, 2, count)

    def run(chunk: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
        torch.manual_seed(0)
        rows = Rows(count)
        entropy = rows.entropy()
        (entropy * weights).sum().backward()
        assert all(p.grad is None for p in rows.layers[1].parameters()), "the teacher gets no gradient"
        return entropy.detach(), rows.student.grad, *(p.grad for p in rows.layers[0].parameters())

    whole = run(1000)
    assert whole[0].shape == (count,)
    for chunk in (1, 8):
        for found, expected in zip(run(chunk), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_are_the_transcription():
    rows = Rows(6)
    expected = [
        literal.entropy(s, t, rows.centre, 0.05)
        for s, t in zip(rows.layers[0](rows.student), rows.layers[1](rows.teacher), strict=True)
    ]
    assert rows.entropy().tolist() == pytest.approx(expected, rel=1e-5)


def test_the_logits_of_all_rows_never_exist_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    rows, seen = Rows(10), []
    forward: Callable[[Tensor], Tensor] = rows.layers[0].forward

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        return forward(x)

    rows.layers[0].forward = watched  # type: ignore[method-assign]
    rows.entropy().sum().backward()
    assert max(seen) == 4 and sum(seen) == 20, "once forward, once again backward"


def test_no_rows_give_no_loss_but_a_gradient():
    rows = Rows(0)
    entropy = rows.entropy()
    assert entropy.shape == (0,)
    masked_mean(entropy, 0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in rows.layers[0].parameters())


def test_masked_mean():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert masked_mean(values, 3).item() == 3
    assert masked_mean(values, torch.tensor(2)).item() == 4.5
    nothing = masked_mean(values[:0], torch.tensor(0))
    assert nothing.item() == 0
    nothing.backward()
    assert values.grad is not None and not values.grad.any()


def test_the_centre_moves_by_a_tenth_of_the_way():
    centre, mean = normal(K), normal(K, seed=1)
    torch.testing.assert_close(update_centre(centre, mean), 0.9 * centre + 0.1 * mean)
    moved = torch.zeros(K)
    for _ in range(100):
        moved = update_centre(moved, mean)
    torch.testing.assert_close(moved, mean, atol=1e-4, rtol=0)
    assert update_centre(centre, mean.bfloat16()).dtype == torch.float32


# The head


def head() -> ProjectionHead:
    torch.manual_seed(0)
    made = ProjectionHead(6, hidden=9, bottleneck=4, prototypes=K)
    for number, parameter in enumerate(made.parameters()):
        parameter.data = normal(*parameter.shape, seed=number)
    return made


def test_the_head_is_the_transcription():
    made, tokens = head(), normal(2, 3, 6, seed=9)
    parameters = {f"head.{name}": value for name, value in made.state_dict().items()}
    found = made.prototypes(made(tokens))
    assert found.shape == (2, 3, K)
    expected = torch.stack([literal.head_logits(token, parameters) for token in tokens.flatten(0, 1)])
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, atol=1e-5, rtol=1e-4)


def test_the_head_has_dinos_parameters():
    sizes = {name: tuple(p.shape) for name, p in ProjectionHead(384).state_dict().items()}
    assert sizes == {
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight_g": (8192, 1),
        "last_layer.weight_v": (8192, 256),
    }
    assert sum(math.prod(size) for size in sizes.values()) == 7_614_720


def test_the_head_starts_as_dinos():
    torch.manual_seed(0)
    made = ProjectionHead(64, hidden=128, bottleneck=32, prototypes=50)
    assert torch.equal(made.last_layer.weight_g, torch.ones(50, 1))
    for layer in (made.mlp[0], made.mlp[2], made.mlp[4]):
        assert not layer.bias.any() and layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bottleneck = made(normal(5, 64))
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(5))
    assert made.prototypes(bottleneck).abs().max() <= 1 + 1e-6, "logits are cosines"


def test_logits_are_float32_under_autocast():
    made, tokens = head(), normal(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bottleneck = made(tokens)
        logits = made.prototypes(bottleneck)
    assert bottleneck.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, made.prototypes(bottleneck))
    torch.testing.assert_close(logits, made.prototypes(made(tokens)), atol=0.15, rtol=0.1)
