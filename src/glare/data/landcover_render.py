"""The brushes of the landcover generator: noise, winding lines, parcels, roofs, tree crowns, light, sensor.

Everything is arithmetic that IEEE 754 fixes to the last bit (+ - * / sqrt floor, comparisons, look-ups): a
wave is two parabolas, directions are rounded to six digits, all randomness is from `Generator.random`. So a
scene is the same bytes on every machine. Points are px from the centre of the scene (x to the right, y down),
colours are 0..255.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Colour = tuple[float, float, float]
Point = tuple[float, float]


def direction(angle: float) -> Point:
    """Return the unit vector at `angle` radians, rounded so that no libm differs."""
    return round(math.cos(angle), 6), round(math.sin(angle), 6)


def tone(colour: Colour) -> Map:
    """Return a colour as an array (3, 1, 1)."""
    return np.array(colour, np.float32)[:, None, None]


def hues(text: str) -> tuple[tuple[int, int, int], ...]:
    """Return the colours that a text lists as hexadecimal RRGGBB."""
    return tuple((int(word[:2], 16), int(word[2:4], 16), int(word[4:], 16)) for word in text.split())


def wave(phase: Map) -> Map:
    """Return a smooth periodic wave of period 1 and range [-1, 1], two parabolas instead of a sine."""
    t = (phase - np.floor(phase)) * 2 - 1
    curve: Map = 4 * t * (1 - np.abs(t))
    return curve


def rise(values: Map, low: float, high: float) -> Map:
    """Return the ramp that is 0 up to `low` and 1 from `high` on."""
    ramp: Map = np.clip((values - low) / (high - low), 0, 1)
    return ramp


def shifted(values: Map, dx: int, dy: int) -> Map:
    """Return the map (..., h, w) whose pixel (x, y) is `values` at (x + dx, y + dy); borders are repeated."""
    height, width = values.shape[-2:]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    return values.take(rows, -2).take(np.clip(np.arange(width) + dx, 0, width - 1), -1)


class Canvas:
    """A scene in the making: `label` (h, w) uint8, `albedo` (3, h, w), `height` (h, w) in px."""

    def __init__(self, rng: np.random.Generator, size: int, sun_angle: float) -> None:
        axis = np.arange(size, dtype=np.float32) + np.float32(0.5 - size / 2)
        self.rng, self.size, self.sun = rng, size, direction(sun_angle)
        self.x, self.y = axis[None, :], axis[:, None]
        self.label = np.zeros((size, size), np.uint8)
        self.albedo = np.zeros((3, size, size), np.float32)
        self.height = np.zeros((size, size), np.float32)
        self.blotches = self.noise(32, 4)
        self.speckles = self.table(size, size) * 2 - 1

    def draw(self, low: float, high: float) -> float:
        """Return a uniform number of [low, high)."""
        return low + (high - low) * float(self.rng.random())

    def table(self, *shape: int) -> Map:
        """Return uniform numbers of [0, 1)."""
        return self.rng.random(shape, dtype=np.float32)

    def noise(self, cell: float, octaves: int = 1) -> Map:
        """Return smooth noise (h, w) of about [-1, 1] with bumps of `cell` px and, by octaves, finer ones."""
        total, weight = self._bumps(cell), 1.0
        for _ in range(1, octaves):
            cell, weight = cell / 2, weight / 2
            total += np.float32(weight) * self._bumps(cell)
        return total

    def _bumps(self, cell: float) -> Map:
        count = int(self.size / cell) + 3
        lattice = self.table(count, count) * 2 - 1
        place = (np.arange(self.size) / cell + self.draw(0, 1)).astype(np.float32)
        index = place.astype(np.intp)
        t = place - index.astype(np.float32)
        t = t * t * (3 - 2 * t)
        rows = lattice[index] + t[:, None] * (lattice[index + 1] - lattice[index])
        left = rows[:, index]
        return left + t * (rows[:, index + 1] - left)

    def paint(self, alpha: Map, colour: Map) -> None:
        """Blend `colour` (3, 1, 1) or (3, h, w) over the albedo with opacity `alpha` (h, w) in [0, 1]."""
        self.albedo += alpha * (colour - self.albedo)

    def lay(self, kind: int, inside: Map, colour: Map) -> None:
        """Paint and label a surface; `inside` is the distance in px to its edge, positive inside."""
        self.paint(np.clip(inside + 0.5, 0, 1), colour)
        self.label[inside > 0] = kind

    def segment(self, start: Point, end: Point) -> Map:
        """Return the distance (h, w) of each pixel to a straight segment."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        x, y = self.x - start[0], self.y - start[1]
        t = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
        x, y = x - t * dx, y - t * dy
        return np.asarray(np.sqrt(x * x + y * y))

    def turned(self, axis: Point) -> tuple[Map, Map]:
        """Return the coordinates (h, w) of each pixel along `axis` and across it."""
        return self.x * axis[0] + self.y * axis[1], self.y * axis[0] - self.x * axis[1]


