"""Procedural aerial scenes with pixel-exact masks in LoveDA's seven classes: the embedded default data set.

About one metre a pixel, seen from straight above. Two domains that differ in season, sensor and settlement:

* `temperate`: summer; strips of crops, a village of pitched red roofs along a winding road, a river with gravel bars, woods;
* `arid`: dry season; ochre ground, a dense town of flat pale roofs, a canal with small plots, palm groves, pivot fields.

The label says what the ground is: a shadow keeps the class of the ground it falls on, garden and street trees are background,
woods, groves and hedges are forest, orchards are agricultural, dirt roads and bridges are road.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glare.data.landcover_render import (
    Canvas,
    Colour,
    Line,
    Map,
    Parcels,
    Point,
    Roof,
    Sensor,
    build,
    crowns,
    direction,
    expose,
    hues,
    parcels,
    relief,
    rise,
    tone,
    wave,
    winding,
)
from glare.errors import UserError

CLASSES = ("background", "building", "road", "water", "barren", "forest", "agricultural")
PALETTE = hues("ffffff ff0000 ffff00 0000ff 9f81b7 00ff00 ffc380")
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
    """Return the colours (3, h, w) of grass, scrub, asphalt or soil: the blotches of the scene, flipped at random, and grain."""
    flip = np.s_[:: 1 if c.draw(0, 1) < 0.5 else -1, :: 1 if c.draw(0, 1) < 0.5 else -1]
    return tone(colour) * (1 + np.float32(strength) * c.blotches[flip] + 0.05 * c.speckles[flip])


def sample(c: Canvas, values: NDArray[Any], at: Point) -> float:
    """Return the value of a map (h, w) at a point, the nearest one if the point is outside."""
    column, row = (min(max(int(p + c.size / 2), 0), c.size - 1) for p in at)
    return float(values[row, column])


def street(start: Point, heading: Point) -> Site:
    """Return the function that gives the point `along` and `aside` of a straight street, and its heading."""

    def site(along: float, aside: float) -> tuple[Point, Point]:
        x = start[0] + along * heading[0] - aside * heading[1]
        return (x, start[1] + along * heading[1] + aside * heading[0]), heading

    return site


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
    """Lay bare ground: rock and rubble lit from the side, in benches `step` px wide towards its middle if that is not 0."""
    bumps = c.noise(14, 4) * 2 + c.table(c.size, c.size) * 0.5
    if step:
        bumps = 0.6 * bumps - 5 * np.floor(np.maximum(inside, 0) / step + 0.35 * c.noise(24, 2))
    c.lay(BARREN, inside, rough(c, colour, 0.09) * relief(c, bumps, 0.11))


def pave(c: Canvas, inside: Map, colour: Colour, *, shoulder: Colour) -> None:
    """Lay a road with worn edges on a shoulder 2 px wide; where it crosses water it is a bridge."""
    wet = c.label == WATER
    c.paint(
        rise(inside, -3.5, 0) * np.where(wet, np.float32(0.4), np.float32(0.6)),
        np.where(wet, tone((30, 40, 46)), tone(shoulder)),
    )
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
    """Tell whether a building with 2 px around it would stand on open ground only, inside the scene or cut by its border."""
    grid = [(i * (half[0] + 2), j * (half[1] + 2)) for i in (-1, -0.33, 0.33, 1) for j in (-1, 0, 1)]
    spots = [
        (at[0] + a * heading[0] - b * heading[1], at[1] + a * heading[1] + b * heading[0]) for a, b in grid
    ]
    if max(abs(at[0]), abs(at[1])) > c.size / 2:
        return False
    return all(sample(c, c.label, spot) in (BACKGROUND, FARM) for spot in spots)


def house(c: Canvas, at: Point, heading: Point) -> None:
    """Build a dwelling with a pitched roof, sometimes with a wing or a shed, where there is room."""
    half = (c.draw(4.6, 7.4), c.draw(3.4, 4.8))
    if c.draw(0, 1) < 0.3:
        heading = (-heading[1], heading[0])
    if not free(c, at, half, heading):
        return
    base = RED_ROOFS[int(min(c.draw(0, 1), c.draw(0, 1.4)) * len(RED_ROOFS))]
    light = c.draw(0.85, 1.15)
    roof = Roof(
        (base[0] * light, base[1] * light, base[2] * light), "hip" if c.draw(0, 1) < 0.35 else "gable", 4.0
    )
    if c.draw(0, 1) < 0.3:
        corner = street(at, heading)(half[0] - 3.2, half[1])[0]
        build(c, corner, (3.6, 2.8), (-heading[1], heading[0]), roof, BUILDING)
    build(c, at, half, heading, roof, BUILDING)


def settle(c: Canvas, site: Site, span: Point) -> None:
    """Line both sides of a street with houses."""
    for sign in (-1, 1):
        along = span[0] + c.draw(0, 12)
        while along < span[1]:
            at, heading = site(along, sign * c.draw(12, 17))
            if c.draw(0, 1) < 0.88:
                turn = direction(c.draw(-0.16, 0.16))
                heading = (
                    heading[0] * turn[0] - heading[1] * turn[1],
                    heading[0] * turn[1] + heading[1] * turn[0],
                )
                house(c, at, heading)
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
    pave(
        c,
        1.8 - c.segment(site(along, 0)[0], site(along, sign * 26)[0]),
        (168, 156, 134),
        shoulder=(150, 150, 110),
    )
    for a, b, half in ((-9, 46, (9.5, 4.6)), (10, 38, (4.8, 8.5)), (-8, 31, (7.0, 3.8))):
        at, turn = site(along + a, sign * b)
        if free(c, at, half, turn):
            colour = (186, 188, 192) if hall else roofs[int(c.draw(0, len(roofs)))]
            build(c, at, half, turn, Roof(colour, "flat" if hall else "gable", 5.0), BUILDING)


def plant(
    c: Canvas, density: Map, radius: Map, *, leaves: tuple[Colour, Colour], pitch: int, tall: float
) -> None:
    """Grow trees of `tall` px on the open ground; those that stand on forest ground label what they cover forest."""
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
    """Put a village around a place on a road, on ground with `space` px to spare. Return the distance (h, w) to its streets."""
    reach = c.draw(60, 95)
    streets = []
    for sign in (-1, 1):
        start, heading = road.point(along + c.draw(-0.6, 0.6) * reach, 0)
        turn = direction(sign * math.pi / 2 + c.draw(-0.25, 0.25))
        axis = (heading[0] * turn[0] - heading[1] * turn[1], heading[0] * turn[1] + heading[1] * turn[0])
        site, length = street(start, axis), c.draw(45, 90)
        wet = [at for at in range(0, 90, 3) if sample(c, c.label, site(at, 0)[0]) == WATER]
        streets.append((site, max(min([length, *(at - 9.0 for at in wet)]), 2.0)))
    spine = [road.point(along + k * reach, 0)[0] for k in (-1, -0.33, 0.33, 1)]
    lanes = [c.segment(site(0, 0)[0], site(length, 0)[0]) for site, length in streets]
    near = np.minimum(lanes[0], lanes[1])
    for start, end in zip(spine[:-1], spine[1:], strict=True):
        near = np.minimum(near, c.segment(start, end))
    gardens(c, np.minimum(30 + 8 * c.noise(30, 2) - near, space), road.point(along, 0)[1])
    for distance in lanes:
        pave(c, 2.3 - distance, (150, 148, 146), shoulder=(150, 152, 116))
    settle(c, road.point, (along - reach, along + reach))
    for site, length in streets:
        settle(c, site, (14.0, length))
    return near


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
    density = np.where(c.label == FOREST, 0.97, 0.012 * (shore > 0) + 0.30 * (streets < 34)) + 0.5 * (
        np.abs(shore - 5) < 3
    )
    season = c.draw(0, 1)
    leaves = (48 + 12 * season, 74, 38), (88 + 26 * season, 116, 54)
    plant(c, density, np.where(c.label == FOREST, 5.4, 3.6), leaves=leaves, pitch=7, tall=8.0)


def countryside(c: Canvas, road: Line, side: NDArray[np.bool_], space: Map) -> None:
    """Lay fields in two directions, parted by tracks and hedges, meadows, woods and a quarry, off the road and the river."""
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
    c.paint(
        rise(1.1 - c.segment(at, (at[0] + radius * arm[0], at[1] + radius * arm[1])), 0, 1) * 0.5,
        tone((226, 220, 206)),
    )


def town(c: Canvas, u: Map, v: Map, radius: float, space: Map) -> None:
    """Lay a dense town around u = v = 0, on ground with `space` px to spare: blocks between dusty streets, lots, flat roofs."""
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
    inside = np.minimum(
        np.minimum(a - 2.2 * t[..., 0], wide - a - 0.8), np.minimum(b - 0.8, deep - b - 3.5 * t[..., 1] - 0.6)
    )
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


def arid(c: Canvas) -> None:
    """Lay out a dry scene: desert, a canal with plots and groves, pivot fields, a highway, a town, compounds, palms and scrub."""
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
    """An aerial picture: `image` (h, w, 3) uint8 RGB and `label` (h, w) uint8, an index into CLASSES for every pixel."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def scene(domain: str, seed: int, *, index: int = 0, size: int = 256) -> Scene:
    """Return scene `index` of the series `seed` of a domain, `size` px square; the same bytes on every machine."""
    if domain not in DOMAINS:
        raise UserError(f"landcover has no domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    entropy = np.random.SeedSequence([DOMAINS.index(domain), seed, index])
    rng = np.random.Generator(np.random.PCG64(entropy))
    layout, (low, high) = LAYOUTS[domain]
    canvas = Canvas(rng, size, low + (high - low) * float(rng.random()))
    layout(canvas)
    return Scene(expose(canvas, SENSORS[domain]), canvas.label)


class LandcoverSource:
    """`count` scenes of a domain, with or without their labels; series of different `seed` share no scene."""

    classes = CLASSES
    palette = PALETTE
    ignore_index = 255

    def __init__(self, domain: str, count: int, seed: int = 0, size: int = 256) -> None:
        if domain not in DOMAINS:
            raise UserError(f"landcover has no domain {domain!r}; choose one of {', '.join(DOMAINS)}")
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
    """Return the source that "landcover:<domain>[:count[:seed]]" names, by default 64 scenes of seed 0; UserError if malformed."""
    kind, *parts = text.split(":")
    domain, count, seed = (*parts, *("", "64", "0")[len(parts) :])[:3]
    if kind != "landcover" or len(parts) > 3 or not (count.isdecimal() and seed.isdecimal()):
        raise UserError(
            f"{text!r} is not landcover:<domain>[:count[:seed]], for example landcover:{DOMAINS[0]}:64:0"
        )
    return LandcoverSource(domain, int(count), int(seed))
