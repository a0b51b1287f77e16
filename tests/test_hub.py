"""Publishing with the client of the Hub against a server on this machine, in programs of their own, as people do it."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import Forks
from hub_server import TOKEN, Fault, Hub
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file, save_file
from strangers import stranger
from tiny_models import tiny_vit, train_a_little
from transformers import AutoModel, AutoModelForSemanticSegmentation, Dinov2Config

import glare
from glare import finetune
from glare.finetune import FinetuneRecipe
from glare.model_card import card, facts_of, write_card
from glare.publication import check, find, stage

CODE = {"configuration_glare.py", "modeling_glare.py", "segmentation_heads.py", "uniadapter.py"}
BASE = ["--base-model", "someone/vit"]
FOREVER = 10_000
ADAPTERS_2 = "run_2/adapter/adapter_model.safetensors"
MODEL_2 = "run_2/model/model.safetensors"
COMMIT = "/api/models/org/{}/commit/main"


@dataclass
class World:
    """The server, programs that know no other Hub, and a folder with runs to publish.

    ``pushes``: repository -> what glare push gave.
    """

    hub: Hub
    folder: Path
    environment: dict[str, str]
    forks: Forks
    pushes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def stranger(self) -> Path:
        """An interpreter without this package."""
        return stranger(self.folder / "stranger")

    def program(self, text: str, *arguments: str, glare: bool = True) -> Any:
        """Run a program and read what it left in ``facts.json``; ``glare``: whether this package is there."""
        if glare:
            script = self.folder / "program.py"
            script.write_text(text)
            result = self.forks.run(*arguments, script=script, folder=self.folder)
        else:
            command, options = [self.stranger, "-c", text, *arguments], {"capture_output": True, "text": True}
            result = subprocess.run(command, cwd=self.folder, env=self.environment, timeout=300, check=False, **options)
        assert result.returncode == 0, result.stderr
        return json.loads((self.folder / "facts.json").read_text())

    def blob(self, file: str) -> str:
        """What the Hub calls the content of a file."""
        return hashlib.sha256((self.folder / file).read_bytes()).hexdigest()


PUSHES = """
import contextlib, io, json, os, sys, time
import glare
from glare import cli
from transformers import AutoModel, AutoModelForSemanticSegmentation

waits = []
time.sleep = waits.append
AutoModel.from_pretrained("vit").push_to_hub("someone/vit")
AutoModel.from_pretrained("run_1/model").push_to_hub("someone/model")
segmenter = AutoModelForSemanticSegmentation.from_pretrained("segment/model")
segmenter.push_to_hub(
    "someone/segmenter", private=True, tags=["aerial"], commit_message="By hand", base_model="someone/vit",
    base_license="apache-2.0", data_license="cc-by-nc-sa-4.0",
)
segmenter.head.classifier.bias.data += 1
segmenter.push_to_hub("someone/changed")
try:
    segmenter.push_to_hub("someone/refused", token="hf_" + "x" * 34)
except glare.UserError as error:
    refused = str(error)
