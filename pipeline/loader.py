"""The loaders of training and evaluation: order, reading, draws and graph put together.

plan = BatchPlan(order, epochs=100)
for views, labels, ids in TwoViews(split, plan, Recipe(), LoaderConfig(224, device)):
    ...
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from simclr_dali.pipeline.batch_plan import BatchPlan, PlannedBatch, in_storage_order
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.reader import SampleReader
from simclr_dali.pipeline.stream import Batch, ViewSource, stream
from simclr_dali.shards.errors import UserError

MAX_BAD_FRACTION = 1e-4


class TwoViews(Iterator[Batch]):
    """Views of a rank's images, batch by batch; it knows its length and its position."""

    def __init__(
        self,
        split: Split,
        plan: BatchPlan,
        recipes: Recipe | Sequence[Recipe],
        config: LoaderConfig,
        *,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ) -> None:
        """``recipes`` is one for both views, or one for each of any number of views.

        ``max_bad_fraction`` is the share of the data set that may be damaged: a damaged sample is replaced by the next
        sound one, the same on any number of ranks, named in the log and counted by each process. Iterating raises
        UserError where more is damaged.
        """
        self._split, self._plan, self._config = split, plan, config
        self._recipes = (recipes, recipes) if isinstance(recipes, Recipe) else tuple(recipes)
        self._max_bad_fraction = max_bad_fraction
        self._position = plan.start  # epoch and step of the first batch that was not wholly given yet
        self._reader: SampleReader | None = None
        self._stream: Generator[tuple[PlannedBatch, Batch], None, None] | None = None
        self._first: Future[tuple[PlannedBatch, Batch]] | None = None

    def start(self) -> "TwoViews":
        """Begin with the first batch in a thread of its own, while the caller does something else; returns itself."""
        first = self._first = Future[tuple[PlannedBatch, Batch]]()
        reader = self._reader = SampleReader(self._split, self._max_bad_fraction)

        def make() -> None:
            try:
                if self._config.device.type == "cuda":  # a thread begins on GPU 0, where it would take memory
                    torch.cuda.set_device(self._config.device)
                first.set_result(self._next(reader))
            except BaseException as error:  # which __next__ raises where the batch is asked for
                first.set_exception(error)

        threading.Thread(target=make, name="first batch", daemon=True).start()
        return self

    def __next__(self) -> Batch:
        first, self._first = self._first, None
        plan, batch = first.result() if first else self._next()
        if plan.ends_step:
            self._position = self._plan.order.after(plan.epoch, plan.step)
        return batch

    def _next(self, reader: SampleReader | None = None) -> tuple[PlannedBatch, Batch]:
        if self._stream is None:
            reader = self._reader = reader or SampleReader(self._split, self._max_bad_fraction)
            source = ViewSource.augmented(self._split.shards.samples, reader, self._recipes, self._plan.order.seed)
            rest = replace(self._plan, start=self._position)
            self._stream = stream(source, rest.batches(), self._config, batch=self._plan.images)
        return next(self._stream)

    def __len__(self) -> int:
        """Batches (micro-batches, if there are) from the start to the end of the epochs."""
        return len(self._plan)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands: epoch, step, and the fingerprint of the data set."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "manifest": self._split.shards.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at ``state``. Raises UserError where it comes from another data set."""
        shards = self._split.shards
        if state["manifest"] != shards.fingerprint:
            raise UserError(
                f"the loader's state is of another data set than {shards.folder} (manifest "
                f"{state['manifest'][:12]}, not {shards.fingerprint[:12]}); load it with the same shards"
            )
        self.close()
        self._position = state["epoch"], state["step"]
        self._plan = replace(self._plan, start=self._position)

    def damaged(self) -> list[int]:
        """Ids of the damaged samples that this process met and replaced so far."""
        return self._reader.damaged() if self._reader else []

    def close(self) -> None:
        """End threads, files and graph; iterating again goes on at the position."""
        if self._first is not None and self._reader is not None:
            self._reader.stop()  # shards that are far away are not waited for
            wait([self._first])
            self._first = None
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def central_views(
    split: Split,
    config: LoaderConfig,
    *,
    batch: int,
    ids: Ids | None = None,
    center_fraction: float | None = None,
    max_bad_fraction: float = 0.0,
) -> Generator[Batch, None, None]:
    """Every image of ``ids`` (default: of the split) once, in their order, as its central view (draws.center).

    center_fraction: share of its short side that is seen (default: draws.center_fraction of the size). The last batch
    is short. ids: in storage order, or shards are read more than once. A damaged sample raises UserError, since a
    figure over other images than those of the set would be wrong; with max_bad_fraction it is replaced as in
    :class:`TwoViews`.
    """
    wanted = np.arange(len(split.shards)) if ids is None else ids
    if not len(wanted):
        return _without_plans(_nothing())
    reader = SampleReader(split, max_bad_fraction)
    source = ViewSource.centered(split.shards.samples, reader, config.size, center_fraction)
    planned = in_storage_order(split.shards, wanted, batch)
    return _without_plans(stream(source, planned, config, batch=min(batch, len(wanted))))


def _without_plans(made: Generator[tuple[PlannedBatch, Batch], None, None]) -> Generator[Batch, None, None]:
    try:
        for _, batch in made:
            yield batch
    finally:
        made.close()


def views_in_epoch(
    split: Split,
    ids: Ids,
    recipes: Sequence[Recipe],
    config: LoaderConfig,
    *,
    seed: int,
    epoch: int,
    max_bad_fraction: float = 0.0,
) -> Batch:
    """The views of samples ``ids`` as ``epoch`` of a run with ``seed`` draws them."""
    source = ViewSource.augmented(split.shards.samples, SampleReader(split, max_bad_fraction), recipes, seed)
    shards = np.unique(split.shards.samples["shard"][ids]).tolist()
    made = stream(source, [PlannedBatch(ids, epoch, current=shards)], config, batch=len(ids))
    _, batch = next(made)
    made.close()
    return batch


def _nothing() -> Generator[tuple[PlannedBatch, Batch], None, None]:
    yield from ()
