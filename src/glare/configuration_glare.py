"""Configuration of GLARE models: a nested ViT, its adapters and a segmentation head."""

import enum
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

# what `trust_remote_code=True` loads from the code files that `save_pretrained` puts beside the weights
_AUTO_MAP = {
    "AutoConfig": "configuration_glare.GlareConfig",
    "AutoModel": "modeling_glare.GlareModel",
    "AutoBackbone": "modeling_glare.GlareBackbone",
    "AutoModelForSemanticSegmentation": "modeling_glare.GlareForSemanticSegmentation",
}


FORMAT = 1
"""What config.json means and how the weights are called; a later version that changes either counts up."""


def _as_config(backbone_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if isinstance(backbone_config, PreTrainedConfig):
        return backbone_config
    fields = dict(backbone_config or {"model_type": "vit"})
    if "model_type" not in fields:
        raise ValueError("backbone_config has no `model_type`; name the ViT family, e.g. 'vit', 'deit' or 'dinov2'.")
    return AutoConfig.for_model(**fields)


def _plain(value: Any) -> Any:
    """Reduce the fields of a PEFT configuration to what JSON holds, in an order that does not vary."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, enum.Enum) else value


class GlareConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of GlareModel, GlareBackbone and GlareForSemanticSegmentation.

    backbone_config: configuration of the ViT inside, an object or a dict with `model_type`; None is ViT-B/16.
    adapter_config: fields of a PEFT configuration with `peft_type`, e.g. `UniAdapterConfig().to_dict()`;
        None for a ViT without adapters.
    out_features, out_indices: blocks whose output feeds the FPN head or leaves the backbone class, as names
        ("stage1" to "stageN") or as 0-based block numbers; by default four, evenly spaced, the last included.
    head: "fpn" (semantic FPN on the tapped blocks), "linear" (1x1 convolution on the final tokens) or "pixel" (the same
        to every pixel of a patch).
    fpn_channels, head_channels: widths of the FPN and of the head after it.
    pyramid: rescale the taps by 4, 2, 1 and 1/2 before the FPN, for logits at a quarter of the patch size.
    backbone_pyramid: the same for the maps that leave the backbone class, as for UperNet.
    head_dropout: channel dropout before the classifier, in [0, 1).
    ignore_index: label that enters no loss.
    format: of the checkpoint, at most the number that this version knows.

    Raises ValueError for anything else, and for a patch that is not square.
    """

    model_type = "glare"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    _auto_class: ClassVar[str | None] = "AutoConfig"

    backbone_config: PreTrainedConfig | dict | None = None
    adapter_config: dict | None = None
    head: str = "fpn"
    fpn_channels: int = 256
    head_channels: int = 128
    pyramid: bool = False
    backbone_pyramid: bool = False
    head_dropout: float = 0.1
    ignore_index: int = 255
    format: int = FORMAT
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format > FORMAT:
            raise ValueError(
                f"the checkpoint has format {self.format}, this version of glare reads up to {FORMAT}: update glare-ssl"
            )
        self.backbone_config = _as_config(self.backbone_config)
        if self.adapter_config is not None:
            self.adapter_config = _plain(self.adapter_config)
        self._validate_fields()
        self.stage_names = [f"stage{block + 1}" for block in range(self.num_hidden_layers)]
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_indices = self._default_taps()
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        if kwargs.get("attn_implementation") is None:
            # otherwise the base class would reset the choice of a ViT that is already built
            kwargs["attn_implementation"] = self._vit._attn_implementation
        for derived in ("auto_map", "stage_names"):
            kwargs.pop(derived, None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(_AUTO_MAP)

    def to_dict(self) -> dict[str, Any]:
        """As the base class, without the name of the ViT's folder on this machine; a Hub id stays."""
        fields: dict[str, Any] = super().to_dict()
        name = fields["backbone_config"].get("_name_or_path")
        if name and Path(name).exists():
            del fields["backbone_config"]["_name_or_path"]
        return fields

    def _validate_fields(self) -> None:
        if self.head not in ("linear", "pixel", "fpn"):
            raise ValueError(f"head={self.head!r} given; choose 'linear', 'pixel' or 'fpn'.")
        if self.adapter_config is not None and "peft_type" not in self.adapter_config:
            raise ValueError(
                "adapter_config has no `peft_type`; pass the `to_dict()` of a PEFT configuration, or None."
            )
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout={self.head_dropout} given; it must be in [0, 1).")
        _ = self.patch_size  # raises for a patch that is not square

    def _default_taps(self) -> list[int]:
        depth = self.num_hidden_layers
        return sorted({-(-quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4)})

    @property
    def _vit(self) -> Any:
        return self.backbone_config  # a configuration, never a dict, once __post_init__ has run

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks of the ViT."""
        return int(self._vit.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the tokens of the ViT."""
        return int(self._vit.hidden_size)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self._vit.patch_size
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) != 1:
            raise ValueError(f"patch_size={size} given; only square patches are supported.")
        return int(sides.pop())
