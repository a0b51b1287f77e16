"""``model.push_to_hub``: a model in memory, published as ``glare push`` publishes a folder."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors.torch import load_file

from glare.backbones import read_normalisation
from glare.hub import PushRecipe, publish
from glare.model_names import place_of
from glare.modeling_glare import GlareModel, GlarePreTrainedModel
from glare.publication import Publication, find
from glare.run_folder import run_folder_of
from glare.segmenters import image_processor, image_side, vit_of
from glare.views import Normalisation

PROCESSOR = "preprocessor_config.json"


def push_model(
    model: GlarePreTrainedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] | None = None,
    **said: Any,
) -> CommitInfo:
    """Publish the model with its code, adapters, image processor and card, in one commit.

    ``repo_id`` and the options are those of transformers' ``push_to_hub``; ``said`` are the fields of ``Said``:
    ``base_model``, ``base_license``, ``data_name``, ``data_license``, ``license``, ``comparison``. The card tells of a
    run and its scores only if the model was loaded from that run's folder and still has its weights. Raises UserError
    where the Hub or the user has to do something first, ConnectionError where the Hub cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="glare-model-") as name:
        folder = Path(name) / "model"
        publication = write(model, folder, max_shard_size=max_shard_size)
        recipe = PushRecipe(
            target=(str(folder), repo_id),
            private=bool(private),
            revision=revision,
            tags=tuple(tags or ()),
            **said,
        )
        commit = {"commit_message": commit_message or f"Publish {type(model).__name__}", "create_pr": create_pr}
        api = HfApi(library_name="glare-ssl", token=token)
        return publish(api, publication, recipe, commit_description=commit_description, **commit)


def write(model: GlarePreTrainedModel, folder: Path, *, max_shard_size: int | str) -> Publication:
    """Save the model to ``folder``, with all that is known of where it came from."""
    built = model.config.architectures or [""]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    vit = model if isinstance(model, GlareModel) else vit_of(model)
    adapter = None
    # a segmentation model may have changed the weights below its adapters, which are of no use without them
    if vit is model and vit.config.adapter_config is not None and "Segmentation" not in built[0]:
        adapter = folder / "adapter"
        vit.save_adapter(adapter)
    _write_processor(model.name_or_path, vit, folder)
    source = place_of(model.name_or_path).name if model.name_or_path else ""
    run = run_folder_of(source) if source and same_weights(folder, Path(source)) else None
    return Publication(folder, find(folder).kind, folder, adapter, run)


def _write_processor(name: str, vit: GlareModel, folder: Path) -> None:
    """The image processor that came with the model, otherwise one with the normalisation of its ViT."""
    own = place_of(name).file(PROCESSOR) if name else None
    if own is not None:
        (folder / PROCESSOR).write_bytes(own.read_bytes())
        return
    base = vit.backbone.name_or_path
    normalise = read_normalisation(base) if base else Normalisation()
    image_processor(normalise, size=image_side(vit), patch=vit.patch_size).save_pretrained(folder)


def same_weights(left: Path, right: Path) -> bool:
    """Whether two model folders hold the same tensors, bit by bit, in the same files."""
    files = sorted(path.name for path in left.glob("*.safetensors"))
    if not files or files != sorted(path.name for path in right.glob("*.safetensors")):
        return False
    return all(_same_tensors(left / name, right / name) for name in files)


def _same_tensors(left: Path, right: Path) -> bool:
    ours, theirs = load_file(left), load_file(right)
    return ours.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items()
    )
