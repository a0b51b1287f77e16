"""One dataclass is one YAML file is one command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from glare.errors import UserError
from glare.recipes import from_dict, nearest, option, parse, parse_given, required, to_dict, to_yaml


@dataclass(frozen=True)
class Pieces:
    count: int = option(3, "pieces of a whole")
    kind: str = option("round", "their form", choices=("round", "square"))

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}; give 0 or more")


@dataclass(frozen=True)
class Cut:
    ratio: tuple[float, float] = option((0.25, 1.0), "low and high")
    pieces: Pieces = option(Pieces(), "what it yields")


@dataclass(frozen=True)
class Job:
    """Cut 100 % of a thing."""

    data: str = required("what to cut")
    output: Path = required("folder to write")
    steps: int | None = option(None, "cuts; derived where not given")
    learning_rate: float = option(0.01, "of 100% of the blade")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the arithmetic")
    terms: tuple[str, ...] = option(("a", "b"), "terms", choices=("a", "b", "c"))
    names: list[str] = option(["x"], "names")
    match: str | None = option(None, "glob")
    strict: bool = option(False, "stop at the first error")
    cut: Cut = option(Cut(), "how to cut")
    plain: Pieces = field(default_factory=lambda: Pieces(count=7))


@dataclass(frozen=True)
class ImagesJob:
    model: str = required("model")
    images: list[Path] = required("pictures", positional=True)
    steps: int = option(1, "steps")


GIVEN = ["--data", "d", "--output", "o"]


def job(*argv: str) -> Job:
    return parse(Job, [*GIVEN, *argv], prog="glare job")


def message(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        job(*argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


def test_defaults() -> None:
    recipe = job()
    assert recipe == Job(data="d", output=Path("o"))
    assert recipe.names == ["x"]
    assert recipe.plain == Pieces(count=7)


def test_options_are_read_as_the_type_of_their_field() -> None:
    recipe = job("--steps", "12", "--learning-rate", "1e-3", "--precision", "bf16", "--terms", "c,a", "--strict")
    assert (recipe.steps, recipe.learning_rate, recipe.precision, recipe.strict) == (12, 1e-3, "bf16", True)
    assert recipe.terms == ("c", "a")
    assert job("--learning-rate", "1/32").learning_rate == 1 / 32
    assert "learning_rate is '1/0'; expected a number" in message("--learning-rate", "1/0")
    assert job("--match", "123").match == "123"
    assert job("--match", "!tile1_003,a*").match == "!tile1_003,a*"
    assert job("--match", "null").match is None
    assert job("--names", "").names == []
    assert job("--strict", "--no-strict").strict is False


def test_overrides_reach_nested_keys_and_stand_anywhere() -> None:
    recipe = job("cut.pieces.count=5", "--steps", "2", "cut.ratio=[0.5, 1]", "learning_rate=1e-5", "strict=yes")
    assert recipe.cut == Cut(ratio=(0.5, 1.0), pieces=Pieces(count=5))
    assert (recipe.steps, recipe.learning_rate, recipe.strict) == (2, 1e-5, True)
    assert job("match=a=b").match == "a=b"


def test_file_then_options_then_overrides(tmp_path: Path) -> None:
    text = "data: from file\nsteps: 1\nlearning_rate: 1e-3\nmatch: 'yes'\ncut:\n  ratio: [0, 1]\n  pieces: {count: 9}\n"
    file = recipe_file(tmp_path, text)
    recipe = parse(
        Job, ["--recipe", file, "--output", "o", "--steps", "2", "steps=3", "cut.pieces.kind=square"], prog="j"
    )
    assert recipe.data == "from file"
    assert recipe.steps == 3
    assert recipe.learning_rate == 1e-3
    assert recipe.match == "yes"
    assert recipe.cut == Cut(ratio=(0.0, 1.0), pieces=Pieces(count=9, kind="square"))


def test_keys_of_an_empty_group_keep_their_defaults(tmp_path: Path) -> None:
    assert job("--recipe", recipe_file(tmp_path, "plain:\ncut: {}\n")).plain == Pieces(count=7)


def test_part_of_a_group_keeps_the_rest_of_its_default() -> None:
    assert job("plain.kind=square").plain == Pieces(count=7, kind="square")


def test_round_trip(tmp_path: Path) -> None:
    recipe = job("--match", "yes", "--learning-rate", "1e-7", "--names", "1,null,ä", "cut.pieces.count=0")
    assert from_dict(Job, to_dict(recipe)) == recipe
    file = recipe_file(tmp_path, to_yaml(recipe))
    assert parse(Job, ["--recipe", file], prog="j") == recipe


def test_given_keys_only() -> None:
    given = parse_given(Job, [*GIVEN, "--steps", "4", "cut.pieces.count=1", "cut.ratio=0,1"], prog="j")
    assert given == {
        "data": "d",
        "output": Path("o"),
        "steps": 4,
        "cut": {"pieces": {"count": 1}, "ratio": (0.0, 1.0)},
    }
    assert from_dict(Job, given) == job("steps=4", "cut.pieces.count=1", "cut.ratio=0,1")


def test_items_of_a_list_are_arguments_of_their_own_or_separated_by_commas() -> None:
    assert job("--terms", "a", "c").terms == job("--terms", "a,c").terms == ("a", "c")
    assert job("--terms", "a", "c", "steps=3", "cut.pieces.count=2") == job(
        "--terms", "a,c", "--steps", "3", "cut.pieces.count=2"
    )
    assert "unknown" not in message("--terms", "a", "d") and "'d'" in message("--terms", "a", "d")


def test_positional_list() -> None:
    recipe = parse(ImagesJob, ["a.png", "--model", "m", "b/c=d.png", "steps=3", "e.png"], prog="j")
    assert recipe.images == [Path("a.png"), Path("b/c=d.png"), Path("e.png")]
    assert recipe.steps == 3
    with pytest.raises(UserError, match="missing: --model, IMAGES"):
        parse(ImagesJob, [], prog="j")
    with pytest.raises(UserError, match="unexpected argument 'stray'"):
        job("stray")


def test_a_file_that_looks_like_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x=1.png").touch()
    with pytest.raises(UserError, match=r"the file is written \./x=1\.png"):
        parse(ImagesJob, ["--model", "m", "x=1.png"], prog="j")
    assert parse(ImagesJob, ["--model", "m", "./x=1.png"], prog="j").images == [Path("x=1.png")]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--lerning-rate", "1"], ["unknown option --lerning-rate", "--learning-rate"]),
        (["--lr", "1"], ["unknown option --lr", "--learning-rate"]),
        (["--count", "1"], ["unknown option --count", "count=VALUE"]),
        (["--step", "1"], ["unknown option --step;", "--steps"]),
        (["stps=1"], ["unknown key 'stps'", "'steps'"]),
        (["pieces.count=1"], ["unknown key 'pieces.count'", "'cut.pieces.count'"]),
        (["cut=1"], ["unknown key 'cut'", "'cut."]),
        (["--steps", "many"], ["steps is 'many'", "a whole number or null"]),
        (["--steps", "1.5"], ["steps is '1.5'", "a whole number"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--learning-rate", "nan"], ["learning_rate is 'nan'", "a number"]),
        (["--strict=1"], ["--strict"]),
        (["strict=perhaps"], ["strict is 'perhaps'", "true or false"]),
        (["--precision", "bf61"], ["precision is 'bf61'", "one of fp32, bf16"]),
        (["--terms", "a,d"], ["terms is 'd'", "a, b, c"]),
        (["cut.ratio=0.5"], ["cut.ratio is '0.5'", "2 values"]),
        (["cut.pieces.kind=squire"], ["cut.pieces.kind is 'squire'", "round, square", "nearest is 'square'"]),
        (["cut.pieces.count=-1"], ["cut.pieces: count is -1", "0 or more"]),
        (["--output", ""], ["output is ''", "a path"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], parts: list[str]) -> None:
    text = message(*argv)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate: 1", ["unknown key 'lerning_rate' in ", "job.yaml", "'learning_rate'"]),
        ("cut: {pieces: {cuont: 1}}", ["unknown key 'cut.pieces.cuont'", "job.yaml", "'cut.pieces.count'"]),
        ("steps: [", ["job.yaml is not valid YAML", "line 1"]),
        ("steps: 1\ndata: a\nsteps: 2", ["job.yaml has 'steps' twice", "line 3"]),
        ("cut: {ratio: [0, 1], ratio: [1, 1]}", ["'ratio' twice"]),
        ("- a", ["job.yaml holds no keys"]),
        ("match: 123", ["match is '123'", "in quotes"]),
        ("steps: true", ["steps is 'true'", "a whole number or null"]),
        ("strict: 1", ["strict is '1'", "true or false"]),
        ("terms: a", ["terms is 'a'", "a list"]),
        ("cut: 3", ["cut is '3'", "keys and values"]),
        ("data: !!python/object/apply:os.getcwd []", ["not valid YAML", "line 1"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = message("--recipe", recipe_file(tmp_path, text))
    assert all(part in found for part in parts), found


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in message("--recipe", str(tmp_path / "absent.yaml"))
    assert "Is a directory" in message("--recipe", str(tmp_path))
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "not text in UTF-8" in message("--recipe", str(tmp_path / "picture.yaml"))


def test_missing_keys_are_named_together() -> None:
    with pytest.raises(UserError, match="missing: --data, --output;"):
        parse(Job, [], prog="glare job")


def test_help_holds_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Job, ["--help"], prog="glare job")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Cut 100 % of a thing." in text
    assert "--learning-rate X of 100% of the blade (default: 0.01)" in text
    assert "--precision {fp32,bf16}" in text
    assert "cut.pieces.kind their form: round, square (default: round)" in text
    assert "plain.count pieces of a whole (default: 7)" in text
    assert "cut.ratio low and high (default: 0.25,1.0)" in text
    assert "--cut" not in text


def test_nearest() -> None:
    assert nearest("lerning_rate", ["learning_rate", "min_learning_rate"]) == "learning_rate"
    assert nearest("num_local", ["num_workers", "views.num_local"]) == "views.num_local"
    assert nearest("bs", ["steps", "batch_size"]) == "batch_size"
