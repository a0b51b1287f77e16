"""What a pre-training step computes, sends between GPUs and keeps for its backward pass, counted from shapes alone.

FLOPs are those of matrix products, attention included, two for a multiply-add, as model FLOP utilisation counts them
(Chowdhery et al. 2022, PaLM, appendix B). Work done twice is no part of them: the scores that FlashAttention computes
anew in its backward pass.

With F the FLOPs of a layer's forward pass, its backward pass costs F for the gradient of its input and F for that of
its weight. Adapters make the backbone cheap to differentiate, for frozen weights need no gradient, and nothing below
the first adapter needs any:

                                frozen    trained
    linear layer                   F         2F
    attention                     2F         2F
    block 0 below its adapter      0         2F
    adapter                        -         2F, in block 0 3F/2: its input needs no gradient
    patch embedding                0         F
"""

from dataclasses import dataclass
from typing import Any, Self

from glare.objectives.glare import GlareSettings
from glare.views import NUM_GLOBAL, ViewConfig

PREFIX = {"deit": 2, "ijepa": 0}
"""Model type -> class and distillation tokens, where that is not one class token."""

MATCHED, MATCHED_IN_REGIONS, MATCHED_OF_LOCAL, MATCHED_OF_LOCAL_IN_ANY = 0.73, 0.88, 0.77, 0.91
"""Share of patches with a correspondence, for square images and the default areas of the views: of those of a global
view in the other one, of those of a region, and of those of a local view in a global one and in either of both."""

SPREAD = 0.56
"""Share of a view's patches over which its regions spread: they overlap as if the patches of each were drawn from so
many. For sides of 3 to 7 patches, grids of 12 to 16 and start patches anywhere (an attention of random numbers); there
it gives the patches that up to 12 regions hold to 7 %, and too few of more regions (15 % at 24). Heads that attend to
the same places overlap more: the six of DINOv2-S hold a fifth less on aerial images."""

Groups = tuple[tuple[int, int], ...]
"""(views an image, tokens a view) of each size of view."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a ViT, its UniAdapters and its projection head.

    ``width``: of a token, d. ``mlp_width``: between the layers of the MLP, two, or three where it is ``gated``
    (SwiGLU). ``patch``: side in px. ``prefix``: number of class, distillation and register tokens. ``rank``: of the
    adapters; 0 for a ViT without them, of which every weight trains (``adapter: full``). ``place``: of the adapters,
    after each ``attention`` layer or each ``block``. ``prototypes``: K.
    """

    blocks: int
    width: int
    mlp_width: int
    heads: int
    patch: int
    prefix: int
    gated: bool = False
    rank: int = 64
    place: str = "attention"
    head_hidden: int = 2048
    head_bottleneck: int = 256
    prototypes: int = 8192

    @classmethod
    def of(cls, config: Any, recipe: Any) -> Self:
        """The shape of a ViT's configuration (transformers) under a recipe of ``glare pretrain``.

        A model that already has adapters keeps them, whatever the recipe's rank; replace ``rank`` then.
        Raises ValueError for an adapter whose arithmetic is not known here.
        """
        if recipe.adapter not in ("uniadapter", "full"):
            raise ValueError(f"the arithmetic of adapter {recipe.adapter!r} is not known, only uniadapter's and full's")
        return cls(
            blocks=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=_mlp_width(config),
            heads=config.num_attention_heads,
            patch=config.patch_size,
            prefix=PREFIX.get(config.model_type, 1) + getattr(config, "num_register_tokens", 0),
            gated=_is_gated(config),
            rank=recipe.rank if recipe.adapter == "uniadapter" else 0,
            place=recipe.adapter_place,
            head_hidden=recipe.glare.head_hidden,
            head_bottleneck=recipe.glare.head_bottleneck,
            prototypes=recipe.glare.prototypes,
        )


