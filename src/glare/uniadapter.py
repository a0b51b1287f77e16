"""UniAdapter: a ReLU bottleneck after the attention of every ViT block, as a PEFT method.

    y -> y + s * ReLU(y W_down + b_down) W_up + b_up          (GLARE eq. 3, with biases)

* y is the output of the attention's output projection, before the residual is added; that projection is found
  by structure, so `target_modules` is optional for ViT, DeiT, DINOv2, DINOv2 with registers and DINOv3.
* eq. 3 can also be read with "x being the output of a ViT block": `target_modules=r".*layers?\\.\\d+"`
  adapts whole blocks.
* W_up and b_up start at zero: a fresh adapter leaves the network unchanged, bit for bit.
* Several active adapters all read the unadapted y and their terms add up, as LoRA's do.
* The ReLU cannot be folded into a weight matrix, so merging is refused; LoRA can be merged.

`import glare` (or this file) registers the method with PEFT under the name "UNIADAPTER".
"""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


class _PeftType(enum.StrEnum):
    """Stands for the member that PEFT's own closed enumeration would get."""

    UNIADAPTER = "UNIADAPTER"


_NOT_MERGEABLE = (
    "UniAdapter cannot be merged: its ReLU bottleneck has no equivalent weight matrix. Keep the adapter in "
    "the model, drop it with `unload()`, or train with `peft.LoraConfig`, which can be merged."
)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module below its adapters, the module itself where it has none."""
    return cast(nn.Module, module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module


def _is_block(module: nn.Module) -> bool:
    return {"attention", "mlp"} <= {name for name, _ in unwrapped(module).named_children()}


def vit_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a ViT: the module list whose items have `.attention` and `.mlp`.

    Raises ValueError if there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_is_block, module)):
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of blocks with `.attention` and `.mlp`, as ViT, DeiT, DINOv2 "
        "and DINOv3 have; pass `target_modules` to say which modules to adapt."
    )


def _linears(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the dense layers of a module in order, adapted or not, but none inside an adapter."""
    base = unwrapped(module)
    if isinstance(base, nn.Linear):
        yield name, base
    for child_name, child in base.named_children():
        yield from _linears(child, f"{name}.{child_name}")


def _last_linear(module: nn.Module, name: str = "") -> tuple[str, nn.Linear]:
    linears = list(_linears(module, name))
    if not linears:
        raise ValueError(
            f"UniAdapter cannot adapt {type(unwrapped(module)).__name__}: it adapts dense layers and modules "
            "that end in one, such as a whole ViT block; change `target_modules`."
        )
    return linears[-1]


def default_target_modules(model: nn.Module) -> set[str]:
    """Return the names, within a block, of the output projection of the attention: its last dense layer."""
    return {_last_linear(unwrapped(block).get_submodule("attention"), "attention")[0] for block in vit_blocks(model)}


@dataclass
class UniAdapterConfig(PeftConfig):
    """Configuration of a UniAdapter; see the fields for their meaning."""

    r: int = field(default=64, metadata={"help": "Width of the bottleneck, at least 1."})
    scale: float = field(default=0.1, metadata={"help": "Factor s on the output of the bottleneck."})
    use_bias: bool = field(
        default=True,
        # not `bias`: PEFT gives that field the meaning "which biases of the base model to train"
        metadata={"help": "Whether the two projections of the bottleneck have biases."},
    )
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Names (or endings of names), or one regular expression, of the modules to adapt. By default "
                "the output projection of the attention in every block of a ViT. Whole blocks may be named."
            )
        },
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or endings of names), or one regular expression, of modules to leave alone."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the adapters that are trained and saved, such as a new head."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PeftType.UNIADAPTER
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r={self.r!r} given; the bottleneck width must be an integer of at least 1, e.g. r=64.")
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale!r} given; it must be a finite number, e.g. scale=0.1.")
        if not isinstance(self.use_bias, bool):
            raise ValueError(f"use_bias={self.use_bias!r} given; it must be True or False.")


