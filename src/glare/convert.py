"""``glare convert``: a checkpoint of a research repository, or of timm, as a folder that transformers loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from glare import recipes, region_attention
from glare.backbones import read_config, without_pooler
from glare.checkpoint_keys import SOURCES
from glare.checkpoint_layouts import ViTWeights, read_vit
from glare.errors import UserError
from glare.foreign_weights import ROLES, checkpoint_file, listed, read_checkpoint, state_dict_in
from glare.model_names import Place
from glare.modeling_glare import GlareModel
from glare.recipes import option, required
from glare.run_folder import RunFolder
from glare.segmenters import image_processor
from glare.transformers_layout import to_transformers
from glare.views import Normalisation


@dataclass(frozen=True)
class ConvertRecipe:
    """Turn a ViT checkpoint of a research repository, or of timm, into a folder for transformers and --backbone."""

    source: str = required("what wrote the checkpoint", choices=tuple(SOURCES))
    paths: tuple[Path, ...] = required(
        "CHECKPOINT OUTPUT_DIR: a .pth, .pt or .safetensors file, or a folder that holds one, and a new folder",
        positional=True,
    )
    weights: str | None = option(None, "whose, in a file of both; the teacher's where not given", choices=ROLES)
    num_heads: int | None = option(None, "of the attention; width / 64 where not given")

    def __post_init__(self) -> None:
        if len(self.paths) != 2:
            raise ValueError(f"give two paths, CHECKPOINT OUTPUT_DIR; there are {len(self.paths)}")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"num_heads is {self.num_heads}; give at least 1")


def main(argv: Sequence[str]) -> None:
    """Entry point of ``glare convert``."""
    run(recipes.parse(ConvertRecipe, argv, prog="glare convert"))


def run(recipe: ConvertRecipe) -> Path:
    """Read, convert, write, load what was written, and say what became of the file; returns the output folder."""
    checkpoint, output = recipe.paths
    _check_output(output)
    file = checkpoint_file(checkpoint)
    content, where = state_dict_in(read_checkpoint(file), role=recipe.weights)
    vit = read_vit(content, recipe.source, role=recipe.weights, num_heads=recipe.num_heads)
    _check_role(recipe.weights, where, vit)
    config, state = to_transformers(vit)
    with RunFolder(output.parent, write=True).publish(output.name) as folder:
        write(folder, config, state, vit.region_attention)
        model = load_strictly(folder)
    print(f"{file}{f' ({where})' if where else ''} -> {output}")
    print(description(model, vit))
    return output


def _check_output(output: Path) -> None:
    """Raise UserError unless ``output`` may be made, or replaced while it is empty."""
    RunFolder.check(output)
    if output.resolve() == Path.cwd():
        raise UserError("the output is the current folder; give a folder in it, it is made anew as a whole")


def _check_role(role: str | None, where: str, vit: ViTWeights) -> None:
    """Raise UserError where ``--weights`` asks for something that the file does not tell apart."""
    if role is not None and role not in (*where.split("."), *vit.used[0].split(".")):
        raise UserError(f"the checkpoint does not say whether it is teacher or student; leave --weights {role} out")


def write(folder: Path, config: PreTrainedConfig, state: dict[str, Tensor], region: dict[str, Tensor]) -> None:
    """Write into an empty folder what transformers loads, and UDI's region attention where there is one."""
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    processor = image_processor(Normalisation(), size=config.image_size, patch=config.patch_size)
    processor.save_pretrained(folder)
    if region:
        region_attention.write(folder, region)


def load_strictly(folder: Path) -> PreTrainedModel:
    """The model in ``folder``, each tensor of the file in its place and none left to chance, fit for adaptation."""
    place = Place(str(folder))
    options = place.safe_options | without_pooler(read_config(place))
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    problems = {problem: listed(sorted(map(str, keys))) for problem, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"the converted ViT does not load: {problems}")
    backbone: PreTrainedModel = GlareModel.from_backbone(model).backbone
    return backbone


def description(model: PreTrainedModel, vit: ViTWeights) -> str:
    """What was made, and of which of the keys."""
    shape, config = vit.architecture, model.config
    lines = [
        f"{type(model).__name__}: {model.num_parameters():,} parameters, {shape.depth} blocks x {shape.width}, "
        f"{shape.heads} heads, patches of {shape.patch} px, images of {config.image_size} px, "
        f"tokens before the patches: {vit.tokens.prefix.shape[1]}, {config.dtype}".replace("torch.", "")
    ]
    left_out = f" ({listed(vit.left_out, most=4)})" if vit.left_out else ""
    lines.append(f"{len(vit.used)} keys of the file used, {len(vit.left_out)} left out{left_out}")
    if not vit.tokens.prefix.shape[1]:
        lines.append("it has no class token: glare takes the mean of the patches for it")
    if vit.region_attention:
        lines.append(f"the region attention is in {region_attention.FILE}, where glare pretrain looks for it")
    return "\n".join(lines)
