"""A folder of bounded size in which the processes of a machine keep remote shards.

A shard lies there under its name when it is whole, and as ``.partial`` of its full size while it comes; whoever brings
it holds its ``.lock``.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError

LOOK_AGAIN = 0.05  # seconds after which what another process holds is asked for once more


@dataclass
class Cache:
    """Where remote shards are kept on the local disk, and how many bytes of them at most, over all processes."""

    folder: Path
    limit: int

    @staticmethod
    def at(folder: str | Path, gigabytes: float) -> "Cache":
        """One in ``folder``, which may begin with ``~``; that is an error only where something is to be kept."""
        path = Path(folder)
        with suppress(RuntimeError):  # a user without a home folder may work on local data
            path = path.expanduser()
        return Cache(path, int(gigabytes * 1e9))

    def room_locked(self) -> AbstractContextManager[None]:
        """Hold the lock under which kept shards are counted and added."""
        return locked(self.folder / "room.lock")

    def make_room(self, size: int, worth: dict[Path, int], most: int) -> bool:
        """Remove shards until ``size`` bytes more fit, those of the least worth first, of these the longest unused.

        ``worth`` ranks the shards that this process needs; all others have 0. Only those worth at most ``most`` may be
        removed. Where that is not enough, nothing is, and the answer is False. The caller holds :meth:`room_locked`.
        """
        kept = kept_in(self.folder)
        removable = [path for path in kept if path.suffix == ".tar" and worth.get(path, 0) <= most]
        removable.sort(key=lambda path: (worth.get(path, 0), kept[path].st_mtime))
        excess = sum(stat.st_size for stat in kept.values()) + size - self.limit
        if excess > sum(kept[path].st_size for path in removable):
            return False
        for path in removable:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= kept[path].st_size
        return True


def kept_in(folder: Path) -> dict[Path, os.stat_result]:
    """The shards that a cache holds, whole or on their way."""
    kept = {}
    # Only below folders that are named by a manifest: a cache folder may hold tars of its owner too.
    for path in folder.glob(f"{'[0-9a-f]' * 16}/*/*"):
        if path.suffix in (".tar", ".partial"):
            with suppress(FileNotFoundError):  # another process removed it
                kept[path] = path.stat()
    return kept


def remove_leftovers(folder: Path) -> None:
    """Free what a killed process was fetching: nobody holds its lock any more."""
    for partial in kept_in(folder):
        if partial.suffix != ".partial":
            continue
        with refusals_named(partial), partial.with_suffix(".lock").open("a") as file:
            if _try_lock(file):
                partial.unlink(missing_ok=True)


def loader_closed() -> UserError:
    return UserError("the loader was closed")


@contextmanager
def locked(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold a lock that all processes of this machine respect; it goes with the process that holds it.

    Raises UserError where ``stop`` is set while another process holds it.
    """
    with refusals_named(path):
        file = path.open("a")
    with file:
        while stop and not _try_lock(file):
            if stop.wait(LOOK_AGAIN):
                raise loader_closed()
        if not stop:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
