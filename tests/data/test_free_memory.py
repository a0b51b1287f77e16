"""The memory that a process is given: the machine's, a container's or a job's."""

from pathlib import Path

import pytest

from glare.data import free_memory as module
from glare.data.cache import memory_budget
from glare.data.free_memory import free_memory

AVAILABLE = 1000 * 1024
FILES = {
    "0::": ("", "memory.max", "memory.current", "inactive_file"),
    "4:memory:": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "7:cpu,memory:": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    for name in ("meminfo", "membership", "cgroup"):
        monkeypatch.setattr(module, name.upper(), tmp_path / name)


def write_group(tmp_path: Path, line: str, path: str, limit: object, *, used: int = 0, unused: int = 0) -> None:
    """A group of control groups of the version in ``line``."""
    mount, *names = FILES[line]
    folder = tmp_path / "cgroup" / mount / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names[:2], "memory.stat"), (limit, used, f"anon 7\n{names[2]} {unused}"), strict=True):
        (folder / name).write_text(f"{text}\n")


def test_without_groups_it_is_what_the_system_has_available(tmp_path: Path) -> None:
    assert free_memory() == AVAILABLE
    (tmp_path / "membership").write_text("9:name=systemd:/\n3:cpuset:/a\n0::/a\n")
    assert free_memory() == AVAILABLE


@pytest.mark.parametrize("line", FILES)
@pytest.mark.parametrize("where", ["", "job", "job/step"])
def test_the_limit_of_a_group_or_of_one_above_it_holds(line: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text(f"3:cpuset:/elsewhere\n{line}/job/step\n")
    for path in ("", "job", "job/step"):
        write_group(tmp_path, line, path, "max")
    write_group(tmp_path, line, "job/another", 1)
    assert free_memory() == AVAILABLE
    write_group(tmp_path, line, where, 500_000, used=100_000)
    assert free_memory() == 400_000
    write_group(tmp_path, line, where, 50_000, used=100_000)
    assert free_memory() == 0


@pytest.mark.parametrize("line", FILES)
def test_files_that_were_read_make_room(line: str, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text(f"{line}/\n")
    write_group(tmp_path, line, "", 500_000, used=450_000, unused=300_000)
    assert free_memory() == 350_000


def test_half_of_it_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_budget() == AVAILABLE // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget() == AVAILABLE // 8


def test_a_system_that_does_not_say_has_memory_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "meminfo").unlink()
    assert free_memory() > 2**20
