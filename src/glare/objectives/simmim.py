"""SimMIM: masked patches are replaced by a token, their pixels predicted from what the others show (Xie et al. 2022).

    L = sum over masked pixels and channels |W z_m + b - x_m| / (masked pixels + 1e-5) / 3

Symbols: z_m = ``student.patches`` where the mask is, after the final norm; W, b = ``decoder``, one linear layer to the
3 p p values of a patch of side p, channel-major: the 1x1 convolution and pixel shuffle of SimMIM's code; x_m = pixels
of the clean view, normalised as the input of the encoder. The sums run over the whole batch.

The learned token takes the place of the patch embedding before positions are added (``features.encode``); which patches
it is, the views say: ``patch_augmentation`` mask, ``patch_sampling`` square. There is no teacher, and the [CLS] token
is not trained.
"""
# ruff: noqa: ARG002, ARG003 - an objective is given more than this one looks at

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from transformers import PreTrainedConfig

from glare.draws import Draws
from glare.errors import UserError
from glare.features import Features
from glare.losses import CENTRE_MOMENTUM
from glare.objectives.base import Objective, Terms
from glare.objectives.places import Counts, Places
from glare.views import Views

CHANNELS = 3
EPS = 1e-5  # of a pixel, for a batch without masked ones
SQUARE_PX = 32  # masked together in SimMIM
BASE_RATE, BASE_BATCH = 1e-4, 512
"""Peak for all weights of a ViT: base rate of SimMIM's ViT-B, which grows with the batch, and of the study on pets.

Below that batch it stays: at 8 images a step the rule would leave 1.6e-6, which moves nothing in a short run.
"""
VIEWS: Mapping[str, Any] = {
    "num_local": 0,
    "global_area": (0.67, 1.0),
    "jitter_prob": 0.0,
    "grey_prob": 0.0,
    "blur_prob": (0.0, 0.0, 0.0),
    "solarize_prob": (0.0, 0.0, 0.0),
    "patch_augmentation": "mask",
    "patch_sampling": "square",
    "patch_prob": 1.0,
    "patch_ratio": (0.6, 0.6),
}
"""SimMIM's: large crops and flips alone, 60 % of each view masked."""


class SimMIMObjective(Objective):
    """One linear decoder; both global views of an image are reconstructed, each with a mask of its own."""

    needs_teacher = False

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.head = None
        self.patch_size = patch_size
        self.decoder = nn.Linear(dim, CHANNELS * patch_size**2)

    @classmethod
    def of(cls, vit: PreTrainedConfig, settings: Any) -> Self:
        """See ``Objective``; there are no settings."""
        return cls(vit.hidden_size, vit.patch_size)

    @classmethod
    def derive(cls, derived: Mapping[str, Any], *, adapter: str) -> dict[str, Any]:
        """SimMIM's views, of the derived sizes, and its rate for all weights; nothing of heads, teacher and anchor."""
        sizes = {key: derived["views"][key] for key in ("global_size", "local_size")}
        square = max(1, SQUARE_PX * 14 // sizes["global_size"])  # of the derived 14 patches a side
        kept = ("batch_size", "steps", "learning_rate", "warmup_steps", "image_size", "scale")
        chosen = {key: derived[key] for key in kept if key in derived}
        if adapter == "full":
            chosen["learning_rate"] = BASE_RATE * max(1.0, derived["batch_size"] / BASE_BATCH)
        return {**chosen, "freeze_last_layer_steps": 0, "views": {**sizes, **VIEWS, "patch_square": square}}

    @classmethod
    def check(cls, recipe: Any) -> None:
        """See ``Objective``."""
        super().check(recipe)
        if recipe.views.patch_augmentation != "mask" or not recipe.views.patch_prob:
            raise UserError(
                f"objective simmim reconstructs masked patches, and with views.patch_augmentation "
                f"{recipe.views.patch_augmentation!r} and views.patch_prob {recipe.views.patch_prob} there are none; "
                "give mask and 1.0, or leave both out"
            )

    def places(self, teacher: Features, views: Views, draws: Draws) -> Places:
        """See ``Objective``: the mask, and the pixels of the clean views."""
        return Places(views.patch_mask, (), (), pixels=views.global_)

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
        """See ``Objective``; ``teacher``, ``target`` and ``temperature`` are not looked at."""
        assert places.pixels is not None
        mask = places.augmented
        predicted = self.decoder(student[0].patches[mask]).float()
        distance = (predicted - self.patches(places.pixels)[mask]).abs().sum()
        masked = counts["augmented"].squeeze() * self.patch_size**2
        share = mask.shape[1] / counts["images"].squeeze()
        health = {"masked_share": mask.float().mean() * share}
        return Terms({"reconstruction": distance / (masked + EPS) / CHANNELS}, health=health)

    def patches(self, pixels: Tensor) -> Tensor:
        """Views (v, b, 3, h, w) as (v, b, patches, 3 p p) in the order of ``decoder``, patches row-major."""
        cells = unfold(pixels.flatten(0, 1), self.patch_size, stride=self.patch_size)
        rows: Tensor = cells.transpose(1, 2).unflatten(0, pixels.shape[:2])
        return rows

    @torch.no_grad()
    def update(self, batch_sums: dict[str, tuple[Tensor, Tensor]], *, momentum: float = CENTRE_MOMENTUM) -> None:
        """There are no centres."""
