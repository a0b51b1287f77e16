"""What a stranger meets: a folder with weights and code, with and without this package installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from strangers import stranger
from tiny_models import train_a_little
from transformers import AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel

import glare
from glare.export import ExportRecipe, export
from glare.uniadapter import default_target_modules

REMOTE_CODE = """
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForSemanticSegmentation, pipeline
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

folder = Path(sys.argv[1])
images = load_file(folder / "images.safetensors")["images"]
results, facts = {}, {}

try:
    AutoModel.from_pretrained(folder / "model", trust_remote_code=False)
except ValueError as error:
    facts["refused"] = str(error)

with torch.no_grad():
    for name in ("model", "segmenter", "lora"):
        model, info = AutoModel.from_pretrained(folder / name, trust_remote_code=True, output_loading_info=True)
        results[name + ".tokens"] = model(images).last_hidden_state
        facts[name + ".problems"] = sorted(problem for problem, keys in info.items() if keys)
    facts["module"] = type(model).__module__

    segmenter = AutoModelForSemanticSegmentation.from_pretrained(folder / "segmenter", trust_remote_code=True)
    results["segmenter.logits"] = segmenter(images).logits

    backbone_class = get_class_from_dynamic_module("modeling_glare.GlareBackbone", folder / "model")
    backbone = backbone_class.from_pretrained(folder / "model")
    results["backbone.map"] = backbone(images).feature_maps[-1]

    # saved again by the remote code, then read by it
    segmenter.save_pretrained(folder / "again")
    again = AutoModelForSemanticSegmentation.from_pretrained(folder / "again", trust_remote_code=True)
    results["again.logits"] = again(images).logits

    # a ViT into which adapters were merged
    plain = AutoModel.from_pretrained(folder / "plain", add_pooling_layer=False)
    results["plain.tokens"] = plain(images, interpolate_pos_encoding=True).last_hidden_state

    # the adapter alone, in the model it was trained for
    vit = AutoModel.from_pretrained(folder / "vit")
    vit.load_adapter(str(folder / "adapter"))
    results["adapter.tokens"] = vit(images, interpolate_pos_encoding=True).last_hidden_state

processor = SegformerImageProcessorPil(size={"height": 16, "width": 24})
segment = pipeline("image-segmentation", model=segmenter, image_processor=processor)
facts["labels"] = sorted({segmenter.config.id2label[i] for i in segmenter.config.id2label})
facts["glare"] = sorted(name for name in sys.modules if name.split(".")[0] == "glare")

save_file({name: value.contiguous() for name, value in results.items()}, folder / "results.safetensors")
facts["installed"] = importlib.util.find_spec("glare") is not None
(folder / "facts.json").write_text(json.dumps(facts))
"""

LABELS = {0: "water", 1: "land", 2: "road"}


def run(
    program: str, *arguments: str, cwd: Path, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, elsewhere, and return what it printed; fail if it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(
        [python, "-c", program, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def published(make_vit: Callable[..., PreTrainedModel], images: torch.Tensor, tmp_path: Path) -> Path:
    """A folder with a saved model, segmenter, adapter, their ViT, and a model with LoRA, also merged."""

    def model(config: PeftConfig) -> glare.GlareModel:
        adapted = glare.GlareModel.from_backbone(make_vit("deit"), config).eval()
        train_a_little(adapted)
        return adapted

    make_vit("deit").save_pretrained(tmp_path / "vit")
    adapted = model(glare.UniAdapterConfig(r=4))
    adapted.save_pretrained(tmp_path / "model")
    adapted.save_adapter(tmp_path / "adapter", base_model="someone/some-vit")
    torch.manual_seed(0)
    segmenter = glare.GlareForSemanticSegmentation.from_model(
        adapted, id2label=LABELS, fpn_channels=16, head_channels=8
    )
    segmenter.eval().save_pretrained(tmp_path / "segmenter")
    targets = default_target_modules(make_vit("deit"))
    model(LoraConfig(r=4, target_modules=targets)).save_pretrained(tmp_path / "lora")
    export(ExportRecipe(model=str(tmp_path / "lora"), output=tmp_path / "plain"))
    save_file({"images": images}, tmp_path / "images.safetensors")
    return tmp_path


def test_remote_code_gives_the_same_bits_where_glare_is_absent(published: Path, images: torch.Tensor) -> None:
    python = stranger(published / "venv")
    offline = {"HF_HOME": str(published / "hf_home"), "HF_HUB_OFFLINE": "1"}
    result = run(REMOTE_CODE, str(published), cwd=published, python=python, **offline)
    facts = json.loads((published / "facts.json").read_text())
    results = load_file(published / "results.safetensors")

    with torch.no_grad():
        model = AutoModel.from_pretrained(published / "model")
        outputs = model(images, output_hidden_states=True)
        lora = AutoModel.from_pretrained(published / "lora")(images).last_hidden_state
        segmenter = AutoModelForSemanticSegmentation.from_pretrained(published / "segmenter")
        logits = segmenter(images).logits
    for name in ("model.tokens", "segmenter.tokens", "adapter.tokens"):
        assert torch.equal(results[name], outputs.last_hidden_state), name
    assert torch.equal(results["lora.tokens"], lora)
    torch.testing.assert_close(results["plain.tokens"], lora, rtol=1e-5, atol=1e-5)
    assert torch.equal(results["segmenter.logits"], logits)
    assert torch.equal(results["again.logits"], logits)
    assert torch.equal(results["backbone.map"], model.patch_maps(outputs.hidden_states[-1], images))

    assert facts["module"].startswith("transformers_modules.")
    assert facts["glare"] == [] and not facts["installed"]
    assert "trust_remote_code=True" in facts["refused"]
    assert facts["labels"] == sorted(LABELS.values())
    assert [facts[f"{name}.problems"] for name in ("model", "segmenter", "lora")] == [[], [], []]
    assert "not supported" not in result.stderr
    assert {path.name for path in (published / "again").iterdir()} == {
        path.name for path in (published / "segmenter").iterdir()
    }


def test_the_installed_package_is_preferred_to_remote_code(published: Path) -> None:
    model = AutoModel.from_pretrained(published / "segmenter", trust_remote_code=True)
    assert type(model) is glare.GlareModel


def test_code_files_import_only_what_they_may() -> None:
    sources = Path(glare.__file__).parent
    flat = ("configuration_glare", "modeling_glare", "segmentation_heads", "uniadapter")
    allowed = {"torch", "transformers", "peft", *(f".{name}" for name in flat)}
    for name in flat:
        for line in (sources / f"{name}.py").read_text().splitlines():
            words = line.split()
            if line.startswith(("import ", "from ")):
                module = words[1] if words[1].startswith(".") else words[1].split(".")[0]
                assert module in allowed or module in sys.stdlib_module_names, line


def test_public_names() -> None:
    assert sorted(glare.__all__) == glare.__all__
    assert all(hasattr(glare, name) for name in glare.__all__)
