"""One step of pre-training in the ordinary manner of research code, against which the package's own way is measured.

The loss is that of ``objectives.glare`` (equations there) to the last term, centre and random draw; only the way to it
is that of DINO, iBOT and UDI:

* one forward pass of an ordinary model of transformers for each crop size and network (DINO's MultiCropWrapper);
* the student under SDPA; the teacher with attention maps of all blocks kept, since SDPA gives none and the regions
  need those of the last block;
* the logits over all K prototypes of every token, whatever a term then uses of them: whole tensors, kept for
  backward, then gather and masked means;
* the teacher is a complete second network, and its moving average a loop over all parameters, frozen ones too.

Where research code merely waits (a host synchronisation for every gradient norm, ``log_softmax`` anew for each pair of
views) this code does not. Two things differ from theirs since the loss must be the same: the logits are float32 under
autocast too, as the package's are, and draws are explicit.

Processes, checkpoints and loss scaling (float16) are left out.
"""

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax

from glare.draws import Draws
from glare.features import Features
from glare.geometry import match
from glare.losses import STUDENT_TEMPERATURE, masked_mean, teacher_probabilities
from glare.objectives.base import Terms
from glare.objectives.glare import GlareObjective
from glare.objectives.places import DIRECTIONS
from glare.regions import Regions, sample_regions
from glare.student import Student, without_adapters
from glare.views import Views
from glare.weight_decay import parameter_groups


class PlainNetwork(nn.Module):
    """A copy of a Student that shares nothing with it: an ordinary ViT of transformers, and the objective's heads.

    ``attention`` is the implementation transformers is to use, ``sdpa`` or ``eager``. Raises ValueError for what the
    plain way does not have.
    """

    def __init__(self, student: Student, *, attention: str) -> None:
        super().__init__()
        _check(student)
        copied = deepcopy(student)
        self.anchor = copied.anchor
        self.backbone = copied.backbone
        self.backbone.set_attn_implementation(attention)
        self.objective: GlareObjective = copied.objective  # type: ignore[assignment] # checked above
        asked = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if asked else {}

    def forward(self, views: Tensor, *, attention: bool = False) -> Features:
        """Features of views (v, b, 3, h, w) of one size in one pass; with ``attention`` under ``eager`` only."""
        output = self.backbone(views.flatten(0, 1), output_attentions=attention, **self.options)
        tokens = output.last_hidden_state.unflatten(0, views.shape[:2])
        side = self.backbone.config.patch_size
        patches = (views.shape[-2] // side) * (views.shape[-1] // side)
        has_prefix = tokens.shape[2] > patches
        cls = tokens[:, :, 0] if has_prefix else tokens.mean(dim=2)
        if not attention:
            return Features(cls, tokens[:, :, -patches:])
        maps = output.attentions[-1]
        row = maps[:, :, 0].clone() if has_prefix else maps.mean(dim=2)  # a copy, so that the maps are freed
        return Features(cls, tokens[:, :, -patches:], row[..., -patches:].unflatten(0, views.shape[:2]))


def _check(student: Student) -> None:
    objective = student.objective
    if not isinstance(objective, GlareObjective):
        raise ValueError(f"the plain way has no {type(objective).__name__}; give a GlareObjective")
    if student.mask_token is not None:
        raise ValueError("the plain way has no mask token; give a patch_augmentation that changes pixels")
    if objective.config.region_target != "text":
        raise ValueError(f"the plain way has no region_target {objective.config.region_target!r}; give 'text'")
    if objective.config.local_queries:
        raise ValueError("the plain way has no local_queries; leave them out")


@dataclass(frozen=True)
class PlainState:
    """Student, teacher and optimizer of the plain way; their tensors change at every step."""

    student: PlainNetwork
    teacher: PlainNetwork
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, student: Student, teacher: Student, *, learning_rate: float, weight_decay: float) -> Self:
        """Copies of both, and a fresh AdamW for what trains. Raises ValueError for what the plain way does not have."""
        plain = PlainNetwork(student, attention="sdpa")
        target = PlainNetwork(teacher, attention="eager").requires_grad_(False)
        optimizer = torch.optim.AdamW(parameter_groups(plain, weight_decay), lr=learning_rate)
        return cls(plain, target, optimizer)


