"""Teacher-student cross-entropy over K prototypes, and its centring (DINO; paper eqs. 4, 7, 8, 9).

H(student, teacher) = -sum_k p_T[k] log p_S[k], with p_T = softmax((t - centre) / temperature_T), no gradient, and
p_S = softmax(s / 0.1). The paper prints the arguments the other way round; all code it builds on has the logarithm
on the student. Everything here is float32, whatever autocast says: a temperature of 0.04 magnifies the steps of
bfloat16 25 times.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
CHUNK_LOGITS, CPU_CHUNK_LOGITS = 2**26, 2**23  # of a chunk: 8192 and 1024 rows at K = 8192


def teacher_probabilities(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Centred and sharpened: softmax((logits - centre) / temperature), (..., K) float32."""
    return F.softmax((logits.float() - centre) / temperature, dim=-1)


def summed_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of H over pairs of rows whose logits never exist at once.

    With logits s = W x of the student, dH/ds = (p_S - p_T) / 0.1 is at hand as soon as H is, so the gradients are
    summed up chunk by chunk in the forward pass: backward computes no logits anew, and only scales. There are no second
    derivatives.

    Args:
        student: (rows, bottleneck), with gradient.
        teacher: (rows, bottleneck), without.
        weight: (rows,), without.
        student_prototypes: (K, bottleneck), with gradient.
        teacher_prototypes: (K, bottleneck), without.
        centre: (K,).
        temperature: of the teacher.

    Returns:
        The sum, a scalar, and H of each row (rows,) without gradient; float32.
    """
    with torch.autocast(student.device.type, enabled=False):
        total, entropy = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            student.float() / STUDENT_TEMPERATURE,
            student_prototypes.float(),
            teacher.detach().float() / temperature,
            teacher_prototypes.detach().float(),
            -centre.detach() / temperature,
            weight.detach().float(),
            torch.is_grad_enabled() and (student.requires_grad or student_prototypes.requires_grad),
        )
    return total, entropy


class _SummedCrossEntropy(torch.autograd.Function):
    """``summed_cross_entropy`` of rows that are divided by their temperatures; ``wanted`` are the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        teacher: Tensor,
        targets: Tensor,
        offset: Tensor,
        weight: Tensor,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        entropy = student.new_empty(len(student))
        gradients = (torch.zeros_like(student), torch.zeros_like(prototypes)) if wanted else None
        size = max(1, (CPU_CHUNK_LOGITS if student.device.type == "cpu" else CHUNK_LOGITS) // len(prototypes))
        for rows in (slice(first, first + size) for first in range(0, len(student), size)):
            prob = torch.addmm(offset, teacher[rows], targets.T).softmax(dim=-1)
            entropy[rows], difference = _entropy_and_slope(student[rows], prototypes, prob)
            if gradients is not None:
                scale = weight[rows].unsqueeze(1)
                gradients[0][rows] = (difference @ prototypes).mul_(scale)
                gradients[1].addmm_(difference.T, student[rows] * scale)
            del prob, difference  # before the next chunk needs as much
        ctx.save_for_backward(*(gradients or ()))
        ctx.mark_non_differentiable(entropy)
        return entropy @ weight, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        return *(upstream * gradient for gradient in ctx.saved_tensors), None, None, None, None, None


def _entropy_and_slope(rows: Tensor, prototypes: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
    """H of each of the student's rows, already divided by its temperature, and its slope in the logits, p_S - p_T."""
    log_prob = (rows @ prototypes.T).log_softmax(dim=-1)
    entropy = -torch.linalg.vecdot(prob, log_prob)
    return entropy, log_prob.exp_().sub_(prob)  # in place: nobody needs the logarithm any more


def cross_view_entropy(student_logits: Tensor, teacher_prob: Tensor) -> Tensor:
    """Mean of H over all pairs of a student view and *another* teacher view (L_glob, paper eq. 4 as in DINO).

    Args:
        student_logits: (v, b, K); its first t views are the teacher's.
        teacher_prob: (t, b, K).

    Returns:
        The mean over t * v - t pairs and b images, a scalar: 22 pairs for two global and ten local views.
    """
    student = student_logits.float() / STUDENT_TEMPERATURE
    entropy = student.logsumexp(dim=-1) - torch.einsum("tbk,vbk->tvb", teacher_prob, student)
    same = torch.eye(len(teacher_prob), len(student), dtype=torch.bool, device=student.device)
    return entropy.mean(dim=-1)[~same].mean()


def masked_mean(values: Tensor, count: Tensor | int) -> Tensor:
    """Sum of ``values`` over ``count``, 0 (with a gradient) where the count is 0."""
    return values.sum() / torch.as_tensor(count, device=values.device).clamp(min=1)


def update_centre(centre: Tensor, batch_mean: Tensor, momentum: float = CENTRE_MOMENTUM) -> Tensor:
    """The next centre: m centre + (1 - m) mean of the teacher's raw logits over the batch, m the momentum."""
    return torch.lerp(batch_mean.float(), centre, momentum)
