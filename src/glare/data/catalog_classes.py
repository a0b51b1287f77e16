"""Names and colours of the classes of the catalog's data sets, in the order of their indices, each with its source."""

from dataclasses import dataclass

from glare.data.landcover import CLASSES, PALETTE
from glare.data.landcover_render import hues


@dataclass(frozen=True)
class Classes:
    """``names`` of k classes and their ``palette``, k times (red, green, blue) of 0 to 255."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


def _classes(names: str, palette: str) -> Classes:
    """Names between commas, colours as hexadecimal RRGGBB between spaces, on any number of lines."""
    return Classes(tuple(" ".join(name.split()) for name in names.split(",")), hues(palette))


ADE20K = _classes(
    """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
    case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
    hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt
    track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain,
    conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike,
    cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor,
    bulletin board, shower, radiator, glass, clock, flag
    """,
    """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
    8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
    ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
    8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
    00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
    ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
    00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
    0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
    b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
    """,
)
"""SceneParse150: the first name of each line of objectInfo150.txt in github.com/CSAILVision/sceneparsing, in its order;
colours as mmsegmentation's ADE20KDataset gives them."""

PASCAL_CONTEXT = _classes(
    """
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike,
    person, pottedplant, sheep, sofa, train, tvmonitor, bag, bed, bench, book, building, cabinet, ceiling, cloth,
    computer, cup, door, fence, floor, flower, food, grass, ground, keyboard, light, mountain, mouse, curtain,
    platform, sign, plate, road, rock, shelves, sidewalk, sky, snow, bedclothes, track, tree, truck, wall, water,
    window, wood
    """,
    """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
    8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
    ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
    8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
    """,
)
"""Background and the 59 frequent classes, in the order of mmsegmentation's PascalContextDataset, whose colours are the
first 60 of ADE20K."""

CITYSCAPES = _classes(
    """
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person,
    rider, car, truck, bus, train, motorcycle, bicycle
    """,
    """
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64
    005064 0000e6 770b20
    """,
)
"""Train ids 0 to 18 and colours of cityscapesscripts/helpers/labels.py in github.com/mcordts/cityscapesScripts."""

CAMVID = _classes(
    """
    sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist
    """,
    """
    808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0
    """,
)
"""Scripts/test_segmentation_camvid.py in github.com/alexgkendall/SegNet-Tutorial, where 11 is unlabelled."""

OXFORD_PETS = _classes(
    """
    pet, background, border
    """,
    """
    ff8000 404040 ffffff
    """,
)
"""Values 1 (foreground), 2 (background) and 3 (not classified) of annotations/README in the archive; it gives them no
colours, those here are this package's."""

LANDCOVER = Classes(CLASSES, PALETTE)
"""LoveDA's names and colours (mmsegmentation's LoveDADataset), which the built-in scenes share."""
