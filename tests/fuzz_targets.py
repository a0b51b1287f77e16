"""What the fuzz reads: each kind of file that the package takes from others, valid ones of it, and its reader."""

import hashlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import adapted_model, segmenter, tiny_vit

from glare import licences, recipes, region_attention
from glare.backbones import load_backbone, read_normalisation
from glare.comparison_data import groups_of, open_pool
from glare.comparison_models import recipe_of
from glare.comparison_recipe import CompareRecipe
from glare.curves import read_curves
from glare.data.geotiff import is_installed
from glare.data.labelled import open_labelled
from glare.data.listing import EXTENSIONS
from glare.data.raster_windows import RasterReading
from glare.data.sources import open_source
from glare.finetune import FinetuneRecipe
from glare.foreign_weights import read_checkpoint, state_dict_in
from glare.inference import load_segmenter
from glare.lineage import stages_of
from glare.model_card import Said, card, facts_of
from glare.objectives.glare import CrossAttention
from glare.pretrain import PretrainRecipe
from glare.price import price
from glare.publication import find
from glare.run_folder import RunFolder
from glare.segmenters import image_processor, load_pretrained
from glare.views import Normalisation
from glare.yaml_files import flatten

KINDS = {
    "jpg": "jpeg", "jpeg": "jpeg", "png": "png", "bmp": "bmp", "gif": "gif", "webp": "webp",
    "tif": "tiff", "tiff": "tiff", "ppm": "ppm", "pgm": "ppm", "jp2": "jpeg2000",
}  # fmt: skip
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F")


