"""What trains beside the objective: the anchor to the features without adapters."""

from typing import Any

import pytest
import torch
from tiny_models import adapted_model, tiny_vit
from torch import Tensor

from glare.geometry import Crop
from glare.objectives.base import Objective, ProjectionHead, Terms
from glare.student import Student, without_adapters
from glare.views import Views


class Nothing(Objective):
    """An objective without terms."""

    def __init__(self) -> None:
        super().__init__()
        self.head = ProjectionHead(32, hidden=4, bottleneck=4, prototypes=4)

    def places(self, *_: Any, **__: Any) -> Any:
        pass

    def forward(self, *_: Any, **__: Any) -> Terms:
        return Terms({})

    def update(self, batch_sums: dict[str, tuple[Tensor, Tensor]], *, momentum: float = 0.9) -> None:
        pass


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    global_, augmented = torch.randn(2, 2, 3, 3, 16, 16, generator=generator)
    local = torch.randn(1, 3, 3, 8, 8, generator=generator)
    place = torch.zeros(2, 3, 2)
    mask = torch.zeros(2, 3, 16, dtype=torch.bool)
    return Views(global_, augmented, local, Crop(place, place), Crop(place, place), mask, (4, 4))


def anchor_of(student: Student) -> Tensor:
    nothing: Any = None
    counts = {"images": torch.tensor([3.0])}
    return student(views(), nothing, nothing, counts=counts, target=student, temperature=0.04).losses["anchor"]


@pytest.mark.parametrize("kind", ["uniadapter", "lora"])
def test_the_anchor_is_the_distance_to_the_features_without_adapters(kind: str) -> None:
    adapted, plain = adapted_model(tiny_vit(), kind), tiny_vit()
    student = Student(adapted.backbone, Nothing(), mask_token=False, anchor=0.5)
    seen = views()
    distances = []
    with torch.no_grad():
        for augmented, clean in zip(seen.augmented.flatten(0, 1), seen.global_.flatten(0, 1), strict=True):
            ours, theirs = (
                model(image[None], interpolate_pos_encoding=True).last_hidden_state[0, 1:]
                for model, image in ((adapted.backbone, augmented), (plain, clean))
            )
            distances += [1 - (a @ b / (a.norm() * b.norm())).item() for a, b in zip(ours, theirs, strict=True)]
    assert anchor_of(student).item() == pytest.approx(0.5 * sum(distances) / len(distances), abs=1e-5)


def test_only_adapters_get_its_gradient() -> None:
    adapted = adapted_model(tiny_vit())
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("uniadapter_" in name)
    anchor_of(Student(adapted.backbone, Nothing(), mask_token=False, anchor=1.0)).backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("uniadapter_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0


def test_adapters_work_again_afterwards_even_after_an_error() -> None:
    adapted, image = adapted_model(tiny_vit()), torch.randn(1, 3, 16, 16)
    before = adapted(image).last_hidden_state
    with pytest.raises(RuntimeError), without_adapters(adapted.backbone):
        torch.testing.assert_close(adapted(image).last_hidden_state, tiny_vit()(image).last_hidden_state)
        raise RuntimeError
    assert torch.equal(adapted(image).last_hidden_state, before)


def test_without_an_anchor_there_is_no_such_term() -> None:
    student = Student(adapted_model(tiny_vit()).backbone, Nothing(), mask_token=False)
    with pytest.raises(KeyError):
        anchor_of(student)
