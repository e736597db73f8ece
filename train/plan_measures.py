"""What a plan measures: a few steps, the input alone, and the disk."""

import math
import os
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import from_all_ranks
from simclr_dali.model.simclr import build_model
from simclr_dali.shards.free_memory import free_memory
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.train.compilation import resolved
from simclr_dali.train.engine import build_engine
from simclr_dali.train.footprint import bytes_of_step
from simclr_dali.train.job import Job, view_dtype
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.step import train_step

_SECONDS_OF_INPUT = 4.0
_SECONDS_OF_STEPS = 12.0
_LONGEST_STEP = 5.0  # seconds; longer ones are estimated from few images
_FEW_IMAGES = 8
_BEFORE = 3  # steps that are not counted: memory is allocated, and batches lie ready
_SECONDS_OF_READING, _READ_AT_A_TIME = 2.0, 8 << 20


@dataclass(frozen=True)
class Steps:
    """A few steps, or what they would take."""

    seconds: list[float]
    """Of each."""
    how: str
    memory: int
    """Bytes of this process, or of its GPU."""
    memory_how: str
    first_loss: float
    """Of untrained weights on the first batch; nan where no whole step was taken."""
    uncompiled: bool
    """Where the run will be compiled."""


@dataclass(frozen=True)
class InputRate:
    """What this process's input makes."""

    images_per_s: float
    """Infinite where that could not be measured."""
    disk: float
    """Bytes/s that the disk gives where nothing is cached; 0 where that was not measured."""
    room: int
    """Bytes of memory that are there for this process, on its GPU where it has one."""


def input_rate(job: Job) -> InputRate:
    """Measure the input on its own, as the run's first epoch has it."""
    process, shards = job.process, job.split.shards
    disk = 0.0 if shards.source else disk_speed(shards)
    batches = job.views()
    try:
        images, started = 0, 0.0
        for number, batch in enumerate(batches):
            if number == 0:  # until it is there everything is built
                started = time.perf_counter()
                continue
            images += len(batch.labels)
            if time.perf_counter() - started > _SECONDS_OF_INPUT:
                break
        taken = time.perf_counter() - started
    finally:
        batches.close()
    if process.device.type == "cuda":
        room = torch.cuda.get_device_properties(process.device).total_memory
    else:
        room = free_memory() // process.local_world
    return InputRate(images / taken if images else math.inf, disk, room)  # one batch tells nothing


def disk_speed(shards: ShardSet) -> float:
    """Bytes/s of reading shards that the page cache is asked to forget before."""
    read, taken = 0, 0.0
    for shard in shards.shards:
        descriptor = os.open(shards.folder / shard.name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while (data := os.read(descriptor, _READ_AT_A_TIME)) and taken < _SECONDS_OF_READING:
                read += len(data)
                now = time.perf_counter()
                taken, started = taken + now - started, now
        finally:
            os.close(descriptor)
        if taken >= _SECONDS_OF_READING:
            break
    return read / taken if taken else 0.0


def time_steps(job: Job) -> Steps:
    """Time a few steps with real input, or, where one takes long, a forward pass of few images. All ranks call it."""
    config, process = job.config, job.process
    will_compile = resolved(config.simclr.compile, process.device) != "no"
    plain = config.model_copy(update={"simclr": config.simclr.model_copy(update={"compile": "no"})})
    if process.device.type == "cuda":  # of what was held until now, such as decoded pictures
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(process.device)
    engine, optimizer = build_engine(build_model(config.architecture(), config.simclr.seed), plain, process)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine.train()
    guess = max(from_all_ranks(_guess(job, engine)))
    if guess > _LONGEST_STEP:
        memory = bytes_of_step(
            config.architecture(),
            config.simclr.image_size,
            config.micro_batch(process.world),
            autocast=config.torch_autocast.on(process.device.type),
        )
        how = f"a rough guess, from a forward pass of {_FEW_IMAGES} images"
        return Steps([guess, guess / 2, guess * 1.3], how, memory, "estimated", math.nan, will_compile)
    count = _BEFORE + max(3, min(40, int(_SECONDS_OF_STEPS / guess)))
    seconds, first_loss = _timed(job, engine, count)
    seconds = seconds[_BEFORE:] or seconds[-1:]  # a run may be shorter
    if process.device.type == "cuda":
        memory = torch.cuda.max_memory_reserved(process.device)
    else:
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    how = f"{len(seconds)} steps{' (not compiled)' if will_compile else ''} with real input"
    return Steps(seconds, how, memory, "measured", first_loss, will_compile)


def _guess(job: Job, engine: Any) -> float:
    """Seconds of a step of this process, from a forward pass of few images: a third of forward and backward."""
    config, process = job.config, job.process
    size, dtype = config.simclr.image_size, view_dtype(config, process.device)
    views = torch.randn(2 * _FEW_IMAGES, size, size, 3, device=process.device, dtype=dtype).permute(0, 3, 1, 2)
    tries = []
    with torch.no_grad():
        for _ in range(4):  # the first one allocates, and others may use the cores for a moment
            started = time.perf_counter()
            engine(views)
            _wait(process.device)
            tries.append(time.perf_counter() - started)
    taken = min(tries)
    passes = config.passes(process.world)
    return config.local_batch(process.world) / _FEW_IMAGES * taken * (4 if passes > 1 else 3)


def _timed(job: Job, engine: Any, count: int) -> tuple[list[float], float]:
    """Seconds of each of so many steps, and the loss of the first, over all ranks."""
    config, process = job.config, job.process
    micro_batches = MicroBatches(process.device, config.passes(process.world))
    loss, seconds, losses = NTXent(config.simclr.temperature), [], []
    batches = job.views()
    try:
        views = (batch.views for batch in batches)
        for _ in range(min(count, len(batches) // config.passes(process.world))):
            started = time.perf_counter()
            micro_batches.begin(views)
            losses.append(train_step(engine, micro_batches, loss).loss)
            _wait(process.device)
            seconds.append(time.perf_counter() - started)
    finally:
        batches.close()
    of_ranks = from_all_ranks(float(losses[0]))
    return seconds, sum(of_ranks) / len(of_ranks)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
