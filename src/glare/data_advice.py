"""What a check of the data means for a training on it, in words: the facts, and one line a problem with its remedy."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from glare.data_check import TRAIN, DataCheck, Labels, Pair, split_of

LONG = 3.0  # long by short side from which a crop, of at most 4:3, leaves most of an image out
MUCH_REDUCED = 4.0  # factor by which an image shrinks before training from which small things vanish
LISTED = 3  # names or pairs; the JSON has all pairs
LEFT = 16  # width of the first column
IGNORED = "(ignored)"


@dataclass(frozen=True)
class Needs:
    """What a pre-training asks of images: sides in px of a global view and, 0 for any, of the images it keeps."""

    global_size: int
    image_size: int


def advice(check: DataCheck, needs: Needs) -> list[str]:
    """One line for each problem: what it is, how many images have it, and what to do about it."""
    lines = [*_of_files(check), *_of_modes(check), *_of_sizes(check, needs), *_of_duplicates(check)]
    for labels in check.labels:
        lines += _of_labels(labels)
    return lines + list(_of_classes(check.labels))


def _of_files(check: DataCheck) -> Iterator[str]:
    if check.unreadable:
        total = len(check.names) + len(check.unreadable)
        listed = "; ".join(f"{name}: {reason}" for name, reason in check.unreadable[:LISTED])
        yield f"unreadable and skipped: {len(check.unreadable)} of {total} images ({listed}); repair or remove them"
    if check.splits:
        others = " and ".join(split for split in check.splits if split != TRAIN)
        yield (
            f"glare pretrain takes the images of all splits, {others} too; "
            f"give --split {TRAIN} to keep the others unseen"
        )


def _of_modes(check: DataCheck) -> Iterator[str]:
    total = len(check.names)
    deep = sum(count for mode, count in check.modes.items() if "bit" in mode or "point" in mode)
    if deep:
        yield (
            f"more than 8 bits, scaled by the depth that each image uses: {deep} of {total} images; "
            "convert all of them to 8 bits alike, or their brightness will differ"
        )
    clear = sum(count for mode, count in check.modes.items() if "transparency" in mode)
    if clear:
        yield f"transparent parts become plain grey-brown: {clear} of {total} images; cut such parts away"
    grey = sum(count for mode, count in check.modes.items() if mode.startswith(("grey", "black")))
    if 0 < grey < total:
        yield f"grey among coloured: {grey} of {total} images; adapt to each kind alone, or make all of them grey"


def _of_sizes(check: DataCheck, needs: Needs) -> Iterator[str]:
    """A line for each of ``problems``; an image that has the first does not count for the second."""
    view, kept = needs.global_size, needs.image_size
    problems: dict[str, tuple[Callable[[int, int], bool], str]] = {
        f"smaller than a global view of {view} px, which enlarges them": (
            lambda short, _: short < view,
            "give larger images, or a smaller views.global_size",
        ),
        f"a short side below image_size of {kept} px, which enlarges their smaller crops": (
            lambda short, _: view <= short < kept,
            "give larger images, or let the views cover more (views.global_area, views.local_area)",
        ),
        f"reduced to a quarter or less, to a short side of {kept} px, in which small things vanish": (
            lambda short, _: 0 < MUCH_REDUCED * kept <= short,
            "cut them into tiles, or give --image-size 0 to keep their size",
        ),
        f"{LONG:g} times as long as wide, of which a view shows little": (
            lambda short, long: long >= LONG * short,
            "cut them into tiles",
        ),
    }
    for problem, (has, remedy) in problems.items():
        found = [name for name, size in zip(check.names, check.sizes, strict=True) if has(min(size), max(size))]
        if found:
            yield f"{problem}: {_named(found, len(check.names))}; {remedy}"


def _of_duplicates(check: DataCheck) -> Iterator[str]:
    for split, pairs in _by_split(check.repeated, check).items():
        total = check.splits.get(split, len(check.names))
        seen = "no independent test" if split not in ("", TRAIN) else "seen more often than others"
        yield (
            f"near-duplicates of an earlier image{f' of {split}' if split else ''}, {seen}: {len(pairs)} of {total} "
            f"images ({_closest(pairs)}); remove copies, and of a film take fewer frames"
        )
    for split, pairs in _by_split(check.leaked, check).items():
        yield (
            f"near-duplicates of images of {TRAIN}, which make scores on {split} too good: {len(pairs)} of "
            f"{check.splits[split]} images of {split} ({_closest(pairs)}); move them into {TRAIN}"
        )


def _of_labels(labels: Labels) -> Iterator[str]:
    where = f" of {labels.split}" if labels.split else ""
    if labels.unusable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in labels.unusable[:LISTED])
        yield f"labels{where} that cannot be used, their images are skipped: {len(labels.unusable)} ({listed})"
    total = sum(labels.pixels.values()) + labels.ignored
    if total and labels.ignored > total / 2:
        share = f"{labels.ignored / total:.0%} of the pixels{where}"
        yield f"mostly ignored: {share}; check ignore_index in classes.json, or label more"


def _of_classes(labels: Sequence[Labels]) -> Iterator[str]:
    read = [split for split in labels if split.pixels]
    classes = dict.fromkeys(name for split in read for name in split.pixels)
    never = [name for name in classes if not any(split.pixels.get(name) for split in read)]
    if never:
        yield f"classes that never occur: {', '.join(never)}; label them, or remove them from classes.json"
    train = next((split for split in read if split.split == TRAIN), None)
    if train is None:
        return
    for split in read:
        missing = [name for name, count in split.pixels.items() if count and not train.pixels.get(name)]
        if missing:
            yield (
                f"classes of {split.split} that {TRAIN} never shows, so that no model can learn them: "
                f"{', '.join(missing)}; move some of their images into {TRAIN}"
            )


def describe(check: DataCheck, lines: Sequence[str]) -> str:
    """The check for people: what there is, then the ``lines`` of `advice`."""
    total = len(check.names) + len(check.unreadable)
    rows = [("images", f"{total}, {len(check.unreadable) or 'none'} of them unreadable")]
    if check.splits:
        rows.append(("splits", ", ".join(f"{split} {count}" for split, count in check.splits.items())))
    rows.append(("sizes", _sizes(check.sizes)))
    rows.append(("colours", ", ".join(f"{mode} {count}" for mode, count in check.modes.items())))
    found = f"{len(check.repeated) or 'none'} within {'a split' if check.splits else 'the set'}"
    leaks = f", {len(check.leaked) or 'none'} between {TRAIN} and the other splits" if check.splits else ""
    rows.append(("near-duplicates", found + leaks))
    text = [f"{name:<{LEFT}} {value}" for name, value in rows]
    text += [f"{'':<{LEFT}} {pair.name} = {pair.other}" for pair in _sorted([*check.leaked, *check.repeated])[:LISTED]]
    text += _table([labels for labels in check.labels if labels.pixels])
    text += [f"! {line}" for line in lines] or ["no problems found"]
    return "\n".join(text)


def to_json(check: DataCheck, lines: Sequence[str], *, data: str) -> dict[str, Any]:
    """The check as plain values, with all pairs; sizes in px as least, median and most."""
    width, height = map(_span, zip(*check.sizes, strict=True))
    values = asdict(check)
    del values["names"]
    different = len(set(check.sizes))
    sizes = {"width": width, "height": height, "different": different}
    return {"data": data, "num_images": len(check.names), **values, "sizes": sizes, "problems": list(lines)}


def _span(sides: Sequence[int]) -> tuple[int, int, int]:
    return min(sides), round(statistics.median(sides)), max(sides)


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    different = len(set(sizes))
    if different == 1:
        return f"{sizes[0][0]} x {sizes[0][1]} px, all of them"
    width, height = (" / ".join(map(str, _span(sides))) for sides in zip(*sizes, strict=True))
    return f"width {width}, height {height} px (least / median / most), {different} different"


def _table(labelled: Sequence[Labels]) -> list[str]:
    """Share of the pixels and number of images of each class, split by split."""
    if not labelled:
        return []
    classes = list(dict.fromkeys(name for labels in labelled for name in labels.pixels))
    width = max(LEFT, *(len(name) + 2 for name in classes))
    heads = [f"{labels.split + ':' if labels.split else ''} share, images".strip() for labels in labelled]
    lines = [f"{'labels':<{width}} " + "".join(f"{head:>24}" for head in heads)]
    for name in (*classes, IGNORED):
        cells = (f"{_share(labels, name):>14} {labels.images.get(name, ''):>9}" for labels in labelled)
        lines.append((f"  {name:<{width - 2}} " + "".join(cells)).rstrip())
    return lines


def _share(labels: Labels, name: str) -> str:
    pixels = labels.ignored if name == IGNORED else labels.pixels.get(name, 0)
    total = sum(labels.pixels.values()) + labels.ignored
    return f"{pixels / max(1, total):.1%}" if pixels else "-"


def _sorted(pairs: Sequence[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: pair.difference)


def _closest(pairs: Sequence[Pair]) -> str:
    pair = _sorted(pairs)[0]
    return f"{pair.name} = {pair.other}" + (", ..." if len(pairs) > 1 else "")


def _by_split(pairs: Sequence[Pair], check: DataCheck) -> dict[str, list[Pair]]:
    """The pairs by the split of their first image; all under the empty name where there are no splits."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(split_of(pair.name) if check.splits else "", []).append(pair)
    return found


def _named(names: Sequence[str], total: int) -> str:
    if len(names) == total > LISTED:
        return f"all {total} images"
    return f"{len(names)} of {total} images ({', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''})"
