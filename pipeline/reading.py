"""Reading encoded images out of the tars: by offset, ahead of time, in background threads."""

import os
import resource
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.manifest import ShardSet

Encoded = npt.NDArray[np.uint8]
Plan = TypeVar("Plan")
Prepared = TypeVar("Prepared")

_SPARE_FILES = 256  # descriptors left to everything else in the process


class SampleReader:
    """Reads samples of a shard set; checks the crc32 of each. Safe to use from many threads."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        _allow_open_files(len(shards.shards) + _SPARE_FILES)
        self._descriptors = [os.open(shards.folder / shard.name, os.O_RDONLY) for shard in shards.shards]

    def read(self, ids: npt.NDArray[np.int64]) -> list[Encoded]:
        """The encoded images of ``ids``, in their order, uint8 (length,) each.

        They are fetched in storage order, which is nearly sequential for a batch of one window.
        Raises UserError naming tar and sample where the bytes are not those that were packed.
        """
        rows = self._shards.samples[ids]
        images: list[Encoded] = [np.empty(0, np.uint8)] * len(ids)
        for i in np.argsort(ids, kind="stable"):
            row = rows[i]
            data = os.pread(self._descriptors[row["shard"]], int(row["length"]), int(row["offset"]))
            if len(data) != row["length"] or zlib.crc32(data) != row["crc32"]:
                raise UserError(
                    f"damaged sample in {self._shards.where(int(ids[i]))}: its crc32 differs; copy the shard again"
                )
            images[i] = np.frombuffer(data, np.uint8)
        return images

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise UserError(
                f"the data set needs {count} open files, the limit is {hard}; raise it (ulimit -n {count}) or pack "
                f"larger shards"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def ahead(
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
