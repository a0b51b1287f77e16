"""The card of a model: facts of its folder, then metadata and text. No number in it is typed."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from glare import licences
from glare.comparison_words import verdicts_in
from glare.dense_inference import Sweep, read_sweep
from glare.errors import UserError, first_line, redacted
from glare.json_files import read_json
from glare.licences import Licence
from glare.lineage import (
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

ASSETS = Path(__file__).parent / "assets"
HOMEPAGE = "https://pypi.org/project/glare-ssl"
TASKS = {"backbone": "image-feature-extraction", "adapter": "image-feature-extraction"}
SEGMENTATION = "image-segmentation"
WEB = re.compile(r"https?://[^\s()<>\[\]]+")
SCORES = {"miou": ("mean_iou", "mIoU"), "aacc": ("accuracy", "pixel accuracy"), "macc": ("mean_accuracy", "mAcc")}
"""Key of eval.json -> metric of the Hub and its name."""


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
class Evaluation:
    """What ``eval.json`` says; scores are fractions, None where undefined. ``data`` is a name, not a path."""

    scores: Mapping[str, float | None]
    iou: Mapping[str, float | None]
    num_images: int
    data: str
    split: str | None
    match: str | None
    seed: int | None
    sweep: Sweep

    @property
    def described(self) -> str:
        """On what was measured, in a sentence."""
        part = f", split {self.split}" if self.split else ""
        part += f", files {self.match}" if self.match else ""
        seed = "" if self.seed is None else f"; the training had seed {self.seed}"
        return f"On {self.num_images} images of {escape(self.data + part)}, {self.sweep.described}{seed}."


@dataclass(frozen=True)
class Facts:
    """All that a card says. ``stages`` have their data beside them; ``said`` is what the user added."""

    publication: Publication
    said: Said
    base: Origin
    stages: Sequence[tuple[Stage, Origin]]
    evaluation: Evaluation | None
    comparison: str | None
    licence: Licence

    @property
    def data_sets(self) -> list[Origin]:
        """What the model was trained on, each once."""
        return list({data.name: data for _, data in self.stages}.values())

    @property
    def adapted_to(self) -> list[str]:
        """Names of the data of the stages without labels."""
        return list(dict.fromkeys(data.name for stage, data in self.stages if stage.job == "backbone"))


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
    return Facts(
        publication=publication,
        said=said,
        base=base,
        stages=trained,
        evaluation=_evaluation(publication, own, said),
        comparison=None if said.comparison is None else verdicts_in(said.comparison),
        licence=Licence(said.license, "as given") if said.license else licences.combined(parts),
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


def _evaluation(publication: Publication, own: str | None, said: Said) -> Evaluation | None:
    file = publication.run / "eval.json" if publication.run else None
    if file is None or not file.is_file() or publication.kind not in ("segmenter", "upernet"):
        return None
    values = read_json(file)
    data = str(values.get("data"))
    name = data if looks_like_hub_id(data) else public_name(data)
    try:
        return Evaluation(
            scores={key: _score(values[key]) for key in SCORES},
            iou={str(name): _score(value) for name, value in values["iou"].items()},
            num_images=int(values["num_images"]),
            data=said.data_name if said.data_name and public_name(data) == own else name,
            split=_text(values.get("split")),
            match=_text(values.get("match")),
            seed=values.get("seed"),
            sweep=read_sweep(values.get("inference", {})),
        )
    except KeyError as error:
        raise UserError(f"{file} has no {error}; write it again with `glare evaluate --json`") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} holds a value of another kind ({first_line(error)}); write it again with `glare evaluate --json`"
        ) from None


def _score(value: Any) -> float | None:
    """A score, None where it is undefined. Raises TypeError or ValueError for anything else."""
    return None if value is None else float(value)


def _text(value: Any) -> str | None:
    """A name, None where there is none."""
    return None if value is None else str(value)


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
        "adapted": facts.adapted_to,
        "load_from": facts.said.repo_id or "path/to/this/folder",
        "evaluation": facts.evaluation,
        "comparison": facts.comparison,
        "stages": [{"title": stage.title, "data": data, "settings": stage.settings} for stage, data in facts.stages],
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
    publication, base = facts.publication, escape(facts.base.name)
    kind = str((publication.adapter_config or {}).get("peft_type", "")).replace("UNIADAPTER", "UniAdapter")
    if publication.kind == "adapter":
        what = f"{kind} adapter for {base}"
    elif publication.kind == "backbone":
        what = base + (f" with {kind} adapters" if kind else "")
    else:
        classes = list(publication.config.get("id2label", {}).values())
        what = f"Semantic segmentation into {len(classes)} classes ({escape(', '.join(classes))}) with {base}"
    adapted = f", adapted without labels to images of {escape(', then '.join(facts.adapted_to))}"
    made = f"Made with [glare-ssl]({HOMEPAGE}), an implementation of GLARE"
    paper = "(arXiv [2509.17816](https://arxiv.org/abs/2509.17816))"
    return f"{what}{adapted if facts.adapted_to else ''}. {made} {paper}."


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
    tags = ["glare", "self-supervised-learning", "domain-adaptation", *([peft_type] if peft_type else [])]
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
        eval_results=_model_index(facts.evaluation) if facts.evaluation else None,
    )


def _model_index(evaluation: Evaluation) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=SEGMENTATION,
            dataset_type=_data_id(evaluation),
            dataset_name=evaluation.data,
            dataset_split=evaluation.split,
            metric_type=metric,
            metric_name=name,
            metric_value=evaluation.scores[key],
        )
        for key, (metric, name) in SCORES.items()
        if evaluation.scores[key] is not None
    ]


def _data_id(evaluation: Evaluation) -> str:
    """The Hub id of the data, otherwise their name as the formats allow it."""
    return evaluation.data if looks_like_hub_id(evaluation.data) else re.sub(r"[^\w.-]+", "-", evaluation.data)


def result_files(facts: Facts) -> dict[str, str]:
    """Path in the repository -> text of its evaluation results in the form of ``.eval_results``; none without any."""
    evaluation = facts.evaluation
    if evaluation is None or evaluation.scores["miou"] is None:
        return {}
    entry = EvalResultEntry(
        dataset_id=_data_id(evaluation),
        task_id="semantic_segmentation",
        value=evaluation.scores["miou"],
        notes=f"mIoU as a fraction. {evaluation.described}",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return {".eval_results/glare.yaml": text}
