"""The cache of remote shards when it is small, shared, or left behind by a killed process. The server is the disk."""

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dali.pipeline.cache import Cache, kept_in
from simclr_dali.pipeline.download import RemoteFolder
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.remote import RemoteFiles, open_split
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from tests.loaders import two_views
from tests.runs import wait_until
from tests.test_remote import cached, fits


class Server(RemoteFolder):
    """The disk, which holds the shard ``waits`` back after its room was taken, until it is let go."""

    def __init__(self, url: str, waits: str = "") -> None:
        super().__init__(url)
        self.waits, self.begun, self.go_on = waits, threading.Event(), threading.Event()

    def download(self, name: str, target: Path, size: int, stop: threading.Event) -> None:
        if name == self.waits:
            self.begun.set()
            assert self.go_on.wait(60)
        super().download(name, target, size, stop)


class Opener:
    """Opens the train split, of six shards, through a cache for so many of them."""

    def __init__(self, packed: Path, folder: Path, shards: ShardSet) -> None:
        self._url, self._folder, self._shards = f"file://{packed}", folder, shards
        self.opened: list[RemoteFiles] = []

    def __call__(self, count: int, waits: str = "", cache: Cache | None = None, **options: Any) -> RemoteFiles:
        cache = cache or fits(self._shards, self._folder, count)
        shards = open_split(self._url, "train", cache).shards
        self.server = Server(shards.source, waits)
        self.opened.append(RemoteFiles(shards, cache, self.server, **options))
        return self.opened[-1]


@pytest.fixture
def opener(packed: Path, tmp_path: Path, train_split: ShardSet) -> Iterator[Opener]:
    build = Opener(packed, tmp_path, train_split)
    yield build
    for files in build.opened:
        files.close()


def size(files: RemoteFiles, shard: int) -> int:
    with files.opened(shard) as descriptor:
        return os.fstat(descriptor).st_size


def names(folder: Path) -> set[str]:
    return {path.name for path in kept_in(folder)}


def test_a_batch_that_was_begun_before_the_current_windows_finds_room(
    opener: Opener, tmp_path: Path, train_split: ShardSet
) -> None:
    files = opener(2)
    files.expect([0, 1], [])
    for shard in (0, 1, 5, 0, 1):  # of which 5 is no longer expected
        assert size(files, shard) == train_split.shards[shard].bytes
        assert cached(fits(train_split, tmp_path, 2)) <= fits(train_split, tmp_path, 2).limit


def test_what_is_needed_now_waits_for_the_room_of_what_is_on_its_way(opener: Opener) -> None:
    files = opener(1, waits="train-000001.tar")
    files.expect([], [1])
    assert opener.server.begun.wait(60)
    files.expect([0], [1])
    with ThreadPoolExecutor() as pool:
        found = pool.submit(size, files, 0)
        with pytest.raises(TimeoutError):
            found.result(0.3)
        opener.server.go_on.set()
        assert found.result(60) > 0


class Slow(Cache):
    """Looks for room for what is only expected, and waits before it says that there is none."""

    looked, go_on = threading.Event(), threading.Event()

    def make_room(self, size: int, worth: dict[Path, int], most: int) -> bool:
        found = super().make_room(size, worth, most)
        if most == 0:
            self.looked.set()
            assert self.go_on.wait(60)
        return found


def test_a_shard_that_becomes_urgent_while_it_finds_no_room_is_fetched(
    opener: Opener, tmp_path: Path, train_split: ShardSet
) -> None:
    cache = Slow(tmp_path, fits(train_split, tmp_path, 1).limit)
    cache.looked, cache.go_on = threading.Event(), threading.Event()
    files = opener(1, cache=cache)
    files.expect([0], [])
    size(files, 0)
    files.expect([0], [1])
    assert cache.looked.wait(60)
    files.expect([1], [])
    cache.go_on.set()
    assert size(files, 1) > 0


