"""GLARE: global, regional and local consistency (paper section 4).

    L      = L_glob + L_reg + L_loc1 + L_loc2                                                    (10)
    L_glob = mean over pairs of different views     H(g(cls_S), g'(cls_T))                        (4)
    L_reg  = mean over matched region patches       H(g(CA(z_r, Z, Z)), g'(CA'(z_r, Z'_R', Z'_R')))  (5, 6, 7)
    L_loc1 = mean over augmented patches            H(g(z_m), g'(z')),  same view                 (8)
    L_loc2 = mean over matched patches              H(g(z_s), g'(z'_h(s))),  other view           (9)

Symbols: g = ``head``, CA = ``cross_attention``, z = ``student.patches``, z' = ``teacher.patches``, primes are the
teacher's moving averages, h = ``geometry.match``, R and R' = ``Regions.index`` and ``.match_index``.

Readings of the paper that are choices:
* eqs. 7 and 9 are printed as sums; with a hundred patches a view they would swamp L_glob under weights of 1, so
  they are means over what is valid, then over the two directions. L_loc1 is normalised an image, as in iBOT;
* eq. 6 is printed with query z'_r and keys and values Z_R, while the text says that R' is read through the query
  region R. The text is the default (``region_target``); eq. 6 as printed and UDI's form are the other two;
* one head and one cross-attention for all levels, but a centre for each (cls, region, patch), as in iBOT and UDI.
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glare.features import Features
from glare.geometry import match
from glare.losses import (
    CENTRE_MOMENTUM,
    cross_entropy_rows,
    cross_view_entropy,
    masked_mean,
    teacher_probabilities,
    update_centre,
)
from glare.objectives.base import Objective, ProjectionHead, Terms
from glare.recipes import option
from glare.regions import RegionConfig, Regions, sample_regions
from glare.views import Views

LEVELS = ("cls", "region", "patch")
TERMS = ("glob", "reg", "loc1", "loc2")
DIRECTIONS = ((0, 1), (1, 0))
"""(student view, teacher view) of the two global views."""


@dataclass(frozen=True)
class GlareSettings:
    """The objective's settings; the defaults are the paper's."""

    terms: tuple[str, ...] = option(TERMS, "terms of the loss", choices=TERMS)
    prototypes: int = option(8192, "outputs of the projection head, K")
    head_hidden: int = option(2048, "width of the projection head")
    head_bottleneck: int = option(256, "width of its last layer's input")
    head_init: str = option(
        "random", "data: the fresh head is fitted to the first images, for short runs", choices=("random", "data")
    )
    region_target: str = option(
        "text",
        "what the teacher's cross-attention reads: R' through R, eq. 6 as printed, or all of Z' (UDI)",
        choices=("text", "eq6", "udi"),
    )
    min_overlap: float = option(0.0, "patches correspond only if their intersection over union is above this")
    local_queries: bool = option(False, "the patches of local views enter L_loc2 too")
    regions: RegionConfig = option(RegionConfig(), "how regions are drawn")


class CrossAttention(nn.Module):
    """CA of paper eq. 5, built as UDI's region attention: LN, multi-head attention, residual, LN.

    The output projection starts at zero, so that at first CA(z) = LN(LN(z)).
    """

    def __init__(self, dim: int, num_heads: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, query: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        """Read ``context`` through ``query``.

        Args:
            query: (b, q, d).
            context: (b, k, d), keys and values.
            valid: (b, k) bool, keys that count; a row without any reads all of them (and is to be left out later).
        """
        dim = query.shape[-1]
        query = self.norm1(query)
        to_query, to_context = self.qkv.weight.split([dim, 2 * dim])
        query_bias, context_bias = self.qkv.bias.split([dim, 2 * dim])
        q = self._heads(nn.functional.linear(query, to_query, query_bias))
        k, v = nn.functional.linear(self.norm1(context), to_context, context_bias).chunk(2, dim=-1)
        mask = None if valid is None else (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
        read = scaled_dot_product_attention(q, self._heads(k), self._heads(v), attn_mask=mask)
        out: Tensor = self.norm(self.proj(read.transpose(1, 2).flatten(2)) + query)
        return out

    def _heads(self, tokens: Tensor) -> Tensor:
        heads: Tensor = tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads


class GlareObjective(Objective):
    """The four terms, one shared head, one cross-attention and three centres."""

    def __init__(self, dim: int, num_heads: int, config: GlareSettings) -> None:
        super().__init__()
        self.config = config
        self.head = ProjectionHead(
            dim, hidden=config.head_hidden, bottleneck=config.head_bottleneck, prototypes=config.prototypes
        )
        self.cross_attention = CrossAttention(dim, num_heads)
        for level in LEVELS:
            self.register_buffer(f"centre_{level}", torch.zeros(config.prototypes))

    def centre(self, level: str) -> Tensor:
        """The centre (K,) of one of ``LEVELS``."""
        return self.get_buffer(f"centre_{level}")

    def update(self, batch_sums: dict[str, tuple[Tensor, Tensor]], *, momentum: float = CENTRE_MOMENTUM) -> None:
        """Move each centre towards the mean of this step's teacher logits."""
        for level, (total, rows) in batch_sums.items():
            moved = update_centre(self.centre(level), total / rows.clamp(min=1), momentum)
            self.centre(level).copy_(torch.where(rows > 0, moved, self.centre(level)))

    def forward(
        self,
        student: tuple[Features, Features],
        teacher: Features,
        views: Views,
        *,
        target: Self,
        temperature: float,
        generator: torch.Generator,
    ) -> Terms:
        """See ``Objective``."""
        step = _Step(self, target, student, teacher, views, temperature)
        terms: dict[str, Tensor] = {}
        if "glob" in self.config.terms:
            terms["glob"] = step.global_term()
        if "reg" in self.config.terms:
            terms["reg"] = step.regional_term(generator)
        if "loc1" in self.config.terms:
            terms["loc1"] = step.augmented_patch_term()
        if "loc2" in self.config.terms:
            terms["loc2"] = step.cross_view_patch_term()
        return Terms(terms, step.batch_sums, step.health)


