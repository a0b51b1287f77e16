"""Views made in the ordinary manner of research code, against which ``glare.views`` is measured.

Workers of a DataLoader decode each file at every visit and cut, colour and blur its views one by one with Pillow, as
the augmentations of DINO and iBOT do through torchvision. Distributions are those of ``glare.views``, draws are not:
they depend on the seed and on how many samples came before, whatever the number of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from glare.data.opening import open_picture
from glare.draws import Draws
from glare.geometry import Crop, random_resized_crops
from glare.patch_augmentation import augment_patches, sample_patch_mask
from glare.runtime import epoch_batches, seeded
from glare.views import BLUR_SIGMA_PX, NUM_GLOBAL, Normalisation, ViewConfig, Views

Visit = tuple[int, int]
"""(number of samples before this one in the run, index of the image)."""

ENHANCERS: tuple[Callable[[Image.Image], ImageEnhance._Enhance], ...] = (
    ImageEnhance.Brightness,
    ImageEnhance.Contrast,
    ImageEnhance.Color,
)


@dataclass(frozen=True)
class LoadedViews(Views):
    """Views as a DataLoader gives them, on the CPU; it pins them by ``pin_memory``."""

    def pin_memory(self) -> Self:
        """The same views in page-locked memory, from which a copy to a GPU need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        """The same views on ``device``; the copy of pinned ones goes on while Python does."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{field.name: _mapped(getattr(self, field.name), change) for field in fields(self)})


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A field of ``Views`` with its tensors changed."""
    if isinstance(value, Crop):
        return Crop(change(value.offset), change(value.scale))
    return change(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class ImageViews(Dataset[LoadedViews]):
    """All views of one image file, decoded anew at every visit: Views with b = 1."""

    paths: Sequence[Path]
    config: ViewConfig
    patch_size: int
    normalise: Normalisation
    seed: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, visit: Visit) -> LoadedViews:
        number, index = visit
        config, generator = self.config, seeded(self.seed, number)
        with open_picture(self.paths[index]) as file:
            image = file.convert("RGB")
        global_, global_crops = self._views(
            image, range(NUM_GLOBAL), area=config.global_area, side=config.global_size, generator=generator
        )
        local, local_crops = self._views(
            image, [NUM_GLOBAL] * config.num_local, area=config.local_area, side=config.local_size, generator=generator
        )
        grid = (config.global_size // self.patch_size, config.global_size // self.patch_size)
        mask = sample_patch_mask(
            Draws(generator, NUM_GLOBAL),
            grid,
            prob=config.patch_prob if config.patch_augmentation != "none" else 0.0,
            ratio=config.patch_ratio,
            block=config.patch_sampling == "block",
        )
        augmented = torch.stack([self._augment(*pair, generator) for pair in zip(global_, mask, strict=True)])
        pixels = [views.unsqueeze(1) for views in (global_, augmented, local)]
        return LoadedViews(pixels[0], pixels[1], pixels[2], global_crops, local_crops, mask.unsqueeze(1), grid)

    def _views(
        self,
        image: Image.Image,
        kinds: Sequence[int],
        *,
        area: tuple[float, float],
        side: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Crop]:
        """Views of one size (len(kinds), 3, side, side), and where they were cut (len(kinds), 1, 2)."""
        size_px = torch.tensor([image.size]).expand(len(kinds), 2)
        draws = Draws(generator, len(kinds))
        crops = random_resized_crops(size_px, area=area, flip_prob=self.config.flip_prob, draws=draws)
        views = torch.empty(len(kinds), 3, side, side)
        for place, kind in enumerate(kinds):
            view = photometric(cut(image, crops[place], side=side), self.config, kind=kind, generator=generator)
            views[place] = self.normalise(_to_tensor(view))
        return views, Crop(crops.offset.unsqueeze(1), crops.scale.unsqueeze(1))

    def _augment(self, view: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """One view (3, h, w) with the patches of ``mask`` (n,) changed."""
        return augment_patches(
            view.unsqueeze(0),
            mask.unsqueeze(0),
            kind=self.config.patch_augmentation,
            patch_size=self.patch_size,
            blur_sigma=self.config.patch_blur_sigma,
            generators=[generator],
        ).squeeze(0)


def cut(image: Image.Image, crop: Crop, *, side: int) -> Image.Image:
    """One crop (2,), resized to a square of ``side`` px; ``glare.crops.cut`` gives the same up to rounding."""
    edges_px = torch.stack([crop.offset, crop.offset + crop.scale]) * torch.tensor(image.size)
    left, top = edges_px.amin(dim=0).round().int().tolist()
    right, bottom = edges_px.amax(dim=0).round().int().tolist()
    # not resize(box=...), whose filter reads beyond the box
    view = image.crop((left, top, right, bottom)).resize((side, side), Image.Resampling.BICUBIC)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.scale[0] < 0 else view


def photometric(image: Image.Image, config: ViewConfig, *, kind: int, generator: torch.Generator) -> Image.Image:
    """Colour jitter, grey, blur and solarisation; ``kind`` is 0 or 1 for the global views, 2 for local ones."""

    def chosen(prob: float) -> bool:
        return float(torch.rand((), generator=generator)) < prob

    if chosen(config.jitter_prob):
        image = jitter(image, config.jitter, generator=generator)
    if chosen(config.grey_prob):
        image = ImageOps.grayscale(image).convert("RGB")
    if chosen(config.blur_prob[kind]):
        low, high = BLUR_SIGMA_PX
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    if chosen(config.solarize_prob[kind]):
        image = ImageOps.solarize(image)
    return image


def jitter(
    image: Image.Image, strength: tuple[float, float, float, float], *, generator: torch.Generator
) -> Image.Image:
    """Brightness, contrast, saturation and hue by random amounts, in random order, as torchvision's ColorJitter."""
    draws = (2 * torch.rand(4, generator=generator) - 1) * torch.tensor(strength)
    for number in torch.randperm(4, generator=generator).tolist():
        change = float(draws[number])
        if number < len(ENHANCERS):
            image = ENHANCERS[number](image).enhance(max(0.0, 1 + change))
        else:
            image = turn_hue(image, change)
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """The hue turned by a share of the full circle, in [-0.5, 0.5]."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(255 * turn)
    turned = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, h, w) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


@dataclass(frozen=True)
class _Visits(Sampler[list[Visit]]):
    """Endless batches of visits, in the order of ``epoch_batches``."""

    count: int
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[list[Visit]]:
        for step, batch in enumerate(epoch_batches(self.count, self.batch_size, seed=self.seed)):
            yield list(enumerate(batch.tolist(), start=step * self.batch_size))


def collate(samples: Sequence[Views]) -> LoadedViews:
    """Samples of one image each as a batch, view-major."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(sample, name) for sample in samples], dim=1)

    def crops(name: str) -> Crop:
        found: list[Crop] = [getattr(sample, name) for sample in samples]
        return Crop(torch.cat([crop.offset for crop in found], dim=1), torch.cat([crop.scale for crop in found], dim=1))

    return LoadedViews(
        joined("global_"),
        joined("augmented"),
        joined("local"),
        crops("global_crops"),
        crops("local_crops"),
        joined("patch_mask"),
        samples[0].grid,
    )


def view_loader(
    paths: Sequence[Path],
    config: ViewConfig,
    *,
    patch_size: int,
    normalise: Normalisation,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader[LoadedViews]:
    """Endless batches of views of image files, in the order of ``runtime.epoch_batches``; every pass starts anew.

    The workers live on between passes; 0 of them decode in the process itself. ``pin_memory``: for a GPU.
    """
    return DataLoader(
        ImageViews(paths, config, patch_size, normalise, seed),
        batch_sampler=_Visits(len(paths), batch_size, seed),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=seeded(seed),  # of the workers' seeds, which nothing here uses; else the global one would be drawn on
    )