@pytest.mark.parametrize("victim", [0, 3], ids=["the same shard", "another"])
def test_what_a_killed_process_left_on_its_way_does_not_hold_its_room(
    victim: int, opener: Opener, train_split: ShardSet
) -> None:
    """It was killed after this process looked for leftovers at its start."""
    files = opener(1)
    folder = files.path(0).parent
    left = folder / f"train-{victim:06d}.partial"
    left.write_bytes(b"x" * train_split.shards[victim].bytes)
    files.expect([0], [])
    with ThreadPoolExecutor() as pool:
        assert pool.submit(size, files, 0).result(60) == train_split.shards[0].bytes
    assert not left.exists()


def test_a_living_process_keeps_what_is_on_its_way(opener: Opener, train_split: ShardSet) -> None:
    files = opener(1)
    left = files.path(3).with_suffix(".partial")
    with left.with_suffix(".lock").open("a") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left.write_bytes(b"x" * train_split.shards[3].bytes)
        files.expect([0], [])
        found = pool.submit(size, files, 0)
        with pytest.raises(TimeoutError):
            found.result(0.3)
        assert left.exists()
        left.unlink()
        assert found.result(60) > 0


def test_shards_are_not_removed_in_vain(opener: Opener, tmp_path: Path, train_split: ShardSet) -> None:
    """The shard of another process may make room for one fetched ahead, but only where that is then enough."""
    other = opener(2)
    other.expect([5], [])
    size(other, 5)
    cache = fits(train_split, tmp_path, 2)
    files = opener(2, waits="train-000000.tar", cache=cache)
    files.expect([0], [])
    assert opener.server.begun.wait(60)
    cache.limit //= 2
    files.expect([0], [1])
    wait_until(lambda: (found := files.queue.find(1)) is not None and found.done())
    assert "train-000005.tar" in names(tmp_path)
    cache.limit *= 2
    opener.server.go_on.set()
    assert size(files, 0) > 0


def test_windows_of_several_processes_that_do_not_fit_together_are_told(
    opener: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = opener(1), opener(1)
    first.expect([0], [])
    second.expect([1], [])
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert size(first, 0) > 0 and size(second, 1) > 0
    assert len([line for line in caplog.messages if "train-000000.tar" in line and "shuffle_window" in line]) == 1


def test_closing_ends_who_waits_for_a_shard_that_another_process_is_fetching(opener: Opener) -> None:
    files = opener(6)
    with files.path(2).with_suffix(".lock").open("a") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = pool.submit(size, files, 2)
        wait_until(lambda: (asked := files.queue.find(2)) is not None and asked.running())
        pool.submit(files.close).result(60)
        with pytest.raises(UserError, match="the loader was closed"):
            found.result(60)
    with pytest.raises(UserError, match="the loader was closed"):
        size(files, 3)


def test_closing_ends_who_waits_for_a_shard_that_nobody_began(opener: Opener) -> None:
    files = opener(6, threads=0)
    with ThreadPoolExecutor() as pool:
        found = pool.submit(size, files, 2)
        wait_until(lambda: files.queue.find(2) is not None)
        files.close()
        with pytest.raises(UserError, match="the loader was closed"):
            found.result(60)


def test_a_loader_that_is_closed_does_not_wait_for_shards_that_it_reads_ahead(packed: Path, tmp_path: Path) -> None:
    split = open_split(f"file://{packed}", "train", Cache(tmp_path, 1 << 30))
    shards = split.shards
    order = Order(shards.shard_sizes(), 8, 1, 1, 3)
    current, upcoming = order.windows(0, 0)
    (coming,) = set(upcoming) - set(current)
    loader = two_views(split, order, Recipe(), LoaderConfig(16, torch.device("cpu"), read_ahead=8), epochs=1)
    with (shards.folder / shards.shards[coming].name).with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as who is fetching it
        next(loader)
        closing = threading.Thread(target=loader.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
