"""Gram matrices of many rows and their eigenvalues, in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """Sum of x xᵀ over the rows x of all blocks (n, d), of any floating type: (d, d) float64; 0 without blocks."""
    products = (rows.double().T @ rows.double() for rows in blocks)
    return sum(products, start=torch.zeros((), dtype=torch.float64))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and at least 0, and eigenvectors, as columns, of a Gram matrix (d, d), on one thread.

    The many small steps of the decomposition wait for each other: next to a busy process, two threads were measured
    to take a hundred times as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    return values.clamp(min=0), vectors