def plain_step(
    state: PlainState,
    views: Views,
    *,
    temperature: float,
    momentum: float,
    clip: float,
    draws: Draws,
    dtype: torch.dtype = torch.float32,
) -> Terms:
    """One whole step: both forward passes, loss, backward, optimizer, teacher and centres.

    Args:
        state: changed in place.
        views: on the device of ``state``.
        temperature: of the teacher.
        momentum: of the teacher's moving average.
        clip: largest gradient norm of each parameter.
        draws: of the regions.
        dtype: of autocast, float32 (none) or bfloat16.
    """
    with torch.autocast(views.global_.device.type, dtype=dtype, enabled=dtype != torch.float32):
        teacher = teacher_features(state.teacher, views)
        student = student_features(state.student, views)
        terms = loss_terms(state, student, teacher, views, temperature=temperature, draws=draws)
        if state.student.anchor:
            terms.losses["anchor"] = anchor_term(state.student, student[0], views)
    terms.total.backward()
    update(state, terms, momentum=momentum, clip=clip)
    return terms


@torch.no_grad()
def teacher_features(teacher: PlainNetwork, views: Views) -> Features:
    """Features of the clean global views, with the [CLS] attention of the last block."""
    return teacher(views.global_, attention=True)  # type: ignore[no-any-return]


def student_features(student: PlainNetwork, views: Views) -> list[Features]:
    """Features of the augmented global views and, where there are any, of the local views: a pass each."""
    return [student(group) for group in (views.augmented, views.local) if len(group)]


def anchor_term(student: PlainNetwork, global_: Features, views: Views) -> Tensor:
    """``Student.anchor`` times the mean of 1 - cosine to the patches of the clean views without adapters."""
    with torch.no_grad(), without_adapters(student.backbone):
        untouched = student(views.global_)
    distance = 1 - cosine_similarity(global_.patches.float(), untouched.patches.float(), dim=-1)
    return student.anchor * distance.mean()


def loss_terms(
    state: PlainState,
    student: Sequence[Features],
    teacher: Features,
    views: Views,
    *,
    temperature: float,
    draws: Draws,
) -> Terms:
    """The objective's terms and batch sums; ``student`` and ``teacher`` from the functions above."""
    heads = _Heads(state.student.objective, state.teacher.objective, temperature)
    config, crops = heads.student.config, views.global_crops
    matches = [match(crops[a], crops[b], views.grid, min_iou=config.min_overlap) for a, b in DIRECTIONS]
    losses: dict[str, Tensor] = {}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    if "glob" in config.terms:
        losses["glob"], sums["cls"] = _global_term(heads, torch.cat([part.cls for part in student]), teacher.cls)
    if "reg" in config.terms:
        losses["reg"], sums["region"] = _regional_term(heads, student[0], teacher, views, matches, draws)
    if "loc1" in config.terms or "loc2" in config.terms:
        log_prob = heads.log_prob(student[0].patches)
        logits, prob = heads.targets(teacher.patches, "patch")
        sums["patch"] = logits.sum(dim=(0, 1, 2)), logits.new_tensor(logits.shape[:3]).prod()
        if "loc1" in config.terms:
            losses["loc1"] = _augmented_patch_term(log_prob, prob, views.patch_mask)
        if "loc2" in config.terms:
            losses["loc2"] = _cross_view_patch_term(log_prob, prob, matches)
    return Terms(losses, sums)


def update(state: PlainState, terms: Terms, *, momentum: float, clip: float) -> None:
    """What follows backward: gradients clipped one by one, AdamW, the teacher's average and the centres."""
    for parameter in state.student.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            parameter.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
    state.optimizer.step()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for ours, theirs in zip(state.teacher.parameters(), state.student.parameters(), strict=True):
            ours.mul_(momentum).add_((1 - momentum) * theirs)
    state.student.objective.update(terms.batch_sums)


