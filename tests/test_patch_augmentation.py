import pytest
import torch
from torch import Tensor

from glare.draws import Draws
from glare.patch_augmentation import augment_patches, sample_patch_mask
from glare.photometric import gaussian_blur

GRID = (14, 14)
PATCHES = 196
KINDS = ("blur", "noise", "rotation")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(
    count: int = 1000, *, prob: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5), seed: int = 0
) -> Tensor:
    return sample_patch_mask(Draws(generator(seed), count), GRID, prob=prob, ratio=ratio, block=False)


def block_mask(
    count: int = 200, *, grid: tuple[int, int] = GRID, ratio: tuple[float, float] = (0.1, 0.5), seed: int = 0
) -> Tensor:
    return sample_patch_mask(Draws(generator(seed), count), grid, prob=1.0, ratio=ratio, block=True)


def changed(images: Tensor, mask: Tensor, kind: str, *, patch_size: int = 4, seed: int = 0) -> Tensor:
    generators = Draws(generator(seed), len(images)).generators()
    return augment_patches(images, mask, kind=kind, patch_size=patch_size, blur_sigma=0.3125, generators=generators)


def in_patches(images: Tensor, size: int) -> Tensor:
    """(n, c, h, w) -> (n, patches, c, size, size)."""
    n, c, h, w = images.shape
    patches = [
        images[:, :, row : row + size, column : column + size]
        for row in range(0, h, size)
        for column in range(0, w, size)
    ]
    return torch.stack(patches, dim=1).view(n, -1, c, size, size)


# Which patches


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.777, 1.0])
def test_a_fixed_ratio_gives_exactly_that_number(ratio: float):
    mask = random_mask(50, prob=1.0, ratio=(ratio, ratio))
    assert mask.shape == (50, PATCHES) and mask.dtype == torch.bool
    assert (mask.sum(dim=1) == int(ratio * PATCHES)).all()


def test_half_of_the_images_are_left_alone():
    count = random_mask(4000).sum(dim=1)
    assert 0.46 < (count == 0).float().mean() < 0.54
    assert not random_mask(100, prob=0.0).any()
    assert (random_mask(100, prob=1.0).sum(dim=1) > 0).all()


def test_the_ratio_is_uniform():
    share = random_mask(4000, prob=1.0).sum(dim=1) / PATCHES
    assert share.min() >= 0.1 - 1 / PATCHES and share.max() <= 0.5
    levels = torch.linspace(0.1, 0.9, 9)
    expected = 0.1 + 0.4 * levels
    assert (share.quantile(levels) - expected).abs().max() < 0.015
    assert abs(share.mean() - 0.3) < 0.01, "the paper's 30 %"


def test_all_patches_are_equally_likely():
    share = random_mask(4000, prob=1.0).float().mean(dim=0)
    assert (share - 0.3).abs().max() < 0.04
    assert len(random_mask(20, prob=1.0, ratio=(0.3, 0.3)).unique(dim=0)) == 20


def test_masks_follow_the_generator():
    for sample in (random_mask, block_mask):
        assert torch.equal(sample(20, seed=1), sample(20, seed=1))
        assert not torch.equal(sample(20, seed=1), sample(20, seed=2))


def test_blocks_hold_at_most_what_is_wanted():
    for ratio in (0.1, 0.3, 0.5):
        count = block_mask(ratio=(ratio, ratio)).sum(dim=1)
        assert (count <= int(ratio * PATCHES)).all()
        assert (count > 0).all()
        assert count.float().mean() > 0.9 * int(ratio * PATCHES)


def test_blocks_are_blocks():
    """Patches of a block have more neighbours in the mask than patches at random places."""

    def neighbours(mask: Tensor) -> float:
        grid = mask.view(-1, *GRID)
        pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
        return float(pairs / grid.sum())

    blocks, scattered = block_mask(ratio=(0.3, 0.3)), random_mask(200, prob=1.0, ratio=(0.3, 0.3))
    assert neighbours(blocks) > 1.35 > 2.5 * neighbours(scattered)


