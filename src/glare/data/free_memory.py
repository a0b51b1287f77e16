"""How much memory this process may still take: what the system has available, within the limits of its control groups.

A scheduler's job or a container has a limit in the group of the process or in one above it (Documentation/admin-guide/
cgroup-v2.rst and cgroup-v1/memory.rst of Linux). What a group uses counts files that were read, too, which make room.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """What the files of a group are called, and the line of ``memory.stat`` with the bytes of files not in use."""

    limit: str
    used: str
    unused: str

    def left_in(self, group: Path) -> int | None:
        """Bytes that a group may still take, None where it has no limit."""
        try:
            limit, used = int((group / self.limit).read_text()), int((group / self.used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return limit - used + int(stat.get(self.unused, 0))
        except (OSError, ValueError):  # there is no such group, or it says max
            return None


VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def free_memory() -> int:
    """Bytes free for this process; half of the machine's where the system does not say."""
    if not MEMINFO.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Of each group with a limit that this process is in."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (CGROUP / "memory", VERSION_1) if controllers else (CGROUP, VERSION_2)
        own = root / path.lstrip("/")
        for group in (own, *own.parents):  # a container shows its own group as the root, whatever the path
            left = files.left_in(group) if group.is_relative_to(root) else None
            if left is not None:
                yield left
