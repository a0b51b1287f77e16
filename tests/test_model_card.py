"""Cards say what the files of a run say, no more: numbers, licences and names."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import PreTrainedModel

import glare
from glare import UserError, cli
from glare.card_scores import result_files
from glare.hub import PushRecipe, belongs
from glare.licences import FAMILIES, Licence, combined, front_matter, of_family, stated
from glare.lineage import origin_of, public_name, stages_of
from glare.model_card import DASH, Said, card, facts_of, metadata, write_card
from glare.model_names import Place
from glare.publication import find, stage, without_places
from glare.weight_files import weights_digest

ROOT = Path(__file__).parents[1]
MakeVit = Callable[..., PreTrainedModel]

APACHE, NC, SA = Licence("apache-2.0", "a"), Licence("cc-by-nc-sa-4.0", "b"), Licence("cc-by-sa-4.0", "c")
DINOV3 = FAMILIES["facebook/dinov3-"]
SCORES = {
    "miou": 0.41234,
    "aacc": 0.7,
    "macc": None,
    "iou": {"soil": 0.5, "wet_land": None},
    "num_images": 7,
    "data": "/somewhere/private/scenes/val",
    "split": "val",
    "match": None,
    "seed": 3,
}


@pytest.fixture
def run(tmp_path: Path, make_vit: MakeVit) -> Path:
    """A run of glare pretrain on this machine."""
    vit = make_vit()
    vit.save_pretrained(tmp_path / "base")
    model = glare.GlareModel.from_backbone(vit, glare.UniAdapterConfig(r=4))
    folder = tmp_path / "adapted"
    model.save_pretrained(folder / "model")
    model.save_adapter(folder / "adapter", base_model=str(tmp_path / "base"))
    write_recipe(folder, backbone=str(tmp_path / "base"), data=str(tmp_path / "private" / "photos" / "images"))
    (folder / "price.json").write_text('{"images": 1234, "seconds": 900.0, "device": "cpu, 1 threads"}')
    return folder


@pytest.fixture
def segmenter(run: Path, make_vit: MakeVit) -> Path:
    """A run of glare finetune that started from it, with scores."""
    model = glare.GlareModel.from_backbone(make_vit(), glare.UniAdapterConfig(r=4))
    names = {0: "soil", 1: "wet_land"}
    head = glare.GlareForSemanticSegmentation.from_model(model, id2label=names, fpn_channels=16, head_channels=8)
    folder = run.parent / "segment"
    head.save_pretrained(folder / "model")
    write_recipe(folder, model=str(run), data="/somewhere/private/scenes", head="fpn", train_on="full", seed=3)
    (folder / "eval.json").write_text(json.dumps(SCORES))
    return folder


def write_recipe(folder: Path, **values: object) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def absent(_kind: str, _hub_id: str) -> None:
    """The look-up where the Hub has no such thing."""


def share_alike(_kind: str, _hub_id: str) -> dict[str, Any]:
    return {"license": ["cc-by-sa-4.0"]}


def text_of(folder: Path, **said: Any) -> str:
    return card(facts_of(find(folder), Said(**said)))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([APACHE, Licence("mit")], {"license": "apache-2.0"}),
        ([APACHE, NC], {"license": "cc-by-nc-sa-4.0"}),
        ([NC, APACHE, NC], {"license": "cc-by-nc-sa-4.0"}),
        ([APACHE, Licence(None)], {"license": "unknown"}),
        ([], {"license": "unknown"}),
        ([SA, NC], {"license": "other", "license_name": "cc-by-sa-4.0-and-cc-by-nc-sa-4.0"}),
        ([APACHE, Licence("My Terms")], {"license": "other", "license_name": "my-terms"}),
        (
            [DINOV3, APACHE],
            {"license": "other", "license_name": "dinov3-license", "license_link": DINOV3.link},
        ),
    ],
)
def test_the_licence_follows_from_all_parts(parts: list[Licence], expected: Mapping[str, str]) -> None:
    assert combined(parts).metadata() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("CamVid non-commercial", True),
        ("research, noncommercial", True),
        ("NC", True),
        ("dinov3-license", False),
        ("own licence", False),
        ("apache-2.0", False),
    ],
)
def test_non_commercial_is_found_in_the_name(name: str, expected: bool) -> None:
    assert Licence(name).non_commercial is expected


def test_licences_that_cards_state(tmp_path: Path) -> None:
    assert stated({"license": ["cc-by-4.0"]}, "card") == Licence("cc-by-4.0", "card")
    assert stated({"license": ["mit", "cc-by-nc-4.0"]}, "card").id == "cc-by-nc-4.0"
    assert stated({"license": "unknown"}, "card").id is None and stated({}, "card").id is None
    assert of_family("facebook/dinov2-with-registers-small").id == "apache-2.0"
    assert of_family("someone/dinov2-small").id is None
    for content in ("no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(content)
        assert front_matter(tmp_path / "README.md") == {}


def test_origins_are_named_without_the_way_to_them(tmp_path: Path) -> None:
    (tmp_path / "roads" / "train" / "images").mkdir(parents=True)
    (tmp_path / "roads" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Roads\n")
    data = origin_of("dataset", str(tmp_path / "roads" / "train" / "images"))
    assert (data.name, data.hub_id, data.licence.id) == ("roads", None, "cc-by-nc-4.0")
    assert public_name("../x/dinov2-small/") == "dinov2-small" and public_name("/") == "unnamed"
    assert origin_of("model", "facebook/dino-vits16").licence.id == "apache-2.0"
    assert origin_of("model", "runs/gone", absent).hub_id is None
    found = origin_of("dataset", "owner/set", share_alike)
    assert (found.hub_id, found.licence.id) == ("owner/set", "cc-by-sa-4.0")
    assert origin_of("dataset", "landcover:arid:8").licence.id == "apache-2.0"
    assert origin_of("model", "config.json").name == "random weights"


def test_a_card_without_an_evaluation_says_so(run: Path) -> None:
    write_card(run)
    text = (run / "model" / "README.md").read_text()
    assert "**This model has not been evaluated**" in text
    assert "was not measured against the untouched model" in text
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "unknown" and "model-index" not in data and "metrics" not in data
    assert "base_model" not in data, "a folder on this machine is not a model of the Hub"
    assert result_files(facts_of(find(run)).evaluation) == {}
    assert "| Images | 1,234 |" in text and "adapted in 15.0 min on cpu" in text
    assert str(run.parent) not in text and "| Data | photos |" in text


def test_every_score_is_that_of_eval_json(segmenter: Path) -> None:
    facts = facts_of(find(segmenter), Said(repo_id="owner/land"))
    text = card(facts)
    assert f"| 41.2 | 70.0 | {DASH} |" in text and "| soil | 50.0 |" in text and f"| wet_land | {DASH} |" in text
    assert "On 7 images of scenes, split val, at their native size; the training had seed 3." in text
    assert "/somewhere" not in text and "has not been evaluated" not in text
    data = ModelCard(text).data.to_dict()
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "land"
    assert {(r.metric_type, r.metric_value) for r in results} == {("mean_iou", 0.41234), ("accuracy", 0.7)}
    assert data["pipeline_tag"] == "image-segmentation" and data["metrics"][0] == "mean_iou"
    (entry,) = yaml.safe_load(result_files(facts.evaluation)[".eval_results/glare.yaml"])
    assert entry["value"] == 0.41234 and entry["dataset"] == {"id": "scenes", "task_id": "semantic_segmentation"}
    # another eval.json, another card
    (segmenter / "eval.json").write_text(json.dumps({**SCORES, "miou": 0.5}))
    assert f"| 50.0 | 70.0 | {DASH} |" in text_of(segmenter)


def test_scores_of_other_weights_are_left_out(segmenter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (segmenter / "model" / "model.safetensors").read_bytes()
    own = {**SCORES, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    (segmenter / "eval.json").write_text(json.dumps(own))
    assert result_files(facts_of(find(segmenter)).evaluation) and "| soil | 50.0 |" in text_of(segmenter / "model")
    (segmenter / "eval.json").write_text(json.dumps({**own, "weights_sha256": "0" * 64}))
    facts = facts_of(find(segmenter))
    text = card(facts)
    assert "the scores that came with it are of other weights and are left out" in text
    assert "| soil |" not in text and "model-index" not in ModelCard(text).data.to_dict()
    assert result_files(facts.evaluation) == {}
    assert cli.main(["push", str(segmenter), "owner/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "the scores in eval.json are of other weights and are left out" in out and ".eval_results" not in out


def test_the_digest_of_shards_tells_them_apart(make_vit: MakeVit, tmp_path: Path) -> None:
    model = make_vit()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    first = weights_digest(Place(str(tmp_path)))
    sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in shards)
    assert first == hashlib.sha256(sums.encode()).hexdigest()
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"x")
    assert weights_digest(Place(str(tmp_path))) not in (first, None)


def test_a_card_says_of_how_many_images_the_scores_were_trained_on(segmenter: Path) -> None:
    (segmenter / "eval.json").write_text(json.dumps({**SCORES, "trained_on": 5}))
    assert "; the model was trained on 5 of these images; the training had seed 3." in text_of(segmenter)
    (results,) = result_files(facts_of(find(segmenter)).evaluation).values()
    assert "the model was trained on 5 of these images" in yaml.safe_load(results)[0]["notes"]


def test_the_stages_lead_back_to_the_base_model(segmenter: Path) -> None:
    stages = stages_of(segmenter)
    assert [stage.kind.name for stage in stages] == ["glare", "finetune"]
    said = {"base_model": "facebook/dinov2-small", "data_name": "owner/scenes", "data_license": "cc-by-nc-4.0"}
    facts = facts_of(find(segmenter), Said(**said, license=None))
    data = metadata(facts).to_dict()
    assert data["base_model"] == "facebook/dinov2-small" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["owner/scenes"]
    text = card(facts)
    assert "adapted without labels to images of photos" in text
    assert "**Non-commercial**: owner/scenes may not be used commercially" in text
    assert "Not known: the licence of photos." in text and data["license"] == "unknown"
    assert ModelCard(text_of(segmenter, license="cc-by-nc-4.0")).data["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "0.001 for the head, 3e-05 below it, 20 steps of warm-up, linear to 0"),
        ({"train_on": "head"}, "0.001 for the head, 20 steps of warm-up, linear to 0"),
        ({"train_on": "head", "poly_power": 0.9, "min_learning_rate": "1e-4"}, "{head} power 0.9 to 1e-4"),
        ({"poly_power": 0.9}, "{both} power 0.9 to 0"),
        ({"poly_power": 2, "min_learning_rate": 1e-5}, "{both} power 2 to 1e-05"),
        ({"poly_power": 2, "min_learning_rate": 1e-4}, "{both} power 2 to 0.0001, constant where the peak is lower"),
        ({"warmup_steps": None}, "0.001 for the head, 3e-05 below it, linear to 0"),
    ],
)
def test_the_schedule_is_that_of_the_recipe(segmenter: Path, changes: dict[str, Any], expected: str) -> None:
    rates = {"learning_rate": 1e-3, "backbone_learning_rate": 3e-5, "warmup_steps": 20}
    shape = {"poly_power": 1.0, "min_learning_rate": 0.0, "train_on": "full"}
    write_recipe(segmenter, model="vit", data="pets", **(rates | shape | changes))
    head, warm = "0.001 for the head", "20 steps of warm-up, polynomial of"
    expected = expected.format(head=f"{head}, {warm}", both=f"{head}, 3e-05 below it, {warm}")
    assert f"| Learning rate | {expected} |\n" in text_of(segmenter)


def test_a_card_says_simmim_and_classification_where_these_were_done(segmenter: Path, run: Path) -> None:
    """From random weights: nothing was adapted, and nothing of it is GLARE."""
    simmim = {"objective": "simmim", "adapter": "full", "rank": 64, "views": {"patch_ratio": [0.6, 0.6]}}
    write_recipe(run, backbone="vit.json", data="photos", **simmim)
    classes = run.parent / "classes"
    classes.mkdir()
    write_recipe(classes, model=str(run), data="scenes", mixup=0.2, crop_size=32)
    (classes / "accuracy.json").write_text('{"accuracy": 0.855, "data": "/private/scenes/val"}')
    write_recipe(segmenter, model=str(classes), data="pets", head="pixel")
    facts = facts_of(find(segmenter))
    assert [stage.kind.name for stage, _ in facts.stages] == ["simmim", "classify", "finetune"]
    text = card(facts)
    assert (
        "with a ViT that began with random weights, pre-trained without labels, by predicting the pixels of masked "
        "patches (SimMIM), on images of photos, then trained to classify images of scenes. Made with" in text
    )
    for said in (
        "### Pre-training without labels (SimMIM)",
        "### Classification of images, with MixUp",
        "| Trained | all weights |",
        "| MixUp | factors of Beta(0.2, 0.2) |",
        "| Accuracy of its classifier | 85.50 % on scenes |",
        "| Price | trained in 15.0 min on cpu",
        "eprint        = {2111.09886},",
        "@misc{mixup,",
        "- simmim",
        "knows no images but those above",
    ):
        assert said in text, said
    for wrong in ("GLARE", "2509.17816", "adaptation", "adapted", "rank 64", "/private"):
        assert wrong not in text, wrong
    write_recipe(classes, model=str(run), data="scenes", mixup=0.0)
    assert "### Classification of images\n" in text_of(segmenter)


def test_a_card_of_simmim_on_a_trained_vit_speaks_of_adaptation(run: Path) -> None:
    write_recipe(run, backbone=str(run.parent / "base"), data="photos", objective="simmim", adapter="lora", rank=4)
    text = text_of(run)
    assert "base with UniAdapter adapters, pre-trained without labels, by predicting" in text
    assert "Whether the adaptation helped was not measured" in text and "(GLARE)" not in text


def test_the_citation_of_an_adapted_model_is_the_papers(run: Path) -> None:
    entry = (
        "@misc{glare,\n  title         = {Enhancing Semantic Segmentation with Continual Self-Supervised Pre-training},"
    )
    assert f"```bibtex\n{entry}\n  eprint        = {{2509.17816}},\n  archivePrefix = {{arXiv}}\n}}\n```\n" in text_of(
        run
    )


def test_a_comparison_is_shown_as_it_is_but_for_paths(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    folder.mkdir()
    values = {
        "base": "/home/me/vit",
        "data": [{"data": "/home/me/set_1/"}],
        "models": [{"name": "a", "path": "runs/a"}, {"name": "untouched", "path": "/home/me/vit"}],
    }
    (folder / "compare.json").write_text(json.dumps(values))
    (folder / "compare.md").write_text("- **a** is worse: -1.2 points\n\n/home/me/set_1/: runs/a on /home/me/vit\n")
    text = text_of(run, comparison=folder)
    assert "- **a** is worse: -1.2 points" in text and "set_1: a on vit" in text
    assert "/home/me" not in text and "was not measured" not in text
    with pytest.raises(UserError, match="holds no comparison"):
        text_of(run, comparison=tmp_path)


def test_configurations_lose_their_places() -> None:
    config = {"_name_or_path": "/x", "adapter_config": {"base_model_name_or_path": None}, "a": [{"_name_or_path": "y"}]}
    assert without_places(config, None) == {"adapter_config": {"base_model_name_or_path": None}, "a": [{}]}
    assert without_places(config, "o/m")["a"] == [{"_name_or_path": "o/m"}]
    assert without_places({"base_model_name_or_path": "/x"}, None) == {"base_model_name_or_path": None}


@pytest.mark.parametrize("name", ["a.bin", "adapter/a/config.json", "notes.md", "README.md.bak", ".gitattributes"])
def test_files_of_others_are_left_alone(name: str) -> None:
    assert not belongs(name)


@pytest.mark.parametrize("name", ["model-00001-of-2.safetensors", "adapter/adapter_config.json", "report/loss.png"])
def test_files_of_ours_are_known(name: str) -> None:
    assert belongs(name)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["push", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_folders_and_names_are_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 arguments were given; give two" in refused([str(run)], capsys)
    assert "'a/b/c' is no id of a repository" in refused([str(run), "a/b/c"], capsys)
    assert "is no folder" in refused([str(tmp_path / "no"), "a/b", "--dry-run"], capsys)
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor adapter_config.json" in refused(
        [str(tmp_path / "empty"), "a/b", "--dry-run"], capsys
    )
    assert "is the folder of several runs (adapted)" in refused([str(tmp_path), "a/b", "--dry-run"], capsys)
    assert "'vit', not one of glare" in refused([str(tmp_path / "base"), "a/b", "--dry-run"], capsys)
    assert "HF_HUB_OFFLINE is set" in refused([str(run), "a/b"], capsys)
    (run / "model" / "config.json").rename(run / "config.txt")
    assert "has no model yet" in refused([str(run), "a/b", "--dry-run"], capsys)


def test_nothing_unsafe_goes_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(run), "a/b", "--dry-run"]
    (run / "model" / "pytorch_model.bin").write_bytes(b"")
    assert "holds pytorch_model.bin; only safetensors are published" in refused(command, capsys)
    (run / "model" / "pytorch_model.bin").unlink()
    (run / "model" / "notes.txt").write_text("mine")
    code = run / "model" / "uniadapter.py"
    code.write_text(code.read_text() + f"\n# hf_{'a' * 34}\n")
    error = refused(command, capsys)
    assert "uniadapter.py holds what looks like an access token" in error and "hf_" not in error
    code.unlink()
    assert "lacks uniadapter.py" in refused(command, capsys)


def test_a_dry_run_writes_the_card_and_lists_the_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(run), "owner/name", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "adapter/adapter_model.safetensors" in shown and "nothing was sent" in shown
    assert "names no base model of the Hub (base); if there is one: --base-model ID" in shown
    assert 'from_pretrained("owner/name")' in (run / "model" / "README.md").read_text()


def test_weights_are_linked_not_copied(run: Path, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    stage(find(run), tmp_path / "staged", card="", results={}, base=None)
    assert (tmp_path / "staged" / "model.safetensors").is_symlink()
    assert not (tmp_path / "staged" / "config.json").is_symlink()


def test_the_command_line_says_what_the_user_may_say() -> None:
    recipe = PushRecipe(target=("runs/a", "owner/name"), license="mit", comparison=Path("proof"))
    assert recipe.said() == Said(repo_id="owner/name", license="mit", comparison=Path("proof"))


def test_a_wheel_holds_the_template(tmp_path: Path) -> None:
    for name in ("src", "model_cards"):
        copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    program = "import setuptools.build_meta as b; b.build_wheel('out')"
    built = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    template = zipfile.ZipFile(wheel).read("glare/assets/model_card.md")
    assert template == (ROOT / "model_cards" / "template.md").read_bytes()
    assert not re.findall(rb"\d+\.\d{2,}", template.replace(b"2509.17816", b"")), "a number was typed"
