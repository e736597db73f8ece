"""How many processor cores there are for a process; containers and batch systems give less than the machine has."""

import os
from contextlib import suppress
from pathlib import Path

from simclr_dali.shards.control_groups import GROUPS, PROC, control_groups


def usable_cores(proc: Path = PROC, groups: Path = GROUPS, *, share_quota: int = 1, share_affinity: int = 1) -> int:
    """Processor cores that this process may use, at least 1: of its affinity, and of the quotas of its control groups
    (cgroup v2, cpu.max; v1, cpu.cfs_quota_us).

    share_quota, share_affinity: how many processes have them in common. A batch system may give each its own cores.
    """
    cores = len(os.sched_getaffinity(0)) / share_affinity
    for folder in control_groups("cpu", proc, groups):
        with suppress(OSError, ValueError):
            quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
            if quota != "max":
                cores = min(cores, int(quota) / int(period) / share_quota)
        with suppress(OSError, ValueError):
            limit = int((folder / "cpu.cfs_quota_us").read_text())
            if limit > 0:
                cores = min(cores, limit / int((folder / "cpu.cfs_period_us").read_text()) / share_quota)
    return max(1, int(cores))
