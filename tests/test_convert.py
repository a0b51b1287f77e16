"""`glare convert`: every layout gives the features of its own forward pass, and nothing unknown slips through."""

import argparse
import logging as standard_logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image
from reference import foreign_vits as foreign
from reference.foreign_vits import DEPTH, GRID, SIZE, WIDTH, State, class_token, under, vit
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from glare import cli, pretrain, region_attention
from glare.backbones import load_backbone
from glare.convert import ConvertRecipe, run
from glare.errors import UserError
from glare.objectives.glare import CrossAttention

REAL = Path(__file__).parents[1] / ".." / "shared" / "weights" / "vits16-dino-layout"
ROOT = Path(__file__).parents[1]
Forward = Callable[[State, torch.Tensor], torch.Tensor]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def registers(count: int, name: str = "register_tokens") -> dict[str, tuple[int, ...]]:
    return {name: (1, count, WIDTH)}


def chunked(state: State) -> State:
    """Blocks as DINOv2's training files number them: by chunk, and through all chunks."""
    return {
        f"blocks.{int(name.split('.')[1])}.{name.removeprefix('blocks.')}" if name.startswith("blocks.") else name: x
        for name, x in state.items()
    }


ONE, UDI, FLSL = vit(class_token(), positions=1), vit(class_token(2), positions=2), vit(class_token(), positions=0)
MASK = {"mask_token": (1, WIDTH)}
DINOV2 = vit(class_token() | MASK, positions=1, layer_scale=True)
REGISTERS = vit(class_token() | MASK | registers(4), positions=1, layer_scale=True)
OTHER = vit(class_token(), positions=1, seed=9)
LAYOUTS: dict[str, tuple[str, Any, State, Forward, str]] = {
    "dino": ("dino", ONE, ONE, foreign.dino, "ViTModel"),
    "dino-full": (
        "dino",
        {
            "student": under("module.backbone.", OTHER) | under("module.", foreign.head()),
            "teacher": under("backbone.", ONE) | foreign.head(),
            "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", lr=np.float64(0.1)),
            "dino_loss": {"center": torch.zeros(1, 16)},
        },
        ONE,
        foreign.dino,
        "ViTModel",
    ),
    "ibot-student": (
        "ibot",
        {"student": under("module.backbone.", ONE | {"masked_embed": torch.zeros(1, WIDTH)}), "epoch": 3},
        ONE,
        foreign.dino,
        "ViTModel",
    ),
    "ibot-backbone": ("ibot", {"state_dict": ONE}, ONE, foreign.dino, "ViTModel"),
    "udi": (
        "udi",
        {
            "teacher": under("backbone.backbone.", UDI)
            | under("backbone.", foreign.udi_attention())
            | foreign.head(copies=3)
        },
        UDI,
        foreign.dino,
        "DeiTModel",
    ),
    "udi-ddp": (
        "udi",
        under("module.backbone.backbone.", UDI) | under("module.backbone.", foreign.udi_attention()),
        UDI,
        foreign.dino,
        "DeiTModel",
    ),
    "udi-mixed": ("udi", under("backbone.", UDI) | foreign.udi_attention(), UDI, foreign.dino, "DeiTModel"),
    "udi-stripped": ("udi", UDI | foreign.udi_attention(), UDI, foreign.dino, "DeiTModel"),
    "udi-one-token": ("udi", ONE, ONE, foreign.dino, "ViTModel"),
    "udi-no-token": ("udi", *[vit({}, positions=0)] * 2, foreign.flsl, "IJepaModel"),
    "flsl": ("flsl", {"teacher": under("backbone.", FLSL) | foreign.head()}, FLSL, foreign.flsl, "IJepaModel"),
    "dinov2": ("dinov2", DINOV2, DINOV2, foreign.dinov2, "Dinov2Model"),
    "dinov2-training": (
        "dinov2",
        {
            "model": under("student.backbone.", OTHER)
            | under("teacher.backbone.", chunked(DINOV2))
            | under("teacher.dino_", foreign.head())
            | {"dino_loss.center": torch.zeros(1, 16)},
            "iteration": 7,
        },
        DINOV2,
        foreign.dinov2,
        "Dinov2Model",
    ),
    "dinov2-registers": ("dinov2", REGISTERS, REGISTERS, foreign.dinov2, "Dinov2WithRegistersModel"),
    "dinov2-giant": (
        "dinov2",
        *[vit(class_token(), positions=1, layer_scale=True, mlp="dinov2-swiglu")] * 2,
        foreign.dinov2,
        "Dinov2Model",
    ),
    "timm": (
        "timm",
        ONE | {"head.weight": torch.zeros(5, WIDTH), "head.bias": torch.zeros(5)},
        ONE,
        foreign.timm,
        "ViTModel",
    ),
    "timm-register": (
        "timm",
        *[vit(class_token() | registers(1, "reg_token"), positions=2)] * 2,
        foreign.timm,
        "DeiTModel",
    ),
    "timm-distilled": (
        "timm",
        *[vit(class_token() | registers(1, "dist_token"), positions=2)] * 2,
        foreign.timm,
        "DeiTModel",
    ),
    "timm-no-embed-class": ("timm", *[vit(class_token(), positions=0)] * 2, foreign.timm, "ViTModel"),
    "timm-no-class": ("timm", *[vit({}, positions=0)] * 2, foreign.timm, "IJepaModel"),
    "timm-registers-with-positions": (
        "timm",
        *[vit(class_token() | registers(3, "reg_token"), positions=4)] * 2,
        foreign.timm,
        "Dinov2WithRegistersModel",
    ),
    "timm-dinov2-registers": (
        "timm",
        *[vit(class_token() | registers(4, "reg_token"), positions=0, layer_scale=True)] * 2,
        foreign.timm,
        "Dinov2WithRegistersModel",
    ),
    "timm-dinov2-giant": (
        "timm",
        *[vit(class_token(), positions=1, layer_scale=True, mlp="timm-swiglu")] * 2,
        foreign.timm,
        "Dinov2Model",
    ),
}


