"""GLARE models: a ViT of transformers with adapters injected through PEFT, bare, as backbone, or with a head.

* The ViT is found by structure, never by the names of one release of transformers.
* Images may have any size whose sides are multiples of the patch, also non-square.
* Tokens before the patches (class, distillation and register tokens) are counted from the shapes.
"""

import inspect
import os
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.utils import can_return_tuple

from .configuration_glare import GlareConfig
from .segmentation_heads import HEADS, Classifier, RescalingPyramid
from .uniadapter import vit_blocks

__all__ = [
    "GlareBackbone",
    "GlareForSemanticSegmentation",
    "GlareModel",
    "GlarePreTrainedModel",
    "final_norm",
    "vit_blocks",
]

ADAPTER_NAME = "default"


def final_norm(model: nn.Module) -> nn.LayerNorm:
    """Return the norm after the last block of a ViT: the layer norm that the model itself holds.

    Raises ValueError if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for child in module.children():
                if isinstance(child, nn.LayerNorm):
                    return child
    raise ValueError(f"{type(model).__name__} has no layer norm after its blocks; pass a ViT, DeiT, DINOv2 or DINOv3.")


class GlarePreTrainedModel(PreTrainedModel):
    """Base of the GLARE models: initialisation of the heads, loading and saving."""

    config_class = GlareConfig
    base_model_prefix = "glare"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # whatever the nested ViT supports; it checks the request itself
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # called for every module with parameters of its own that the ViT has not initialised
        super()._init_weights(module)
        if isinstance(module, Classifier):
            init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.xavier_uniform_(module.weight)


class GlareModel(GlarePreTrainedModel):
    """A ViT with adapters; `backbone` is the model of transformers with the adapters injected.

    Made by `from_backbone`, only its adapters require gradients, as in PEFT; made by `from_pretrained`, all
    weights do, as in transformers.
    """

    _auto_class = "AutoModel"
    # a segmentation checkpoint may be opened without its head
    _keys_to_ignore_on_load_unexpected = (r"^head\.",)

    def __init__(self, config: GlareConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = AutoModel.from_config(config.backbone_config, dtype=torch.get_default_dtype())
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # a trained projection that self-supervised ViTs do not have
        self.backbone = backbone
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
        if config.adapter_config is not None:
            inject_adapter_in_model(PeftConfig.from_peft_type(**config.adapter_config), backbone, ADAPTER_NAME)
            backbone._hf_peft_config_loaded = True
        if not any(parameter.is_meta for parameter in backbone.parameters()):
            # the ViT and PEFT have initialised these; transformers would do it again, in its own way
            for module in backbone.modules():
                module._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, adapter_config: PeftConfig | None = None) -> Self:
        """Wrap a ViT, without copying its weights, and inject fresh adapters; None to train all weights.

        The ViT is changed in place: it gets the adapters and loses its pooler, if it has one. Raises ValueError
        for anything but a bare ViT.
        """
        expected = MODEL_MAPPING.get(type(backbone.config), None)
        if type(backbone) is not expected:
            raise ValueError(
                f"{type(backbone).__name__} given; pass the bare ViT, as AutoModel.from_pretrained returns it"
                + (f" ({expected.__name__})." if expected else ".")
            )
        if any(isinstance(module, BaseTunerLayer) for module in backbone.modules()):
            raise ValueError(
                "The ViT already has adapters; load it without them and describe them by `adapter_config`."
            )
        config = GlareConfig(
            backbone_config=backbone.config,
            adapter_config=None if adapter_config is None else adapter_config.to_dict(),
        )
        return cls(config, backbone)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return cast(GlareConfig, self.config).patch_size

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding of the ViT."""
        return cast(nn.Module, self.backbone.get_input_embeddings())

    def grid_size(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return the (rows, columns) of patches of images (b, 3, height, width).

        Raises ValueError if a side is no multiple of the patch size.
        """
        height, width = pixel_values.shape[-2:]
        patch = self.patch_size
        if height % patch or width % patch or not height or not width:
            fit = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise ValueError(
                f"Images of {height} x {width} pixels given; both sides must be multiples of the patch size "
                f"{patch}: resize or pad them, for example to {fit}."
            )
        return height // patch, width // patch

    def num_prefix_tokens(self, tokens: torch.Tensor, pixel_values: torch.Tensor) -> int:
        """Return how many of the tokens (b, prefix + patches, d) of these images come before the patches."""
        rows, columns = self.grid_size(pixel_values)
        return tokens.shape[1] - rows * columns

    def patch_maps(self, tokens: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Arrange the patch tokens of (b, prefix + rows * columns, d) as maps (b, d, rows, columns)."""
        rows, columns = self.grid_size(pixel_values)
        patches = tokens[:, self.num_prefix_tokens(tokens, pixel_values) :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], rows, columns)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images (b, 3, height, width).

        `last_hidden_state` (b, prefix + patches, d) is after the final norm, `pooler_output` (b, d) its class
        token, the mean of the patches where there is none; `hidden_states[0]` is the embedding,
        `hidden_states[i + 1]` the output of block i, not normed.
        Raises ValueError if a side of the images is no multiple of the patch size.
        """
        self.grid_size(pixel_values)
        if self._interpolates:
            kwargs["interpolate_pos_encoding"] = True
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.backbone(pixel_values, output_hidden_states=output_hidden_states, **kwargs)
        tokens = outputs.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens[:, 0] if self.num_prefix_tokens(tokens, pixel_values) else tokens.mean(dim=1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def merge_and_unload(self) -> PreTrainedModel:
        """Fold the adapters into the weights and return the plain ViT of transformers, which this model then is, too.

        Raises ValueError for adapters that cannot be merged, such as UniAdapter; nothing is changed then.
        """
        layers = [
            (name, module) for name, module in self.backbone.named_modules() if isinstance(module, BaseTunerLayer)
        ]
        for _, layer in layers:
            layer.merge(safe_merge=True)
        for name, layer in layers:
            self.backbone.set_submodule(name, layer.get_base_layer(), strict=True)
        if layers:
            self.config.adapter_config = None
            self.backbone._hf_peft_config_loaded = False
            del self.backbone.peft_config
        return self.backbone

    def save_adapter(self, save_directory: str | os.PathLike[str], *, base_model: str | None = None) -> None:
        """Write the adapters alone as a PEFT adapter folder for the ViT with the Hub id or path `base_model`.

        `PeftModel.from_pretrained(vit, folder)` and `vit.load_adapter(folder)` give this model's outputs.
        Raises ValueError if the model has no adapters.
        """
        if self.config.adapter_config is None:
            raise ValueError("This model has no adapters to save: all its weights were trained; use save_pretrained().")
        peft_config = self.backbone.peft_config[ADAPTER_NAME]
        # PEFT asks the Hub about a base model that it knows of, so it learns of it after the weights
        peft_config.base_model_name_or_path = None
        self.backbone.save_pretrained(save_directory)
        peft_config.base_model_name_or_path = base_model or self.backbone.name_or_path or None
        peft_config.save_pretrained(os.fspath(save_directory))


class GlareBackbone(BackboneMixin, GlareModel):
    """GlareModel as the backbone of UperNet and other dense models of transformers.

    The feature maps are the outputs of the blocks in `config.out_features`, before the final norm, of the grid of
    patches or, with `config.backbone_pyramid`, of 4, 2, 1 and 1/2 times that.
    """

    _auto_class = "AutoBackbone"

    def __init__(self, config: GlareConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * config.num_hidden_layers
        self.pyramid: RescalingPyramid | None = None
        if config.backbone_pyramid:
            self.pyramid = RescalingPyramid(config.hidden_size, len(config.out_indices))
            self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BackboneOutput:
        """Map images (b, 3, height, width) to feature maps (b, d, rows, columns)."""
        outputs = GlareModel.forward(self, pixel_values, output_hidden_states=True, **kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = [self.patch_maps(outputs.hidden_states[block + 1], pixel_values) for block in self.out_indices]
        return BackboneOutput(
            feature_maps=tuple(maps if self.pyramid is None else self.pyramid(maps)),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


class GlareForSemanticSegmentation(GlarePreTrainedModel):
    """GlareModel with a segmentation head: linear, linear to pixels or semantic FPN."""

    _auto_class = "AutoModelForSemanticSegmentation"

    def __init__(self, config: GlareConfig, model: GlareModel | None = None) -> None:
        super().__init__(config)
        self.glare = GlareModel(config) if model is None else model
        self.head = HEADS[config.head](config)
        self.post_init()

    @classmethod
    def from_model(cls, model: GlareModel, **options: Any) -> Self:
        """Put a fresh head on a GlareModel, whose weights are shared, not copied.

        The options are fields of GlareConfig: `id2label` or `num_labels`, `head`, `pyramid` and so on.
        """
        config = GlareConfig(
            backbone_config=model.config.backbone_config,
            adapter_config=model.config.adapter_config,
            **options,
        )
        return cls(config, model)

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding of the ViT."""
        return self.glare.get_input_embeddings()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        """Segment images (b, 3, height, width).

        `logits` are (b, classes, rows, columns) on the grid of patches, four times finer with the pyramid, and as fine
        as the images with the head "pixel".
        With `labels` (b, height, width) of class numbers, `loss` is the cross-entropy of the logits upsampled
        to them, averaged over the labels other than `config.ignore_index`, and 0 if there are none.
        """
        final = self.config.head != "fpn"
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.glare(pixel_values, output_hidden_states=output_hidden_states or not final, **kwargs)
        taps = (
            [outputs.last_hidden_state]
            if final
            else [outputs.hidden_states[block + 1] for block in self.config.out_indices]
        )
        logits = self.head([self.glare.patch_maps(tokens, pixel_values) for tokens in taps])
        return SemanticSegmenterOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        ignored = self.config.ignore_index
        total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        counted: torch.Tensor = (labels != ignored).sum()
        return total / counted.clamp(min=1)


# pipeline("image-segmentation") reports every class that it does not find here as unsupported
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["glare"] = "GlareForSemanticSegmentation"
