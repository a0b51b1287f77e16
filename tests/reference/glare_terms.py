"""The equations of paper section 4, one view, image, patch and attention head at a time, in float64.

Parameters come as state dicts with the names of DINO's projection head and UDI's region attention. A region
is a plain list of patch numbers; correspondence is a list with None where a patch has no counterpart.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
Correspondence = Sequence[int | None]

STUDENT_TEMPERATURE = 0.1


def softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def entropy(student_logits: Tensor, teacher_logits: Tensor, centre: Tensor, temperature: float) -> float:
    """H = -sum_k p_teacher[k] log p_student[k] of one pair of logit vectors (K,)."""
    teacher = softmax(((teacher_logits.double() - centre.double()) / temperature).tolist())
    student = softmax((student_logits.double() / STUDENT_TEMPERATURE).tolist())
    return -sum(t * math.log(s) for t, s in zip(teacher, student, strict=True))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.special.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, p: Parameters, name: str) -> Tensor:
    """LayerNorm of one token (d,)."""
    centred = x - x.mean()
    scaled = centred / (centred.pow(2).mean() + 1e-6).sqrt()
    return scaled * p[f"{name}.weight"].double() + p[f"{name}.bias"].double()


def linear(x: Tensor, p: Parameters, name: str) -> Tensor:
    return p[f"{name}.weight"].double() @ x + p[f"{name}.bias"].double()


def head_logits(token: Tensor, p: Parameters) -> Tensor:
    """g_lambda of one token: (d,) -> (K,)."""
    x = token.double()
    x = linear(gelu(linear(gelu(linear(x, p, "head.mlp.0")), p, "head.mlp.2")), p, "head.mlp.4")
    x = x / x.norm()
    length, direction = p["head.last_layer.weight_g"].double(), p["head.last_layer.weight_v"].double()
    return torch.stack([g * (v @ x) / v.norm() for g, v in zip(length[:, 0], direction, strict=True)])


def cross_attention(query: Tensor, context: Sequence[Tensor], p: Parameters, num_heads: int) -> Tensor:
    """CA(query, context, context) of eq. 5 for one query token (d,), as UDI builds it.

    LN of every token; for each head softmax(tau q.k) v; output projection; residual of the normed query; LN.
    """
    dim = len(query)
    width = dim // num_heads
    x = layer_norm(query.double(), p, "cross_attention.norm1")
    normed = [layer_norm(token.double(), p, "cross_attention.norm1") for token in context]
    q = linear(x, p, "cross_attention.qkv")[:dim]
    keys = [linear(token, p, "cross_attention.qkv")[dim : 2 * dim] for token in normed]
    values = [linear(token, p, "cross_attention.qkv")[2 * dim :] for token in normed]
    read = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = softmax([float(q[part] @ key[part]) * width**-0.5 for key in keys])
        read.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
    return layer_norm(x + linear(torch.cat(read), p, "cross_attention.proj"), p, "cross_attention.norm")


def mean(values: Sequence[float]) -> float:
    """0 where there is nothing to average: a term without pairs is absent from the sum of losses."""
    return sum(values) / len(values) if values else 0.0


def global_term(
    student: Parameters,
    teacher: Parameters,
    views: Sequence[Tensor],
    targets: Tensor,
    centre: Tensor,
    temperature: float,
) -> float:
    """L_glob, eq. 4. ``views``: [CLS] (b, d) of each student view; ``targets`` (2, b, d)."""
    terms = []
    for q in range(2):
        for v, view in enumerate(views):
            if v == q:
                continue
            batch = [
                entropy(head_logits(s, student), head_logits(t, teacher), centre, temperature)
                for s, t in zip(view, targets[q], strict=True)
            ]
            terms.append(mean(batch))
    return mean(terms)


def augmented_patch_term(
    student: Parameters,
    teacher: Parameters,
    z: Tensor,
    z_teacher: Tensor,
    mask: Tensor,
    centre: Tensor,
    temperature: float,
) -> float:
    """L_loc1, eq. 8 with iBOT's normalisation. Patches (2, b, n, d) and mask (2, b, n)."""
    views = []
    for view in range(2):
        images = []
        for image in range(z.shape[1]):
            total, count = 0.0, 0
            for patch in range(z.shape[2]):
                if mask[view, image, patch]:
                    s = head_logits(z[view, image, patch], student)
                    t = head_logits(z_teacher[view, image, patch], teacher)
                    total += entropy(s, t, centre, temperature)
                    count += 1
            images.append(total / max(1, count))
        views.append(mean(images))
    return mean(views)


