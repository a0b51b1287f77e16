"""Procedural aerial scenes with pixel-exact masks in LoveDA's seven classes: the embedded default data set.

About one metre a pixel, seen from straight above. Two domains that differ in season, sensor and settlement:

* `temperate`: summer; strips of crops, a village of pitched red roofs on a winding road, a river or a lake, a
  gravel pit, woods and hedges; a low-noise camera in clear air;
* `arid`: dry season; ochre ground, a dense town of flat pale roofs, a canal with small plots, palm groves and
  orchards, pivot fields; longer shadows, warm haze, a sharpened, grainy, striped picture.

The label says what the ground is: a shadow keeps the class of the ground it falls on, garden and street
trees are background, woods, groves and hedges are forest, orchards are agricultural, dirt roads and bridges
are road.
Weights of this package were pre-trained on these scenes: their bytes are pinned by a test.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glare.data.landcover_objects import (
    BACKGROUND,
    CROPS,
    FOREST,
    PALE_ROOFS,
    RED_ROOFS,
    dig,
    drive,
    farmstead,
    flood,
    irrigate,
    mark,
    pave,
    pivot,
    plant,
    rough,
    sample,
    till,
    town,
    village,
)
from glare.data.landcover_render import (
    Canvas,
    Line,
    Map,
    Point,
    Sensor,
    direction,
    expose,
    hues,
    parcels,
    rise,
    winding,
)
from glare.errors import UserError

CLASSES = ("background", "building", "road", "water", "barren", "forest", "agricultural")
PALETTE = hues("ffffff ff0000 ffff00 0000ff 9f81b7 00ff00 ffc380")


def temperate(c: Canvas) -> None:
    """Lay out a summer scene: fields, woods, a quarry, a river, a road with a village, farms and trees."""
    half = c.size / 2
    angle = c.draw(0, 2 * math.pi)
    road = winding(c, angle, c.draw(-0.3, 0.3) * half, pitch=110, bend=26)
    river = winding(c, angle + c.draw(1.0, 2.1), c.draw(-1.15, 1.15) * half, pitch=80, bend=34)
    road_d, road_u = road.measure(c)
    river_d, _ = river.measure(c)
    width = c.draw(8, 16) + 4 * c.noise(70, 2)
    at = (c.draw(-half, half), c.draw(-half, half))
    lake = c.draw(-20, 48) * (1 + 0.3 * c.noise(40, 2)) - c.segment(at, (at[0] + 16, at[1] + c.draw(-16, 16)))
    shore = np.minimum(np.abs(river_d) - width, -np.minimum(lake, np.abs(road_d) - 10))
    places = [c.draw(-0.7, 0.7) * half for _ in range(4)]
    home = max(places, key=lambda place: sample(c, shore, road.point(place, 0)[0]))
    space = np.minimum(np.abs(road_d) - 5, shore - 4)
    countryside(c, road, (road_d > 0) != (river_d > 0), space)
    bars = 11 * rise(c.noise(48, 2), 0.15, 0.6) * (river_d > 0)
    dig(c, bars - shore, (192, 184, 168), step=0)
    flood(c, -shore, (62, 84, 84) if c.draw(0, 1) < 0.7 else (84, 104, 92))
    pave(c, c.draw(3.0, 4.4) - np.abs(road_d), (126, 126, 130), shoulder=(158, 154, 122))
    mark(c, road_d, road_u)
    streets = village(c, road, home, space)
    for k in range(3):
        farmstead(c, road.point, home + (-1, 1, 1.6)[k] * c.draw(100, 130), RED_ROOFS)
    drive(c, road.point, (-half, half), 1.7)
    scattered = 0.012 * (shore > 0) + 0.30 * (streets < 34)
    density = np.where(c.label == FOREST, 0.97, scattered) + 0.5 * (np.abs(shore - 5) < 3)
    season = c.draw(0, 1)
    leaves = (48 + 12 * season, 74, 38), (88 + 26 * season, 116, 54)
    plant(c, density, np.where(c.label == FOREST, 5.4, 3.6), leaves=leaves, pitch=7, tall=8.0)


def countryside(c: Canvas, road: Line, side: NDArray[np.bool_], space: Map) -> None:
    """Lay fields in two directions, and where there is `space` (px) tracks, hedges, woods, a pit."""
    u, v = c.turned(road.axis)
    other = c.turned(direction(c.draw(0.4, 1.2)))
    bend = 10 * c.noise(130)
    u, v = np.where(side, u, other[1]) + bend, np.where(side, v, other[0]) + bend
    plots = parcels(c, u, v, length=(16, 48), depth=(58, 100))
    till(c, plots, np.full_like(space, 9), CROPS)
    trait = c.table(plots.count, 2)
    grass = (0.5 - (trait[plots.id, 0] > 0.13)) * 20
    c.lay(BACKGROUND, grass, rough(c, (118, 138, 76), 0.10))
    woods = np.minimum(14 * c.noise(90, 3) - 6, space - 8)
    woods = np.maximum(woods, (0.5 - (trait[plots.id, 1] > 0.06)) * 20)
    lines = trait[plots.row + (2 * plots.across > plots.depth), 0]
    woods = np.maximum(woods, np.where(lines > 0.5, 2.2 - plots.front, -9))
    c.lay(FOREST, np.minimum(woods, space - 6), rough(c, (56, 74, 42), 0.08))
    pave(c, np.where(lines < 0.4, 1.9 - plots.front, -9), (182, 166, 136), shoulder=(130, 142, 84))
    if c.draw(0, 1) < 0.75:
        at = (c.draw(-0.9, 0.9) * c.size / 2, c.draw(-0.9, 0.9) * c.size / 2)
        pit = c.draw(24, 44) * (1 + 0.3 * c.noise(36, 2)) - c.segment(at, (at[0] + c.draw(5, 40), at[1] + 10))
        dig(c, np.minimum(pit, space - 4), (188, 174, 150), step=9)


def desert(c: Canvas) -> None:
    """Lay bare ground and rock, and dry scrub on the background parts."""
    dig(c, np.full((c.size, c.size), 9, np.float32), (200, 168, 124), step=0)
    scrub = 18 * c.noise(100, 3) + c.draw(-6, 6)
    c.lay(BACKGROUND, scrub, rough(c, (188, 162, 122), 0.05))


def arid(c: Canvas) -> None:
    """Lay out a dry scene: desert, a canal with plots and groves, pivot fields, a town on a highway."""
    half = c.size / 2
    angle = c.draw(0, 2 * math.pi)
    canal = winding(c, angle, c.draw(-0.7, 0.7) * half, pitch=140, bend=16)
    highway = winding(c, angle + c.draw(1.1, 2.0), c.draw(-0.6, 0.6) * half, pitch=150, bend=14)
    canal_d, _ = canal.measure(c)
    highway_d, highway_u = highway.measure(c)
    water = c.draw(4.5, 9.5) - np.abs(canal_d)
    place = c.draw(-0.6, 0.6) * half
    home, radius = highway.point(place, 0)[0], c.draw(54, 120)
    desert(c)
    belt = c.draw(40, 84) + 12 * c.noise(40, 2) - np.abs(canal_d + c.draw(-24, 24))
    for _ in range(10):
        at, reach = (c.draw(-half, half), c.draw(-half, half)), c.draw(32, 56)
        clear = min(abs(sample(c, highway_d, at)) - 6, math.dist(at, home) - radius, -sample(c, belt, at))
        if clear > reach:
            pivot(c, at, reach)
    irrigate(c, canal, belt)
    c.lay(BACKGROUND, water + 3.5, rough(c, (196, 184, 160), 0.05))
    flood(c, water, (100, 126, 118) if c.draw(0, 1) < 0.6 else (128, 124, 96))
    warp = 5 * c.noise(170)
    town(c, highway_u - place + warp, highway_d + warp, radius, np.minimum(np.abs(highway_d) - 7, -water - 6))
    pave(c, c.draw(3.4, 4.8) - np.abs(highway_d), (146, 140, 134), shoulder=(190, 170, 138))
    mark(c, highway_d, highway_u)
    for _ in range(3):
        farmstead(c, highway.point, c.draw(-half, half), PALE_ROOFS)
    drive(c, highway.point, (-half, half), 1.9)
    grove = c.label == FOREST
    density = np.where(grove, 0.93, np.where(c.label == BACKGROUND, 0.30, 0.0))
    plant(c, density, np.where(grove, 3.4, 1.5), leaves=((62, 80, 48), (102, 116, 68)), pitch=6, tall=5.0)


SENSORS = {
    "temperate": Sensor(
        drop=(0.75, 1.25),
        shade=(0.42, 0.48, 0.60),
        air=(170, 186, 206),
        haze=(0.0, 0.10),
        gain=(0.98, 1.22),
        cast=0.03,
        blur=(0.04, 0.12),
        sharpen=0.0,
        grain=(1.5, 4.0),
        stripes=0.0,
    ),
    "arid": Sensor(
        drop=(0.50, 0.80),
        shade=(0.50, 0.47, 0.50),
        air=(222, 204, 174),
        haze=(0.08, 0.24),
        gain=(0.94, 1.12),
        cast=0.03,
        blur=(0.14, 0.22),
        sharpen=0.5,
        grain=(3.0, 6.0),
        stripes=3.0,
    ),
}
LAYOUTS: dict[str, tuple[Callable[[Canvas], None], Point]] = {
    "temperate": (temperate, (0.9, 1.6)),
    "arid": (arid, (3.2, 4.1)),
}
DOMAINS = tuple(LAYOUTS)


@dataclass(frozen=True)
class Scene:
    """An aerial picture: `image` (h, w, 3) uint8 RGB and `label` (h, w) uint8, an index into CLASSES."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def _check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise UserError(f"landcover has no domain {domain!r}; choose one of {', '.join(DOMAINS)}")


