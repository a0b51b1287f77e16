"""What every objective takes and gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from glare.draws import Draws
from glare.errors import UserError
from glare.features import Features
from glare.losses import CENTRE_MOMENTUM
from glare.objectives.places import Counts, Places
from glare.views import Views


@dataclass(frozen=True)
class Terms:
    """What an objective yields for a share of a batch; added up over the shares it is that of the batch.

    ``losses`` are scalars to be summed with weight 1; ``batch_sums`` the sum (K,) of the teacher's raw logits and
    the number of rows in it, by centre, for ``Objective.update``; ``health`` scalars to be logged; ``marginal`` the sum
    of the teacher's probabilities of [CLS] and the number of rows.
    """

    losses: dict[str, Tensor]
    batch_sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    health: dict[str, Tensor] = field(default_factory=dict)
    marginal: tuple[Tensor, Tensor] | None = None

    @property
    def total(self) -> Tensor:
        """The loss to differentiate (paper eq. 10)."""
        return torch.stack(list(self.losses.values())).sum()


class Objective(nn.Module, ABC):
    """A module that owns the heads it needs and turns features into loss terms.

    ``forward`` changes nothing; ``update`` is called once an optimizer step, in sight of the training loop.
    ``head`` is a projection head whose last layer the loop holds still at first, None for an objective without one.
    ``needs_teacher``: whether targets come from a moving average of the student; otherwise there is no teacher at all.
    """

    head: "ProjectionHead | None"
    needs_teacher: ClassVar[bool] = True

    @classmethod
    def of(cls, vit: PreTrainedConfig, settings: Any) -> Self:
        """The objective for features of such a ViT; ``settings`` are those of the recipe."""
        return cls(vit.hidden_size, vit.num_attention_heads, settings)

    @classmethod
    def derive(cls, derived: Mapping[str, Any], *, adapter: str) -> dict[str, Any]:  # noqa: ARG003 (for those that override it)
        """Recipe keys where the user gives none, from those that were ``derived`` for GLARE's adapters."""
        return dict(derived)

    @classmethod
    def check(cls, recipe: Any) -> None:
        """Raise UserError for a complete recipe that this objective cannot learn from."""
        if recipe.export == "teacher" and not cls.needs_teacher:
            raise UserError(f"objective {recipe.objective} has no teacher to export; give --export student")

    @abstractmethod
    def places(self, teacher: Features, views: Views, draws: Draws) -> Places:
        """What is compared of these images; ``teacher`` are features of the clean global views, or of no views."""

    @abstractmethod
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
        """Loss terms from features of the student's (augmented global, local) views and the teacher's clean globals.

        ``counts`` are those of the whole batch, of which ``places`` and the others may be a share; ``target`` is the
        teacher's copy of this objective, whose heads are moving averages of this one's.
        """

    @abstractmethod
    def update(self, batch_sums: dict[str, tuple[Tensor, Tensor]], *, momentum: float = CENTRE_MOMENTUM) -> None:
        """Move the centres towards the means of ``Terms.batch_sums``; one without rows stays."""


class ProjectionHead(nn.Module):
    """g of paper eq. 4: a three-layer MLP, L2-normalised, onto K prototypes of learned length (DINO's head).

    ``forward`` gives the normalised bottleneck; ``prototypes`` the logits of it, so that a loss can compute logits
    only for the rows it needs, in chunks. The layout of parameters is DINO's: ``mlp.0, .2, .4``,
    ``last_layer.weight_g`` (K, 1) and ``last_layer.weight_v`` (K, bottleneck).
    """

    def __init__(self, dim: int, *, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 8192) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = Prototypes(bottleneck, prototypes)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., dim) -> (..., bottleneck), unit length, float32."""
        return nn.functional.normalize(self.mlp(rows).float(), dim=-1)

    def prototypes(self, bottleneck: Tensor) -> Tensor:
        """(..., bottleneck) -> logits (..., K), float32."""
        with torch.autocast(bottleneck.device.type, enabled=False):
            return self.last_layer(bottleneck.float())  # type: ignore[no-any-return]


class Prototypes(nn.Module):
    """Linear without bias whose rows have direction ``weight_v`` and length ``weight_g``, initially 1."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, dim), std=0.02))

    def matrix(self) -> Tensor:
        """The rows (count, dim)."""
        return self.weight_g * nn.functional.normalize(self.weight_v, dim=-1)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., dim) -> (..., count)."""
        return nn.functional.linear(rows, self.matrix())
