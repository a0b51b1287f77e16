"""The house rules that a reader relies on: imports go one way, files and functions stay short."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "glare"

ONE_WAY = (
    ("geometry", "views", "data"),
    ("geometry", "regions", "losses", "objectives"),
    ("configuration_glare", "segmentation_heads", "modeling_glare", "objectives"),
    ("uniadapter", "modeling_glare"),
    ("recipes", "run_folder"),
    ("checkpoints", "run_folder"),
)
"""In each row, no module leads to one on its right, however long the way."""

JOBS = {
    "bench",
    "bench_ways",
    "classify",
    "compare",
    "comparison_finetuning",
    "convert",
    "demo",
    "evaluate",
    "export",
    "finetune",
    "hub",
    "inference",
    "inspect",
    "model_push",
    "pretrain",
}
TRAVELLING = {"configuration_glare", "modeling_glare", "segmentation_heads", "uniadapter"}
"""The files that are copied into a checkpoint."""

EXTRAS = {"data.geotiff": "geotiff"}
"""Module -> the extra whose packages it may import, too."""

OTHER_IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``data/cache.py`` is data.cache, ``data/__init__.py`` is data, the package itself is the empty name."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of all imports in a file, also of those inside functions."""
    package = ("glare", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_behind(name: str) -> str | None:
    """The module of this package that an imported name lies in, None for other packages."""
    if name.split(".")[0] != "glare":
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


@cache
def direct(module: str) -> frozenset[str]:
    found = {module_behind(name) for name in imported(MODULES[module])}
    return frozenset(name for name in found if name is not None and name != module)


@cache
def reached(module: str) -> frozenset[str]:
    """All modules that an import of ``module`` leads to."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        new = direct(pending.pop()) - seen
        seen |= new
        pending += new
    return frozenset(seen)


def belongs(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


@pytest.mark.parametrize("module", MODULES)
def test_no_module_leads_back_to_itself(module: str) -> None:
    assert module not in reached(module)


@pytest.mark.parametrize("row", ONE_WAY)
def test_imports_go_one_way(row: tuple[str, ...]) -> None:
    for place, left in enumerate(row):
        for module in (name for name in MODULES if belongs(name, left)):
            wrong = {name for name in reached(module) for right in row[place + 1 :] if belongs(name, right)}
            assert not wrong, f"{module} leads to {wrong}"


def test_the_rows_name_modules_that_exist() -> None:
    for part in {*TRAVELLING, *(part for row in ONE_WAY for part in row)}:
        assert any(belongs(name, part) for name in MODULES), part


@pytest.mark.parametrize("module", [name for name in MODULES if belongs(name, "objectives")])
def test_objectives_see_no_model(module: str) -> None:
    assert not direct(module) & {*TRAVELLING, "backbones", "student", "teacher"}


def test_the_adapter_knows_nothing_of_glare() -> None:
    assert not direct("uniadapter")


@pytest.mark.parametrize("module", MODULES)
def test_only_jobs_import_jobs(module: str) -> None:
    if module not in JOBS:
        # the package itself gives its models the way to publish themselves
        assert direct(module) & JOBS == ({"model_push"} if module == "" else set())
    if module != "__main__":
        assert "cli" not in direct(module)


@pytest.mark.parametrize("module", sorted(TRAVELLING))
def test_files_that_travel_import_little_and_each_other_by_one_dot(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in TRAVELLING
    outside = {name.split(".")[0] for name in imported(MODULES[module])} - {"glare"}
    assert outside - sys.stdlib_module_names <= {"torch", "transformers", "peft"}
    assert not any(re.match(r"\s*(from|import) glare", line) for line in MODULES[module].read_text().splitlines())


@pytest.mark.parametrize("module", MODULES)
def test_only_declared_dependencies_are_imported(module: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"][EXTRAS[module]] if module in EXTRAS else []
    distributions = [re.split(r"[><=\[ ]", line)[0] for line in (*project["dependencies"], *extra)]
    allowed = {OTHER_IMPORT_NAMES.get(name, name.replace("-", "_")) for name in distributions}
    outside = {name.split(".")[0] for name in imported(MODULES[module])} - {"glare", "_typeshed"}
    assert outside - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    file_lines = text.count("\n")
    assert file_lines <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            loop = node.name == "run" and name_of(path) in JOBS
            assert loop or lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_drawer_for_everything() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]
    assert not [path for path in FILES if "from __future__" in path.read_text(encoding="utf-8")]