results = {"by model": refused}
for name, (token, argv) in json.loads(sys.argv[1]).items():
    waits.clear()
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["push", *argv])
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "waits": list(waits)}
json.dump(results, open("facts.json", "w"))
"""
"""What models push themselves, and what ``glare push`` answers; it notes how long it would wait, and does not."""

REFUSED = {
    "forbidden": (403, "/repos/create/forbidden", "the token may not write to org/forbidden (403); use one with"),
    "nobody": (404, "/repos/create/nobody", "the Hub has no place for org/nobody (404); check the owner's name"),
    "token": (None, "", "the Hub does not accept the token (401); log in with `hf auth login`"),
    "read-only": (403, COMMIT.format("read-only"), "the token may not write to org/read-only (403)"),
    "conflict": (409, COMMIT.format("conflict"), "org/conflict was changed meanwhile (409); look at what is"),
    "refused": (413, COMMIT.format("refused"), "the Hub refused org/refused (413): on order; nothing was"),
    "branch": (None, "", "org/branch has no branch 'v9'; make it with `hf repos branch create org/branch v9`"),
}
"""Repository -> status and path of the fault, and how the answer to it begins."""

PASSING = {
    "busy": Fault("POST", COMMIT.format("busy"), 429, headers={"Retry-After": "3"}),
    "broken": Fault("POST", COMMIT.format("broken"), 500, times=2),
    "lost": Fault("POST", COMMIT.format("lost"), None),
    "closed": Fault("POST", COMMIT.format("closed"), 503, times=FOREVER),
    "patient": Fault("POST", COMMIT.format("patient"), 429, times=FOREVER, headers={"Retry-After": "1000"}),
}
"""Repository -> its fault."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A base ViT, two adaptations of it and a segmenter on the Hub; the upload of the second one was cut."""
    folder = tmp_path_factory.mktemp("publishing")
    with Hub() as hub, Forks(variables := environment(hub, folder)) as forks:
        world = World(hub, folder, variables, forks)
        write_runs(folder)
        licences = ["--base-license", "apache-2.0", "--data-license", "cc-by-nc-sa-4.0"]
        cases = {
            "adapter": ["run_1/adapter", "org/adapter", "--private", *BASE],
            "segment": ["segment", "org/segment", *licences, *BASE],
            **{name: ["run_1/adapter", f"org/{name}", *BASE] for name in (*REFUSED, *PASSING)},
            "first": ["run_1", "org/adapted", *BASE],
            "cut": ["run_2", "org/adapted", *BASE],
        }
        cases["branch"] += ["--revision", "v9"]
        refusals = [Fault("POST", path, status) for status, path, _ in REFUSED.values() if status]
        cut = Fault("PUT", f"/lfs/{world.blob(ADAPTERS_2)}", None, times=FOREVER)
        hub.faults = [*refusals, *PASSING.values(), cut]
        arguments = {name: ("hf_" + "x" * 34 if name == "token" else TOKEN, argv) for name, argv in cases.items()}
        world.pushes.update(world.program(PUSHES, json.dumps(arguments)))
        yield world


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """Of a program that knows no other Hub."""
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"} | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }


def write_runs(folder: Path) -> None:
    """A ViT, what two seeds of glare pretrain leave, without the training, and a real fine-tuning of the second."""
    tiny_vit("deit").save_pretrained(folder / "vit")
    save_file({"images": torch.randn(2, 3, 16, 24)}, folder / "images.safetensors")
    Image.new("RGB", (40, 32), (30, 60, 190)).save(folder / "photo.jpg")
    for seed in (1, 2):
        model = glare.GlareModel.from_backbone(tiny_vit("deit"), glare.UniAdapterConfig(r=4)).eval()
        train_a_little(model, seed=seed)
        run = folder / f"run_{seed}"
        model.config.backbone_config._name_or_path = str(folder / "vit")
        model.save_pretrained(run / "model")
        model.save_adapter(run / "adapter", base_model=str(folder / "vit"))
        recipe = {"backbone": folder / "vit", "data": folder / "photos" / "images", "adapter": "uniadapter"}
        (run / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
        (run / "price.json").write_text('{"images": 12, "seconds": 30.0, "parameters_trained": 100}')
        write_card(run)
    (folder / "run_1" / "report").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "run_1" / "report" / "loss.png")
    write_labelled(folder / "data" / "train", 4)
    write_labelled(folder / "data" / "val", 2)
    finetune.run(
        FinetuneRecipe(
            model=str(folder / "run_2"),
            data=str(folder / "data"),
            output=folder / "segment",
            head="linear",
            steps=2,
            crop_size=16,
            precision="fp32",
            report_to="none",
        )
    )


@pytest.fixture(scope="module")
def published(world: World) -> World:
    """The cut upload done again, as people call it, after someone else wrote to the repository."""
    hub = world.hub
    hub.files("org/adapted")["notes.md"] = b"by hand"
    hub.faults.clear()
    hub.log.clear()
    again = world.forks.run("push", "run_2", "org/adapted", *BASE, folder=world.folder)
    world.pushes["again"] = {"code": again.returncode, "out": again.stdout, "err": again.stderr}
    return world


def test_what_the_hub_refuses_is_one_sentence(world: World) -> None:
    for name, (_, _, sentence) in REFUSED.items():
        result = world.pushes[name]
        assert result["code"] == 2, (name, result)
        assert result["err"].startswith(f"glare push: error: {sentence}"), (name, result)
        assert result["err"].count("\n") == 1 and "hf_" not in result["err"] + result["out"]
        assert result["waits"] == []
    assert world.hub.files("org/read-only").keys() == {".gitattributes"}


