"""This process among those that a launcher started (shards.launch), or alone."""

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from simclr_dali.model.meeting import own_part
from simclr_dali.model.peers import Peers
from simclr_dali.shards.cores import usable_cores
from simclr_dali.shards.interface import interface_towards
from simclr_dali.shards.launch import NOBODY_HINT, Launch, LaunchError, check_port, read_launch
from simclr_dali.shards.wording import counted

T = TypeVar("T")
_SECONDS_BEFORE_TELLING = 20.0
_PATIENCE_AT_START = timedelta(minutes=10)  # machines of a cluster do not start together


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
    peers: Peers | None = None
    """Those on this machine, where there are others."""

    @property
    def device_name(self) -> str:
        """Of the GPU, or "CPU"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


def on_gpu() -> bool:
    """Whether this machine's GPUs are used. ``DS_ACCELERATOR=cpu`` keeps a machine with GPUs on its CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def init_distributed(patience: timedelta) -> Process:
    """Join the process group: NCCL with a GPU per process, else gloo on the CPU.

    Without a launcher this process is the whole group. patience: how long a rank waits for the others in it.
    Raises LaunchError where what the launcher says cannot be, a machine has fewer GPUs than processes, or the others do
    not come.
    """
    launch = read_launch()
    local_rank, local_world = launch.local_rank, launch.local_world
    if on_gpu() and local_rank >= (gpus := torch.cuda.device_count()):
        raise LaunchError(
            f"{local_world} processes were started on a machine, and each sees {counted(gpus, 'GPU')}; start one per "
            "GPU, and let each see all of them (with srun: --gpus-per-node, no --gpus-per-task or --gpu-bind)"
        )
    device = torch.device("cuda", local_rank) if on_gpu() else torch.device("cpu")
    if on_gpu():
        torch.cuda.set_device(device)
    # gloo would take the interface to which this machine's own name resolves, which often is its loopback.
    if local_world < launch.world and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not on_gpu():
        _refuse_interfaces_that_lead_nowhere(several_machines=local_world < launch.world)
    if launch.world > 1:
        store = _meet(launch)
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        # A store inside the process needs no port, which another job on the machine might hold.
        store = dist.HashStore()  # type: ignore[attr-defined]
    backend = "nccl" if on_gpu() else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=patience)
    peers = Peers(store, launch.rank, launch.world) if launch.world > 1 else None
    cores = _take_cores(device, local_world, peers.same_cores if peers else (launch.rank,), launch.rank)
    return Process(launch.rank, launch.world, local_world, device, cores, patience, peers)


def _refuse_interfaces_that_lead_nowhere(*, several_machines: bool) -> None:
    """Raise LaunchError where GLOO_SOCKET_IFNAME names an interface that is not there, or leads to no other machine."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, named.split(",")):
        if name not in there or (several_machines and name == "lo"):
            what = "leads to no other machine" if name in there else f"is not there (there are {', '.join(there)})"
            raise LaunchError(
                f"GLOO_SOCKET_IFNAME is {named}, and {name} {what}; name the interface between the machines, or unset "
                "it: it is found without"
            )


def _take_cores(device: torch.device, local_world: int, sharing: tuple[int, ...], rank: int) -> int:
    """Settle on this rank's share of the cores that the ranks ``sharing`` may all use; how many they are."""
    cores = usable_cores(share_quota=local_world, share_affinity=len(sharing))
    if device.type == "cuda":
        # DALI pins its decoders' threads, by default those of every process to the same cores.
        own = sorted(os.sched_getaffinity(0))[sharing.index(rank) * cores :][:cores]
        os.environ.setdefault("DALI_AFFINITY_MASK", ",".join(map(str, own)))
    else:
        torch.set_num_threads(cores)
    return cores


def _meet(launch: Launch) -> Any:
    """The key-value store at which all processes have arrived."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if launch.rank == 0:
        check_port()
    who = f"rank {launch.rank} of {launch.world}"
    text = f"{who} waits for the others at {address}; {NOBODY_HINT}"
    waiting = threading.Timer(_SECONDS_BEFORE_TELLING, print_now, [text], {"file": sys.stderr})
    waiting.daemon = True
    waiting.start()
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world, timeout=_PATIENCE_AT_START))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = own_part(store, launch.rank, launch.world, _PATIENCE_AT_START)
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise LaunchError(
            f"{who} did not meet the others at {address} ({first}); "
            f"start all {launch.world}, with an address and port that all can reach; {NOBODY_HINT}"
        ) from error
    finally:
        waiting.cancel()
    return store


def leave(process: Process) -> None:
    """Leave the process group; all ranks call it together, when their work is done."""
    if process.peers is not None:
        process.peers.leave()
    else:
        dist.destroy_process_group()


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


def from_all_ranks(own: T) -> list[T]:
    """The object of each rank, by rank; all call it together."""
    found: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found *= dist.get_world_size()
        dist.all_gather_object(found, own)
    return found


def print_rank_0(process: Process, text: str) -> None:
    """:func:`print_now` on rank 0, nothing on the others."""
    if process.rank == 0:
        print_now(text)


_line_is_open = False  # whether what was printed last is to be written over


def print_now(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print at once, to stdout unless ``file`` is another stream.

    What cannot be written must not end a run and is dropped; where nobody reads any more (a closed pipe, a terminal
    that is gone) all that follows is dropped too.
    """
    stream = file or sys.stdout
    global _line_is_open
    if _line_is_open and not text.startswith("\r"):
        text = f"\n{text}"  # below the progress on a terminal, not behind it
    _line_is_open = end == ""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
