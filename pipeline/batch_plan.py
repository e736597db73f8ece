"""Which batches are made, in which order, and from which shards they are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from simclr_dali.pipeline.order import Ids, Order
from simclr_dali.pipeline.subset import SPARSE, Subset
from simclr_dali.shards.manifest import ShardSet


@dataclass(frozen=True)
class PlannedBatch:
    """A batch to be made."""

    ids: Ids
    epoch: int = 0
    step: int = 0
    ends_step: bool = True
    """Whether it is the last (micro-)batch of its step."""
    current: Sequence[int] = ()
    """Shards that it is read from."""
    upcoming: Sequence[int] = ()
    """Shards that the batches after it are read from."""


@dataclass(frozen=True)
class BatchPlan:
    """The batches that one rank of a training gets, in order."""

    order: Order | Subset
    epochs: int
    start: tuple[int, int] = (0, 0)
    """Epoch and step of the first batch."""
    rank: int = 0
    world: int = 1
    micro_batch: int | None = None
    """Images per batch; it divides the rank's share of the global batch (default: the whole share)."""

    @property
    def images(self) -> int:
        """Per batch. Raises UserError where the ranks cannot share the order's lanes."""
        share = self.order.local_batch(self.world)
        return min(self.micro_batch or share, share)

    def __len__(self) -> int:
        """Batches from the start to the end of the epochs."""
        epoch, step = self.start
        steps = (self.epochs - epoch) * self.order.steps_per_epoch - step
        return steps * -(-self.order.local_batch(self.world) // self.images)

    def batches(self) -> Iterator[PlannedBatch]:
        epoch, step = self.start
        size = self.images
        while epoch < self.epochs:
            ids = self.order.batch(epoch, step, self.rank, self.world)
            current, upcoming = self.order.windows(epoch, step, self.rank, self.world)
            for at in range(0, len(ids), size):
                last = at + size >= len(ids)
                yield PlannedBatch(ids[at : at + size], epoch, step, last, current, upcoming)
            epoch, step = self.order.after(epoch, step)


def in_storage_order(shards: ShardSet, ids: Ids, batch: int) -> Iterator[PlannedBatch]:
    """Batches of ``ids`` as they come; in storage order, or shards are read more than once. The last one is short."""
    shard_of = shards.samples["shard"][ids]
    all_shards = np.unique(shard_of)
    sparse = len(ids) < SPARSE * len(shards)
    for at in range(0, len(ids), batch):
        current = np.unique(shard_of[at : at + batch])
        upcoming = all_shards[all_shards > current[-1]][:2]
        reads = ([], []) if sparse else (current.tolist(), upcoming.tolist())
        yield PlannedBatch(ids[at : at + batch], current=reads[0], upcoming=reads[1])
