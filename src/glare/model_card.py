"""The card of a model: facts of its folder, then metadata and text. No number in it is typed."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from glare import licences
from glare.card_scores import SCORES, SEGMENTATION, Evaluation, model_index, of_other_weights, read_evaluation
from glare.comparison_words import verdicts_in
from glare.errors import UserError, first_line, redacted
from glare.licences import Licence
from glare.lineage import (
    RANDOM,
    LookUp,
    Origin,
    Stage,
    looks_like_hub_id,
    offline,
    origin_of,
    public_name,
    stages_of,
)
from glare.publication import PLACES, Publication, find, glare_config
from glare.report_tables import escape
from glare.report_text import UNKNOWN as DASH
from glare.run_folder import atomic_write_text
from glare.stage_kinds import GLARE_PAPER, SIMMIM, Paper

ASSETS = Path(__file__).parent / "assets"
HOMEPAGE = "https://pypi.org/project/glare-ssl"
TASKS = {"backbone": "image-feature-extraction", "adapter": "image-feature-extraction"}
WEB = re.compile(r"https?://[^\s()<>\[\]]+")


@dataclass(frozen=True)
class Said:
    """What the user says beside the files; None leaves it to them.

    ``comparison``: output folder of ``glare compare``. The licences are identifiers of the Hub or any name.
    """

    repo_id: str | None = None
    base_model: str | None = None
    data_name: str | None = None
    base_license: str | None = None
    data_license: str | None = None
    license: str | None = None
    comparison: Path | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All that a card says. ``stages`` have their data beside them; ``said`` is what the user added.

    ``outdated``: whether there are scores, but of other weights, so that they are left out.
    """

    publication: Publication
    said: Said
    base: Origin
    stages: Sequence[tuple[Stage, Origin]]
    evaluation: Evaluation | None
    comparison: str | None
    licence: Licence
    outdated: bool = False

    @property
    def data_sets(self) -> list[Origin]:
        """What the model was trained on, each once."""
        return list({data.name: data for _, data in self.stages}.values())

    @property
    def unlabelled(self) -> list[str]:
        """Names of the data of the stages without labels."""
        return list(dict.fromkeys(data.name for stage, data in self.stages if stage.kind.unlabelled))

    @property
    def from_scratch(self) -> bool:
        """Whether it began with random weights, so that it learned and was not adapted."""
        return self.base.name == RANDOM

    @property
    def papers(self) -> list[Paper]:
        """Those of the stages; of a model that has none, that of this package."""
        found = dict.fromkeys(stage.kind.paper for stage, _ in self.stages if stage.kind.paper)
        return list(found) or [GLARE_PAPER]


def write_card(folder: Path) -> None:
    """Write the README.md of a finished run's model, from what is known on this machine."""
    publication = find(folder)
    atomic_write_text(publication.card, card(facts_of(publication)))


def facts_of(publication: Publication, said: Said | None = None, look_up: LookUp = offline) -> Facts:
    """Gather the facts of a folder. Raises UserError where a file of the run cannot be read."""
    said = said or Said()
    stages = stages_of(publication.run)
    start = said.base_model or (stages[0].start if stages else _start_of(publication))
    base = origin_of("model", start, look_up)
    if said.base_model is not None and base.hub_id is None:
        raise UserError(f"the base model {start!r} is not on the Hub; give its id (owner/name), or leave it out")
    if said.base_license is not None:
        base = replace(base, licence=Licence(said.base_license, "as given"))
    own = public_name(stages[-1].data) if stages else None
    trained = [(stage, _data_of(stage, own, said, look_up)) for stage in stages]
    parts = [base.licence, *(data.licence for _, data in trained)] if trained else [licences.UNKNOWN]
    evaluation = read_evaluation(publication, own, said.data_name)
    outdated = evaluation is not None and of_other_weights(evaluation, publication)
    return Facts(
        publication=publication,
        said=said,
        base=base,
        stages=trained,
        evaluation=None if outdated else evaluation,
        comparison=None if said.comparison is None else verdicts_in(said.comparison),
        licence=Licence(said.license, "as given") if said.license else licences.combined(parts),
        outdated=outdated,
    )


def _start_of(publication: Publication) -> str:
    """What a configuration says of the base model; nothing of use is an unknown one."""
    config = publication.config
    places = (config, glare_config(config).get("backbone_config", {}))
    named = [str(place[key]) for place in places for key in PLACES if place.get(key)]
    return named[0] if named else "an unknown base model"


def _data_of(stage: Stage, own: str | None, said: Said, look_up: LookUp) -> Origin:
    """A stage's data; those of the published run under the name and licence that the user gives them."""
    data = origin_of("dataset", stage.data, look_up)
    if public_name(stage.data) != own:
        return data
    if said.data_name is not None:
        data = replace(data, name=said.data_name, hub_id=said.data_name if looks_like_hub_id(said.data_name) else None)
    return data if said.data_license is None else replace(data, licence=Licence(said.data_license, "as given"))


def card(facts: Facts) -> str:
    """The README.md: front matter and text. Raises UserError for a configuration that nothing can be said of."""
    try:
        return redacted(_rendered(facts))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        place = facts.publication.model or facts.publication.folder
        raise UserError(
            f"the configuration in {place} is not as transformers and PEFT write it ({first_line(error)}); "
            "save the model again"
        ) from error


