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
from glare.stage_kinds import GLARE, Kind, kind_of
from glare.typed_values import written
from glare.yaml_files import flatten, read_mapping

LAYOUT_FOLDERS = {"images", "labels", "train", "val", "test", "model", "adapter"}
"""Folders whose name says nothing of what is in them."""

LookUp = Callable[[str, str], Mapping[str, Any] | None]
"""("model" or "dataset", Hub id) -> the metadata of its card, None where the Hub has no such thing."""

RANDOM = "random weights"
"""What a base model is called that is a configuration alone."""


@dataclass(frozen=True)
class Origin:
    """A base model or a data set: what to call it, its id if it is on the Hub, and its licence."""

    name: str
    hub_id: str | None
    licence: Licence


@dataclass(frozen=True)
class Stage:
    """One run of training. ``start`` and ``data`` are as the user wrote them; ``run`` is its folder."""

    kind: Kind
    run: Path
    start: str
    data: str
    settings: Mapping[str, str]


def stages_of(run: Path | None) -> list[Stage]:
    """The run and, before it, the runs on this machine whose models it started from. Raises UserError as YAML does."""
    found: list[Stage] = []
    while run is not None and run.resolve() not in [stage.run.resolve() for stage in found]:
        recipe = read_mapping(run / "recipe.yaml")
        kind = kind_of(recipe)
        if kind is None:
            break
        settings = _settings(kind, recipe, run)
        found.insert(0, Stage(kind, run, str(recipe[kind.start]), str(recipe.get("data")), settings))
        run = run_folder_of(str(local_path(found[0].start)))
    return found


def _settings(kind: Kind, recipe: Mapping[str, Any], run: Path) -> dict[str, str]:
    """The settings of a stage for the card; those with a key that the recipe does not have are left out."""
    values = {key: written(value).replace(",", ", ") for key, value in flatten(recipe).items() if value is not None}
    if "objective" in values:
        terms = values.get(f"{values['objective']}.terms")
        values["learned"] = values["objective"] + (f", terms {terms}" if terms else "")
    shown = {title: filled for title, text in kind.settings.items() if (filled := _filled(text, values)) is not None}
    images = _recorded(run / "price.json").get("images")
    extra = {"Images": f"{images:,}"} if isinstance(images, int) else {}
    if not kind.unlabelled:
        return {**extra, **shown, **_accuracy(_recorded(run / "accuracy.json"))}
    verb = "adapted" if kind.name == GLARE.name else "trained"
    cost = price_text(replace(price(run, overhead=None), adapter_bytes=None), verb=verb)
    return {**extra, **shown, **({"Price": cost} if cost != "not known" else {})}


def _filled(text: str, values: Mapping[str, str]) -> str | None:
    for key in (part.partition("}")[0] for part in text.split("{")[1:]):
        if key not in values:
            return None
        text = text.replace(f"{{{key}}}", values[key])
    return text


def _accuracy(recorded: Mapping[str, Any]) -> dict[str, str]:
    """What ``glare classify`` has measured, where it has."""
    value = recorded.get("accuracy")
    if not isinstance(value, float):
        return {}
    return {"Accuracy of its classifier": f"{100 * value:.2f} % on {public_name(str(recorded.get('data')))}"}


def _recorded(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


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
        return Origin(RANDOM, None, licences.OURS)
    hub_id = name.partition(":")[0] if kind == "dataset" else name  # a configuration after the colon
    if looks_like_hub_id(hub_id) and not Path(name).exists():
        card = look_up(kind, hub_id)
        if card is not None:
            page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{hub_id}"
            licence = licences.stated(card, page)
            family = licences.of_family(name) if kind == "model" else licences.UNKNOWN
            return Origin(name, hub_id, family if licence.id is None else licence)
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
