"""GLARE: global, regional and local consistency (paper section 4).

    L      = L_glob + L_reg + L_loc1 + L_loc2                                                    (10)
    L_glob = mean over pairs of different views     H(g(cls_S), g'(cls_T))                        (4)
    L_reg  = mean over matched region patches       H(g(CA(z_r, Z, Z)), g'(CA'(z_r, Z'_R', Z'_R')))  (5, 6, 7)
    L_loc1 = mean over augmented patches            H(g(z_m), g'(z')),  same view                 (8)
    L_loc2 = mean over matched patches              H(g(z_s), g'(z'_h(s))),  other view           (9)

Symbols: g = ``head``, CA = ``cross_attention``, z = ``student.patches``, z' = ``teacher.patches``, primes are the
teacher's moving averages, h = ``geometry.match``, R and R' = ``Regions.index`` and ``.match_index``; they are found
before the terms, in ``places``.

Readings of the paper that are choices:
* eqs. 7 and 9 are printed as sums; with a hundred patches a view they would swamp L_glob under weights of 1, so
  they are means over what is valid, then over the two directions. L_loc1 is normalised an image, as in iBOT;
* eq. 6 is printed with query z'_r and keys and values Z_R, while the text says that R' is read through the query
  region R. The text is the default (``region_target``); eq. 6 as printed and UDI's form are the other two;
* one head and one cross-attention for all levels, but a centre for each (cls, region, patch), as in iBOT and UDI.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glare import ranges
from glare.draws import Draws
from glare.features import Features
from glare.losses import (
    CENTRE_MOMENTUM,
    cross_view_entropy,
    masked_mean,
    summed_cross_entropy,
    teacher_probabilities,
    update_centre,
)
from glare.objectives.base import Objective, ProjectionHead, Terms
from glare.objectives.places import DIRECTIONS, Counts, Match, Places, find_matches, find_regions
from glare.recipes import option
from glare.regions import RegionConfig, Regions, joined
from glare.views import Views

LEVELS = ("cls", "region", "patch")
TERMS = ("glob", "reg", "loc1", "loc2")


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

    def __post_init__(self) -> None:
        ranges.check(self)


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

    head: ProjectionHead

    def __init__(self, dim: int, num_heads: int, config: GlareSettings) -> None:
        super().__init__()
        self.config = config
        self.head = ProjectionHead(
            dim, hidden=config.head_hidden, bottleneck=config.head_bottleneck, prototypes=config.prototypes
        )
        self.cross_attention = CrossAttention(dim, num_heads).requires_grad_("reg" in config.terms)
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

    def places(self, teacher: Features, views: Views, draws: Draws) -> Places:
        """See ``Objective``."""
        config = self.config
        matches = find_matches(views, min_overlap=config.min_overlap, local_queries=config.local_queries)
        wanted = "reg" in config.terms
        regions = find_regions(teacher, matches, views, config.regions, draws) if wanted else ()
        return Places(views.patch_mask, matches, regions)

    def forward(
        self,
        student: tuple[Features, Features],
        teacher: Features,
        places: Places,
        *,
        counts: Counts,
        target: Self,
        temperature: float,
    ) -> Terms:
        """See ``Objective``."""
        step = _Step(self, target, student, teacher, places, counts, temperature)
        terms: dict[str, Tensor] = {}
        if "glob" in self.config.terms:
            terms["glob"] = step.global_term()
        if "reg" in self.config.terms:
            terms["reg"] = step.regional_term()
        pairs = {}
        if "loc1" in self.config.terms:
            pairs["loc1"] = step.augmented_pairs()
        if "loc2" in self.config.terms:
            pairs["loc2"] = step.corresponding_pairs()
        if pairs:
            terms |= step.local_terms(pairs)
        return Terms(terms, step.batch_sums, step.health, step.marginal)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of patches whose cross-entropy enters a term: rows of flattened student and teacher patches, and weights.

    All are (pairs,); the weights make the weighted sum of H the term.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor


class _Step:
    """The terms of one batch: what they share is computed once."""

    def __init__(
        self,
        objective: GlareObjective,
        target: GlareObjective,
        student: tuple[Features, Features],
        teacher: Features,
        places: Places,
        counts: Counts,
        temperature: float,
    ) -> None:
        self.objective, self.target, self.temperature = objective, target, temperature
        self.student, self.local = student
        self.teacher, self.places, self.counts = teacher, places, counts
        self.share = teacher.cls.shape[1] / counts["images"].squeeze()
        self.batch_sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.marginal: tuple[Tensor, Tensor] | None = None
        valid = torch.stack([m.valid for m in places.matches[: len(DIRECTIONS)]])
        self.health = {"matched_share": valid.float().mean() * self.share}
        self.prototypes = objective.head.last_layer.matrix()
        with torch.no_grad():
            self.target_prototypes = target.head.last_layer.matrix()

    def global_term(self) -> Tensor:
        """L_glob, eq. 4: the [CLS] token of every student view against that of the other global views."""
        objective, target = self.objective, self.target
        cls = torch.cat([self.student.cls, self.local.cls])
        logits = _logits(objective.head(cls), self.prototypes)
        with torch.no_grad():
            raw = _logits(target.head(self.teacher.cls), self.target_prototypes)
            prob = teacher_probabilities(raw, objective.centre("cls"), self.temperature)
        self.batch_sums["cls"] = raw.sum(dim=(0, 1)), raw.new_tensor(raw.shape[:2]).prod()
        self.marginal = prob.sum(dim=(0, 1)), self.batch_sums["cls"][1]
        self.health["teacher_entropy"] = torch.special.entr(prob).sum(dim=-1).mean() * self.share
        return cross_view_entropy(logits, prob) * self.share

    def augmented_pairs(self) -> _Pairs:
        """L_loc1, eq. 8: augmented patches of the student against the same, clean patches of the teacher."""
        mask = self.places.augmented
        weight = 1 / mask.sum(dim=-1, keepdim=True).clamp(min=1).expand_as(mask)[mask]
        patches = mask.flatten().nonzero().squeeze(1)
        return _Pairs(patches, patches, weight / (len(mask) * self.counts["images"]))

    def corresponding_pairs(self) -> _Pairs:
        """L_loc2, eq. 9: every patch of a student view against the corresponding patch of the other teacher view."""
        matches = self.places.matches
        weights = 1 / (self.counts["matched"].clamp(min=1) * len(matches))
        pairs = [self._corresponding(*pair) for pair in zip(matches, weights, strict=True)]
        return _Pairs(
            torch.cat([pair.student for pair in pairs]),
            torch.cat([pair.teacher for pair in pairs]),
            torch.cat([pair.weight for pair in pairs]),
        )

    def _corresponding(self, match: Match, weight: Tensor) -> _Pairs:
        """The patches of one student view that have a match in a teacher view, each with this weight."""
        (b, n), (num_global, _, global_n) = match.valid.shape, self.teacher.patches.shape[:3]
        before = b * (min(match.view, num_global) * global_n + max(match.view - num_global, 0) * n)
        image, patch = match.valid.nonzero(as_tuple=True)
        targets = (match.target * b + image) * global_n + match.index[match.valid]
        return _Pairs(before + image * n + patch, targets, weight.expand(len(image)))

    def local_terms(self, pairs: dict[str, _Pairs]) -> dict[str, Tensor]:
        """L_loc1 and L_loc2 by name: the student's head runs once on every patch that either needs."""
        patches = self.student.patches.flatten(0, 2)
        if self.objective.config.local_queries:
            patches = torch.cat([patches, self.local.patches.flatten(0, 2)])
        with torch.no_grad():
            targets = self.target.head(self.teacher.patches).flatten(0, 2)
            self._add_up("patch", targets)
        rows, places = _once(patches, [pair.student for pair in pairs.values()])
        bottleneck = self.objective.head(rows)
        terms = {}
        for (name, pair), place in zip(pairs.items(), places, strict=True):
            student = bottleneck.index_select(0, place)
            terms[name], entropy = self._entropy(student, targets[pair.teacher], pair.weight, level="patch")
            if name == "loc1":
                self.health["loc1_per_patch"] = masked_mean(entropy, self.counts["augmented"].squeeze())
        return terms

    def regional_term(self) -> Tensor:
        """L_reg, eq. 7: region patches in the context of their view against what R' holds for them."""
        config = self.objective.config
        regions = joined(self.places.regions)  # of both directions, view-major as the patches of the student
        patches = self.student.patches.flatten(0, 1)
        with torch.no_grad():
            teacher = self.teacher.patches[[b for _, b in DIRECTIONS]].flatten(0, 1)
            read = _read_target(
                self.target.cross_attention, patches.detach(), teacher, regions, how=config.region_target
            )
            targets = self.target.head(read[regions.matched])
            self._add_up("region", targets)
        image, _, _ = regions.matched.nonzero(as_tuple=True)
        place = image * patches.shape[1] + regions.index[regions.matched]
        # regions overlap: what a patch reads from its whole view is the same in each of them
        rows, (where,) = _once(self.objective.cross_attention(patches, patches).flatten(0, 1), [place])
        student = self.objective.head(rows).index_select(0, where)
        direction = image // self.student.patches.shape[1]
        weight = 1 / (self.counts["region"].clamp(min=1) * len(DIRECTIONS))[direction]
        return self._entropy(student, targets, weight, level="region")[0]

    @torch.no_grad()
    def _add_up(self, level: str, rows: Tensor) -> None:
        """Sum of the teacher's logits of bottleneck ``rows``: the last layer is linear, so the logits of their sum."""
        self.batch_sums[level] = _logits(rows.sum(dim=0), self.target_prototypes), rows.new_tensor(len(rows))

    def _entropy(self, student: Tensor, teacher: Tensor, weight: Tensor, *, level: str) -> tuple[Tensor, Tensor]:
        return summed_cross_entropy(
            student,
            teacher,
            weight,
            student_prototypes=self.prototypes,
            teacher_prototypes=self.target_prototypes,
            centre=self.objective.centre(level),
            temperature=self.temperature,
        )


