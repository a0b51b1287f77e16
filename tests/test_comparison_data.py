"""Who trains and who tests, and which images belong together."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from labelled_samples import write_labelled, write_yolo

from glare.comparison_data import Pool, SplitPlan, check_chosen, divide, groups_of, open_pool, sample
from glare.data.labelled import LabelledSet
from glare.errors import UserError
from glare.splits import Fold

PLAN = SplitPlan(val_match=None, group_by=None, folds=None, seeds=2, seed=0)


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A folder with train (2 images of tile1, 2 of tile2) and val (2 images of tile3)."""
    for split, tiles in (("train", (1, 2)), ("val", (3,))):
        for tile in tiles:
            write_labelled(tmp_path / "data" / split, 2, size=(16, 12), prefix=f"tile{tile}")
    return tmp_path / "data"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "single", 6, size=(16, 12), prefix="scene")


def opened(folder: Path, match: str | None = None) -> Pool:
    return open_pool(str(folder), match=match)


def test_train_and_val_are_one_pool_that_reads_the_right_files(both: Path) -> None:
    pool = opened(both)
    assert pool.parts == ["train"] * 4 + ["val"] * 2
    assert pool.data.names[0] == "train/tile1_0.png" and pool.data.names[-1] == "val/tile3_1.png"
    from_pool, label = pool.data.read(5)
    alone = opened(both / "val")
    assert from_pool.tobytes() == alone.data.read(1)[0].tobytes()
    assert (label == alone.data.read(1)[1]).all()


def test_match_selects_from_all_parts(both: Path) -> None:
    assert opened(both, "tile3_*,tile1_*").parts == ["train", "train", "val", "val"]


def test_the_given_split_is_the_first_choice(both: Path) -> None:
    division = divide(opened(both), PLAN, data="d")
    assert [(fold.train, fold.test) for fold in division.folds[0]] == [([0, 1, 2, 3], [4, 5])]
    assert len(division.folds) == 1 and not division.drawn and division.groups is None


def test_images_in_no_split_train_beside_a_val(tmp_path: Path) -> None:
    write_labelled(tmp_path, 3, size=(16, 12), prefix="root")
    write_labelled(tmp_path / "val", 2, size=(16, 12), prefix="held")
    pool = opened(tmp_path)
    assert pool.parts == ["train"] * 3 + ["val"] * 2
    assert pool.data.names[0] == "train/root_0.png" and pool.data.names[-1] == "val/held_1.png"
    division = divide(pool, PLAN, data="d")
    assert [(fold.train, fold.test) for fold in division.folds[0]] == [([0, 1, 2], [3, 4])]
    (tmp_path / "images" / "metadata.csv").write_text(
        "file_name,site\n" + "".join(f"root_{i}.png,a\n" for i in range(3))
    )
    (tmp_path / "val" / "metadata.csv").write_text("file_name,site\nheld_0.png,b\nheld_1.png,b\n")
    assert groups_of(pool, "site", data=str(tmp_path)) == ["a"] * 3 + ["b"] * 2


def test_a_val_beside_several_other_splits_is_refused(tmp_path: Path) -> None:
    for split in ("site_a", "site_b", "val"):
        write_labelled(tmp_path / split, 1, size=(16, 12))
    with pytest.raises(UserError, match=r"several splits besides 'val': site_a, site_b; rename the one to train on"):
        opened(tmp_path)
    (tmp_path / "site_a").rename(tmp_path / "train")
    assert opened(tmp_path).parts == ["train", "val"]


def test_folders_of_splits_below_images_are_not_mixed_unasked(tmp_path: Path) -> None:
    data = str(write_yolo(tmp_path, train=3, val=2))
    with pytest.raises(UserError, match=r"random folds would mix; give --val-match 'val/\*', or --folds 5"):
        check_chosen(open_pool(data, match="scene*"), PLAN, "scene*", data=data)
    plan = replace(PLAN, val_match="val/*")
    check_chosen(pool := opened(tmp_path), plan, None, data=data)
    assert divide(pool, plan, data=data).folds == [[Fold([0, 1, 2], [3, 4])]]
    for chosen in (replace(PLAN, folds=2), replace(PLAN, group_by="folder")):
        check_chosen(pool, chosen, None, data=data)
    check_chosen(opened(tmp_path, "train/*"), PLAN, "train/*", data=data)
    data = str(write_yolo(tmp_path / "three", train=1, val=1, test=1))
    with pytest.raises(UserError, match=r"give --match 'train/\*,val/\*' --val-match 'val/\*'"):
        check_chosen(open_pool(data, match=None), PLAN, None, data=data)


