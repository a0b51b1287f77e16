"""All that changes during pre-training, as a checkpoint holds it, and how one step changes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glare.errors import UserError
from glare.runtime import optimizer_tensors, restore_optimizer
from glare.sharding import is_sharded, join_blocks, like, local, norms, whole
from glare.student import Student
from glare.teacher import averaged_parameters
from glare.weight_decay import parameter_groups


@dataclass
class TrainState:
    """All that changes during a run and that a checkpoint holds."""

    student: Student
    teacher: Student
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """What trains, its averages, the centres and the optimizer, by name; to be called on every process."""
        named = self._weights()
        named |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        return {name: whole(value) for name, value in named.items()}

    def _weights(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {
            f"student.{name}": p for name, p in self.student.named_parameters() if p.requires_grad
        }
        named |= {f"teacher.{name}": p for name, p, _ in averaged_parameters(self.teacher, self.student)}
        named |= {f"objective.{name}": buffer for name, buffer in self.student.objective.named_buffers()}
        return named

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo ``tensors``, on every process. Raises UserError when the checkpoint belongs to another model."""
        self.restore_weights(tensors)
        prefix = "optimizer."
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        saved = {key: like(value, parameters[int(key.split(".")[0])]) for key, value in saved.items()}
        restore_optimizer(self.optimizer, saved)

    @torch.no_grad()
    def restore_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """``restore`` without the optimizer, which keeps its shards after ``join``; then one process may do it."""
        own = self._weights()
        found = {name for name in tensors if not name.startswith("optimizer.")}
        if own.keys() != found:
            raise UserError(
                f"the checkpoint does not fit this model ({len(own.keys() ^ found)} tensors differ, for example "
                f"{min(own.keys() ^ found)}); give the recipe it was written with"
            )
        for name, value in own.items():
            value.copy_(like(tensors[name], value))

    def join(self) -> None:
        """Make sharded weights whole again for good, on every process."""
        join_blocks(self.student.backbone)
        join_blocks(self.teacher.backbone)

    @torch.no_grad()
    def export_teacher(self) -> None:
        """Put the averages where the student's weights are."""
        for _, ours, theirs in averaged_parameters(self.teacher, self.student):
            theirs.copy_(ours)


def make_optimizer(student: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over what trains, without a learning rate yet; on a GPU one kernel for all parameters that are whole."""
    on_gpu = next(student.parameters()).device.type == "cuda"
    return torch.optim.AdamW(parameter_groups(student, weight_decay), lr=0.0, fused=on_gpu and not is_sharded(student))


@torch.no_grad()
def clip_each(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient of each parameter to a norm of at most ``limit``, returning the norm of all before (DINO).

    A limit of 0 scales nothing, as in DINO.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    lengths = norms(gradients)
    if limit:
        factors = (limit / (lengths + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], factors.unbind())
    total: Tensor = lengths.norm()
    return total


def clip_parts(student: nn.Module, limit: float) -> dict[str, Tensor]:
    """``clip_each`` of all that trains; returns the norms before, of all gradients and of backbone and heads apart."""
    parts: dict[str, list[nn.Parameter]] = {"grad_norm_backbone": [], "grad_norm_heads": []}
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            parts["grad_norm_heads" if name.startswith("objective.") else "grad_norm_backbone"].append(parameter)
    norms = {name: clip_each(parameters, limit) for name, parameters in parts.items() if parameters}
    return {"grad_norm": torch.stack(list(norms.values())).norm(), **norms}
