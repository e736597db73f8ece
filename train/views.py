"""The order and the stream of views that a configuration describes."""

from collections.abc import Callable

import torch

from simclr_dali.model.process import Process
from simclr_dali.pipeline.files import Files
from simclr_dali.pipeline.loader import Setting, TwoViews, two_views
from simclr_dali.pipeline.order import Order
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.train.config import Config


def build_order(config: Config, shards: ShardSet) -> Order:
    return Order(
        shard_sizes=shards.shard_sizes(),
        global_batch=config.train_batch_size,
        lanes=config.simclr.lanes,
        window=config.simclr.shuffle_window,
        seed=config.simclr.seed,
    )


def view_dtype(config: Config, device: torch.device) -> torch.dtype:
    """float16 where the first convolution computes in half precision anyway."""
    return torch.float16 if device.type == "cuda" and config.torch_autocast.enabled else torch.float32


def build_views(
    config: Config,
    shards: ShardSet,
    files: Callable[[], Files],
    order: Order,
    process: Process,
    first_step: int = 0,
) -> TwoViews:
    """Micro-batches of this process from ``first_step`` to the end of the run."""
    simclr = config.simclr
    return two_views(
        shards,
        order,
        simclr.views.recipes(),
        Setting(
            size=simclr.image_size,
            device=process.device,
            threads=simclr.loader_threads or process.cores,
            dtype=view_dtype(config, process.device),
            interpolation=simclr.views.interpolation,
        ),
        epochs=simclr.epochs,
        start=divmod(first_step, order.steps_per_epoch),
        rank=process.rank,
        world=process.world,
        micro_batch=config.micro_batch(process.world),
        max_bad_fraction=simclr.max_bad_fraction,
        files=files,
    )
