"""What a model was made from: its base model, and the stages of training with their data.

Read from the run folders on this machine. Paths of the machine stay here: outside, a thing has the name of its folder,
or its id on the Hub.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glare import licences
from glare.data.catalog import named
from glare.json_files import read_json
from glare.licences import Licence
from glare.model_names import EMBEDDED, is_repo_id
from glare.paths import local_path
from glare.price import price
from glare.report_text import price_text
from glare.run_folder import run_folder_of
from glare.typed_values import written
from glare.yaml_files import flatten, read_mapping

LAYOUT_FOLDERS = {"images", "labels", "train", "val", "test", "model", "adapter"}
"""Folders whose name says nothing of what is in them."""

LookUp = Callable[[str, str], Mapping[str, Any] | None]
"""("model" or "dataset", Hub id) -> the metadata of its card, None where the Hub has no such thing."""

SETTINGS = {
    "backbone": {
        "Objective": "{learned}",
        "Trained": "{adapter} (rank {rank}, scale {scale}, place {adapter_place})",
        "Steps": "{steps} of {batch_size} images",
        "Learning rate": "{learning_rate}, {warmup_steps} steps of warm-up, cosine to {min_learning_rate}",
        "Views": "2 of {views.global_size} px and {views.num_local} of {views.local_size} px an image",
        "Weights of": "the {export}",
        "Seed": "{seed}",
    },
    "model": {
        "Head": "{head}",
        "Trained besides the head": "{train_on}",
        "Steps": "{steps} of {batch_size} crops of {crop_size} px",
        "Learning rate": "{learning_rate} for the head, {backbone_learning_rate} below it, linear to 0",
        "Seed": "{seed}",
    },
}
"""The recipe key that names what a job starts from -> the settings that the card shows, made of recipe keys."""

TITLES = {"backbone": "Adaptation without labels (GLARE)", "model": "Fine-tuning on labelled images"}


@dataclass(frozen=True)
class Origin:
    """A base model or a data set: what to call it, its id if it is on the Hub, and its licence."""

    name: str
    hub_id: str | None
    licence: Licence


@dataclass(frozen=True)
class Stage:
    """One run of training. ``start`` and ``data`` are as the user wrote them; ``run`` is its folder."""

    job: str
    run: Path
    start: str
    data: str
    settings: Mapping[str, str]

    @property
    def title(self) -> str:
        """What the stage was."""
        return TITLES[self.job]


def stages_of(run: Path | None) -> list[Stage]:
    """The run and, before it, the runs on this machine whose models it started from. Raises UserError as YAML does."""
    found: list[Stage] = []
    while run is not None and run.resolve() not in [stage.run.resolve() for stage in found]:
        recipe = read_mapping(run / "recipe.yaml")
        job = next((key for key in SETTINGS if recipe.get(key)), None)
        if job is None:
            break
        found.insert(0, Stage(job, run, str(recipe[job]), str(recipe.get("data")), _settings(job, recipe, run)))
        run = run_folder_of(str(local_path(found[0].start)))
    return found


def _settings(job: str, recipe: Mapping[str, Any], run: Path) -> dict[str, str]:
    """The settings of a stage for the card; those with a key that the recipe does not have are left out."""
    values = {key: written(value).replace(",", ", ") for key, value in flatten(recipe).items() if value is not None}
    if "objective" in values:
        terms = values.get(f"{values['objective']}.terms")
        values["learned"] = values["objective"] + (f", terms {terms}" if terms else "")
    shown = {}
    for title, text in SETTINGS[job].items():
        filled = _filled(text, values)
        if filled is not None:
            shown[title] = filled
    cost = price_text(replace(price(run, overhead=None), adapter_bytes=None))
    images = _recorded(run).get("images")
    extra = {"Images": f"{images:,}"} if isinstance(images, int) else {}
    return {**extra, **shown, **({"Price": cost} if job == "backbone" and cost != "not known" else {})}


def _filled(text: str, values: Mapping[str, str]) -> str | None:
    for key in (part.partition("}")[0] for part in text.split("{")[1:]):
        if key not in values:
            return None
        text = text.replace(f"{{{key}}}", values[key])
    return text


def _recorded(run: Path) -> dict[str, Any]:
    return read_json(run / "price.json") if (run / "price.json").is_file() else {}


def offline(_kind: str, _hub_id: str) -> Mapping[str, Any] | None:
    """The look-up that takes every id for existing and knows nothing of it."""
    return {}


def origin_of(kind: str, name: str, look_up: LookUp = offline) -> Origin:
    """What is known of a base model (``kind`` "model") or data set ("dataset") that a recipe names."""
    if name == EMBEDDED or name.partition(":")[0] == "landcover":
        what = "the small ViT inside glare-ssl" if name == EMBEDDED else "scenes that glare-ssl draws"
        return Origin(f"{name} ({what})", None, licences.OURS)
    if kind == "dataset" and (wanted := named(name)) is not None:
        entry = wanted.entry
        return Origin(entry.title, entry.hub.id if entry.hub and not wanted.place else None, entry.licence)
    if name.endswith(".json"):
        return Origin("random weights", None, licences.OURS)
    if looks_like_hub_id(name):
        card = look_up(kind, name)
        if card is not None:
            page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
            licence = licences.stated(card, page)
            family = licences.of_family(name) if kind == "model" else licences.UNKNOWN
            return Origin(name, name, family if licence.id is None else licence)
    return Origin(public_name(name), None, _local_licence(local_path(name)))


def looks_like_hub_id(name: str) -> bool:
    """Whether ``name`` is of the form owner/name and nothing on this machine."""
    return is_repo_id(name) and "/" in name and not Path(name).exists()


def public_name(path: str) -> str:
    """What to call something on this machine: the name of its folder, without the folders above.

    A data set of the catalog, wherever it lies, has its own name.
    """
    wanted = named(path)
    if wanted is not None:
        return wanted.entry.title
    parts = [part for part in Path(path).parts if part.strip("/\\.~")]
    while len(parts) > 1 and parts[-1] in LAYOUT_FOLDERS:
        parts.pop()
    return parts[-1] if parts else "unnamed"


def _local_licence(path: Path) -> Licence:
    """From the card in a folder or, where it is one of the usual sub-folders, above it."""
    folder = path.absolute()
    while True:
        licence = licences.stated(licences.front_matter(folder / "README.md"), "the README.md beside it")
        if licence.id is not None or folder.name not in LAYOUT_FOLDERS:
            return licence
        folder = folder.parent