def convert(folder: Path, content: Any, source: str, **options: Any) -> Path:
    """Save as a ``.pth`` file and convert it."""
    torch.save(content, folder / "checkpoint.pth")
    return run(ConvertRecipe(source=source, paths=(folder / "checkpoint.pth", folder / "vit"), **options))


def features(folder: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_backbone(str(folder))(images).last_hidden_state


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_features_are_those_of_its_own_forward_pass(
    name: str, tmp_path: Path, images: torch.Tensor, log: pytest.LogCaptureFixture
) -> None:
    source, content, state, forward, class_name = LAYOUTS[name]
    folder = convert(tmp_path, content, source)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == class_name
    assert all("pooler" in key for key in info["missing_keys"])
    torch.testing.assert_close(features(folder, images), forward(state, images), atol=1e-5, rtol=1e-5)
    region = [region_attention.FILE] * (source == "udi" and class_name == "DeiTModel")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        *region,
    ]
    assert not [record for record in log.records if record.levelno >= standard_logging.ERROR]


def test_the_student_on_request(tmp_path: Path, images: torch.Tensor) -> None:
    folder = convert(tmp_path, LAYOUTS["dino-full"][1], "dino", weights="student")
    torch.testing.assert_close(features(folder, images), foreign.dino(OTHER, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("content", [ONE, {"teacher": under("backbone.", ONE)}])
def test_a_student_that_is_not_there(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"leave --weights student out|also not under student"):
        convert(tmp_path, content, "dino", weights="student")


def test_the_teacher_of_a_table_that_holds_both(tmp_path: Path, images: torch.Tensor) -> None:
    both = under("teacher.backbone.", ONE) | under("student.backbone.", OTHER) | under("student.", foreign.head())
    save_file(both, tmp_path / "model.safetensors")
    for role, state in (("teacher", ONE), ("student", OTHER)):
        folder = run(ConvertRecipe(source="dino", paths=(tmp_path, tmp_path / role), weights=role))
        torch.testing.assert_close(features(folder, images), foreign.dino(state, images), atol=1e-5, rtol=1e-5)


def test_heads_and_dtype(tmp_path: Path, images: torch.Tensor) -> None:
    half = {name: tensor.half() for name, tensor in ONE.items()}
    folder = convert(tmp_path, half, "dino", num_heads=4)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert AutoModel.from_pretrained(folder, add_pooling_layer=False).dtype == torch.float16
    expected = foreign.dino({name: tensor.float() for name, tensor in half.items()}, images, heads=4)
    torch.testing.assert_close(features(folder, images), expected, atol=1e-5, rtol=1e-5)


def test_the_image_processor_loads_without_a_warning(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    folder = convert(tmp_path, ONE, "dino")
    log.clear()
    processor = AutoImageProcessor.from_pretrained(folder)
    assert not [record for record in log.records if record.levelno >= standard_logging.WARNING]
    picture = Image.fromarray(np.full((30, 30, 3), 255, np.uint8))
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, SIZE, SIZE)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels.amax(dim=(0, 2, 3)), white)


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


QKV = "blocks.1.attn.qkv.weight"
BAD: dict[str, tuple[str, Any, str]] = {
    "missing": ("dino", without(ONE, QKV, "norm.bias"), rf"missing: norm\.bias, {QKV}|missing: {QKV}, norm\.bias"),
    "missing-anchor": ("dino", under("backbone.", without(ONE, "pos_embed")), r"missing: backbone\.pos_embed"),
    "missing-block": (
        "dino",
        {name: x for name, x in ONE.items() if "blocks.0" not in name},
        r"missing: blocks\.0\.mlp\.fc2\.weight",
    ),
    "unknown": ("dino", ONE | {"gate.weight": torch.zeros(3)}, r"unknown: gate\.weight"),
    "unknown-token": ("dino", vit(class_token() | registers(1, "reg_token"), positions=2), "unknown: reg_token"),
    "many": ("dino", ONE | {f"gate{i:02}": torch.zeros(1) for i in range(25)}, r"gate00, .*gate09 and 15 more\)"),
    "another-source": ("dino", DINOV2, r"unknown: mask_token, blocks\.0\.ls1\.gamma"),
    "giant-by-another-name": (
        "dino",
        vit(class_token(), positions=1, layer_scale=True, mlp="dinov2-swiglu"),
        r"missing: blocks\.0\.mlp\.fc2\.weight",
    ),
    "no-class-token": ("dino", without(ONE, "cls_token"), r"with 0 tokens before them \(no cls_token\)"),
    "a-scalar": ("timm", ONE | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, r"mlp\.fc1\.weight is \(\), expected"),
    "region-attention-elsewhere": ("dino", UDI | foreign.udi_attention(), r"unknown: attn\.qkv\.weight"),
    "half-a-region-attention": (
        "udi",
        UDI | without(foreign.udi_attention(), "attn.proj.bias"),
        r"missing: the region attention's proj\.bias",
    ),
    "shape": (
        "dino",
        ONE | {QKV: torch.zeros(3 * WIDTH, 7)},
        rf"of another shape: {QKV} is \(384, 7\), expected \(384, 128\)",
    ),
    "dimensions": ("dino", ONE | {"pos_embed": torch.zeros(17, WIDTH)}, r"pos_embed is \(17, 128\), expected 3 dim"),
    "not-square": (
        "dino",
        ONE | {"pos_embed": torch.zeros(1, 1 + 15, WIDTH)},
        "pos_embed holds 16 positions, which is no square grid of patches with 1 tokens",
    ),
    "flsl-by-another-name": ("dino", FLSL, "16 positions, which is no square grid"),
    "not-rgb": ("dino", ONE | {"patch_embed.proj.weight": torch.zeros(WIDTH, 13, 4, 4)}, "13 channels"),
    "two-numberings": (
        "dinov2",
        DINOV2 | {"blocks.0.1.norm1.bias": torch.zeros(WIDTH)},
        r"unknown: blocks\.0\.1\.norm1\.bias",
    ),
    "sparse": ("dino", ONE | {QKV: torch.zeros(3 * WIDTH, WIDTH).to_sparse()}, rf"unknown: {QKV}"),
    "spread": ("dino", ONE | {QKV: torch.zeros(1).expand(10**9, WIDTH)}, rf"unknown: {QKV}"),
    "nowhere": ("dino", ONE | {QKV: torch.empty(3 * WIDTH, WIDTH, device="meta")}, rf"unknown: {QKV}"),
    "quantised": ("dino", ONE | {QKV: torch.zeros(3 * WIDTH, WIDTH, dtype=torch.int8)}, rf"unknown: {QKV}"),
    "two-vits": ("dino", under("a.", ONE) | under("b.", OTHER), r"several ViTs, under a\., b\."),
    "no-vit": ("dino", {"conv1.weight": torch.zeros(3)}, r"no ViT, .* it holds: conv1\.weight"),
    "transformers": (
        "dino",
        {"embeddings.patch_embeddings.projection.weight": torch.zeros(3)},
        "layout of transformers already",
    ),
    "no-table": ("dino", {"epoch": 3, "optimizer": {}}, "no table of tensors.*it holds: epoch, optimizer"),
    "a-list": ("dino", [torch.zeros(3)], "no table of tensors.*a list"),
    "no-such-model": ("timm", vit({}, positions=0, layer_scale=True), "no class token; transformers has no model"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_one_sentence_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    source, content, message = BAD[name]
    with pytest.raises(UserError, match=message):
        convert(tmp_path, content, source)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("width", "num_heads", "message"), [(96, None, "say how many heads"), (128, 3, "has to divide")]
)
def test_heads_that_cannot_be(
    width: int, num_heads: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "WIDTH", width)
    with pytest.raises(UserError, match=message):
        convert(tmp_path, vit({"cls_token": (1, 1, width)}, positions=1), "dino", num_heads=num_heads)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "before-1.6"])
