"""Random numbers that belong to the images of a batch, not to the process that handles them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Draws:
    """Random numbers for the images of a batch of ``total``, of which those of ``share`` are given out.

    Numbers are drawn for the whole batch in any case, so that each image gets the same ones however the batch is
    shared out over processes. They live on the CPU, as ``generator`` does.
    """

    generator: torch.Generator
    total: int
    share: slice = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(range(self.total)[self.share])

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1), (images of the share, *shape)."""
        return torch.rand((self.total, *shape), generator=self.generator, dtype=dtype)[self.share]

    def generators(self) -> list[torch.Generator]:
        """One for each image of the share, where it depends on the image how much is drawn."""
        seeds = torch.randint(LARGEST_SEED, (self.total,), generator=self.generator)[self.share]
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
