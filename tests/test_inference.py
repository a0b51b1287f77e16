from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import CLASSES, COLOURS
from PIL import Image
from transformers import PreTrainedModel

from glare import GlareConfig, GlareForSemanticSegmentation, UserError
from glare.cli import main as glare_main
from glare.inference import (
    WHOLE_LIMIT_PX,
    WINDOW_PX,
    PredictRecipe,
    Tiling,
    free_stem,
    load_segmenter,
    logits,
    palette,
    patch_size,
    predict,
    segment,
)
from glare.views import Normalisation

NORMALISE = Normalisation()


@pytest.fixture
def model(make_vit_config: Any) -> PreTrainedModel:
    config = GlareConfig(backbone_config=make_vit_config(), id2label=dict(enumerate(CLASSES)))
    torch.manual_seed(0)
    made = GlareForSemanticSegmentation(config)
    torch.nn.init.normal_(made.head.classifier.weight, std=0.1)
    made.config.palette = COLOURS.tolist()
    return made.eval()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).unsqueeze(0)


def test_logits_are_those_of_the_padded_image_cut_back(model: PreTrainedModel) -> None:
    image = picture(22, 13)
    found = logits(model, pixels_of(image), normalise=NORMALISE)
    assert found.shape == (1, 3, 13, 22) and found.dtype == torch.float32
    padded = torch.zeros(1, 3, 16, 24)
    padded[:, :, :13, :22] = NORMALISE(pixels_of(image).permute(0, 3, 1, 2) / 255)
    with torch.inference_mode():
        coarse = model(pixel_values=padded).logits
    fine = torch.nn.functional.interpolate(coarse, size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, fine[:, :, :13, :22])


def test_sizes_may_be_mixed_and_smaller_than_a_patch(model: PreTrainedModel) -> None:
    images = [picture(22, 13), picture(1, 1), picture(3, 30)]
    labels = segment(model, images, normalise=NORMALISE)
    assert [label.shape for label in labels] == [(13, 22), (1, 1), (30, 3)]
    assert all(label.dtype == np.uint8 and label.max() < 3 for label in labels)


def test_a_batch_equals_its_images(model: PreTrainedModel) -> None:
    pixels = torch.cat([pixels_of(picture(22, 13, seed)) for seed in range(3)])
    for tiling in (Tiling(), Tiling(window=12, stride=5)):
        together = logits(model, pixels, normalise=NORMALISE, tiling=tiling)
        apart = [logits(model, image.unsqueeze(0), normalise=NORMALISE, tiling=tiling) for image in pixels]
        torch.testing.assert_close(together, torch.cat(apart))


def test_one_window_is_the_whole_image(model: PreTrainedModel) -> None:
    pixels = pixels_of(picture(22, 13))
    whole = logits(model, pixels, normalise=NORMALISE)
    assert torch.equal(logits(model, pixels, normalise=NORMALISE, tiling=Tiling(window=22)), whole)
    assert not torch.allclose(logits(model, pixels, normalise=NORMALISE, tiling=Tiling(window=12)), whole)


