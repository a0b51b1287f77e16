import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from labelled_samples import CLASSES, COLOURS, write_labelled
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig

from glare import GlareConfig, GlareForSemanticSegmentation, UserError
from glare.cli import main as glare_main
from glare.data.labelled import LabelledSet, open_labelled
from glare.evaluate import PASS_PIXELS, check_classes, confusion, evaluate, read_ahead, table, training_seed
from glare.metrics import SegmentationScores
from glare.split_scores import ScoreSplitter, SplitScores
from glare.trained_images import trained_on
from glare.views import Normalisation

NORMALISE = Normalisation()


class NearestColour(nn.Module):
    """Predicts the class whose colour is nearest, pixel by pixel; ``passes`` lists the shapes it was given."""

    def __init__(self) -> None:
        super().__init__()
        vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, patch_size=4)
        self.config = GlareConfig(backbone_config=vit, id2label=dict(enumerate(CLASSES)))
        self.device = torch.device("cpu")
        self.passes: list[tuple[int, ...]] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.passes.append(tuple(pixel_values.shape))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (NORMALISE.mean, NORMALISE.std))
        seen = (pixel_values * std + mean) * 255
        distance = torch.stack(
            [(seen - torch.tensor(c).view(3, 1, 1)).square().sum(dim=1) for c in COLOURS.astype(float)]
        )
        return SimpleNamespace(logits=-distance.transpose(0, 1))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "data", 5, size=(37, 30))


@pytest.fixture
def model_folder(tmp_path: Path, make_vit_config: Any) -> Path:
    config = GlareConfig(backbone_config=make_vit_config(), id2label=dict(enumerate(CLASSES)), head="linear")
    torch.manual_seed(0)
    GlareForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def set_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> LabelledSet:
    names = [f"{i}.png" for i in range(len(pairs))]
    return LabelledSet(CLASSES, COLOURS, names, lambda i: (Image.fromarray(pairs[i][0]), pairs[i][1]))


def test_scores_equal_a_count_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 255]], dtype=np.uint8)
    shown = np.array([[0, 1, 1, 1], [0, 0, 0, 2]], dtype=np.uint8)
    scores, skipped = evaluate(NearestColour(), set_of([(COLOURS[shown], truth)] * 3), normalise=NORMALISE)  # type: ignore[arg-type]
    # class 0: 3 right, 1 missed, 1 too many; class 1: 2 right, 1 missed, 1 too many; class 2 only where ignored
    assert scores.iou == {"soil": pytest.approx(3 / 5), "water": pytest.approx(2 / 4), "grass": None}
    assert scores.miou == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert scores.aacc == pytest.approx(5 / 7) and scores.macc == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert skipped == []


def test_a_perfect_model_scores_one_at_any_size(data: Path) -> None:
    write_labelled(data, 3, size=(50, 41), prefix="other")
    scores, _ = evaluate(NearestColour(), open_labelled(str(data)), normalise=NORMALISE)  # type: ignore[arg-type]
    assert scores.miou == scores.aacc == scores.macc == 1.0


def test_images_of_one_size_share_a_pass_within_the_budget(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled, model = open_labelled(str(data)), NearestColour()
    confusion(model, labelled, range(5), normalise=NORMALISE)  # type: ignore[arg-type]
    assert model.passes == [(5, 3, 32, 40)]
    assert PASS_PIXELS >= 512 * 512
    monkeypatch.setattr("glare.evaluate.PASS_PIXELS", 2 * 37 * 30)
    again = NearestColour()
    confusion(again, labelled, range(5), normalise=NORMALISE)  # type: ignore[arg-type]
    assert [shape[0] for shape in again.passes] == [2, 2, 1]


def test_parts_add_up_to_the_whole(data: Path) -> None:
    labelled = open_labelled(str(data))
    run = [confusion(NearestColour(), labelled, part, normalise=NORMALISE)[0] for part in (range(5), [0, 3], [1, 2, 4])]  # type: ignore[arg-type]
    assert torch.equal(run[0], run[1] + run[2]) and run[0].sum() == 5 * 37 * 30


def test_reading_ahead_keeps_the_order_and_reports_bad_images() -> None:
    pairs = [(np.full((2, 2, 3), i, dtype=np.uint8), np.zeros((2, 2), dtype=np.uint8)) for i in range(30)]
    skipped: list[tuple[str, str]] = []
    items = list(read_ahead(set_of(pairs), range(30), skipped=skipped, strict=False))
    assert [int(image[0, 0, 0]) for image, _ in items] == list(range(30)) and not skipped


def test_a_missing_label_is_counted_or_an_error(data: Path) -> None:
    (data / "labels" / "scene_3.png").unlink()
    labelled, model = open_labelled(str(data)), NearestColour()
    _, skipped = evaluate(model, labelled, normalise=NORMALISE)  # type: ignore[arg-type]
    assert [name for name, _ in skipped] == ["scene_3.png"] and "it has no label" in skipped[0][1]
    with pytest.raises(UserError, match=r"scene_3\.png: it has no label .* leave --strict out to skip it"):
        evaluate(model, labelled, normalise=NORMALISE, strict=True)  # type: ignore[arg-type]


def test_the_command_prints_a_table_and_writes_json(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.json"
    argv = ["evaluate", "--model", str(model_folder), "--data", str(data), "--json", str(file), "--match", "!*_0"]
    assert glare_main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*CLASSES, "mIoU", "aAcc", "mAcc", "(4 images)"))
    scores = json.loads(file.read_text())
    keys = {"miou", "aacc", "macc", "iou", "num_images", "data", "split", "model", "seed", "versions"}
    assert keys <= scores.keys() and scores["num_images"] == 4
    assert scores["split"] is None and scores["seed"] is None and scores["match"] == "!*_0"
    assert scores["weights_sha256"] == hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    defined = [value for value in scores["iou"].values() if value is not None]
    assert scores["miou"] == pytest.approx(np.mean(defined))


