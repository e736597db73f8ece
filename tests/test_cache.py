"""The cache of remote shards when it is small, shared, or left behind by a killed process. The server is the disk."""

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from simclr_dali.pipeline import remote
from simclr_dali.pipeline.cache import Cache, kept_in
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.loader import Setting, two_views
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.remote import RemoteFiles, open_split
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from tests.runs import wait_until
from tests.test_remote import cached, fits

Opener = Callable[[int], RemoteFiles]


@pytest.fixture
def opener(packed: Path, tmp_path: Path, train_split: ShardSet) -> Iterator[Opener]:
    """What opens the train split, of six shards, through a cache for so many of them."""
    opened: list[RemoteFiles] = []

    def build(count: int) -> RemoteFiles:
        cache = fits(train_split, tmp_path, count)
        opened.append(RemoteFiles(open_split(f"file://{packed}", "train", cache)[0], cache))
        return opened[-1]

    yield build
    for files in opened:
        files.close()


def size(files: RemoteFiles, shard: int) -> int:
    with files.opened(shard) as descriptor:
        return os.fstat(descriptor).st_size


def names(folder: Path) -> set[str]:
    return {path.name for path in kept_in(folder)}


def held_back(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, threading.Event]:
    """Fetches of the shard ``name`` wait after they took their room: set when one does, and to be set to let it go."""
    begun, go_on, copy = threading.Event(), threading.Event(), RemoteFiles._copy

    def waiting(files: RemoteFiles, asked: str, target: Path, length: int) -> None:
        if asked == name:
            begun.set()
            assert go_on.wait(60)
        copy(files, asked, target, length)

    monkeypatch.setattr(RemoteFiles, "_copy", waiting)
    return begun, go_on


def test_a_batch_that_was_begun_before_the_current_windows_finds_room(
    opener: Opener, tmp_path: Path, train_split: ShardSet
) -> None:
    files = opener(2)
    files.expect([0, 1], [])
    for shard in (0, 1, 5, 0, 1):  # of which 5 is no longer expected
        assert size(files, shard) == train_split.shards[shard].bytes
        assert cached(fits(train_split, tmp_path, 2)) <= fits(train_split, tmp_path, 2).limit


def test_what_is_needed_now_waits_for_the_room_of_what_is_on_its_way(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = held_back(monkeypatch, "train-000001.tar")
    files = opener(1)
    files.expect([], [1])
    assert begun.wait(60)
    files.expect([0], [1])
    with ThreadPoolExecutor() as pool:
        found = pool.submit(size, files, 0)
        with pytest.raises(TimeoutError):
            found.result(0.3)
        go_on.set()
        assert found.result(60) > 0


def test_a_shard_that_becomes_urgent_while_it_finds_no_room_is_fetched(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = opener(1)
    files.expect([0], [])
    size(files, 0)
    looked, go_on, look = threading.Event(), threading.Event(), RemoteFiles._make_room

    def slowly(files: RemoteFiles, shard: int, length: int, urgency: int) -> bool:
        found = look(files, shard, length, urgency)
        if urgency == remote._AHEAD:
            looked.set()
            assert go_on.wait(60)
        return found

    monkeypatch.setattr(RemoteFiles, "_make_room", slowly)
    files.expect([0], [1])
    assert looked.wait(60)
    files.expect([1], [])
    go_on.set()
    assert size(files, 1) > 0


@pytest.mark.parametrize("victim", [0, 3], ids=["the same shard", "another"])
def test_what_a_killed_process_left_on_its_way_does_not_hold_its_room(
    victim: int, opener: Opener, train_split: ShardSet
) -> None:
    """It was killed after this process looked for leftovers at its start."""
    files = opener(1)
    folder = files._path(0).parent
    left = folder / f"train-{victim:06d}.partial"
    left.write_bytes(b"x" * train_split.shards[victim].bytes)
    files.expect([0], [])
    with ThreadPoolExecutor() as pool:
        assert pool.submit(size, files, 0).result(60) == train_split.shards[0].bytes
    assert not left.exists()


def test_a_living_process_keeps_what_is_on_its_way(opener: Opener, train_split: ShardSet) -> None:
    files = opener(1)
    left = files._path(3).with_suffix(".partial")
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


def test_shards_are_not_let_go_of_in_vain(opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard of another process may make room for one fetched ahead, but only where that is then enough."""
    other = opener(2)
    other.expect([5], [])
    size(other, 5)
    begun, go_on = held_back(monkeypatch, "train-000000.tar")
    files = opener(2)
    files.expect([0], [])
    assert begun.wait(60)
    monkeypatch.setattr(files, "_cache", Cache(tmp_path, files._cache.limit // 2))
    files.expect([0], [1])
    wait_until(lambda: files._fetches[1].done.done())
    assert "train-000005.tar" in names(tmp_path)
    monkeypatch.setattr(files, "_cache", other._cache)
    go_on.set()
    assert size(files, 0) > 0


def test_windows_of_several_processes_that_do_not_fit_together_are_told(
    opener: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = opener(1), opener(1)
    first.expect([0], [])
    second.expect([1], [])
    with caplog.at_level(logging.WARNING):
        for _ in range(remote._TOO_OFTEN + 1):
            assert size(first, 0) > 0 and size(second, 1) > 0
    assert len([line for line in caplog.messages if "train-000000.tar" in line and "shuffle_window" in line]) == 1


def test_closing_ends_who_waits_for_a_shard_that_another_process_is_fetching(opener: Opener) -> None:
    files = opener(6)
    with files._path(2).with_suffix(".lock").open("a") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = pool.submit(size, files, 2)
        wait_until(lambda: 2 in files._fetches and files._fetches[2].done.running())
        pool.submit(files.close).result(60)
        with pytest.raises(UserError, match="the loader was closed"):
            found.result(60)
    with pytest.raises(UserError, match="the loader was closed"):
        size(files, 3)


def test_closing_ends_who_waits_for_a_shard_that_nobody_began(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_THREADS", 0)
    files = opener(6)
    with ThreadPoolExecutor() as pool:
        found = pool.submit(size, files, 2)
        wait_until(lambda: 2 in files._fetches)
        files.close()
        with pytest.raises(UserError, match="the loader was closed"):
            found.result(60)


def test_a_loader_that_is_closed_does_not_wait_for_shards_that_it_reads_ahead(packed: Path, tmp_path: Path) -> None:
    shards, files = open_split(f"file://{packed}", "train", Cache(tmp_path, 1 << 30))
    order = Order(shards.shard_sizes(), 8, 1, 1, 3)
    now, after = order.windows(0, 0)
    (coming,) = set(after) - set(now)
    loader = two_views(shards, order, Recipe(), Setting(16, torch.device("cpu"), read_ahead=8), epochs=1, files=files)
    with (shards.folder / shards.shards[coming].name).with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as who is fetching it
        next(loader)
        closing = threading.Thread(target=loader.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
