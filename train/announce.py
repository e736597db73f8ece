"""The first lines of a run: what it is, and what to know before it."""

import datetime
import importlib.metadata
import json
import math
import platform
import socket

import simclr_dali
from simclr_dali.model.batchnorm import NOISY_BATCHNORM_IMAGES
from simclr_dali.model.process import Process, print_rank_0
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.wording import counted, of_classes
from simclr_dali.train.compilation import resolved
from simclr_dali.train.config import LR_FORMULAS, Config
from simclr_dali.train.job import Job

# One H200 whose JPEG engine was off decoded a fifth more slowly with 8 cores than with 16.
CORES_OF_A_GPU = 16
_MOST_OF_AN_EPOCH = 0.9


def announce(job: Job, step: int, about_kept: str) -> None:
    """What this run is, in a few lines. about_kept: where decoded pictures are."""
    config, shards, process = job.config, job.split.shards, job.process
    batch, micro_batch, passes = (
        config.train_batch_size,
        config.micro_batch(process.world),
        config.passes(process.world),
    )
    architecture = config.architecture()
    print_rank_0(
        process,
        f"{counted(len(shards), 'image')} {of_classes(len(shards.classes))} in {shards.source or shards.folder}, "
        f"run folder {config.simclr.run}",
    )
    print_rank_0(
        process,
        f"{architecture.encoder.label()}, projector {'-'.join(map(str, architecture.projector))}, "
        f"{config.simclr.image_size} px, {process.world} x {process.device.type}, compiled: "
        f"{resolved(config.simclr.compile, process.device)}{', deterministic' if config.simclr.deterministic else ''}",
    )
    params, rule = config.optimizer.params, config.simclr.lr_rule
    print_rank_0(
        process,
        f"{config.optimizer.type}, peak lr {params.lr:g} ({LR_FORMULAS.get(rule, 'no rule')}), weight decay "
        f"{params.weight_decay:g}, warm-up {config.simclr.warmup_epochs:g} epochs",
    )
    print_rank_0(
        process,
        f"global batch {batch} ({process.world} x {passes} x {micro_batch}), "
        f"{counted(job.order.steps_per_epoch, 'step')} per epoch, {counted(config.simclr.epochs, 'epoch')}; "
        f"each view meets {2 * batch - 2} negatives, a loss of "
        f"ln({2 * batch - 1}) = {math.log(2 * batch - 1):.3f} is chance",
    )
    taken = job.order.steps_per_epoch * batch
    if taken < _MOST_OF_AN_EPOCH * len(shards):
        print_rank_0(
            process,
            f"warning: an epoch takes {taken:,} of {len(shards):,} images, others each time, since only whole batches "
            f"count; a smaller train_batch_size takes more of them",
        )
    if passes > 1:
        print_rank_0(
            process, f"{passes} passes of {micro_batch} images: the loss sees the whole batch, BatchNorm only a pass"
        )
    processes = config.batchnorm_processes(process.world, process.local_world)
    together = micro_batch * processes
    if processes < process.world:
        print_rank_0(process, f"BatchNorm sees the images of {counted(processes, 'process', 'processes')} at a time")
    if together < NOISY_BATCHNORM_IMAGES:
        larger = "train_batch_size" if together == batch else "train_micro_batch_size_per_gpu"
        print_rank_0(
            process,
            f"warning: BatchNorm sees {together} images at a time, whose statistics are noise; set {larger} to "
            f"{NOISY_BATCHNORM_IMAGES} or more where memory and data allow",
        )
    print_rank_0(process, about_kept)
    if process.device.type == "cuda":
        announce_decoding(config, process)
    if step:
        print_rank_0(process, f"going on from step {step}")


def record_start(job: Job, step: int) -> None:
    """Add to starts.jsonl from which step, when, on what and with which versions the run begins or goes on."""
    line = {
        "step": step,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "processes": job.process.world,
        "device": job.process.device_name,
        "host": socket.gethostname(),
        "versions": versions(),
    }
    path = job.run / "starts.jsonl"
    with refusals_named(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def versions() -> dict[str, str]:
    """Of what computes a run, by name."""
    packages = ("torch", "deepspeed", "nvidia-dali-cuda120")
    return {
        "simclr-dali": simclr_dali.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def announce_decoding(config: Config, process: Process) -> None:
    """Who decodes on a machine with GPUs, and whether its cores are enough."""
    share = config.simclr.engine_share
    if share:
        print_rank_0(process, f"{share:.0%} of the baseline JPEGs go to the GPU's JPEG engine, where it has one")
    needed = math.ceil(CORES_OF_A_GPU * (1 - share))
    if process.cores < needed:
        print_rank_0(
            process,
            f"warning: a process has {counted(process.cores, 'core')} for its GPU; JPEGs of ImageNet's size may need "
            f"{needed} beside the engine: where the share waiting for input is high, raise simclr.engine_share or pack "
            "smaller images (--resize 256)",
        )
