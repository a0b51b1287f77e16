"""What trains: a backbone and the objective's heads, one module, so that one copy of it is the teacher."""

from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from glare.features import Features, encode, use_packed_attention
from glare.objectives.base import Objective, Terms
from glare.views import Views


class Student(nn.Module):
    """Backbone and objective. ``forward`` is the differentiable part of a step, so that DDP can wrap it.

    Both student and teacher run without dropout and stochastic depth: packed crops share one sequence.
    """

    objective: Objective

    def __init__(self, backbone: PreTrainedModel, objective: Objective, *, mask_token: bool) -> None:
        super().__init__()
        use_packed_attention(backbone)
        self.backbone = backbone.eval()
        self.objective = objective
        dim = backbone.config.hidden_size
        self.mask_token = nn.Parameter(torch.zeros(dim)) if mask_token else None

    @torch.no_grad()
    def target_features(self, views: Views) -> Features:
        """The teacher's role: features of the clean global views, with the [CLS] attention of the last block."""
        return encode(self.backbone, [views.global_], attention=True)[0]

    def forward(
        self,
        views: Views,
        teacher: Features,
        *,
        target: Self,
        temperature: float,
        generator: torch.Generator,
    ) -> Terms:
        """Loss terms of one batch; ``teacher`` are ``target.target_features(views)``."""
        global_, local = encode(
            self.backbone, [views.augmented, views.local], mask=views.patch_mask, mask_token=self.mask_token
        )
        terms: Terms = self.objective(
            (global_, local),
            teacher,
            views,
            target=target.objective,
            temperature=temperature,
            generator=generator,
        )
        return terms