@dataclass(frozen=True)
class Target:
    """``read`` reads the file ``name`` in a folder that holds, besides it, the files of ``folder``.

    ``seeds`` are contents of the file that are read without complaint.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[Path], object]
    folder: dict[str, bytes] = field(default_factory=dict)


def targets() -> dict[str, Target]:
    """All targets by name."""
    with tempfile.TemporaryDirectory() as scratch:
        return {
            **_images(),
            **_geotiffs(),
            **_labelled(),
            **_texts(),
            **_models(Path(scratch)),
            **_weights(Path(scratch)),
        }


def encoded(kind: str, *, seed: int = 0) -> list[bytes]:
    """Small pictures in every mode that the format has, also compressed and interlaced ones, and ones with Exif."""
    noise = np.random.default_rng(seed).integers(0, 256, (13, 17, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options: list[dict[str, Any]] = [{}, {"exif": exif.tobytes()}, {"compression": "tiff_lzw"}, {"progressive": True}]
    found = []
    for mode in MODES:
        if mode == "I;16":
            image = Image.fromarray(noise[..., 0].astype(np.uint16) * 250)
        else:
            image = Image.fromarray(noise).convert("L" if mode in "IF" else "RGB").convert(mode)
        for given in options:
            stream = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow advises against some of these modes
                    image.save(stream, kind, **given)
            except (OSError, ValueError, KeyError):
                continue
            found.append(stream.getvalue())
    return sorted(set(found))


def _images() -> dict[str, Target]:
    def read(folder: Path) -> None:
        source = open_source(str(folder))
        source.read(0)
        source.read(0, short_side=4)

    return {f"image.{name}": Target(f"a.{name}", encoded(KINDS[name]), read) for name in EXTENSIONS}


def _geotiffs() -> dict[str, Target]:
    """Many bands, in tiles or strips, with nodata; none without the extra that reads them."""
    if not is_installed():
        return {}
    import rasterio

    found = []
    kinds: list[dict[str, Any]] = [
        {"dtype": "uint16", "nodata": 0, "tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"},
        {"dtype": "uint8", "compress": "lzw", "blockysize": 3},
        {"dtype": "float32", "interleave": "band", "nodata": float("nan")},
        {"dtype": "int16", "BIGTIFF": "YES", "predictor": 2, "compress": "zstd"},
    ]
    for kind in kinds:
        values = np.random.default_rng(2).integers(0, 100, (5, 33, 47)).astype(kind["dtype"])
        size = {"count": 5, "height": 33, "width": 47, "transform": rasterio.Affine(2, 0, 1, 0, -2, 1)}
        with rasterio.MemoryFile() as memory:
            with memory.open(driver="GTiff", **size, **kind) as raster:
                raster.write(values)
            found.append(memory.read())

    def read(folder: Path) -> None:
        source = open_source(str(folder), raster=RasterReading(tile=20))
        for index in range(min(3, len(source))):
            source.read(index)

    return {"GeoTIFF": Target("a.tif", found, read)}


def _labelled() -> dict[str, Target]:
    picture = io.BytesIO()
    Image.new("RGB", (17, 13)).save(picture, "png")
    classes = json.dumps({"classes": ["a", "b"], "ignore_index": 255, "palette": [[0, 0, 0], [9, 9, 9]]}).encode()
    labels = []
    for mode in ("L", "P", "1", "I;16"):
        stream = io.BytesIO()
        values = np.random.default_rng(1).integers(0, 2, (13, 17))
        indices = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
        (indices if mode == "I;16" else indices.convert(mode)).save(stream, "png", bits=1 if mode == "L" else 8)
        labels.append(stream.getvalue())
    files = {"images/a.png": picture.getvalue(), "labels/a.png": labels[0], "classes.json": classes}
    table = b"file_name,tile\na.png,1\nb.png,2\n"
    return {
        "label": Target("labels/a.png", labels, lambda folder: open_labelled(str(folder)).read(0), files),
        "classes.json": Target("classes.json", [classes], lambda folder: open_labelled(str(folder)), files),
        "metadata.csv": Target(
            "metadata.csv",
            [table, b'"file_name","tile"\r\n"a.png","x, y"\r\n'],
            lambda folder: groups_of(open_pool(str(folder), match=None), "tile", data=str(folder)),
            files,
        ),
    }


def _texts() -> dict[str, Target]:
    pretrain = PretrainRecipe(backbone="b", data="d", output=Path("o"))
    finetune = FinetuneRecipe(model="m", data="d", output=Path("o"))
    log = b"".join(json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3}).encode() + b"\n" for step in (1, 2, 3))
    metrics = json.dumps({"parameters_trained": 10, "seconds": 1.5, "peak_memory_bytes": 10**9, "device": "cpu"})
    state = json.dumps({"step": 3, "metrics_bytes": 0, "state": {"seed": 1}}).encode()
    tensors = {"checkpoints/step_000003/state.safetensors": _safetensors({"a": torch.zeros(2)})}
    readme = b"---\nlicense: cc-by-4.0\nlicense_name: x\ntags:\n- a\n- b\n---\n\n# Title\n"

    def job(name: str, recipe: Any) -> Target:
        def read(folder: Path) -> object:
            return recipes.from_dict(type(recipe), recipes.read_yaml(folder / name, type(recipe)))

        return Target(name, [recipes.to_yaml(recipe).encode()], read)

    def checkpoint(folder: Path) -> object:
        files = [folder / "checkpoints" / "step_000003" / name for name in ("state.safetensors", "state.json")]
        sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
        (files[0].parent / "SHA256SUMS").write_text("".join(sums))
        return RunFolder(folder, write=False).latest_checkpoint()

    def lineage(folder: Path) -> None:
        stages_of(folder)
        flatten(recipe_of(str(folder)) or {})

    return {
        "recipe of pretrain": job("recipe.yaml", pretrain),
        "recipe of finetune": job("job.yaml", finetune),
        "recipe of compare": job("compare.yaml", CompareRecipe(base="b", adapted=("a",), data="d", output=Path("o"))),
        "recipe.yaml of a run": Target(
            "recipe.yaml", [recipes.to_yaml(pretrain).encode(), recipes.to_yaml(finetune).encode()], lineage
        ),
        "metrics.jsonl": Target("metrics.jsonl", [log], lambda folder: read_curves(folder / "metrics.jsonl")),
        "price.json": Target(
            "price.json", [metrics.encode()], lambda folder: price(folder, overhead=None), {"recipe.yaml": b"seed: 1"}
        ),
        "state.json": Target(
            "checkpoints/step_000003/state.json",
            [state],
            checkpoint,
            tensors,
        ),
        "README.md": Target("README.md", [readme], lambda folder: licences.front_matter(folder / "README.md")),
    }


def _safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "x.safetensors", metadata={"format": "pt"})
        return (Path(folder) / "x.safetensors").read_bytes()


def _models(scratch: Path) -> dict[str, Target]:
    vit = tiny_vit("vit", num_hidden_layers=1)
    vit.save_pretrained(scratch / "vit")
    segmenter(tiny_vit("dinov2", num_hidden_layers=2)).save_pretrained(scratch / "segmenter")
    image_processor(Normalisation(), size=64, patch=4).save_pretrained(scratch / "segmenter")
    adapted_model(vit, "lora").save_adapter(scratch / "adapter", base_model="../base")
    base, segment, adapter = (_files(scratch / name) for name in ("vit", "segmenter", "adapter"))
    run = {f"model/{name}": content for name, content in segment.items()}
    run["recipe.yaml"] = recipes.to_yaml(FinetuneRecipe(model="org/vit", data="data/set", output=Path("o"))).encode()
    scores = {"miou": 0.5, "aacc": 0.6, "macc": None, "iou": {"0": 0.5, "1": None}}
    evaluation = json.dumps({**scores, "num_images": 3, "data": "data/set", "split": "val", "match": None, "seed": 1})
    compared = {"base": "vit", "data": [{"data": "data/set"}], "models": [{"path": "runs/a", "name": "a"}]}

    def adapted(folder: Path) -> object:
        config = (folder / "adapter_config.json").read_bytes()
        place = json.dumps(str(folder / "base"))[1:-1].encode()
        (folder / "adapter_config.json").write_bytes(config.replace(b"../base", place))
        return load_pretrained(str(folder))

    def carded(folder: Path) -> object:
        comparison = folder / "compare"
        return card(facts_of(find(folder), Said(comparison=comparison if comparison.exists() else None)))

    return {
        "config.json of a ViT": Target(
            "config.json", [base["config.json"]], lambda folder: load_backbone(str(folder)), base
        ),
        "config.json of a segmenter": Target(
            "config.json", [segment["config.json"]], lambda folder: load_segmenter(str(folder), device=CPU), segment
        ),
        "preprocessor_config.json": Target(
            "preprocessor_config.json",
            [segment["preprocessor_config.json"]],
            lambda folder: read_normalisation(str(folder)),
            segment,
        ),
        "adapter_config.json": Target(
            "adapter_config.json",
            [adapter["adapter_config.json"]],
            adapted,
            adapter | {f"base/{name}": content for name, content in base.items()},
        ),
        "eval.json": Target("eval.json", [evaluation.encode()], carded, run),
        "config.json of a card": Target("model/config.json", [segment["config.json"]], carded, run),
        "compare.json": Target(
            "compare/compare.json",
            [json.dumps(compared).encode()],
            carded,
            run | {"compare/compare.md": b"# It helps\n"},
        ),
        "model.safetensors": Target(
            "model.safetensors", [base["model.safetensors"]], lambda folder: load_backbone(str(folder)), base
        ),
    }


def _weights(scratch: Path) -> dict[str, Target]:
    state = {"model": {"cls_token": torch.zeros(1, 1, 8), "norm.weight": torch.ones(8)}, "epoch": 3}
    files = []
    for modern in (True, False):
        torch.save(state, scratch / "a.pth", _use_new_zipfile_serialization=modern)
        files.append((scratch / "a.pth").read_bytes())
    attention = CrossAttention(8, 1)

    def foreign(folder: Path) -> object:
        return state_dict_in(read_checkpoint(folder / "a.pth"), role=None)

    def region(folder: Path) -> object:
        return region_attention.start(attention, str(folder))

    return {
        "checkpoint.pth": Target("a.pth", files, foreign),
        region_attention.FILE: Target(
            region_attention.FILE, [_safetensors(attention.state_dict())], region, {"config.json": b"{}"}
        ),
    }


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".py"}


CPU = torch.device("cpu")
