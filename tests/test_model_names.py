"""How a user's name for a model leads to it, and one clear sentence where it does not."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import adapted_model, segmenter, tiny_vit
from torch import Tensor

from glare import cli
from glare.errors import UserError
from glare.inference import load_segmenter
from glare.model_names import EMBEDDED_FOLDER, Place, explained, place_of
from glare.segmenters import load_pretrained

CPU = torch.device("cpu")


def test_names(tmp_path: Path) -> None:
    assert place_of("landcover-vit") == Place(str(EMBEDDED_FOLDER))
    assert place_of("org/name") == Place("org/name")
    assert place_of("org/name@v1.0") == Place("org/name", "v1.0")
    assert place_of("org/name@v1.0").options == {"revision": "v1.0"} and place_of("org/name").options == {}
    assert place_of(str(tmp_path)) == Place(str(tmp_path))
    odd = tmp_path / "kept@home"
    odd.mkdir()
    assert place_of(str(odd)) == Place(str(odd))
    assert place_of("org/name@") == Place("org/name@")


def test_a_run_folder_is_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert place_of(str(tmp_path)) == Place(str(tmp_path))
    (tmp_path / "recipe.yaml").touch()
    assert place_of(str(tmp_path)) == Place(str(tmp_path / "model"))


def test_a_missing_run_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of("runs/segment") == Place("runs/segment")
    for run in ("a", "b"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"^there is no 'runs/segment'; the runs in 'runs' are a, b$"):
        load_pretrained("runs/segment")
    with pytest.raises(UserError, match="there is no 'runs/segment'"):
        load_segmenter("runs/segment", device=CPU)
    assert place_of("runs/segment@main") == Place("runs/segment", "main")
    assert place_of("name") == Place("name")


def test_the_folder_of_several_seeds_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever job is given it, also before all seeds are done; a model beside runs is one."""
    parent = tmp_path / "segment"
    for seed in ("seed_10", "seed_2"):
        (parent / seed).mkdir(parents=True)
        (parent / seed / "recipe.yaml").touch()
    (parent / "recipe.yaml").touch()
    said = f"'{parent}' is the folder of several runs (seed_2, seed_10) and no model itself; give one of them, such as "
    said += f"'{parent / 'seed_2'}'\n"
    (tmp_path / "a.png").touch()
    out, scenes = str(tmp_path / "out"), "landcover:arid:2"
    for job in (
        ["evaluate", "--model", str(parent), "--data", scenes],
        ["predict", "--model", str(parent), "--output", out, str(tmp_path / "a.png")],
        ["finetune", "--model", str(parent), "--data", scenes, "--output", out],
        ["pretrain", "--backbone", str(parent), "--data", scenes, "--output", out],
        ["compare", "--base", "landcover-vit", "--adapted", str(parent), "--data", scenes, "--output", out],
        ["push", str(parent), "owner/name", "--dry-run"],
    ):
        assert cli.main(job) == 2
        assert capsys.readouterr().err == f"glare {job[0]}: error: {said}", job
    (parent / "config.json").touch()
    assert place_of(str(parent)) == Place(str(parent))


def test_files_of_a_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert Place(str(tmp_path)).file("config.json") == tmp_path / "config.json"
    assert Place(str(tmp_path)).file("adapter_config.json") is None
    for nowhere in (str(tmp_path / "absent"), "./absent", "a b"):
        assert Place(nowhere).file("config.json") is None


# what goes wrong is one sentence


@pytest.fixture
def cut_short(tmp_path: Path) -> Path:
    """A saved segmenter of whose weights a part is missing, as after a broken download."""
    segmenter(tiny_vit()).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return tmp_path / "cut"


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value)


def test_weights_that_are_cut_short(cut_short: Path) -> None:
    with pytest.raises(
        UserError, match=r"model '.*cut' cannot be loaded \(its weights are damaged or cut short"
    ) as error:
        load_segmenter(str(cut_short), device=CPU)
    assert one_sentence(error)
    with pytest.raises(UserError, match=r"backbone .*damaged or cut short.*give a folder with config.json") as error:
        load_pretrained(str(cut_short))
    assert one_sentence(error)


@pytest.mark.parametrize("name", ["./absent", "a b", ""])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match="no such folder, and not of the form of a Hub id") as error:
        load_pretrained(name)
    assert one_sentence(error)


def test_adapters(tmp_path: Path, images: Tensor) -> None:
    tiny_vit("dinov2").save_pretrained(tmp_path / "vit")
    adapted_model(tiny_vit("dinov2")).save_adapter(tmp_path / "adapter", base_model=str(tmp_path / "vit"))
    model, _ = load_pretrained(str(tmp_path / "adapter"))
    assert model.config.adapter_config is not None and model(images).last_hidden_state.isfinite().all()

    adapted_model(tiny_vit("dinov2")).save_adapter(tmp_path / "homeless")
    with pytest.raises(UserError, match="does not say for which model it is"):
        load_pretrained(str(tmp_path / "homeless"))

    config = tmp_path / "homeless" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": {"a": 1}}))
    with pytest.raises(UserError, match="does not say for which model it is"):
        load_pretrained(str(tmp_path / "homeless"))

    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter '.*' cannot be loaded \(its weights are damaged") as error:
        load_pretrained(str(tmp_path / "adapter"))
    assert one_sentence(error)


def test_errors_of_other_kinds_stay_what_they_are() -> None:
    with pytest.raises(MemoryError), explained("model", "it", "do something"):
        raise MemoryError
    with pytest.raises(UserError, match="division by zero"), explained("model", "it", "do something"):
        _ = 1 / 0