def test_code_in_a_file_is_never_run(modern: bool, tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"model": ONE, "args": Evil(trace)}, file, _use_new_zipfile_serialization=modern)
    with pytest.raises(UserError, match=r"objects besides tensors and plain values \(posix\.mkdir\)"):
        run(ConvertRecipe(source="dino", paths=(file, tmp_path / "vit")))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    torch.load(file, weights_only=False)  # it would have been
    assert trace.is_dir()


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "before-1.6"])
def test_old_and_new_files_with_arguments(modern: bool, tmp_path: Path, images: torch.Tensor) -> None:
    file = tmp_path / "old.pth"
    arguments = argparse.Namespace(lr=np.float32(0.1), epochs=np.int64(3), flag=np.bool_(True))
    torch.save({"teacher": ONE, "args": arguments}, file, _use_new_zipfile_serialization=modern)
    folder = run(ConvertRecipe(source="dino", paths=(file, tmp_path / "vit")))
    torch.testing.assert_close(features(folder, images), foreign.dino(ONE, images), atol=1e-5, rtol=1e-5)


def test_numpy_scalars_of_before_numpy_2(tmp_path: Path) -> None:
    torch.save({"model": ONE, "best": np.float64(0.7)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "a.pth").read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\n" in old
    (tmp_path / "a.pth").write_bytes(old)
    assert run(ConvertRecipe(source="dino", paths=(tmp_path / "a.pth", tmp_path / "vit"))).is_dir()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"damaged{suffix}"
    if suffix == ".safetensors":
        save_file(ONE, file)
    else:
        torch.save(ONE, file, _use_new_zipfile_serialization=suffix == ".pth")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cannot be read|damaged"):
        run(ConvertRecipe(source="dino", paths=(file, tmp_path / "vit")))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
def test_files_that_are_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth (cannot be read|is no PyTorch checkpoint)|no table of tensors"):
        run(ConvertRecipe(source="dino", paths=(tmp_path / "a.pth", tmp_path / "vit")))


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    paths = (tmp_path / "in", tmp_path / "vit")
    with pytest.raises(UserError, match="does not exist"):
        run(ConvertRecipe(source="dino", paths=paths))
    paths[0].mkdir()
    with pytest.raises(UserError, match=r"holds no checkpoint \(\.safetensors, "):
        run(ConvertRecipe(source="dino", paths=paths))
    torch.save(ONE, paths[0] / "a.pth")
    torch.save(ONE, paths[0] / "b.pth")
    with pytest.raises(UserError, match=r"holds a\.pth, b\.pth; give one"):
        run(ConvertRecipe(source="dino", paths=paths))
    save_file(ONE, paths[0] / "model.safetensors")
    assert run(ConvertRecipe(source="dino", paths=paths)).is_dir()


def test_outputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="is in use; give a new or empty one"):
        run(ConvertRecipe(source="dino", paths=(tmp_path / "a.pth", tmp_path / "used")))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is the current folder"):
        run(ConvertRecipe(source="dino", paths=(tmp_path / "a.pth", Path())))
    for count in (1, 3):
        with pytest.raises(ValueError, match="give two paths, CHECKPOINT OUTPUT_DIR"):
            ConvertRecipe(source="dino", paths=(tmp_path,) * count)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glare.convert.save_file", full)
    with pytest.raises(UserError, match=r"there is no room for .* \(No space left on device\); what was there"):
        convert(tmp_path, ONE, "dino")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_the_region_attention_computes_what_udi_computes(tmp_path: Path) -> None:
    state = foreign.udi_attention()
    folder = convert(tmp_path, UDI | state, "udi")
    attention = CrossAttention(WIDTH, 2)
    said = region_attention.start(attention, str(folder))
    assert said is not None and "starts from the backbone's own region attention" in said
    rows = torch.randn(2, GRID**2, WIDTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(attention(rows, rows), foreign.region_attention(state, rows), atol=1e-5, rtol=1e-5)


def test_a_region_attention_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    folder = convert(tmp_path, UDI | foreign.udi_attention(), "udi")
    narrow = CrossAttention(64, 1)
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    said = region_attention.start(narrow, str(folder))
    assert said is not None and "starts at random" in said and "norm1.weight is (128,) there and (64,) here" in said
    (folder / region_attention.FILE).write_bytes(b"damaged")
    said = region_attention.start(narrow, str(folder))
    assert said is not None and "cannot be read" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())


