"""Shards on s3://, gs:// or http(s)://, through a cache folder of bounded size.

Shards come whole, ahead of their use, and are checked against the manifest's sha256 before anything reads them. Several
processes may share the folder: where it has room for what they read, each shard is fetched once, and the one that was
used longest ago makes room.
"""

import hashlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec

from simclr_dali.pipeline.cache import LOOK_AGAIN, Cache, closed, kept_in, locked, remove_leftovers
from simclr_dali.pipeline.files import Files, LocalFiles
from simclr_dali.shards.durable import refusals_named, write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import MANIFEST, TABLE, ShardSet, load_split, read_split

_CHUNK = 8 << 20  # bytes per request
_ATTEMPTS = 6  # without a byte of progress; pauses double from _PAUSE, half a minute in all
_PAUSE = 0.5  # seconds
_SILENCE = 20  # seconds without a byte after which an http answer counts as failed
_THREADS = 4  # shards that come at a time
_STILL_READ = 16  # changes of the windows; batches made ahead may still read what was current that long ago
_URGENT, _AHEAD, _END = 0, 1, -1
_TOO_OFTEN = 3  # times that a shard of the current windows is fetched

_log = logging.getLogger(__name__)


@dataclass
class _Fetch:
    done: "Future[None]"
    urgency: int


@dataclass(frozen=True)
class _Windows:
    """Shards that are read now, after that, and were before; replaced as a whole, so that a thread sees one state."""

    now: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()
    before: frozenset[int] = frozenset()


def is_remote(data: str | Path) -> bool:
    return "://" in str(data)


def open_split(data: str | Path, split: str, cache: Cache) -> tuple[ShardSet, Callable[[], Files]]:
    """A packed split, local or remote, and what opens its files for a loader (its argument ``files``).

    Raises UserError where there is no such split, its description is damaged, or the server does not answer.
    """
    if not is_remote(data):
        shards = load_split(data, split)
        return shards, lambda: LocalFiles(shards)
    url = f"{str(data).rstrip('/')}/{split}"
    manifest = _download_small(url, MANIFEST)
    # Another manifest means other shards under the same names: it gets a folder of its own.
    folder = cache.folder / hashlib.sha256(manifest).hexdigest()[:16] / split
    with refusals_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "description.lock"):
        write_durably(folder / MANIFEST, manifest)
        if not (folder / TABLE).is_file():
            write_durably(folder / TABLE, _download_small(url, TABLE))
    try:
        shards = replace(read_split(folder), source=url)
    except UserError as error:
        (folder / TABLE).unlink(missing_ok=True)  # the next start asks for it again
        raise UserError(f"{url} is damaged, or its upload is not finished: {error}") from error
    return shards, lambda: RemoteFiles(shards, cache)