@dataclass(frozen=True)
class _Heads:
    """Student's and teacher's heads over whole tensors of tokens (..., d)."""

    student: GlareObjective
    teacher: GlareObjective
    temperature: float

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Log p_S of every token, (..., K)."""
        head = self.student.head
        return log_softmax(head.prototypes(head(tokens)) / STUDENT_TEMPERATURE, dim=-1)

    @torch.no_grad()
    def targets(self, tokens: Tensor, level: str) -> tuple[Tensor, Tensor]:
        """Raw logits and p_T of every token, (..., K) each."""
        head = self.teacher.head
        logits = head.prototypes(head(tokens))
        return logits, teacher_probabilities(logits, self.student.centre(level), self.temperature)


def _cross_entropy(log_prob: Tensor, prob: Tensor) -> Tensor:
    """(..., K) twice -> (...,)."""
    return -(prob * log_prob).sum(dim=-1)


def _global_term(heads: _Heads, student: Tensor, teacher: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """L_glob, eq. 4, as DINO: a loop over all pairs of different views."""
    log_prob = heads.log_prob(student)
    logits, prob = heads.targets(teacher, "cls")
    entropies = [
        _cross_entropy(ours, target).mean()
        for place, target in enumerate(prob)
        for view, ours in enumerate(log_prob)
        if view != place
    ]
    return torch.stack(entropies).mean(), (logits.sum(dim=(0, 1)), logits.new_tensor(logits.shape[:2]).prod())


def _augmented_patch_term(log_prob: Tensor, prob: Tensor, mask: Tensor) -> Tensor:
    """L_loc1, eq. 8, as iBOT: the cross-entropy of all patches, then the mean over the augmented ones of an image."""
    entropy = _cross_entropy(log_prob, prob) * mask
    return (entropy.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean()


def _cross_view_patch_term(log_prob: Tensor, prob: Tensor, matches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """L_loc2, eq. 9: a target for every patch, gathered from the other view, then the mean over those that match."""
    means = []
    for (a, b), (index, valid) in zip(DIRECTIONS, matches, strict=True):
        target = prob[b].gather(1, index.unsqueeze(-1).expand(-1, -1, prob.shape[-1]))
        means.append(masked_mean(_cross_entropy(log_prob[a], target) * valid, valid.sum()))
    return torch.stack(means).mean()


def _regional_term(
    heads: _Heads,
    student: Features,
    teacher: Features,
    views: Views,
    matches: Sequence[tuple[Tensor, Tensor]],
    draws: Draws,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """L_reg, eq. 7: every place of the padded regions goes through attention and head, then the mean over matches."""
    if teacher.attention is None:
        raise ValueError("the regional term needs Features.attention of the teacher")
    means, totals, rows = [], [], []
    for (a, b), found in zip(DIRECTIONS, matches, strict=True):
        regions = sample_regions(teacher.attention[a], found, views.grid, heads.student.config.regions, draws=draws)
        query = _take(student.patches[a], regions.index)
        log_prob = heads.log_prob(heads.student.cross_attention(query, student.patches[a]))
        logits, prob = heads.targets(_read_matched(heads.teacher, query, teacher.patches[b], regions), "region")
        matched = regions.matched.flatten(1)
        means.append(masked_mean(_cross_entropy(log_prob, prob) * matched, matched.sum()))
        totals.append(logits[matched].sum(dim=0))
        rows.append(matched.sum().to(logits))
    return torch.stack(means).mean(), (torch.stack(totals).sum(dim=0), torch.stack(rows).sum())


@torch.no_grad()
def _read_matched(teacher: GlareObjective, query: Tensor, patches: Tensor, regions: Regions) -> Tensor:
    """The teacher's side of eq. 6: region queries (b, m * l, d), each reading its own R' alone."""
    b, m, size = regions.index.shape
    by_region = (b * m, size, query.shape[-1])
    context = _take(patches, regions.match_index).view(by_region)
    read = teacher.cross_attention(query.view(by_region), context, regions.matched.flatten(0, 1))
    return read.view_as(query)  # type: ignore[no-any-return]


def _take(patches: Tensor, index: Tensor) -> Tensor:
    """Patches (b, n, d) at ``index`` (b, m, l) -> (b, m * l, d)."""
    return patches.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
