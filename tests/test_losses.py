import math
import weakref
from typing import Any

import pytest
import torch
from reference import glare_terms as literal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glare import losses
from glare.losses import (
    STUDENT_TEMPERATURE,
    cross_view_entropy,
    masked_mean,
    summed_cross_entropy,
    teacher_probabilities,
    update_centre,
)
from glare.objectives.base import ProjectionHead, Prototypes

K = 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def cross_entropy(student_logits: Tensor, teacher_prob: Tensor) -> Tensor:
    """H of each row by autograd, all logits at once: (rows, K) twice -> (rows,)."""
    student = student_logits.float() / STUDENT_TEMPERATURE
    return student.logsumexp(dim=-1) - (teacher_prob * student).sum(dim=-1)


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


# Pairs in chunks


class Pairs:
    """Rows of student and teacher, their last layers, and unequal weights."""

    def __init__(self, count: int, *, prototypes: int = K) -> None:
        self.student, self.teacher = normal(count, 5).requires_grad_(), normal(count, 5, seed=1)
        self.layers = [Prototypes(5, prototypes), Prototypes(5, prototypes)]
        for seed, layer in enumerate(self.layers):
            nn.init.normal_(layer.weight_v, generator=generator(4 + seed))
            nn.init.uniform_(layer.weight_g, 0.5, 2, generator=generator(6 + seed))
        self.matrix = self.layers[0].matrix()
        self.centre, self.weight = normal(prototypes, seed=2), torch.linspace(0.5, 2, count)

    def summed(self) -> tuple[Tensor, Tensor]:
        return summed_cross_entropy(
            self.student,
            self.teacher,
            self.weight,
            student_prototypes=self.matrix,
            teacher_prototypes=self.layers[1].matrix(),
            centre=self.centre,
            temperature=0.05,
        )

    def at_once(self) -> tuple[Tensor, Tensor]:
        """The same by autograd, with all logits."""
        prob = teacher_probabilities(self.layers[1](self.teacher).detach(), self.centre, 0.05)
        entropy = cross_entropy(self.student @ self.matrix.T, prob)
        return (entropy * self.weight).sum(), entropy.detach()

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of student rows, prototypes, and their directions and lengths."""
        return list(
            torch.autograd.grad(loss, [self.student, self.matrix, *self.layers[0].parameters()], retain_graph=True)
        )


class Watch(TorchDispatchMode):
    """Every operation while open: its name, what it makes, and how many numbers in rows of ``columns`` live at once."""

    def __init__(self, *, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.names: list[str] = []
        self.outputs: list[tuple[torch.Size, torch.dtype]] = []
        self.most_logits = 0
        self._logits: list[weakref.ref[Tensor]] = []

    @property
    def products(self) -> int:
        return sum(name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "linear") for name in self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not func.is_view:
                self.outputs.append((value.shape, value.dtype))
                if value.dim() == 2 and value.shape[1] == self.columns:
                    self._logits.append(weakref.ref(value))
        alive = {value.data_ptr(): value.numel() for one in self._logits if (value := one()) is not None}
        self.most_logits = max(self.most_logits, sum(alive.values()))
        return result


def in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, *, prototypes: int = K) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK_LOGITS", rows * prototypes)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_chunks_give_the_values_and_gradients_of_autograd(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch):
    in_chunks(monkeypatch, chunk)
    pairs = Pairs(count)
    (total, entropy), (expected, expected_entropy) = pairs.summed(), pairs.at_once()
    assert entropy.shape == (count,) and total.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
    for found, wanted in zip(pairs.gradients(total * 3), pairs.gradients(expected * 3), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_pairs_are_the_transcription(chunk: int, monkeypatch: pytest.MonkeyPatch):
    in_chunks(monkeypatch, chunk)
    pairs = Pairs(6)
    expected = [
        literal.entropy(s, t, pairs.centre, 0.05)
        for s, t in zip(pairs.layers[0](pairs.student), pairs.layers[1](pairs.teacher), strict=True)
    ]
    total, entropy = pairs.summed()
    assert entropy.tolist() == pytest.approx(expected, rel=1e-5)
    weighted = [value * weight for value, weight in zip(expected, pairs.weight.tolist(), strict=True)]
    assert total.item() == pytest.approx(sum(weighted), rel=1e-5)


def test_a_chunk_holds_at_least_one_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "CPU_CHUNK_LOGITS", K - 1)
    pairs = Pairs(3)
    torch.testing.assert_close(pairs.summed()[1], pairs.at_once()[1], atol=1e-4, rtol=1e-5)


def test_only_the_student_gets_a_gradient():
    pairs = Pairs(5)
    for value in (pairs.teacher, pairs.centre, pairs.weight):
        value.requires_grad_()
    total, entropy = pairs.summed()
    assert total.requires_grad and not entropy.requires_grad
    total.backward()
    assert pairs.student.grad is not None and pairs.student.grad.any()
    others = [pairs.teacher, pairs.centre, pairs.weight, *pairs.layers[1].parameters()]
    assert [value.grad for value in others] == [None] * 5


def test_no_pairs_give_no_loss_but_a_gradient():
    pairs = Pairs(0)
    total, entropy = pairs.summed()
    assert entropy.shape == (0,) and total.item() == 0
    found = pairs.gradients(total)
    assert [tuple(value.shape) for value in found] == [(0, 5), (K, 5), (K, 1), (K, 5)]
    assert not any(value.any() for value in found)


def test_the_logits_of_all_pairs_never_exist_at_once(monkeypatch: pytest.MonkeyPatch):
    """At most both probabilities of one chunk and a product of them."""
    in_chunks(monkeypatch, 4, prototypes=50)
    pairs = Pairs(40, prototypes=50)
    with Watch(columns=50) as watch:
        pairs.summed()[0].backward()
    gradients = {pairs.student.shape, pairs.matrix.shape}
    assert max(shape.numel() for shape, _ in watch.outputs if shape not in gradients) <= 4 * 50
    assert 4 * 50 <= watch.most_logits <= 3 * (4 * 50)
    with Watch(columns=50) as watch:
        Pairs(40, prototypes=50).at_once()[0].backward()
    assert watch.most_logits > 40 * 50, "what computes all logits does not pass"


def test_backward_computes_no_logits(monkeypatch: pytest.MonkeyPatch):
    in_chunks(monkeypatch, 4, prototypes=50)
    pairs = Pairs(40, prototypes=50)
    total, _ = pairs.summed()
    with Watch(columns=50) as watch:
        total.backward()
    assert watch.names and watch.products == 0 and watch.most_logits == 0
    total, _ = Pairs(40, prototypes=50).at_once()
    with Watch(columns=50) as watch:
        total.backward()
    assert watch.products > 0 and watch.most_logits > 0, "ordinary autograd is seen"


def test_without_gradients_there_are_two_products_a_chunk(monkeypatch: pytest.MonkeyPatch):
    in_chunks(monkeypatch, 4)
    with torch.no_grad(), Watch(columns=K) as watch:
        total, _ = Pairs(10).summed()
    assert watch.products == 2 * 3 and not total.requires_grad
    with Watch(columns=K) as watch:
        Pairs(10).summed()
    assert watch.products == 4 * 3, "with gradients there are two more"


def test_autocast_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    in_chunks(monkeypatch, 4)
    pairs = Pairs(10)
    with Watch(columns=K) as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        total, entropy = pairs.summed()
        found = pairs.gradients(total)
    assert {dtype for _, dtype in watch.outputs if dtype.is_floating_point} == {torch.float32}
    plain, plain_entropy = pairs.summed()
    assert torch.equal(total, plain) and torch.equal(entropy, plain_entropy)
    assert all(torch.equal(one, other) for one, other in zip(found, pairs.gradients(plain), strict=True))


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
