"""What of a folder is published: exactly the files that a stranger needs, without a trace of this machine."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSemanticSegmentation

from glare.errors import UserError, first_line
from glare.json_files import read_json
from glare.model_names import Place, check_one_run
from glare.run_folder import run_folder_of
from glare.weight_files import check_index

CODE = ("configuration_glare.py", "modeling_glare.py", "segmentation_heads.py", "uniadapter.py")
MODEL_FILES = ("config.json", "preprocessor_config.json", *CODE)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
UNSAFE = ("*.pth", "*.pt", "*.bin", "*.pkl", "*.pickle", "*.ckpt")
PICTURE_BYTES = 1_000_000  # of a picture of the report that goes along
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
PLACES = ("_name_or_path", "base_model_name_or_path")
"""Keys of configurations that say where a model came from."""

EXPECTED = "give the folder of a finished glare pretrain or glare finetune run, its model folder or its adapter folder"


@dataclass(frozen=True)
class Publication:
    """What a folder offers: a model, its adapters, or both; ``run`` is the run folder it lies in, if any.

    ``kind``: "backbone", "segmenter", "upernet" or, without a model, "adapter".
    """

    folder: Path
    kind: str
    model: Path | None
    adapter: Path | None
    run: Path | None

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration of the model, or of the adapter where there is no model."""
        return read_json((self.model / "config.json") if self.model else self._adapter_config)

    @cached_property
    def adapter_config(self) -> dict[str, Any] | None:
        """PEFT configuration of the adapters, None without any."""
        if self.adapter is not None:
            return read_json(self._adapter_config)
        found: dict[str, Any] | None = glare_config(self.config).get("adapter_config")
        return found

    @property
    def _adapter_config(self) -> Path:
        assert self.adapter is not None
        return self.adapter / "adapter_config.json"

    @property
    def card(self) -> Path:
        """Where the README.md belongs on this machine."""
        return (self.model or self.folder) / "README.md"


def glare_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the GLARE model in a model's, which UperNet holds as its backbone's."""
    inner = config.get("backbone_config") if config.get("model_type") == "upernet" else config
    return inner if isinstance(inner, Mapping) else {}


def find(folder: Path) -> Publication:
    """What ``folder`` offers. Raises UserError where that is nothing this package has made."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; {EXPECTED}")
    run = run_folder_of(str(folder))
    if (folder / "model" / "config.json").is_file():
        adapter = folder / "adapter"
        found = adapter if (adapter / "adapter_config.json").is_file() else None
        return Publication(folder, _kind(folder / "model"), folder / "model", found, run)
    if (folder / "config.json").is_file():
        return Publication(folder, _kind(folder), folder, None, run)
    if (folder / "adapter_config.json").is_file():
        return Publication(folder, "adapter", None, folder, run)
    check_one_run(folder)
    if run is not None:
        raise UserError(f"the run in {folder} has no model yet; let it finish with --resume, then push it")
    raise UserError(f"{folder} holds neither config.json nor adapter_config.json; {EXPECTED}")


def _kind(model: Path) -> str:
    config = read_json(model / "config.json")
    model_type, named = config.get("model_type"), config.get("architectures")
    built = str(named[0]) if isinstance(named, list) and named else ""
    if model_type == "glare":
        return "segmenter" if "Segmentation" in built else "backbone"
    if model_type == "upernet" and glare_config(config).get("model_type") == "glare":
        return "upernet"
    raise UserError(f"{model} holds a model of type {model_type!r}, not one of glare; {EXPECTED}")


def stage(publication: Publication, target: Path, *, card: str, results: Mapping[str, str], base: str | None) -> None:
    """Put exactly what goes up into the empty folder ``target``, weights as links.

    ``results``: path in the repository -> text of evaluation results. ``base``: Hub id of the base model; in the
    configurations it takes the place of whatever path of this machine they name, and None leaves them without one.
    """
    (target / "README.md").write_text(card, encoding="utf-8")
    for name, text in results.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    if publication.model is not None:
        _stage_folder(publication.model, target, (*MODEL_FILES, *WEIGHTS), base)
    if publication.adapter is not None:
        place = target / "adapter" if publication.model else target
        _stage_folder(publication.adapter, place, ADAPTER_FILES, base)
    if publication.model is not None and publication.run == publication.folder:
        for picture in sorted((publication.run / "report").glob("*.png")):
            if picture.stat().st_size <= PICTURE_BYTES:
                _link(picture, target / "report" / picture.name)


def _stage_folder(source: Path, target: Path, patterns: tuple[str, ...], base: str | None) -> None:
    unsafe = sorted({path.name for pattern in UNSAFE for path in source.glob(pattern)})
    if unsafe:
        raise UserError(
            f"{source} holds {', '.join(unsafe)}; only safetensors are published: save the model with "
            "save_pretrained, or move the file away if it is not needed"
        )
    target.mkdir(exist_ok=True)
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.name in ("config.json", "adapter_config.json"):
            public = without_places(read_json(path), base)
            (target / path.name).write_text(json.dumps(public, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            _link(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    target.symlink_to(source.resolve())


def without_places(value: Any, base: str | None) -> Any:
    """A configuration in which ``base`` stands wherever it said which folder a model came from."""
    if isinstance(value, dict):
        return {
            key: base if key in PLACES and inner else without_places(inner, base)
            for key, inner in value.items()
            if base or key != "_name_or_path"
        }
    return [without_places(item, base) for item in value] if isinstance(value, list) else value


def check(publication: Publication, staged: Path) -> None:
    """Raise UserError unless a stranger can load what is in ``staged``, and nothing secret is in it."""
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        if path.suffix not in (".safetensors", ".png") and TOKEN.search(path.read_bytes()):
            name = path.relative_to(staged)
            raise UserError(f"{name} holds what looks like an access token of the Hub; remove it, and revoke the token")
    if publication.adapter is not None:
        _check_adapter(staged / "adapter" if publication.model else staged, publication.adapter)
    if publication.model is not None:
        _check_model(publication, staged)


def _check_adapter(staged: Path, source: Path) -> None:
    try:
        PeftConfig.from_pretrained(str(staged))
        with safe_open(staged / "adapter_model.safetensors", framework="pt") as file:
            empty = not file.keys()
    except Exception as error:  # a configuration may make the code that reads it fail in any way
        raise UserError(f"the adapter in {source} cannot be read ({first_line(error)}); {EXPECTED}") from None
    if empty:
        raise UserError(f"the adapter in {source} has no weights; {EXPECTED}")


def _check_model(publication: Publication, staged: Path) -> None:
    missing = [name for name in CODE if not (staged / name).is_file()] if publication.kind != "upernet" else []
    if missing:
        raise UserError(
            f"{publication.model} lacks {', '.join(missing)}, the code that travels with the weights; load the model "
            "and write it again with save_pretrained"
        )
    family = AutoModel if publication.kind == "backbone" else AutoModelForSemanticSegmentation
    try:
        check_index(Place(str(staged)))
        options = {**Place(str(staged)).safe_options, "output_loading_info": True}
        _, found = family.from_pretrained(staged, dtype=torch.float32, **options)
    except MemoryError:
        raise
    except Exception as error:  # a configuration may make the code that reads it fail in any way
        raise UserError(
            f"the model in {publication.model} cannot be loaded ({first_line(error)}); {EXPECTED}"
        ) from None
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if wrong:
        raise UserError(
            f"the weights in {publication.model} do not fit its config.json ({len(wrong)} tensors, for example "
            f"{wrong[0]}); {EXPECTED}"
        )
