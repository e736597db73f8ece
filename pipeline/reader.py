"""Reading encoded images out of the tars: by offset, ahead of time, in background threads."""

import logging
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.kept_pictures import KeptPictures
from simclr_dali.pipeline.order import Ids
from simclr_dali.shards.errors import UserError

Encoded = npt.NDArray[np.uint8]
Plan = TypeVar("Plan")
Prepared = TypeVar("Prepared")

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What a reader has of a batch."""

    encoded: list[Encoded]
    """uint8 (length,) each, of the samples that are not kept decoded, in their order."""
    ids: Ids
    """The samples that all images are of: those that were asked for, or what stands in for them."""
    is_kept: npt.NDArray[np.bool_]
    """Which are kept decoded."""


class Reader(Protocol):
    """Where encoded images come from; safe to use from many threads."""

    @property
    def kept(self) -> KeptPictures | None:
        """Decoded pictures, which it leaves out."""

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None: ...

    def read(self, ids: Ids) -> Found: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class SampleReader:
    """Reads samples of a split; checks the crc32 of each. Safe to use from many threads.

    max_bad_fraction: how much of the split may be damaged; each damaged sample up to that is replaced by the next
    sound one in storage order, whoever reads it. 0: the first one is an error. kept: those that need not be read, since
    they are kept decoded.
    """

    def __init__(self, split: Split, max_bad_fraction: float = 0.0, kept: KeptPictures | None = None) -> None:
        self._shards, self._files, self.kept = split.shards, split.open_files(), kept
        self._limit = max_bad_fraction * len(split.shards)
        self._ends = np.cumsum(split.shards.shard_sizes())
        self._damaged: set[int] = set()
        self._differs: dict[int, str] = {}  # those that are not read again, and why; what could not be read may heal
        self._whole: set[int] = set()  # shards of which nothing needs to be read any more
        self._lock = threading.Lock()

    def read(self, ids: Ids) -> Found:
        """The encoded images of ``ids``, in their order, but for those that are kept.

        They are fetched in storage order, which is nearly sequential for a batch of one window.
        Raises UserError naming tar and sample where more are damaged than may be.
        """
        shown, is_kept = ids.copy(), self._are_kept(ids)
        images: dict[int, Encoded] = {}
        places = np.flatnonzero(~is_kept)
        places = places[np.argsort(ids[places], kind="stable")]
        of_shard = self._shards.samples["shard"][ids[places]]
        for some in np.split(places, np.flatnonzero(np.diff(of_shard)) + 1) if len(places) else []:
            for place, image in zip(some.tolist(), self._of_one_shard(ids[some]), strict=True):
                while image is None and not is_kept[place]:
                    shown[place] = (shown[place] + 1) % len(self._shards)
                    stand_in = shown[place : place + 1]
                    is_kept[place] = self._are_kept(stand_in)[0]
                    image = None if is_kept[place] else self._of_one_shard(stand_in)[0]
                if image is not None:
                    images[place] = image
        return Found([images[place] for place in sorted(images)], shown, is_kept)

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Name the shards that are read now and those that come next; fetching them begins in the background."""
        if self.kept:
            current, upcoming = ([shard for shard in shards if self._is_read(shard)] for shards in (current, upcoming))
        self._files.expect(current, upcoming)

    def stop(self) -> None:
        self._files.stop()

    def close(self) -> None:
        self._files.close()

    def damaged(self) -> list[int]:
        """Ids of the damaged samples met so far."""
        with self._lock:
            return sorted(self._damaged)

    def _are_kept(self, ids: Ids) -> npt.NDArray[np.bool_]:
        return self.kept.has(ids) if self.kept else np.zeros(len(ids), np.bool_)

    def _is_read(self, shard: int) -> bool:
        """Whether a shard holds what is to be kept, and neither is yet nor is known to be damaged."""
        assert self.kept
        if shard not in self._whole:
            ids = np.arange(self._ends[shard] - self._shards.shards[shard].samples, self._ends[shard])
            missing = ids[self.kept.lacks(ids)]
            if len(missing) <= len(self._damaged) and self._damaged.issuperset(missing.tolist()):
                self._whole.add(shard)
        return shard not in self._whole

    def _of_one_shard(self, ids: Ids) -> list[Encoded | None]:
        """The encoded images of ``ids``; None for what is damaged, which is counted."""
        rows = self._shards.samples[ids]
        columns = (rows[name].tolist() for name in ("offset", "length", "crc32"))
        with self._files.opened(int(rows["shard"][0])) as descriptor:
            return [self._image(descriptor, *row) for row in zip(ids.tolist(), *columns, strict=True)]

    def _image(self, descriptor: int, sample: int, offset: int, length: int, crc32: int) -> Encoded | None:
        if sample in self._differs:
            self._count(sample, self._differs[sample])
            return None
        try:
            data = os.pread(descriptor, length, offset)
        except OSError as error:
            self._count(sample, f"cannot read the sample in {self._shards.where(sample)}: {error.strerror}")
            return None
        if len(data) != length or zlib.crc32(data) != crc32:
            self._differs[sample] = f"damaged sample in {self._shards.where(sample)}: its crc32 differs"
            self._count(sample, self._differs[sample])
            return None
        return np.frombuffer(data, np.uint8)

    def _count(self, sample: int, what: str) -> None:
        """Note a damaged sample. Raises UserError where so many may not be damaged."""
        with self._lock:
            new = sample not in self._damaged
            self._damaged.add(sample)
            count = len(self._damaged)
        what = f"{what}; copy the shard again"
        if count <= self._limit:
            if new:
                _log.warning("%s (replaced by the next one; %d damaged so far)", what, count)
        elif not self._limit:
            raise UserError(what)
        else:
            raise UserError(
                f"{what}; it is damaged sample number {count} of {len(self._shards)}, more than max_bad_fraction "
                f"= {self._limit / len(self._shards):g} allows; list them all: simclr-dali verify --full "
                f"{self._shards.folder.parent}"
            )


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
