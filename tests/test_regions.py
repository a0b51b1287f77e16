import pytest
import torch
from torch import Tensor

from glare.draws import Draws
from glare.regions import RegionConfig, Regions, sample_regions

GRID = (14, 14)
HEADS = 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(images: int, seed: int = 0) -> Draws:
    return Draws(generator(seed), images)


def inputs(images: int = 8, heads: int = HEADS, grid: tuple[int, int] = GRID, *, share: float = 0.5, seed: int = 0):
    """Attention that sums to 1 a head, and a match of which ``share`` is valid."""
    g, n = generator(seed), grid[0] * grid[1]
    attention = torch.randn(images, heads, n, generator=g).mul(3).softmax(dim=-1)
    valid = torch.rand(images, n, generator=g) < share
    index = torch.where(valid, torch.randint(n, (images, n), generator=g), 0)
    return attention, (index, valid)


def sample(config: RegionConfig | None = None, *, grid: tuple[int, int] = GRID, seed: int = 0, **given) -> Regions:
    attention, match = inputs(grid=grid, **given)
    return sample_regions(attention, match, grid, config or RegionConfig(), draws=draws(len(attention), seed))


def patches(regions: Regions, image: int, region: int) -> list[int]:
    return regions.index[image, region][regions.valid[image, region]].tolist()