@dataclass(frozen=True)
class Rows:
    """What chance decides about a step's arithmetic, per image.

    Pairs of rows that enter the loss: of ``augmented`` patches (L_loc1), of ``matched`` patches (L_loc2, both
    directions, and with ``local_queries`` those of local views, once for each global view) and of matched patches of
    ``region``s (L_reg, both directions). The student's head sees a patch once, however many pairs it is in:
    ``patches`` are those that L_loc1 or L_loc2 needs, ``region_patches`` those that any region needs.
    """

    augmented: float
    matched: float
    region: float
    patches: float
    region_patches: float

    @classmethod
    def expected(cls, shape: Shape, views: ViewConfig, objective: GlareSettings, *, matched: float = MATCHED) -> Self:
        """The mean rows of an image; ``matched`` is the share of patches that a run logs as ``matched_share``.

        The shares in regions and local views are those of square images and the default areas (see ``SPREAD``).
        """
        side = views.global_size // shape.patch
        low, high = (min(side, limit) for limit in (objective.regions.min_side, objective.regions.max_side))
        changed = views.patch_prob * sum(views.patch_ratio) / 2 if views.patch_augmentation != "none" else 0.0
        regions, region = _regions(shape, objective), ((low + high) / 2) ** 2 * MATCHED_IN_REGIONS
        spread = max(SPREAD * side**2, region)
        local = views.num_local * (views.local_size // shape.patch) ** 2 if objective.local_queries else 0
        loc1, loc2 = (term in objective.terms for term in ("loc1", "loc2"))
        missed = (1 - loc1 * changed) * (1 - loc2 * matched)  # augmented patches lie anywhere, whatever is matched
        return cls(
            augmented=NUM_GLOBAL * side**2 * changed,
            matched=NUM_GLOBAL * (side**2 * matched + local * MATCHED_OF_LOCAL),
            region=NUM_GLOBAL * regions * region,
            patches=NUM_GLOBAL * side**2 * (1 - missed) + loc2 * local * MATCHED_OF_LOCAL_IN_ANY,
            region_patches=NUM_GLOBAL * spread * (1 - (1 - region / spread) ** regions),
        )


@dataclass(frozen=True)
class Work:
    """FLOPs of one step, per image.

    ``teacher``: forward pass of the clean global views. ``student``: forward pass of all views. ``backward``: of the
    student's backbone. ``heads``: the objective's, of student and teacher, forward and backward. ``anchor``: forward
    pass without adapters.
    """

    teacher: float
    student: float
    backward: float
    heads: float
    anchor: float = 0.0

    @property
    def total(self) -> float:
        """What model FLOP utilisation counts."""
        return self.teacher + self.student + self.backward + self.heads + self.anchor


def arithmetic(
    shape: Shape, views: ViewConfig, objective: GlareSettings, rows: Rows, *, images: int, anchor: bool = False
) -> Work:
    """FLOPs per image of one step with ``images`` images a process.

    The number of images shares out what a step does once.
    """
    seen = _groups(shape, views)
    clean, (_, tokens) = seen[:1], seen[0]
    recorded = 2 * shape.width * (1 if shape.prefix else tokens) * tokens  # what the class token attends to
    return Work(
        teacher=_forward(shape, clean, shape.rank) + NUM_GLOBAL * recorded,
        student=_forward(shape, seen, shape.rank),
        backward=_backward(shape, seen, mask_token=views.patch_augmentation == "mask"),
        heads=_heads(shape, views, objective, rows, images),
        anchor=_forward(shape, clean, 0) if anchor else 0.0,
    )


def _forward(shape: Shape, groups: Groups, rank: int) -> int:
    """All blocks and the patch embedding, of all groups of views."""
    token = _projections(shape) + _mlp(shape) + 4 * shape.width * rank
    return _embedding(shape, groups) + shape.blocks * (_attention(shape, groups) + _count(groups) * token)


def _backward(shape: Shape, groups: Groups, *, mask_token: bool) -> float:
    """Of the backbone; a trained ``mask_token`` stands before block 0, which then needs all gradients."""
    attention, tokens = 2 * _attention(shape, groups), _count(groups)
    projections, mlp, adapter = _projections(shape), _mlp(shape), 4 * shape.width * shape.rank
    if not shape.rank:
        return _embedding(shape, groups) + shape.blocks * (attention + tokens * 2 * (projections + mlp))
    block = attention + tokens * (projections + mlp + 2 * adapter)
    above = mlp if shape.place == "attention" else 0
    first = block if mask_token else tokens * (1.5 * adapter + above)
    return first + (shape.blocks - 1) * block


def _heads(shape: Shape, views: ViewConfig, objective: GlareSettings, rows: Rows, images: int) -> float:
    """The four terms: a student's layer costs three forward passes, the teacher's one, a centre one row a step."""
    mlp, logits = _head_mlp(shape), _logits(shape)
    total = 0.0
    if "glob" in objective.terms:
        cls = NUM_GLOBAL + views.num_local
        products = 2 * NUM_GLOBAL * cls * shape.prototypes  # of teacher's and student's rows
        total += (3 * cls + NUM_GLOBAL) * (mlp + logits) + 2 * products
    if "reg" in objective.terms:
        total += (3 * rows.region_patches + rows.region) * mlp + 4 * rows.region * logits + logits / images
        total += NUM_GLOBAL * _cross_attention(shape, views, objective)
    if {"loc1", "loc2"} & set(objective.terms):
        teacher = NUM_GLOBAL * (views.global_size // shape.patch) ** 2  # all patches, for the centre
        total += (3 * rows.patches + teacher) * mlp + logits / images
    pairs = {"loc1": rows.augmented, "loc2": rows.matched}
    return total + 4 * logits * sum(pairs.get(term, 0.0) for term in objective.terms)


def _cross_attention(shape: Shape, views: ViewConfig, objective: GlareSettings) -> int:
    """For one view: of the student, forward and backward, all patches; of the teacher those of each region."""
    side = views.global_size // shape.patch
    region, patches = min(side, objective.regions.max_side) ** 2, side**2  # regions are padded to the largest
    queries = _regions(shape, objective) * region

    def read(queries: int, context: int, keys: int) -> int:
        return 4 * shape.width * (shape.width * (queries + context) + queries * keys)

    udi = objective.region_target == "udi"
    teacher = read(queries, patches, patches) if udi else read(queries, queries, region)
    return 3 * read(patches, patches, patches) + teacher


def reduced_bytes(shape: Shape) -> int:
    """Bytes of float32 gradients that data-parallel training sums over processes in a step.

    Those of adapters, head and cross-attention, the mask token left out. With ``rank`` 0, those of the whole ViT
    instead of adapters, of which only the matrices are counted: biases, norms and positions are 1 to 3 % more.
    """
    d, hidden, bottleneck, k = shape.width, shape.head_hidden, shape.head_bottleneck, shape.prototypes
    head = hidden * (d + 1) + hidden * (hidden + 1) + bottleneck * (hidden + 1) + k * (bottleneck + 1)
    cross_attention = 4 * d * (d + 1) + 4 * d  # two layer norms
    adapter = 2 * d * shape.rank + d + shape.rank
    vit = shape.blocks * (_projections(shape) + _mlp(shape)) // 2 + 3 * shape.patch**2 * d
    return 4 * (head + cross_attention + (shape.blocks * adapter if shape.rank else vit))


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. ``intra_node``: bytes/s that a GPU sends to the next of its node; ``inter_node``: bytes/s that a
    node sends to the next, over all of its network cards; ``latency``: of one message, in seconds.
    """

    gpus_per_node: int
    intra_node: float
    inter_node: float
    latency: float


def ring_seconds(size: float, gpus: int, cluster: Cluster) -> float:
    """Time of a ring all-reduce of ``size`` bytes over ``gpus`` GPUs: 2 (n - 1) messages of size / n bytes in a row.

    The slowest link sets the pace (Patarasuk and Yuan 2009). For many GPUs and few bytes NCCL takes trees, whose
    latency grows with log n, not n: there the time is an upper bound.
    """
    within = gpus <= cluster.gpus_per_node
    bandwidth = cluster.intra_node if within else min(cluster.intra_node, cluster.inter_node)
    return 2 * (gpus - 1) * (size / gpus / bandwidth + cluster.latency)


def efficiency(
    work: Work, size: float, cluster: Cluster, *, gpus: int, rate: float, images: int, overlap: bool = True
) -> float:
    """Expected throughput of ``gpus`` GPUs as a share of so many times that of one, in (0, 1].

    Args:
        work: of a step, per image.
        size: bytes of gradients, ``reduced_bytes``.
        cluster: what connects the GPUs.
        gpus: their number, at least 1.
        rate: FLOP/s that one GPU reaches by itself: its peak times its model FLOP utilisation.
        images: per GPU and step.
        overlap: whether gradients are summed while the backbone's backward pass goes on, as DDP does, or after it.
    """
    seconds = images * work.total / rate
    hidden = images * work.backward / rate if overlap else 0.0
    return seconds / (seconds + max(0.0, ring_seconds(size, gpus, cluster) - hidden))


def kept_bytes(shape: Shape, views: ViewConfig, *, element: int) -> int:
    """Bytes that autograd keeps of the student's pass through the backbone, per image; the heads come on top.

    Frozen linear layers keep no activations. Of a token of a block stay the inputs of both layer norms and of the
    MLP's activation, query, key, value and output of the attention, and three inputs within the adapter; what the
    patch mask and rotary angles add is left out.

    Args:
        shape: with adapters (ValueError otherwise).
        views: of the student.
        element: bytes of an activation, 2 under bf16 autocast, whose residual stream is float32 all the same, or 4.
    """
    if not shape.rank:
        raise ValueError("what stays is known for a ViT with adapters; rank is 0")
    d, norm = shape.width, 4 * shape.width + 8  # with mean and deviation
    attention = norm + 4 * d * element + 4 * shape.heads
    mlp = norm + shape.mlp_width * (3 if shape.gated else 1) * element
    adapter = (d + 2 * shape.rank) * element
    mask_token = views.patch_augmentation == "mask"
    first = attention + mlp + adapter if mask_token else adapter + (mlp if shape.place == "attention" else 0)
    token = first + (shape.blocks - 1) * (attention + mlp + adapter) + norm
    return token * _count(_groups(shape, views))


def _mlp_width(config: Any) -> int:
    if not hasattr(config, "mlp_ratio"):
        return int(config.intermediate_size)
    width = int(config.hidden_size * config.mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if _is_gated(config) else width  # DINOv2's rule


def _is_gated(config: Any) -> bool:
    return bool(getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False))


def _groups(shape: Shape, views: ViewConfig) -> Groups:
    """The student's views."""
    global_, local = (shape.prefix + (size // shape.patch) ** 2 for size in (views.global_size, views.local_size))
    return (NUM_GLOBAL, global_), (views.num_local, local)


def _count(groups: Groups) -> int:
    return sum(views * tokens for views, tokens in groups)


def _embedding(shape: Shape, groups: Groups) -> int:
    patches = sum(views * (tokens - shape.prefix) for views, tokens in groups)
    return patches * 2 * 3 * shape.patch**2 * shape.width


def _attention(shape: Shape, groups: Groups) -> int:
    return sum(views * 4 * tokens**2 * shape.width for views, tokens in groups)


def _projections(shape: Shape) -> int:
    """Query, key, value and output, of a token."""
    return 8 * shape.width**2


def _mlp(shape: Shape) -> int:
    return (6 if shape.gated else 4) * shape.width * shape.mlp_width


def _head_mlp(shape: Shape) -> int:
    hidden = shape.head_hidden
    return 2 * (shape.width * hidden + hidden * hidden + hidden * shape.head_bottleneck)


def _logits(shape: Shape) -> int:
    return 2 * shape.head_bottleneck * shape.prototypes


def _regions(shape: Shape, objective: GlareSettings) -> int:
    return objective.regions.count or shape.heads