@dataclass(frozen=True)
class Line:
    """A winding line, across = spline(along) in the frame of `axis`; `pieces` (n, 4) are cubics."""

    axis: Point
    pieces: Map
    pitch: float

    def at(self, along: Map) -> tuple[Map, Map]:
        """Return where the line is across its axis, and its slope, for places along the axis (any shape)."""
        place = np.clip(along / self.pitch + len(self.pieces) / 2, 0, len(self.pieces) - 0.001)
        index = place.astype(np.intp)
        t = place - index.astype(np.float32)
        a, b, c, d = (self.pieces[index, k] for k in range(4))
        return a + t * (b + t * (c + t * d)), (b + t * (2 * c + 3 * t * d)) / np.float32(self.pitch)

    def measure(self, canvas: Canvas) -> tuple[Map, Map]:
        """Return the signed distance (h, w) of each pixel to the line, and its place along the axis."""
        along, across = canvas.turned(self.axis)
        middle, slope = self.at(along)
        return (across - middle) / np.sqrt(1 + slope * slope), along

    def point(self, along: float, aside: float) -> tuple[Point, Point]:
        """Return the point `aside` px off the line at a place along it, and the heading of the line there."""
        middle, slope = (float(value[0]) for value in self.at(np.array([along], np.float32)))
        length = math.sqrt(1 + slope * slope)
        c, s = self.axis
        u, v = along - aside * slope / length, middle + aside / length
        return (u * c - v * s, u * s + v * c), ((c - s * slope) / length, (s + c * slope) / length)


def winding(canvas: Canvas, angle: float, offset: float, *, pitch: float, bend: float) -> Line:
    """Draw a line at `angle` radians, `offset` px off the centre, that wanders by `bend` every `pitch` px."""
    knots = offset + bend * (canvas.table(int(1.5 * canvas.size / pitch) + 6) * 2 - 1)
    p, q, r, s = knots[:-3], knots[1:-2], knots[2:-1], knots[3:]
    pieces = np.stack([p + 4 * q + r, 3 * (r - p), 3 * (p - 2 * q + r), s - 3 * r + 3 * q - p], axis=1) / 6
    return Line(direction(angle), pieces.astype(np.float32), pitch)


@dataclass(frozen=True)
class Parcels:
    """A division of the plane: of each pixel the cell (`id` < `count`), its row, px from its edges."""

    count: int
    id: NDArray[np.intp]
    row: NDArray[np.intp]
    along: Map
    across: Map
    length: Map
    depth: Map

    @property
    def side(self) -> Map:
        """Distance in px to the nearer of the two edges that the neighbours in the row share."""
        return np.minimum(self.along, self.length - self.along)

    @property
    def front(self) -> Map:
        """Distance in px to the nearer of the two edges of the row."""
        return np.minimum(self.across, self.depth - self.across)


def parcels(canvas: Canvas, u: Map, v: Map, *, length: Point, depth: Point) -> Parcels:
    """Cut the plane into rows of random `depth` (low, high) px in v, those into cells of `length` px in u."""
    reach, stride = 1.05 * canvas.size + 60, 1e6
    rows = int(2 * reach / depth[0]) + 2
    cells = int((2 * reach + length[1]) / length[0]) + 2
    row_edges = np.cumsum(depth[0] + (depth[1] - depth[0]) * canvas.rng.random(rows)) - reach - depth[1]
    row = np.clip(np.searchsorted(row_edges, v) - 1, 0, rows - 2)
    steps = length[0] + (length[1] - length[0]) * canvas.rng.random((rows, cells))
    edges = np.cumsum(steps, axis=1) - steps[:, :1] * 2 - reach - length[1] * canvas.rng.random((rows, 1))
    keys = (edges + stride * np.arange(rows)[:, None]).ravel()
    index = np.clip(np.searchsorted(keys, u + stride * row) - 1, 0, len(keys) - 2)
    flat = edges.ravel()
    return Parcels(
        count=len(keys),
        id=index,
        row=row,
        along=(u - flat[index]).astype(np.float32),
        across=(v - row_edges[row]).astype(np.float32),
        length=(flat[index + 1] - flat[index]).astype(np.float32),
        depth=(row_edges[row + 1] - row_edges[row]).astype(np.float32),
    )


