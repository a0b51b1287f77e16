"""The other readings of the paper that are options: each against a literal transcription of its sentence."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from reference import glare_terms as literal
from reference.builders import crop_of
from reference.correspondence import Box, correspondence, overlap, patch_in_source
from reference.glare_cases import CASES, SETTINGS, SOURCE, TEMPERATURE, Case
from torch import Tensor

from glare.geometry import Crop, match
from glare.patch_augmentation import augment_patches
from glare.photometric import gaussian_blur

GRID, LOCAL_GRID = (6, 5), (2, 2)
LOCALS = (Box(10.2, 12.1, 30.3, 28.8, True), Box(35.0, 30.4, 22.7, 41.1, False), Box(60.1, 58.3, 39.2, 40.0, True))


def iou(p: tuple[float, float, float, float], q: tuple[float, float, float, float]) -> float:
    area_p, area_q = ((box[2] - box[0]) * (box[3] - box[1]) for box in (p, q))
    shared = overlap(p, q)
    return shared / (area_p + area_q - shared)


@pytest.mark.parametrize("least", [0.3, 0.5, 0.7])
def test_a_least_overlap_leaves_the_pairs_above_it(least: float):
    draw = torch.Generator().manual_seed(4)
    boxes = [
        Box(x, y, 60 + w, 55 + h, bool(f > 20)) for x, y, w, h, f in (torch.rand(60, 5, generator=draw) * 40).tolist()
    ]
    a, b = boxes[:30], boxes[30:]
    crops = [crop_of(part, [(100, 100)] * 30) for part in (a, b)]
    index, valid = match(*crops, GRID, min_iou=least)
    kept = 0
    for number, (box_a, box_b) in enumerate(zip(a, b, strict=True)):
        for patch, other in enumerate(correspondence(box_a, box_b, GRID, GRID)):
            own = patch_in_source(box_a, patch, GRID)
            value = 0.0 if other is None else iou(own, patch_in_source(box_b, other, GRID))
            if abs(value - least) < 1e-4:
                continue
            assert bool(valid[number, patch]) == (value > least)
            if value > least:
                assert int(index[number, patch]) == other
                kept += 1
            if least >= 0.5:
                others = [iou(own, patch_in_source(box_b, cell, GRID)) for cell in range(30)]
                assert sum(found > least for found in others) == (value > least)
    assert 20 < kept < 30 * 30


def with_locals(case: Case) -> tuple[Case, list[list[Box]]]:
    """The case with two local views of 2 x 2 patches that were cut somewhere."""
    count = len(case.boxes)
    boxes = [[LOCALS[(view + image) % 3] for image in range(count)] for view in range(2)]
    crops = [crop_of(of_view, [SOURCE] * count) for of_view in boxes]
    rows, columns = case.views.grid
    views = replace(
        case.views,
        global_=torch.empty(2, count, 3, 4 * rows, 4 * columns),
        local=torch.empty(2, count, 3, 4 * LOCAL_GRID[0], 4 * LOCAL_GRID[1]),
        local_crops=Crop(torch.stack([c.offset for c in crops]), torch.stack([c.scale for c in crops])),
    )
    return replace(case, views=views), boxes


@pytest.mark.parametrize("name", ["batch", "batch-1", "no-overlap"])
def test_local_views_query_both_teacher_views(name: str):
    case, boxes = with_locals(CASES[name](settings=replace(SETTINGS, terms=("loc2",), local_queries=True)))
    student, teacher = case.parameters
    centre = case.student.centre("patch")

    def direction(z: Tensor, b: int, found: list[list[int | None]]) -> float:
        return literal.mean(
            [
                literal.entropy(
                    literal.head_logits(z[image, patch], student),
                    literal.head_logits(case.teacher.patches[b, image, other], teacher),
                    centre,
                    TEMPERATURE,
                )
                for image, of_image in enumerate(found)
                for patch, other in enumerate(of_image)
                if other is not None
            ]
        )

    directions = [direction(case.features.patches[a], b, found) for (a, b), found in case.matches().items()]
    for view, b in product(range(2), range(2)):
        pairs = zip(boxes[view], case.boxes, strict=True)
        found = [correspondence(local, pair[b], LOCAL_GRID, case.views.grid) for local, pair in pairs]
        directions.append(direction(case.local.patches[view], b, found))
    assert case.terms().losses["loc2"].item() == pytest.approx(literal.mean(directions), rel=1e-4)


def test_inner_blur_blurs_each_patch_by_itself():
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, [0, 4]] = mask[1, 5] = True
    result = augment_patches(images, mask, kind="inner_blur", patch_size=8, blur_sigma=0.3125, generators=[])
    for image, row, column in product(range(2), range(2), range(3)):
        part = (image, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        alone = gaussian_blur(images[part].unsqueeze(0), torch.tensor([2.5]), radius=8)[0]
        expected = alone if mask[image, 3 * row + column] else images[part]
        torch.testing.assert_close(result[part], expected, atol=1e-6, rtol=0)