class UniAdapterLayer(BaseTunerLayer):
    """A module with bottleneck adapters on its output; the last dimension of the output is adapted."""

    adapter_layer_names = ("uniadapter_down", "uniadapter_up")
    other_param_names = ("r", "scale")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: UniAdapterConfig) -> None:
        self.base_layer = base_layer
        self.features = _last_linear(base_layer)[1].out_features
        self.r: dict[str, int] = {}
        self.scale: dict[str, float] = {}
        self.uniadapter_down = nn.ModuleDict()
        self.uniadapter_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: UniAdapterConfig) -> None:
        """Add a fresh adapter to this layer."""
        self.r[adapter_name] = config.r
        self.scale[adapter_name] = config.scale
        self.uniadapter_down[adapter_name] = nn.Linear(self.features, config.r, bias=config.use_bias)
        self.uniadapter_up[adapter_name] = nn.Linear(config.r, self.features, bias=config.use_bias)
        self.reset_uniadapter_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_uniadapter_parameters(self, adapter_name: str) -> None:
        """Start an adapter anew as the identity: Kaiming-uniform down projection, everything else zero."""
        down, up = self._projections(adapter_name)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        for projection in (down, up):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def _projections(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
        down, up = self.uniadapter_down[adapter_name], self.uniadapter_up[adapter_name]
        return cast(nn.Linear, down), cast(nn.Linear, up)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(_last_linear(base_layer)[1])
        return device, dtype

    def adapt(self, y: torch.Tensor) -> torch.Tensor:
        """Apply eq. 3 with the active adapters to y (..., features); dtype and shape stay."""
        if self.disable_adapters:
            return y
        result = y
        for name in self.active_adapters:
            if name not in self.uniadapter_down:
                continue
            down, up = self._projections(name)
            x = self._cast_input_dtype(y, down.weight.dtype)
            result = result + up(self.scale[name] * torch.relu(down(x))).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Refuse: a ReLU bottleneck has no equivalent weight."""
        raise ValueError(_NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Refuse: nothing can have been merged."""
        raise ValueError(_NOT_MERGEABLE)


class UniAdapterLinear(nn.Module, UniAdapterLayer):
    """A dense layer with bottleneck adapters on its output."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: UniAdapterConfig) -> None:
        super().__init__()
        UniAdapterLayer.__init__(self, base_layer, adapter_name, config)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the dense layer, then the active adapters."""
        return self.adapt(self.base_layer(*args, **kwargs))


class UniAdapterBlock(nn.Module, UniAdapterLayer):
    """A whole block, or any module that ends in a dense layer, with bottleneck adapters on its output.

    The adapters run in a forward hook of the block and before its other hooks: transformers collects
    `hidden_states` with hooks on the blocks, and these must see the adapted output.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: UniAdapterConfig) -> None:
        super().__init__()
        UniAdapterLayer.__init__(self, base_layer, adapter_name, config)
        self._hook = base_layer.register_forward_hook(self._adapt_output, prepend=True)

    def _adapt_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.adapt(output[0]), *output[1:])
        return self.adapt(output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, whose output passes the active adapters."""
        return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self,
        merge: bool,
        safe_merge: bool,  # noqa: ARG002
        adapter_names: list[str] | None,  # noqa: ARG002
    ) -> nn.Module:
        """Return the block without its adapters; called by PEFT's `unload()`."""
        if merge:
            raise ValueError(_NOT_MERGEABLE)
        self._hook.remove()
        return self.base_layer


class UniAdapterModel(BaseTuner):
    """A model with UniAdapters, made by `peft.get_peft_model(model, UniAdapterConfig())`."""

    prefix: str = "uniadapter_"
    tuner_layer_cls = UniAdapterLayer

    def _prepare_adapter_config(
        self,
        peft_config: UniAdapterConfig,
        model_config: dict[str, Any],  # noqa: ARG002
    ) -> UniAdapterConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: UniAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,  # noqa: ARG002
        **_optional_kwargs: Any,
    ) -> None:
        if isinstance(target, UniAdapterLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer_cls = UniAdapterLinear if isinstance(unwrapped(target), nn.Linear) else UniAdapterBlock
        self._replace_module(parent, target_name, layer_cls(target, adapter_name, peft_config), target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, self.tuner_layer_cls):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # unloading: PEFT would look for a `.weight`, which a block does not have
            setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(_NOT_MERGEABLE)


def _register() -> None:
    """Make PEFT know the method; the first copy of this file to be imported stays in charge."""
    if _PeftType.UNIADAPTER in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[_PeftType.UNIADAPTER] = UniAdapterConfig
    PEFT_TYPE_TO_TUNER_MAPPING[_PeftType.UNIADAPTER] = UniAdapterModel
    PEFT_TYPE_TO_PREFIX_MAPPING[_PeftType.UNIADAPTER] = UniAdapterModel.prefix


_register()
