import copy

import pytest
import torch
from torch import Tensor, nn

from glare.teacher import averaged_parameters, make_teacher, update_teacher


class Student(nn.Module):
    """Frozen and trained parameters, a parameter used twice, buffers, and a frozen and a trained one side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).requires_grad_(False)
        self.adapter = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)
        self.tied = self.adapter
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tied(self.backbone(x)) + self.adapter(x))


TRAINED = {"adapter.weight", "adapter.bias", "head.weight"}


@pytest.fixture
def student() -> Student:
    return Student()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def train(student: nn.Module) -> None:
    """Stand for optimizer steps: everything that trains moves."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))


def test_the_teacher_equals_the_student_at_the_start(student: Student):
    teacher = make_teacher(student)
    assert isinstance(teacher, Student)
    x = torch.randn(5, 4)
    assert torch.equal(teacher(x), student.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(state(teacher).values(), state(student).values(), strict=True))


def test_the_student_is_left_as_it_was(student: Student):
    before, trains = state(student), [p.requires_grad for p in student.parameters()]
    make_teacher(student)
    assert student.training
    assert [p.requires_grad for p in student.parameters()] == trains
    assert all(torch.equal(a, before[name]) for name, a in state(student).items())


def test_frozen_parameters_are_the_students_own(student: Student):
    teacher = make_teacher(student)
    for (name, ours), theirs in zip(teacher.named_parameters(), student.parameters(), strict=True):
        same = ours.data_ptr() == theirs.data_ptr()
        assert same == (name not in TRAINED), name
        assert (ours is theirs) == same


def test_the_teacher_has_no_gradient_and_does_not_train(student: Student):
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert not teacher(torch.randn(2, 4)).requires_grad
    student(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_module_used_twice_is_used_twice_in_the_teacher(student: Student):
    teacher = make_teacher(student)
    assert teacher.tied is teacher.adapter
    assert teacher.adapter is not student.adapter


def test_buffers_are_the_teachers_own(student: Student):
    teacher = make_teacher(student)
    student.centre += 1
    assert not teacher.centre.any()


def test_what_trains_is_averaged(student: Student):
    names = {name for name, *_ in averaged_parameters(make_teacher(student), student)}
    assert names == TRAINED


def test_momentum_one_keeps_the_teacher(student: Student):
    teacher = make_teacher(student)
    before = state(teacher)
    train(student)
    update_teacher(teacher, student, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in state(teacher).items())


def test_momentum_zero_copies_the_student(student: Student):
    teacher = make_teacher(student)
    train(student)
    update_teacher(teacher, student, 0.0)
    for _, ours, theirs in averaged_parameters(teacher, student):
        torch.testing.assert_close(ours, theirs.data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.996])
def test_the_teacher_moves_by_its_share_of_the_way(student: Student, momentum: float):
    teacher = make_teacher(student)
    start = copy.deepcopy(dict(teacher.named_parameters()))
    frozen = [p.clone() for p in student.backbone.parameters()]
    train(student)
    update_teacher(teacher, student, momentum)
    for name, ours, theirs in averaged_parameters(teacher, student):
        expected = start[name] + (1 - momentum) * (theirs.data - start[name])
        torch.testing.assert_close(ours.data, expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(ours, start[name])
    assert all(torch.equal(a, b) for a, b in zip(frozen, student.backbone.parameters(), strict=True))


def test_many_updates_are_the_recursion(student: Student):
    teacher = make_teacher(student)
    expected = {name: ours.double() for name, ours, _ in averaged_parameters(teacher, student)}
    for step in range(20):
        train(student)
        momentum = 0.9 + 0.005 * step
        update_teacher(teacher, student, momentum)
        for name, _, theirs in averaged_parameters(teacher, student):
            expected[name] = momentum * expected[name] + (1 - momentum) * theirs.double()
    for name, ours, _ in averaged_parameters(teacher, student):
        torch.testing.assert_close(ours.double(), expected[name].detach(), atol=1e-5, rtol=1e-5)


def test_the_student_does_not_follow_the_teacher(student: Student):
    teacher = make_teacher(student)
    train(student)
    before = state(student)
    update_teacher(teacher, student, 0.9)
    assert all(torch.equal(value, before[name]) for name, value in state(student).items())


def test_a_student_that_trains_whole_is_averaged_whole():
    student = nn.Linear(3, 3)
    teacher = make_teacher(student)
    train(student)
    update_teacher(teacher, student, 0.5)
    assert {name for name, *_ in averaged_parameters(teacher, student)} == {"weight", "bias"}
    assert teacher.weight.data_ptr() != student.weight.data_ptr()
    assert not torch.equal(teacher.weight, student.weight)
