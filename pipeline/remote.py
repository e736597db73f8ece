"""Shards on s3://, gs:// or http(s)://, through a cache folder of bounded size.

Shards come whole, ahead of their use, and are checked against the manifest's sha256 before anything reads them. Several
processes may share the folder: where it has room for what they read, each shard is fetched once, and the one that was
used longest ago makes room.
"""

import hashlib
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from simclr_dali.pipeline.cache import LOOK_AGAIN, Cache, loader_closed, locked, remove_leftovers
from simclr_dali.pipeline.download import Patience, RemoteFolder
from simclr_dali.pipeline.fetch_queue import AHEAD, THREADS, URGENT, Fetch, FetchQueue
from simclr_dali.pipeline.files import Split
from simclr_dali.shards.durable import refusals_named, sha256_of, write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import MANIFEST, TABLE, ShardSet, read_split

_STILL_READ = 16  # changes of the windows; batches made ahead may still read what was current that long ago
_TOO_OFTEN = 3  # times that a shard of the current windows is fetched

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Windows:
    """Shards that are read now, next, and before; replaced as a whole, so that a thread sees one state."""

    current: frozenset[int] = frozenset()
    upcoming: frozenset[int] = frozenset()
    past: frozenset[int] = frozenset()


def is_remote(data: str | Path) -> bool:
    return "://" in str(data)


def open_split(data: str | Path, split: str, cache: Cache, patience: Patience | None = None) -> Split:
    """A packed split, local or remote.

    Raises UserError where there is no such split, its description is damaged, or the server does not answer.
    """
    if not is_remote(data):
        return Split.local(data, split)
    if cache.folder.parts[:1] and cache.folder.parts[0].startswith("~"):
        raise UserError(
            f"{cache.folder}, which is to keep remote shards, lies in a home folder that nobody knows; give another "
            f"with --cache, or simclr.cache"
        )
    server = RemoteFolder(f"{str(data).rstrip('/')}/{split}", patience)
    manifest = _described(server, MANIFEST)
    # Another manifest means other shards under the same names: it gets a folder of its own.
    folder = cache.folder / hashlib.sha256(manifest).hexdigest()[:16] / split
    with refusals_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "description.lock"):
        write_durably(folder / MANIFEST, manifest)
        if not (folder / TABLE).is_file():
            write_durably(folder / TABLE, _described(server, TABLE))
    try:
        shards = replace(read_split(folder), source=server.url)
    except UserError as error:
        (folder / TABLE).unlink(missing_ok=True)  # the next start asks for it again
        raise UserError(f"{server.url} is damaged, or its upload is not finished: {error}") from error
    return Split(shards, lambda: RemoteFiles(shards, cache, server))


def _described(server: RemoteFolder, name: str) -> bytes:
    try:
        return server.read(name)
    except FileNotFoundError as error:
        raise UserError(
            f"no packed split at {server.url} ({name} is missing); pack it and upload the folder whole"
        ) from error


