"""The probe ``fpn`` of a comparison: full fine-tuning of a model on the training part of every fold."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from glare import finetune
from glare.comparison_probes import Subject
from glare.dense_inference import segment
from glare.evaluate import confusion
from glare.inference import load_segmenter
from glare.intervals import areas


@dataclass(frozen=True)
class FineTuning:
    """How every model is fine-tuned; the runs go into ``folder/<seed>_<fold>`` and are not repeated."""

    folder: Path
    model: str
    head: str
    steps: int | None
    seed: int
    device: str
    precision: str

    def run(self, subject: Subject, seed: int, fold: int) -> Path:
        """Fine-tune on the training images of one fold; returns the run folder."""
        output = self.folder / f"seed{seed}_fold{fold}"
        if not (output / "model").exists():
            recipe = finetune.FinetuneRecipe(
                model=self.model,
                data=subject.name,
                output=output,
                head=self.head,
                steps=self.steps,
                seed=self.seed + seed,
                device=self.device,
                precision=self.precision,
                report_to="none",
                resume=(output / "recipe.yaml").exists(),
            )
            finetune.run(recipe, train=subject.pool.data.subset(subject.folds[seed][fold].train))
            shutil.rmtree(output / "checkpoints", ignore_errors=True)  # larger than the model, and of no more use
        return output


def finetuned_areas(subject: Subject, tuning: FineTuning, accelerator: Accelerator) -> Tensor:
    """Areas (seeds, tested images, 3, k), each image segmented at its native size by the model of its fold."""
    data = subject.pool.data
    k = len(data.classes)
    counts = torch.zeros((len(subject.folds), len(data), k, k), dtype=torch.int64)
    for seed, folds in enumerate(subject.folds):
        for place, fold in enumerate(folds):
            run = tuning.run(subject, seed, place)
            segmenter, normalise = load_segmenter(str(run), device=accelerator.device)
            for image in fold.test:
                with accelerator.autocast():
                    counts[seed, image] = confusion(segmenter, data, [image], normalise=normalise, strict=True)[0]
    return areas(counts[:, subject.tested])


def finetuned_predictions(
    subject: Subject, tuning: FineTuning, images: Sequence[int], device: torch.device
) -> list[NDArray[np.uint8]]:
    """Class indices (h, w) of some tested images at the size the frozen probes see, by the first seed."""
    found = []
    for image in images:
        place = next(place for place, fold in enumerate(subject.folds[0]) if image in fold.test)
        segmenter, normalise = load_segmenter(str(tuning.run(subject, 0, place)), device=device)
        found += segment(segmenter, [subject.picture(image)], normalise=normalise)
    return found
