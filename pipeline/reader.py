"""Reading encoded images out of the tars: by offset, ahead of time, in background threads."""

import logging
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.order import Ids
from simclr_dali.shards.errors import UserError

Encoded = npt.NDArray[np.uint8]
Plan = TypeVar("Plan")
Prepared = TypeVar("Prepared")

_log = logging.getLogger(__name__)


class DamagedError(UserError):
    """The bytes of a sample are not those that were packed."""


class Reader(Protocol):
    """Where encoded images come from; safe to use from many threads."""

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None: ...

    def read(self, ids: Ids) -> tuple[list[Encoded], Ids]: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class SampleReader:
    """Reads samples of a split; checks the crc32 of each. Safe to use from many threads.

    max_bad_fraction: how much of the split may be damaged; each damaged sample up to that is replaced by the next
    sound one in storage order, whoever reads it. 0: the first one is an error.
    """

    def __init__(self, split: Split, max_bad_fraction: float = 0.0) -> None:
        self._shards, self._files = split.shards, split.open_files()
        self._limit = max_bad_fraction * len(split.shards)
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def read(self, ids: Ids) -> tuple[list[Encoded], Ids]:
        """The encoded images of ``ids``, in their order, uint8 (length,) each, and the ids that they are of.

        They are fetched in storage order, which is nearly sequential for a batch of one window.
        Raises UserError naming tar and sample where more are damaged than may be.
        """
        images: list[Encoded] = [np.empty(0, np.uint8)] * len(ids)
        shown = ids.copy()
        for i in np.argsort(ids, kind="stable"):
            while True:
                try:
                    images[i] = self._read_one(int(shown[i]))
                    break
                except DamagedError as error:
                    self._count(int(shown[i]), error)
                    shown[i] = (shown[i] + 1) % len(self._shards)
        return images, shown

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Name the shards that are read now and those that come next; fetching them begins in the background."""
        self._files.expect(current, upcoming)

    def stop(self) -> None:
        self._files.stop()

    def close(self) -> None:
        self._files.close()

    def damaged(self) -> list[int]:
        """Ids of the damaged samples met so far."""
        with self._lock:
            return sorted(self._damaged)

    def _read_one(self, sample: int) -> Encoded:
        row = self._shards.samples[sample]
        with self._files.opened(int(row["shard"])) as descriptor:
            try:
                data = os.pread(descriptor, int(row["length"]), int(row["offset"]))
            except OSError as error:
                raise DamagedError(
                    f"cannot read the sample in {self._shards.where(sample)}: {error.strerror}; copy the shard again"
                ) from error
        if len(data) != row["length"] or zlib.crc32(data) != row["crc32"]:
            raise DamagedError(
                f"damaged sample in {self._shards.where(sample)}: its crc32 differs; copy the shard again"
            )
        return np.frombuffer(data, np.uint8)

    def _count(self, sample: int, error: DamagedError) -> None:
        with self._lock:
            new = sample not in self._damaged
            self._damaged.add(sample)
            count = len(self._damaged)
        if count <= self._limit:
            if new:
                _log.warning("%s (replaced by the next one; %d damaged so far)", error, count)
        elif not self._limit:
            raise error
        else:
            raise UserError(
                f"{error}; it is damaged sample number {count} of {len(self._shards)}, more than max_bad_fraction "
                f"= {self._limit / len(self._shards):g} allows; list them all: simclr-dali verify --full "
                f"{self._shards.folder.parent}"
            ) from error


def map_ahead(
    plans: Iterable[Plan], prepare: Callable[[Plan], Prepared], threads: int, depth: int
) -> Generator[Prepared, None, None]:
    """``prepare`` of each plan, in order, computed by ``threads`` threads and at most ``depth`` plans ahead.

    What ``prepare`` raises is raised here, at its place in the order. Closing the iterator ends the threads.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for plan in plans:
                waiting.append(pool.submit(prepare, plan))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
