"""The teacher: a moving average of whatever trains; everything frozen is the student's own tensor.

Where an objective needs no teacher, the student itself stands in its place: nothing is averaged, nothing is kept twice.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from glare.sharding import local

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A copy of ``student`` without gradients that shares, by reference, all parameters which do not train."""
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    teacher = deepcopy(student, memo=frozen)
    return teacher.requires_grad_(False).eval()


def averaged_parameters(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, teacher's, student's) of every parameter that trains; none where the student is its own teacher."""
    if teacher is student:
        return
    for (name, ours), theirs in zip(teacher.named_parameters(), student.parameters(), strict=True):
        if theirs.requires_grad:
            yield name, ours, theirs


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all that trains (paper section 4)."""
    pairs = [(local(ours), local(theirs)) for _, ours, theirs in averaged_parameters(teacher, student)]
    torch._foreach_lerp_([ours for ours, _ in pairs], [theirs for _, theirs in pairs], 1 - momentum)
