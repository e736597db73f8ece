"""The loaders of training and evaluation: order, reading, draws and graph put together.

    for views, labels, ids in two_views(shards, order, Recipe(), Setting(224, device), epochs=100):
        ...

Legend: n = images per batch of this process, V = views.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from simclr_dali.pipeline import graph
from simclr_dali.pipeline.draws import Draws, Recipe, center, draw
from simclr_dali.pipeline.draws import center_fraction as default_fraction
from simclr_dali.pipeline.files import Files, LocalFiles
from simclr_dali.pipeline.memory import Recycled, keep_freed_memory
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.reader import Reader, SampleReader, ahead
from simclr_dali.pipeline.subset import SPARSE, Subset
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet

Ids = npt.NDArray[np.int64]
MAX_BAD_FRACTION = 1e-4
# Batches (or micro-batches) by which the host may be ahead of a GPU; the views of each are in its memory.
_AHEAD_OF_THE_GPU = 2


class Batch(NamedTuple):
    """views: [V*n, 3, size, size] channels_last, rows view by view, on the device, normalised (pipeline.graph).

    labels, ids: int64 [n] on the CPU, of the samples that are shown.
    """

    views: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Setting:
    """How a loader runs: size of the views in pixels, device, threads and depths. None of it changes a pixel but size,
    device, interpolation and the rounding of dtype.

    dtype: float32, float16 or bfloat16. read_ahead: batches read ahead of the graph. prefetch: batches computed ahead
    of the training step. So at most read_ahead + prefetch + 2 batches of encoded images are in memory, and prefetch + 1
    batches of views beside those that the caller keeps.
    """

    size: int
    device: torch.device
    threads: int = 2
    dtype: torch.dtype = torch.float32
    interpolation: str = "bilinear"
    read_ahead: int = 4
    prefetch: int = 2
    tuning: graph.Tuning = graph.PLAIN


@dataclass(frozen=True)
class Plan:
    """A batch to be made; ``now`` and ``after``: shards that it and those that follow are read from."""

    ids: Ids
    epoch: int
    step: int
    completes: bool  # whether it is the last of its step
    now: list[int]
    after: list[int]


class TwoViews(Iterator[Batch]):
    """What :func:`two_views` returns: an iterator that knows its length and its position."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order | Subset,
        recipes: Sequence[Recipe],
        setting: Setting,
        files: Callable[[], Files],
        *,
        epochs: int,
        start: tuple[int, int],
        rank: int,
        world: int,
        micro_batch: int | None,
        max_bad_fraction: float,
    ) -> None:
        self._shards, self._order, self._recipes, self._setting = shards, order, recipes, setting
        self._files, self._max_bad_fraction = files, max_bad_fraction
        self._epochs, self._rank, self._world = epochs, rank, world
        local = order.local_batch(world)
        self._micro_batch = min(micro_batch or local, local)
        self._begin = start
        self._next = start  # epoch and step of the first batch that was not wholly given yet
        self._reader: SampleReader | None = None
        self._stream: Generator[tuple[Plan, Batch], None, None] | None = None

    def __next__(self) -> Batch:
        if self._stream is None:
            self._reader = SampleReader(self._shards, self._files(), self._max_bad_fraction)
            augment = any(recipe.changes_pixels() for recipe in self._recipes)
            self._stream = run_graph(
                self._shards.samples,
                self._reader,
                self._plans(),
                self._draws,
                self._setting,
                batch=self._micro_batch,
                views=len(self._recipes),
                augment=augment,
            )
        plan, batch = next(self._stream)
        if plan.completes:
            self._next = self._order.after(plan.epoch, plan.step)
        return batch

    def __len__(self) -> int:
        """Batches (micro-batches, if there are) from the start to the end of the epochs."""
        epoch, step = self._begin
        steps = (self._epochs - epoch) * self._order.steps_per_epoch - step
        return steps * -(-self._order.local_batch(self._world) // self._micro_batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands: epoch, step, and the fingerprint of the data set."""
        return {"epoch": self._next[0], "step": self._next[1], "manifest": self._shards.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at ``state``. Raises UserError where it comes from another data set."""
        if state["manifest"] != self._shards.fingerprint:
            raise UserError(
                f"the loader's state is of another data set than {self._shards.folder} (manifest "
                f"{state['manifest'][:12]}, not {self._shards.fingerprint[:12]}); load it with the same shards"
            )
        self.close()
        self._begin = self._next = state["epoch"], state["step"]

    def damaged(self) -> list[int]:
        """Ids of the damaged samples that this process met and replaced so far."""
        return self._reader.damaged() if self._reader else []

    def close(self) -> None:
        """End threads, files and graph; iterating again goes on at the position."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _plans(self) -> Iterator[Plan]:
        epoch, step = self._next
        while epoch < self._epochs:
            ids = self._order.batch(epoch, step, self._rank, self._world)
            now, after = self._order.windows(epoch, step, self._rank, self._world)
            for at in range(0, len(ids), self._micro_batch):
                stop = at + self._micro_batch
                yield Plan(ids[at:stop], epoch, step, stop >= len(ids), now, after)
            epoch, step = self._order.after(epoch, step)

    def _draws(self, plan: "Plan", width: Ids, height: Ids) -> list[Draws]:
        return [
            draw(recipe, self._order.seed, plan.epoch, plan.ids, view, width, height)
            for view, recipe in enumerate(self._recipes)
        ]


def two_views(
    shards: ShardSet,
    order: Order | Subset,
    recipe: Recipe | tuple[Recipe, ...],
    setting: Setting,
    *,
    epochs: int,
    start: tuple[int, int] = (0, 0),
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    files: Callable[[], Files] | None = None,
) -> TwoViews:
    """Two views of each of ``rank``'s images, from ``start`` = (epoch, step) to the end of ``epochs``.

    recipe: of both views, or one for each (any number of views). micro_batch: images per batch that is given; it
    divides the rank's share of the global batch (default: the whole share). max_bad_fraction: share of the data set
    that may be damaged; a damaged sample is replaced by the next sound one, the same on any number of ranks, named in
    the log and counted by each process. files: where the shards come from (default: the shard set's folder).
    Raises UserError while iterating where more is damaged.
    """
    return TwoViews(
        shards,
        order,
        (recipe, recipe) if isinstance(recipe, Recipe) else recipe,
        setting,
        files or (lambda: LocalFiles(shards)),
        epochs=epochs,
        start=start,
        rank=rank,
        world=world,
        micro_batch=micro_batch,
        max_bad_fraction=max_bad_fraction,
    )


def labelled(
    shards: ShardSet,
    setting: Setting,
    *,
    batch: int,
    center_fraction: float | None = None,
    ids: Ids | None = None,
    max_bad_fraction: float = 0.0,
    files: Callable[[], Files] | None = None,
) -> Generator[Batch, None, None]:
    """Every image of ``ids`` (default: of the set) once, in their order, as its central view (draws.center).

    center_fraction: share of its short side that is seen (default: draws.center_fraction of the size). The last batch
    is short. ids: in storage order, or shards are read more than once. A damaged sample raises UserError, since a
    figure over other images than those of the set would be wrong; with max_bad_fraction it is replaced as in
    :func:`two_views`.
    """

    def plans() -> Iterator[Plan]:
        shard_of = shards.samples["shard"][wanted]
        coming = np.unique(shard_of)
        for at in range(0, len(wanted), batch):
            now = np.unique(shard_of[at : at + batch])
            after = coming[coming > now[-1]][:2]
            expected = ([], []) if sparse else (now.tolist(), after.tolist())
            yield Plan(wanted[at : at + batch], 0, 0, True, *expected)

    def draws(plan: Plan, width: Ids, height: Ids) -> list[Draws]:
        return [center(width, height, center_fraction or default_fraction(setting.size))]

    wanted = np.arange(len(shards)) if ids is None else ids
    sparse = len(wanted) < SPARSE * len(shards)
    if not len(wanted):
        return _nothing()
    reader = SampleReader(shards, files() if files else LocalFiles(shards), max_bad_fraction)
    made = run_graph(
        shards.samples, reader, plans(), draws, setting, batch=min(batch, len(wanted)), views=1, augment=False
    )
    return (images for _, images in made)


def _nothing() -> Generator[Batch, None, None]:
    yield from ()


def chosen(
    shards: ShardSet,
    ids: Ids,
    recipes: Sequence[Recipe],
    setting: Setting,
    *,
    seed: int,
    epoch: int,
    max_bad_fraction: float = 0.0,
    files: Callable[[], Files] | None = None,
) -> Batch:
    """The views of samples ``ids`` as ``epoch`` of a run with ``seed`` draws them."""
    now = [int(shard) for shard in np.unique(shards.samples["shard"][ids])]
    plan = Plan(ids, epoch, 0, True, now, [])

    def draws(plan: Plan, width: Ids, height: Ids) -> list[Draws]:
        return [draw(recipe, seed, epoch, ids, view, width, height) for view, recipe in enumerate(recipes)]

    reader = SampleReader(shards, files() if files else LocalFiles(shards), max_bad_fraction)
    made = run_graph(shards.samples, reader, [plan], draws, setting, batch=len(ids), views=len(recipes), augment=True)
    _, batch = next(made)
    made.close()
    return batch


def run_graph(
    samples: npt.NDArray[Any],
    reader: Reader,
    plans: Iterable[Plan],
    draws: Callable[[Plan, Ids, Ids], list[Draws]],
    setting: Setting,
    *,
    batch: int,
    views: int,
    augment: bool,
) -> Generator[tuple[Plan, Batch], None, None]:
    """The batches of ``plans``, each with its plan; what every loader is made of.

    samples: a table of SAMPLE, of which width, height and label are used, after the reader has read a sample.
    draws: plan, width, height -> what each view drew. batch: the largest number of images in a plan.
    """

    def expected() -> Iterator[Plan]:
        for plan in plans:
            reader.expect(plan.now, plan.after)
            yield plan

    def prepare(plan: Plan) -> tuple[Plan, Ids, list[Any]]:
        images, shown = reader.read(plan.ids)
        rows = samples[shown]
        # Keyed by the planned ids: a sample that also stands in for a damaged one is drawn twice, differently.
        drawn = draws(plan, rows["width"].astype(np.int64), rows["height"].astype(np.int64))
        region = graph.region_inputs(drawn) if setting.tuning.region else []
        inputs = [array for view in drawn for array in graph.view_inputs(view, augment)]
        return plan, shown, [images, *region, *inputs]

    prepared = ahead(expected(), prepare, setting.threads, setting.read_ahead)
    handed_over: deque[tuple[Plan, Ids]] = deque()  # batches inside the graph

    def source() -> list[Any]:
        plan, shown, inputs = next(prepared)
        handed_over.append((plan, shown))
        return inputs

    on_gpu = setting.device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()
    pipeline = graph.build(
        source,
        batch=batch,
        views=views,
        augment=augment,
        size=setting.size,
        interpolation=setting.interpolation,
        device_id=(setting.device.index or 0) if on_gpu else None,
        threads=setting.threads,
        half=setting.dtype == torch.float16,
        prefetch=setting.prefetch,
        tuning=setting.tuning,
    )
    recycled = Recycled()
    # On a GPU the outputs are copied on a stream of their own, while the step before still computes.
    copies = torch.cuda.Stream(setting.device) if on_gpu else None
    asked: deque[torch.cuda.Event] = deque()  # what the caller's stream was given to do before each batch
    try:
        while True:
            if copies is not None:
                # DALI may reuse the memory of the last outputs once they are let go, which its own stream does not
                # order after our copy.
                copies.synchronize()
                asked.append(torch.cuda.current_stream(setting.device).record_event())
                if len(asked) > _AHEAD_OF_THE_GPU:
                    asked.popleft().synchronize()
            try:
                # Stream-ordered on the GPU: the host does not wait for the images to be there.
                outputs = pipeline.run(copies)
            except StopIteration:
                return
            plan, shown = handed_over.popleft()
            shape = (views, len(shown), setting.size, setting.size, 3)
            with torch.cuda.stream(copies):  # does nothing where there is none
                if on_gpu:
                    pixels = torch.empty(shape, dtype=setting.dtype, device=setting.device)
                else:
                    pixels = recycled.empty(shape, setting.dtype)
                for view, output in zip(pixels, outputs, strict=True):
                    view.copy_(torch.utils.dlpack.from_dlpack(output.as_tensor()))
            if copies is not None:
                caller = torch.cuda.current_stream(setting.device)
                caller.wait_stream(copies)
                pixels.record_stream(caller)
            labels = torch.from_numpy(samples["label"][shown].astype(np.int64))
            yield plan, Batch(pixels.flatten(0, 1).permute(0, 3, 1, 2), labels, torch.from_numpy(shown))
    finally:
        if copies is not None:
            copies.synchronize()  # before DALI's outputs are let go
        reader.stop()
        prepared.close()
        reader.close()
