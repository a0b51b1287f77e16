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


def label_files(files: Iterable[str]) -> dict[str, list[str]]:
    """Those of the neighbouring image files that are labels of others: ending, such as ``_mask``, -> names.

    The files of an ending are labels if they are ``MANY`` at least and each has a picture beside it: all of the same
    stem without the ending, or all with one other word in its place (7_sat.jpg and 7_mask.png).
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
    return {ending: names for ending, names in found.items() if len(names) >= MANY}


def _by_last_word(stems: Iterable[str]) -> Iterable[set[str]]:
    """What comes before the last word of stems, together where that word is the same."""
    found: dict[str, set[str]] = {}
    for stem in stems:
        if match := PICTURE_STEM.fullmatch(stem):
            found.setdefault(match[2], set()).add(match[1])
    return found.values()
