"""What trains: a backbone and the objective's heads, one module, so that one copy of it is the teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from glare.features import Features, encode, use_packed_attention
from glare.modeling_glare import vit_blocks
from glare.objectives.base import Objective, Terms
from glare.objectives.places import Counts, Places
from glare.views import Views


class Student(nn.Module):
    """Backbone and objective. ``forward`` is the differentiable part of a step, so that DDP can wrap it.

    Both student and teacher run without dropout and stochastic depth: packed crops share one sequence.
    """

    objective: Objective

    def __init__(
        self, backbone: PreTrainedModel, objective: Objective, *, mask_token: bool, anchor: float = 0.0
    ) -> None:
        super().__init__()
        self.anchor = anchor
        use_packed_attention(backbone)
        self.backbone = backbone.eval()
        self.objective = objective
        dim = backbone.config.hidden_size
        self.mask_token = nn.Parameter(torch.zeros(dim)) if mask_token else None

    def compile_blocks(self) -> None:
        """Let ``torch.compile`` fuse what is inside the blocks; their first passes take some time for that."""
        for block in vit_blocks(self.backbone):
            block.compile()

    @torch.no_grad()
    def target_features(self, views: Views) -> Features:
        """The teacher's role: features of the clean global views, with the [CLS] attention of the last block.

        Of no views, and without a forward pass, where the objective needs no teacher.
        """
        if not self.objective.needs_teacher:
            images, patches = views.patch_mask.shape[1:]
            cls = views.global_.new_empty(0, images, self.backbone.config.hidden_size)
            return Features(cls, cls.new_empty(0, images, patches, cls.shape[-1]))
        return encode(self.backbone, [views.global_], attention=True)[0]

    def forward(
        self,
        views: Views,
        teacher: Features,
        places: Places,
        *,
        counts: Counts,
        target: Self,
        temperature: float,
    ) -> Terms:
        """Loss terms of a batch, or of a share of it.

        ``teacher`` are ``target.target_features(views)``, ``places`` those of the objective, and ``counts`` their
        numbers in the whole batch. With an ``anchor`` a further term holds patches near the features of the backbone
        without its adapters: the mean of 1 - cosine, times ``anchor``.
        """
        global_, local = encode(
            self.backbone, [views.augmented, views.local], mask=views.patch_mask, mask_token=self.mask_token
        )
        terms: Terms = self.objective(
            (global_, local), teacher, places, counts=counts, target=target.objective, temperature=temperature
        )
        if self.anchor:
            with torch.no_grad(), without_adapters(self.backbone):
                untouched = encode(self.backbone, [views.global_])[0]
            distance = 1 - cosine_similarity(global_.patches.float(), untouched.patches.float(), dim=-1)
            share = views.global_.shape[1] / counts["images"].squeeze()
            terms.losses["anchor"] = self.anchor * distance.mean() * share
        return terms


@contextmanager
def without_adapters(backbone: nn.Module) -> Iterator[None]:
    """While open, the adapters of a backbone do nothing."""
    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also stop their gradients
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
