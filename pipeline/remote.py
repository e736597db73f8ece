"""Shards on s3://, gs:// or http(s)://, through a cache folder of bounded size.

Shards come whole, ahead of their use, and are checked against the manifest's sha256 before anything reads them. Several
processes may share the folder: each shard is fetched once, and the one that was used longest ago makes room.
"""

import fcntl
import hashlib
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec

from pipeline.files import Files, LocalFiles
from shards.durable import refusals_named, write_durably
from shards.errors import UserError
from shards.manifest import MANIFEST, TABLE, ShardSet, load_split, read_split

_CHUNK = 8 << 20  # bytes per request
_ATTEMPTS = 6  # without a byte of progress; pauses double from _PAUSE, half a minute in all
_PAUSE = 0.5  # seconds
_SILENCE = 20  # seconds without a byte after which an http answer counts as failed
_THREADS = 4  # shards that come at a time
_STILL_READ = 16  # changes of the windows; batches made ahead may still read what was current that long ago
_URGENT, _AHEAD, _END = 0, 1, -1


@dataclass
class _Fetch:
    done: "Future[None]"
    urgency: int


@dataclass(frozen=True)
class Cache:
    """Where remote shards are kept on the local disk, and how many bytes of them at most, over all processes."""

    folder: Path
    limit: int


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
    with _locked(folder / "description.lock"):
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
        self._now: frozenset[int] = frozenset()
        self._after: frozenset[int] = frozenset()
        self._queue: queue.PriorityQueue[tuple[int, int, int]] = queue.PriorityQueue()
        self._turn = itertools.count()
        self._stop = threading.Event()
        self._remove_leftovers()
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def expect(self, now: Sequence[int], after: Sequence[int]) -> None:
        """Raises UserError where the cache cannot hold what this process alone reads at one time."""
        if (frozenset(now), frozenset(after)) == (self._now, self._after):
            return
        needed = sum(self._shards.shards[shard].bytes for shard in now)
        if needed > self._cache.limit:
            raise UserError(
                f"the shards of the current windows take {needed:,} bytes, the cache in {self._cache.folder} may "
                f"hold {self._cache.limit:,}; allow it more, or lower simclr.shuffle_window"
            )
        self._before.append(self._now)
        self._now, self._after = frozenset(now), frozenset(after)
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

    def close(self) -> None:
        self._stop.set()
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
            fetch = self._fetches.get(shard)
            if fetch is None or (fetch.done.done() and not self._path(shard).is_file()):
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
        with _locked(path.with_suffix(".lock")):
            if path.is_file():
                return
            partial = path.with_suffix(".partial")
            with refusals_named(path):
                if not self._reserve(shard, partial, fetch):
                    return
                try:
                    for _ in range(2):
                        self._copy(described.name, partial, described.bytes)
                        if _sha256(partial) == described.sha256:
                            with self._room_locked():  # or it could be missed by who counts just then
                                partial.replace(path)
                            return
                finally:
                    partial.unlink(missing_ok=True)
        raise UserError(
            f"{self._shards.source}/{described.name} arrived twice with another sha256 than its manifest says; upload "
            f"it again"
        )

    def _reserve(self, shard: int, partial: Path, fetch: _Fetch) -> bool:
        """Make room for a shard and take it with a file of its size; False if it can wait and there is none."""
        size = self._shards.shards[shard].bytes
        while True:
            with self._room_locked():
                kept = kept_in(self._cache.folder)
                if self._make_room(shard, size, fetch.urgency, kept):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return True
            if fetch.urgency == _AHEAD:
                return False
            if all(path.suffix == ".tar" for path in kept):
                raise UserError(
                    f"the cache in {self._cache.folder} has no room for {size:,} more bytes within its "
                    f"{self._cache.limit:,}; allow it more"
                )
            if self._stop.wait(_PAUSE / 10):  # what is on its way may go once it is here
                raise UserError("the loader was closed")

    def _make_room(self, shard: int, size: int, urgency: int, kept: dict[Path, os.stat_result]) -> bool:
        # Shards that nobody here waits for go first, the longest unused of them first; those of other processes are
        # the youngest of these. Those of the current windows go only for a batch that was begun before them.
        worth = {self._path(number): 1 for number in self._after}
        worth |= {self._path(number): 2 for numbers in tuple(self._before) for number in numbers}
        worth |= {self._path(number): 3 for number in self._now}
        most = 0 if urgency == _AHEAD else 2 if shard in self._now else 3
        may_go = [path for path in kept if path.suffix == ".tar" and worth.get(path, 0) <= most]
        may_go.sort(key=lambda path: (worth.get(path, 0), kept[path].st_mtime))
        total = sum(stat.st_size for stat in kept.values())
        for path in may_go:
            if total + size <= self._cache.limit:
                break
            path.unlink(missing_ok=True)
            total -= kept[path].st_size
        return total + size <= self._cache.limit

    def _room_locked(self) -> AbstractContextManager[None]:
        return _locked(self._cache.folder / "room.lock")

    def _remove_leftovers(self) -> None:
        """Free what a killed process was fetching."""
        for partial in kept_in(self._cache.folder):
            if partial.suffix != ".partial":
                continue
            with partial.with_suffix(".lock").open("a") as file, suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink(missing_ok=True)

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
                                raise UserError("the loader was closed")
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


def kept_in(folder: Path) -> dict[Path, os.stat_result]:
    """The shards that a cache holds, whole or on their way."""
    kept = {}
    # Only below folders that are named by a manifest: a cache folder may hold tars of its owner too.
    for path in folder.glob(f"{'[0-9a-f]' * 16}/*/*"):
        if path.suffix in (".tar", ".partial"):
            with suppress(FileNotFoundError):  # another process let go of it
                kept[path] = path.stat()
    return kept


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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that all processes of this machine respect; it goes with the process that holds it."""
    with refusals_named(path):
        file = path.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
