"""Folds: complete, without overlap, balanced, and the same for the same seed."""

import itertools

import pytest

from glare.errors import UserError
from glare.splits import Fold, group_of, inner_folds, k_fold, leave_one_group_out


@pytest.mark.parametrize(("images", "folds"), [(2, 2), (9, 2), (10, 3), (45, 5), (7, 7)])
def test_folds_test_every_image_once_in_parts_of_one_size(images: int, folds: int) -> None:
    found = k_fold(images, folds, seed=1)
    assert len(found) == folds
    assert sorted(image for fold in found for image in fold.test) == list(range(images))
    for fold in found:
        assert sorted(fold.train + fold.test) == list(range(images))
        assert fold.train == sorted(fold.train)
        assert fold.test == sorted(fold.test)
    sizes = [len(fold.test) for fold in found]
    assert max(sizes) - min(sizes) <= 1


def test_folds_depend_on_the_seed_only() -> None:
    assert k_fold(20, 4, seed=3) == k_fold(20, 4, seed=3)
    assert k_fold(20, 4, seed=3) != k_fold(20, 4, seed=4)
    assert k_fold(20, 4, seed=3)[0].test != [0, 1, 2, 3, 4]


@pytest.mark.parametrize("folds", [0, 1, 6])
def test_folds_are_at_least_two_and_at_most_one_an_image(folds: int) -> None:
    with pytest.raises(UserError, match=rf"5 images cannot make {folds} folds"):
        k_fold(5, folds, seed=0)


def test_each_group_is_tested_by_all_others() -> None:
    found = leave_one_group_out(["b", "a", "c", "a", "b"])
    assert found == [
        Fold(train=[0, 2, 4], test=[1, 3]),
        Fold(train=[1, 2, 3], test=[0, 4]),
        Fold(train=[0, 1, 3, 4], test=[2]),
    ]


@pytest.mark.parametrize("groups", [[], ["tile"], ["tile", "tile"]])
def test_one_group_cannot_be_left_out(groups: list[str]) -> None:
    with pytest.raises(UserError, match="group"):
        leave_one_group_out(groups)


@pytest.mark.parametrize(
    ("name", "pattern", "group"),
    [
        ("tile3_007.jpg", "prefix", "tile3"),
        ("tile3-007_b.jpg", "prefix", "tile3"),
        ("train/tile3_007.jpg", "prefix", "tile3"),
        ("alone.jpg", "prefix", "alone"),
        ("north/lake/007.jpg", "folder", "north/lake"),
        ("007.jpg", "folder", "."),
        ("tile3_007.jpg", r"tile(\d)", "3"),
        ("north/007.jpg", r"^(\w+)/", "north"),
        ("a_2019-05.jpg", r"_(\d{4})", "2019"),
    ],
)
def test_the_group_of_an_image_is_in_its_name(name: str, pattern: str, group: str) -> None:
    assert group_of(name, pattern) == group


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        (r"scene(\d+)", "finds no group"),
        (r"tile(\d+)?x?(?:$)|tile", "2 pairs|finds no group|0 pairs"),
        ("(tile", "no regular expression"),
        ("tile", "0 pairs of parentheses"),
        (r"(tile)(\d)", "2 pairs of parentheses"),
    ],
)
def test_a_name_without_a_group_is_named(pattern: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        group_of("north/tile3_007.jpg", pattern)
    assert "north/tile3_007.jpg" in str(error.value)
    assert pattern in str(error.value).replace("\\\\", "\\")


def test_inner_folds_are_the_groups_of_the_training_images() -> None:
    groups = ["a", "b", "c", "a", "b", "c"]
    assert inner_folds([0, 1, 3, 4], groups, seed=0) == [[0, 3], [1, 4]]


@pytest.mark.parametrize("groups", [None, ["a"] * 30])
def test_inner_folds_are_five_random_parts_without_two_groups(groups: list[str] | None) -> None:
    train = list(range(3, 30, 2))
    found = inner_folds(train, groups, seed=1)
    assert sorted(image for part in found for image in part) == train
    assert sorted(map(len, found)) == [2, 3, 3, 3, 3]
    assert found == inner_folds(train, groups, seed=1)
    assert found != inner_folds(train, groups, seed=2)


def test_few_training_images_are_parts_of_their_own() -> None:
    assert sorted(inner_folds([4, 8, 6], None, seed=0)) == [[4], [6], [8]]


def test_many_groups_are_put_together_whole() -> None:
    groups = [f"g{image % 23:02}" for image in range(60)]
    parts = inner_folds(range(60), groups, seed=0)
    assert len(parts) == 10 and sorted(image for part in parts for image in part) == list(range(60))
    for first, second in itertools.combinations(parts, 2):
        assert not {groups[image] for image in first} & {groups[image] for image in second}
