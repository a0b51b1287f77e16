"""Nothing that is read runs code, nothing is unpacked, and no token or password gets into a file or a message."""

import ast
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hub_server import Hub, Repo
from labelled_samples import write_labelled
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import adapted_model, segmenter, tiny_vit

from glare import cli, region_attention
from glare.backbones import load_backbone
from glare.convert import ConvertRecipe
from glare.convert import run as convert
from glare.data import opening
from glare.data.sources import BadImage, open_source
from glare.errors import HIDDEN, UserError, redacted
from glare.foreign_weights import read_checkpoint
from glare.hub import PushRecipe, prepared
from glare.inference import load_segmenter
from glare.lineage import offline
from glare.objectives.glare import CrossAttention
from glare.publication import find
from glare.run_folder import RunFolder
from glare.segmenters import load_pretrained

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for part in ("src", "spaces", "training") for file in (ROOT / part).rglob("*.py"))
CPU = torch.device("cpu")


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that is there as soon as somebody runs what came with the weights."""
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


def old_tar(trace: Path) -> bytes:
    """PyTorch's format before 0.1.11, a tar of pickles."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            body = pickle.dumps(Evil(trace), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return stream.getvalue()


def saved(content: Any, *, modern: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=modern)
    return stream.getvalue()


def malicious(form: str, trace: Path) -> bytes:
    nested = {"model": {"a": torch.zeros(2), "deep": [{"in": (1, Evil(trace))}]}, "epoch": 1}
    return {
        "zip": lambda: saved({"model": {"a": torch.zeros(2)}, "args": Evil(trace)}, modern=True),
        "zip, deep inside": lambda: saved(nested, modern=True),
        "before 1.6": lambda: saved({"model": {"a": torch.zeros(2)}, "args": Evil(trace)}, modern=False),
        "before 0.1.11": lambda: old_tar(trace),
        "bare pickle": lambda: pickle.dumps(Evil(trace)),
        "bare pickle, protocol 0": lambda: pickle.dumps({"model": Evil(trace)}, protocol=0),
    }[form]()