class _Step:
    """The terms of one batch: what they share is computed once."""

    def __init__(
        self,
        objective: GlareObjective,
        target: GlareObjective,
        student: tuple[Features, Features],
        teacher: Features,
        views: Views,
        temperature: float,
    ) -> None:
        self.objective, self.target, self.temperature = objective, target, temperature
        self.student, self.local = student
        self.teacher, self.views = teacher, views
        crops = views.global_crops
        self.matches = [
            match(crops[a], crops[b], views.grid, min_iou=objective.config.min_overlap) for a, b in DIRECTIONS
        ]
        self.batch_sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.health = {"matched_share": torch.stack([valid for _, valid in self.matches]).float().mean()}
        self._teacher_patches: Tensor | None = None

    def global_term(self) -> Tensor:
        """L_glob, eq. 4: the [CLS] token of every student view against that of the other global views."""
        objective, target = self.objective, self.target
        cls = torch.cat([self.student.cls, self.local.cls])
        logits = objective.head.prototypes(objective.head(cls))
        with torch.no_grad():
            raw = target.head.prototypes(target.head(self.teacher.cls))
            prob = teacher_probabilities(raw, objective.centre("cls"), self.temperature)
        self.batch_sums["cls"] = raw.sum(dim=(0, 1)), raw.new_tensor(raw.shape[:2]).prod()
        marginal = prob.mean(dim=(0, 1))
        self.health["teacher_entropy"] = torch.special.entr(prob).sum(dim=-1).mean()
        self.health["marginal_entropy"] = torch.special.entr(marginal).sum()
        return cross_view_entropy(logits, prob)

    def augmented_patch_term(self) -> Tensor:
        """L_loc1, eq. 8: augmented patches of the student against the same, clean patches of the teacher."""
        mask = self.views.patch_mask
        entropy = self._patch_entropy(self.student.patches[mask], self.teacher_patches[mask])
        weight = 1 / mask.sum(dim=-1, keepdim=True).clamp(min=1).expand_as(mask)[mask].float()
        self.health["loc1_per_patch"] = masked_mean(entropy.detach(), mask.sum())
        return masked_mean(entropy * weight, mask.shape[0] * mask.shape[1])

    def cross_view_patch_term(self) -> Tensor:
        """L_loc2, eq. 9: every patch of a student view against the corresponding patch of the other teacher view."""
        terms = [
            self._corresponding(self.student.patches[a], b, found)
            for (a, b), found in zip(DIRECTIONS, self.matches, strict=True)
        ]
        if self.objective.config.local_queries:
            views, least = self.views, self.objective.config.min_overlap
            for a, b in product(range(len(views.local)), range(len(views.global_))):
                crops = views.local_crops[a], views.global_crops[b]
                found = match(*crops, views.local_grid, views.grid, min_iou=least)
                terms.append(self._corresponding(self.local.patches[a], b, found))
        return torch.stack(terms).mean()

    def _corresponding(self, student: Tensor, view: int, found: tuple[Tensor, Tensor]) -> Tensor:
        """Mean of H over the patches (b, n, d) of one student view that have a match in a teacher view."""
        index, valid = found
        image, _ = valid.nonzero(as_tuple=True)
        entropy = self._patch_entropy(student[valid], self.teacher_patches[view][image, index[valid]])
        return masked_mean(entropy, valid.sum())

    def regional_term(self, generator: torch.Generator) -> Tensor:
        """L_reg, eq. 7: region patches in the context of their view against what R' holds for them."""
        config, attention = self.objective.config, self.teacher.attention
        if attention is None:
            raise ValueError("the regional term needs Features.attention of the teacher")
        pairs = []
        for (a, b), found in zip(DIRECTIONS, self.matches, strict=True):
            regions = sample_regions(attention[a], found, self.views.grid, config.regions, generator=generator)
            pairs.append(self._regional_pairs(self.student.patches[a], self.teacher.patches[b], regions))
        self._add_up("region", torch.cat([teacher for _, teacher in pairs]))
        terms = [masked_mean(self._entropy(s, t, level="region"), len(s)) for s, t in pairs]
        return torch.stack(terms).mean()

    def _regional_pairs(self, student: Tensor, teacher: Tensor, regions: Regions) -> tuple[Tensor, Tensor]:
        """Bottleneck rows of the matched region patches: student's and teacher's, (rows, bottleneck) each."""
        objective, target, (b, m, size) = self.objective, self.target, regions.index.shape
        query = _take(student, regions.index.flatten(1))
        context = objective.cross_attention(query, student)
        with torch.no_grad():
            read = _read_target(
                target.cross_attention,
                query.detach(),
                student.detach(),
                teacher,
                regions,
                how=objective.config.region_target,
            )
            target_rows = target.head(read.view(b, m, size, -1)[regions.matched])
        return objective.head(context.view(b, m, size, -1)[regions.matched]), target_rows

    @property
    def teacher_patches(self) -> Tensor:
        """Bottleneck of all teacher patches (2, b, n, bottleneck), shared by both local terms and their centre."""
        if self._teacher_patches is None:
            with torch.no_grad():
                self._teacher_patches = self.target.head(self.teacher.patches)
            self._add_up("patch", self._teacher_patches.flatten(0, 2))
        return self._teacher_patches

    @torch.no_grad()
    def _add_up(self, level: str, rows: Tensor) -> None:
        """Sum of the teacher's logits of bottleneck ``rows``: the last layer is linear, so the logits of their sum."""
        self.batch_sums[level] = self.target.head.prototypes(rows.sum(dim=0)), rows.new_tensor(len(rows))

    def _patch_entropy(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self._entropy(self.objective.head(student), teacher, level="patch")

    def _entropy(self, student: Tensor, teacher: Tensor, *, level: str) -> Tensor:
        return cross_entropy_rows(
            student,
            teacher,
            student_layer=self.objective.head.prototypes,
            teacher_layer=self.target.head.prototypes,
            centre=self.objective.centre(level),
            temperature=self.temperature,
        )


def _take(patches: Tensor, index: Tensor) -> Tensor:
    """Patches (b, n, d) at ``index`` (b, r) -> (b, r, d)."""
    return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def _read_target(
    cross_attention: CrossAttention, query: Tensor, student: Tensor, teacher: Tensor, regions: Regions, *, how: str
) -> Tensor:
    """The teacher's side of eq. 6 in one of its three readings, for region queries (b, m * l, d)."""
    m = regions.index.shape[1]
    matched = _take(teacher, regions.match_index.flatten(1))  # R', or patch 0 where there is no match
    if how == "udi":
        udi: Tensor = cross_attention(matched, teacher)
        return udi

    def by_region(rows: Tensor) -> Tensor:
        split: Tensor = rows.unflatten(1, (m, -1)).flatten(0, 1)
        return split

    if how == "text":
        read = cross_attention(by_region(query), by_region(matched), regions.matched.flatten(0, 1))
    else:
        region = by_region(_take(student, regions.index.flatten(1)))
        read = cross_attention(by_region(matched), region, regions.valid.flatten(0, 1))
    whole: Tensor = read.unflatten(0, (-1, m)).flatten(1, 2)
    return whole