def sides(chosen: list[int], columns: int) -> tuple[int, int, int, int]:
    """First row, first column, rows and columns of a region, which must be a full rectangle without repeats."""
    rows, cols = [p // columns for p in chosen], [p % columns for p in chosen]
    height, width = max(rows) - min(rows) + 1, max(cols) - min(cols) + 1
    assert sorted(chosen) == [
        r * columns + c for r in range(min(rows), max(rows) + 1) for c in range(min(cols), max(cols) + 1)
    ]
    assert len(chosen) == height * width
    return min(rows), min(cols), height, width


def each(regions: Regions):
    for image in range(regions.index.shape[0]):
        for region in range(regions.index.shape[1]):
            yield image, region, patches(regions, image, region)


def expected_start(attention: Tensor, valid: Tensor) -> int:
    """The most attended patch among those with a correspondence."""
    best, start = -1.0, 0
    for patch in range(len(attention)):
        if valid[patch] and float(attention[patch]) > best:
            best, start = float(attention[patch]), patch
    return start


@pytest.mark.parametrize("anchor", ["corner", "centre"])
@pytest.mark.parametrize("sampling", ["attention", "random"])
@pytest.mark.parametrize("grid", [GRID, (16, 16), (9, 20)])
def test_regions_are_rectangles_of_allowed_sides_inside_the_grid(grid: tuple[int, int], sampling: str, anchor: str):
    regions = sample(RegionConfig(sampling=sampling, anchor=anchor), grid=grid)
    assert regions.index.shape == regions.valid.shape == (8, HEADS, 49)
    for _, _, chosen in each(regions):
        row, column, height, width = sides(chosen, grid[1])
        assert row >= 0 and row + height <= grid[0] and column >= 0 and column + width <= grid[1]
        assert 3 <= height <= 7 and 3 <= width <= 7


def test_sides_are_uniform_and_independent():
    regions = sample(images=600)
    found = torch.tensor([sides(chosen, 14)[2:] for _, _, chosen in each(regions)])
    counts = torch.zeros(5, 5)
    for height, width in found.tolist():
        counts[height - 3, width - 3] += 1
    assert (counts / counts.sum() - 1 / 25).abs().max() < 0.012


@pytest.mark.parametrize("anchor", ["corner", "centre"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_a_region_holds_the_most_attended_patch_with_a_correspondence(share: float, anchor: str):
    attention, (index, valid) = inputs(share=share)
    config = RegionConfig(anchor=anchor)
    regions = sample_regions(attention, (index, valid), GRID, config, draws=draws(len(attention)))
    for image, region, chosen in each(regions):
        if not valid[image].any():
            continue
        start = expected_start(attention[image, region], valid[image])
        assert start in chosen
        row, column, height, width = sides(chosen, 14)
        back = (height // 2, width // 2) if anchor == "centre" else (0, 0)
        assert row == min(max(start // 14 - back[0], 0), 14 - height)
        assert column == min(max(start % 14 - back[1], 0), 14 - width)


def test_correspondence_is_carried_along():
    attention, (index, valid) = inputs()
    regions = sample_regions(attention, (index, valid), GRID, RegionConfig(), draws=draws(len(attention)))
    for image in range(8):
        for region in range(HEADS):
            for place in range(49):
                is_patch = bool(regions.valid[image, region, place])
                patch = int(regions.index[image, region, place])
                matched = is_patch and bool(valid[image, patch])
                assert bool(regions.matched[image, region, place]) == matched
                if matched:
                    assert regions.match_index[image, region, place] == index[image, patch]
    assert (regions.matched & ~regions.valid).sum() == 0
    assert 0 < regions.matched.sum() < regions.valid.sum()


def test_every_region_has_a_matched_patch_if_its_image_has_one():
    for seed in range(20):
        attention, (index, valid) = inputs(share=0.02, seed=seed)
        regions = sample_regions(attention, (index, valid), GRID, RegionConfig(), draws=draws(len(attention), seed))
        assert torch.equal(regions.matched.any(dim=2), valid.any(dim=1, keepdim=True).expand(8, HEADS))


@pytest.mark.parametrize("sampling", ["attention", "random"])
def test_without_correspondence_nothing_is_matched(sampling: str):
    regions = sample(RegionConfig(sampling=sampling), share=0.0)
    assert not regions.matched.any()
    assert regions.index.amax() < 196 and regions.match_index.amax() == 0


def test_random_starts_do_not_look_at_attention():
    attention, match = inputs(images=400, share=1.0)
    attention[:] = 0
    attention[:, :, 100] = 1
    config = RegionConfig(sampling="random", min_side=1, max_side=1)
    regions = sample_regions(attention, match, GRID, config, draws=draws(len(attention)))
    counts = torch.bincount(regions.index.flatten(), minlength=196) / regions.index.numel()
    assert counts.max() < 5 / 196 and (counts > 0).float().mean() > 0.95


def test_random_starts_have_a_correspondence():
    attention, (index, valid) = inputs(share=0.1)
    config = RegionConfig(sampling="random", min_side=1, max_side=1)
    regions = sample_regions(attention, (index, valid), GRID, config, draws=draws(len(attention)))
    assert valid.gather(1, regions.index.flatten(1)).all()


@pytest.mark.parametrize(("heads", "count"), [(6, None), (6, 6), (6, 3), (3, 6), (12, 6), (1, 1), (1, None)])
def test_one_region_a_head_or_as_many_as_asked_for(heads: int, count: int | None):
    """Heads are told by where each looks, in an image where each looks at its own patch."""
    attention, match = inputs(images=2, heads=heads, share=1.0)
    attention[:] = 0
    for head in range(heads):
        attention[:, head, 14 * head + head] = 1
    config = RegionConfig(count=count, min_side=1, max_side=1)
    seen = []
    for seed in range(40):
        regions = sample_regions(attention, match, GRID, config, draws=draws(len(attention), seed))
        used = [patch // 14 for patch in regions.index[0, :, 0].tolist()]
        assert torch.equal(regions.index[0], regions.index[1]), "one choice of heads for the batch"
        seen.append(tuple(used))
    wanted = heads if count is None else count
    for used in seen:
        assert len(used) == wanted
        assert len(set(used)) == min(wanted, heads), "no head twice before every head was taken"
    if wanted < heads:
        assert len(set(seen)) > 5, "drawn anew each time"
        assert {head for used in seen for head in used} == set(range(heads))
    if wanted == heads:
        assert set(seen) == {tuple(range(heads))}


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 9), (5, 3), (6, 6)])
@pytest.mark.parametrize("anchor", ["corner", "centre"])
def test_tiny_grids_clamp_the_sides(grid: tuple[int, int], anchor: str):
    regions = sample(RegionConfig(anchor=anchor), grid=grid, share=1.0)
    for _, _, chosen in each(regions):
        row, column, height, width = sides(chosen, grid[1])
        for side, limit in ((height, grid[0]), (width, grid[1])):
            assert min(3, limit) <= side <= min(7, limit)
        assert row + height <= grid[0] and column + width <= grid[1]


def test_padding_is_marked_and_harmless():
    regions = sample()
    assert not regions.index[~regions.valid].any()
    assert not regions.matched[~regions.valid].any()
    assert regions.match_index.amin() >= 0 and regions.match_index.amax() < 196
    assert (regions.valid.sum(dim=2) >= 9).all()


def test_a_fixed_side_needs_no_padding():
    regions = sample(RegionConfig(min_side=4, max_side=4))
    assert regions.index.shape[2] == 16 and regions.valid.all()


def test_the_generator_alone_decides():
    for sampling in ("attention", "random"):
        config = RegionConfig(sampling=sampling, count=3)
        first, again, other = (sample(config, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.index, again.index) and torch.equal(first.valid, again.valid)
        assert not torch.equal(first.index, other.index)


def test_attention_of_low_precision_is_read_too():
    attention, match = inputs()
    half = attention.to(torch.bfloat16)
    expected = sample_regions(half.float(), match, GRID, RegionConfig(), draws=draws(len(half)))
    found = sample_regions(half, match, GRID, RegionConfig(), draws=draws(len(half)))
    assert torch.equal(found.index, expected.index)


@pytest.mark.parametrize("given", [{"min_side": 0}, {"min_side": 5, "max_side": 4}, {"count": 0}])
def test_impossible_settings_are_refused(given: dict[str, int]):
    with pytest.raises(ValueError, match="give"):
        RegionConfig(**given)