def test_what_passes_by_itself_is_waited_for(world: World) -> None:
    results = {name: world.pushes[name] for name in PASSING}
    assert [result["code"] for result in results.values()] == [0, 0, 0, 1, 1]
    assert [result["waits"] for result in results.values()] == [[3], [2, 8], [2], [2, 8, 30], []]
    assert "the Hub asks for fewer requests (429); trying again in 3 s" in results["busy"]["out"]
    assert "the connection to the Hub failed; trying again in 2 s" in results["lost"]["out"]
    assert results["closed"]["err"] == (
        "glare push: error: the Hub failed (503), org/closed is as it was; give the same command again later, "
        "what has arrived is not sent again\n"
    )
    assert "give the same command again in 1000 s" in results["patient"]["err"]
    for name, files in (("busy", 4), ("broken", 4), ("lost", 4), ("closed", 1), ("patient", 1)):
        assert len(world.hub.files(f"org/{name}")) == files, name


def test_a_cut_upload_leaves_the_old_revision(world: World) -> None:
    cut = world.pushes["cut"]
    assert cut["code"] == 1 and "the connection to the Hub failed, org/adapted is as it was" in cut["err"]
    old = next(oid for oid, tree in world.hub.repos["org/adapted"].commits.items() if "config.json" in tree)
    assert hashlib.sha256(world.hub.files("org/adapted", old)["model.safetensors"]).hexdigest() == world.blob(
        "run_1/model/model.safetensors"
    )


def test_the_same_command_goes_on_where_it_was_cut(published: World) -> None:
    hub, again = published.hub, published.pushes["again"]
    assert again["code"] == 0, again
    assert f"published: {hub.url}/org/adapted/commit/{hub.repos['org/adapted'].branches['main']}" in again["out"]
    sent = {path for method, path in hub.log if method == "PUT"}
    assert sent == {f"/lfs/{published.blob(ADAPTERS_2)}"}
    assert published.blob(MODEL_2) in hub.blobs
    # three revisions: the empty one, the first run, the second
    assert len(hub.repos["org/adapted"].commits) == 3
    # what the run does not have goes, what someone else put there stays
    files = hub.files("org/adapted")
    assert "notes.md" in files and "report/loss.png" not in files
    assert "report/loss.png" in list(hub.repos["org/adapted"].commits.values())[1]


def test_the_repository_holds_what_a_stranger_needs_and_no_more(published: World) -> None:
    hub = published.hub
    model = {"config.json", "model.safetensors", "README.md", *CODE}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    inside = {f"adapter/{name}" for name in adapter}
    assert hub.files("org/adapted").keys() - {".gitattributes", "notes.md"} == model | inside
    assert hub.files("org/adapter").keys() - {".gitattributes"} == adapter | {"README.md"}
    segmenter = {"preprocessor_config.json", ".eval_results/glare.yaml"}
    assert hub.files("org/segment").keys() - {".gitattributes", "report/loss.png"} == model | segmenter
    assert hub.repos["org/adapter"].private and not hub.repos["org/adapted"].private
    assert json.loads(hub.files("org/adapted")["config.json"])["auto_map"]["AutoModel"] == "modeling_glare.GlareModel"


def test_the_command_says_how_to_state_a_licence(world: World) -> None:
    dry = ["push", "segment", "org/segment", "--dry-run", "--data-license", "cc0-1.0"]
    said = world.forks.run(*dry, folder=world.folder).stdout
    told = [line for line in said.splitlines() if "licence of" in line]
    assert told == [
        "the licence of vit is unknown; if you know it: --base-license ID",
        "the licence of photos is unknown; if you know it: write `license: ID` into the front matter of a README.md "
        "beside the images",
    ]