def cross_view_patch_term(
    student: Parameters,
    teacher: Parameters,
    z: Tensor,
    z_teacher: Tensor,
    matches: Mapping[tuple[int, int], Sequence[Correspondence]],
    centre: Tensor,
    temperature: float,
) -> float:
    """L_loc2, eq. 9. ``matches[a, b][image]``: the correspondence from student view a to teacher view b."""
    directions = []
    for a, b in ((0, 1), (1, 0)):
        terms = []
        for image, correspondence in enumerate(matches[a, b]):
            for patch, other in enumerate(correspondence):
                if other is not None:
                    s = head_logits(z[a, image, patch], student)
                    t = head_logits(z_teacher[b, image, other], teacher)
                    terms.append(entropy(s, t, centre, temperature))
        directions.append(mean(terms))
    return mean(directions)


def regional_pairs(
    student: Parameters,
    teacher: Parameters,
    z: Tensor,
    z_teacher: Tensor,
    region: Sequence[int],
    correspondence: Correspondence,
    *,
    num_heads: int,
    reading: str,
) -> list[tuple[Tensor, Tensor]]:
    """Logits of (z~_r, z~'_r) for one region R of one view: patches of R without a counterpart have no pair.

    ``z`` (n, d) of the student's view, ``z_teacher`` (n, d) of the teacher's other view.
    """
    matched = [r for r in region if correspondence[r] is not None]
    counterparts = [correspondence[r] for r in matched]
    pairs = []
    for r, other in zip(matched, counterparts, strict=True):
        mine = cross_attention(z[r], list(z), student, num_heads)
        if reading == "text":  # R' read through the query region R
            theirs = cross_attention(z[r], [z_teacher[t] for t in counterparts], teacher, num_heads)
        elif reading == "eq6":  # as printed: CA(z'_r, Z_R, Z_R)
            theirs = cross_attention(z_teacher[other], [z[k] for k in region], teacher, num_heads)
        else:  # UDI: everything from the teacher's view
            theirs = cross_attention(z_teacher[other], list(z_teacher), teacher, num_heads)
        pairs.append((head_logits(mine, student), head_logits(theirs, teacher)))
    return pairs


def regional_term(
    student: Parameters,
    teacher: Parameters,
    z: Tensor,
    z_teacher: Tensor,
    matches: Mapping[tuple[int, int], Sequence[Correspondence]],
    regions: Mapping[tuple[int, int], Sequence[Sequence[Sequence[int]]]],
    centre: Tensor,
    temperature: float,
    *,
    num_heads: int,
    reading: str,
) -> tuple[float, list[Tensor]]:
    """L_reg, eq. 7, and the teacher's logits that entered it. ``regions[a, b][image]``: lists of patches."""
    directions, seen = [], []
    for a, b in ((0, 1), (1, 0)):
        terms = []
        for image, of_image in enumerate(regions[a, b]):
            for region in of_image:
                pairs = regional_pairs(
                    student,
                    teacher,
                    z[a, image],
                    z_teacher[b, image],
                    region,
                    matches[a, b][image],
                    num_heads=num_heads,
                    reading=reading,
                )
                terms += [entropy(s, t, centre, temperature) for s, t in pairs]
                seen += [t for _, t in pairs]
        directions.append(mean(terms))
    return mean(directions), seen
