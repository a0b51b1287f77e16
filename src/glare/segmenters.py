"""From a pre-trained ViT to a segmentation model: what fine-tuning starts from, what trains, how images enter it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from glare.backbones import add_adapters, load_backbone, read_normalisation
from glare.configuration_glare import GlareConfig
from glare.errors import UserError
from glare.model_names import Place, explained, place_of
from glare.modeling_glare import ADAPTER_NAME, GlareForSemanticSegmentation, GlareModel, final_norm
from glare.runtime import optimizer_tensors, restore_optimizer
from glare.views import Normalisation
from glare.weight_decay import decays

HEADS = ("fpn", "linear", "pixel", "upernet")
TRAINED = ("full", "adapter", "head")
UPERNET_TAPS = 3  # at least, its auxiliary head sits on the third


def load_pretrained(name: str) -> tuple[GlareModel, Normalisation]:
    """What fine-tuning starts from, and the normalisation of its input.

    ``name``: anything that ``load_backbone`` takes, or a PEFT adapter, folder or Hub id, that names its base model.
    Raises UserError for others.
    """
    place = place_of(name)
    # the adapter's file first: most models have none, and a Hub that cannot be reached is waited for once less
    if place.file("adapter_config.json") and place.file("config.json") is None:
        return _load_adapter(name, place)
    return load_backbone(name), read_normalisation(name)


def _load_adapter(name: str, place: Place) -> tuple[GlareModel, Normalisation]:
    with explained("adapter", name, "give an adapter folder or Hub id as glare pretrain or PEFT writes them"):
        config = PeftConfig.from_pretrained(place.name, **place.options)
        if place.file("adapter_model.safetensors") is None:
            raise ValueError("it has no adapter_model.safetensors, the only file of weights that is read")
        weights = load_peft_weights(place.name, **place.options)
    base = config.base_model_name_or_path
    if not (base and isinstance(base, str)):
        raise UserError(
            f"the adapter {name!r} does not say for which model it is; put base_model_name_or_path into its "
            "adapter_config.json, or give the model folder of the run"
        )
    backbone = load_backbone(base).backbone
    with explained("adapter", name, f"give an adapter of {base}, as glare pretrain or PEFT writes them"):
        model = add_adapters(backbone, config)
        found = set_peft_model_state_dict(model.backbone, weights, adapter_name=ADAPTER_NAME)
    if found.unexpected_keys:
        raise UserError(f"the adapter {name!r} does not fit its base model {base!r}; give the model it was trained on")
    return model, read_normalisation(base)


def add_head(
    model: GlareModel, head: str, *, pyramid: bool, classes: list[str], palette: list[list[int]]
) -> PreTrainedModel:
    """A fresh head on a ViT whose weights are shared, or copied for ``upernet``; ``palette`` goes into the config."""
    names = dict(enumerate(classes))
    if head == "upernet":
        segmenter = _upernet(model, names, pyramid=pyramid)
    else:
        segmenter = GlareForSemanticSegmentation.from_model(model, head=head, pyramid=pyramid, id2label=names)
    segmenter.config.label2id = {name: number for number, name in names.items()}
    segmenter.config.palette = palette
    return segmenter


def _upernet(model: GlareModel, names: dict[int, str], *, pyramid: bool) -> PreTrainedModel:
    """UPerNet as transformers has it: with the auxiliary head on the third tap that its published models trained with.

    That head has 0.4 of the loss and no part in predictions. There is no dropout before the classifier, as there is in
    mmsegmentation. With ``pyramid`` the taps get strides 4, 8, 16 and 32 of a patch of 16 px, as BEiT and iBOT do it.
    """
    backbone = GlareConfig(
        backbone_config=model.config.backbone_config,
        adapter_config=model.config.adapter_config,
        backbone_pyramid=pyramid,
    )
    if len(backbone.out_indices) < UPERNET_TAPS:
        raise UserError(f"head 'upernet' needs a ViT of at least {UPERNET_TAPS} blocks; give fpn or linear")
    if len(names) < 2:
        raise UserError("head 'upernet' needs at least 2 classes; give fpn or linear")
    config = UperNetConfig(
        backbone_config=backbone, auxiliary_in_channels=backbone.hidden_size, loss_ignore_index=255, id2label=names
    )
    segmenter = UperNetForSemanticSegmentation(config)
    segmenter.backbone.backbone.load_state_dict(model.backbone.state_dict())
    return segmenter


def vit_of(segmenter: PreTrainedModel) -> GlareModel:
    """The ViT below the head."""
    return segmenter.glare if isinstance(segmenter, GlareForSemanticSegmentation) else segmenter.backbone


def image_side(vit: GlareModel) -> int:
    """Side in px of the images that a ViT was made for, which its configuration may give as one number or as two."""
    size: int | Sequence[int] = vit.config.backbone_config.image_size
    return size if isinstance(size, int) else max(size)


def select_trained(segmenter: PreTrainedModel, train_on: str) -> None:
    """Let the head train, and in the ViT everything (``full``), the adapters (``adapter``) or nothing (``head``).

    Weights that no loss can reach stay frozen: the mask token, and the final norm under heads on earlier taps.
    Raises UserError where there are no adapters to train.
    """
    segmenter.requires_grad_(True)
    vit = vit_of(segmenter)
    adapters = vit.config.adapter_config
    if train_on == "adapter" and adapters is None:
        raise UserError("--train-on adapter needs a model with adapters, this one has none; give full or head")
    part = PEFT_TYPE_TO_PREFIX_MAPPING[adapters["peft_type"]] if adapters else ""
    for name, parameter in vit.backbone.named_parameters():
        chosen = train_on == "full" or (train_on == "adapter" and part in name)
        parameter.requires_grad_(chosen and "mask_token" not in name)
    if getattr(segmenter.config, "head", "fpn") == "fpn":
        final_norm(vit.backbone).requires_grad_(False)


def set_training(segmenter: PreTrainedModel) -> None:
    """Training mode; a ViT of which nothing trains has the same features as in evaluation, without dropout."""
    segmenter.train()
    vit = vit_of(segmenter)
    vit.train(any(parameter.requires_grad for parameter in vit.parameters()))


def image_processor(normalise: Normalisation, *, size: int, patch: int) -> DPTImageProcessorPil:
    """What prepares images for transformers: near ``size`` px a side at their own shape, in multiples of the patch.

    It also turns logits back into label maps (``post_process_semantic_segmentation``).
    """
    side = max(1, round(size / patch)) * patch
    return DPTImageProcessorPil(
        do_resize=True,
        size={"height": side, "width": side},
        keep_aspect_ratio=True,
        ensure_multiple_of=patch,
        image_mean=list(normalise.mean),
        image_std=list(normalise.std),
    )


def synchronised(segmenter: PreTrainedModel, *, processes: int) -> PreTrainedModel:
    """Batch norms that count over all GPUs, as mmsegmentation's; the same module on one process or on the CPU."""
    if processes > 1 and next(segmenter.parameters()).device.type == "cuda":
        return cast(PreTrainedModel, nn.SyncBatchNorm.convert_sync_batchnorm(segmenter))
    return segmenter


