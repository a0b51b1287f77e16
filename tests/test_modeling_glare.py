import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from tiny_models import ADAPTERS, adapted_model, adapter_config, same_weights, segmenter, tokens, train_a_little
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModel,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTForImageClassification,
    pipeline,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from glare import GlareBackbone, GlareConfig, GlareForSemanticSegmentation, GlareModel, UniAdapterConfig
from glare.modeling_glare import final_norm, vit_blocks

# PEFT asks transformers 5.23 for a property that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeVit = Callable[..., PreTrainedModel]


# GlareModel


@pytest.mark.parametrize("kind", ADAPTERS)
def test_wrapping_changes_no_bit_and_copies_nothing(
    family: str, kind: str, make_vit: MakeVit, images: torch.Tensor
) -> None:
    vit = make_vit(family)
    with torch.no_grad():
        expected = vit(images, interpolate_pos_encoding=True, output_hidden_states=True)
    before = {id(parameter): parameter.clone() for parameter in vit.parameters()}
    model = GlareModel.from_backbone(vit, adapter_config(kind, vit)).eval()
    assert model.backbone is vit
    with torch.no_grad():
        outputs = model(images, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert len(outputs.hidden_states) == 4
    assert all(map(torch.equal, outputs.hidden_states, expected.hidden_states))
    kept = [p for p in model.parameters() if id(p) in before]
    assert all(torch.equal(parameter, before[id(parameter)]) for parameter in kept)
    pooler = 2 if family in ("vit", "deit") else 0
    assert len(kept) == len(before) - pooler


def test_outputs(family: str, make_vit: MakeVit, images: torch.Tensor, prefix_tokens: dict[str, int]) -> None:
    model = adapted_model(make_vit(family))
    with torch.no_grad():
        outputs = model(images, output_hidden_states=True)
    prefix = prefix_tokens[family]
    assert outputs.last_hidden_state.shape == (2, prefix + 24, 32)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    assert model.num_prefix_tokens(outputs.last_hidden_state, images) == prefix
    assert torch.equal(final_norm(model)(outputs.hidden_states[-1]), outputs.last_hidden_state)
    maps = model.patch_maps(outputs.last_hidden_state, images)
    assert maps.shape == (2, 32, 4, 6)
    assert torch.equal(maps[1, :, 2, 3], outputs.last_hidden_state[1, prefix + 2 * 6 + 3])
    assert model(images).hidden_states is None
    assert isinstance(model(images, return_dict=False), tuple)
    assert len(vit_blocks(model)) == 3
    assert model.patch_size == 4


def test_any_size_that_fits_the_patch(family: str, make_vit: MakeVit) -> None:
    model = adapted_model(make_vit(family))
    for height, width in ((16, 16), (4, 4), (8, 40), (24, 12)):
        patches = (height // 4) * (width // 4)
        output = tokens(model, torch.zeros(1, 3, height, width))
        assert model.num_prefix_tokens(output, torch.zeros(1, 3, height, width)) == output.shape[1] - patches


@pytest.mark.parametrize(("size", "advice"), [((16, 18), "16 x 16"), ((15, 24), "16 x 24"), ((2, 4), "4 x 4")])
def test_other_sizes_are_refused(size: tuple[int, int], advice: str, make_vit: MakeVit) -> None:
    message = rf"{size[0]} x {size[1]} pixels given.*multiples of the patch size 4.*{advice}"
    for model in (adapted_model(make_vit()), segmenter(make_vit(), head="linear")):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 3, *size))


def test_what_requires_gradients(make_vit: MakeVit, images: torch.Tensor, tmp_path: Path) -> None:
    model = adapted_model(make_vit())
    model.save_pretrained(tmp_path)
    for candidate in (model, GlareModel(model.config)):
        trainable = {name for name, parameter in candidate.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in candidate.named_parameters() if "uniadapter_" in name}
    full = adapted_model(make_vit(), "full")
    for candidate in (full, GlareModel.from_pretrained(tmp_path)):
        assert all(parameter.requires_grad for parameter in candidate.parameters())
    full.train()(images).last_hidden_state.sin().sum().backward()
    assert all(parameter.grad is not None for parameter in full.parameters())  # no pooler that DDP would miss


@pytest.mark.parametrize("kind", ["uniadapter", "lora"])
def test_a_model_made_from_its_configuration_starts_as_its_vit(
    family: str, kind: str, make_vit: MakeVit, images: torch.Tensor
) -> None:
    torch.manual_seed(0)
    model = GlareModel(adapted_model(make_vit(family), kind).config).eval()
    adapted = tokens(model, images)
    model.backbone.disable_adapters()
    assert torch.equal(tokens(model, images), adapted)
    model.backbone.enable_adapters()
    train_a_little(model)
    assert not torch.equal(tokens(model, images), adapted)


