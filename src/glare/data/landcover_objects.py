"""What the scenes of the landcover generator consist of: fields, water, bare ground, roads, houses, trees.

Each function paints one thing on a canvas, labels its pixels and sets how high they are. "px inside" is the
distance to the thing's edge, positive inside. A site gives the point `along` and `aside` of a road, and the
heading of the road there.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glare.data.landcover_render import (
    Canvas,
    Colour,
    Line,
    Map,
    Parcels,
    Point,
    Roof,
    build,
    crowns,
    direction,
    hues,
    parcels,
    relief,
    rise,
    tone,
    wave,
)

BACKGROUND, BUILDING, ROAD, WATER, BARREN, FOREST, FARM = range(7)

CROPS = hues("68863e 7e984a 56763a 94a058 c8b676 8e745a b6a67c")
DRY_CROPS = hues("6e8046 5a723e 7a8c48 968c58 a48460 b09668 c0a676 ccb486")
RED_ROOFS = hues("ac563e 9a4a3a be6e52 88463c 626064 b8b0a4")
PALE_ROOFS = hues("f2eee6 e0d4be cab696 b0aaa2 ece4d4 bea07c")
LAWNS = hues("708a4a 7c9254 627e42 88925c 968c6c")
CARS = hues("ececec 282a30 96989c 9c2824 344a78")
Site = Callable[[float, float], tuple[Point, Point]]


def pick(shares: Map, colours: tuple[Colour, ...]) -> Map:
    """Return the colours (3, n) that random `shares` (n,) of [0, 1) pick from a list."""
    return np.array(colours, np.float32)[(shares * len(colours)).astype(np.intp)].T


def fine(c: Canvas, strength: float) -> Map:
    """Return a light factor (h, w) around 1 that differs from pixel to pixel."""
    return 1 + np.float32(strength) * c.speckles


def rough(c: Canvas, colour: Colour, strength: float) -> Map:
    """Return the colours (3, h, w) of rough ground: the blotches of the scene, flipped at random."""
    flip = np.s_[:: 1 if c.draw(0, 1) < 0.5 else -1, :: 1 if c.draw(0, 1) < 0.5 else -1]
    return tone(colour) * (1 + np.float32(strength) * c.blotches[flip] + 0.05 * c.speckles[flip])


def sample(c: Canvas, values: NDArray[Any], at: Point) -> float:
    """Return the value of a map (h, w) at a point, the nearest one if the point is outside."""
    column, row = (min(max(int(p + c.size / 2), 0), c.size - 1) for p in at)
    return float(values[row, column])


def beside(start: Point, heading: Point, along: float, aside: float) -> tuple[Point, Point]:
    """Return the point `along` a straight line and `aside` of it, and its heading."""
    x = start[0] + along * heading[0] - aside * heading[1]
    return (x, start[1] + along * heading[1] + aside * heading[0]), heading


def rotated(heading: Point, angle: float) -> Point:
    """Return a heading turned by `angle` radians."""
    turn = direction(angle)
    return heading[0] * turn[0] - heading[1] * turn[1], heading[0] * turn[1] + heading[1] * turn[0]


def till(c: Canvas, plots: Parcels, region: Map, palette: tuple[Colour, ...]) -> None:
    """Lay fields over `region` (px inside): each parcel has its crop, its furrows, tramlines and vigour."""
    trait = c.table(plots.count, 5)
    season = c.draw(0, 0.3)
    colour = pick(0.7 * trait[:, 0] + np.float32(season), palette) * (0.90 + 0.18 * trait[:, 1])
    rows = np.where(trait[plots.id, 2] < 0.75, plots.along, plots.across)
    pitch, depth = 2.6 + 3.0 * trait[:, 3], 0.03 + 0.09 * trait[:, 4] * trait[:, 4]
    furrows = wave(rows / pitch[plots.id]) * depth[plots.id]
    tramlines = 0.12 * rise(wave(rows / 17), 0.93, 0.97)
    vigour = 0.06 * c.noise(26, 3)
    c.lay(FARM, region, colour[:, plots.id] * ((1 + furrows - tramlines + vigour) * fine(c, 0.03)))
    verge = rise(1.8 - np.minimum(plots.side, plots.front), 0, 1.4) * (region > 0)
    c.paint(verge * np.float32(0.5), tone(palette[2]) * 0.92)


def flood(c: Canvas, inside: Map, colour: Colour) -> None:
    """Lay water: a wet dark bank, a pale shallow rim, then smooth depth with a little glitter."""
    c.paint(rise(inside, -3, 0) * np.float32(0.45), tone(colour) * 0.75)
    depth = 1.18 - 0.22 * rise(inside, 0, 9) + 0.04 * c.noise(45, 2)
    c.lay(WATER, inside, tone(colour) * (depth * fine(c, 0.012)))
    np.copyto(c.height, 0, where=inside > 0)


def dig(c: Canvas, inside: Map, colour: Colour, *, step: float) -> None:
    """Lay bare ground, rubble lit from the side; with a `step`, in benches that wide towards its middle."""
    bumps = c.noise(14, 4) * 2 + c.table(c.size, c.size) * 0.5
    if step:
        bumps = 0.6 * bumps - 5 * np.floor(np.maximum(inside, 0) / step + 0.35 * c.noise(24, 2))
    c.lay(BARREN, inside, rough(c, colour, 0.09) * relief(c, bumps, 0.11))


def pave(c: Canvas, inside: Map, colour: Colour, *, shoulder: Colour) -> None:
    """Lay a road with worn edges on a shoulder 2 px wide; where it crosses water it is a bridge."""
    wet = c.label == WATER
    strength = rise(inside, -3.5, 0) * np.where(wet, np.float32(0.4), np.float32(0.6))
    c.paint(strength, np.where(wet, tone((30, 40, 46)), tone(shoulder)))
    c.label[(inside > -2) & (c.label == FARM)] = BACKGROUND
    c.lay(ROAD, inside, rough(c, colour, 0.04))
    np.copyto(c.height, 0, where=inside > 0)


def mark(c: Canvas, distance: Map, along: Map) -> None:
    """Paint the dashed middle line of a paved road."""
    dashes = rise(0.9 - np.abs(distance), 0, 0.9) * rise(wave(along / 11), 0.0, 0.3) * (c.label == ROAD)
    c.paint(dashes * np.float32(0.55), tone((226, 226, 218)))


def drive(c: Canvas, site: Site, span: Point, lane: float) -> None:
    """Put a few cars on a road; the ground below stays road."""
    for _ in range(int(c.draw(1, 7))):
        at, heading = site(c.draw(*span), lane if c.draw(0, 1) < 0.5 else -lane)
        car = Roof(CARS[int(c.draw(0, len(CARS)))], "flat", 1.2)
        if sample(c, c.label, at) == ROAD:
            build(c, at, (2.1, 1.0), heading, car, ROAD)


def free(c: Canvas, at: Point, half: Point, heading: Point) -> bool:
    """Tell whether a building would be centred in the scene and stand on open ground, with 2 px around it."""
    grid = [(i * (half[0] + 2), j * (half[1] + 2)) for i in (-1, -0.33, 0.33, 1) for j in (-1, 0, 1)]
    ground = (sample(c, c.label, beside(at, heading, along, aside)[0]) for along, aside in grid)
    return max(abs(at[0]), abs(at[1])) <= c.size / 2 and all(kind in (BACKGROUND, FARM) for kind in ground)


def house(c: Canvas, at: Point, heading: Point) -> None:
    """Build a dwelling with a pitched roof, sometimes with a wing, where there is room."""
    half = (c.draw(4.6, 7.4), c.draw(3.4, 4.8))
    if c.draw(0, 1) < 0.3:
        heading = (-heading[1], heading[0])
    if not free(c, at, half, heading):
        return
    base = RED_ROOFS[int(min(c.draw(0, 1), c.draw(0, 1.4)) * len(RED_ROOFS))]
    light = c.draw(0.85, 1.15)
    colour = (base[0] * light, base[1] * light, base[2] * light)
    roof = Roof(colour, "hip" if c.draw(0, 1) < 0.35 else "gable", 4.0)
    if c.draw(0, 1) < 0.3:
        corner = beside(at, heading, half[0] - 3.2, half[1])[0]
        build(c, corner, (3.6, 2.8), (-heading[1], heading[0]), roof, BUILDING)
    build(c, at, half, heading, roof, BUILDING)


def settle(c: Canvas, site: Site, span: Point) -> None:
    """Line both sides of a street with houses."""
    for sign in (-1, 1):
        along = span[0] + c.draw(0, 12)
        while along < span[1]:
            at, heading = site(along, sign * c.draw(12, 17))
            if c.draw(0, 1) < 0.88:
                house(c, at, rotated(heading, c.draw(-0.16, 0.16)))
            along += c.draw(14.5, 20)


def farmstead(c: Canvas, site: Site, along: float, roofs: tuple[Colour, ...]) -> None:
    """Put a yard with two or three large sheds off a road, and the drive that leads to it."""
    sign = 1 if c.draw(0, 1) < 0.5 else -1
    centre, heading = site(along, sign * c.draw(34, 46))
    if max(abs(p) for p in centre) > c.size / 2 - 12 or not free(c, centre, (13, 11), heading):
        return
    hall = c.draw(0, 1) < 0.4
    yard = 17 + 3 * c.noise(14) - c.segment(site(along - 8, sign * 36)[0], site(along + 8, sign * 36)[0])
    c.lay(BACKGROUND, yard, rough(c, (142, 140, 138) if hall else (172, 158, 134), 0.05))
    lane = c.segment(site(along, 0)[0], site(along, sign * 26)[0])
    pave(c, 1.8 - lane, (168, 156, 134), shoulder=(150, 150, 110))
    for a, b, half in ((-9, 46, (9.5, 4.6)), (10, 38, (4.8, 8.5)), (-8, 31, (7.0, 3.8))):
        at, turn = site(along + a, sign * b)
        if free(c, at, half, turn):
            colour = (186, 188, 192) if hall else roofs[int(c.draw(0, len(roofs)))]
            build(c, at, half, turn, Roof(colour, "flat" if hall else "gable", 5.0), BUILDING)


def plant(c: Canvas, density: Map, radius: Map, *, leaves: tuple[Colour, Colour], pitch: int, tall: float) -> None:
    """Grow trees of `tall` px; what those cover that stand on forest ground is labelled forest."""
    open_ground = (c.label != BUILDING) & (c.label != ROAD) & (c.label != WATER)
    trees = crowns(c, density * open_ground, radius, c.label == FOREST, pitch)
    ragged = trees.dome + np.float32(0.30) * c.noise(3)
    alpha = rise(ragged, 0.10, 0.38) * (open_ground & (trees.dome > 0))
    dark, bright = (tone(colour) for colour in leaves)
    colour = dark + (bright - dark) * (trees.tint * np.float32(0.5) + np.float32(0.5))
    light = 0.60 + 0.42 * np.sqrt(trees.dome) + 0.34 * trees.light
    c.paint(alpha, colour * (light * fine(c, 0.08)))
    crown = alpha > 0.5
    lofty = np.float32(tall) * np.where(trees.rooted, np.float32(1), np.float32(0.65))
    np.copyto(c.height, lofty * np.sqrt(trees.dome), where=crown)
    c.label[crown & trees.rooted] = FOREST


def gardens(c: Canvas, inside: Map, axis: Point) -> None:
    """Lay the ground of a village: lawns, beds and yards behind each other, parted by low hedges."""
    plots = parcels(c, *c.turned(axis), length=(10, 22), depth=(13, 24))
    ground = pick(c.table(plots.count), LAWNS)[:, plots.id]
    c.lay(BACKGROUND, inside, ground * ((1 + 0.08 * c.noise(12, 3)) * fine(c, 0.06)))
    hedge = rise(1.5 - np.minimum(plots.side, plots.front), 0, 1) * (inside > 0)
    c.paint(hedge * np.float32(0.6), tone((72, 96, 50)))


def village(c: Canvas, road: Line, along: float, space: Map) -> Map:
    """Put a village on a road where there is `space` (px). Return the distance (h, w) to its streets."""
    reach = c.draw(60, 95)
    streets = []
    for sign in (-1, 1):
        start, heading = road.point(along + c.draw(-0.6, 0.6) * reach, 0)
        site = partial(beside, start, rotated(heading, sign * math.pi / 2 + c.draw(-0.25, 0.25)))
        length = c.draw(45, 90)
        wet = [at for at in range(0, 90, 3) if sample(c, c.label, site(at, 0)[0]) == WATER]
        streets.append((site, max(min([length, *(at - 9.0 for at in wet)]), 2.0)))
    spine = [road.point(along + k * reach, 0)[0] for k in (-1, -0.33, 0.33, 1)]
    lanes = [c.segment(site(0, 0)[0], site(length, 0)[0]) for site, length in streets]
    near = np.minimum(lanes[0], lanes[1])
    for start, end in pairwise(spine):
        near = np.minimum(near, c.segment(start, end))
    gardens(c, np.minimum(30 + 8 * c.noise(30, 2) - near, space), road.point(along, 0)[1])
    for distance in lanes:
        pave(c, 2.3 - distance, (150, 148, 146), shoulder=(150, 152, 116))
    settle(c, road.point, (along - reach, along + reach))
    for site, length in streets:
        settle(c, site, (14.0, length))
    return near


def pivot(c: Canvas, at: Point, radius: float) -> None:
    """Lay a round field under a rotating sprinkler: two or three sectors of crops, rings, the arm."""
    x, y = c.x - at[0], c.y - at[1]
    distance = np.sqrt(x * x + y * y)
    crops = pick(c.table(3), DRY_CROPS)
    crops[:, 0] = DRY_CROPS[1]
    cuts = [direction(c.draw(0, 2 * math.pi)) for _ in range(2)]
    sector = (x * cuts[0][1] - y * cuts[0][0] > 0).astype(np.intp) + (x * cuts[1][1] - y * cuts[1][0] > 0)
    light = (1 + 0.05 * wave(distance / c.draw(4, 7)) + 0.05 * c.noise(20, 3)) * fine(c, 0.03)
    c.lay(FARM, radius - distance, crops[:, sector] * light)
    arm = direction(c.draw(0, 2 * math.pi))
    from_arm = c.segment(at, beside(at, arm, radius, 0)[0])
    c.paint(rise(1.1 - from_arm, 0, 1) * 0.5, tone((226, 220, 206)))


def town(c: Canvas, u: Map, v: Map, radius: float, space: Map) -> None:
    """Lay a dense town around u = v = 0 where there is `space` (px): streets, blocks, lots, flat roofs."""
    blocks = parcels(c, u, v, length=(44, 84), depth=(30, 52))
    across, down = np.floor(blocks.length / 14), np.floor(blocks.depth / 15)
    wide, deep = blocks.length / across, blocks.depth / down
    column, row = np.floor(blocks.along / wide), np.floor(blocks.across / deep)
    a, b = blocks.along - column * wide, blocks.across - row * deep
    lot = blocks.id * 64 + (column % 8 * 8 + row % 8).astype(np.intp)
    trait = c.table(blocks.count * 64, 5)
    t = trait[lot]
    far_u, far_v = u - a + wide / 2, v - b + deep / 2
    settled = np.sqrt(far_u * far_u + far_v * far_v) + 22 * t[..., 3] < radius
    edge = np.minimum(blocks.side, blocks.front)
    ground = np.minimum(np.where(settled, np.float32(9), np.float32(-9)), space)
    c.lay(BACKGROUND, ground, rough(c, (190, 166, 130), 0.06))
    near = radius + 6 * t[..., 3] * (edge > 4) - np.sqrt(u * u + v * v)
    pave(c, np.minimum(np.minimum(2.8 - edge, near), space), (164, 152, 134), shoulder=(182, 162, 130))
    inside = np.minimum(a - 2.2 * t[..., 0], wide - a - 0.8)
    inside = np.minimum(inside, np.minimum(b - 0.8, deep - b - 3.5 * t[..., 1] - 0.6))
    inside = np.minimum(np.minimum(inside, edge - 4.2), space - 3)
    court = 1.4 + 1.8 * t[..., 0] - np.maximum(np.abs(a - wide * 0.5), np.abs(b - deep * 0.5))
    inside = np.where(t[..., 2] < 0.25, np.minimum(inside, -court), inside)
    inside = np.where(settled & (t[..., 3] < 0.88), inside, np.float32(-9))
    annex = (a > wide * (0.35 + 0.5 * t[..., 1])) & (t[..., 4] < 0.6)
    roof = pick(trait[:, 4], PALE_ROOFS)[:, lot] * (0.92 + 0.14 * t[..., 3])
    light = 1 + 0.12 * rise(1.5 - inside, 0, 0.6) - 0.08 * annex - 0.30 * (c.noise(2.5) > 0.70) * (inside > 2)
    c.lay(BUILDING, inside, roof * (light * fine(c, 0.03)))
    np.copyto(c.height, 4 + 5 * t[..., 0] - 1.5 * annex, where=inside > 0, casting="same_kind")


def irrigate(c: Canvas, canal: Line, belt: Map) -> None:
    """Lay the plots, groves and orchards along a canal."""
    d, u = canal.measure(c)
    plots = parcels(c, u, d, length=(18, 46), depth=(26, 46))
    till(c, plots, belt, DRY_CROPS)
    use = c.table(plots.count)[plots.id]
    inner = np.minimum(np.minimum(plots.side, plots.front) - 2, belt - 2)
    c.lay(FOREST, np.where(use < 0.25, inner, -9), rough(c, (150, 132, 92), 0.08))
    c.lay(BACKGROUND, np.where(use > 0.93, inner, -9), rough(c, (186, 162, 124), 0.06))
    orchard = np.where((use > 0.25) & (use < 0.38), inner, -9)
    c.paint(rise(orchard, 0, 1), rough(c, (184, 156, 114), 0.05))
    rows = np.floor(u / 7), np.floor(d / 7)
    dots = (u - rows[0] * 7 - 3.5) ** 2 + (d - rows[1] * 7 - 3.5) ** 2
    tree = rise(6.6 - dots, 0, 3.0) * (orchard > 0)
    c.paint(tree, tone((86, 106, 62)) * (0.9 + 0.12 * c.noise(8)))
    np.copyto(c.height, 3.0, where=tree > 0.5)
