"""Planned batches become views: read, draw, run the graph, hand over tensors.

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
from simclr_dali.pipeline.batch_plan import PlannedBatch
from simclr_dali.pipeline.draws import Draws, Recipe, center, center_fraction, draw_views
from simclr_dali.pipeline.graph import LoaderConfig, Steps
from simclr_dali.pipeline.memory import Recycled, keep_freed_memory
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.reader import Reader, map_ahead

# Batches (or micro-batches) by which the host may be ahead of a GPU; the views of each are in its memory.
_AHEAD_OF_THE_GPU = 2


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


def stream(
    source: ViewSource, planned: Iterable[PlannedBatch], config: LoaderConfig, *, batch: int
) -> Generator[tuple[PlannedBatch, Batch], None, None]:
    """The ``planned`` batches, each with its plan. batch: the largest number of images in one of them.

    Closing the generator ends threads, files and graph.
    """
    in_flight: deque[tuple[PlannedBatch, Ids]] = deque()  # batches inside the graph

    def announced() -> Iterator[PlannedBatch]:
        for plan in planned:
            source.reader.expect(plan.current, plan.upcoming)
            yield plan

    def prepare(plan: PlannedBatch) -> tuple[PlannedBatch, Ids, list[Any]]:
        images, shown = source.reader.read(plan.ids)
        rows = source.samples[shown]
        # Keyed by the planned ids: a sample that also stands in for a damaged one is drawn twice, differently.
        drawn = source.draw(plan, rows["width"].astype(np.int64), rows["height"].astype(np.int64))
        return plan, shown, graph.graph_inputs(images, drawn, source.steps, config)

    prepared = map_ahead(announced(), prepare, config.threads, config.read_ahead)

    def next_inputs() -> list[Any]:
        plan, shown, inputs = next(prepared)
        in_flight.append((plan, shown))
        return inputs

    outputs = _GPUOutputs(config) if config.device_id is not None else _CPUOutputs(config)
    pipeline = graph.build(next_inputs, config, batch=batch, views=source.views, steps=source.steps)
    try:
        while True:
            try:
                views = outputs.run(pipeline)
            except StopIteration:
                return
            plan, shown = in_flight.popleft()
            pixels = outputs.take(views, (source.views, len(shown), config.size, config.size, 3))
            labels = torch.from_numpy(source.samples["label"][shown].astype(np.int64))
            yield plan, Batch(pixels.flatten(0, 1).permute(0, 3, 1, 2), labels, torch.from_numpy(shown))
    finally:
        outputs.close()
        source.reader.stop()
        prepared.close()
        source.reader.close()


class _CPUOutputs:
    """Runs the graph and copies what it computed into memory that was used before."""

    def __init__(self, config: LoaderConfig) -> None:
        keep_freed_memory()
        self._dtype, self._recycled = config.dtype, Recycled()

    def run(self, pipeline: Any) -> Any:
        return pipeline.run()

    def take(self, views: Any, shape: tuple[int, ...]) -> torch.Tensor:
        """The views as one tensor [V, n, size, size, 3]."""
        pixels = self._recycled.empty(shape, self._dtype)
        for target, view in zip(pixels, views, strict=True):
            target.copy_(torch.utils.dlpack.from_dlpack(view.as_tensor()))
        return pixels

    def close(self) -> None:
        pass


class _GPUOutputs:
    """The same on a GPU, on a stream of its own, while the step before still computes; the host does not wait."""

    def __init__(self, config: LoaderConfig) -> None:
        self._dtype, self._device = config.dtype, config.device
        self._copies = torch.cuda.Stream(config.device)
        self._asked: deque[torch.cuda.Event] = deque()  # what the caller's stream was given to do before each batch

    def run(self, pipeline: Any) -> Any:
        # DALI may reuse the memory of the last outputs once they are let go, which its own stream does not order after
        # our copy.
        self._copies.synchronize()
        self._asked.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._asked) > _AHEAD_OF_THE_GPU:
            self._asked.popleft().synchronize()
        return pipeline.run(self._copies)

    def take(self, views: Any, shape: tuple[int, ...]) -> torch.Tensor:
        """The views as one tensor [V, n, size, size, 3], there for the caller's stream."""
        with torch.cuda.stream(self._copies):
            pixels = torch.empty(shape, dtype=self._dtype, device=self._device)
            for target, view in zip(pixels, views, strict=True):
                target.copy_(torch.utils.dlpack.from_dlpack(view.as_tensor()))
        caller = torch.cuda.current_stream(self._device)
        caller.wait_stream(self._copies)
        pixels.record_stream(caller)
        return pixels

    def close(self) -> None:
        self._copies.synchronize()  # before DALI's outputs are let go
