"""What ``glare compare`` is asked for."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from glare import ranges
from glare.comparison_probes import PROBES
from glare.data.raster_windows import RasterReading
from glare.recipes import option, required
from glare.runtime import DEVICES, PRECISIONS
from glare.segmenters import HEADS
from glare.typed_values import written


@dataclass(frozen=True)
class CompareRecipe:
    """Measure adapted models against the untouched one and against random adapters, and write a report."""

    base: str = required(help="the untouched ViT: folder or Hub id")
    adapted: tuple[str, ...] = required(help="run folders of glare pretrain, model or PEFT adapter folders, or Hub ids")
    data: str = required(help="labelled folder, landcover:<domain>[:count[:seed]], or of the catalog (loveda:FOLDER)")
    output: Path = required(help="folder for the report, compare.json and compare.md")
    protocol: str = option("linear", "frozen features and ridge; neighbours; full fine-tuning", choices=tuple(PROBES))
    foreign: tuple[str, ...] = option((), "models adapted in the same way to images of another domain")
    forgetting: tuple[str, ...] = option((), "labelled data that no model was adapted to")
    match: str | None = option(
        None, "globs on file stems, or paths with a /, to use at all, comma-separated, ! excludes"
    )
    val_match: str | None = option(None, "globs to measure on, as 'val/*'; the others train")
    group_by: str | None = option(
        None, "leave one group out: prefix, folder, a column of metadata.csv, or a regular expression with a group"
    )
    folds: int | None = option(None, "random folds, instead of the given train and val")
    num_images: int | None = option(None, "use this many images of each part at most, drawn with the seed")
    seeds: int | None = option(None, "draws of random folds, or of fine-tunings; 3 where not given, 1 for knn")
    controls: int | None = option(None, "draws of random adapters a row, at least 3; 5 for linear, else 3")
    short_side: int | None = option(None, "px of the images' short side; 28 patches where not given, 20 for knn")
    head: str = option("fpn", "fpn protocol: head", choices=HEADS)
    steps: int | None = option(None, "fpn protocol: steps of each fine-tuning; derived where not given")
    strict: bool = option(False, "stop at the first unreadable image instead of skipping it")
    seed: int = option(0, "of all draws")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    resume: bool = option(False, "go on in the output folder; what is measured there is not measured again")
    raster: RasterReading = option(RasterReading(), "GeoTIFFs")

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 2:
            raise ValueError(f"num_images is {self.num_images}; give at least 2, one to train and one to test on")
        ranges.check(self)
        if not self.adapted:
            raise ValueError("no adapted model was given; give --adapted one or more run folders")

    def command(self) -> str:
        """The command line that gives this recipe: what differs from the defaults."""
        words = ["glare", "compare"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name != "raster":
                words.append(f"--{field.name.replace('_', '-')}")
                words += map(str, value) if isinstance(value, tuple) else [] if value is True else [str(value)]
        given = {name: value for name, value in vars(self.raster).items() if value is not None}
        return shlex.join(words + [f"raster.{name}={written(value)}" for name, value in given.items()])
