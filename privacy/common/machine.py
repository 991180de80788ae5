"""What this process may use of its machine, and what it has taken of it.

A container's limits are those of its control groups (version 2, as Linux has them since 2016). Not covered: version 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores(groups: Path = GROUPS, own: Path = OWN_GROUP) -> int:
    """Cores that this process may use, which can be fewer than there are; a part of one counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_read(group / "cpu.max").split() for group in _groups(groups, own))
    return min([allowed, *(ceil(int(q[0]) / int(q[1])) for q in quotas if len(q) == 2 and q[0].isdecimal())])


def group_memory_left_bytes(groups: Path = GROUPS, own: Path = OWN_GROUP) -> int | None:
    """What its control groups leave this process to take; None where they set no limit. Caches of files give way."""
    left = []
    for group in _groups(groups, own):
        limit, taken = _read(group / "memory.max"), _read(group / "memory.current")
        if limit.isdecimal() and taken.isdecimal():
            facts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            left.append(max(0, int(limit) - int(taken) + int(facts.get("inactive_file", 0))))
    return min(left, default=None)


def _groups(groups: Path, own: Path) -> Iterator[Path]:
    """The folders of the control group that this process is in, and of those around it."""
    path = next((line[3:] for line in _read(own).splitlines() if line.startswith("0::")), "")
    if path:
        folder = groups / path.lstrip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(groups))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
