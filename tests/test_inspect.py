"""``glare inspect``: the sheet draws what training computes, and the job refuses what it cannot do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from labelled_samples import write_labelled
from PIL import Image
from tiny_models import tiny_vit

from glare import UserError, cli, inspect
from glare.data.cache import pack
from glare.data.sources import open_source
from glare.geometry import Crop
from glare.inspect import check_output, maps_of_regions
from glare.inspection_sheet import (
    CHANGED,
    CORNERS,
    UNMATCHED,
    boxes,
    matched_colours,
    region_box,
    sheet,
    to_pixels,
    with_boxes,
    with_changed,
    with_places,
)
from glare.objectives.glare import GlareSettings
from glare.pretrain import PretrainRecipe, resolve
from glare.pretrain_step import cut_views
from glare.regions import RegionConfig
from glare.runtime import epoch_batches, make_accelerator
from glare.views import Normalisation

GRID = (6, 6)


def crops(seed: int, *, flipped: bool) -> Crop:
    """Two windows of half to all of the sides of an image."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + 0.4 * torch.rand(2, 2, generator=generator)
    offset = (1 - scale) * torch.rand(2, 2, generator=generator)
    if flipped:
        offset, scale = offset + scale * torch.tensor([1.0, 0.0]), scale * torch.tensor([-1.0, 1.0])
    return Crop(offset, scale)


@pytest.mark.parametrize("flipped", [False, True])
def test_boxes_are_the_corners_of_the_crops(flipped: bool) -> None:
    found = crops(0, flipped=flipped)
    for crop, box in zip((found[0], found[1]), boxes(found, (200, 160)).tolist(), strict=True):
        ends = crop.to_source(torch.tensor([[0.0, 0.0], [1.0, 1.0]])) * torch.tensor([200, 160])
        x, y = ends[:, 0].tolist(), ends[:, 1].tolist()
        assert box == pytest.approx([min(x), min(y), max(x), max(y)])


def test_boxes_are_drawn_where_they_are() -> None:
    """A picture of 100 x 50 px in a square of 200 px begins 50 px below the top."""
    picture = np.zeros((50, 100, 3), np.uint8)
    flipped = Crop(torch.tensor([[0.75, 0.2]]), torch.tensor([[-0.5, 0.6]]))
    drawn = np.asarray(with_boxes(picture, flipped, [(9, 200, 9)], side=200))
    where = np.argwhere((drawn == (9, 200, 9)).all(axis=-1))
    assert where.min(axis=0).tolist() == [71, 51] and where.max(axis=0).tolist() == [128, 148]
    assert (drawn[:50] == 255).all() and (drawn[150:] == 255).all()
    plain = Crop(torch.tensor([[0.25, 0.2]]), torch.tensor([[0.5, 0.6]]))
    assert not np.array_equal(drawn, np.asarray(with_boxes(picture, plain, [(9, 200, 9)], side=200)))


def literal_places(a: Crop, b: Crop) -> dict[tuple[int, int], tuple[int, int]]:
    """Patch (row, column) of view ``b`` -> that of view ``a`` which holds its centre, coordinate by coordinate."""
    found = {}
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            x = float(b.offset[0] + b.scale[0] * (column + 0.5) / GRID[1])
            y = float(b.offset[1] + b.scale[1] * (row + 0.5) / GRID[0])
            u = (x - float(a.offset[0])) / float(a.scale[0]) * GRID[1]
            v = (y - float(a.offset[1])) / float(a.scale[1]) * GRID[0]
            if 0 <= u < GRID[1] and 0 <= v < GRID[0]:
                found[row, column] = int(v), int(u)
    return found