FORMS = ("zip", "zip, deep inside", "before 1.6", "before 0.1.11", "bare pickle", "bare pickle, protocol 0")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_checkpoint_is_not_run(form: str, suffix: str, trace: Path, tmp_path: Path) -> None:
    file = tmp_path / f"evil{suffix}"
    file.write_bytes(malicious(form, trace))
    with pytest.raises(UserError, match=r"evil.* (cannot be read|holds objects besides|is no PyTorch)") as caught:
        convert(ConvertRecipe(source="dino", paths=(file, tmp_path / "vit")))
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "pytorch_model.pt"])
def test_a_model_folder_of_pickles_is_not_run(name: str, form: str, trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    segmenter(tiny_vit()).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(malicious(form, trace))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(folder))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_segmenter(str(folder), device=CPU)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_model.pt"])
def test_an_adapter_of_pickles_is_not_run(name: str, trace: Path, tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path / "vit")
    adapted_model(tiny_vit(), "lora").save_adapter(tmp_path / "adapter", base_model=str(tmp_path / "vit"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / name).write_bytes(malicious("zip", trace))
    with pytest.raises(UserError, match=r"adapter .* cannot be loaded"):
        load_pretrained(str(tmp_path / "adapter"))


def test_other_files_of_weights_are_not_run(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / region_attention.FILE).write_bytes(malicious("zip", trace))
    said = region_attention.start(CrossAttention(8, 1), str(tmp_path))
    assert said is not None and "cannot be read" in said
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    files = {
        "state.json": b'{"step": 1, "metrics_bytes": 0, "state": {}}',
        "state.safetensors": malicious("zip", trace),
    }
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    with (
        pytest.warns(UserWarning, match="is left out: it cannot be read"),
        pytest.raises(UserError, match=r"no checkpoint .* can be used"),
    ):
        RunFolder(tmp_path, write=False).latest_checkpoint()


# code that comes with a model


@pytest.mark.parametrize("model_type", ["vit", "glare", "unheard-of"])
def test_code_beside_a_model_is_not_run(model_type: str, trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if model_type == "glare":
        segmenter(tiny_vit()).save_pretrained(folder)
    else:
        tiny_vit().save_pretrained(folder)
    code = f"open({str(trace)!r}, 'w')\n"
    for file in (*folder.glob("*.py"), folder / "evil.py", folder / "__init__.py"):
        file.write_text(code)
    config = json.loads((folder / "config.json").read_text())
    kinds = ("AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation", "AutoBackbone")
    config |= {"model_type": model_type, "auto_map": {kind: f"evil.{kind}" for kind in kinds}}
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_backbone, lambda name: load_segmenter(name, device=CPU)):
        try:
            load(str(folder))
        except UserError as error:
            assert model_type != "glare" and "\n" not in str(error)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{above}/outside.safetensors", "in/a.safetensors", 3, ".."])
def test_an_index_of_shards_does_not_lead_out_of_the_model(name: object, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run" / "model"
    segmenter(tiny_vit()).save_pretrained(folder)
    (run / "recipe.yaml").write_text("model: vit\ndata: scenes\nhead: fpn\n")
    weights = load_file(folder / "model.safetensors")
    (folder / "in").mkdir()
    for place in (run / "outside.safetensors", folder / "in" / "a.safetensors", tmp_path / "outside.safetensors"):
        shutil.copy(folder / "model.safetensors", place)
    (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
    index = folder / "model.safetensors.index.json"
    shard = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1-of-1.safetensors")}
    index.write_text(json.dumps(shard))
    assert load_segmenter(str(folder), device=CPU) and load_backbone(str(folder))
    name = name.format(above=run) if isinstance(name, str) else name
    index.write_text(json.dumps({**shard, "weight_map": dict.fromkeys(weights, name)}))
    push = lambda _: prepared(find(run), PushRecipe(target=(str(run), "owner/name")), offline).__enter__()  # noqa: E731
    for load in (load_backbone, lambda name: load_segmenter(name, device=CPU), push):
        with pytest.raises(UserError, match="which is no safetensors file beside it") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)


def test_no_call_asks_for_remote_code() -> None:
    calls = [(file, call) for file in SOURCES for call in calls_in(file) if name_of(call) == "from_pretrained"]
    assert len(calls) >= 6
    for file, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        owner = ast.unparse(call.func).split(".")[0]
        safe = isinstance(value, ast.Constant) and value.value is False
        spread = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
        assert safe or owner == "PeftConfig" or any("options" in text for text in spread), (
            f"{file}: {ast.unparse(call)}"
        )


# the sources


def calls_in(file: Path) -> Iterator[ast.Call]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "joblib.load", "shutil.unpack_archive"),
    *("pickle.Unpickler", "torch.hub.load", "shelve.open", "dill.load", "dill.loads", "evaluate.load"),
}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(file: Path) -> None:
    for call in calls_in(file):
        text, given = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{file}:{call.lineno}: {ast.unparse(call)}"
        assert text not in FORBIDDEN, where
        assert not text.endswith((".extractall", ".unpack_archive")), where
        assert given.get("shell") != "True", where
        assert given.get("allow_pickle") in (None, "False"), where
        assert given.get("trust_remote_code") in (None, "False"), where
        if text == "torch.load":
            assert given.get("weights_only") == "True", where


# archives


def evil_tar(file: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 3)).save(picture, "png")
    with tarfile.open(file, "w") as tar:
        for name in ("0.png", "../escaped.png", "/tmp/absolute-escaped.png", "a/../../up.png"):
            member = tarfile.TarInfo(name)
            member.size = picture.tell()
            tar.addfile(member, io.BytesIO(picture.getvalue()))
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "dev.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)


def test_members_of_a_tar_do_not_leave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "data" / "shards").mkdir(parents=True)
    evil_tar(tmp_path / "data" / "shards" / "x.tar")
    source = open_source(str(tmp_path / "data" / "shards"))
    read = [source.read(index).size for index in range(len(source))]
    assert set(read) == {(4, 3)}
    left = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.png")]
    assert left == [] and not Path("/tmp/absolute-escaped.png").exists()
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["shards", "x.tar"]


