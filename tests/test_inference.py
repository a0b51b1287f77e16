from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_samples import COLOURS
from PIL import Image
from tiny_models import varied_segmenter
from transformers import PreTrainedModel

from glare import UserError
from glare.cli import main as glare_main
from glare.dense_inference import patch_size, segment
from glare.inference import PredictRecipe, free_stem, load_segmenter, palette, predict
from glare.views import Normalisation

NORMALISE = Normalisation()


@pytest.fixture
def model() -> PreTrainedModel:
    return varied_segmenter()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).unsqueeze(0)


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


def test_a_split_of_a_folder_or_of_the_catalog(folder: Path, tmp_path: Path) -> None:
    """Without a split all of a folder, and what one measures on of the catalog."""
    for split, stem in (("Train", "a"), ("Val", "b"), ("Test", "c")):
        for place in (tmp_path / "archive" / split / "Urban" / "images_png", tmp_path / "set" / split / "images"):
            place.mkdir(parents=True)
            picture(9, 9).save(place / f"{stem}.png")
    for data, split, stems in (
        ("set", None, "abc"),
        ("set", "Test", "c"),
        ("loveda", None, "b"),
        ("loveda", "train", "a"),
    ):
        named = f"loveda:{tmp_path}/archive" if data == "loveda" else str(tmp_path / data)
        out = tmp_path / f"{data}_{split}"
        predict(PredictRecipe(model=str(folder), output=out, images=(named,), split=split))
        assert {file.stem for file in out.glob("?.png")} == set(stems)
    with pytest.raises(UserError, match="has no split 'val', which would be val/images; it has Test, Train, Val"):
        predict(PredictRecipe(model=str(folder), output=tmp_path / "x", images=(str(tmp_path / "set"),), split="val"))
    assert not (tmp_path / "x").exists()


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