def test_from_backbone_wants_the_bare_vit(make_vit: MakeVit, make_vit_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"ViTForImageClassification given.*bare ViT.*\(ViTModel\)"):
        GlareModel.from_backbone(ViTForImageClassification(make_vit_config()))
    with pytest.raises(ValueError, match="PeftModel given"):
        GlareModel.from_backbone(get_peft_model(make_vit(), UniAdapterConfig(r=4)))
    vit = make_vit()
    vit.add_adapter(UniAdapterConfig(r=4))
    with pytest.raises(ValueError, match=r"already has adapters; load it without.*`adapter_config`"):
        GlareModel.from_backbone(vit)


def test_final_norm_wants_a_vit() -> None:
    with pytest.raises(ValueError, match="Linear has no layer norm"):
        final_norm(nn.Linear(2, 2))


def test_copies_are_independent(make_vit: MakeVit, images: torch.Tensor) -> None:
    student = adapted_model(make_vit())
    teacher = copy.deepcopy(student)
    before = tokens(student, images)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    assert torch.equal(tokens(teacher, images), before)


def test_attention_implementation_reaches_the_vit(make_vit: MakeVit, images: torch.Tensor, tmp_path: Path) -> None:
    model = adapted_model(make_vit())
    assert (model.config._attn_implementation, model.backbone.config._attn_implementation) == ("sdpa", "sdpa")
    expected = tokens(model, images)
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    assert len(model(images, output_attentions=True).attentions) == 3
    torch.testing.assert_close(tokens(model, images), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.backbone.config._attn_implementation == "eager"
    assert AutoModel.from_pretrained(tmp_path).backbone.config._attn_implementation == "sdpa"
    eager_vit = make_vit()
    eager_vit.set_attn_implementation("eager")
    assert adapted_model(eager_vit).backbone.config._attn_implementation == "eager"


def test_gradient_checkpointing_reaches_the_vit(make_vit: MakeVit, images: torch.Tensor) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = segmenter(make_vit(), head_dropout=0.0).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the newer name
            assert all(block.gradient_checkpointing for block in vit_blocks(model))
        model(images, labels=torch.ones(2, 16, 24, dtype=torch.long)).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_autocast(make_vit: MakeVit, images: torch.Tensor) -> None:
    vit = make_vit()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = vit(images, interpolate_pos_encoding=True).last_hidden_state
        model = GlareModel.from_backbone(vit, UniAdapterConfig(r=4)).eval()
        assert torch.equal(model(images).last_hidden_state, expected)
        loss = segmenter(make_vit())(images, labels=torch.ones(2, 16, 24, dtype=torch.long)).loss
    assert loss.dtype == torch.float32
    half = segmenter(make_vit()).bfloat16()
    assert half(images.bfloat16(), labels=torch.ones(2, 16, 24, dtype=torch.long)).loss.dtype == torch.float32


# segmentation


def test_from_model_shares_the_weights(make_vit: MakeVit) -> None:
    model = adapted_model(make_vit())
    before = copy.deepcopy(model)
    labels = {0: "water", 1: "land"}
    segmentation = GlareForSemanticSegmentation.from_model(model, id2label=labels, head="linear")
    assert segmentation.glare is model
    assert segmentation.config.id2label == labels
    assert segmentation.config.adapter_config == model.config.adapter_config
    assert segmentation.head.classifier.out_channels == 2
    assert same_weights(model, before)
    segmentation.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"


def test_head_weights_at_the_start(make_vit: MakeVit) -> None:
    for head in ("linear", "pixel", "fpn"):
        classifier = segmenter(make_vit(), head=head, num_labels=400).head.classifier
        assert 0.009 < classifier.weight.std() < 0.011
        assert not classifier.bias.any()
    lateral = segmenter(make_vit(), fpn_channels=256).head.fpn.lateral[0].weight
    bound = math.sqrt(6 / (32 + 256))  # Xavier-uniform
    assert 0.95 * bound < lateral.abs().max() <= bound


def test_heads_read_the_right_tokens(make_vit: MakeVit, images: torch.Tensor) -> None:
    fpn = segmenter(make_vit("deit"), out_indices=[0, 2])
    with torch.no_grad():
        for linear in (segmenter(make_vit("deit"), head=head) for head in ("linear", "pixel")):
            outputs = linear.glare(images, output_hidden_states=True)
            expected = linear.head([linear.glare.patch_maps(outputs.last_hidden_state, images)])
            assert torch.equal(linear(images).logits, expected)
        taps = [fpn.glare.patch_maps(outputs.hidden_states[block + 1], images) for block in (0, 2)]
        result = fpn(images)
        assert torch.equal(result.logits, fpn.head(taps))
        assert result.hidden_states is None
        assert len(fpn(images, output_hidden_states=True).hidden_states) == 4


@pytest.mark.parametrize("pyramid", [False, True])
def test_segmenter_on_a_large_image(pyramid: bool, make_vit: MakeVit) -> None:
    model = segmenter(make_vit(patch_size=8), pyramid=pyramid)
    size = (12, 20) if not pyramid else (48, 80)
    assert model(torch.zeros(1, 3, 96, 160)).logits.shape == (1, 5, *size)


def test_loss_is_cross_entropy_over_counted_pixels(make_vit: MakeVit, images: torch.Tensor) -> None:
    model = segmenter(make_vit())
    labels = torch.randint(0, 5, (2, 20, 30), generator=torch.Generator().manual_seed(0))  # of another size
    labels[0, :7] = 255
    outputs = model(images, labels=labels)
    logits = F.interpolate(outputs.logits, size=(20, 30), mode="bilinear", align_corners=False)
    log_prob = logits.log_softmax(1).permute(0, 2, 3, 1)
    counted = labels != 255
    torch.testing.assert_close(outputs.loss, -log_prob[counted, labels[counted]].mean())
    model.config.ignore_index = 3
    counted = labels != 3
    labels[labels == 255] = 3
    again = model(images, labels=labels).loss
    counted = labels != 3
    torch.testing.assert_close(again, -log_prob[counted, labels[counted]].mean())


def test_loss_without_any_counted_pixel_is_zero(make_vit: MakeVit, images: torch.Tensor) -> None:
    model = segmenter(make_vit()).train()
    loss = model(images, labels=torch.full((2, 16, 24), 255)).loss
    assert loss.item() == 0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pipeline(make_vit: MakeVit, log: pytest.LogCaptureFixture) -> None:
    model = segmenter(make_vit(), id2label={0: "water", 1: "land"}, num_labels=2)
    processor = SegformerImageProcessorPil(size={"height": 16, "width": 24})
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    results = segment(Image.effect_noise((50, 30), 90).convert("RGB"))
    assert {result["label"] for result in results} <= {"water", "land"}
    assert results[0]["mask"].size == (50, 30)
    assert not [record for record in log.records if record.levelname in ("WARNING", "ERROR")]


# the backbone class


def test_backbone_feature_maps(family: str, make_vit: MakeVit, images: torch.Tensor, tmp_path: Path) -> None:
    model = adapted_model(make_vit(family))
    model.save_pretrained(tmp_path)
    backbone, info = GlareBackbone.from_pretrained(
        tmp_path, out_features=["stage1", "stage3"], output_loading_info=True
    )
    assert not any(info.values())
    assert (backbone.out_indices, backbone.channels) == ([0, 2], [32, 32])
    with torch.no_grad():
        outputs = backbone(images)
        hidden_states = model(images, output_hidden_states=True).hidden_states
        assert len(backbone(images, output_hidden_states=True).hidden_states) == 4
    assert outputs.hidden_states is None
    for feature_map, tokens_ in zip(outputs.feature_maps, (hidden_states[1], hidden_states[3]), strict=True):
        assert feature_map.shape == (2, 32, 4, 6)
        assert torch.equal(feature_map, model.patch_maps(tokens_, images))


def test_auto_backbone_from_config(make_vit: MakeVit) -> None:
    # AutoBackbone.from_pretrained takes Hub ids only; of a local folder, GlareBackbone.from_pretrained
    assert type(AutoBackbone.from_config(adapted_model(make_vit()).config)) is GlareBackbone


@pytest.mark.parametrize("kind", ADAPTERS)
def test_upernet(family: str, kind: str, make_vit: MakeVit, tmp_path: Path, images: torch.Tensor) -> None:
    model = adapted_model(make_vit(family), kind)
    model.save_pretrained(tmp_path / "glare")
    config = UperNetConfig(
        backbone_config=GlareConfig.from_pretrained(tmp_path / "glare"),
        hidden_size=8,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=5,
    )
    torch.manual_seed(0)
    upernet = UperNetForSemanticSegmentation(config)
    upernet.backbone.load_state_dict(model.state_dict())
    outputs = upernet.train()(images, labels=torch.zeros(2, 16, 24, dtype=torch.long))
    assert outputs.logits.shape == (2, 5, 16, 24)
    outputs.loss.backward()
    reached = [p.grad is not None for name, p in upernet.backbone.named_parameters() if "uniadapter_" in name]
    assert all(reached)
    assert len(reached) == (12 if kind == "uniadapter" else 0)

    upernet.eval().save_pretrained(tmp_path / "upernet")
    loaded, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet", output_loading_info=True)
    assert not any(info.values())
    assert same_weights(loaded, upernet)
    with torch.no_grad():
        maps, expected = loaded.backbone(images).feature_maps, upernet.backbone(images).feature_maps
        assert all(map(torch.equal, maps, expected))
        torch.testing.assert_close(loaded(images).logits, upernet(images).logits)
