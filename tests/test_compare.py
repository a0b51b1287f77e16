"""`glare compare` from models and labelled images to verdict and report, as it is called."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from labelled_samples import CLASSES, write_labelled, write_yolo
from tiny_models import adapted_model, tiny_vit

from glare import compare
from glare.compare import CompareRecipe
from glare.comparison import BETTER, SAME, WORSE, Comparison
from glare.errors import UserError
from glare.recipes import parse, to_yaml

COMMON: dict[str, Any] = {"device": "cpu", "precision": "fp32", "short_side": 32, "controls": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_vit().save_pretrained(folder / "base")
    adapted_model(tiny_vit()).save_pretrained(folder / "adapted")
    adapted_model(tiny_vit(), "lora").save_pretrained(folder / "lora")
    shutil.copytree(folder / "base", folder / "same")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for tile in range(3):
        write_labelled(folder, 2, size=(40, 32), prefix=f"tile{tile}")
    return folder


def run(models: Path, images: Path, output: Path, *names: str, **options: Any) -> Comparison:
    adapted = tuple(str(models / name) for name in names)
    given = {"base": str(models / "base"), "adapted": adapted, "data": str(images), "output": output}
    return compare.run(CompareRecipe(**{**COMMON, **given, **options}))


@pytest.fixture(scope="module")
def linear(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    output = tmp_path_factory.mktemp("out") / "linear"
    forgetting = (str(data),)
    foreign = (str(models / "lora"),)
    found = run(models, data, output, "adapted", "same", group_by="prefix", foreign=foreign, forgetting=forgetting)
    return found, output


def test_every_adapted_model_has_a_verdict(linear: tuple[Comparison, Path]) -> None:
    found, _ = linear
    assert [row.name for row in found.rows] == ["adapted", "same"]
    assert {row.verdict for row in found.rows} <= {BETTER, WORSE, SAME}
    assert found.confidence == pytest.approx(0.975)
    assert [model.role for model in found.models] == ["untouched", *["adapted"] * 2, "foreign", *["control"] * 6]


def test_a_model_against_itself_is_not_distinguishable(linear: tuple[Comparison, Path]) -> None:
    found, _ = linear
    row = found.rows[1]
    assert row.verdict == SAME and row.collapsed is None
    for result in found.data:
        finding = result.probes[0].findings["same"]
        assert (finding.against_untouched.low, finding.against_untouched.high) == (0, 0)
        assert result.health["same"].cosine == pytest.approx(1, abs=1e-6)


def test_the_gain_splits_into_tuning_and_domain(linear: tuple[Comparison, Path]) -> None:
    finding = linear[0].data[0].probes[0].findings["adapted"]
    assert finding.tuning is not None and finding.domain is not None
    assert finding.tuning.value + finding.domain.value == pytest.approx(finding.against_untouched.value)


def test_groups_are_shown_one_by_one_and_forgetting_stands_beside(linear: tuple[Comparison, Path]) -> None:
    main, forgotten = linear[0].data
    assert main.adapted_to and not forgotten.adapted_to
    assert set(main.probes[0].findings["adapted"].groups) == {"tile0", "tile1", "tile2"}
    assert "leave one group out" in main.split and "5 random folds" in forgotten.split
    assert list(main.classes) == CLASSES and main.num_images == 6


def test_controls_are_as_far_from_the_untouched_model_as_the_adapted_one(linear: tuple[Comparison, Path]) -> None:
    found, _ = linear
    health = found.data[0].health
    for model in found.models:
        if model.role == "control" and model.of == "adapted":
            assert health[model.name].cosine == pytest.approx(health["adapted"].cosine, abs=0.05)


def test_the_report_is_written(linear: tuple[Comparison, Path]) -> None:
    found, output = linear
    saved = json.loads((output / "compare.json").read_text())
    assert [row["verdict"] for row in saved["rows"]] == [row.verdict for row in found.rows]
    page = (output / "report.html").read_text()
    assert "data:image/" in page and "adapted" in page
    assert found.rows[0].verdict in (output / "compare.md").read_text()
    assert (output / "recipe.yaml").exists()


def test_resume_measures_nothing_again(
    linear: tuple[Comparison, Path], models: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, output = linear
    monkeypatch.setattr(compare, "frozen_areas", None)
    options = {"group_by": "prefix", "foreign": (str(models / "lora"),), "forgetting": (str(data),)}
    with pytest.raises(UserError, match="in use"):
        run(models, data, output, "adapted", "same", **options)
    again = run(models, data, output, "adapted", "same", resume=True, **options)
    assert again.rows == found.rows and again.data == found.data


def test_knn_has_two_probes_that_have_to_agree(models: Path, data: Path, tmp_path: Path) -> None:
    found = run(models, data, tmp_path / "knn", "adapted", protocol="knn", folds=2)
    assert [probe.probe for probe in found.data[0].probes] == ["knn", "whitened knn"]
    verdicts = {probe.findings["adapted"].verdict for probe in found.data[0].probes}
    assert found.rows[0].verdict == (verdicts.pop() if len(verdicts) == 1 else SAME)


def test_fine_tuning_every_fold_with_every_seed(models: Path, data: Path, tmp_path: Path) -> None:
    options = {"protocol": "fpn", "head": "linear", "steps": 1, "seeds": 2, "val_match": "tile2_*"}
    found = run(models, data, tmp_path / "fpn", "adapted", **options)
    assert found.seeds == 2 and found.data[0].num_images == 2
    runs = sorted((tmp_path / "fpn" / "finetuned" / "0_adapted").iterdir())
    assert [path.name for path in runs] == ["seed0_fold0", "seed1_fold0"]


def test_the_command_gives_the_recipe_again(models: Path, data: Path, tmp_path: Path) -> None:
    given = {"base": str(models / "base"), "adapted": ("a b", "c"), "data": str(data), "output": tmp_path / "o"}
    recipe = CompareRecipe(**given, group_by="prefix", strict=True, controls=4)
    words = shlex.split(recipe.command())
    assert words[:2] == ["glare", "compare"]
    assert parse(CompareRecipe, words[2:], prog="glare compare") == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "nowhere"}, "nowhere"),
        ({"data": "nowhere"}, "is not a folder"),
        ({"forgetting": ("nowhere",)}, "is not a folder"),
        ({"group_by": "(x"}, "no regular expression"),
        ({"folds": 7}, "7 folds"),
        ({"match": "nothing*"}, "nothing"),
        ({"adapted": ()}, "no adapted model"),
    ],
)
def test_wrong_input_leaves_nothing_behind(
    options: dict[str, Any], message: str, models: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        run(models, data, tmp_path / "out", "adapted", **options)
    with pytest.raises(UserError, match="has adapters already"):
        run(models, data, tmp_path / "out", "adapted", base=str(models / "adapted"))
    assert not (tmp_path / "out").exists()


def test_folders_of_splits_below_images_are_refused(models: Path, tmp_path: Path) -> None:
    data = write_yolo(tmp_path / "yolo", train=2, val=2)
    with pytest.raises(UserError, match=r"give --val-match 'val/\*'"):
        run(models, data, tmp_path / "out", "adapted")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(models: Path, data: Path, tmp_path: Path, forks: Forks) -> None:
    words = ["--base", models / "base", "--adapted", models / "adapted", models / "lora", "--data", data]
    options = ["--group-by", "prefix", "--device", "cpu", "--short-side", "32", "controls=3"]
    done = forks.run("compare", *map(str, words), "--output", "out", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert len(verdicts) == 2 and all(row["verdict"] in done.stdout for row in verdicts)
    wrong = forks.run("compare", *map(str, words), "--output", "b", "--controls", "1", folder=tmp_path)
    assert wrong.returncode == 2 and "controls is 1; give at least 3" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_repeated_test_images_are_counted(
    linear: tuple[Comparison, Path], models: Path, data: Path, tmp_path: Path
) -> None:
    film = tmp_path / "film"
    shutil.copytree(data, film)
    for kind in ("images", "labels"):
        shutil.copy(film / kind / "tile0_0.png", film / kind / "tile0_9.png")
    found = run(models, film, tmp_path / "out", "adapted", folds=2)
    assert found.data[0].repeats == linear[0].data[0].repeats + 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("protocol", "key", "value"), [("linear", "steps", 60), ("fpn", "device", "auto")])
def test_resume_with_what_changes_a_result_is_refused(
    protocol: str, key: str, value: Any, models: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    given = {"base": str(models / "base"), "adapted": (str(models / "adapted"),), "data": str(data), "output": folder}
    begun = CompareRecipe(**{**COMMON, **given, "protocol": protocol, "steps": 2})
    (folder / "recipe.yaml").write_text(to_yaml(begun))  # of a comparison that was stopped
    before = contents(folder)
    with pytest.raises(UserError, match=f"has another recipe: {key} was {getattr(begun, key)} and is {value};"):
        compare.run(replace(begun, resume=True, **{key: value}))
    assert contents(folder) == before


@pytest.mark.parametrize("replaced", ["base", "adapted"])
def test_resume_with_a_model_that_was_replaced_is_refused(
    replaced: str, linear: tuple[Comparison, Path], models: Path, data: Path, tmp_path: Path
) -> None:
    output, place = tmp_path / "out", models / replaced
    shutil.copytree(linear[1], output)
    before = contents(output)
    options = {"group_by": "prefix", "foreign": (str(models / "lora"),), "forgetting": (str(data),)}
    place.rename(tmp_path / "old")
    try:
        other = tiny_vit(seed=1)
        (other if replaced == "base" else adapted_model(other)).save_pretrained(place)
        with pytest.raises(UserError) as caught:
            run(models, data, output, "adapted", "same", resume=True, **options)
    finally:
        shutil.rmtree(place)
        (tmp_path / "old").rename(place)
    assert str(caught.value) == (
        f"the weights of {str(place)!r} are not those that the comparison in {output} was begun with; "
        "give --resume with the old ones in their place, or another --output without it"
    )
    assert contents(output) == before


def test_a_base_of_random_weights_has_the_same_ones_after_a_resume(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def stop(_: Path, digests: dict[str, str]) -> None:
        seen.append(digests)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "check_same_weights", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(models, data, tmp_path / "out", "adapted", base=str(models / "base" / "config.json"))
    assert seen[0] == seen[1] and len(seen[0]) == 2
