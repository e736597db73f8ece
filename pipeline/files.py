"""The tars of a split as files that can be read: opened, and fetched ahead in whole shards."""

import os
import queue
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet, load_split

_FEW_FILES, _SPARE_FILES = 16, 256  # descriptors that the rest of the process will need at least, and in comfort
_REQUEST = 1 << 20  # bytes; the kernel reads no more than about this ahead on one request


class Files(Protocol):
    """Where a SampleReader finds its shards; numbers are places in the manifest."""

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Name the shards that are read now and those that come next; they are fetched in the background."""

    def opened(self, shard: int) -> AbstractContextManager[int]:
        """A descriptor to read the shard with; waits for it where it still has to be fetched."""

    def stop(self) -> None:
        """Let nobody wait for a shard any more; who does gets an error."""

    def close(self) -> None:
        """End the threads and close what is open; nobody may be reading."""


@dataclass(frozen=True)
class Split:
    """A packed split, and what opens its files; every user opens them anew."""

    shards: ShardSet
    open_files: Callable[[], Files]

    @staticmethod
    def local(data: Path | str, split: str) -> "Split":
        """``data/split`` on this machine. Raises UserError where there is none."""
        shards = load_split(data, split)
        return Split(shards, lambda: LocalFiles(shards))


class LocalFiles:
    """Shards on a disk or a network file system.

    A thread asks the kernel to read expected shards into its page cache, whole and one after the other: a disk then
    sees one sequential stream instead of the scattered reads of a shuffled window. The page cache gives way where
    memory is short, so this takes no memory from anyone.
    """

    def __init__(self, shards: ShardSet) -> None:
        _allow_open_files(len(shards.shards))
        self._sizes = [shard.bytes for shard in shards.shards]
        try:
            self._descriptors = [os.open(shards.folder / shard.name, os.O_RDONLY) for shard in shards.shards]
        except OSError as error:
            raise UserError(f"cannot open {error.filename} ({error.strerror}); copy it back or repair it") from error
        self._expected: set[int] = set()
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fetch_expected, name="fetch", daemon=True)
        self._thread.start()

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        shards = [*current, *upcoming]
        new = [shard for shard in shards if shard not in self._expected]
        self._expected = set(shards)
        for shard in new:
            self._queue.put(shard)

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        yield self._descriptors[shard]

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self.stop()
        self._queue.put(None)
        self._thread.join()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _fetch_expected(self) -> None:
        while (shard := self._queue.get()) is not None:
            for at in range(0, self._sizes[shard], _REQUEST):
                if self._stop.is_set():
                    return
                os.posix_fadvise(self._descriptors[shard], at, _REQUEST, os.POSIX_FADV_WILLNEED)


def _allow_open_files(shards: int) -> None:
    # Other sets may be open in this process, as while an evaluation interrupts training.
    needed = len(list(Path("/proc/self/fd").iterdir())) + shards + _FEW_FILES
    wanted = needed + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit < needed:
        raise UserError(
            f"this process needs {needed} open files, {shards} of them for a set of shards, and its limit is {hard}; "
            f"raise it (ulimit -n {wanted}) or pack larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
