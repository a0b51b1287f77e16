from fractions import Fraction
from itertools import pairwise

import pytest

from glare.data.few_shot import drawn
from glare.errors import UserError

SPLITS = [Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1)]


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_of_a_seed_are_nested(seed: int) -> None:
    parts = [drawn(640, seed=seed, fraction=float(split)) for split in SPLITS]
    assert [len(part) for part in parts] == [20, 40, 80, 160, 320, 640]
    assert all(set(small) < set(large) for small, large in pairwise(parts))
    assert all(part == sorted(set(part)) for part in parts) and parts[-1] == list(range(640))


def test_the_seed_decides_which() -> None:
    assert drawn(50, seed=3, fraction=0.1) == drawn(50, seed=3, num_images=5)
    parts = [tuple(drawn(50, seed=seed, fraction=0.1)) for seed in range(40)]
    assert len(set(parts)) == 40
    assert len({index for part in parts for index in part}) > 45, "every image has its turn"


def test_a_share_is_rounded_and_never_empty() -> None:
    assert [len(drawn(10, seed=0, fraction=share)) for share in (1e-9, 0.14, 0.16, 0.96)] == [1, 1, 2, 10]


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(UserError, match="num_images is 11, but there are only 10 images; give at most 10"):
        drawn(10, seed=0, num_images=11)
    with pytest.raises(UserError, match=r"fraction is 0.5 and num_images 3; give one of them"):
        drawn(10, seed=0, num_images=3, fraction=0.5)