@pytest.mark.parametrize("split", ["val", "site_a"])
def test_the_only_split_is_all_there_is(tmp_path: Path, split: str) -> None:
    write_labelled(tmp_path / split, 5, size=(16, 12))
    pool = opened(tmp_path)
    assert len(pool.data) == 5 and divide(pool, PLAN, data="d").drawn
    (tmp_path / split / "metadata.csv").write_text(
        "file_name,site\n" + "".join(f"scene_{i}.png,{i}\n" for i in range(5))
    )
    assert groups_of(pool, "site", data=str(tmp_path)) == list("01234")


def test_without_val_there_are_random_folds_for_every_seed(single: Path) -> None:
    division = divide(opened(single), PLAN, data="d")
    assert division.drawn and len(division.folds) == 2 and division.folds[0] != division.folds[1]
    for folds in division.folds:
        assert len(folds) == 5
        assert sorted(i for fold in folds for i in fold.test) == list(range(6))


def test_groups_cross_the_splits(both: Path) -> None:
    division = divide(opened(both), SplitPlan(None, "prefix", None, 2, 0), data="d")
    assert division.groups == ["tile1", "tile1", "tile2", "tile2", "tile3", "tile3"]
    assert [fold.test for fold in division.folds[0]] == [[0, 1], [2, 3], [4, 5]]
    assert division.folds[0][0].train == [2, 3, 4, 5]


def test_val_match_restricts_what_is_tested_not_what_trains(both: Path) -> None:
    grouped = divide(opened(both), SplitPlan("tile2_*", "prefix", None, 2, 0), data="d")
    assert [(fold.train, fold.test) for fold in grouped.folds[0]] == [([0, 1, 4, 5], [2, 3])]
    alone = divide(opened(both), SplitPlan("tile2_*", None, None, 2, 0), data="d")
    assert [(fold.train, fold.test) for fold in alone.folds[0]] == [([0, 1, 4, 5], [2, 3])]
    folded = divide(opened(both), SplitPlan("tile2_*", None, 3, 2, 0), data="d")
    assert all(sorted(i for fold in folds for i in fold.test) == [2, 3] for folds in folded.folds)
    with pytest.raises(UserError, match="leaves no image"):
        divide(opened(both), SplitPlan("tile*", None, None, 2, 0), data="d")


def test_many_images_are_divided_quickly() -> None:
    names = [f"t{i % 2}_{i}.png" for i in range(20_000)]
    labelled = LabelledSet(["a"], np.zeros((1, 3), np.uint8), names, lambda _: pytest.fail("none is read"))
    started = time.process_time()
    (fold,) = divide(Pool(labelled, [""] * len(names)), SplitPlan("t1_*", None, None, 1, 0), data="d").folds[0]
    assert time.process_time() - started < 2
    assert (len(fold.train), len(fold.test)) == (10_000, 10_000)


def test_groups_of_a_column_of_the_metadata(both: Path) -> None:
    lines = {"train": "file_name,site\ntile1_0.png,a\ntile1_1.png,b\ntile2_0.png,a\ntile2_1.png,b\n"}
    lines["val"] = "file_name,site\ntile3_0.png,c\ntile3_1.png,c\n"
    for split, text in lines.items():
        (both / split / "images" / "metadata.csv").write_text(text)
    assert groups_of(opened(both), "site", data=str(both)) == ["a", "b", "a", "b", "c", "c"]
    (both / "val").rename(both / "validation")
    assert opened(both).parts[-1] == "val"
    assert groups_of(opened(both), "site", data=str(both)) == ["a", "b", "a", "b", "c", "c"]
    (both / "validation").rename(both / "val")
    (both / "val" / "images" / "metadata.csv").write_text("file_name,site\ntile3_0.png,c\n")
    with pytest.raises(UserError, match=r"no line for 'val/tile3_1\.png'"):
        groups_of(opened(both), "site", data=str(both))


def test_groups_by_an_expression(both: Path) -> None:
    assert groups_of(opened(both), r"tile(\d)", data=str(both)) == ["1", "1", "2", "2", "3", "3"]
    assert groups_of(opened(both), "folder", data=str(both)) == ["train"] * 4 + ["val"] * 2


def test_a_sample_keeps_some_of_each_part(both: Path) -> None:
    pool = sample(opened(both), 1, seed=0)
    assert pool.parts == ["train", "val"]
    assert sample(opened(both), 1, seed=0).data.names == pool.data.names
    assert {sample(opened(both), 1, seed=seed).data.names[0] for seed in range(20)} > {pool.data.names[0]}
    assert sample(opened(both), 10, seed=0).data.names == opened(both).data.names


def test_parts_of_different_classes_are_refused(tmp_path: Path) -> None:
    write_labelled(tmp_path / "train", 1)
    write_labelled(tmp_path / "val", 1, classes=["x", "y", "z"])
    with pytest.raises(UserError, match="different classes"):
        opened(tmp_path)
