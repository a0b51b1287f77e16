"""Batches of random features for the GLARE objective, with networks of random parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import glare_terms as literal
from reference.builders import crop_of
from reference.correspondence import Box, correspondence
from torch import Tensor, nn

from glare.draws import Draws
from glare.features import Features
from glare.geometry import Crop
from glare.objectives import places as module
from glare.objectives.base import Terms
from glare.objectives.glare import GlareObjective, GlareSettings
from glare.objectives.places import DIRECTIONS
from glare.regions import RegionConfig, Regions
from glare.views import Views

DIM, K, TEMPERATURE = 8, 6, 0.06
SOURCE = (100, 100)
SETTINGS = GlareSettings(prototypes=K, head_hidden=10, head_bottleneck=5, regions=RegionConfig(min_side=2, max_side=3))
READINGS = ("text", "eq6", "udi")

OVERLAPPING = (Box(3.1, 7.3, 71.7, 64.9, False), Box(21.3, 15.9, 60.2, 77.7, True))
APART = (Box(0.0, 0.0, 41.0, 40.0, True), Box(55.0, 0.0, 40.0, 80.0, False))
A_CORNER = (Box(0.0, 0.0, 60.3, 58.7, False), Box(43.9, 42.1, 51.0, 55.1, False))
INSIDE = (Box(1.3, 2.2, 95.1, 93.9, False), Box(40.6, 30.2, 25.3, 28.1, True))


@dataclass
class Case:
    """Random features of a batch, random parameters, and where its two global views were cut from."""

    student: GlareObjective
    target: GlareObjective
    features: Features
    local: Features
    teacher: Features
    views: Views
    boxes: Sequence[tuple[Box, Box]]
    ca_heads: int

    def terms(self, seed: int = 0, **changes: object) -> Terms:
        given: dict[str, Any] = {"student": (self.features, self.local), "teacher": self.teacher, "views": self.views}
        given |= changes
        draws = Draws(torch.Generator().manual_seed(seed), given["teacher"].cls.shape[1])
        places = self.student.places(given["teacher"], given.pop("views"), draws)
        return self.student(**given, places=places, counts=places.counts(), target=self.target, temperature=TEMPERATURE)

    def matches(self) -> dict[tuple[int, int], list[list[int | None]]]:
        grid = self.views.grid
        return {(a, b): [correspondence(pair[a], pair[b], grid, grid) for pair in self.boxes] for a, b in DIRECTIONS}

    @property
    def parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self.student.state_dict()), dict(self.target.state_dict())


def randomise(objective: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*objective.parameters(), *objective.buffers()]:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)


def make_case(
    boxes: Sequence[tuple[Box, Box]],
    *,
    seed: int = 0,
    grid: tuple[int, int] = (4, 5),
    num_local: int = 2,
    ca_heads: int = 2,
    attention_heads: int = 3,
    mask_share: float = 0.4,
    settings: GlareSettings = SETTINGS,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    b, n = len(boxes), grid[0] * grid[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    student, target = (GlareObjective(DIM, ca_heads, settings) for _ in range(2))
    randomise(student, seed + 1)
    randomise(target, seed + 2)
    crops = [crop_of([pair[view] for pair in boxes], [SOURCE] * b) for view in (0, 1)]
    nothing = torch.empty(0)
    views = Views(
        global_=nothing,
        augmented=nothing,
        local=nothing,
        global_crops=Crop(torch.stack([c.offset for c in crops]), torch.stack([c.scale for c in crops])),
        local_crops=Crop(nothing, nothing),
        patch_mask=torch.rand(2, b, n, generator=generator) < mask_share,
        grid=grid,
    )
    return Case(
        student=student,
        target=target,
        features=Features(normal(2, b, DIM), normal(2, b, n, DIM)),
        local=Features(normal(num_local, b, DIM), normal(num_local, b, 4, DIM)),
        teacher=Features(normal(2, b, DIM), normal(2, b, n, DIM), normal(2, b, attention_heads, n).softmax(dim=-1)),
        views=views,
        boxes=boxes,
        ca_heads=ca_heads,
    )


CASES = {
    "batch": lambda **given: make_case([OVERLAPPING, A_CORNER, INSIDE], **given),
    "batch-1": lambda **given: make_case([OVERLAPPING], seed=10, **given),
    "one-without-overlap": lambda **given: make_case([APART, A_CORNER], seed=20, **given),
    "no-overlap": lambda **given: make_case([APART, APART], seed=30, **given),
    "no-overlap-batch-1": lambda **given: make_case([APART], seed=40, **given),
    "empty-mask": lambda **given: make_case([A_CORNER, INSIDE], seed=50, mask_share=0.0, **given),
    "full-mask": lambda **given: make_case([INSIDE], seed=60, mask_share=1.1, **given),
    "no-locals": lambda **given: make_case([OVERLAPPING, INSIDE], seed=70, num_local=0, **given),
    "other-heads": lambda **given: make_case([OVERLAPPING], seed=80, ca_heads=4, attention_heads=1, **given),
    "other-grid": lambda **given: make_case([A_CORNER, OVERLAPPING], seed=90, grid=(7, 3), num_local=1, **given),
    "tiny-grid": lambda **given: make_case([INSIDE, OVERLAPPING], seed=100, grid=(1, 2), **given),
}


class Drawn:
    """Stands before ``sample_regions`` and keeps what was asked and answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attention: list[Tensor] = []
        self.match: list[tuple[Tensor, Tensor]] = []
        self.regions: list[Regions] = []
        self.sample = module.sample_regions
        monkeypatch.setattr(module, "sample_regions", self)

    def __call__(self, attention: Tensor, match: tuple[Tensor, Tensor], *args: object, **named: object) -> Regions:
        self.attention.append(attention)
        self.match.append(match)
        self.regions.append(self.sample(attention, match, *args, **named))
        return self.regions[-1]

    def patches(self) -> dict[tuple[int, int], list[list[list[int]]]]:
        """Regions of each direction and image as lists of patches."""
        return {
            direction: [
                [index[valid].tolist() for index, valid in zip(*of_image, strict=True)]
                for of_image in zip(drawn.index, drawn.valid, strict=True)
            ]
            for direction, drawn in zip(DIRECTIONS, self.regions, strict=True)
        }


def approx(value: float) -> object:
    return pytest.approx(value, rel=2e-4, abs=1e-6)


def all_logits(tokens: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return torch.stack([literal.head_logits(token, parameters) for token in tokens.reshape(-1, DIM)])


def disturb(tokens: Tensor, where: Tensor) -> None:
    """Change the tokens at ``where``, and not by a constant, which a layer norm would take out again."""
    tokens[where] += torch.randn(tokens[where].shape, generator=torch.Generator().manual_seed(11))