def bomb(kind: str, size: int) -> dict[str, bytes]:
    """Files of a folder with a picture of 4 x 3 px and something that unpacks to ``size`` bytes."""
    picture, stream = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 3)).save(picture, "png")
    content = {
        "plain": lambda: picture.getvalue() * (size // picture.tell()),
        "member.gz": lambda: gzip.compress(bytes(size)),
        "member.bz2": lambda: bz2.compress(bytes(size)),
        "member.xz": lambda: lzma.compress(bytes(size)),
        "whole": lambda: bytes(size),
        "holes": lambda: b"",
        "zip": lambda: b"",
    }[kind]()
    with tarfile.open(fileobj=stream, mode="w:gz" if kind == "whole" else "w") as tar:
        for name, body in (("a.png", picture.getvalue()), (f"a.{kind}", content)):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            if name == "a.holes":
                member.pax_headers = {
                    "GNU.sparse.size": str(size),
                    "GNU.sparse.map": "0,0",
                    "GNU.sparse.numblocks": "1",
                }
            tar.addfile(member, io.BytesIO(body))
    files = {"x.tar": stream.getvalue()}
    if kind == "zip":
        with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", bytes(size))
        files["y.tar"] = stream.getvalue()
    return files


@pytest.mark.parametrize("kind", ["plain", "member.gz", "member.bz2", "member.xz", "whole", "holes", "zip"])
def test_what_a_tar_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "MAX_GROWTH", 2**20)
    datasets.disable_progress_bars()
    for size, name in ((2**19, "small"), (2**21, "large")):
        (tmp_path / name).mkdir()
        for file, content in bomb(kind, size).items():
            (tmp_path / name / file).write_bytes(content)
    if kind != "zip":
        assert open_source(str(tmp_path / "small")).read(0).size == (4, 3)
    if kind == "plain":
        assert open_source(str(tmp_path / "large")).read(0).size == (4, 3), "as large as it looks"
        return
    monkeypatch.setattr(datasets, "load_dataset_builder", None)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "large"))
    said = f"up to its member 'a.{kind}' x.tar unpacks to more than" if kind != "zip" else "y.tar is a zip file"
    assert f"cannot be read ({said}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["deflated", "gz inside", "bz2"])
def test_the_sizes_in_a_zip_file_are_added_up(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_GROWTH", 2**20)
    small, large = tmp_path / "small.zip", tmp_path / "large.zip"
    for file, size in ((small, 2**19), (large, 2**21)):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2 if way == "bz2" else zipfile.ZIP_DEFLATED) as archive:
            name, content = ("a.gz", gzip.compress(bytes(size))) if way == "gz inside" else ("a.png", bytes(size))
            archive.writestr(name, content)
    said = "up to its member 'a.* large.zip unpacks to more than"
    if way == "bz2":
        said = "its member 'a.png' is not deflated; write large.zip anew"
    else:
        opening.check_archive(small)
    with pytest.raises(ValueError, match=said):
        opening.check_archive(large)


def test_the_size_of_a_file_that_is_compressed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_GROWTH", 2**20)
    for name, size in (("a", 2**19), ("b", 2**21)):
        (tmp_path / f"{name}.png.gz").write_bytes(gzip.compress(bytes(size)))
    opening.check_archive(tmp_path / "a.png.gz")
    with pytest.raises(ValueError, match=r"up to its member 'b.png.gz' b.png.gz unpacks to more than"):
        opening.check_archive(tmp_path / "b.png.gz")