def test_windows_are_averaged_whatever_their_order(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, tiling = pixels_of(picture(30, 21)), Tiling(window=12, stride=7)
    found = logits(model, pixels, normalise=NORMALISE, tiling=tiling)
    windows = tiling.windows((21, 30))
    total, covered = torch.zeros(3, 21, 30), torch.zeros(21, 30)
    for rows, columns in windows:
        total[:, rows, columns] += logits(model, pixels[:, rows, columns], normalise=NORMALISE)[0]
        covered[rows, columns] += 1
    torch.testing.assert_close(found[0], total / covered)
    monkeypatch.setattr(Tiling, "windows", lambda *_: windows[::-1])
    torch.testing.assert_close(logits(model, pixels, normalise=NORMALISE, tiling=tiling), found)


@pytest.mark.parametrize("size", [(21, 30), (12, 50), (100, 13), (5, 40), (12, 13)])
@pytest.mark.parametrize("stride", [None, 1, 7, 12])
def test_windows_cover_every_pixel_and_stay_inside(size: tuple[int, int], stride: int | None) -> None:
    covered = np.zeros(size, dtype=int)
    shapes = set()
    for window in Tiling(window=12, stride=stride).windows(size):
        assert all(0 <= span.start < span.stop <= length for span, length in zip(window, size, strict=True))
        covered[window] += 1
        shapes.add(covered[window].shape)
    assert covered.min() >= 1 and shapes == {(min(12, size[0]), min(12, size[1]))}


def test_only_large_images_are_cut_by_default() -> None:
    assert len(Tiling().windows((WHOLE_LIMIT_PX, 700))) == 1
    windows = Tiling().windows((WHOLE_LIMIT_PX + 1, 700))
    assert len(windows) == 2 and windows[0] == (slice(0, WINDOW_PX), slice(0, 700))


@pytest.mark.parametrize(("window", "stride"), [(0, None), (16, 0), (16, 17), (None, 2000)])
def test_windows_that_leave_gaps_are_refused(window: int | None, stride: int | None) -> None:
    with pytest.raises(ValueError, match="give"):
        Tiling(window, stride)


def test_a_saved_model_predicts_the_same(model: PreTrainedModel, folder: Path) -> None:
    loaded, normalise = load_segmenter(str(folder), device=torch.device("cpu"))
    image = picture(24, 16)
    assert patch_size(loaded) == 4 and not loaded.training and palette(loaded).tolist() == COLOURS.tolist()
    assert normalise == NORMALISE
    again, first = (segment(m, [image], normalise=NORMALISE)[0] for m in (loaded, model))
    assert np.array_equal(again, first)
    model.config.palette = None
    assert len({tuple(colour) for colour in palette(model).tolist()}) == 3


def test_predict_writes_label_maps_and_overlays(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    picture(30, 20).save(source / "a.png")
    picture(17, 11, 1).save(source / "deep" / "a.png")
    picture(8, 8, 2).convert("L").save(tmp_path / "grey.png")
    recipe = PredictRecipe(
        model=str(folder),
        output=tmp_path / "out",
        images=(str(source), str(tmp_path / "grey.png")),
        precision="fp32",
    )
    assert predict(recipe) == []
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(f"{stem}{end}.png" for stem in ("a", "a_2", "grey") for end in ("", "_overlay"))
    with Image.open(tmp_path / "out" / "a.png") as label:
        assert label.mode == "P" and label.size == (30, 20)
        assert np.array_equal(np.array(label), segment(model, [picture(30, 20)], normalise=NORMALISE)[0])
        assert label.getpalette()[:9] == COLOURS.ravel().tolist()  # type: ignore[index]
    with Image.open(tmp_path / "out" / "a_2.png") as label:
        assert label.size == (17, 11)
    with Image.open(tmp_path / "out" / "a_overlay.png") as overlay:
        assert overlay.mode == "RGB" and overlay.height > 20


def test_a_bad_image_is_reported_or_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(9, 9).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    images = [str(tmp_path / "bad.png"), str(tmp_path / "good.png")]
    argv = ["predict", "--model", str(folder), "--output", str(tmp_path / "out"), *images]
    assert glare_main(argv) == 0
    out = capsys.readouterr().out
    assert "1 images segmented" in out and "1 skipped" in out and "skipped bad.png: not an image" in out
    argv[4] = str(tmp_path / "strict")
    assert glare_main([*argv, "--strict"]) == 2
    assert "bad.png: not an image" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()


def test_nothing_to_segment_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"none of the 1 images can be read; bad\.png, for example: not an image"):
        predict(PredictRecipe(model=str(folder), output=out, images=(str(tmp_path / "bad.png"),)))
    assert not out.exists()
    for missing in ("nowhere.png", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="nowhere"):
            predict(PredictRecipe(model=str(folder), output=tmp_path / "new", images=(missing,)))
    assert not (tmp_path / "new").exists()


def test_an_output_folder_in_use_is_refused(folder: Path, tmp_path: Path) -> None:
    picture(9, 9).save(tmp_path / "good.png")
    with pytest.raises(UserError, match="is in use; give a new or empty one"):
        predict(PredictRecipe(model=str(folder), output=tmp_path, images=(str(tmp_path / "good.png"),)))


def test_no_file_of_one_image_has_the_name_of_another_s() -> None:
    names = ["a.png", "x/a.jpg", "a_overlay.png", "a_2.png", "A.png", "b.png", "b_overlay_overlay.png", "b_overlay.png"]
    taken: set[str] = set()
    stems = [free_stem(name, taken) for name in names]
    files = [f"{stem}{end}".lower() for stem in stems for end in (".png", "_overlay.png")]
    assert len(set(files)) == len(files) == 16 and stems[0] == "a"
