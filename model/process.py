"""This process among those of a launcher (deepspeed, torchrun), or alone."""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist

from simclr_dali.shards.errors import UserError

T = TypeVar("T")


class LaunchError(UserError):
    """The processes that were started do not fit the machine. The message says why and what to do."""


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    world: int
    """Processes of the run."""
    local_world: int
    """Processes on this machine."""
    device: torch.device
    cores: int
    """This process's share of the machine's."""
    patience: timedelta = timedelta(minutes=30)
    """How long it waits for the others."""


def on_gpu() -> bool:
    """Whether this machine's GPUs are used. ``DS_ACCELERATOR=cpu`` keeps a machine with GPUs on its CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def init_distributed(patience: timedelta) -> Process:
    """Join the process group: NCCL with a GPU per process, else gloo on the CPU.

    Without a launcher this process is the whole group. patience: how long a rank waits for the others.
    Raises LaunchError where a machine has fewer GPUs than processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if on_gpu() and local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"{local_world} processes were started on a machine with {torch.cuda.device_count()} GPUs; start one "
            "per GPU"
        )
    cores = max(1, len(os.sched_getaffinity(0)) // local_world)
    if on_gpu():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(cores)
    backend = "nccl" if on_gpu() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        # A store inside the process needs no port, which another job on the machine might hold.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=patience)
    return Process(dist.get_rank(), dist.get_world_size(), local_world, device, cores, patience)


def on_rank_0(process: Process, action: Callable[[], T]) -> T:
    """The result of ``action`` on rank 0, given to all ranks; a ValueError of it is raised by all of them."""
    found: list[Any] = [None, None]
    if process.rank == 0:
        try:
            found[0] = action()
        except ValueError as error:
            found[1] = error
    dist.broadcast_object_list(found, 0, device=process.device)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result


def print_rank_0(process: Process, text: str) -> None:
    """:func:`print_now` on rank 0, nothing on the others."""
    if process.rank == 0:
        print_now(text)


def print_now(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print at once, to stdout unless ``file`` is another stream.

    What cannot be written must not end a run and is dropped; where nobody reads any more (a closed pipe, a terminal
    that is gone) all that follows is dropped too.
    """
    stream = file or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
