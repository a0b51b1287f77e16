"""``glare bench``: how fast a pre-training step is on this machine, beside the way of research code.

Both ways start from the same weights and compute the same loss with the same sizes of views and prototypes, in the
same process, in turns (``plain_step``, ``plain_views``). The package's own way cuts its views out of images that were
decoded once; research code decodes them at every visit, in workers.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glare import ranges, recipes
from glare.arithmetic import Rows, Shape, Work, arithmetic
from glare.backbones import load_backbone
from glare.bench_table import table
from glare.bench_ways import OwnWay, PlainWay, Way
from glare.compute_peak import peak_flops
from glare.data.cache import pack
from glare.data.landcover import scene
from glare.data.sources import image_files, open_source
from glare.errors import UserError
from glare.objectives.glare import GlareSettings
from glare.pretrain import PretrainRecipe, resolve
from glare.pretrain_plan import overlay
from glare.price import device_name, peak_memory_bytes, reset_peak_memory
from glare.recipes import option
from glare.run_folder import atomic_write_json
from glare.runtime import DEVICES, PRECISIONS, Clock, finish, make_accelerator
from glare.versions import versions
from glare.views import ViewConfig

VIT_SMALL = Path(__file__).parent / "assets" / "vit_small_16.json"
ROUNDS = 2  # in which the ways take turns
PHASE_STEPS = 2  # of each way, whose phases are measured one by one
SCENES, SIDE_PX = 2, 1024
PHASES = ("views", "teacher", "student", "heads and losses", "backward", "update")

PAPER: Mapping[str, Any] = {
    "data": "of the benchmark",
    "output": "of the benchmark",
    "epochs": 100,
    "image_size": 0,
    "learning_rate": 1.5e-4,
    "freeze_last_layer_steps": 0,
    "scale": 0.1,
    "anchor": 0.0,
    "teacher_temperature": (0.04, 0.07),
    "views": {"num_local": 10},
    "glare": {"prototypes": 8192, "head_hidden": 2048, "head_init": "random"},
}
"""The recipe of what is measured: the paper's, with views of 14 and 6 patches a side."""


@dataclass(frozen=True)
class BenchRecipe:
    """Measure images a second, phases, memory and FLOP utilisation of pre-training, beside the way of research code."""

    backbone: str = option(str(VIT_SMALL), "ViT as for glare pretrain; by default a ViT-S/16 of random weights")
    data: Path | None = option(None, "folder of image files; drawn scenes of 1024 px where not given")
    batch_size: int | None = option(None, "images a step; 8 on a CPU, 64 on a GPU where not given")
    steps: int | None = option(None, "measured steps of each way in each of two rounds; 3 on a CPU, 20 on a GPU")
    plain: bool = option(True, "measure the way of research code, too")
    device: str = option("auto", "where to run", choices=DEVICES)
    precision: str = option("auto", "auto: bf16 where the processor has it", choices=PRECISIONS)
    compile: bool = option(False, "torch.compile the blocks of the ViT, of the package's own way alone")
    json: Path | None = option(None, "file to write the figures to")
    seed: int = option(0, "of all draws")
    views: ViewConfig = option(ViewConfig(), "views; where not given 2 of 14 and 10 of 6 patches a side, the paper's")
    glare: GlareSettings = option(GlareSettings(), "objective; where not given the paper's")

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass
class Measured:
    """What was measured of one way.

    ``seconds``: of a step, a value a round; ``phases``: seconds of a step's parts; ``wait``: share of the time in
    which the next views were not there; ``memory``: most bytes held beyond those before, None where it is not known;
    ``matched``: share of patches with a correspondence.
    """

    memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    wait: list[float] = field(default_factory=list)
    matched: list[Tensor] = field(default_factory=list)
    phases: Mapping[str, float] = field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare bench``."""
    run(recipes.parse_given(BenchRecipe, argv, prog="glare bench"))


def run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Measure, print the table and return the figures. Raises UserError for data without image files."""
    recipe = recipes.from_dict(BenchRecipe, given)
    accelerator = make_accelerator(device=recipe.device, precision=recipe.precision, report_to="none", output=Path())
    device = accelerator.device
    steps = recipe.steps or (3 if device.type == "cpu" else 20)
    with image_folder(recipe.data, recipe.seed) as folder:
        source, clock = open_source(str(folder)), Clock()
        packed = pack(source, progress=True)
        decoded = len(packed.names) / clock.elapsed
        pretrain = pretrain_recipe(given, len(packed.names), accelerator)
        makers: dict[str, Callable[[], Way]] = {"glare": lambda: OwnWay(pretrain, packed.images, accelerator)}
        if recipe.plain:
            makers["plain"] = lambda: PlainWay(pretrain, image_files(folder), accelerator)
        found = measure(makers, steps=steps, device=device)
    work = work_of(pretrain, matched=torch.stack(found["glare"].matched).mean().item())
    dtype = torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16
    values = figures(found, pretrain.batch_size or 1, work, peak_flops(device, dtype))
    values |= {
        "decoded_images_per_second": decoded,
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "backbone": Path(recipe.backbone).stem,
        "batch_size": pretrain.batch_size,
        "steps": ROUNDS * steps,
        "compile": recipe.compile,
        "views": recipes.to_dict(pretrain.views),
        "prototypes": pretrain.glare.prototypes,
        "versions": versions(),
    }
    print(table(values))
    if recipe.json is not None:
        atomic_write_json(recipe.json, values)
    return values