@pytest.mark.parametrize("seed", range(1, 5))
def test_matched_patches_have_one_colour(seed: int) -> None:
    a, b = crops(seed, flipped=seed > 2)[0], crops(seed, flipped=seed % 2 > 0)[1]
    (colours_a, matched_a), (colours_b, matched_b) = matched_colours(a, b, GRID, min_overlap=0.0)
    to_a, to_b = literal_places(a, b), literal_places(b, a)
    assert {(i // GRID[1], i % GRID[1]) for i in matched_b.nonzero().flatten().tolist()} == set(to_a)
    assert {(i // GRID[1], i % GRID[1]) for i in matched_a.nonzero().flatten().tolist()} == set(to_b)
    assert 0 < len(to_a) < GRID[0] * GRID[1]
    for (row, column), (other_row, other_column) in to_a.items():
        assert torch.equal(colours_b[row * GRID[1] + column], colours_a[other_row * GRID[1] + other_column])
    assert len(colours_a[matched_a].unique(dim=0)) == int(matched_a.sum())


def test_places_span_the_colours() -> None:
    whole = Crop(torch.zeros(2), torch.ones(2))
    (colours, _), _ = matched_colours(whole, whole, GRID, min_overlap=0.0)
    corners = colours.view(*GRID, 3)[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.allclose(corners, torch.tensor(CORNERS).float().view(4, 3), atol=1e-3)


def test_unmatched_patches_are_dark_and_others_coloured() -> None:
    picture = np.full((60, 60, 3), 200, np.uint8)
    matched = torch.zeros(36, dtype=torch.bool)
    matched[[0, 7]] = True
    colours = torch.tensor([250.0, 0.0, 0.0]).expand(36, 3)
    drawn = np.asarray(with_places(picture, colours, matched, GRID, side=120)).astype(int)
    for patch in range(36):
        inner = drawn[20 * (patch // 6) + 2 : 20 * (patch // 6) + 20, 20 * (patch % 6) + 2 : 20 * (patch % 6) + 20]
        red = inner[..., 0] - inner[..., 2]
        assert (red > 100).all() if matched[patch] else (inner == int(200 * UNMATCHED)).all()


def test_changed_patches_are_framed_and_no_others() -> None:
    mask = torch.rand(36, generator=torch.Generator().manual_seed(0)) < 0.4
    drawn = np.asarray(with_changed(np.zeros((60, 60, 3), np.uint8), mask, GRID, side=120))
    framed = (drawn == CHANGED).all(axis=-1)
    for patch in range(36):
        cell = framed[20 * (patch // 6) :, 20 * (patch % 6) :][:20, :20]
        edge = np.ones((20, 20), bool)
        edge[1:-1, 1:-1] = False
        assert np.array_equal(cell, edge & bool(mask[patch]))


def test_the_frame_of_a_region() -> None:
    patches = torch.tensor([row * 6 + column for row in (2, 3, 4) for column in (1, 2)])
    assert region_box(patches, GRID, step=10) == (10, 20, 29, 49)


def test_a_normalised_view_is_shown_as_it_was() -> None:
    pixels = torch.arange(48).view(4, 4, 3).to(torch.uint8) * 5
    normalise = Normalisation()
    view = normalise(pixels.permute(2, 0, 1).float() / 255)
    assert np.array_equal(to_pixels(view, normalise), pixels.numpy())


def test_each_region_has_the_map_of_its_head() -> None:
    attention = torch.rand(2, 1, 3, 36)
    index = torch.zeros(1, 5, 9, dtype=torch.long)
    regions: Any = type("Drawn", (), {"index": index})
    assert torch.equal(maps_of_regions(attention, regions, GlareSettings()), attention[:, :, [0, 1, 2, 0, 1]])
    random = GlareSettings(regions=RegionConfig(sampling="random"))
    assert torch.equal(maps_of_regions(attention, regions, random)[:, :, 4], attention.mean(dim=2))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "data", 5, size=(60, 48))


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    tiny_vit().save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_the_sheet_shows_the_first_step_of_the_training(
    data: Path, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def record(sampled: Any, **given: Any) -> Image.Image:
        drawn.append((sampled, given))
        return sheet(sampled, **given)

    monkeypatch.setattr(inspect, "sheet", record)
    given = {"backbone": backbone, "data": str(data), "output": tmp_path / "o" / "a.png", "seed": 3, "device": "cpu"}
    check = inspect.run({**given, "num_images": 4, "json": tmp_path / "check.json"})
    assert len(check.names) == 5
    assert json.loads((tmp_path / "check.json").read_text())["num_images"] == 5
    ((sampled, options),) = drawn
    assert options["lines"][1].startswith("4 of 5 images, kept at a short side of 112 px. 2 global views of 56 px")

    accelerator = make_accelerator(device="cpu", precision="auto", report_to="none", output=tmp_path)
    recipe, _ = resolve({**given, "batch_size": 4}, num_images=5, patch_size=4, accelerator=accelerator)
    packed = pack(open_source(str(data)), short_side=recipe.image_size)
    batch = next(epoch_batches(5, 4, seed=3))
    views = cut_views(
        packed.images,
        batch,
        recipe.views,
        accelerator,
        batch_size=4,
        seed=recipe.seed,
        step=0,
        patch_size=4,
        normalise=Normalisation(),
    )
    assert sampled.names == [packed.names[i] for i in batch.tolist()]
    assert torch.equal(sampled.views.augmented, views.augmented) and torch.equal(sampled.views.local, views.local)
    assert torch.equal(sampled.views.patch_mask, views.patch_mask)
    for view in range(2):
        start = sampled.attention[view].amax(dim=-1)
        assert start.shape == (4, 2) and sampled.regions[view].matched.any()
    with Image.open(tmp_path / "o" / "a.png") as picture:
        assert picture.width > 5 * 280 and picture.height > 4 * 2 * 280
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["a.png"]


@pytest.mark.parametrize("kind", ["none", "mask"])
def test_other_augmentations_and_no_local_views(data: Path, backbone: str, tmp_path: Path, kind: str) -> None:
    inspect.run(
        {
            "backbone": backbone,
            "data": str(data / "images"),
            "output": tmp_path / "a.png",
            "num_images": 1,
            "views": {"num_local": 0, "patch_augmentation": kind},
            "glare": {"regions": {"count": 1}},
        }
    )
    assert (tmp_path / "a.png").is_file()


def test_recipes_of_pretrain_are_understood() -> None:
    ours = set(inspect.InspectRecipe.__dataclass_fields__)
    assert ours == {*PretrainRecipe.__dataclass_fields__, *inspect.OWN_KEYS}


def test_in_a_process_of_its_own(data: Path, tmp_path: Path, forks: Forks) -> None:
    (data / "images" / "broken.jpg").write_bytes(b"nothing")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 3\nviews:\n  num_local: 2\n")
    options = ("--data", "data", "--output", "a.png", "--recipe", "recipe.yaml", "--num-images", "1")
    done = forks.run("inspect", *options, "views.global_size=32", "views.local_size=16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "landcover-vit" in done.stdout and "the sheet is in a.png" in done.stdout
    assert "! unreadable and skipped: 1 of 6 images" in done.stdout
    assert (tmp_path / "a.png").is_file()


def test_a_used_output_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = tmp_path / "a.png"
    used.write_text("mine")
    assert cli.main(["inspect", "--data", "nowhere", "--output", str(used)]) == 2
    line = f"glare inspect: error: the output {used} is there already, a file; give another name, or remove it\n"
    assert capsys.readouterr().err == line
    assert used.read_text() == "mine"


def test_wrong_inputs(data: Path, tmp_path: Path) -> None:
    given = {"data": str(data), "output": tmp_path / "a.png"}
    with pytest.raises(UserError, match=r"give a name that ends in \.png"):
        inspect.run({**given, "output": tmp_path / "a.jpg"})
    with pytest.raises(UserError, match=r"give a name that ends in \.json"):
        inspect.run({**given, "json": tmp_path / "a.txt"})
    with pytest.raises(UserError, match="neither an existing path"):
        inspect.run({**given, "data": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="num_images is 0; give at least 1"):
        inspect.run({**given, "num_images": 0})
    with pytest.raises(UserError, match=r"no multiple of the patch size"):
        inspect.run({**given, "views": {"global_size": 33}})
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match="is there already, a folder"):
        check_output(tmp_path / "b.png", ".png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder one may write to"):
        check_output(tmp_path / "file" / "c.png", ".png")
    assert not (tmp_path / "a.png").exists()
