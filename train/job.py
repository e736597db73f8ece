"""What a run is made of."""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dali.model.process import Process, from_all_ranks, on_rank_0
from simclr_dali.pipeline.batch_plan import BatchPlan
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_memory import Processes, set_aside
from simclr_dali.pipeline.kept_pictures import KeptPictures
from simclr_dali.pipeline.loader import TwoViews
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.replay import Replay, write
from simclr_dali.pipeline.views import sheet
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.wording import counted
from simclr_dali.train.config import Config
from simclr_dali.train.footprint import bytes_of_step
from simclr_dali.train.metrics import batch_file
from simclr_dali.train.resume import data_address
from simclr_dali.train.trackers import Pixels, Trackers, chosen

_VIEWS_SHOWN = 8  # images


@dataclass(frozen=True)
class Job:
    """A run's settings, its data and its place among the processes."""

    config: Config
    split: Split
    order: Order
    process: Process
    run: Path
    kept: KeptPictures | None = None
    """Where decoded pictures are (keep_decoded)."""
    trackers: Trackers = field(default_factory=Trackers)
    """Who is told of the run on this rank, beside its own files."""
    begun_with: dict[str, Any] | None = None
    """Whose weights it began with (train.initial_weights); None: random ones."""

    @property
    def total_steps(self) -> int:
        return self.config.simclr.epochs * self.order.steps_per_epoch

    def views(self, first_step: int = 0) -> TwoViews:
        """Micro-batches of this process from ``first_step`` to the end of the run."""
        config, process = self.config, self.process
        plan = BatchPlan(
            self.order,
            epochs=config.simclr.epochs,
            start=divmod(first_step, self.order.steps_per_epoch),
            rank=process.rank,
            world=process.world,
            micro_batch=config.micro_batch(process.world),
        )
        return TwoViews(
            self.split,
            plan,
            config.simclr.views.recipes(),
            self.loader_config(),
            max_bad_fraction=config.simclr.max_bad_fraction,
            kept=self.kept,
        )

    def loader_config(self) -> LoaderConfig:
        """How this process makes its views."""
        simclr = self.config.simclr
        return LoaderConfig(
            size=simclr.image_size,
            device=self.process.device,
            threads=simclr.loader_threads or self.process.cores,
            dtype=view_dtype(self.config, self.process.device),
            interpolation=simclr.views.interpolation,
            **simclr.graph.on(self.process.device.type, whole=simclr.deterministic),
            engine_share=simclr.engine_share if self.process.device.type == "cuda" else 0.0,
        )

    def keep_batch(self, step: int, reason: str) -> list[int]:
        """Write what this rank saw at ``step`` into the run folder (batch_file), and return the ids of its samples."""
        replay = self.replay(step, reason)
        with refusals_named(self.run):
            self.run.mkdir(parents=True, exist_ok=True)  # another machine's, where the folder is not shared
        write(batch_file(self.run, step, self.process.rank), replay, self.split.shards)
        return [int(sample) for sample in replay.ids]

    def replay(self, step: int, reason: str) -> Replay:
        """What this rank sees at ``step``, to be looked at."""
        epoch, step_of_epoch = divmod(step, self.order.steps_per_epoch)
        simclr, process = self.config.simclr, self.process
        return Replay(
            data=data_address(self.config),
            manifest=self.split.shards.fingerprint,
            about={"step": step, "rank": process.rank, "processes": process.world, "reason": reason},
            seed=simclr.seed,
            epoch=epoch,
            size=simclr.image_size,
            interpolation=simclr.views.interpolation,
            recipes=simclr.views.recipes(),
            ids=self.order.batch(epoch, step_of_epoch, process.rank, process.world),
        )


def keep_decoded(config: Config, shards: ShardSet, process: Process, epochs: float) -> tuple[KeptPictures | None, str]:
    """Memory for the run's decoded pictures, as simclr.keep_decoded says, and a sentence on it. All ranks call it.

    epochs: how many are left.
    """
    if epochs <= 1:
        return None, "decoded pictures are not kept, since each is used once"

    def step() -> int:
        return bytes_of_step(
            config.architecture(),
            config.simclr.image_size,
            config.micro_batch(process.world),
            autocast=config.torch_autocast.on(process.device.type),
        )

    return set_aside(
        shards,
        config.simclr.keep_decoded,
        process.device,
        beside=step,
        processes=Processes(process.rank, from_all_ranks),
    )


def begin_tracking(job: Job, first_step: int) -> Trackers:
    """The trackers of a run that begins or goes on at ``first_step``, which work on rank 0 only. All ranks call it.

    A run that begins shows them its first views. Raises UserError where one that is named is not installed.
    """
    names = on_rank_0(job.process, lambda: chosen(job.config.simclr.track))
    if job.process.rank:
        return Trackers()
    trackers = Trackers(names, job.run, job.config.model_dump(mode="json"), first_step)

    @cache  # several trackers show the same
    def first_views() -> Pixels:
        first = job.replay(0, "the first views")
        picture, _ = sheet(job.split, replace(first, ids=first.ids[:_VIEWS_SHOWN]))
        return np.asarray(picture)

    if first_step == 0:
        trackers.picture("views", first_views)
    return trackers


def build_order(config: Config, shards: ShardSet) -> Order:
    """The order of a run. Raises UserError where the global batch does not fit the data, and says what would."""
    if len(shards) < 2:
        raise UserError(f"{shards.folder} holds 1 image, and the method compares images with each other; pack more")
    if config.train_batch_size > len(shards):
        batch = max(2, 2 ** (max(1, len(shards) // 4).bit_length() - 1))
        words = [f"train_batch_size={batch}", f"simclr.lanes={math.gcd(config.simclr.lanes, batch)}"]
        words += ["optimizer.params.lr=auto"] if config.simclr.lr_rule != "none" else []
        raise UserError(
            f"a global batch of {config.train_batch_size} does not fit the {counted(len(shards), 'image')} of the data "
            f"set; give: {' '.join(f'--set {word}' for word in words)}"
        )
    return Order(
        shard_sizes=shards.shard_sizes(),
        global_batch=config.train_batch_size,
        lanes=config.simclr.lanes,
        window=config.simclr.shuffle_window,
        seed=config.simclr.seed,
    )


def view_dtype(config: Config, device: torch.device) -> torch.dtype:
    """float16 where the first convolution computes in half precision anyway."""
    return torch.float16 if device.type == "cuda" and config.torch_autocast.on(device.type) else torch.float32