def scene(domain: str, seed: int, *, index: int = 0, size: int = 256) -> Scene:
    """Return scene `index` of series `seed` of a domain, `size` px square: the same bytes on every machine.

    A larger size shows more ground at the same scale, not the same ground; UserError for an unknown domain.
    """
    _check_domain(domain)
    entropy = np.random.SeedSequence([DOMAINS.index(domain), seed, index])
    rng = np.random.Generator(np.random.PCG64(entropy))
    layout, (low, high) = LAYOUTS[domain]
    canvas = Canvas(rng, size, low + (high - low) * float(rng.random()))
    layout(canvas)
    return Scene(expose(canvas, SENSORS[domain]), canvas.label)


class LandcoverSource:
    """`count` scenes of a domain, with or without their labels; series of different `seed` share no scene.

    UserError for an unknown domain, a count below 1 or a seed that is not of 32 bits.
    """

    classes = CLASSES
    palette = PALETTE
    ignore_index = 255

    def __init__(self, domain: str, count: int, seed: int = 0, size: int = 256) -> None:
        _check_domain(domain)
        if count < 1:
            raise UserError(f"landcover was asked for {count} scenes; ask for at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"landcover was given the seed {seed}; use a number from 0 to {2**32 - 1}")
        self.domain, self.count, self.seed, self.size = domain, count, seed, size

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        """Return the name of scene i, such as temperate_000012."""
        return f"{self.domain}_{i:06d}"

    def read(self, i: int) -> Image.Image:
        """Return the picture (RGB, 8 bit) of scene i; IndexError if there is none."""
        return self.read_labelled(i)[0]

    def read_labelled(self, i: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Return the picture of scene i and its label (h, w); IndexError if there is none."""
        if not 0 <= i < self.count:
            raise IndexError(f"scene {i} of {self.count}")
        made = scene(self.domain, self.seed, index=i, size=self.size)
        return Image.fromarray(made.image), made.label


def parse_landcover(text: str) -> LandcoverSource:
    """Return the source that "landcover:<domain>[:count[:seed]]" names; without numbers 64 scenes of seed 0.

    UserError for any other text, an unknown domain or a count of 0.
    """
    kind, *parts = text.split(":")
    domain, count, seed = (*parts, *("", "64", "0")[len(parts) :])[:3]
    if kind != "landcover" or len(parts) > 3 or not (count.isdecimal() and seed.isdecimal()):
        form = "landcover:<domain>[:count[:seed]] with whole numbers"
        raise UserError(f"{text!r} is not {form}; write for example landcover:{DOMAINS[0]}:64:0")
    return LandcoverSource(domain, int(count), int(seed))
