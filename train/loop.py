"""The steps of a run, with what is reported, checked and kept on the way."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.process import Process, say
from model.schedule import learning_rate
from pipeline.files import Files
from pipeline.order import Order
from pipeline.replay import Replay, write
from shards.durable import refusals_named, write_durably
from shards.manifest import ShardSet
from train.config import Config
from train.metrics import Reporter, batch_file
from train.parking import Parked
from train.resume import data_address, state_of
from train.saver import Saver
from train.step import train_step
from train.together import Agreement, StopRequest, all_finite, refuse_drift
from train.views import build_views
from train.watchdog import Watchdog


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


def train(
    job: Job,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    stop: StopRequest,
    watchdog: Watchdog,
    first_step: int,
    last_step: int,
) -> None:
    """Run steps first_step .. last_step - 1, or until someone asks to stop; there is a checkpoint at the end."""
    config, order, process, run = job.config, job.order, job.process, job.run
    simclr, steps_per_epoch = config.simclr, order.steps_per_epoch
    warmup_steps = round(simclr.warmup_epochs * steps_per_epoch)
    batches = build_views(config, job.shards, job.files, order, process, first_step)
    views = Parked(process.device, config.passes(process.world))
    reporter = Reporter(
        run,
        process,
        batch=config.train_batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=job.total_steps,
        first_step=first_step,
        keep_batch=job.keep_batch,
    )
    agreement = Agreement(process)
    engine.train()
    started = time.monotonic()
    done, leave = first_step, False
    with Saver(run, simclr.keep_checkpoints, first_step) as saver:
        while done < last_step and not leave:
            step = done
            watchdog.at(f"step {step}")
            views.begin(batch.views for batch in batches)
            lr = learning_rate(step, config.optimizer.params.lr, warmup_steps, job.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            reporter.add(step, lr, train_step(engine, views, simclr.temperature, ring=simclr.ring))
            reporter.waited(views.waited())

            done = step + 1
            leave = agreement.any_wanted(bool(stop.reason))
            for_good = bool(simclr.keep_every_epochs) and done % (simclr.keep_every_epochs * steps_per_epoch) == 0
            save_now = done == last_step or leave or for_good or done % simclr.checkpoint_every == 0
            if save_now:
                saver.wait()  # so that nothing is ever reported that is two checkpoints ahead of the disk
            if save_now or done % simclr.log_every == 0:
                reporter.drain(saver.last_kept, durably=save_now)
                saver.refuse_failure()
            if save_now:
                watchdog.at(f"step {step}, its checkpoint")
                if not all_finite(engine.module, optimizer):  # the last step's update came after its loss
                    reporter.refuse(step, "weights are not finite", saver.last_kept)
                refuse_drift(engine.module, process, done)
                if process.rank == 0:
                    saver.save(state_of(engine.module, optimizer, config, job.shards, done), for_good=for_good)
        agreement.finish()
        watchdog.at(f"the end after step {done}, writing the last checkpoint")
    if damaged := batches.damaged():
        print(f"rank {process.rank} replaced {len(damaged)} damaged samples, named above", file=sys.stderr, flush=True)
    batches.close()
    if sys.stdout.isatty():
        say(process, "")
    seconds = time.monotonic() - started
    if process.rank == 0 and done == job.total_steps:
        finished = {"steps": done, "images_per_s": round(reporter.images_per_s(), 2), "seconds": round(seconds, 1)}
        write_durably(run / "finished.json", (json.dumps(finished) + "\n").encode())
    if leave:
        say(process, f"stopped by {stop.reason or 'another rank'}; the same command goes on")
    say(
        process,
        f"{done - first_step} steps in {seconds:.1f} s, {reporter.images_per_s():,.0f} images/s; {run} is at "
        f"step {done} of {job.total_steps}",
    )
