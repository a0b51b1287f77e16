"""Pre-training on images that are decoded once, or read anew for each step: the same run, or the same set of images."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate import Accelerator
from PIL import Image
from small_runs import arguments, assert_same_run, write_inputs

from glare import cli, feed
from glare.data.sources import Images, open_source
from glare.feed import decoded_bytes, has_room
from glare.pretrain import PretrainRecipe
from glare.yaml_files import read_mapping


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in sorted((folder / "photos").iterdir())]
    (folder / "shards").mkdir()
    for number in range(2):
        part = datasets.Dataset.from_list(rows[number::2], features=datasets.Features({"image": datasets.Image()}))
        part.to_parquet(folder / "shards" / f"{number}.parquet")
    return folder


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pretrain(inputs: Path, output: Path, **keys: Any) -> int:
    """The exit code of a run of a few steps."""
    code: int = cli.main(arguments("pretrain", inputs, output, **keys))
    return code


def test_a_streamed_folder_gives_the_bits_of_the_cached_one(inputs: Path, tmp_path: Path) -> None:
    for name, streaming in (("cached", False), ("streamed", True)):
        assert pretrain(inputs, tmp_path / name, steps=4, streaming=streaming) == 0
    assert_same_run(tmp_path / "cached", tmp_path / "streamed")


def test_a_streamed_table_is_resumed_with_the_same_images(inputs: Path, tmp_path: Path) -> None:
    keys = {"data": inputs / "shards", "streaming": True, "checkpoint_every": 2}
    assert pretrain(inputs, tmp_path / "whole", steps=5, **keys) == 0
    assert pretrain(inputs, tmp_path / "halves", steps=5, **keys) == 0
    shutil.rmtree(tmp_path / "halves/checkpoints/step_000005")
    assert pretrain(inputs, tmp_path / "halves", steps=5, **keys, resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert json.loads((tmp_path / "whole/price.json").read_text())["images"] is None


def test_what_has_no_room_is_streamed_and_that_is_said(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feed, "has_room", lambda count: count < 7 * 41 * 30 * 3)
    assert pretrain(inputs, tmp_path / "run", steps=2) == 0
    said = capsys.readouterr().out
    assert "7 images, streamed: each is read and decoded anew in every pass" in said
    assert "fit neither memory nor disk" in said
    assert read_mapping(tmp_path / "run/recipe.yaml")["streaming"] is None


def test_what_has_room_is_decoded_once(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(inputs, tmp_path / "run", steps=2) == 0
    assert "7 images decoded once (0 MiB), 0 skipped" in capsys.readouterr().out


def test_a_fraction_is_the_same_images_cached_and_streamed(inputs: Path, tmp_path: Path) -> None:
    for name, streaming in (("cached", False), ("streamed", True)):
        assert pretrain(inputs, tmp_path / name, steps=2, streaming=streaming, fraction="1/2") == 0
    assert_same_run(tmp_path / "cached", tmp_path / "streamed")
    assert json.loads((tmp_path / "cached/price.json").read_text())["images"] == 4
    assert pretrain(inputs, tmp_path / "table", data=inputs / "shards", steps=2, fraction="1/2") == 0
    assert read_mapping(tmp_path / "table/recipe.yaml")["fraction"] == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": 2, "fraction": 0.5}, "nobody has counted the images of the table"),
        ({}, "is not known before it is streamed; give --steps"),
        ({"steps": 2, "match": "a*"}, "match 'a*' chooses files, and"),
        ({"steps": 2, "split": "val"}, "has no split 'val'; it has train"),
    ],
)
def test_mistakes_with_streamed_tables(
    keys: dict[str, Any], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(inputs, tmp_path / "run", data=inputs / "shards", streaming=True, **keys) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_too_few_shards_for_the_processes_leave_no_run_folder(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parquet files are divided by their row groups, of which each has one here."""
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    assert pretrain(inputs, tmp_path / "run", data=inputs / "shards", streaming=True, steps=2) == 2
    assert "has 2 shards for 3 processes that read; write it as 3 files or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_name_of_the_catalog_is_no_table_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though ade20k has the form of a Hub id."""
    asked: list[tuple[str, str | None]] = []

    def opened(data: str, *, split: str | None, **_: Any) -> Images:
        asked.append((data, split))
        return Images(["0"], lambda _: Image.new("RGB", (8, 8)))

    monkeypatch.setattr(feed, "open_source", opened)
    feed.open_images(PretrainRecipe(backbone="v", data="ade20k", output=Path("o"), streaming=True, split="val"))
    assert asked == [("ade20k", "val")]


def test_the_estimate_is_what_decoding_takes(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (40, 20)).save(tmp_path / f"{number}.png")
    images = open_source(str(tmp_path))
    assert decoded_bytes(images, None) == 5 * 40 * 20 * 3
    assert decoded_bytes(images, 10) == 5 * 20 * 10 * 3
    (tmp_path / "0.png").write_bytes(b"broken")
    assert decoded_bytes(images, None) == 5 * 40 * 20 * 3


def test_room_is_memory_or_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(feed, "memory_budget", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(10**6, 0, 10**4))
    assert has_room(1000) and has_room(9000) and not has_room(9001)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not has_room(9000)


def test_only_the_main_process_decides(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "has_room", lambda _: False)
    images = open_source(str(inputs / "photos"))
    recipe = type("Recipe", (), {"streaming": None, "image_size": 0})
    accelerator = Accelerator(cpu=True)
    assert feed.streams(images, recipe, accelerator)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    assert not feed.streams(images, recipe, accelerator)
