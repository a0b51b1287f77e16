import math
import random

import pytest
import torch
from reference.builders import coordinate_image, crop_of, packed
from reference.correspondence import Box, correspondence, overlap, patch_in_source, random_resized_crop
from torch import Tensor

from glare.crops import cut
from glare.draws import Draws
from glare.geometry import Crop, match, patch_centres, random_resized_crops

SIZE = (240, 180)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(images: int, seed: int = 0) -> Draws:
    return Draws(generator(seed), images)


def random_boxes(count: int, seed: int, *, whole: bool = True) -> list[Box]:
    draw = random.Random(seed)
    boxes = []
    for _ in range(count):
        width, height = draw.uniform(20, SIZE[0]), draw.uniform(20, SIZE[1])
        left, top = draw.uniform(0, SIZE[0] - width), draw.uniform(0, SIZE[1] - height)
        values = [left, top, width, height]
        boxes.append(Box(*[int(v) if whole else v for v in values], flip=draw.random() < 0.5))
    return boxes


def crops_of(boxes: list[Box]) -> Crop:
    return crop_of(boxes, [SIZE] * len(boxes))


def as_list(index: Tensor, valid: Tensor) -> list[int | None]:
    return [int(i) if v else None for i, v in zip(index, valid, strict=True)]


def test_points_go_to_the_source_and_back():
    crop = crops_of([Box(60, 45, 120, 90, flip=False), Box(60, 45, 120, 90, flip=True)])
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.25, 0.5]])
    expected = torch.tensor([[[0.25, 0.25], [0.75, 0.75], [0.375, 0.5]], [[0.75, 0.25], [0.25, 0.75], [0.625, 0.5]]])
    torch.testing.assert_close(crop.to_source(points), expected)
    torch.testing.assert_close(crop.to_view(crop.to_source(points)), points.expand(2, 3, 2))


def test_crops_can_be_indexed_and_flattened():
    crop = Crop(torch.rand(2, 3, 2), torch.rand(2, 3, 2))
    assert torch.equal(crop[1].offset, crop.offset[1])
    assert torch.equal(crop.flatten().scale, crop.scale.reshape(6, 2))
    assert torch.equal(crop.to(torch.device("cpu")).offset, crop.offset)


def test_patch_centres_are_row_major_and_ordered_x_y():
    expected = [((column + 0.5) / 3, (row + 0.5) / 2) for row in range(2) for column in range(3)]
    torch.testing.assert_close(patch_centres((2, 3)), torch.tensor(expected))


def test_a_view_matches_itself():
    crop = crops_of(random_boxes(50, seed=1))
    index, valid = match(crop, crop, (14, 14))
    assert valid.all()
    assert torch.equal(index, torch.arange(196).expand(50, -1))


def test_a_flip_mirrors_columns():
    box = Box(30, 20, 100, 80, flip=False)
    index, valid = match(crops_of([box]), crops_of([box._replace(flip=True)]), (4, 6))
    assert valid.all()
    assert torch.equal(index.view(4, 6), torch.arange(24).view(4, 6).flip(1))
    both, _ = match(crops_of([box._replace(flip=True)]), crops_of([box._replace(flip=True)]), (4, 6))
    assert torch.equal(both[0], torch.arange(24))


@pytest.mark.parametrize("other", [Box(120, 0, 100, 180, flip=True), Box(0, 90, 110, 90, flip=False)])
def test_disjoint_views_match_nowhere(other: Box):
    index, valid = match(crops_of([Box(0, 0, 110, 80, flip=False)]), crops_of([other]), (7, 7))
    assert not valid.any()
    assert not index.any()  # usable as an index all the same