@dataclass(frozen=True)
class Roof:
    """How a building looks: colour, shape ("flat", "gable" or "hip") and the height of its walls in px."""

    colour: Colour
    shape: str
    walls: float


def build(canvas: Canvas, at: Point, half: Point, heading: Point, roof: Roof, kind: int) -> None:
    """Put a rectangular building of half sizes `half` px, the first along `heading`, and label it `kind`."""
    reach = math.sqrt(half[0] * half[0] + half[1] * half[1]) + 2
    centre = canvas.size / 2
    columns, rows = (slice(max(0, int(centre + p - reach)), max(0, int(centre + p + reach) + 1)) for p in at)
    x, y = canvas.x[:, columns] - at[0], canvas.y[rows] - at[1]
    a, b = x * heading[0] + y * heading[1], y * heading[0] - x * heading[1]
    ends, sides = half[0] - np.abs(a), half[1] - np.abs(b)
    inside = np.minimum(ends, sides)
    facing_side = np.sign(b) * (canvas.sun[1] * heading[0] - canvas.sun[0] * heading[1])
    facing_end = np.sign(a) * (canvas.sun[0] * heading[0] + canvas.sun[1] * heading[1])
    light, top = 1 + 0.08 * rise(1.6 - inside, 0, 1), np.full_like(inside, roof.walls)
    if roof.shape != "flat":
        hip = ends < sides if roof.shape == "hip" else np.zeros_like(inside, np.bool_)
        light = 1 + 0.24 * np.where(hip, facing_end, facing_side) + 0.12 * rise(1 - np.abs(b), 0, 1)
        top = roof.walls + 0.7 * np.where(hip, ends, sides)
    light = light + 0.07 * (canvas.table(*inside.shape) - 0.5)
    alpha = np.clip(inside + 0.5, 0, 1)
    canvas.albedo[:, rows, columns] += alpha * (tone(roof.colour) * light - canvas.albedo[:, rows, columns])
    canvas.label[rows, columns][inside > 0] = kind
    np.copyto(canvas.height[rows, columns], top.astype(np.float32), where=inside > 0)


@dataclass(frozen=True)
class Crowns:
    """Tree crowns: `dome` in [0, 1], 0 = no tree; `light` and `tint` in [-1, 1]; `rooted` as in `crowns`."""

    dome: Map
    light: Map
    tint: Map
    rooted: Mask


