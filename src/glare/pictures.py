"""Pictures of what adapting changed: colours of patch features, attention of [CLS], pixels gained and lost."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from glare.figures import Colour, Label, colourise, panel

GAINED: Colour = (0, 158, 115)
LOST: Colour = (213, 64, 20)
"""Of Okabe and Ito's kind: a green and a red that also differ for the colour-blind."""

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Five colours of matplotlib's inferno, from dark to bright."""

CELL = 320  # px
PANEL_WIDTH = 1500  # px that the heads of an attention picture share
RANGE = (0.01, 0.99)  # quantiles that get the darkest and the brightest colour
FLAT = 1e-6  # a component with less than this part of the first one's range is not shown


def pca_colours(before: Tensor, after: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Patch features as colours: the first three principal components of both models' patches together.

    Basis and range are shared, so equal features have equal colours in both pictures. A component's sign is the one
    that makes its largest deviation positive, which no rotation of the features changes.

    Args:
        before: (..., d), such as (rows, columns, d) of one image or (n, rows, columns, d) of several.
        after: (..., d).

    Returns:
        RGB (..., 3) of each.
    """
    rows = torch.cat([before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])]).cpu().double()
    scores = _components(rows - rows.mean(dim=0))
    low, high = scores.quantile(torch.tensor(RANGE, dtype=torch.float64), dim=0)
    reach = high - low
    shown = reach > FLAT * reach[0]
    unit = torch.where(shown, (scores - low) / reach.where(shown, 1.0), 0.5).clamp(0, 1)
    colours = (255 * unit).round().to(torch.uint8).numpy()
    first = before.shape[:-1].numel()
    return colours[:first].reshape(*before.shape[:-1], 3), colours[first:].reshape(*after.shape[:-1], 3)


def _components(centred: Tensor) -> Tensor:
    """(n, d) -> scores (n, 3) on the directions of largest variance, zeros where there are fewer than three."""
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    scores = centred @ vectors.flip(1)[:, :3]
    peaks = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))
    scores = torch.where(peaks < 0, -scores, scores)
    return torch.nn.functional.pad(scores, (0, 3 - scores.shape[1]))


def pca_picture(
    images: Sequence[Image.Image], before: Sequence[Tensor], after: Sequence[Tensor], *, names: Sequence[str]
) -> Image.Image:
    """Image, untouched and adapted patch features side by side, a row an image, all in the same colours.

    ``before`` and ``after``: features (rows, columns, d) of each image, whose grids may differ; ``names`` stand
    beside the rows.
    """
    grids = [tuple(features.shape[:2]) for features in before]
    flat = (torch.cat([features.flatten(0, 1) for features in features_of]) for features_of in (before, after))
    split = np.cumsum([rows * columns for rows, columns in grids])[:-1]
    ours, theirs = (np.split(colours, split) for colours in pca_colours(*flat))
    rows = [
        [image, *(_enlarged(colours.reshape(*grid, 3), image) for colours in pair)]
        for image, grid, *pair in zip(images, grids, ours, theirs, strict=True)
    ]
    return panel(rows, columns=["image", "untouched", "adapted"], row_names=names, cell=CELL)


def _enlarged(colours: NDArray[np.uint8], image: Image.Image) -> Image.Image:
    """A patch map with the shape of its image, patches as squares."""
    size = (CELL, round(CELL * image.height / image.width))
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def attention_picture(image: Image.Image, before: Tensor, after: Tensor) -> Image.Image:
    """What [CLS] attends to in the last block: untouched above adapted, a column a head (as paper Fig. 2).

    ``before`` and ``after``: attention (heads, rows, columns); a head has one scale in both rows, from none to its
    highest attention.
    """
    heads = len(before)
    cell = min(CELL, PANEL_WIDTH // (heads + 1))
    tops = torch.cat([before.flatten(1), after.flatten(1)], dim=1).float().quantile(0.995, dim=1)
    rows = [
        [image, *(_heat(image, attention, float(top), cell) for attention, top in zip(model, tops, strict=True))]
        for model in (before, after)
    ]
    columns = ["image", *(f"head {head}" for head in range(1, heads + 1))]
    return panel(rows, columns=columns, row_names=["untouched", "adapted"], cell=cell)


def _heat(image: Image.Image, attention: Tensor, top: float, width: int) -> Image.Image:
    """Attention (rows, columns) as a heat map over the grey image, strongest colours where it is highest."""
    size = (width, round(width * image.height / image.width))
    strength = (attention.float().cpu() / max(top, 1e-12)).clamp(0, 1).numpy()
    smooth = np.asarray(Image.fromarray(strength).resize(size, Image.Resampling.BILINEAR))
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(smooth, steps, np.array(HEAT)[:, channel]) for channel in range(3)], axis=-1)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)[..., None]
    alpha = 0.55 + 0.35 * smooth[..., None]
    return Image.fromarray((alpha * colours + (1 - alpha) * grey).round().astype(np.uint8))


def change_picture(
    image: Image.Image, label: Label, before: Label, after: Label, classes: Sequence[str], palette: ArrayLike
) -> Image.Image:
    """Image, truth, untouched, adapted, and which pixels adapting gained (green) and lost (red).

    ``label``, ``before`` and ``after``: class indices (h, w) of the image's size; where ``label`` has no class,
    nothing is gained or lost. The legend has the classes that occur.
    """
    known = label < len(classes)
    right = [float((prediction == label)[known].mean()) if known.any() else 0.0 for prediction in (before, after)]
    gained, lost = changes(label, before, after)
    shares = [part[known].mean() if known.any() else 0.0 for part in (gained, lost)]
    maps = [colourise(indices, palette) for indices in (label, before, after)]
    scores = ["", "", *(f"{share:.0%} right" for share in right), f"+{shares[0]:.1%}  -{shares[1]:.1%}"]
    found = np.unique(np.concatenate([indices.ravel() for indices in (label, before, after)]))
    colours = np.asarray(palette).reshape(-1, 3)
    entries: dict[str, Colour] = {"gained": GAINED, "lost": LOST}
    entries |= {
        classes[i]: (int(colours[i][0]), int(colours[i][1]), int(colours[i][2])) for i in found[found < len(classes)]
    }
    return panel(
        [[image, *maps, changed_pixels(image, gained, lost)]],
        columns=["image", "truth", "untouched", "adapted", "what changed"],
        scores=scores,
        legend_entries=entries,
        cell=CELL,
    )


def changes(label: Label, before: Label, after: Label) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels (h, w) that were wrong and are right, and the reverse; none are ignored ones, which nobody predicts."""
    was, now = before == label, after == label
    return ~was & now, was & ~now


def changed_pixels(image: Image.Image, gained: NDArray[np.bool_], lost: NDArray[np.bool_]) -> Image.Image:
    """The image pale and grey, with gained pixels green and lost ones red."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    pixels = np.repeat((160 + 0.35 * grey).clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=2)
    pixels[gained], pixels[lost] = GAINED, LOST
    return Image.fromarray(pixels)