def test_half_the_scale_gives_blocks_of_two_by_two():
    wide, close = Box(40, 20, 160, 160, flip=False), Box(80, 60, 80, 80, flip=False)
    index, valid = match(crops_of([close]), crops_of([wide]), (8, 8))
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert valid.all()
    assert torch.equal(index.view(8, 8), (2 + rows // 2) * 8 + 2 + columns // 2)


def test_from_a_to_b_and_back_to_a():
    """Between views of one scale, apart by whole patches, the match is one to one."""
    draw = random.Random(3)
    for _ in range(50):
        width, height = draw.randint(60, 120), draw.randint(60, 90)
        a = Box(draw.randint(0, 60), draw.randint(0, 45), width, height, flip=draw.random() < 0.5)
        shift = (draw.randint(-1, 3) * width / 8, draw.randint(-1, 3) * height / 8)  # by whole patches: exact
        b = Box(a.left + shift[0], a.top + shift[1], width, height, flip=draw.random() < 0.5)
        there, valid = match(crops_of([a]), crops_of([b]), (8, 8))
        back, valid_back = match(crops_of([b]), crops_of([a]), (8, 8))
        assert valid.any()
        assert valid_back[0][there[0][valid[0]]].all()
        assert torch.equal(back[0][there[0][valid[0]]], valid[0].nonzero().squeeze(1))


@pytest.mark.parametrize(
    ("grid_a", "grid_b"), [((14, 14), None), ((6, 6), (14, 14)), ((5, 9), (12, 4)), ((1, 1), (3, 3))]
)
def test_match_equals_the_transcription(grid_a: tuple[int, int], grid_b: tuple[int, int] | None):
    a, b = (random_boxes(60, seed, whole=False) for seed in (5, 6))
    index, valid = match(crops_of(a), crops_of(b), grid_a, grid_b)
    differing = 0
    for number, pair in enumerate(zip(a, b, strict=True)):
        expected = correspondence(*pair, grid_a, grid_b or grid_a)
        found = as_list(index[number], valid[number])
        differing += sum(x != y for x, y in zip(expected, found, strict=True))
    assert differing <= 1e-3 * index.numel()  # a centre on the edge of a cell, in float32 and in float64


def test_match_finds_the_patch_of_greatest_overlap():
    """LOCA's definition of the correspondence, by trying all patches (paper 003, section 3)."""
    grid = (6, 5)
    a, b = (random_boxes(40, seed, whole=False) for seed in (8, 9))
    index, valid = match(crops_of(a), crops_of(b), grid)
    checked = 0
    for number, (box_a, box_b) in enumerate(zip(a, b, strict=True)):
        cells = [patch_in_source(box_b, cell, grid) for cell in range(30)]
        for patch in valid[number].nonzero().flatten().tolist():
            areas = [overlap(patch_in_source(box_a, patch, grid), cell) for cell in cells]
            assert areas[int(index[number, patch])] >= max(areas) * (1 - 1e-4)
            checked += 1
    assert checked > 300


def test_leading_dimensions_are_kept():
    a, b = crops_of(random_boxes(6, 1)), crops_of(random_boxes(6, 2))
    index, valid = match(
        Crop(a.offset.view(2, 3, 2), a.scale.view(2, 3, 2)),
        Crop(b.offset.view(2, 3, 2), b.scale.view(2, 3, 2)),
        (4, 4),
    )
    flat = match(a, b, (4, 4))
    assert torch.equal(index.flatten(0, 1), flat[0])
    assert torch.equal(valid.flatten(0, 1), flat[1])


def test_coordinate_image():
    """Pixels that hold their own coordinates: matched patches of two views must show the same place."""
    patch, side = 16, 112
    boxes = [
        [Box(*box[:4], flip=flip) for box in random_boxes(40, seed)]
        for seed, flip in ((11, False), (12, True), (13, True))
    ]
    image = packed([coordinate_image(*SIZE)])
    grid = (side // patch, side // patch)
    places = [
        cut(image, torch.zeros(40, dtype=torch.long), crops_of(group), size=(side, side))
        .mul(255)
        .unfold(2, patch, patch)
        .unfold(3, patch, patch)
        .mean(dim=(-1, -2))[:, :2]
        .flatten(2)
        .transpose(1, 2)
        for group in boxes
    ]  # mean column and row of each patch, (40, n, 2)
    for a, b in ((0, 1), (1, 0), (1, 2), (0, 0)):
        index, valid = match(crops_of(boxes[a]), crops_of(boxes[b]), grid)
        other = places[b].gather(1, index.unsqueeze(-1).expand(-1, -1, 2))
        half = torch.tensor([(box.width / grid[1] / 2, box.height / grid[0] / 2) for box in boxes[b]])
        apart = (places[a] - other).abs() / half.unsqueeze(1)
        assert valid.sum() > 300
        assert apart[valid].max() < 1.1, "half a patch of the teacher's view, and the rounding of the pictures"


# Sampling of crops


def sizes(*pairs: tuple[int, int], repeat: int = 1) -> Tensor:
    return torch.tensor(pairs).repeat_interleave(repeat, dim=0)


def in_px(crop: Crop, size: Tensor) -> tuple[Tensor, Tensor]:
    """First and last edge of crops in px, (n, 2) each."""
    edges = torch.stack([crop.offset, crop.offset + crop.scale]) * size
    return edges.amin(0), edges.amax(0)


@pytest.mark.parametrize("area", [(0.25, 1.0), (0.05, 0.25)])
def test_crops_lie_on_whole_pixels_inside_the_image(area: tuple[float, float]):
    size = sizes((640, 480), (224, 224), (97, 301), repeat=400)
    low, high = in_px(random_resized_crops(size, area=area, flip_prob=0.5, draws=draws(len(size))), size)
    for edge in (low, high):
        assert (edge - edge.round()).abs().max() < 1e-3
    low, high = low.round(), high.round()
    assert (low >= 0).all() and (high <= size).all()
    side = high - low
    share = side.prod(1) / size.prod(1)
    rounding = 1.0 / side.amin(1)
    assert (share >= area[0] - rounding).all() and (share <= area[1] + rounding).all()
    aspect = side[:, 0] / side[:, 1]
    assert (aspect >= 3 / 4 - 2 * rounding).all() and (aspect <= 4 / 3 + 2 * rounding).all()


def test_flips_come_with_their_probability():
    size = sizes((100, 100), repeat=2000)
    for prob, low, high in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.45, 0.55)):
        crop = random_resized_crops(size, area=(0.25, 1.0), flip_prob=prob, draws=draws(len(size)))
        share = (crop.scale[:, 0] < 0).float().mean()
        assert low <= share <= high
        assert (crop.scale[:, 1] > 0).all()


def test_crops_follow_torchvisions_rule_in_distribution():
    """Quantiles of place and size against a literal loop; the image's shape makes many draws not fit."""
    count, size, area = 4000, (300, 140), (0.25, 1.0)
    draw = random.Random(0)
    loop = torch.tensor(
        [random_resized_crop(*size, area=area, ratio=(3 / 4, 4 / 3), draw=draw) for _ in range(count)]
    ).float()
    all_sizes = sizes(size, repeat=count)
    low, high = in_px(
        random_resized_crops(all_sizes, area=area, flip_prob=0.5, draws=draws(len(all_sizes), 1)), all_sizes
    )
    ours = torch.cat([low, high - low], dim=1)
    levels = torch.linspace(0.05, 0.95, 10)
    spread = torch.tensor([300.0, 140.0, 300.0, 140.0])
    difference = (loop.quantile(levels, dim=0) - ours.quantile(levels, dim=0)).abs() / spread
    assert difference.max() < 0.035, difference


def test_aspect_ratios_are_log_uniform():
    size = sizes((4000, 4000), repeat=4000)
    crop = random_resized_crops(size, area=(0.01, 0.05), flip_prob=0.0, draws=draws(len(size)), ratio=(1 / 4, 4))
    turned = (crop.scale[:, 0] / crop.scale[:, 1]).log() / math.log(4)
    levels = torch.linspace(0.05, 0.95, 10)
    assert (turned.quantile(levels) - (2 * levels - 1)).abs().max() < 0.05


def test_every_place_is_as_likely_as_every_other():
    """A crop of 4 x 4 px has five places along a side of 8 px, both edges included."""
    size = sizes((8, 8), repeat=5000)
    crop = random_resized_crops(size, area=(0.25, 0.25), flip_prob=0.5, draws=draws(len(size)), ratio=(1, 1))
    low, _ = in_px(crop, size)
    for axis in (0, 1):
        share = torch.bincount(low[:, axis].round().long()) / 5000
        assert len(share) == 5 and (share - 0.2).abs().max() < 0.02


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (13, 10)), ((10, 1000), (10, 13)), ((1, 1), (1, 1)), ((1, 50), (1, 1)), ((400, 1), (1, 1))],
)
def test_an_extreme_image_gives_its_largest_central_window(size: tuple[int, int], expected: tuple[int, int]):
    all_sizes = sizes(size, repeat=50)
    crop = random_resized_crops(all_sizes, area=(0.9, 1.0), flip_prob=0.5, draws=draws(len(all_sizes)))
    low, high = (edge.round().long() for edge in in_px(crop, all_sizes))
    assert ((high - low) == torch.tensor(expected)).all()
    spare = all_sizes - (high - low)
    assert ((low - spare // 2).abs() <= 1).all()


def test_a_one_pixel_image_has_crops_of_any_area():
    crop = random_resized_crops(sizes((1, 1), repeat=20), area=(0.05, 0.25), flip_prob=0.0, draws=draws(20))
    assert torch.equal(crop.offset, torch.zeros(20, 2)) and torch.equal(crop.scale, torch.ones(20, 2))


def test_the_generator_alone_decides():
    size = sizes((300, 200), (50, 60), repeat=10)

    def draw(seed: int) -> Crop:
        torch.rand(3)  # the global state must not matter
        return random_resized_crops(size, area=(0.25, 1.0), flip_prob=0.5, draws=draws(len(size), seed))

    first, again, other = draw(4), draw(4), draw(5)
    assert torch.equal(first.offset, again.offset) and torch.equal(first.scale, again.scale)
    assert not torch.equal(first.scale, other.scale)
