"""Cores that a process may use, where a control group gives less than the machine has."""

import os
from pathlib import Path

import pytest

from simclr_dali.shards.cores import usable_cores

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own_groups", "files", "cores"),
    [
        ("0::/job/step", {"job/step/cpu.max": "max 100000"}, ALL),
        ("0::/job/step", {"job/step/cpu.max": "100000 100000"}, 1),
        ("0::/job/step", {"job/step/cpu.max": "max 100000", "job/cpu.max": "150000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, ALL),
        ("0::/elsewhere", {"cpu.max": "100000 100000"}, 1),
        ("0::/job", {"job/cpu.max": "nonsense"}, ALL),
        ("nonsense", {}, ALL),
    ],
)
def test_quotas_of_control_groups(own_groups: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(f"{own_groups}\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert usable_cores(tmp_path, tmp_path / "groups") == cores
    assert usable_cores(tmp_path, tmp_path / "groups", share_quota=2, share_affinity=2) == max(1, cores // 2)


def test_it_is_at_least_one_and_at_most_the_affinity(tmp_path: Path) -> None:
    assert 1 <= usable_cores() <= ALL
    assert usable_cores(tmp_path, tmp_path) == ALL