@pytest.mark.parametrize("name", ["udi", "flsl"])
def test_it_can_be_adapted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, content, *_ = LAYOUTS[name]
    folder, photos = convert(tmp_path, content, source), tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (30, 41, 3), dtype=np.uint8)).save(photos / f"{number}.png")
    given = {
        "backbone": str(folder),
        "data": str(photos),
        "output": tmp_path / "run",
        "steps": 2,
        "batch_size": 2,
        "rank": 4,
        "report_to": "none",
        "device": "cpu",
        "precision": "fp32",
        "views": {"num_local": 2, "global_size": 16, "local_size": 8},
        "glare": {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "regions": {"min_side": 1, "max_side": 2}},
    }
    output = pretrain.run(given)
    assert ("starts from the backbone's own region attention" in capsys.readouterr().out) == (name == "udi")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 1 and all("null" not in line for line in lines)
    adapted = AutoModel.from_pretrained(output / "model")
    assert type(adapted.backbone).__name__ == LAYOUTS[name][-1]


def test_a_mistake_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": ONE, "args": Evil(tmp_path / "trace")}, tmp_path / "evil.pth")
    assert cli.main(["convert", "--source", "dino", str(tmp_path / "evil.pth"), str(tmp_path / "vit")]) == 2
    assert capsys.readouterr().err.startswith("glare convert: error: ")
    assert cli.main(["convert", "--source", "dino", str(tmp_path / "evil.pth")]) == 2
    assert capsys.readouterr().err == ("glare convert: error: give two paths, CHECKPOINT OUTPUT_DIR; there are 1\n")


def test_in_a_process_of_its_own(tmp_path: Path, forks: Forks) -> None:
    torch.save(LAYOUTS["udi"][1], tmp_path / "udi.pth")
    done = forks.run("convert", "--source", "udi", "udi.pth", "vit", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third, fourth = done.stdout.splitlines()
    assert first == "udi.pth (teacher) -> vit"
    assert second.startswith("DeiTModel: ") and f"{DEPTH} blocks x {WIDTH}, 2 heads, patches of 4 px" in second
    assert third.startswith("38 keys of the file used, 24 left out (head.0.last_layer.weight_g, ")
    assert "region_attention.safetensors" in fourth
    assert (tmp_path / "vit" / "config.json").is_file()


@pytest.mark.skipif(not REAL.is_dir(), reason="the weights vits16-dino-layout are not beside the repository")
def test_real_weights_in_the_layout_of_dino(tmp_path: Path) -> None:
    folder = run(ConvertRecipe(source="dino", paths=(REAL, tmp_path / "vit")))
    state = {name: tensor.float() for name, tensor in load_file(REAL / "model.safetensors").items()}
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features(folder, images), foreign.dino(state, images, heads=6), atol=1e-4, rtol=1e-4)
