"""Every way in which transformers and PEFT load a saved model gives the same outputs, also of earlier formats."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import adapted_model, segmenter, tokens
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    pipeline,
)

from glare import GlareConfig, GlareForSemanticSegmentation, GlareModel
from glare.configuration_glare import FORMAT
from glare.segmenters import image_processor
from glare.views import Normalisation

# PEFT asks transformers 5.23 for a property that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeVit = Callable[..., PreTrainedModel]
PINNED = Path(__file__).parent / "pinned"
FORMATS = sorted(PINNED.glob("format_*"))


@pytest.fixture
def saved(make_vit: MakeVit, tmp_path: Path) -> Path:
    """A saved segmenter that finds each of its classes somewhere."""
    model = segmenter(make_vit("dinov2"), num_labels=3, id2label={0: "water", 1: "land", 2: "road"})
    processor = image_processor(Normalisation(), size=16, patch=4)
    with torch.no_grad():
        pixels = processor(photo(width=50, height=30), return_tensors="pt").pixel_values
        model.head.classifier.bias -= model(pixels).logits.mean(dim=(0, 2, 3))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model: PreTrainedModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(images).logits
    return found


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForSemanticSegmentation.from_pretrained(folder, **options)


# what earlier versions have written


def test_there_is_a_checkpoint_of_every_format() -> None:
    assert [folder.name for folder in FORMATS] == [f"format_{number}" for number in range(1, FORMAT + 1)]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_earlier_version_gives_what_it_gave(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    images = expected["images"]
    model, problems = AutoModelForSemanticSegmentation.from_pretrained(folder / "segmenter", output_loading_info=True)
    assert not any(problems.values())
    torch.testing.assert_close(logits(model, images), expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens(AutoModel.from_pretrained(folder / "segmenter"), images), expected["tokens"])
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "vit"), str(folder / "adapter"))
    torch.testing.assert_close(tokens(adapted.eval(), images), expected["tokens"])


def test_a_checkpoint_of_a_later_format_says_what_to_do(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == FORMAT
    (saved / "config.json").write_text(json.dumps(config | {"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}.* reads up to {FORMAT}: update glare-ssl"):
        AutoConfig.from_pretrained(saved)
    del config["format"]
    (saved / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(saved).format == 1


# options of from_pretrained


def test_a_subfolder(saved: Path, images: Tensor) -> None:
    expected = logits(load(saved), images)
    assert torch.equal(logits(load(saved.parent, subfolder="model"), images), expected)
    assert type(AutoModel.from_pretrained(saved.parent, subfolder="model")) is GlareModel
    assert type(AutoConfig.from_pretrained(saved.parent, subfolder="model")) is GlareConfig


def test_a_device_map(saved: Path, images: Tensor) -> None:
    expected = logits(load(saved), images)
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert torch.equal(logits(load(saved, device_map=device_map), images), expected)


def test_weights_on_disk(saved: Path, images: Tensor, tmp_path: Path) -> None:
    model = load(
        saved,
        device_map={"glare": "disk", "head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    assert model.hf_device_map == {"glare": "disk", "head": "cpu"}
    assert torch.equal(logits(model, images), logits(load(saved), images))


def test_blocks_are_not_split_between_devices(family: str, make_vit: MakeVit) -> None:
    model = segmenter(make_vit(family))
    assert {type(block).__name__ for block in model.glare.backbone.modules()} & set(model._no_split_modules)


def test_attention_implementations(saved: Path, images: Tensor) -> None:
    sdpa, eager = load(saved, attn_implementation="sdpa"), load(saved, attn_implementation="eager")
    assert (sdpa.glare.backbone.config._attn_implementation, eager.glare.backbone.config._attn_implementation) == (
        "sdpa",
        "eager",
    )
    torch.testing.assert_close(logits(sdpa, images), logits(eager, images), rtol=1e-5, atol=1e-5)
    attentions = AutoModel.from_pretrained(saved, attn_implementation="eager")(images, output_attentions=True)
    assert [tuple(attention.shape) for attention in attentions.attentions] == [(2, 2, 25, 25)] * 3


def test_half_precision_computes_about_the_same(saved: Path, images: Tensor) -> None:
    model = load(saved, dtype=torch.bfloat16)
    found = logits(model, images.bfloat16())
    assert found.dtype == torch.bfloat16
    expected = logits(load(saved), images)
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


# compilers


@pytest.fixture
def shallow(make_vit: MakeVit, tmp_path: Path) -> Path:
    """A saved segmenter of one block, of which compilers would make the same graph again for each further one."""
    segmenter(make_vit("dinov2", num_hidden_layers=1)).save_pretrained(tmp_path / "shallow")
    return tmp_path / "shallow"


def test_torch_compile(shallow: Path, images: Tensor) -> None:
    model = load(shallow).eval()
    # the first pass installs what collects hidden states, under a lock that splits the graph; the later ones are whole
    for fullgraph in (False, True):
        compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        with torch.no_grad():
            found = compiled(images).logits
        torch._dynamo.reset()
        torch.testing.assert_close(found, logits(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx(shallow: Path, images: Tensor, tmp_path: Path) -> None:
    model = load(shallow).eval()
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}},
        verbose=False,
    )
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (images, torch.cat([images, images[:1]])):
        (found,) = session.run(["logits"], {"pixel_values": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(model, batch), rtol=1e-4, atol=1e-5)


# images in, label maps out


def photo(*, width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 5, columns * 3, rows * columns], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_pipeline_gives_masks_at_the_size_of_the_image(saved: Path, log: pytest.LogCaptureFixture) -> None:
    image = photo(width=50, height=30)
    segments = pipeline("image-segmentation", model=str(saved))(image)
    assert not [record for record in log.records if record.levelname in ("WARNING", "ERROR")]

    pixels = AutoImageProcessor.from_pretrained(saved)(image, return_tensors="pt").pixel_values
    fine = F.interpolate(logits(load(saved), pixels), size=(30, 50), mode="bilinear", align_corners=False)
    labels = fine.argmax(dim=1)[0].numpy()
    names = {0: "water", 1: "land", 2: "road"}
    assert len(segments) == len(np.unique(labels)) > 1
    for number in np.unique(labels):
        mask = next(segment["mask"] for segment in segments if segment["label"] == names[number])
        assert np.array_equal(np.asarray(mask) == 255, labels == number)


def test_the_processor_keeps_the_shape_and_fits_the_patch(saved: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(saved)
    for width, height in ((50, 30), (30, 50), (200, 200)):
        rows, columns = processor(photo(width=width, height=height), return_tensors="pt").pixel_values.shape[-2:]
        assert rows % 4 == columns % 4 == 0
        assert abs(columns / rows - width / height) < 0.3


# without adapters


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_merged_adapters_leave_a_plain_vit(
    family: str, kind: str, make_vit: MakeVit, images: Tensor, tmp_path: Path
) -> None:
    model = adapted_model(make_vit(family), kind)
    expected = tokens(model, images)
    vit = model.merge_and_unload()
    assert type(vit) is type(make_vit(family)) and model.config.adapter_config is None
    torch.testing.assert_close(tokens(vit, images), expected, rtol=1e-5, atol=1e-5)
    vit.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(tokens(reloaded, images), tokens(vit, images))
    again = GlareForSemanticSegmentation.from_model(model, num_labels=3, fpn_channels=8, head_channels=8).eval()
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), images), logits(again, images))


def test_a_refused_merge_changes_nothing(make_vit: MakeVit, images: Tensor) -> None:
    model = adapted_model(make_vit("vit"))
    expected = tokens(model, images)
    with pytest.raises(ValueError, match="UniAdapter cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(tokens(model, images), expected) and model.config.adapter_config is not None