def _rendered(facts: Facts) -> str:
    text = _template().render(**_context(facts))
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "escape_markdown": escape, "licence": _licence_text}
    return environment.get_template("model_card.md")


def _context(facts: Facts) -> dict[str, Any]:
    publication, config = facts.publication, facts.publication.config
    adapter = publication.adapter_config
    origins = [facts.base, *facts.data_sets]
    return {
        "title": title_of(facts),
        "summary": _summary(facts),
        "kind": publication.kind,
        "adapter_inside": publication.adapter is not None and publication.model is not None,
        "registers": adapter is not None and adapter.get("peft_type") == "UNIADAPTER",
        "base": facts.base,
        "adapted": bool(facts.unlabelled) and not facts.from_scratch,
        "from_scratch": facts.from_scratch and facts.stages,
        "papers": facts.papers,
        "load_from": facts.said.repo_id or "path/to/this/folder",
        "evaluation": facts.evaluation,
        "outdated": facts.outdated,
        "comparison": facts.comparison,
        "stages": [
            {"title": stage.kind.title, "data": data, "settings": stage.settings} for stage, data in facts.stages
        ],
        "versions": config.get("transformers_version"),
        "patch": _patch(config),
        "data_sets": facts.data_sets,
        "licence": facts.licence,
        "licence_given": facts.said.license is not None,
        "non_commercial": [origin.name for origin in origins if origin.licence.non_commercial],
        "unknown": [origin.name for origin in origins if origin.licence.id is None],
        "homepage": HOMEPAGE,
        "dash": DASH,
    }


def title_of(facts: Facts) -> str:
    """The repository's name, or the run's."""
    if facts.said.repo_id is not None:
        return facts.said.repo_id.rpartition("/")[2]
    return public_name(str((facts.publication.run or facts.publication.folder).absolute()))


def _summary(facts: Facts) -> str:
    """What the model is, in a sentence."""
    publication = facts.publication
    base = "a ViT that began with random weights" if facts.from_scratch else escape(facts.base.name)
    kind = str((publication.adapter_config or {}).get("peft_type", "")).replace("UNIADAPTER", "UniAdapter")
    if publication.kind == "adapter":
        what = f"{kind} adapter for {base}"
    elif publication.kind == "backbone":
        what = base.replace("a ViT", "A ViT", 1) if facts.from_scratch else base
        what += f" with {kind} adapters" if kind else ""
    else:
        classes = list(publication.config.get("id2label", {}).values())
        what = f"Semantic segmentation into {len(classes)} classes ({escape(', '.join(classes))}) with {base}"
    made = f"Made with [glare-ssl]({HOMEPAGE})"
    if GLARE_PAPER in facts.papers:
        number = GLARE_PAPER.arxiv
        made += f", an implementation of GLARE (arXiv [{number}](https://arxiv.org/abs/{number}))"
    return f"{', '.join([what, _history(facts.stages)]).rstrip(', ')}. {made}."


def _history(stages: Sequence[tuple[Stage, Origin]]) -> str:
    """What was done to the base model, in order; nothing of fine-tuning."""
    parts = []
    for done, group in groupby(stages, key=lambda pair: pair[0].kind.done):
        if done:
            parts.append(f"{done} {escape(', then '.join(dict.fromkeys(data.name for _, data in group)))}")
    return ", then ".join(parts)


def _patch(config: Mapping[str, Any]) -> int | None:
    vit = glare_config(config).get("backbone_config", {})
    found: int | None = vit.get("patch_size")
    return found


def percent(value: float | None) -> str:
    """A fraction in percent with one digit, a dash where it is undefined."""
    return DASH if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _licence_text(licence: Licence) -> str:
    """Its title, with a link where there is an address of the web."""
    title, web = escape(licence.title), WEB.fullmatch(str(licence.link or ""))
    text = f"[{title}]({web[0]})" if web else title
    return f"**{text}** (non-commercial)" if licence.non_commercial else text


def metadata(facts: Facts) -> ModelCardData:
    """The front matter, which the Hub indexes. What is not known to be on the Hub is not named as if it were."""
    kind = facts.publication.kind
    adapter = facts.publication.adapter_config
    peft_type = str(adapter["peft_type"]).lower() if adapter else None
    data_ids = [data.hub_id for data in facts.data_sets if data.hub_id]
    learned = facts.from_scratch and facts.unlabelled
    tags = ["glare", "self-supervised-learning", *([] if learned else ["domain-adaptation"])]
    tags += [SIMMIM.name] if any(stage.kind.name == SIMMIM.name for stage, _ in facts.stages) else []
    tags += [peft_type] if peft_type else []
    tags += [tag for tag in facts.said.tags if tag not in tags]
    evaluated = facts.evaluation is not None
    licence: dict[str, Any] = facts.licence.metadata()
    return ModelCardData(
        **licence,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag=TASKS.get(kind, SEGMENTATION),
        base_model=facts.base.hub_id,
        base_model_relation=(("adapter" if kind == "adapter" else "finetune") if facts.base.hub_id else None),
        datasets=data_ids or None,
        metrics=[metric for metric, _ in SCORES.values()] if evaluated else None,
        tags=tags,
        model_name=title_of(facts) if evaluated else None,
        eval_results=model_index(facts.evaluation) if facts.evaluation else None,
    )
