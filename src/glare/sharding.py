"""The blocks of a ViT sharded over processes (FSDP2), where weights, gradients and optimizer state fill a GPU.

A block's weights are gathered while it runs, and its gradients are averaged and scattered. What lies outside the blocks
is small, heads included; it stays whole on every process, and its gradients are averaged by ``average_whole``.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from glare.errors import UserError
from glare.modeling_glare import vit_blocks


def check_precision(accelerator: Accelerator) -> None:
    """Raise UserError where blocks cannot be sharded: a scaled loss needs all gradients whole, or all in shards."""
    if accelerator.num_processes > 1 and accelerator.mixed_precision == "fp16":
        raise UserError(
            "shard does not go with precision fp16 on several processes; give --precision bf16 or fp32, or leave "
            "--shard out"
        )


def shard_blocks(backbone: PreTrainedModel) -> None:
    """Give each process its part of every block. Optimizers are made afterwards: the parameters are new ones."""
    for block in vit_blocks(backbone):
        # after the forward pass, as the teacher has no backward pass after which to do it
        sharded = fully_shard(block, reshard_after_forward=True)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo of torch 2.8 sums where it is asked for a mean


@torch.no_grad()
def join_blocks(backbone: PreTrainedModel) -> None:
    """Make sharded weights whole again for good, on every process; the blocks are only to be saved after that."""
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                joined = nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, joined)


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` is."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def average_whole(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Average the gradients of parameters that are not sharded over processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    packed = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, packed.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; to be called on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor in the shards of ``model``, if that has some and is of its shape."""
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms (n,) of tensors that may be sharded, in one message."""
    squares = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors])).square()
    sharded = torch.tensor([isinstance(tensor, DTensor) for tensor in tensors], device=squares.device)
    if sharded.any():
        parts = torch.where(sharded, squares, 0)
        torch.distributed.all_reduce(parts)
        squares = torch.where(sharded, parts, squares)
    return squares.sqrt()
