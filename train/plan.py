"""What a run will take and need, found out before it begins: simclr-dali pretrain --plan.

Everything that a run would refuse is refused here; a few steps are timed on the device at hand, with the real input.
Nothing is written.
"""

import math
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from simclr_dali.model import checkpoint
from simclr_dali.model.process import from_all_ranks, on_rank_0, print_rank_0
from simclr_dali.model.simclr import build_model
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.wording import size_text
from simclr_dali.train.announce import announce
from simclr_dali.train.config import Config
from simclr_dali.train.footprint import bytes_of_step
from simclr_dali.train.initial_weights import take_weights
from simclr_dali.train.job import Job, keep_decoded
from simclr_dali.train.knn_monitor import KnnMonitor
from simclr_dali.train.plan_measures import InputRate, Steps, input_rate, time_steps
from simclr_dali.train.progress import WAITING, duration
from simclr_dali.train.resume import refuse_newer_elsewhere, refuse_other_data, refuse_other_settings
from simclr_dali.train.scaling import H200, INTERCONNECTS, step_of, traffic_of
from simclr_dali.train.trackers import chosen
from simclr_dali.train.watchdog import Watchdog

# Inductor's step of a ResNet-50 took 0.68 of the uncompiled one on an H200 (scripts/bench/README.md).
_COMPILED = 0.68
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm that NCCL wants where several processes share a machine


def make_plan(job: Job, watchdog: Watchdog, gpus: int | None = None) -> None:
    """Print what ``job`` will be, take and need; on ``gpus`` GPUs too, as an estimate. All ranks call it.

    Raises UserError for whatever the run would refuse, at its start or later.
    """
    config, process = job.config, job.process
    if gpus:
        refuse_other_count(config, gpus)
    refuse_newer_elsewhere(job.run)
    step = on_rank_0(process, lambda: goes_on_from(job.run, config, job.split.shards))
    on_rank_0(process, lambda: refuse_missing(config, step))
    KnnMonitor(job, watchdog)  # refuses too few images for a check
    left = job.total_steps - step
    if not left:
        print_rank_0(process, f"{job.run} is finished ({step} steps); nothing is left to plan")
        return
    kept, about_kept = keep_decoded(config, job.split.shards, process, left / job.order.steps_per_epoch)
    del kept  # planned, not needed
    announce(job, step, about_kept)
    rate = input_rate(job)
    steps = time_steps(job)
    print_rank_0(process, "")
    for name, text in described(job, left, rate, steps):
        print_rank_0(process, f"{name:12} {text}")
    if gpus:
        print_rank_0(process, f"{f'{gpus} GPUs':12} {estimate_on(job, left, rate, steps, gpus)}")
    found = from_all_ranks(warnings(job, rate, steps))
    for warning in dict.fromkeys(warning for of_rank in found for warning in of_rank):
        print_rank_0(process, f"warning: {warning}")


def refuse_missing(config: Config, step: int) -> None:
    """Raise UserError where trackers are not installed, or the weights that a run begins with cannot be taken."""
    chosen(config.simclr.track)
    if config.simclr.init_from and not step:
        take_weights(build_model(config.architecture(), 0), config.simclr.init_from)


def goes_on_from(run: Path, config: Config, shards: ShardSet) -> int:
    """The step from which a run in ``run`` would go on; 0 where it would begin.

    Raises UserError where it would be refused, or the folder could not be written.
    """
    there = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{there} cannot be written, so there could be no run folder {run}; give another --run")
    found = checkpoint.newest(run)
    if found is None:
        return 0
    refuse_other_data(run, found, shards)
    refuse_other_settings(run, found, config)
    return int(found.state["step"])


