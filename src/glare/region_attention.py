"""UDI's region attention, kept beside a converted ViT: the cross-attention of GLARE starts from it (paper eq. 5)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glare.model_names import place_of
from glare.objectives.glare import CrossAttention

FILE = "region_attention.safetensors"


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, named as in ``CrossAttention``, into the folder of a ViT."""
    save_file({name: tensor.to(copy=True).contiguous() for name, tensor in tensors.items()}, folder / FILE)


@torch.no_grad()
def start(cross_attention: CrossAttention, backbone: str) -> str | None:
    """Load the region attention beside ``backbone``, where there is one that fits, and return what was done.

    None where there is no such file, and the cross-attention starts as it is.
    """
    file = place_of(backbone).file(FILE)
    if file is None:
        return None
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        return f"the cross-attention starts at random: {FILE} beside the backbone cannot be read ({error})"
    own = cross_attention.state_dict()
    differ = [name for name in {**own, **tensors} if _shape(own, name) != _shape(tensors, name)]
    if differ:
        name = differ[0]
        return (
            f"the cross-attention starts at random: {FILE} beside the backbone does not fit it, {name} is "
            f"{_shape(tensors, name) or 'missing'} there and {_shape(own, name) or 'unknown'} here"
        )
    cross_attention.load_state_dict(tensors)
    return f"the cross-attention starts from the backbone's own region attention ({FILE})"


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
