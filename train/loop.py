"""The steps of a run, with what is reported, checked and kept on the way."""

import json
import sys
import time
from typing import Any

import torch

from simclr_dali.model.process import say, show
from simclr_dali.model.schedule import learning_rate
from simclr_dali.shards.durable import write_durably
from simclr_dali.train.job import Job
from simclr_dali.train.knn_monitor import Health
from simclr_dali.train.metrics import Reporter
from simclr_dali.train.micro_batches import Parked
from simclr_dali.train.resume import state_of
from simclr_dali.train.saver import Saver
from simclr_dali.train.step import train_step
from simclr_dali.train.stopping import Agreement, StopRequest, all_finite, refuse_drift
from simclr_dali.train.views import build_views
from simclr_dali.train.watchdog import Watchdog


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
    health = Health(job, watchdog)
    engine.train()
    health.catch_up(engine.module, first_step)
    reporter.paused()
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
            if save_now or health.due(done) or done % simclr.log_every == 0:
                reporter.drain(saver.last_kept, durably=save_now)
                saver.refuse_failure()
            if save_now:
                watchdog.at(f"step {step}, its checkpoint")
                if not all_finite(engine.module, optimizer):  # the last step's update came after its loss
                    reporter.refuse(step, "weights are not finite", saver.last_kept)
                refuse_drift(engine.module, process, done)
                if process.rank == 0:
                    saver.save(state_of(engine.module, optimizer, config, job.shards, done), for_good=for_good)
            if health.due(done) and not leave:  # who has to leave looks when the run goes on
                health.check(engine.module, done)
                reporter.paused()
        agreement.finish()
        watchdog.at(f"the end after step {done}, writing the last checkpoint")
    if damaged := batches.damaged():
        show(f"rank {process.rank} replaced {len(damaged)} damaged samples, named above", file=sys.stderr)
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