def crowns(canvas: Canvas, density: Map, radius: Map, rooted: Mask, pitch: int) -> Crowns:
    """Plant at most one tree a cell of `pitch` px; maps (h, w) give chance and radius (px) at the trunk.

    The radius must stay below 0.87 `pitch`; `rooted` of the result marks crowns whose trunk is on `rooted`.
    """
    n = -(-canvas.size // pitch)
    jitter = canvas.table(4, n + 2, n + 2)
    cell = np.arange(-1, n + 1, dtype=np.float32) * pitch
    trunk_y, trunk_x = cell[:, None] + jitter[0] * pitch, cell[None, :] + jitter[1] * pitch
    row = np.clip(trunk_y.astype(np.intp), 0, canvas.size - 1)
    column = np.clip(trunk_x.astype(np.intp), 0, canvas.size - 1)
    size = np.maximum(radius[row, column] * (0.75 + 0.4 * jitter[2]), 0.7)
    alive, ground = jitter[3] < density[row, column], rooted[row, column]
    inverse = np.where(alive, 1 / size, 0)
    tints = canvas.table(n + 2, n + 2) * 2 - 1
    pixel = (np.arange(n * pitch, dtype=np.float32) + 0.5).reshape(n, pitch)
    shape = (n, pitch, n, pitch)
    dome, light, tint = (np.zeros(shape, np.float32) for _ in range(3))
    stands = np.zeros(shape, np.bool_)
    for i, j in ((i, j) for i in range(3) for j in range(3)):
        block = np.s_[i : i + n, None, j : j + n, None]
        scale = inverse[block]
        dy = (pixel[:, :, None, None] - trunk_y[block]) * scale
        dx = (pixel[None, None] - trunk_x[block]) * scale
        top = (1 - dx * dx - dy * dy) * (scale > 0)
        better = top > dome
        np.copyto(dome, top, where=better)
        np.copyto(light, dx * canvas.sun[0] + dy * canvas.sun[1], where=better)
        np.copyto(tint, tints[block], where=better)
        np.copyto(stands, ground[block], where=better)
    scene = np.s_[: canvas.size, : canvas.size]
    side = (n * pitch, n * pitch)
    dome, light, tint = (part.reshape(side)[scene] for part in (dome, light, tint))
    return Crowns(dome, light, tint, stands.reshape(side)[scene])


def relief(canvas: Canvas, bumps: Map, strength: float) -> Map:
    """Return the light factor (h, w) of a rough ground with heights `bumps`, lit from the side of the sun."""
    slope_x = shifted(bumps, 1, 0) - shifted(bumps, -1, 0)
    slope_y = shifted(bumps, 0, 1) - shifted(bumps, 0, -1)
    return 1 - np.float32(strength) * np.clip(slope_x * canvas.sun[0] + slope_y * canvas.sun[1], -1, 1)


def cast_shadows(canvas: Canvas, drop: float) -> Map:
    """Return how much of each pixel (h, w) something higher shades; light falls by `drop` px a px."""
    reach = int(float(canvas.height.max()) / drop) + 1
    occluder = np.zeros_like(canvas.height)
    for step in range(1, min(reach, 24) + 1):
        above = shifted(canvas.height, round(step * canvas.sun[0]), round(step * canvas.sun[1]))
        np.maximum(occluder, above - np.float32(step * drop), out=occluder)
    return rise(occluder - canvas.height, 0.1, 1.1)


@dataclass(frozen=True)
class Sensor:
    """What a camera and its air do to a scene; pairs are ranges from which each scene draws."""

    drop: Point
    shade: Colour
    air: Colour
    haze: Point
    gain: Point
    cast: float
    blur: Point
    sharpen: float
    grain: Point
    stripes: float


def smooth(values: Map, weight: float) -> Map:
    """Return `values` (3, h, w) blurred with the taps (weight, 1 - 2 weight, weight) along both axes."""
    for dx, dy in ((0, 1), (1, 0)):
        both = shifted(values, dx, dy) + shifted(values, -dx, -dy)
        values = values + np.float32(weight) * (both - 2 * values)
    return values


def expose(canvas: Canvas, sensor: Sensor) -> NDArray[np.uint8]:
    """Take the picture (h, w, 3): cast shadows, light, haze, blur, sharpening, noise, stripes."""
    shadow = cast_shadows(canvas, canvas.draw(*sensor.drop))
    image: Map = canvas.albedo * (1 - shadow * (1 - tone(sensor.shade)))
    tilt = 1 + 0.05 * (canvas.x * canvas.draw(-1, 1) + canvas.y * canvas.draw(-1, 1)) / (canvas.size / 2)
    cast = 1 + sensor.cast * (canvas.table(3) * 2 - 1)
    image = image * (np.float32(canvas.draw(*sensor.gain)) * tilt * cast[:, None, None])
    haze = np.float32(canvas.draw(*sensor.haze)) * (1 + 0.35 * canvas.noise(150))
    image = image + haze * (tone(sensor.air) - image)
    image = smooth(image, canvas.draw(*sensor.blur))
    if sensor.sharpen:
        image = image + np.float32(sensor.sharpen) * (image - smooth(image, 0.25))
    size, grain = canvas.size, np.float32(canvas.draw(*sensor.grain))
    speckle = canvas.table(2, size, size)
    image += grain * 2 * (speckle[0] + speckle[1] - 1)
    image += grain * (canvas.table(3, size, size) - 0.5)
    image += np.float32(sensor.stripes) * (canvas.table(1, 1, size) - 0.5)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8).transpose(1, 2, 0).copy()