@contextmanager
def image_folder(data: Path | None, seed: int) -> Iterator[Path]:
    """The user's folder, or one of drawn scenes that is removed at the end: each in the eight positions of a square."""
    if data is not None:
        if not data.is_dir() or not image_files(data):
            raise UserError(
                f"data {str(data)!r} holds no image files, which the plain way needs; give a folder of them"
            )
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="glare-bench-") as name:
        for index in range(SCENES):
            drawn = Image.fromarray(scene("arid", seed, index=index, size=SIDE_PX).image)
            drawn.save(Path(name, f"{index}.png"))
            for turn in Image.Transpose:
                drawn.transpose(turn).save(Path(name, f"{index}_{turn.name.lower()}.png"))
        yield Path(name)


def pretrain_recipe(given: Mapping[str, Any], num_images: int, accelerator: Accelerator) -> PretrainRecipe:
    """The paper's settings, at the ViT's patch size, under what the user gave."""
    recipe = recipes.from_dict(BenchRecipe, given)
    patch_size = load_backbone(recipe.backbone).patch_size
    known = {"backbone": recipe.backbone, "batch_size": recipe.batch_size, "seed": recipe.seed}
    known |= {"compile": recipe.compile}
    known |= {key: given[key] for key in ("views", "glare") if key in given}
    settings = overlay(PAPER, known)
    return resolve(settings, num_images=num_images, patch_size=patch_size, accelerator=accelerator)[0]


def measure(makers: Mapping[str, Callable[[], Way]], *, steps: int, device: torch.device) -> dict[str, Measured]:
    """Let the ways take turns; each is made and measured before the next, so that its memory is its own.

    On a CPU only that of the first is known: what it has freed is not given back, and the next one uses it.
    """
    ways: dict[str, Way] = {}
    found: dict[str, Measured] = {}
    for turn in range(ROUNDS):
        for name, make in makers.items():
            if name not in ways:
                held = reset_peak_memory(device)
                ways[name], found[name] = make(), Measured()
            _measure_turn(ways[name], found[name], steps=steps, device=device)
            if turn == 0 and (device.type == "cuda" or len(ways) == 1):
                found[name].memory = peak_memory_bytes(device) - held
    for name, way in ways.items():
        clock = Clock(device)
        with _begun(way):
            for _ in range(PHASE_STEPS):
                way.step(clock)
        found[name].phases = {phase: seconds / PHASE_STEPS for phase, seconds in clock.seconds.items()}
    return found


@contextmanager
def _begun(way: Way) -> Iterator[None]:
    """Begin, warm up, and end."""
    way.begin()
    try:
        way.step(Clock())
        yield
    finally:
        way.end()


def _measure_turn(way: Way, found: Measured, *, steps: int, device: torch.device) -> None:
    with _begun(way):
        finish(device)
        clock = Clock()
        for _ in tqdm(range(steps), desc=way.name):
            found.matched.append(way.step(clock).health.get("matched_share", torch.tensor(torch.nan)))
        finish(device)
        found.seconds.append(clock.elapsed / steps)
        found.wait.append(clock.share("views"))


def work_of(recipe: PretrainRecipe, *, matched: float) -> Work:
    """The arithmetic of a step on one process, with this share of matched patches."""
    config = load_backbone(recipe.backbone).config.backbone_config
    shape = Shape.of(config, recipe)
    rows = Rows.expected(shape, recipe.views, recipe.glare, matched=matched)
    return arithmetic(shape, recipe.views, recipe.glare, rows, images=recipe.batch_size or 1)


def figures(found: Mapping[str, Measured], batch_size: int, work: Work, peak: tuple[float, str]) -> dict[str, Any]:
    """The figures of both ways; those of the plain way begin with ``plain_``."""
    own, plain = found["glare"], found.get("plain")
    speed = batch_size / mean(own.seconds)
    values = _of_way(own, batch_size)
    if plain is not None:
        ratios = [theirs / ours for ours, theirs in zip(own.seconds, plain.seconds, strict=True)]
        values |= {"speedup": mean(ratios), "speedups": ratios}
        values |= {f"plain_{key}": value for key, value in _of_way(plain, batch_size).items()}
    return values | {
        "gflop_per_image": {name: value / 1e9 for name, value in asdict(work).items() if value},
        "flops_per_second": speed * work.total,
        "peak_flops_per_second": peak[0],
        "peak_from": peak[1],
        "flop_utilisation": speed * work.total / peak[0],
    }


def _of_way(found: Measured, batch_size: int) -> dict[str, Any]:
    return {
        "images_per_second": batch_size / mean(found.seconds),
        "data_wait": mean(found.wait),
        "peak_memory_bytes": found.memory,
        "phases_ms": {phase: 1000 * found.phases[phase] for phase in PHASES},
    }
