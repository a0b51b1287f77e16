"""``torch.compile`` of the blocks computes what they compute without it, in a few graphs without breaks."""

from collections.abc import Iterator

import pytest
import torch
from tiny_models import adapted_model, tiny_vit
from torch import Tensor, nn

from glare.crops import PackedImages
from glare.draws import Draws
from glare.objectives.glare import GlareObjective, GlareSettings
from glare.regions import RegionConfig
from glare.runtime import seeded
from glare.student import Student
from glare.teacher import make_teacher
from glare.views import Normalisation, ViewConfig, Views, make_views

SETTINGS = GlareSettings(prototypes=24, head_hidden=16, head_bottleneck=8, regions=RegionConfig(min_side=1, max_side=3))
MAX_GRAPHS = 6  # student and teacher, with and without adapters, gradients and recorded attention


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile with the graphs as they are traced, which takes no compiler; the list has an entry for each."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: real(module, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def networks(family: str) -> tuple[Student, Student]:
    torch.manual_seed(0)
    model = adapted_model(tiny_vit(family), "uniadapter")
    student = Student(model.backbone, GlareObjective(32, 2, SETTINGS), mask_token=False, anchor=0.5)
    return student, make_teacher(student)


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2 * 32 * 32, 3), generator=generator, dtype=torch.uint8)
    images = PackedImages(pixels, torch.tensor([0, 32 * 32]), torch.full((2, 2), 32))
    config = ViewConfig(global_size=16, local_size=8, num_local=2)
    return make_views(
        images, torch.arange(2), config, patch_size=4, normalise=Normalisation(), draws=Draws(generator, 2)
    )


def outcome(student: Student, teacher: Student, seen: Views) -> dict[str, Tensor]:
    features = teacher.target_features(seen)
    places = student.objective.places(features, seen, Draws(seeded(3), 2))
    terms = student(seen, features, places, counts=places.counts(), target=teacher, temperature=0.06)
    student.zero_grad()
    terms.total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in terms.losses.items()}, **gradients}


# torch warns itself while it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("family", ["vit", "dinov3_vit"])
def test_compiled_blocks_compute_the_same(family: str, counted: list[int]) -> None:
    student, teacher = networks(family)
    seen = views()
    expected = outcome(student, teacher, seen)
    for network in (student, teacher):
        network.compile_blocks()
    for _ in range(2):
        found = outcome(student, teacher, seen)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert 0 < len(counted) <= MAX_GRAPHS


def test_compiling_changes_no_names(counted: list[int]) -> None:
    student, _ = networks("vit")
    names = list(student.state_dict())
    student.compile_blocks()
    assert list(student.state_dict()) == names and not counted