class RemoteFiles:
    """The shards of a remote set as local files, fetched in the background."""

    def __init__(self, shards: ShardSet, cache: Cache) -> None:
        self._shards, self._cache = shards, cache
        self._filesystem, self._root = _filesystem(shards.source)
        self._lock = threading.Lock()
        self._fetches: dict[int, _Fetch] = {}
        self._before: deque[frozenset[int]] = deque(maxlen=_STILL_READ)
        self._windows = _Windows()
        self._arrivals: Counter[int] = Counter()  # of the shards of the current windows
        self._told = False
        self._queue: queue.PriorityQueue[tuple[int, int, int]] = queue.PriorityQueue()
        self._turn = itertools.count()
        self._stop = threading.Event()
        remove_leftovers(self._cache.folder)
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def expect(self, now: Sequence[int], after: Sequence[int]) -> None:
        """Raises UserError where the cache cannot hold what this process alone reads at one time."""
        if (frozenset(now), frozenset(after)) == (self._windows.now, self._windows.after):
            return
        needed = sum(self._shards.shards[shard].bytes for shard in now)
        if needed > self._cache.limit:
            raise UserError(
                f"the shards of the current windows take {needed:,} bytes, the cache in {self._cache.folder} may "
                f"hold {self._cache.limit:,}; allow it more, or lower simclr.shuffle_window"
            )
        self._before.append(self._windows.now)
        self._windows = _Windows(frozenset(now), frozenset(after), frozenset().union(*self._before))
        with self._lock:
            self._arrivals = Counter({shard: self._arrivals[shard] for shard in now})
        for shard in now:
            with suppress(OSError):  # not there yet, or not anymore
                os.utime(self._path(shard))  # used last: the last to make room
            self._fetch(shard, _URGENT)
        for shard in after:
            self._fetch(shard, _AHEAD)

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        descriptor = self._open(shard)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        self._stop.set()
        with self._lock:
            for fetch in self._fetches.values():
                if not (fetch.done.running() or fetch.done.done()):  # what runs notices by itself
                    fetch.done.set_exception(closed())

    def close(self) -> None:
        self.stop()
        for _ in self._threads:
            self._queue.put((_END, 0, 0))
        for thread in self._threads:
            thread.join()

    def _open(self, shard: int) -> int:
        while True:
            try:
                return os.open(self._path(shard), os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(shard, _URGENT).result()

    def _path(self, shard: int) -> Path:
        return self._shards.folder / self._shards.shards[shard].name

    def _fetch(self, shard: int, urgency: int) -> "Future[None]":
        with self._lock:
            if self._stop.is_set():
                raise closed()
            fetch = self._fetches.get(shard)
            over = fetch is not None and fetch.done.done()
            if fetch is None or (over and (fetch.done.exception() or not self._path(shard).is_file())):
                fetch = self._fetches[shard] = _Fetch(Future(), urgency)
                self._queue.put((urgency, next(self._turn), shard))
            elif urgency < fetch.urgency and not fetch.done.done():
                fetch.urgency = urgency
                self._queue.put((urgency, next(self._turn), shard))
            return fetch.done

    def _work(self) -> None:
        while True:
            turn, _, shard = self._queue.get()
            if turn == _END:
                return
            with self._lock:
                fetch = self._fetches[shard]
                if fetch.done.running() or fetch.done.done():
                    continue
                fetch.done.set_running_or_notify_cancel()
            try:
                self._bring(shard, fetch)
                fetch.done.set_result(None)
            except BaseException as error:
                fetch.done.set_exception(error)

    def _bring(self, shard: int, fetch: _Fetch) -> None:
        """Have the shard in the cache, whole and checked, unless it is only expected and there is no room for it."""
        described, path = self._shards.shards[shard], self._path(shard)
        with locked(path.with_suffix(".lock"), self._stop):
            if path.is_file():
                return
            partial = path.with_suffix(".partial")
            with refusals_named(path):
                partial.unlink(missing_ok=True)  # of a process that was killed, or it could not be locked
                if not self._reserve(shard, partial, fetch):
                    return
                try:
                    for _ in range(2):
                        self._copy(described.name, partial, described.bytes)
                        if _sha256(partial) == described.sha256:
                            with self._room_locked():  # or it could be missed by who counts just then
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
            if shard in self._windows.now:
                self._arrivals[shard] += 1
            tell = self._arrivals[shard] == _TOO_OFTEN and not self._told
            self._told = self._told or tell
        if tell:
            _log.warning(
                "%s was fetched %d times while it is read: %s may hold %s bytes, too little for all processes that "
                "share it; allow it more, or lower simclr.shuffle_window",
                self._shards.shards[shard].name, _TOO_OFTEN, self._cache.folder, f"{self._cache.limit:,}",
            )  # fmt: skip

    def _reserve(self, shard: int, partial: Path, fetch: _Fetch) -> bool:
        """Make room for a shard and take it with a file of its size; False if it can wait and there is none."""
        size = self._shards.shards[shard].bytes
        if size > self._cache.limit:
            raise UserError(
                f"{self._shards.shards[shard].name} has {size:,} bytes, the cache in {self._cache.folder} may hold "
                f"{self._cache.limit:,}; allow it more"
            )
        while True:
            urgency = fetch.urgency  # another thread may raise it
            with self._room_locked():
                if self._make_room(shard, size, urgency):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return True
            if urgency == fetch.urgency == _AHEAD:
                return False
            # Shards that are on their way may go once they are here, or belong to a process that was killed.
            if self._stop.wait(LOOK_AGAIN):
                raise closed()
            remove_leftovers(self._cache.folder)

    def _make_room(self, shard: int, size: int, urgency: int) -> bool:
        kept, windows = kept_in(self._cache.folder), self._windows
        # Shards that nobody here waits for go first, the longest unused of them first; those of other processes are
        # the youngest of these. Those of the current windows go only for a batch that was begun before them.
        worth = {self._path(number): 1 for number in windows.after}
        worth |= {self._path(number): 2 for number in windows.before}
        worth |= {self._path(number): 3 for number in windows.now}
        most = 0 if urgency == _AHEAD else 2 if shard in windows.now else 3
        may_go = [path for path in kept if path.suffix == ".tar" and worth.get(path, 0) <= most]
        may_go.sort(key=lambda path: (worth.get(path, 0), kept[path].st_mtime))
        excess = sum(stat.st_size for stat in kept.values()) + size - self._cache.limit
        if excess > sum(kept[path].st_size for path in may_go):
            return False  # and nobody loses a shard for it
        for path in may_go:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= kept[path].st_size
        return True

    def _room_locked(self) -> AbstractContextManager[None]:
        return locked(self._cache.folder / "room.lock")

    def _copy(self, name: str, target: Path, size: int) -> None:
        """Copy a remote file into ``target``, going on where an attempt broke off."""
        at, best, failures, streaming = 0, 0, 0, False
        with target.open("r+b") as file:
            while at < size:
                if streaming:
                    at = 0
                how = {"block_size": 0} if streaming else {"cache_type": "none"}
                try:
                    with self._filesystem.open(f"{self._root}/{name}", "rb", **how) as remote:
                        if at:
                            remote.seek(at)
                        file.seek(at)
                        while chunk := remote.read(min(_CHUNK, size - at)):
                            if self._stop.is_set():
                                raise closed()
                            with refusals_named(target):
                                at += file.write(chunk)
                    if at < size:
                        raise EOFError(f"it ended after {at:,} of {size:,} bytes")
                except UserError:
                    raise
                except ValueError:
                    if streaming:
                        raise
                    streaming = True  # a server that knows no ranges: whole files only, from the start
                except Exception as error:
                    failures = 0 if at > best else failures + 1
                    best = max(best, at)
                    if failures == _ATTEMPTS:
                        raise _unreachable(f"{self._shards.source}/{name}", error) from error
                    self._stop.wait(_PAUSE * 2**failures)
            # Its name says that it is whole and checked, after a loss of power too.
            file.flush()
            os.fsync(file.fileno())


def _download_small(url: str, name: str) -> bytes:
    """The bytes of a file that belongs to a split's description."""
    filesystem, root = _filesystem(url)
    for attempt in range(_ATTEMPTS):
        try:
            data: bytes = filesystem.cat_file(f"{root}/{name}")
            return data
        except FileNotFoundError as error:
            raise UserError(
                f"no packed split at {url} ({name} is missing); pack it and upload the folder whole"
            ) from error
        except Exception as error:
            if attempt == _ATTEMPTS - 1:
                raise _unreachable(f"{url}/{name}", error) from error
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError


def _filesystem(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    try:
        if url.startswith("http"):
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)}
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot read {url}: {error}; the packages for remote data come with: pip install 'simclr-dali[remote]'"
        ) from error
    return filesystem, root


def _unreachable(url: str, error: Exception) -> UserError:
    return UserError(
        f"{url} cannot be read after {_ATTEMPTS} attempts ({type(error).__name__}: {error}); look at the address, the "
        f"credentials and the network, then start the same command again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()
