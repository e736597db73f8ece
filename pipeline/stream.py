"""Planned batches become views: read, draw, run the graph, hand over tensors.

Legend: n = images per batch of this process, V = views.
"""

import queue
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from simclr_dali.pipeline import graph
from simclr_dali.pipeline.batch_plan import PlannedBatch
from simclr_dali.pipeline.draws import Draws, Recipe, center, center_fraction, draw_views
from simclr_dali.pipeline.engine import EngineChoice
from simclr_dali.pipeline.graph import LoaderConfig, Steps
from simclr_dali.pipeline.kept_pictures import KeptPictures
from simclr_dali.pipeline.memory import Recycled, keep_freed_memory
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.reader import Encoded, Found, Reader, map_ahead

# Batches (or micro-batches) by which the host may be ahead of a GPU; the views of each are in its memory.
_AHEAD_OF_THE_GPU = 2
_READY = 1  # batches that lie ready for whoever asks


class Batch(NamedTuple):
    """Images as they are handed to a training or an evaluation."""

    views: torch.Tensor
    """[V*n, 3, size, size] channels_last, rows view by view, on the device, normalised (pipeline.graph)."""
    labels: torch.Tensor
    """int64 [n] on the CPU, of the samples that are shown."""
    ids: torch.Tensor
    """int64 [n] on the CPU, of the samples that are shown."""


@dataclass(frozen=True)
class ViewSource:
    """Where images come from, and what is drawn of them."""

    samples: npt.NDArray[Any]
    """A table of SAMPLE, of which width, height and label are used, after the reader has read a sample."""
    reader: Reader
    draw: Callable[[PlannedBatch, Ids, Ids], list[Draws]]
    """Batch, widths, heights -> what each view drew."""
    views: int = 1
    steps: Steps = frozenset()
    """What any view can draw (Recipe.steps)."""

    @staticmethod
    def augmented(samples: npt.NDArray[Any], reader: Reader, recipes: Sequence[Recipe], seed: int) -> "ViewSource":
        """A view by each recipe, as a run with ``seed`` draws them."""

        def drawn(plan: PlannedBatch, width: Ids, height: Ids) -> list[Draws]:
            return draw_views(recipes, seed, plan.epoch, plan.ids, width, height)

        steps = frozenset[str]().union(*(recipe.steps() for recipe in recipes))
        return ViewSource(samples, reader, drawn, len(recipes), steps)

    @staticmethod
    def centered(samples: npt.NDArray[Any], reader: Reader, size: int, fraction: float | None) -> "ViewSource":
        """The central view of ``size`` pixels; fraction: None for the usual one (draws.center_fraction)."""
        seen = fraction or center_fraction(size)
        return ViewSource(samples, reader, lambda plan, width, height: [center(width, height, seen)])


