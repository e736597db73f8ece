"""How much memory of the machine a process may still take."""

from contextlib import suppress
from pathlib import Path

from simclr_dali.shards.control_groups import GROUPS, PROC, control_groups

_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free_memory(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Bytes: what the kernel calls available (proc(5), MemAvailable), and what the control groups leave of their
    limits; files in the page cache give way and count as free (cgroup v2, memory.max and memory.high, beyond which a
    process is slowed down; v1, memory.limit_in_bytes). 0 where the kernel does not say."""
    free = 0
    with suppress(OSError, ValueError, KeyError):
        free = _named_numbers(proc.parent / "meminfo")["MemAvailable:"] * 1024
    for folder in control_groups("memory", proc, groups):
        for limit, used in _LIMITS:
            with suppress(OSError, ValueError, KeyError):  # no such group, or no limit ("max")
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                files = _named_numbers(folder / "memory.stat")
                free = min(free, left + files["inactive_file"] + files["active_file"])
    return max(0, free)


def _named_numbers(path: Path) -> dict[str, int]:
    return {name: int(number) for name, number, *_ in (line.split() for line in path.read_text().splitlines())}