def _once(rows: Tensor, wanted: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Those of ``rows`` (n, d) that any of the indices ``wanted`` names, each once, and the indices into them."""
    needed = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for index in wanted:
        needed[index] = True
    place = needed.cumsum(0) - 1
    return rows.index_select(0, needed.nonzero().squeeze(1)), [place[index] for index in wanted]


def _logits(rows: Tensor, prototypes: Tensor) -> Tensor:
    """(..., bottleneck) -> (..., K), float32."""
    with torch.autocast(rows.device.type, enabled=False):
        return nn.functional.linear(rows.float(), prototypes.float())


def _take(patches: Tensor, index: Tensor) -> Tensor:
    """Patches (b, n, d) at ``index`` (b, r) -> (b, r, d)."""
    return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def _read_target(
    cross_attention: CrossAttention, student: Tensor, teacher: Tensor, regions: Regions, *, how: str
) -> Tensor:
    """The teacher's side of eq. 6 in one of its three readings, for patches (b, n, d): (b, m, l, d)."""
    b, m, size = regions.index.shape
    query = _take(student, regions.index.flatten(1))
    matched = _take(teacher, regions.match_index.flatten(1))  # R', or patch 0 where there is no match

    def by_region(rows: Tensor) -> Tensor:
        return rows.view(b * m, size, -1)

    if how == "udi":
        read = cross_attention(matched, teacher)
    elif how == "text":
        read = cross_attention(by_region(query), by_region(matched), regions.matched.flatten(0, 1))
    else:
        read = cross_attention(by_region(matched), by_region(query), regions.valid.flatten(0, 1))
    whole: Tensor = read.view(b, m, size, -1)
    return whole