class Pace:
    """The seconds that making batches took, by stage; safe to use from many threads.

    "reading" and "drawing" are of all threads that prepare batches ahead. "inputs" is what the graph's thread waited
    for those, "decoding" what it spent in the graph, which crops, colors and blurs as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: Counter[str] = Counter()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds  # type: ignore[assignment]

    def spent(self) -> dict[str, float]:
        """Seconds by stage since this was last asked."""
        with self._lock:
            seconds, self._seconds = self._seconds, Counter()
        return {stage: float(seconds[stage]) for stage in ("reading", "drawing", "inputs", "decoding")}


class Stream(Iterator[tuple[PlannedBatch, Batch]]):
    """The planned batches, each with its plan, made in threads of their own from the moment it is created.

    Reading, draws, the graph and the copy of its outputs happen there; whoever asks takes a finished tensor. What goes
    wrong is raised where its batch would come.
    """

    def __init__(
        self, source: ViewSource, planned: Iterable[PlannedBatch], config: LoaderConfig, *, batch: int
    ) -> None:
        """batch: the largest number of images in one of ``planned``."""
        self._making = _Making(source, planned, config, batch)
        # The thread knows nothing of this object, so that one that is left behind ends it.
        self._finalizer = weakref.finalize(self, self._making.close)

    def __next__(self) -> tuple[PlannedBatch, Batch]:
        return self._making.take()

    def spent(self) -> dict[str, float]:
        """See :class:`Pace`."""
        return self._making.pace.spent()

    def close(self) -> None:
        """End threads, files and graph."""
        self._finalizer()


class _Making:
    """The thread that runs the graph, and the batches that it has ready."""

    def __init__(self, source: ViewSource, planned: Iterable[PlannedBatch], config: LoaderConfig, batch: int) -> None:
        self._kept = source.reader.kept
        if self._kept:  # what is kept is whole
            config = replace(config, region=False)
        self._source, self._planned, self._config, self._batch = source, planned, config, batch
        self._engine = EngineChoice(len(source.samples), config.engine_share) if config.engine_share else None
        self._outputs: Any = _GPUOutputs(config) if config.device_id is not None else _CPUOutputs(config)
        self._ready: queue.Queue[tuple[PlannedBatch, Batch, Any] | BaseException] = queue.Queue(_READY)
        self.pace = Pace()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._make, name="graph", daemon=True)
        self._thread.start()

    def take(self) -> tuple[PlannedBatch, Batch]:
        self._outputs.asked()
        made = self._ready.get()
        if isinstance(made, BaseException):
            self._ready.put(made)  # for whoever asks once more
            raise made
        plan, batch, done = made
        self._outputs.hand_over(batch.views, done)
        return plan, batch

    def close(self) -> None:
        self._stopped.set()
        self._source.reader.stop()
        while self._thread.is_alive():
            with suppress(queue.Empty):  # so that it can put what it has in hand, and see that it is to end
                self._ready.get(timeout=0.01)
        with suppress(queue.Full):
            self._ready.put_nowait(StopIteration())

    def _make(self) -> None:
        try:
            if self._config.device_id is not None:  # a thread begins on GPU 0, where it would take memory
                torch.cuda.set_device(self._config.device_id)
            self._run()
            ended: BaseException = StopIteration()
        except BaseException as error:
            ended = error
        if not self._stopped.is_set():
            self._ready.put(ended)

    def _run(self) -> None:
        source, config, outputs = self._source, self._config, self._outputs
        in_flight: deque[tuple[PlannedBatch, Found, list[Any]]] = deque()  # batches inside the graph
        prepared = map_ahead(self._announced(), self._prepare, config.threads, config.read_ahead)

        waited = 0.0  # for inputs, of the run that is being made

        def next_inputs() -> list[Any]:
            nonlocal waited
            asked = time.perf_counter()
            in_flight.append(next(prepared))
            waited += time.perf_counter() - asked
            return in_flight[-1][2]

        pipeline = graph.build(
            next_inputs,
            config,
            batch=self._batch,
            views=source.views,
            steps=source.steps,
            kept_on=self._kept.device if self._kept else None,
        )
        try:
            while not self._stopped.is_set():
                began, waited = time.perf_counter(), 0.0
                try:
                    made = outputs.run(pipeline)
                except StopIteration:
                    return
                self.pace.add("inputs", waited)
                self.pace.add("decoding", time.perf_counter() - began - waited)
                # The graph reads the inputs where they lie. On a GPU it may do so until the copies of its outputs are
                # done, for which the next run waits; only then are those of this batch let go.
                plan, (_, shown, is_kept), _held = in_flight.popleft()
                if self._kept and not is_kept.all():
                    decoded = [made[-1][row] for row in np.flatnonzero(~is_kept)]
                    outputs.keep(self._kept, shown[~is_kept], decoded)
                views = made[: source.views]
                pixels, done = outputs.take(views, (source.views, len(shown), config.size, config.size, 3))
                labels = torch.from_numpy(source.samples["label"][shown].astype(np.int64))
                batch = Batch(pixels.flatten(0, 1).permute(0, 3, 1, 2), labels, torch.from_numpy(shown))
                self._ready.put((plan, batch, done))
                del batch, pixels
        finally:
            outputs.close()
            source.reader.stop()
            prepared.close()
            source.reader.close()

    def _announced(self) -> Iterator[PlannedBatch]:
        for plan in self._planned:
            self._source.reader.expect(plan.current, plan.upcoming)
            yield plan

    def _prepare(self, plan: PlannedBatch) -> tuple[PlannedBatch, Found, list[Any]]:
        source = self._source
        began = time.perf_counter()
        found = source.reader.read(plan.ids)
        read = time.perf_counter()
        self.pace.add("reading", read - began)
        rows = source.samples[found.ids]
        # Keyed by the planned ids: a sample that also stands in for a damaged one is drawn twice, differently.
        drawn = source.draw(plan, rows["width"].astype(np.int64), rows["height"].astype(np.int64))
        encoded: Any = found.encoded
        on_engine, kept = None, None
        if self._kept:
            encoded = _with_nothing(encoded, found.is_kept)
            kept = self._kept.batch(found.ids, found.is_kept), found.is_kept
        if self._engine:
            on_engine = self._engine.of(found.ids, encoded)
        inputs = graph.graph_inputs(encoded, drawn, source.steps, self._config, on_engine=on_engine, kept=kept)
        self.pace.add("drawing", time.perf_counter() - read)
        return plan, found, inputs


def _with_nothing(encoded: list[Encoded], is_kept: npt.NDArray[np.bool_]) -> Any:
    """The encoded images of a batch, and a byte for each that is kept decoded."""
    if not encoded:
        return np.zeros((len(is_kept), 1), np.uint8)
    read, nothing = iter(encoded), np.zeros(1, np.uint8)
    return [nothing if not_read else next(read) for not_read in is_kept.tolist()]


class _CPUOutputs:
    """Runs the graph and copies what it computed into memory that was used before."""

    def __init__(self, config: LoaderConfig) -> None:
        keep_freed_memory()
        self._dtype, self._recycled = config.dtype, Recycled()

    def asked(self) -> None:
        """The caller asks for a batch."""

    def run(self, pipeline: Any) -> Any:
        return pipeline.run()

    def take(self, views: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, None]:
        """The views as one tensor [V, n, size, size, 3]."""
        pixels = self._recycled.empty(shape, self._dtype)
        for target, view in zip(pixels, views, strict=True):
            target.copy_(torch.utils.dlpack.from_dlpack(view.as_tensor()))
        return pixels, None

    def keep(self, pictures: KeptPictures, ids: Ids, decoded: list[Any]) -> None:
        """Keep what the graph has decoded."""
        pictures.mark(pictures.write(ids, decoded))

    def hand_over(self, pixels: torch.Tensor, done: None) -> None:
        """The caller gets a batch."""

    def close(self) -> None:
        pass


class _GPUOutputs:
    """The same on a GPU, on a stream of its own, while the step before still computes; the caller's host never waits
    for the device, but for the next batch where the device is behind."""

    def __init__(self, config: LoaderConfig) -> None:
        self._dtype, self._device = config.dtype, config.device
        self._copies = torch.cuda.Stream(config.device)
        self._asked: deque[torch.cuda.Event] = deque()  # what the caller's stream was given to do before each batch
        self._kept: list[tuple[KeptPictures, Ids]] = []  # that are on their way

    def asked(self) -> None:
        self._asked.append(torch.cuda.current_stream(self._device).record_event())

    def run(self, pipeline: Any) -> Any:
        # DALI may reuse the memory of the last outputs once they are let go, which its own stream does not order after
        # our copy.
        self._copies.synchronize()
        while self._kept:
            pictures, ids = self._kept.pop()
            pictures.mark(ids)
        while len(self._asked) > _AHEAD_OF_THE_GPU:
            self._asked.popleft().synchronize()
        return pipeline.run(self._copies)

    def take(self, views: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The views as one tensor [V, n, size, size, 3], and when it is there."""
        with torch.cuda.stream(self._copies):
            pixels = torch.empty(shape, dtype=self._dtype, device=self._device)
            for target, view in zip(pixels, views, strict=True):
                target.copy_(torch.utils.dlpack.from_dlpack(view.as_tensor()))
        return pixels, self._copies.record_event()

    def keep(self, pictures: KeptPictures, ids: Ids, decoded: list[Any]) -> None:
        with torch.cuda.stream(self._copies):
            self._kept.append((pictures, pictures.write(ids, decoded)))

    def hand_over(self, pixels: torch.Tensor, done: torch.cuda.Event) -> None:
        caller = torch.cuda.current_stream(self._device)
        caller.wait_event(done)
        pixels.record_stream(caller)

    def close(self) -> None:
        self._copies.synchronize()  # before DALI's outputs are let go
