"""Which samples make up which global batch: a pure function of (seed, epoch, step).

Each epoch permutes the shards and lays their samples out in that order. The row is cut into L equal *lanes*; inside a
lane, samples are shuffled within windows of a few neighbouring shards, so that disks see nearly sequential reads. A
global batch takes B/L samples of every lane, in lane order, and rank r of W serves lanes r*L/W .. (r+1)*L/W - 1. So
the global batch and its order do not depend on W, every rank takes the same number of steps, and the position in an
epoch is one number. A shard that a lane's border cuts is read by two lanes (at most L - 1 of them an epoch).
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.philox import SHARD_ORDER, WINDOW_ORDER, permutation
from simclr_dali.shards.errors import UserError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of a run. Sample ids are positions in the shard set's storage order."""

    shard_sizes: tuple[int, ...]
    """Samples per shard."""
    global_batch: int
    """Pairs per step over all ranks (B)."""
    lanes: int
    """L, divides B."""
    window: int
    """Neighbouring shards of a lane that are shuffled together."""
    seed: int
    """Of the run."""
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(self.shard_sizes))
        if self.global_batch % self.lanes:
            raise UserError(
                f"lanes is {self.lanes}, which does not divide the global batch of {self.global_batch}; choose a "
                f"divisor"
            )
        if self.steps_per_epoch < 1:
            raise UserError(
                f"a global batch of {self.global_batch} does not fit the {self.samples} samples of the data set; "
                f"choose a smaller one"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per epoch, always the same; fewer than B + L samples are left out of each."""
        return (self.samples // self.lanes) // (self.global_batch // self.lanes)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """Epoch and step of the next global batch."""
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def local_batch(self, world: int) -> int:
        """Images per step of each of ``world`` processes. Raises UserError where they cannot share the lanes."""
        if self.lanes % world:
            raise UserError(
                f"{world} processes do not divide the {self.lanes} lanes of the data order; start with a divisor of "
                f"{self.lanes}"
            )
        return self.global_batch // world

    def batch(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> Ids:
        """Sample ids, int64 (B/W,), of ``rank``'s part of global batch ``step`` of ``epoch`` (both from 0)."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is outside of the epoch's {self.steps_per_epoch} steps")
        per_lane = self.global_batch // self.lanes
        lanes = self._lanes(rank, world)
        epoch_layout = layout(self, epoch)
        return np.concatenate([epoch_layout.take(lane, step * per_lane, (step + 1) * per_lane) for lane in lanes])

    def windows(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> tuple[list[int], list[int]]:
        """Shards of the windows that ``rank`` reads from at global batch ``step``, and of the windows after those.

        Both are numbers in storage order, each once; at the end of an epoch those after are not known yet.
        """
        per_lane = self.global_batch // self.lanes
        lanes = self._lanes(rank, world)
        epoch_layout = layout(self, epoch)
        current: dict[int, None] = {}
        upcoming: dict[int, None] = {}
        for lane in lanes:
            first, last = (
                epoch_layout.window_at(lane, place) for place in (step * per_lane, (step + 1) * per_lane - 1)
            )
            for window in range(first, last + 1):
                current |= dict.fromkeys(epoch_layout.shards(lane, window))
            upcoming |= dict.fromkeys(epoch_layout.shards(lane, last + 1))
        return list(current), [shard for shard in upcoming if shard not in current]

    def _lanes(self, rank: int, world: int) -> range:
        """The lanes that ``rank`` serves."""
        self.local_batch(world)  # refuses a world that cannot share the lanes
        return range(rank * self.lanes // world, (rank + 1) * self.lanes // world)


class _Layout:
    """One epoch's samples in a row: storage ids by position, and the pieces of shards in each lane."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order, self.epoch = order, epoch
        sizes = np.array(order.shard_sizes, np.int64)
        self.permuted = permuted = permutation(len(sizes), order.seed, SHARD_ORDER, epoch)
        self.ends = np.cumsum(sizes[permuted])
        # A position in the row plus this shift of its shard is the storage id.
        self.shift = (np.cumsum(sizes) - sizes)[permuted] - (self.ends - sizes[permuted])
        self.window_bounds = lru_cache(maxsize=order.lanes)(self._window_bounds)
        self.window_ids = lru_cache(maxsize=2 * order.lanes)(self._window_ids)

    def take(self, lane: int, start: int, stop: int) -> Ids:
        """Ids start..stop-1 of the lane's shuffled sequence."""
        bounds = self.window_bounds(lane)
        parts = []
        for window in range(self.window_at(lane, start), len(bounds) - 1):
            low, high = int(bounds[window]), int(bounds[window + 1])
            if low >= stop:
                break
            parts.append(self.window_ids(lane, window)[max(start - low, 0) : min(stop, high) - low])
        return np.concatenate(parts)

    def window_at(self, lane: int, place: int) -> int:
        """The window that holds this place of the lane."""
        return int(np.searchsorted(self.window_bounds(lane), place, "right")) - 1

    def shards(self, lane: int, window: int) -> list[int]:
        """Storage numbers of the shards in a window of a lane; none beyond the last window."""
        bounds = self.window_bounds(lane)
        if window >= len(bounds) - 1:
            return []
        first, last = self._lane_range(lane)[0] + bounds[window : window + 2] - np.array([0, 1])
        low, high = np.searchsorted(self.ends, [first, last], "right")
        return [int(shard) for shard in self.permuted[low : high + 1]]

    def _lane_range(self, lane: int) -> tuple[int, int]:
        samples, lanes = self.order.samples, self.order.lanes
        return lane * samples // lanes, (lane + 1) * samples // lanes

    def _window_bounds(self, lane: int) -> Ids:
        """Borders of the lane's windows, counted from the lane's start: every K-th border between shards."""
        low, high = self._lane_range(lane)
        inner = self.ends[np.searchsorted(self.ends, low, "right") : np.searchsorted(self.ends, high, "left")]
        pieces = len(inner) + 1
        windows = -(-pieces // self.order.window)
        cuts = [inner[round(pieces * w / windows) - 1] for w in range(1, windows)]
        return np.array([low, *cuts, high], np.int64) - low

    def _window_ids(self, lane: int, window: int) -> Ids:
        bounds = self.window_bounds(lane)
        low = self._lane_range(lane)[0] + int(bounds[window])
        count = int(bounds[window + 1] - bounds[window])
        stream = lane << 16 | window
        positions = low + permutation(count, self.order.seed, WINDOW_ORDER, self.epoch, stream)
        shards = np.searchsorted(self.ends, positions, "right")
        return positions + self.shift[shards]


@lru_cache(maxsize=2)
def layout(order: Order, epoch: int) -> _Layout:
    return _Layout(order, epoch)
