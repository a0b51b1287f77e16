"""The kinds of training that a model can have behind it, as its card tells them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from glare.typed_values import MismatchError, read


@dataclass(frozen=True)
class Paper:
    """What a kind of training is from: how its entry in a bibliography is called, title and arXiv number."""

    key: str
    title: str
    arxiv: str


GLARE_PAPER = Paper(
    "glare", "Enhancing Semantic Segmentation with Continual Self-Supervised Pre-training", "2509.17816"
)
SIMMIM_PAPER = Paper("simmim", "SimMIM: A Simple Framework for Masked Image Modeling", "2111.09886")
MIXUP_PAPER = Paper("mixup", "mixup: Beyond Empirical Risk Minimization", "1710.09412")


@dataclass(frozen=True)
class Kind:
    """A kind of training.

    start: recipe key of the model it starts from. done: what the summary says of it, before the name of its data; ""
    leaves it out. settings: what the card shows of it, made of recipe keys, in braces. unlabelled: whether it needs no
    labels. paper: what to cite, None for nothing.
    """

    name: str
    start: str
    title: str
    done: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    unlabelled: bool = False
    paper: Paper | None = None


WITHOUT_LABELS = {
    "Split": "{split}",
    "Objective": "{learned}",
    "Trained": "{adapter} (rank {rank}, scale {scale}, place {adapter_place})",
    "Steps": "{steps} of {batch_size} images",
    "Learning rate": "{learning_rate}, {warmup_steps} steps of warm-up, cosine to {min_learning_rate}",
}
"""Settings of every pre-training; ``learned`` is its objective with the terms of the loss, where it has a choice."""

GLARE = Kind(
    "glare",
    "backbone",
    "Adaptation without labels (GLARE)",
    "adapted without labels to images of",
    {
        **WITHOUT_LABELS,
        "Views": "2 of {views.global_size} px and {views.num_local} of {views.local_size} px an image",
        "Weights of": "the {export}",
        "Seed": "{seed}",
    },
    unlabelled=True,
    paper=GLARE_PAPER,
)
SIMMIM = Kind(
    "simmim",
    "backbone",
    "Pre-training without labels (SimMIM)",
    "pre-trained without labels, by predicting the pixels of masked patches (SimMIM), on images of",
    {
        **WITHOUT_LABELS,
        "Views": "2 of {views.global_size} px an image",
        "Masked": "share of the patches {views.patch_ratio} (least, most), squares of {views.patch_square} a side",
        "Seed": "{seed}",
    },
    unlabelled=True,
    paper=SIMMIM_PAPER,
)
CLASSIFY = Kind(
    "classify",
    "model",
    "Classification of images",
    "trained to classify images of",
    {
        "Steps": "{steps} of {batch_size} crops of {crop_size} px",
        "Learning rate": "{learning_rate}, {warmup_steps} steps of warm-up, linear to 0",
        "Seed": "{seed}",
    },
)
MIXUP = replace(
    CLASSIFY,
    title="Classification of images, with MixUp",
    settings={"MixUp": "factors of Beta({mixup}, {mixup})", **CLASSIFY.settings},
    paper=MIXUP_PAPER,
)
FINETUNE = Kind(
    "finetune",
    "model",
    "Fine-tuning on labelled images",
    settings={
        "Head": "{head}",
        "Trained besides the head": "{train_on}",
        "Steps": "{steps} of {batch_size} crops of {crop_size} px",
        "Learning rate": "{learning_rate} for the head",  # and more, by `finetuning_rate`
        "Seed": "{seed}",
    },
)
ALL_WEIGHTS = "all weights"


def kind_of(recipe: Mapping[str, Any]) -> Kind | None:
    """What a recipe is for; None for one that says of no model what it starts from."""
    if recipe.get("backbone"):
        kind = SIMMIM if recipe.get("objective") == SIMMIM.name else GLARE
        if recipe.get("adapter") != "full":
            return kind
        return replace(kind, settings={**kind.settings, "Trained": ALL_WEIGHTS})
    if not recipe.get("model"):
        return None
    if "mixup" not in recipe:
        return replace(FINETUNE, settings={**FINETUNE.settings, "Learning rate": finetuning_rate(recipe)})
    return MIXUP if recipe["mixup"] else CLASSIFY


def finetuning_rate(recipe: Mapping[str, Any]) -> str:
    """How the rates of fine-tuning go, as `finetune_step.learning_rates` has them, with recipe keys in braces."""
    peaks = {"learning_rate": "for the head"}
    peaks |= {} if recipe.get("train_on") == "head" else {"backbone_learning_rate": "below it"}
    parts = [f"{{{key}}} {what}" for key, what in peaks.items()]
    parts += ["{warmup_steps} steps of warm-up"] * (recipe.get("warmup_steps") is not None)
    floor = _number(recipe, "min_learning_rate", 0.0)
    shape = "linear" if _number(recipe, "poly_power", 1.0) == 1 else "polynomial of power {poly_power}"
    parts += [f"{shape} to {'{min_learning_rate}' if floor else '0'}"]
    parts += ["constant where the peak is lower"] * any(_number(recipe, key, floor) < floor for key in peaks)
    return ", ".join(parts)


def _number(recipe: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a recipe, the ``default`` where there is none."""
    try:
        return float(read(float, recipe.get(key)))
    except MismatchError:
        return default
