"""The steps of a run, with what is reported, checked and kept on the way."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import simclr_dali
from simclr_dali.model.batchnorm import average_statistics
from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import print_now, print_rank_0
from simclr_dali.model.schedule import learning_rate
from simclr_dali.pipeline.loader import TwoViews
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.launch import alone
from simclr_dali.train.job import Job
from simclr_dali.train.knn_monitor import KnnMonitor
from simclr_dali.train.metrics import Reporter, run_speed
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.resume import computed_by, state_of
from simclr_dali.train.saver import Saver, all_finite, refuse_drift
from simclr_dali.train.step import Loss, train_step
from simclr_dali.train.stopping import StopRequest, StopVote
from simclr_dali.train.watchdog import Watchdog

_SECONDS_OF_A_REPORT = 300.0


def train(
    job: Job,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    batches: TwoViews,
    stop: StopRequest,
    watchdog: Watchdog,
    first_step: int,
    last_step: int,
) -> None:
    """Run steps first_step .. last_step - 1, which ``batches`` begins with, or until someone asks to stop; save."""
    config, order, process, run = job.config, job.order, job.process, job.run
    simclr, steps_per_epoch = config.simclr, order.steps_per_epoch
    warmup_steps = round(simclr.warmup_epochs * steps_per_epoch)
    views = MicroBatches(process.device, config.passes(process.world))
    loss: Loss = NTXent(simclr.temperature)
    reporter = reporter_of(job, loss, first_step, batches)
    vote = StopVote(process)
    knn = KnnMonitor(job, watchdog)
    engine.train()
    knn.run_missed_check(engine.module, first_step)
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
            reporter.add(step, lr, train_step(engine, views, loss, reporter.mark))
            reporter.waited(views.waited())

            done = step + 1
            leave = vote.cast(bool(stop.reason))
            keep_forever = bool(simclr.keep_every_epochs) and done % (simclr.keep_every_epochs * steps_per_epoch) == 0
            save_now = done == last_step or leave or keep_forever or done % simclr.checkpoint_every == 0
            if save_now:
                saver.wait()  # so that nothing is ever reported that is two checkpoints ahead of the disk
            if save_now or knn.due(done) or done % simclr.log_every == 0:
                reporter.drain(saver.last_kept, durably=save_now)
                saver.refuse_failure()
            if simclr.batchnorm_group != "all" and (save_now or knn.due(done)):
                average_statistics(engine.module)  # both read statistics
            if save_now:
                watchdog.at(f"step {step}, its checkpoint")
                begin_checkpoint(job, engine, optimizer, saver, reporter, done, keep_forever)
            if knn.due(done) and not leave:  # after a stop, the check is made when the run goes on
                knn.check(engine.module, done)
                reporter.paused()
        vote.finish()
        watchdog.at(f"the end after step {done}, writing the last checkpoint")
    if damaged := batches.damaged():
        print_now(f"rank {process.rank} replaced {len(damaged)} damaged samples, named above", file=sys.stderr)
    if leave:
        print_rank_0(process, f"stopped by {stop.reason or 'another rank'}; the same command goes on")
    report_end(job, first_step, done, time.monotonic() - started)


def report_end(job: Job, first_step: int, done: int, seconds: float) -> None:
    """Say where the run stands, and write that it is finished where it is; all of it on rank 0."""
    if job.process.rank:
        return
    speed = run_speed(job.run, job.config.train_batch_size, first_step)[1]
    print_now(
        f"{done - first_step} steps in {seconds:.1f} s, {speed:,.0f} images/s; {job.run} is at step {done} of "
        f"{job.total_steps}",
    )
    if done == job.total_steps:
        write_finished(job)
        if job.config.simclr.report:
            write_report(job.run)


def write_report(run: Path) -> None:
    """Write report.html into the run folder by the command for it, whose failure costs the run nothing.

    It computes on the CPU: the GPU's memory is still this run's.
    """
    script = Path(simclr_dali.__file__).parent / "eval" / "report.py"
    try:
        done = subprocess.run(
            [sys.executable, script, run],
            env={**alone(), "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS_OF_A_REPORT,
        )
        said = done.stdout if done.returncode == 0 else f"warning: no report was written: {done.stderr[-300:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"warning: no report was written: {error}"
    print_now(said.strip())


def reporter_of(job: Job, loss: Loss, first_step: int, batches: TwoViews) -> Reporter:
    """What writes the metrics of a run from ``first_step`` on."""
    return Reporter(
        job.run,
        job.process,
        batch=job.config.train_batch_size,
        steps_per_epoch=job.order.steps_per_epoch,
        total_steps=job.total_steps,
        first_step=first_step,
        keep_batch=job.keep_batch,
        derived=getattr(loss, "derived", dict),
        spent=batches.spent,
        listeners=[job.trackers.progress],
    )


def begin_checkpoint(
    job: Job,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    saver: Saver,
    reporter: Reporter,
    done: int,
    keep_forever: bool,
) -> None:
    """Have the state after ``done`` steps written. All ranks call it.

    Raises UserError where weights are not finite, or differ between the ranks.
    """
    if not all_finite(engine.module, optimizer):  # the last step's update came after its loss
        reporter.refuse(done - 1, "weights are not finite", saver.last_kept)
    refuse_drift(engine.module, job.process, done)
    if job.process.rank == 0:
        state = state_of(engine.module, optimizer, job.config, job.split.shards, done)
        state["begun_with"] = job.begun_with
        state["computed_by"] = computed_by(
            job.config, job.process, engine.compiled_by, keeps_decoded=job.kept is not None
        )
        saver.save(state, keep_forever=keep_forever)


def write_finished(job: Job) -> None:
    """``finished.json``: steps of the whole run, and the seconds and images/s of these, over all its starts."""
    seconds, images_per_s = run_speed(job.run, job.config.train_batch_size)
    finished = {"steps": job.total_steps, "images_per_s": round(images_per_s, 2), "seconds": round(seconds, 1)}
    write_durably(job.run / "finished.json", (json.dumps(finished) + "\n").encode())
