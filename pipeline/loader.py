"""The loaders of training and evaluation: order, reading, draws and graph put together.

Legend: b = images per batch of this process, V = views.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import graph
from pipeline.draws import Draws, Recipe, center, draw
from pipeline.order import Order
from pipeline.reading import SampleReader, ahead
from shards.manifest import ShardSet

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """views: [V*b, 3, size, size] channels_last, rows view by view. labels, ids: int64 [b] on the CPU.

    epoch, step: where the batch belongs (0 in evaluation).
    """

    views: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class _Plan:
    ids: Ids
    epoch: int
    step: int


@dataclass(frozen=True)
class Setting:
    """How a loader runs: size of the views in pixels, device, threads and depths. None of it changes a pixel but size,
    interpolation and device.

    half: float16 output instead of float32. read_ahead: batches read ahead of the graph. prefetch: batches computed
    ahead of the training step.
    """

    size: int
    device: torch.device
    threads: int = 2
    half: bool = False
    interpolation: str = "bilinear"
    read_ahead: int = 4
    prefetch: int = 2


def two_views(
    shards: ShardSet,
    order: Order,
    recipe: Recipe,
    setting: Setting,
    *,
    epochs: int,
    start: tuple[int, int] = (0, 0),
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
) -> Generator[Batch, None, None]:
    """Two views of each of ``rank``'s images, from ``start`` = (epoch, step) to the end of ``epochs``.

    A step's images come in micro-batches of ``micro_batch`` (None: in one). The stream does not stop between epochs,
    so the graph is never drained.
    """

    def plans() -> Iterator[_Plan]:
        epoch, step = start
        while epoch < epochs:
            ids = order.batch(epoch, step, rank, world)
            size = micro_batch or len(ids)
            for at in range(0, len(ids), size):
                yield _Plan(ids[at : at + size], epoch, step)
            step += 1
            if step == order.steps_per_epoch:
                epoch, step = epoch + 1, 0

    def draws(plan: _Plan, width: Ids, height: Ids) -> list[Draws]:
        return [draw(recipe, order.seed, plan.epoch, plan.ids, view, width, height) for view in range(2)]

    batch = micro_batch or order.global_batch // world
    return _run(shards, plans(), draws, setting, batch=batch, views=2, augment=True)


def labelled(shards: ShardSet, setting: Setting, *, batch: int, center_fraction: float) -> Generator[Batch, None, None]:
    """Every image of the set once, in storage order, as its central view (draws.center); the last batch is short."""

    def plans() -> Iterator[_Plan]:
        for at in range(0, len(shards), batch):
            yield _Plan(np.arange(at, min(at + batch, len(shards))), 0, 0)

    def draws(plan: _Plan, width: Ids, height: Ids) -> list[Draws]:
        return [center(width, height, center_fraction)]

    return _run(shards, plans(), draws, setting, batch=min(batch, len(shards)), views=1, augment=False)


def _run(
    shards: ShardSet, plans: Iterable[_Plan], draws: Any, setting: Setting, *, batch: int, views: int, augment: bool
) -> Generator[Batch, None, None]:
    reader = SampleReader(shards)

    def prepare(plan: _Plan) -> tuple[_Plan, list[Any]]:
        rows = shards.samples[plan.ids]
        drawn = draws(plan, rows["width"].astype(np.int64), rows["height"].astype(np.int64))
        inputs = [array for view in drawn for array in graph.view_inputs(view, augment)]
        return plan, [reader.read(plan.ids), *inputs]

    prepared = ahead(plans, prepare, setting.threads, setting.read_ahead)
    handed_over: deque[_Plan] = deque()  # batches inside the graph

    def source() -> list[Any]:
        plan, inputs = next(prepared)
        handed_over.append(plan)
        return inputs

    on_gpu = setting.device.type == "cuda"
    pipeline = graph.build(
        source,
        batch=batch,
        views=views,
        augment=augment,
        size=setting.size,
        interpolation=setting.interpolation,
        device_id=(setting.device.index or 0) if on_gpu else None,
        threads=setting.threads,
        half=setting.half,
        prefetch=setting.prefetch,
    )
    copied = torch.cuda.Event() if on_gpu else None
    try:
        while True:
            if copied is not None:
                # DALI may reuse the memory of the last outputs once they are let go, which its own stream does not
                # order after our copy.
                copied.synchronize()
            try:
                # Stream-ordered on the GPU: the host does not wait for the images to be there.
                outputs = pipeline.run(torch.cuda.current_stream(setting.device) if on_gpu else None)
            except StopIteration:
                return
            plan = handed_over.popleft()
            images = torch.cat([torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs])
            if copied is not None:
                copied.record(torch.cuda.current_stream(setting.device))
            labels = torch.from_numpy(shards.samples["label"][plan.ids].astype(np.int64))
            yield Batch(images.permute(0, 3, 1, 2), labels, torch.from_numpy(plan.ids), plan.epoch, plan.step)
    finally:
        prepared.close()
        reader.close()