def described(job: Job, left: int, rate: InputRate, steps: Steps) -> Iterator[tuple[str, str]]:
    """What there is to know, by name. left: steps that are to come."""
    config, process, shards = job.config, job.process, job.split.shards
    batch = config.train_batch_size
    images_per_s = [batch / seconds for seconds in steps.seconds]
    middle, low, high = statistics.median(images_per_s), min(images_per_s), max(images_per_s)
    alone = rate.images_per_s * process.world
    input_alone = f"; the input alone makes {alone:,.0f} images/s" if math.isfinite(alone) else ""
    speed = f"{middle:,.0f} images/s ({low:,.0f} .. {high:,.0f}), {batch / middle:.2f} s a step"
    yield "speed", f"{speed}: {steps.how}{input_alone}"
    if math.isfinite(steps.first_loss):
        chance = math.log(2 * batch - 1)
        yield "loss", f"{steps.first_loss:.3f} at first, with untrained weights; chance is {chance:.3f}"
    checks = knn_seconds(job, middle)
    times = [left * batch / each + checks for each in (middle, high, low)]
    yield (
        "time",
        (
            f"{left:,} steps: {duration(times[0])} ({duration(times[1])} .. {duration(times[2])})"
            + (f", {duration(checks)} of it for kNN checks" if checks else "")
            + (
                f"; compiled perhaps {duration(_COMPILED * times[0])}, and the first start compiles for about a minute"
                if steps.uncompiled
                else ""
            )
        ),
    )
    needed = middle / max(1, process.world // process.local_world) * encoded_bytes(shards)
    read = f"; read from the disk at {size_text(int(rate.disk))}/s" if rate.disk else ""
    yield "data", f"the steps need {size_text(int(needed))}/s of encoded pictures a machine{read}"
    yield (
        "memory",
        f"{size_text(steps.memory)} a process, of {size_text(rate.room)} that are there ({steps.memory_how})",
    )
    one = checkpoint_bytes(config)
    forever = config.simclr.epochs // config.simclr.keep_every_epochs if config.simclr.keep_every_epochs else 0
    most = (config.simclr.keep_checkpoints + 1 + forever) * one
    free = shutil.disk_usage(existing(job.run)).free
    yield "checkpoints", f"{size_text(one)} each, {size_text(most)} at most; {size_text(free)} are free"


def encoded_bytes(shards: ShardSet) -> float:
    """Of a picture, in the mean."""
    return sum(shard.bytes for shard in shards.shards) / len(shards)


def existing(path: Path) -> Path:
    """The folder that is there, of a path that may not be yet."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def checkpoint_bytes(config: Config) -> int:
    """Of weights, buffers, and what the optimizer keeps of each weight."""
    network = build_model(config.architecture(), 0)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    momenta = 2 if config.optimizer.type == "AdamW" else 1
    return (1 + momenta) * weights + sum(buffer.nbytes for buffer in network.buffers())


def knn_seconds(job: Job, images_per_s: float) -> float:
    """About what the checks of nearest neighbours take of a run: a forward pass of one view of each image, where a step
    has two and goes back through them, which takes twice as long."""
    simclr = job.config.simclr
    if not simclr.knn_every_epochs or not job.split.shards.classes:
        return 0.0
    checks = simclr.epochs // simclr.knn_every_epochs
    return checks * min(simclr.knn_images, len(job.split.shards)) / (6 * images_per_s)


def refuse_other_count(config: Config, gpus: int) -> None:
    """Raise UserError where so many GPUs could not share the run."""
    config.micro_batch(gpus)
    for links in INTERCONNECTS.values():
        config.batchnorm_processes(gpus, min(gpus, links.per_node))


def estimate_on(job: Job, left: int, rate: InputRate, steps: Steps, gpus: int) -> str:
    """The same run on so many GPUs, as an estimate. Raises UserError where they cannot share the batch."""
    config, process = job.config, job.process
    local, micro_batch, passes = config.local_batch(gpus), config.micro_batch(gpus), config.passes(gpus)
    architecture = config.architecture()
    takes = bytes_of_step(architecture, config.simclr.image_size, micro_batch, autocast=config.torch_autocast.enabled)
    shared = f"{local} images each in {passes} x {micro_batch}, about {size_text(takes)} of memory a GPU"
    if process.device.type != "cuda":
        return f"{shared}; how fast they are cannot be told from a CPU (scripts/bench/scaling.py has ResNet-50 on H200)"
    own = config.train_batch_size // process.world
    here = replace(
        H200,
        fixed=0.0,  # in what was measured, an image's share of it
        per_image=statistics.median(steps.seconds)
        * (_COMPILED if steps.uncompiled else 1)
        / (own * (4 / 3 if config.passes(process.world) > 1 else 1)),
        input_rate=rate.images_per_s,
    )
    traffic = replace(
        traffic_of(build_model(architecture, 0), architecture.projector[-1]),
        batchnorm_group=config.simclr.batchnorm_group,
    )
    taken = [
        f"{duration(left * step_of(here, links, traffic, gpus, config.train_batch_size, passes).seconds)} by {name}"
        for name, links in INTERCONNECTS.items()
    ]
    return f"{shared}; on paper {' or '.join(taken)} (train/scaling.py says what it assumes)"


def warnings(job: Job, rate: InputRate, steps: Steps) -> list[str]:
    """Traps that this process sees, as far as the first lines of a run (train.announce) do not name them."""
    config, process = job.config, job.process
    found = []
    step_rate = config.train_batch_size / statistics.median(steps.seconds)
    if rate.images_per_s * process.world < step_rate * (1 - WAITING):
        found.append(
            f"the input makes {rate.images_per_s * process.world:,.0f} images/s and a step takes {step_rate:,.0f}: it "
            "will be waited for, from the second epoch on only where decoded pictures are not kept; give it more "
            "cores, or pack smaller images (--resize 256)"
        )
    encoded = encoded_bytes(job.split.shards)
    machines = max(1, process.world // process.local_world)
    if rate.disk and rate.disk < step_rate / machines * encoded:
        found.append(
            f"the disk gives {size_text(int(rate.disk))}/s, and the steps need "
            f"{size_text(int(step_rate / machines * encoded))}/s; copy the shards to a faster one"
        )
    if steps.memory > 0.9 * rate.room:
        found.append(
            f"memory is short, {size_text(steps.memory)} of {size_text(rate.room)}; lower "
            "train_micro_batch_size_per_gpu"
        )
    free = shutil.disk_usage(existing(job.run)).free
    if (config.simclr.keep_checkpoints + 1) * checkpoint_bytes(config) > free:
        found.append(f"the checkpoints do not fit the {size_text(free)} that are free at {existing(job.run)}")
    if process.device.type == "cpu":
        found.append("there is no GPU, or DS_ACCELERATOR says not to use it: the run computes on the CPU")
    elif process.local_world > 1 and shutil.disk_usage("/dev/shm").free < SHARED_MEMORY:
        found.append("/dev/shm has less than 1 GB free, which NCCL wants; start the container with a larger --shm-size")
    return found
