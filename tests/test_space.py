"""The Space: its functions directly, and the page served and answered once as a visitor's browser would."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_models import segmenter
from transformers import PreTrainedModel

import glare
from glare.data.landcover import CLASSES, scene
from glare.errors import UserError

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces" / "segmentation"
sys.path.insert(0, str(SPACE))

import app  # noqa: E402
import pairs  # noqa: E402
import segmentation  # noqa: E402

START_SECONDS = 240  # of the served page, on a busy machine


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(scene("arid", 6, size=96).image).crop((0, 0, 96, 60))


@pytest.fixture(scope="module")
def built_in() -> pairs.Pair:
    return pairs.load_pair("", "")


@pytest.fixture
def own(make_vit: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., str]:
    """Save a tiny segmenter of the given classes and return its folder."""

    def save(name: str, *classes: str) -> str:
        segmenter(make_vit(), id2label=dict(enumerate(classes)), num_labels=len(classes)).save_pretrained(
            tmp_path / name
        )
        return str(tmp_path / name)

    return save


def test_the_built_in_pair_differs_by_adapters_and_head_alone(built_in: pairs.Pair) -> None:
    assert built_in.before is not None
    before, after = built_in.before.model.state_dict(), built_in.after.model.state_dict()
    shared = {name for name in before if not name.startswith("head.")}
    renamed = {name.replace(".base_layer.", "."): value for name, value in after.items()}
    assert all(torch.equal(before[name], renamed[name]) for name in shared)
    assert {name for name in renamed.keys() - before.keys() if "uniadapter_" not in name} == set()
    heads = load_file(pairs.HEADS)
    assert not torch.equal(heads["before.classifier.weight"], heads["after.classifier.weight"])
    assert built_in.before.classes == built_in.after.classes == list(CLASSES)
    assert sum(file.stat().st_size for file in pairs.LANDCOVER.rglob("*")) < 300_000


def test_the_page_tells_the_scores_that_were_measured(built_in: pairs.Pair) -> None:
    about = json.loads(pairs.ABOUT.read_text(encoding="utf-8"))
    for score in about["miou"].values():
        assert f"{100 * score:.1f}" in built_in.about
    # far above what a lucky guess gives on scenes that are not among those of the score
    made = scene("arid", 7, size=128)
    for one in (built_in.before, built_in.after):
        assert one is not None
        assert (segmentation.run(one, Image.fromarray(made.image)).label == made.label).mean() > 0.5


def test_an_answer_is_of_the_images_size_and_compares(built_in: pairs.Pair, picture: Image.Image) -> None:
    answer = segmentation.answer(built_in, picture, "A notice. ")
    assert answer.before is not None
    assert answer.before.size == answer.after.size == picture.size
    assert np.any(np.asarray(answer.before) != np.asarray(answer.after))
    assert answer.text.startswith("A notice. Adapting changed")
    percents = [float(value) for value in re.findall(r"<td>([\d.]+)%</td>", answer.table)]
    assert sum(percents) == pytest.approx(200, abs=0.1 * len(percents))


def test_shares_sum_to_one_and_lead_the_table() -> None:
    before = np.array([[0, 0], [2, 2]], dtype=np.uint8)
    after = np.array([[2, 2], [2, 0]], dtype=np.uint8)
    assert segmentation.shares(after, 4).tolist() == [0.25, 0, 0.75, 0]
    colours = np.array([[1, 2, 3], [4, 5, 6], [255, 0, 0], [7, 8, 9]], dtype=np.uint8)
    table = segmentation.share_table(before, after, ["<b>", "b", "c", "d"], colours)
    assert re.findall(r"</span>(.*?)</th><td>(.*?)</td><td>(.*?)</td>", table) == [
        ("c", "50.0%", "75.0%"),
        ("&lt;b&gt;", "50.0%", "25.0%"),
    ]
    assert "#ff0000" in table
    assert segmentation.share_table(None, after, ["a", "b", "c", "d"], colours).count("<td>") == 2


def test_windows_of_a_large_image_leave_no_gap(built_in: pairs.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "WINDOW_PATCHES", 6)
    image = Image.fromarray(scene("arid", 6, size=96).image)
    assert segmentation.run(built_in.after, image).label.shape == (96, 96)


def test_a_large_image_is_reduced_with_a_notice(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 10)).save(tmp_path / "wide.png")
    image, notice = segmentation.read_picture(str(tmp_path / "wide.png"))
    assert image.size == (segmentation.LONG_SIDE, 3) and "3000 x 10 px was reduced to 1024 x 3 px" in notice
    Image.new("L", (20, 10)).save(tmp_path / "small.png")
    image, notice = segmentation.read_picture(str(tmp_path / "small.png"))
    assert (image.size, image.mode, notice) == ((20, 10), "RGB", "")


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"notes\.jpg: not an image.*give a JPEG"):
        segmentation.read_picture(str(tmp_path / "notes.jpg"))
    Image.new("1", (8000, 7000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="8000 x 7000 px are more than the 50 million"):
        segmentation.read_picture(str(tmp_path / "bomb.png"))
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"cut\.png"):
        segmentation.read_picture(str(tmp_path / "cut.png"))


def test_own_models_alone_and_as_a_pair(own: Callable[..., str], picture: Image.Image) -> None:
    adapted, untouched = own("adapted", "land", "sea"), own("untouched", "land", "sea")
    alone = pairs.load_pair(adapted, "")
    assert alone.before is None
    answer = segmentation.answer(alone, picture)
    assert answer.before is None and answer.after.size == picture.size
    assert app.shown(answer)[0]["visible"] is False
    both = pairs.load_pair(adapted, untouched)
    assert both.before is not None and both.before.classes == ["land", "sea"]
    with pytest.raises(UserError, match=r"different classes \(fire before adaptation, land, sea after\)"):
        pairs.load_pair(adapted, own("other", "fire"))


def test_a_model_that_cannot_be_loaded_leaves_the_others_usable(tmp_path: Path, picture: Image.Image) -> None:
    file = tmp_path / "a.png"
    picture.save(file)
    kept = pairs.load_pair("", "")
    for model, baseline, message in (
        (str(tmp_path / "missing"), "", "cannot be loaded"),
        ("nobody/<i>nothing</i>", "", "&lt;i&gt;"),
        ("", "only-this", "only the model before"),
    ):
        with pytest.raises(gr.Error) as error:
            app.segment_file(str(file), model, baseline)
        assert message in error.value.message
    with pytest.raises(gr.Error, match="there is no image"):
        app.segment_file(None)
    assert pairs.load_pair("", "") is kept
    assert app.segment_file(str(file))[1].size == picture.size


def test_weights_that_are_pickles_are_not_read(own: Callable[..., str]) -> None:
    folder = Path(own("pickled", "land", "sea"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        pairs.load_pair(str(folder), "")


def test_the_front_matter_is_that_of_this_gradio() -> None:
    _, front, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["sdk"] == "gradio" and settings["sdk_version"] == gr.__version__
    assert f"gradio=={gr.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert (SPACE / settings["app_file"]).is_file() and isinstance(settings["python_version"], str)
    assert len(settings["short_description"]) <= 60 and settings["models"] == []
    assert settings["suggested_hardware"] == "cpu-basic" and text.lstrip().startswith("# ")
    assert (SPACE / "requirements.txt").read_text().split() == ["glare-ssl"]


@pytest.fixture
def served() -> Iterator[str]:
    """The page's address, started as people start it, and stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(Path(glare.__file__).parents[1]),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen([sys.executable, str(SPACE / "app.py")], env=environment)
    try:
        wait_for(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(process: "subprocess.Popen[bytes]", port: int) -> None:
    for _ in range(2 * START_SECONDS):
        assert process.poll() is None, "the Space ended before it served"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the Space did not serve within {START_SECONDS} s")


@pytest.mark.filterwarnings("default")  # of the client's, which is no part of the Space
def test_the_served_page_answers(served: str, picture: Image.Image, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(served, verbose=False, download_files=str(tmp_path / "answers"))
    picture.save(tmp_path / "a.png")
    before, after, table, text = client.predict(handle_file(tmp_path / "a.png"), "", "", api_name="/segment")
    shown = before["value"] if isinstance(before, dict) else before
    for file in (shown, after):
        with Image.open(file if isinstance(file, str) else file["path"]) as answered:
            assert answered.size == picture.size
    assert "background" in table or "barren" in table
    assert "Adapting changed" in text
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(AppError, match="not an image"):
        client.predict(handle_file(tmp_path / "notes.png"), "", "", api_name="/segment")
