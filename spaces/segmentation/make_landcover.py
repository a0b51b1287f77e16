"""Make the Space's built-in pair: ``python spaces/segmentation/make_landcover.py``, minutes on two cores.

The adaptation is that of ``glare demo`` with narrower adapters. The heads are ridge regressions in closed form, as in
``glare compare``, of the features before and after it on the same labelled scenes: nothing is drawn, so the adapters
are all that differs. Whatever comes out is written, with its scores on unseen scenes.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glare import pretrain
from glare.data.labelled import open_labelled
from glare.data.landcover import parse_landcover
from glare.demo import ADAPTATION
from glare.evaluate import evaluate
from glare.frozen_features import PatchLabels, extract, read_images
from glare.model_names import EMBEDDED
from glare.modeling_glare import GlareModel
from glare.ridge import class_weights, image_moments, solve
from glare.run_folder import RunFolder, atomic_write_json
from glare.segmenters import load_pretrained
from glare.versions import versions
from glare.views import Normalisation
from pairs import ABOUT, ADAPTER, HEADS, LANDCOVER, Segmenter, with_linear_head

RECIPE = {**ADAPTATION, "rank": 16, "seed": 0, "precision": "fp32", "device": "cpu", "report_to": "none"}
LABELLED = "landcover:arid:64:2"
TESTED = "landcover:arid:40:3"
SIDE = 256  # px of a scene
STRENGTH = 1e-3  # of the ridge penalty, a multiple of the mean eigenvalue; the same for both heads
CPU = torch.device("cpu")


def main() -> None:
    """Adapt, fit both heads, measure both models and replace ``landcover/``."""
    with tempfile.TemporaryDirectory() as scratch:
        run = pretrain.run({**RECIPE, "output": Path(scratch) / "adapted"})
        write(run / "adapter")


def write(adapter: Path) -> None:
    """Write ``landcover/``: the adapters, the heads of both models, and what they score."""
    images, labels, _, _ = read_images(open_labelled(LABELLED), patch=8, short_side=SIDE, strict=True)
    weights: dict[str, Tensor] = {}
    miou: dict[str, float] = {}
    for name, backbone in (("before", EMBEDDED), ("after", str(adapter))):
        vit, normalise = load_pretrained(backbone)
        head = fit_head(vit, normalise, images, labels)
        weights |= {f"{name}.{key}": value for key, value in head.items()}
        miou[name] = score(with_linear_head(vit, normalise, head))
    about = {
        "unlabelled": len(parse_landcover(RECIPE["data"])),
        "labelled": len(parse_landcover(LABELLED)),
        "tested": len(parse_landcover(TESTED)),
        "tested_on": TESTED,
        "miou": miou,
        "versions": versions(),
    }
    with RunFolder(LANDCOVER.parent, write=True).publish(LANDCOVER.name) as folder:
        (folder / ADAPTER.name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / ADAPTER.name / file).write_bytes((adapter / file).read_bytes())
        save_file(weights, folder / HEADS.name)
        atomic_write_json(folder / ABOUT.name, about)
    print(f"{LANDCOVER}: mIoU {100 * miou['before']:.1f} before, {100 * miou['after']:.1f} after adaptation")


def fit_head(vit: GlareModel, normalise: Normalisation, images: list[Tensor], labels: PatchLabels) -> dict[str, Tensor]:
    """State of a linear head: the ridge from frozen patch features to the classes of the pixels."""
    features = extract(vit, images, normalise=normalise, device=CPU, autocast=nullcontext).features
    moments = image_moments(features, labels.shares, class_weights([labels.shares]))
    ridge = solve(moments, [STRENGTH])
    weight = ridge.weight[:, 0].T.contiguous()[:, :, None, None]
    return {"classifier.weight": weight, "classifier.bias": ridge.intercept[0].clone()}


def score(segmenter: Segmenter) -> float:
    """The mIoU on the unseen scenes."""
    scores, _ = evaluate(segmenter.model, open_labelled(TESTED), normalise=segmenter.normalise)
    return scores.miou


if __name__ == "__main__":
    main()
