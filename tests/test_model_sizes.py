"""Sizes in the configurations of others: absurd ones are refused in one sentence, before memory is taken for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import adapted_model, segmenter, tiny_vit
from torch import nn
from transformers import AutoModel, PreTrainedModel

from glare import model_sizes
from glare.backbones import adapt, load_backbone
from glare.errors import UserError
from glare.inference import load_segmenter
from glare.model_sizes import MAX_LABELS, check_labels, oversize
from glare.modeling_glare import GlareModel
from glare.pretrain import PretrainRecipe, make_student
from glare.recipes import from_dict
from glare.segmenters import load_pretrained

Reader = Callable[[str], object]
READERS: dict[str, Reader] = {
    "vit": load_backbone,
    "segmenter": lambda name: load_segmenter(name, device=torch.device("cpu")),
}


def written(folder: Path, kind: str) -> Path:
    model: PreTrainedModel = tiny_vit("vit") if kind == "vit" else segmenter(tiny_vit("vit"))
    model.save_pretrained(folder)
    return folder / "config.json"


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **fields}))


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("number", [MAX_LABELS + 1, 10**12, 1e300])
def test_more_classes_than_a_label_map_holds(tmp_path: Path, kind: str, number: float) -> None:
    change(written(tmp_path, kind), num_labels=number, id2label=None, label2id=None)
    said = refused(lambda: READERS[kind](str(tmp_path)))
    assert f"cannot be loaded (num_labels is {number}; a label map of 16 bits holds at most 65536); give a" in said


def test_more_names_than_a_label_map_holds(tmp_path: Path) -> None:
    names = {number: f"c{number}" for number in range(MAX_LABELS + 1)}
    change(written(tmp_path, "segmenter"), id2label=names)
    assert "(id2label has 65537 names; a label map" in refused(lambda: READERS["segmenter"](str(tmp_path)))


def test_a_configuration_inside_another_is_looked_at(tmp_path: Path) -> None:
    file = written(tmp_path, "segmenter")
    inner = json.loads(file.read_text())["backbone_config"]
    change(file, backbone_config={**inner, "num_labels": 10**12})
    assert "num_labels is 1000000000000;" in refused(lambda: READERS["segmenter"](str(tmp_path)))


def test_a_vit_with_the_classes_of_imagenet_21k_is_read(tmp_path: Path) -> None:
    change(written(tmp_path, "vit"), num_labels=21_843)
    assert isinstance(load_backbone(str(tmp_path)), GlareModel)
    check_labels({"num_labels": MAX_LABELS, "id2label": dict.fromkeys(range(MAX_LABELS))})


@pytest.mark.parametrize(("field", "size"), [("image_size", 4_000_000), ("intermediate_size", 10**11)])
def test_random_weights_that_no_memory_holds(tmp_path: Path, field: str, size: int) -> None:
    file = written(tmp_path, "vit")
    change(file, **{field: size})
    said = refused(lambda: load_backbone(str(file)))
    assert "cannot be loaded (its " in said and "GiB in float32, and there are" in said


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "patch_size"])
def test_sizes_of_nothing(tmp_path: Path, kind: str, field: str) -> None:
    file = written(tmp_path, kind)
    inner = json.loads(file.read_text()).get("backbone_config", {})
    change(file, **({field: 0} if kind == "vit" else {"backbone_config": {**inner, field: 0}}))
    assert f"cannot be loaded ({field} is 0, it has to be at least 1)" in refused(lambda: READERS[kind](str(tmp_path)))


def test_weights_that_are_not_in_the_file_are_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, read in READERS.items():
        written(tmp_path / kind, kind)
        monkeypatch.setattr(model_sizes, "total_memory", lambda: 4 * 20_000)
        assert "weights take 0.0 GiB in float32" in refused(lambda read=read, kind=kind: read(str(tmp_path / kind)))  # type: ignore[misc]
        monkeypatch.undo()
        read(str(tmp_path / kind))


def test_adapters_of_an_absurd_rank(tmp_path: Path) -> None:
    vit = tiny_vit("vit")
    vit.save_pretrained(tmp_path / "vit")
    for kind in ("uniadapter", "lora"):
        bare = GlareModel.from_backbone(tiny_vit("vit"))
        said = refused(lambda bare=bare, kind=kind: adapt(bare, kind, rank=10**12, scale=1.0))  # type: ignore[misc]
        assert said.startswith("with the adapters ") and said.endswith("of memory; give a lower rank")
    adapted_model(vit, "lora").save_adapter(tmp_path / "adapter", base_model=str(tmp_path / "vit"))
    load_pretrained(str(tmp_path / "adapter"))
    change(tmp_path / "adapter" / "adapter_config.json", r=10**12)
    assert "give a lower rank" in refused(lambda: load_pretrained(str(tmp_path / "adapter")))


@pytest.mark.parametrize("field", ["prototypes", "head_hidden", "head_bottleneck"])
@pytest.mark.parametrize("size", [10**9, 10**12, 10**18])
def test_an_absurd_head_of_the_objective(field: str, size: int) -> None:
    recipe = from_dict(PretrainRecipe, {"backbone": "b", "data": "d", "output": "o", "glare": {field: size}})
    said = refused(lambda: make_student(GlareModel.from_backbone(tiny_vit("vit")), recipe))
    assert said.startswith("the objective's ") and said.endswith("; give fewer prototypes or a narrower head")


def test_finding_out_changes_nothing() -> None:
    vit = GlareModel.from_backbone(tiny_vit("vit"))
    before = torch.get_rng_state()
    assert oversize(lambda: AutoModel.from_config(vit.config)) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sizes, "MEMORY_LIMIT", tmp_path / "memory.max")
    installed = model_sizes.total_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert model_sizes.total_memory() == installed > 2**28
    (tmp_path / "memory.max").write_text("4000\n")
    assert model_sizes.total_memory() == 4000
    assert oversize(lambda: nn.Linear(999, 1)) is None
    assert oversize(lambda: nn.Linear(1000, 1)) == (
        "1,001 weights take 0.0 GiB in float32, and there are 0.0 GiB of memory"
    )
