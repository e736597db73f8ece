"""What a run is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simclr_dali.model.process import Process
from simclr_dali.pipeline.files import Files
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.replay import Replay, write
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.train.config import Config
from simclr_dali.train.metrics import batch_file
from simclr_dali.train.resume import data_address


@dataclass(frozen=True)
class Job:
    """What a run is made of: its settings, its data and its place among the processes."""

    config: Config
    shards: ShardSet
    files: Callable[[], Files]
    order: Order
    process: Process
    run: Path

    @property
    def total_steps(self) -> int:
        return self.config.simclr.epochs * self.order.steps_per_epoch

    def keep_batch(self, step: int, reason: str) -> list[int]:
        """Write what this rank saw at ``step`` into the run folder (batch_file), and return the ids of its samples."""
        epoch, step_of_epoch = divmod(step, self.order.steps_per_epoch)
        simclr, process = self.config.simclr, self.process
        replay = Replay(
            data=data_address(self.config),
            manifest=self.shards.fingerprint,
            about={"step": step, "rank": process.rank, "processes": process.world, "reason": reason},
            seed=simclr.seed,
            epoch=epoch,
            size=simclr.image_size,
            interpolation=simclr.views.interpolation,
            recipes=simclr.views.recipes(),
            ids=self.order.batch(epoch, step_of_epoch, process.rank, process.world),
        )
        with refusals_named(self.run):
            self.run.mkdir(parents=True, exist_ok=True)  # another machine's, where the folder is not shared
        write(batch_file(self.run, step, process.rank), replay, self.shards)
        return [int(sample) for sample in replay.ids]