def test_the_first_block_is_a_rectangle_of_allowed_shape():
    """With ``wanted`` equal to the smallest area (14 // 3)^2 = 16, there is one candidate area only."""
    wanted = 16
    masks = block_mask(ratio=((wanted + 0.5) / PATCHES,) * 2).view(-1, *GRID)
    whole = 0
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if box.all() and int(mask.sum()) >= 12:
            whole += 1
            assert 0.25 <= box.shape[0] / box.shape[1] <= 4
    assert whole > 20


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 8), (6, 6), (16, 16)])
@pytest.mark.parametrize("block", [False, True])
def test_any_grid_has_masks(grid: tuple[int, int], block: bool):
    mask = sample_patch_mask(Draws(generator(), 20), grid, prob=1.0, ratio=(0.1, 1.0), block=block)
    assert mask.shape == (20, grid[0] * grid[1])
    if not block and mask.shape[1] > 10:
        assert mask.any()


# What is done to them


@pytest.mark.parametrize("kind", KINDS)
def test_other_patches_stay_bit_equal(kind: str):
    images = torch.randn(6, 3, 16, 24, generator=generator(1))
    mask = torch.rand(6, 24, generator=generator(2)) < 0.3
    mask[2] = False
    before = images.clone()
    result = changed(images, mask, kind)
    assert torch.equal(images, before), "the argument is not written to"
    same = (in_patches(result, 4) == in_patches(images, 4)).flatten(2).all(dim=2)
    assert torch.equal(same, ~mask)


@pytest.mark.parametrize("kind", KINDS)
def test_without_chosen_patches_the_views_are_the_very_same(kind: str):
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(changed(images, torch.zeros(2, 4, dtype=torch.bool), kind), images)


def test_mask_tokens_leave_the_pixels_to_the_encoder():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(changed(images, torch.ones(2, 4, dtype=torch.bool), "mask"), images)


def test_blur_is_the_blurred_view_where_chosen():
    """M * blur(x) + (1 - M) * x: the kernel reaches beyond the patch. 5 px for a patch of 16 px."""
    images = torch.randn(3, 3, 64, 48, generator=generator(1))
    mask = torch.rand(3, 12, generator=generator(2)) < 0.5
    assert mask.any(dim=1).all()
    result = in_patches(changed(images, mask, "blur", patch_size=16), 16)
    blurred = in_patches(gaussian_blur(images, torch.full((3,), 5.0), radius=15), 16)
    torch.testing.assert_close(result[mask], blurred[mask], atol=1e-6, rtol=0)


def test_blur_takes_the_detail_out_of_a_patch():
    """One cycle a patch falls to 0.15, two cycles to almost nothing, half a cycle keeps 0.62 (sigma of 5 / 16)."""
    x = (torch.arange(224) + 0.5) / 16
    for cycles, kept in ((0.5, 0.62), (1.0, 0.146), (2.0, 4e-4)):
        wave = torch.cos(2 * torch.pi * cycles * x).expand(1, 3, 224, 224)
        result = changed(wave, torch.ones(1, PATCHES, dtype=torch.bool), "blur", patch_size=16)
        middle = result[0, 0, 112, 64:160]
        assert abs(float(middle.abs().max() / wave[0, 0, 112, 64:160].abs().max()) - kept) < 0.02


def test_rotation_turns_each_patch_by_itself():
    images = torch.randn(40, 3, 8, 12, generator=generator(1))
    mask = torch.ones(40, 6, dtype=torch.bool)
    given, result = in_patches(images, 4).flatten(0, 1), in_patches(changed(images, mask, "rotation"), 4).flatten(0, 1)
    turns = torch.stack([(result == given.rot90(k, dims=(2, 3))).flatten(1).all(dim=1) for k in range(4)])
    assert (turns.sum(dim=0) == 1).all(), "every patch is one of its own rotations"
    assert not turns[0].any(), "and none stays as it is"
    assert (turns[1:].float().mean(dim=1) - 1 / 3).abs().max() < 0.1
    by_image = turns.int().argmax(dim=0).view(40, 6)
    assert (by_image != by_image[:, :1]).any(dim=1).float().mean() > 0.9, "drawn patch by patch"


def test_noise_has_the_variance_of_a_normalised_image():
    images = torch.zeros(20, 3, 16, 16)
    result = changed(images, torch.ones(20, 16, dtype=torch.bool), "noise")
    assert abs(result.mean()) < 0.03 and abs(result.std() - 1) < 0.03


@pytest.mark.parametrize("kind", ["noise", "rotation"])
def test_draws_follow_the_generator(kind: str):
    images, mask = torch.randn(4, 3, 16, 16), torch.ones(4, 16, dtype=torch.bool)
    assert torch.equal(changed(images, mask, kind, seed=1), changed(images, mask, kind, seed=1))
    assert not torch.equal(changed(images, mask, kind, seed=1), changed(images, mask, kind, seed=2))
