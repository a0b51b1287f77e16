"""What holds labels by its name: folders such as masks beside images, files such as 7_mask.png beside 7.jpg."""

import re
from collections.abc import Iterable

IMAGES = frozenset(["images", "image", "imgs", "img", "img_dir", "images_png", "jpegimages", "leftimg8bit", "rgb"])
LABELS = frozenset(
    [
        "labels",
        "label",
        "masks",
        "mask",
        "annotations",
        "annotation",
        "ann_dir",
        "masks_png",
        "annots",
        "gt",
        "gtfine",
        "groundtruth",
        "ground_truth",
        "trimaps",
        "segmentation",
        "segmentationclass",
        "segmentationclasscontext",
        "segmentationobject",
    ]
)
"""Names of folders, in small letters, that hold labels where images lie beside them."""
ENDINGS = "masks?|labels?|gt|ground_?truth|annotation|trimap|seg|segmentation"
LABEL_STEM = re.compile(rf"(.+)([_.-])({ENDINGS})", re.IGNORECASE)
"""The beginning of a label's stem, and what says that it is one."""
PICTURE_STEM = re.compile(r"(.+)[_.-]([^_.-]*[^\W\d_][^_.-]*)")
"""As much of the stem of a picture such as 7_sat, whose label may be 7_mask: its last word is no number."""
MANY = 2


def label_folders(folders: Iterable[str]) -> list[str]:
    """Those of some names of folders that labels have, sorted."""
    return sorted(name for name in folders if name.lower() in LABELS)


def are_labels_of(labels: Iterable[str], pictures: Iterable[str]) -> bool:
    """Whether half of some files or more, at least one, are called like a picture, in whatever folders they lie.

    That is 7.png or 7_mask.png for 7.jpg or 7_sat.jpg.
    """
    known = {name for path in pictures for name in _beginnings(path, PICTURE_STEM)}
    fitting = [not known.isdisjoint(_beginnings(path, LABEL_STEM)) for path in labels]
    return 2 * sum(fitting) >= max(2, len(fitting))


def label_files(files: Iterable[str]) -> dict[str, list[str]]:
    """Those of the neighbouring image files that are labels of others: ending, such as ``_mask``, -> names.

    The files of an ending are labels if they are ``MANY`` at least, and as many as half of the pictures, and each has
    a picture beside it: all of the same stem without the ending, or all with one other word in its place (7_sat.jpg
    and 7_mask.png).
    """
    labels: dict[str, dict[str, list[str]]] = {}
    pictures: list[str] = []
    for name in files:
        stem = name.rpartition(".")[0]
        if match := LABEL_STEM.fullmatch(stem):
            labels.setdefault(f"{match[2]}{match[3].lower()}", {}).setdefault(match[1], []).append(name)
        else:
            pictures.append(stem)
    if not labels:
        return {}
    beginnings = [set(pictures), *_by_last_word(pictures)]
    found = {
        ending: [name for names in of_stem.values() for name in names]
        for ending, of_stem in labels.items()
        if any(of_stem.keys() <= known for known in beginnings)
    }
    return {ending: names for ending, names in found.items() if len(names) >= max(MANY, len(pictures) / 2)}


def _beginnings(path: str, pattern: re.Pattern[str]) -> set[str]:
    """The stem of a file, and what comes before its last word if that fits."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    match = pattern.fullmatch(stem)
    return {stem, match[1]} if match else {stem}


def _by_last_word(stems: Iterable[str]) -> Iterable[set[str]]:
    """What comes before the last word of stems, together where that word is the same."""
    found: dict[str, set[str]] = {}
    for stem in stems:
        if match := PICTURE_STEM.fullmatch(stem):
            found.setdefault(match[2], set()).add(match[1])
    return found.values()
