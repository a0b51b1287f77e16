"""What the numbers of a recipe may be, in one table.

Intervals are written as in mathematics: [1, inf) is 1 or more, (0, 1] more than 0 and at most 1. A list of numbers has
to lie in its interval with each of them. What a number has to be beside another one, the model or the data is checked
where both are known.
"""

from typing import TYPE_CHECKING

from glare.typed_values import written

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RANGES = {
    # how long and with what, all trainings
    "steps": "[1, inf)",
    "epochs": "[1, inf)",
    "batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "seed": "[0, inf)",
    "num_workers": "[1, inf)",
    "checkpoint_every": "[1, inf)",
    "fraction": "(0, 1]",
    "keep_checkpoints": "[1, inf)",
    "log_every": "[1, inf)",
    "seeds": "[1, inf)",
    # optimizer, all trainings
    "learning_rate": "(0, inf)",
    "min_learning_rate": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
    # pre-training
    "rank": "[1, inf)",
    "scale": "(0, inf)",  # of the adapters' output; of fine-tuning, both factors on the images' size
    "image_size": "[0, inf)",
    "clip": "[0, inf)",  # 0: gradients stay as they are
    "freeze_last_layer_steps": "[0, inf)",
    "head_warmup_steps": "[0, inf)",
    "anchor": "[0, inf)",
    "momentum": "[0, 1]",
    "momentum_end": "[0, 1]",
    "teacher_temperature": "[0.001, inf)",
    "temperature_ramp": "[0, 1]",
    "patience": "[1, inf)",
    # fine-tuning
    "num_images": "[1, inf)",  # of a comparison, at least 2
    "eval_every": "[1, inf)",
    "crop_size": "[1, 16384]",
    "dominant_share": "(0, 1]",
    "backbone_learning_rate": "[0, inf)",
    "poly_power": "(0, inf)",
    "drop_path": "[0, 1)",
    "base_scale": "[1, 16384]",
    "test_scale": "[1, 16384]",
    # comparison
    "controls": "[3, inf)",
    "folds": "[2, inf)",
    "short_side": "[1, inf)",
    # demonstration
    "finetune_steps": "[1, inf)",
    "num_labels": "[1, inf)",
    "num_seeds": "[1, inf)",
    # GeoTIFFs
    "tile": "[0, 13377]",  # no window has more than opening.MAX_PIXELS
    "bands": "[1, inf)",
    # classification
    "mixup": "[0, inf)",
    "area": "(0, 1]",
    # views
    "num_local": "[0, inf)",
    "global_size": "[1, inf)",
    "local_size": "[1, inf)",
    "global_area": "(0, 1]",
    "local_area": "(0, 1]",
    "flip_prob": "[0, 1]",
    "jitter_prob": "[0, 1]",
    "jitter": "[0, 1]",
    "grey_prob": "[0, 1]",
    "blur_prob": "[0, 1]",
    "solarize_prob": "[0, 1]",
    "patch_prob": "[0, 1]",
    "patch_ratio": "(0, 1]",
    "patch_blur_sigma": "(0, inf)",
    "patch_square": "[1, inf)",
    # the objective and its regions
    "prototypes": "[1, inf)",
    "head_hidden": "[1, inf)",
    "head_bottleneck": "[1, inf)",
    "min_overlap": "[0, 1)",
    "count": "[1, inf)",
    "min_side": "[1, inf)",
    "max_side": "[1, inf)",
}
"""Field of a recipe, or of what is nested in one -> the interval of its values."""

LOWER_FIRST = ("area", "global_area", "local_area", "patch_ratio", "scale")
"""Fields that, where they are two numbers, are a lowest and a highest one."""


def check(recipe: "DataclassInstance") -> None:
    """Raise ValueError for a number outside its interval; to be called in ``__post_init__``.

    Fields that are None or no number pass, and so do those of nested dataclasses, which check themselves.
    """
    for name in recipe.__dataclass_fields__:
        value = getattr(recipe, name)
        items = value if isinstance(value, tuple) else (value,)
        numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
        if not numbers:
            continue
        if name in RANGES and not all(inside(RANGES[name], number) for number in numbers):
            each = " each" if len(numbers) > 1 else ""
            raise ValueError(f"{name} is {written(value)}; give {in_words(RANGES[name])}{each}")
        if name in LOWER_FIRST and numbers != sorted(numbers):
            raise ValueError(f"{name} is {written(value)}; give the lower one first")


def inside(interval: str, value: float) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = _ends(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def in_words(interval: str) -> str:
    """An interval as one says it: "at least 0 and less than 1"."""
    low, high = (f"{end:g}" for end in _ends(interval))
    least = f"at least {low}" if interval[0] == "[" else f"more than {low}"
    if high == "inf":
        return least
    if interval[0] + interval[-1] == "[]":
        return f"{low} to {high}"
    return f"{least} and {'at most' if interval[-1] == ']' else 'less than'} {high}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(", ")
    return float(low), float(high)