@pytest.mark.parametrize("name", ["address", "owner/name", "loveda:owner/name"])
def test_what_is_downloaded_is_measured_before_it_is_unpacked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an address, and from the Hub, for which `datasets` finds the addresses of the files."""
    real = datasets.load_dataset_builder
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(opening, "MAX_GROWTH", 2**20)
    datasets.disable_progress_bars()
    with Hub() as hub:
        hub.repos["owner/name"] = Repo()
        sizes = {"small.tar": 2**19, "large.tar": 2**21}
        hub.repos["owner/name"].commit("main", {file: bomb("member.gz", size)["x.tar"] for file, size in sizes.items()})
        for file in sizes:
            data = address = f"{hub.url}/datasets/owner/name/resolve/main/{file}"
            found = real("webdataset", data_files={"train": [address]})
            if name != "address":
                data = name
                monkeypatch.setattr(datasets, "load_dataset_builder", lambda _, found=found: found)
            if file == "small.tar":
                assert open_source(data).read(0).size == (4, 3)
                continue
            with pytest.raises(UserError, match=r"up to its member 'a.member.gz' .* unpacks to more than") as caught:
                open_source(data)
            assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    plain = saved({"model": {"a": torch.zeros(2)}}, modern=True)
    with zipfile.ZipFile(io.BytesIO(plain)) as whole, zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for entry in whole.infolist():
            deflated = entry.filename.endswith("data.pkl")  # what follows its end is unpacked, too
            content = whole.read(entry) + bytes(10**7 * deflated)
            archive.writestr(entry.filename, content, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED)
    with pytest.raises(
        UserError, match=r"a.pth cannot be read \(it is compressed inside, as PyTorch never writes it\)"
    ):
        read_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(plain)
    assert read_checkpoint(tmp_path / "a.pth")["model"]["a"].shape == (2,)


def test_a_table_does_not_lead_to_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "private.png")
    Image.new("RGB", (5, 3)).save(tmp_path / "data" / "beside.png")
    paths = [str(tmp_path / "private.png"), "../private.png", "beside.png"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "x.parquet")
    source = open_source(str(tmp_path / "data" / "x.parquet"))
    for index in (0, 1):
        with pytest.raises(BadImage, match="leads out of the folder"):
            source.read(index)
    assert source.read(2).size == (5, 3)


def test_zips_are_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../escaped.png", b"x")
    with pytest.raises(UserError, match="is no image by its name"):
        open_source(str(tmp_path / "x.zip"))
    with pytest.raises(UserError, match="holds no images"):
        open_source(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


# tokens and passwords

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gI3k"
OTHER = "s3cr3t-w0rd-of-a-mirror"  # a token of another form, such as a mirror of the Hub gives
ADDRESS = "https://somebody:pass-w0rd-99@host.example/data.zip"
SECRETS = (TOKEN, OTHER, "pass-w0rd-99")


def everything_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        yield str(path), os.fsencode(path.name)
        if path.is_file():
            yield str(path), path.read_bytes()


@pytest.mark.parametrize("token", [TOKEN, OTHER])
def test_no_job_writes_or_prints_the_token(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.chdir(tmp_path)
    tiny_vit().save_pretrained(tmp_path / "vit")
    data = str(write_labelled(tmp_path / "with 'quotes' <b>\n and lines", 4))
    small = ["--device", "cpu", "--precision", "fp32", "--batch-size", "2", "--steps", "1"]
    views = ["views.num_local=2", "views.global_size=16", "views.local_size=8", "glare.prototypes=8", "rank=2"]
    views += ["glare.head_hidden=8", "glare.head_bottleneck=4", "glare.regions.min_side=1", "glare.regions.max_side=2"]
    few = ["--short-side", "32", "--controls", "3", "--seeds", "1", "--device", "cpu"]
    on = ["--data", data]
    jobs = [
        ["pretrain", "--backbone", "vit", *on, "--output", "runs/a", *small, *views],
        ["finetune", "--model", "runs/a", *on, "--output", "runs/b", "--crop-size", "16", "--head", "linear", *small],
        ["evaluate", "--model", "runs/b", *on, "--device", "cpu", "--json", "runs/b/eval.json"],
        ["push", "--dry-run", "runs/b", "owner/name"],
        ["push", "--dry-run", "runs/a", "owner/name"],
        ["compare", "--base", "vit", "--adapted", "runs/a", *on, "--output", "compared", *few],
        ["predict", "--model", "runs/b", "--output", "pictures", "--device", "cpu", f"{data}/images"],
    ]
    for job in jobs:
        assert cli.main(job) == 0, (job, capfd.readouterr().err)
    out, err = capfd.readouterr()
    assert token not in out + err
    for path, content in everything_in(tmp_path):
        assert token.encode() not in content, path
    card = (tmp_path / "runs" / "b" / "model" / "README.md").read_text()
    page = (tmp_path / "compared" / "report.html").read_text()
    assert "<b>" not in card.partition("---\n\n")[2] and "'quotes' <b>" not in page


MISTAKES = [
    ["pretrain", "--backbone", "vit", "--data", ADDRESS, "--output", "run"],
    ["pretrain", "--backbone", ADDRESS, "--data", "d", "--output", "run"],
    ["pretrain", "--backbone", f"owner/name@{TOKEN}", "--data", "d", "--output", "run"],
    ["pretrain", "--backbone", "b", "--data", "d", "--output", TOKEN],
    ["pretrain", "--backbone", "b", "--data", "d", "--output", "run", f"steps={TOKEN}"],
    ["pretrain", "--backbone", "b", "--data", "d", "--output", "run", f"--{TOKEN}", "1"],
    ["pretrain", "--backbone", "b", "--data", "d", "--output", "run", TOKEN],
    ["pretrain", "--backbone", "b", "--data", OTHER, "--output", "run"],
    ["finetune", "--model", ADDRESS, "--data", "d", "--output", "run"],
    ["finetune", "--model", "m", "--data", ADDRESS, "--output", "run"],
    ["evaluate", "--model", f"https://x.example/m?token={TOKEN}", "--data", "d"],
    ["predict", "--model", "m", "--output", "run", ADDRESS],
    ["push", "--dry-run", "run", "owner/name", "--data-name", ADDRESS],
    ["push", "run", f"owner/{TOKEN}/x"],
    ["compare", "--base", "b", "--adapted", ADDRESS, "--data", "d", "--output", "run"],
    ["convert", "--source", "dino", ADDRESS, "run"],
    [TOKEN],
    ["pretrain", "--recipe", "secret.yaml", "--output", "run"],
]


@pytest.mark.parametrize("argv", MISTAKES, ids=lambda argv: " ".join(argv)[:40])
def test_no_message_repeats_a_secret(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.yaml").write_text(f"backbone: b\ndata: {ADDRESS}\n")
    assert cli.main(argv) in (1, 2)
    out, err = capfd.readouterr()
    assert err.startswith("glare") and err.count("\n") == 1
    assert not any(secret in out + err for secret in SECRETS)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.yaml"]


def test_what_is_hidden_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER)
    for secret in (
        TOKEN,
        OTHER,
        ADDRESS,
        "http://key@host/x",
        f"s3://b/x?X-Amz-Signature={'a' * 20}&b=1",
        "https://account.blob.example/x.parquet?sv=1&sig=pass-w0rd-99",
        "https://host/x?key=pass-w0rd-99",
        "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJ_cmVhZC-pass-w0rd-99",
        "https://host/x?passwd=pass-w0rd-99",
        f"x={TOKEN}",
    ):
        assert HIDDEN in redacted(secret)
        assert not any(hidden in redacted(secret) for hidden in SECRETS)
    for text in (
        "hf_home",
        "org/model@main",
        "https://huggingface.co/a/b",
        "a?token",
        "https://host/x?design=1&monkey=2&size=3",
        "me@host.example",
        "landcover:arid",
    ):
        assert redacted(text) == text
    assert str(UserError(f"data {ADDRESS!r} is nothing")) == f"data 'https://{HIDDEN}@host.example/data.zip' is nothing"


def test_safetensors_are_the_only_weights_written(tmp_path: Path) -> None:
    segmenter(tiny_vit()).save_pretrained(tmp_path / "model")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