def test_nothing_says_where_it_was_made(published: World) -> None:
    for repo in ("org/adapted", "org/adapter", "org/segment"):
        for name, content in published.hub.files(repo).items():
            assert str(published.folder).encode() not in content, (repo, name)
    config = json.loads(published.hub.files("org/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "someone/vit"


def front_matter(readme: bytes) -> Any:
    return yaml.safe_load(readme.decode().split("---\n")[1])


def test_a_model_pushes_itself_as_the_command_does(published: World) -> None:
    hub = published.hub
    own, other = hub.files("org/segment"), hub.files("someone/segmenter")
    assert own.keys() - {"report/loss.png"} == other.keys()
    assert [name for name in other if own[name] != other[name]] == ["README.md"]
    assert hub.repos["someone/segmenter"].private
    cards = [front_matter(files["README.md"]) for files in (own, other)]
    assert cards[1]["tags"] == [*cards[0]["tags"], "aerial"]
    same = {"license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "metrics"}
    assert {key: cards[0][key] for key in same} == {key: cards[1][key] for key in same}
    assert own["README.md"].decode().split("## Results")[1] == other["README.md"].decode().split("## Results")[1]
    adapted = hub.files("someone/model")
    assert {*CODE, "preprocessor_config.json", "adapter/adapter_model.safetensors"} <= adapted.keys()
    assert b"| Data | photos |" in adapted["README.md"]


def test_a_changed_model_has_not_the_scores_of_its_run(published: World) -> None:
    readme = published.hub.files("someone/changed")["README.md"].decode()
    assert "**This model has not been evaluated**" in readme
    assert "How it was trained is not known" in readme
    assert front_matter(readme.encode())["license"] == "unknown"


def test_a_model_that_the_hub_refuses_says_so_in_one_sentence(world: World) -> None:
    assert str(world.pushes["by model"]).startswith("the Hub does not accept the token (401)")


def snippets(readme: bytes) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme.decode(), re.DOTALL)


LOAD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSemanticSegmentation

remote = sys.argv[1] == "remote"
trust = {"trust_remote_code": True} if remote else {}
if not remote:
    import glare
    from peft import PeftModel
images = load_file("images.safetensors")["images"]
found = {}
with torch.no_grad():
    for name, revision in json.loads(sys.argv[2]).items():
        model = AutoModel.from_pretrained("org/adapted", revision=revision, **trust)
        found[name] = model(images).last_hidden_state
        found |= {name + "." + key: value for key, value in model.state_dict().items()}
    for name, repo in {"logits": "org/segment", "logits by the model": "someone/segmenter"}.items():
        found[name] = AutoModelForSemanticSegmentation.from_pretrained(repo, **trust)(images).logits
    found["by the model"] = AutoModel.from_pretrained("someone/model", **trust)(images).last_hidden_state
    places = {} if remote else {"adapter": ("org/adapter", {}), "inside": ("org/adapted", {"subfolder": "adapter"})}
    for name, (repo, place) in places.items():
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained("someone/vit"), repo, **place)
        found[name] = adapted(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
for snippet in json.loads(sys.argv[3]):
    exec(snippet, {})
save_file({name: value.clone().contiguous() for name, value in found.items()}, "found.safetensors")
json.dump(sorted(name for name in sys.modules if name.split(".")[0] == "glare"), open("facts.json", "w"))
"""


@pytest.mark.parametrize("way", ["package", "remote"])
def test_a_stranger_gets_the_same_bits(way: str, published: World) -> None:
    folder, images = published.folder, load_file(published.folder / "images.safetensors")["images"]
    first, second = list(published.hub.repos["org/adapted"].commits)[1:]
    revisions = {"main": "main", "first": first, "second": second}
    cards = [published.hub.files(repo)["README.md"] for repo in ("org/adapter", "org/segment")]
    # the model of run 1 was saved without an image processor: of its card, the adapter's lines
    cards_lines = [line for readme in cards for line in snippets(readme)]
    cards_lines += snippets(published.hub.files("org/adapted")["README.md"])[1:]
    lines = json.dumps(cards_lines if way == "package" else [])
    modules = published.program(LOAD, way, json.dumps(revisions), lines, glare=way == "package")
    assert len(cards_lines) == 3 and bool(modules) == (way == "package")

    found = load_file(folder / "found.safetensors")
    with torch.no_grad():
        models = [AutoModel.from_pretrained(folder / f"run_{seed}" / "model") for seed in (1, 2)]
        tokens = [model(images).last_hidden_state for model in models]
        logits = AutoModelForSemanticSegmentation.from_pretrained(folder / "segment" / "model")(images).logits
    assert not torch.equal(*tokens)
    adapters = (["adapter"], ["inside"]) if way == "package" else ([], [])
    for place, names in enumerate((["first", "by the model", *adapters[0]], ["main", "second", *adapters[1]])):
        assert [name for name in names if not torch.equal(found[name], tokens[place])] == []
    assert torch.equal(found["logits"], logits) and torch.equal(found["logits by the model"], logits)
    for model, name in zip(models, ("first", "second"), strict=True):
        assert all(torch.equal(found[f"{name}.{key}"], value) for key, value in model.state_dict().items())


def test_the_adapter_of_a_vit_s_is_small(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, patch_size=14)
    model = glare.GlareModel.from_backbone(AutoModel.from_config(config), glare.UniAdapterConfig(r=64))
    model.save_adapter(tmp_path / "adapter", base_model="facebook/dinov2-small")
    publication = find(tmp_path / "adapter")
    (tmp_path / "staged").mkdir()
    stage(publication, tmp_path / "staged", card=card(facts_of(publication)), results={}, base="facebook/dinov2-small")
    check(publication, tmp_path / "staged")
    assert sum(file.stat().st_size for file in (tmp_path / "staged").iterdir()) <= 3_000_000
    assert {file.name for file in (tmp_path / "staged").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
