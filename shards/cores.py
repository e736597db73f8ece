"""How many processor cores there are for a process; containers and batch systems give less than the machine has."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, GROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


def usable_cores(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Processor cores that this process may use, at least 1: of its affinity, and of the quotas of its control groups
    (cgroup v2, cpu.max; v1, cpu.cfs_quota_us)."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _control_groups(proc, groups):
        with suppress(OSError, ValueError):
            quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
            if quota != "max":
                cores = min(cores, int(quota) / int(period))
        with suppress(OSError, ValueError):
            limit = int((folder / "cpu.cfs_quota_us").read_text())
            if limit > 0:
                cores = min(cores, limit / int((folder / "cpu.cfs_period_us").read_text()))
    return max(1, int(cores))


def _control_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """The folder of this process's group and those above it; in a container the first one may be all there is."""
    yield groups
    yield groups / "cpu"
    with suppress(OSError, ValueError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                top = groups if not controllers else groups / "cpu"
                inside = top / path.lstrip("/")
                yield from (inside, *(above for above in inside.parents if above.is_relative_to(top)))