def test_where_scores_cannot_be_written_is_said_before_they_are_counted(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glare.evaluate.load_segmenter", None)
    argv = ["evaluate", "--model", str(model_folder), "--data", str(data), "--json"]
    (tmp_path / "file").touch()
    for file, said in (
        (tmp_path, "is a folder; give a file, such as"),
        (tmp_path / "no" / "scores.json", f"'{tmp_path / 'no'}' is no folder one may write to; make it, or give"),
        (tmp_path / "file" / "scores.json", "is no folder one may write to"),
    ):
        assert glare_main([*argv, str(file)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_split_defaults_to_val(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 3), ("val", 2)):
        write_labelled(tmp_path / "parts" / split, count)
    argv = ["evaluate", "--model", str(model_folder), "--data", str(tmp_path / "parts")]
    assert glare_main(argv) == 0 and glare_main([*argv, "--split", "train"]) == 0
    out = capsys.readouterr().out
    assert "(2 images)" in out and "(3 images)" in out


def test_the_split_that_was_taken_is_said(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_labelled(tmp_path / "parts" / "train", 2)
    file = tmp_path / "scores.json"
    argv = ["evaluate", "--model", str(model_folder), "--data", str(tmp_path / "parts"), "--json", str(file)]
    assert glare_main(argv) == 0
    assert "evaluated on the split 'train'; --split takes another one" in capsys.readouterr().out
    assert json.loads(file.read_text())["split"] == "train"
    write_labelled(tmp_path / "parts" / "validation", 3)
    assert glare_main(argv) == 0
    assert "evaluated on the split 'validation'" in capsys.readouterr().out
    assert glare_main([*argv, "--split", "train"]) == 0
    assert "evaluated on" not in capsys.readouterr().out


def test_images_that_the_model_was_trained_on_are_counted(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "scores.json"
    run.mkdir()
    model_folder.rename(run / "model")
    argv = ["evaluate", "--model", str(run), "--data", str(data), "--json", str(file)]
    for recipe, count in (
        (f"data: {data}\nmatch: '!*_0'\nhead: fpn\nraster: {{tile: null}}\n", 4),
        (f"data: {data}\nnum_images: 3\nseed: 1\n", 3),
        (f"data: {data.parent / 'gone'}\n", 0),
        (f"data: {write_labelled(tmp_path / 'others', 5)}\n", 0),
        ("data: ade20k\n", 0),
        ("seed: 1\n", 0),
    ):
        (run / "recipe.yaml").write_text(recipe)
        assert glare_main(argv) == 0
        warned = f"warning: the model was trained on {count} of these 5 images: new ones would score lower\n"
        out = capsys.readouterr().out
        assert (warned in out) == bool(count) == ("warning" in out)
        assert json.loads(file.read_text()).get("trained_on", 0) == count
        assert ("trained_on" in json.loads(file.read_text())) == bool(count)


def test_scenes_of_the_same_seed_were_trained_on(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: landcover:arid:3:1\n")
    for data, count in (("landcover:arid:5:1", 3), ("landcover:arid:5", 0), ("landcover:temperate:5:1", 0)):
        assert trained_on(str(tmp_path), open_labelled(data), data=data, split=None) == count


def test_links_to_images_that_were_trained_on_are_counted(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data" / "train", 3).parent
    write_labelled(data / "val", 2, prefix="other")
    write_labelled(tmp_path / "apart", 1, prefix="other")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"data: {data}\n")

    def counted(folder: Path, split: str | None = None) -> int:
        images = open_labelled(str(folder), split=split)
        return trained_on(str(run), images, data=str(folder), split=split)

    assert (counted(data, "val"), counted(tmp_path / "apart")) == (0, 0)
    for images in (data / "val" / "images", tmp_path / "apart" / "images"):
        (images / "near.png").symlink_to(Path("..") / "images" / "far.png")
        (images / "far.png").symlink_to(data / "train" / "images" / "scene_1.png")
        (images / "round.png").symlink_to("round.png")
        (images / "more").symlink_to(data / "train" / "images")
    assert (counted(data, "val"), counted(tmp_path / "apart")) == (5, 5)  # two links and a linked folder of three


def test_other_classes_are_refused_by_name(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_labelled(tmp_path / "other", 1, classes=["soil", "grass", "water"])
    assert glare_main(["evaluate", "--model", str(model_folder), "--data", str(other)]) == 2
    error = capsys.readouterr().err
    assert "has soil, water, grass; data" in error and "has soil, grass, water; give data with the classes" in error
    check_classes(CLASSES, tuple(CLASSES), model="m", data="d")


def test_models_that_do_not_segment_are_refused(
    data: Path, tmp_path: Path, make_vit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_vit().save_pretrained(tmp_path / "vit")
    for model, message in (("no/where", "cannot be loaded"), (tmp_path / "vit", "is a ViTModel; give")):
        assert glare_main(["evaluate", "--model", str(model), "--data", str(data)]) == 2
        assert message in capsys.readouterr().err


def test_a_backbone_without_head_is_told_to_be_fine_tuned(
    data: Path,
    tmp_path: Path,
    make_vit_config: Any,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from glare import GlareModel

    GlareModel(GlareConfig(backbone_config=make_vit_config())).save_pretrained(tmp_path / "bare")
    assert glare_main(["evaluate", "--model", str(tmp_path / "bare"), "--data", str(data)]) == 2
    assert "is a GlareModel without segmentation head; run glare finetune on it first" in capsys.readouterr().err
    assert "MISSING" not in caplog.text, "no head is drawn for it"


def test_the_table_shows_percent_and_gaps() -> None:
    matrix = torch.tensor([[3, 1, 0], [1, 2, 0], [0, 0, 0]])
    scores = SegmentationScores.from_confusion(matrix, CLASSES)
    lines = table(scores, num_images=7, skipped=[("x.png", "broken")]).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["class", "IoU"],
        ["soil", "60.0"],
        ["water", "50.0"],
        ["grass", "-"],
    ]
    assert lines[4] == "mIoU 55.0  aAcc 71.4  mAcc 70.8  (7 images)" and lines[5] == "skipped x.png: broken"
    single = SegmentationScores.from_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), CLASSES)
    assert "warning: the labels hold no class but 'soil'" in table(single, num_images=1)
    empty = SegmentationScores.from_confusion(torch.zeros(3, 3, dtype=torch.int64), CLASSES)
    assert math.isnan(empty.miou) and "mIoU -" in table(empty, num_images=2)
    assert "warning: the labels hold no class, so there is no score; what is ignored" in table(empty, num_images=2)
    assert "warning" not in "".join(lines)


def test_the_seed_comes_from_the_run_that_wrote_the_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 5\nhead: fpn\n")
    assert training_seed(str(tmp_path / "run")) == training_seed(str(tmp_path / "run" / "model")) == 5
    assert training_seed("some/hub-id") is None


def test_the_score_is_split_on_request(
    data: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = []
    for index, words in enumerate(([], ["--split-scores"])):
        written = tmp_path / f"{index}.json"
        glare_main(["evaluate", "--model", str(model_folder), "--data", str(data), "--json", str(written), *words])
        entries.append(json.loads(written.read_text()))
    plain, split = entries
    assert {name: split[name] for name in plain} == plain
    assert plain["miou"] <= split["localization"] <= 1 and 0 < split["classification"] <= 1
    printed = capsys.readouterr().out
    assert printed.count("if an oracle named the outlines") == printed.count("mAP of which classes") == 1


def test_right_colours_lack_neither_outlines_nor_names(data: Path) -> None:
    labelled = open_labelled(str(data))
    splitter = ScoreSplitter(labelled.classes)
    confusion(NearestColour(), labelled, range(5), normalise=NORMALISE, splitter=splitter)  # type: ignore[arg-type]
    assert splitter.result() == SplitScores(localization=1, classification=1)


def test_what_is_seen_where_labels_are_ignored_is_in_no_score() -> None:
    """What lies under the zero of LoveDA may look like any class."""
    halves = np.array([[0, 1], [1, 2]], dtype=np.uint8)
    shown = [np.tile(half.repeat(4), (4, 1)) for half in halves]
    truth = [seen.copy() for seen in shown]
    truth[0][:, 4:] = 255  # so there is water in the second image alone
    splitter = ScoreSplitter(CLASSES)
    pairs = [(COLOURS[seen], right) for seen, right in zip(shown, truth, strict=True)]
    confusion(NearestColour(), set_of(pairs), range(2), normalise=NORMALISE, splitter=splitter)  # type: ignore[arg-type]
    assert splitter.result() == SplitScores(localization=1, classification=1)