def parameter_groups(segmenter: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, in groups of head or backbone (``head``) and of what decays or not."""
    below = {id(parameter) for parameter in vit_of(segmenter).backbone.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in segmenter.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) not in below, decays(name, parameter)), []).append(parameter)
    return [
        {"params": parameters, "head": head, "weight_decay": weight_decay if decay else 0.0}
        for (head, decay), parameters in groups.items()
    ]


@dataclass(frozen=True)
class SegmenterState:
    """All that changes while a segmenter trains and that a checkpoint holds."""

    segmenter: nn.Module
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """What trains, the statistics of batch norms and the optimizer's state, by name."""
        optimizer = {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        return self._of_segmenter() | optimizer

    def _of_segmenter(self) -> dict[str, Tensor]:
        trained = {f"model.{name}": p for name, p in self.segmenter.named_parameters() if p.requires_grad}
        return trained | {f"model.{name}": buffer for name, buffer in self.segmenter.named_buffers()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo ``tensors``. Raises UserError when the checkpoint belongs to another model."""
        own, prefix = self._of_segmenter(), "optimizer."
        different = own.keys() ^ {name for name in tensors if not name.startswith(prefix)}
        if different:
            raise UserError(
                f"the checkpoint does not fit this model ({len(different)} tensors differ, for example "
                f"{min(different)}); give the recipe it was written with"
            )
        for name, value in own.items():
            value.copy_(tensors[name])
        restore_optimizer(
            self.optimizer, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
