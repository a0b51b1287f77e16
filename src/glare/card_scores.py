"""The scores on a model's card: what ``eval.json`` says, in words and in the forms of the Hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from glare.dense_inference import Sweep, read_sweep
from glare.errors import UserError, first_line
from glare.json_files import read_json
from glare.lineage import looks_like_hub_id, public_name
from glare.model_names import Place
from glare.publication import Publication
from glare.report_tables import escape
from glare.weight_files import weights_digest

SEGMENTATION = "image-segmentation"
RESULTS = ".eval_results/glare.yaml"
"""Where in a repository the Hub finds the results of evaluations."""

SCORES = {"miou": ("mean_iou", "mIoU"), "aacc": ("accuracy", "pixel accuracy"), "macc": ("mean_accuracy", "mAcc")}
"""Key of eval.json -> metric of the Hub and its name."""


@dataclass(frozen=True)
class Evaluation:
    """What ``eval.json`` says; scores are fractions, None where undefined. ``data`` is a name, not a path.

    ``trained_on``: how many of the images the model was trained on. ``weights``: the `weights_digest` of what was
    evaluated, None where an earlier version has not written it.
    """

    scores: Mapping[str, float | None]
    iou: Mapping[str, float | None]
    num_images: int
    data: str
    split: str | None
    match: str | None
    seed: int | None
    sweep: Sweep
    trained_on: int
    weights: str | None

    @property
    def described(self) -> str:
        """On what was measured, in a sentence."""
        part = f", split {self.split}" if self.split else ""
        part += f", files {self.match}" if self.match else ""
        seed = "" if self.seed is None else f"; the training had seed {self.seed}"
        shared = f"; the model was trained on {self.trained_on} of these images" if self.trained_on else ""
        return f"On {self.num_images} images of {escape(self.data + part)}, {self.sweep.described}{shared}{seed}."


def read_evaluation(publication: Publication, own: str | None, data_name: str | None) -> Evaluation | None:
    """The scores of a published segmenter, None where there are none; those on its ``own`` data under ``data_name``.

    Raises UserError for an eval.json that is not as this package writes it.
    """
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
            data=data_name if data_name and public_name(data) == own else name,
            split=_text(values.get("split")),
            match=_text(values.get("match")),
            seed=values.get("seed"),
            sweep=read_sweep(values.get("inference", {})),
            trained_on=int(values.get("trained_on", 0)),
            weights=_text(values.get("weights_sha256")),
        )
    except KeyError as error:
        raise UserError(f"{file} has no {error}; write it again with `glare evaluate --json`") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} holds a value of another kind ({first_line(error)}); write it again with `glare evaluate --json`"
        ) from None


def of_other_weights(evaluation: Evaluation, publication: Publication) -> bool:
    """Whether the scores are of other weights than those published; what was written without a digest is believed."""
    run, model = publication.run, publication.model
    if evaluation.weights is None or run is None or model is None:
        return False
    # a model that was saved anew has the same tensors as its run's, if not the same bytes
    own = model if model.absolute().is_relative_to(run.absolute()) else run / "model"
    return evaluation.weights != weights_digest(Place(str(own.absolute())))


def _score(value: Any) -> float | None:
    """A score, None where it is undefined. Raises TypeError or ValueError for anything else."""
    return None if value is None else float(value)


def _text(value: Any) -> str | None:
    """A name, None where there is none."""
    return None if value is None else str(value)


def model_index(evaluation: Evaluation) -> list[EvalResult]:
    """The scores as the front matter of a card has them."""
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


def result_files(evaluation: Evaluation | None) -> dict[str, str]:
    """Path in the repository -> text of its evaluation results in the form of ``.eval_results``; none without any."""
    if evaluation is None or evaluation.scores["miou"] is None:
        return {}
    entry = EvalResultEntry(
        dataset_id=_data_id(evaluation),
        task_id="semantic_segmentation",
        value=evaluation.scores["miou"],
        notes=f"mIoU as a fraction. {evaluation.described}",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return {RESULTS: text}
