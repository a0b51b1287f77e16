"""Patch-level augmentation of the student's global views (paper section 4.3): which patches, and what is done to them.

The paper blurs patches instead of masking them, since masked modelling is data-hungry; masking, noise and rotation
are its ablations. A learned mask token takes the place of a patch *after* the patch embedding, so for ``mask`` the
pixels stay as they are and the encoder gets the mask (see ``features.encode``).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glare.draws import Draws
from glare.geometry import Grid
from glare.photometric import gaussian_blur

BLOCK_ATTEMPTS = 10  # of BEiT's block masking, as in iBOT
BLOCK_ASPECT = 0.3
ROUNDING = 1e-3  # of a float32 share of some thousand squares: 0.6 of 5 is 3
RANDOM = ("noise", "rotation")  # what is done to a patch is drawn, too
NOISE_STD = 1.0  # in units of the normalised image


def sample_patch_mask(draws: Draws, grid: Grid, *, prob: float, ratio: tuple[float, float], block: bool) -> Tensor:
    """Patches to augment of one view of each image, (b, rows * columns) bool, on the CPU.

    An image is left alone with probability 1 - ``prob``; otherwise ``int(r * patches)`` of its patches are chosen
    with r ~ U(ratio), at random places or in BEiT's blocks, as iBOT samples its masks (paper section 7.2).
    """
    patches = grid[0] * grid[1]
    active = draws.rand() < prob
    share = draws.rand() * (ratio[1] - ratio[0]) + ratio[0]
    wanted = torch.where(active, (share * patches).long(), 0)
    if block:
        chosen = zip(wanted.tolist(), draws.generators(), strict=True)
        return torch.stack([_block_mask(count, grid, generator) for count, generator in chosen])
    rank = draws.rand(patches).argsort(dim=1).argsort(dim=1)
    return rank < wanted.unsqueeze(1)


def sample_square_mask(draws: Draws, grid: Grid, *, prob: float, ratio: tuple[float, float], side: int) -> Tensor:
    """As ``sample_patch_mask``, in squares of ``side`` x ``side`` patches: ``ceil(r * squares)`` of them (SimMIM).

    Squares that stick out of the grid on the right and below are cut off.
    """
    rows, columns = (-(-length // side) for length in grid)
    active = draws.rand() < prob
    share = draws.rand() * (ratio[1] - ratio[0]) + ratio[0]
    wanted = torch.where(active, (share * rows * columns - ROUNDING).ceil().long(), 0)
    rank = draws.rand(rows * columns).argsort(dim=1).argsort(dim=1)
    chosen = (rank < wanted.unsqueeze(1)).view(-1, rows, columns)
    patches = chosen.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return patches[:, : grid[0], : grid[1]].flatten(1)


def _block_mask(wanted: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """At most ``wanted`` patches in rectangular blocks of at least a third of the grid's side squared (BEiT)."""
    mask = torch.zeros(grid, dtype=torch.bool)
    smallest = (grid[0] // 3) ** 2
    while (left := wanted - int(mask.sum())) > 0:
        for _ in range(BLOCK_ATTEMPTS):
            block = _random_block(grid, area=(min(smallest, left), left), generator=generator)
            fresh = int((~mask[block]).sum()) if block else 0
            if block and 0 < fresh <= left:
                mask[block] = True
                break
        else:
            break
    return mask.flatten()


def _random_block(grid: Grid, *, area: tuple[int, int], generator: torch.Generator) -> tuple[slice, slice] | None:
    size, aspect, top, left = torch.rand(4, generator=generator).tolist()
    size = area[0] + size * (area[1] - area[0])
    stretch = math.exp((2 * aspect - 1) * math.log(1 / BLOCK_ASPECT))
    rows, columns = round(math.sqrt(size * stretch)), round(math.sqrt(size / stretch))
    if not (0 < rows <= grid[0] and 0 < columns <= grid[1]):
        return None
    first_row, first_column = int(top * (grid[0] - rows + 1)), int(left * (grid[1] - columns + 1))
    return slice(first_row, first_row + rows), slice(first_column, first_column + columns)


def augment_patches(
    images: Tensor,
    mask: Tensor,
    *,
    kind: str,
    patch_size: int,
    blur_sigma: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """X_m of paper eq. 8: the views with the chosen patches changed, every other pixel bit-equal.

    Args:
        images: (n, 3, h, w), normalised.
        mask: (n, patches) bool, row-major.
        kind: ``blur`` (the whole view with a Gaussian, then composed), ``inner_blur`` (each patch by itself, so that
            nothing leaks in from its neighbours), ``noise`` (Gaussian, added), ``rotation`` (each patch by 90, 180
            or 270 degrees), or ``mask`` (left to the encoder, the images come back as given).
        patch_size: side of a patch in px.
        blur_sigma: of both blurs, in patch sides.
        generators: of each of the n images, on the CPU; only the kinds in ``RANDOM`` need them.
    """
    rows = mask.any(dim=1).nonzero().squeeze(1)
    if kind == "mask" or not len(rows):
        return images
    chosen = images[rows]
    where = _to_pixels(mask[rows], patch_size, chosen.shape[-2:])
    if kind == "blur":
        changed = torch.where(where, _blur(chosen, blur_sigma * patch_size), chosen)
    elif kind == "noise":
        noise = torch.stack([torch.randn(chosen.shape[1:], generator=generators[row]) for row in rows.tolist()])
        changed = torch.where(where, chosen + NOISE_STD * noise.to(chosen), chosen)
    else:
        patches = _split(chosen, patch_size)
        picked = patches[mask[rows]]
        if kind == "rotation":
            turns = torch.stack([_turns(mask.shape[1], generators[row]) for row in rows.tolist()]).to(mask.device)
            patches[mask[rows]] = _rotate(picked, turns[mask[rows]])
        else:
            patches[mask[rows]] = _blur(picked, blur_sigma * patch_size)
        changed = _join(patches, chosen.shape)
    return images.index_copy(0, rows, changed)


def _to_pixels(mask: Tensor, patch_size: int, size: torch.Size) -> Tensor:
    """(n, patches) -> (n, 1, h, w), each patch's value on all of its pixels."""
    grid = mask.view(len(mask), 1, size[0] // patch_size, size[1] // patch_size)
    return grid.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


def _split(images: Tensor, patch_size: int) -> Tensor:
    """(n, c, h, w) -> (n, patches, c, p, p), row-major, a copy."""
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    cells = images.view(*images.shape[:2], rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).contiguous()


def _join(patches: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``_split``."""
    side = patches.shape[-1]
    cells = patches.unflatten(1, (shape[2] // side, shape[3] // side))
    images: Tensor = cells.permute(0, 3, 1, 4, 2, 5).reshape(shape)
    return images


def _blur(images: Tensor, sigma_px: float) -> Tensor:
    sigma = images.new_full((len(images),), sigma_px)
    return gaussian_blur(images, sigma, radius=math.ceil(3 * sigma_px))


def _turns(patches: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, 4, (patches,), generator=generator)


def _rotate(patches: Tensor, turns: Tensor) -> Tensor:
    """Each of (k, c, p, p) by its number of quarter turns (k,), 1 to 3."""
    turned = patches
    for quarter in (1, 2, 3):
        turned = torch.where(turns.view(-1, 1, 1, 1) == quarter, patches.rot90(quarter, dims=(2, 3)), turned)
    return turned
