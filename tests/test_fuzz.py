"""Some hundred cases of the fuzz, and whether it would notice what it looks for."""

import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz
import pytest
from fuzz_mutations import mutated
from fuzz_targets import Target, targets

from glare.data.sources import BadImage
from glare.errors import UserError

CASES = 600


@pytest.fixture(scope="module")
def known() -> dict[str, Target]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return targets()


@pytest.fixture(scope="module")
def watch() -> Iterator[fuzz.Watch]:
    made = fuzz.Watch(None, [])
    sys.addaudithook(made.event)
    with fuzz.limited():
        yield made


def test_every_valid_file_is_read(known: dict[str, Target], watch: fuzz.Watch, tmp_path: Path) -> None:
    for name, target in known.items():
        for number, content in enumerate(target.seeds):
            result = fuzz.outcome(target, content, tmp_path / name.replace("/", " ") / str(number), watch)
            assert result == ("read", ""), name


def test_some_hundred_damaged_files_end_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counts = fuzz.fuzz(CASES, 0, keep=tmp_path)
    said = capfd.readouterr().out
    assert {result for _, result in counts} == {"read", "refused"}, said
    assert sum(counts.values()) == CASES and len({name for name, _ in counts}) > 25
    assert list(tmp_path.iterdir()) == []


def writes_beside(folder: Path) -> None:
    (folder.parent / "escaped").write_text("x")


def moves_away(folder: Path) -> None:
    (folder / "a").rename(folder.parent / "b")


def starts_a_program(_: Path) -> None:
    subprocess.run(["true"], check=True)


def hangs(_: Path) -> None:
    time.sleep(60)


def swallows_and_hangs(_: Path) -> None:
    try:
        time.sleep(60)
    except Exception:  # as a reader that catches too much; the watch has to get through it
        time.sleep(60)


def takes_all_memory(_: Path) -> None:
    bytearray(2 * fuzz.MEMORY_BYTES)


def fails(_: Path) -> None:
    raise KeyError("a")


def says_nothing(_: Path) -> None:
    raise UserError(" ")


def says_two_lines(_: Path) -> None:
    raise BadImage("it", "one\ntwo")


FAULTS: dict[Callable[[Path], None], str] = {
    writes_beside: "outside",
    moves_away: "outside",
    starts_a_program: "outside",
    hangs: "hang",
    swallows_and_hangs: "hang",
    takes_all_memory: "crash",
    fails: "crash",
    says_nothing: "bad message",
    says_two_lines: "bad message",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_goes_wrong_is_noticed(
    fault: Callable[[Path], None], watch: fuzz.Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    result, _ = fuzz.outcome(Target("a", [b""], fault), b"", tmp_path / "case", watch)
    assert result == FAULTS[fault]


def test_writing_into_its_own_folder_is_no_fault(watch: fuzz.Watch, tmp_path: Path) -> None:
    own = Target("a", [b""], lambda folder: (folder / "b").write_text("x"))
    assert fuzz.outcome(own, b"", tmp_path / "case", watch)[0] == "read"
    assert watch.inside is None


def test_the_same_seed_gives_the_same_files(known: dict[str, Target]) -> None:
    seeds = known["image.png"].seeds
    made = [[mutated(seeds, random.Random(number)) for number in range(50)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 40
