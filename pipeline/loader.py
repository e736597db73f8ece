"""The loaders of training and evaluation: order, reading, draws and graph put together.

plan = BatchPlan(order, epochs=100)
for views, labels, ids in TwoViews(split, plan, Recipe(), LoaderConfig(224, device)):
    ...
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from simclr_dali.pipeline.batch_plan import BatchPlan, PlannedBatch, in_storage_order
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_pictures import KeptPictures
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.reader import SampleReader
from simclr_dali.pipeline.stream import Batch, Stream, ViewSource
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
        kept: KeptPictures | None = None,
    ) -> None:
        """``recipes`` is one for both views, or one for each of any number of views.

        ``max_bad_fraction`` is the share of the data set that may be damaged: a damaged sample is replaced by the next
        sound one, the same on any number of ranks, named in the log and counted by each process. Iterating raises
        UserError where more is damaged. kept: where decoded pictures are kept; each is read and decoded once.
        """
        self._split, self._plan, self._config = split, plan, config
        self._recipes = (recipes, recipes) if isinstance(recipes, Recipe) else tuple(recipes)
        self._max_bad_fraction, self._kept = max_bad_fraction, kept
        self._position = plan.start  # epoch and step of the first batch that was not wholly given yet
        self._reader: SampleReader | None = None
        self._stream: Stream | None = None

    def start(self) -> "TwoViews":
        """Begin with the first batches while the caller does something else; returns itself."""
        if self._stream is None:
            self._reader = SampleReader(self._split, self._max_bad_fraction, self._kept)
            source = ViewSource.augmented(
                self._split.shards.samples, self._reader, self._recipes, self._plan.order.seed
            )
            rest = replace(self._plan, start=self._position)
            self._stream = Stream(source, rest.batches(), self._config, batch=self._plan.images)
        return self

    def __next__(self) -> Batch:
        self.start()
        assert self._stream is not None
        plan, batch = next(self._stream)
        if plan.ends_step:
            self._position = self._plan.order.after(plan.epoch, plan.step)
        return batch

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

    def spent(self) -> dict[str, float]:
        """Seconds that went into making batches since this was last asked, by stage (pipeline.stream.Pace)."""
        return self._stream.spent() if self._stream else {}

    def close(self) -> None:
        """End threads, files and graph; iterating again goes on at the position."""
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
    kept: KeptPictures | None = None,
) -> Generator[Batch, None, None]:
    """Every image of ``ids`` (default: of the split) once, in their order, as its central view (draws.center).

    center_fraction: share of its short side that is seen (default: draws.center_fraction of the size). The last batch
    is short. ids: in storage order, or shards are read more than once. A damaged sample raises UserError, since a
    figure over other images than those of the set would be wrong; with max_bad_fraction it is replaced as in
    :class:`TwoViews`. kept: likewise.
    """
    wanted = np.arange(len(split.shards)) if ids is None else ids
    if not len(wanted):
        return _nothing()
    reader = SampleReader(split, max_bad_fraction, kept)
    source = ViewSource.centered(split.shards.samples, reader, config.size, center_fraction)
    planned = in_storage_order(split.shards, wanted, batch)
    return _in_turn(lambda: Stream(source, planned, config, batch=min(batch, len(wanted))))


def _in_turn(made: Callable[[], Stream]) -> Generator[Batch, None, None]:
    """Its batches, beginning when the first is asked for."""
    with closing(made()) as stream:
        for _, batch in stream:
            yield batch


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
    with closing(Stream(source, [PlannedBatch(ids, epoch, current=shards)], config, batch=len(ids))) as stream:
        _, batch = next(stream)
    return batch


def _nothing() -> Generator[Batch, None, None]:
    yield from ()
