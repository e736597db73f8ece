"""The control groups that bound a process: containers and batch systems give less than the machine has."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, GROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


def control_groups(controller: str, proc: Path = PROC, groups: Path = GROUPS) -> Iterator[Path]:
    """The folder of this process's group and those above it, of cgroup v2 and of v1's ``controller``; in a container
    the first one may be all there is."""
    yield groups
    yield groups / controller
    with suppress(OSError, ValueError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                top = groups if not controllers else groups / controller
                inside = top / path.lstrip("/")
                yield from (inside, *(above for above in inside.parents if above.is_relative_to(top)))