class RemoteFiles:
    """The shards of a remote set as local files, fetched in the background."""

    def __init__(self, shards: ShardSet, cache: Cache, server: RemoteFolder, *, threads: int = THREADS) -> None:
        self._shards, self._cache, self._server = shards, cache, server
        self._lock = threading.Lock()
        self._past: deque[frozenset[int]] = deque(maxlen=_STILL_READ)
        self._windows = _Windows()
        self._arrivals: Counter[int] = Counter()  # of the shards of the current windows
        self._warned = False
        remove_leftovers(self._cache.folder)
        self.queue = FetchQueue(self._bring, lambda shard: self.path(shard).is_file(), threads)

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Raises UserError where the cache cannot hold what this process alone reads at one time."""
        if (frozenset(current), frozenset(upcoming)) == (self._windows.current, self._windows.upcoming):
            return
        needed = sum(self._shards.shards[shard].bytes for shard in current)
        if needed > self._cache.limit:
            raise UserError(
                f"the shards of the current windows take {needed:,} bytes, the cache in {self._cache.folder} may "
                f"hold {self._cache.limit:,}; allow it more, or lower simclr.shuffle_window"
            )
        self._past.append(self._windows.current)
        self._windows = _Windows(frozenset(current), frozenset(upcoming), frozenset().union(*self._past))
        with self._lock:
            self._arrivals = Counter({shard: self._arrivals[shard] for shard in current})
        for shard in current:
            with suppress(OSError):  # not there yet, or not anymore
                os.utime(self.path(shard))  # used last: the last to make room
            self.queue.request(shard, URGENT)
        for shard in upcoming:
            self.queue.request(shard, AHEAD)

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        descriptor = self._open(shard)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        self.queue.stop()

    def close(self) -> None:
        self.queue.close()

    def path(self, shard: int) -> Path:
        """Where the shard lies in the cache, when it is there."""
        return self._shards.folder / self._shards.shards[shard].name

    def _open(self, shard: int) -> int:
        while True:
            try:
                return os.open(self.path(shard), os.O_RDONLY)
            except FileNotFoundError:
                self.queue.request(shard, URGENT).result()

    def _bring(self, shard: int, fetch: Fetch) -> None:
        """Have the shard in the cache, whole and checked, unless it is only expected and there is no room for it."""
        described, path = self._shards.shards[shard], self.path(shard)
        with locked(path.with_suffix(".lock"), self.queue.stopped):
            if path.is_file():
                return
            partial = path.with_suffix(".partial")
            with refusals_named(path):
                partial.unlink(missing_ok=True)  # of a process that was killed, or it could not be locked
                if not self._reserve(shard, partial, fetch):
                    return
                try:
                    for _ in range(2):
                        self._server.download(described.name, partial, described.bytes, self.queue.stopped)
                        if sha256_of(partial) == described.sha256:
                            with self._cache.room_locked():  # or who counts just then could miss it
                                partial.replace(path)
                            self._count_arrival(shard)
                            return
                finally:
                    partial.unlink(missing_ok=True)
        raise UserError(
            f"{self._shards.source}/{described.name} arrived twice with another sha256 than its manifest says; upload "
            f"it again"
        )

    def _count_arrival(self, shard: int) -> None:
        with self._lock:
            if shard in self._windows.current:
                self._arrivals[shard] += 1
            warn = self._arrivals[shard] == _TOO_OFTEN and not self._warned
            self._warned = self._warned or warn
        if warn:
            _log.warning(
                "%s was fetched %d times while it is read: %s may hold %s bytes, too little for all processes that "
                "share it; allow it more, or lower simclr.shuffle_window",
                self._shards.shards[shard].name, _TOO_OFTEN, self._cache.folder, f"{self._cache.limit:,}",
            )  # fmt: skip

    def _reserve(self, shard: int, partial: Path, fetch: Fetch) -> bool:
        """Make room for a shard and take it with a file of its size; False if it can wait and there is none."""
        size = self._shards.shards[shard].bytes
        if size > self._cache.limit:
            raise UserError(
                f"{self._shards.shards[shard].name} has {size:,} bytes, the cache in {self._cache.folder} may hold "
                f"{self._cache.limit:,}; allow it more"
            )
        while True:
            urgency = fetch.urgency  # another thread may raise it
            with self._cache.room_locked():
                if self._cache.make_room(size, *self._worth(shard, urgency)):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return True
            if urgency == fetch.urgency == AHEAD:
                return False
            # Shards that are on their way may be removable once they are here, or belong to a process that was killed.
            if self.queue.stopped.wait(LOOK_AGAIN):
                raise loader_closed()
            remove_leftovers(self._cache.folder)

    def _worth(self, shard: int, urgency: int) -> tuple[dict[Path, int], int]:
        """What this process's shards are worth, and of what worth may be removed for ``shard``.

        Shards that nobody here waits for have none; those of other processes are the youngest of these. Those of the
        current windows are removed only for a batch that was begun before them.
        """
        windows = self._windows
        worth = {self.path(number): 1 for number in windows.upcoming}
        worth |= {self.path(number): 2 for number in windows.past}
        worth |= {self.path(number): 3 for number in windows.current}
        return worth, 0 if urgency == AHEAD else 2 if shard in windows.current else 3
