"""Teacher-student cross-entropy over K prototypes, and its centring (DINO; paper eqs. 4, 7, 8, 9).

H(student, teacher) = -sum_k p_T[k] log p_S[k], with p_T = softmax((t - centre) / temperature_T), no gradient, and
p_S = softmax(s / 0.1). The paper prints the arguments the other way round; all code it builds on has the logarithm
on the student. Everything here is float32, whatever autocast says: a temperature of 0.04 magnifies the steps of
bfloat16 25 times.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
CHUNK_ROWS = 1024  # rows whose K logits exist at the same time: 32 MiB at K = 8192

Logits = Callable[[Tensor], Tensor]
"""The last layer of a projection head: (rows, bottleneck) -> (rows, K) float32."""


def teacher_probabilities(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Centred and sharpened: softmax((logits - centre) / temperature), (..., K) float32."""
    return F.softmax((logits.float() - centre) / temperature, dim=-1)


def cross_entropy(student_logits: Tensor, teacher_prob: Tensor) -> Tensor:
    """H of each row, (rows, K) twice -> (rows,)."""
    student = student_logits.float() / STUDENT_TEMPERATURE
    return student.logsumexp(dim=-1) - (teacher_prob * student).sum(dim=-1)


def cross_entropy_rows(
    student: Tensor,
    teacher: Tensor,
    *,
    student_layer: Logits,
    teacher_layer: Logits,
    centre: Tensor,
    temperature: float,
) -> Tensor:
    """H of each pair of rows, in chunks: the logits of all rows never exist at once, and backward computes them anew.

    Args:
        student: (rows, bottleneck), with gradient.
        teacher: (rows, bottleneck), without.
        student_layer: student's last layer.
        teacher_layer: teacher's last layer.
        centre: (K,).
        temperature: of the teacher.

    Returns:
        (rows,) float32.
    """

    def chunk(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher_probabilities(teacher_layer(teacher_rows), centre, temperature)
        return cross_entropy(student_layer(student_rows), target)

    pairs = list(zip(student.split(CHUNK_ROWS), teacher.split(CHUNK_ROWS), strict=True))
    if len(pairs) == 1:
        return chunk(*pairs[0])
    return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs])


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
