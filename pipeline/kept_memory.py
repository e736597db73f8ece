"""Memory for decoded pictures: planned and set aside before a training begins, shared by the processes of a machine."""

import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from simclr_dali.pipeline.kept_pictures import KeptPictures, Places, bytes_to_keep
from simclr_dali.pipeline.kept_place import Place
from simclr_dali.pipeline.order import Ids
from simclr_dali.shards.free_memory import free_memory
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.wording import size_text

# Of the memory that is free: what "auto" takes at most, since the rest of the machine has its needs, and what a place
# that was named may take.
SHARE, SHARE_IF_NAMED = 0.5, 0.9

_HOST = torch.device("cpu")
_log = logging.getLogger(__name__)


class Processes(NamedTuple):
    """This process among those that train together, which all do the same here."""

    rank: int
    gather: Callable[[Any], list[Any]]
    """Gives every process an object of each, by rank."""


ALONE = Processes(0, lambda own: [own])


class _Offer(NamedTuple):
    """Memory that the other processes of a machine can open, or why there is none."""

    words: str
    process: int = 0
    descriptor: int = -1
    file: tuple[int, int] = (0, 0)
    """Device and inode, by which it is known again."""


def set_aside(
    shards: ShardSet,
    place: Place,
    device: torch.device,
    *,
    ids: Ids | None = None,
    beside: Callable[[], int] | None = None,
    processes: Processes = ALONE,
) -> tuple[KeptPictures | None, str]:
    """Memory for the decoded pictures of ``ids`` (default: of the set), and a sentence on what was decided.

    place: "gpu", "host", "no", or "auto": the GPU for a process that is alone on its machine, else the host's memory,
    of which a machine holds one copy. What does not fit there is kept in the host's, or not at all. beside: bytes of
    the GPU that the training itself will take; None: unknown, and "auto" takes the host's memory.
    """
    if place == "no":
        return None, "decoded pictures are not kept"
    machines: list[_Machine] = processes.gather(_machine())
    own = machines[processes.rank]
    neighbours = [rank for rank, machine in enumerate(machines) if machine == own]
    kept, words = None, ""
    alone_on_gpu = device.type == "cuda" and len(neighbours) == 1
    if place == "gpu" or (place == "auto" and alone_on_gpu and beside is not None):
        share = SHARE_IF_NAMED if place == "gpu" and beside else SHARE
        kept, words = _on_gpu(shards, ids, device, share, beside() if beside else 0)
    # Who found no room on a GPU shares memory with the others of its machine, which the first of them makes.
    wanting = processes.gather(kept is None)
    offer = None
    if processes.rank == neighbours[0] and any(wanting[rank] for rank in neighbours):
        planners = len({machine for machine in machines if machine.kernel == own.kernel})
        offer = _offer(shards, ids, SHARE_IF_NAMED if place == "host" else SHARE, planners, len(neighbours))
    offers = processes.gather(offer)
    if kept is None:
        kept, of_host = _in_host_memory(shards, ids, offers[neighbours[0]], device)
        words = "; ".join(filter(None, [words, of_host]))
    said = processes.gather(words)  # all have opened it
    if offer and offer.descriptor >= 0:
        os.close(offer.descriptor)
    different = dict.fromkeys(said)
    if len(different) > 1:
        words = "; ".join(f"rank {said.index(sentence)}: {sentence}" for sentence in different)
    return kept, words


class _Machine(NamedTuple):
    """What processes that can open each other's memory have in common."""

    kernel: str
    """The same for all containers of a machine, which share its memory."""
    processes: str
    """The table of processes that a container sees."""


def _machine() -> _Machine:
    kernel, table = os.uname().nodename, str(os.getpid())
    with suppress(OSError):
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        table = str(Path("/proc/self/ns/pid").readlink())
    return _Machine(kernel, table)


def _on_gpu(
    shards: ShardSet, ids: Ids | None, device: torch.device, share: float, beside: int
) -> tuple[KeptPictures | None, str]:
    if device.type != "cuda":
        return None, "there is no GPU to keep decoded pictures"
    size, free = bytes_to_keep(shards, ids, device), max(0, torch.cuda.mem_get_info(device)[0] - beside)
    if size > share * free:
        return None, _too_large(size, "GPU", share, free)
    try:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError:
        return None, f"the GPU has no {size_text(size)} in one piece for decoded pictures"
    kept = KeptPictures(Places(shards, ids, device), memory, np.zeros(len(shards), np.uint8))
    return kept, _kept_words(size, "GPU", free)


def _offer(shards: ShardSet, ids: Ids | None, share: float, planners: int, neighbours: int) -> _Offer:
    """planners: groups of processes that each take a copy of the same memory."""
    size, free = _flags(shards) + bytes_to_keep(shards, ids, _HOST), free_memory() // planners
    if size > share * free:
        return _Offer(_too_large(size, "host", share, free))
    descriptor = -1
    try:
        descriptor = _without_name()
        os.posix_fallocate(descriptor, 0, size)  # taken now, so that whoever plans next sees what is left
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        return _Offer(f"decoded pictures are not kept, since the system gives no memory for them ({error.strerror})")
    copies = f", one copy for {neighbours} processes" if neighbours > 1 else ""
    return _Offer(_kept_words(size, "host", free) + copies, os.getpid(), descriptor, _identity(descriptor))


def _without_name() -> int:
    """A descriptor of memory that is gone with the last process, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("decoded pictures")
    # Some builds of Python lack it; this needs room in /dev/shm.
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        return os.dup(file.fileno())


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _in_host_memory(
    shards: ShardSet, ids: Ids | None, offer: _Offer, device: torch.device
) -> tuple[KeptPictures | None, str]:
    if offer.descriptor < 0:
        return None, offer.words
    try:
        with Path(f"/proc/{offer.process}/fd/{offer.descriptor}").open("r+b", buffering=0) as file:
            if _identity(file.fileno()) != offer.file:
                return None, f"decoded pictures are not kept, since process {offer.process} is another one's here"
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    except OSError as error:
        return None, (
            f"decoded pictures are not kept, since the memory that process {offer.process} set aside cannot be mapped "
            f"({error.strerror})"
        )
    there, pictures = memory[: len(shards)], torch.from_numpy(memory[_flags(shards) :])
    if device.type == "cuda":
        _pin(pictures, device)
    return KeptPictures(Places(shards, ids, _HOST), pictures, there), offer.words


def _flags(shards: ShardSet) -> int:
    """Bytes before the pictures: which of them are there, in whole pages."""
    return -(-len(shards) // mmap.PAGESIZE) * mmap.PAGESIZE


def _pin(pictures: torch.Tensor, device: torch.device) -> None:
    """Fix the memory in its place, so that copies to a GPU need no help of a processor."""
    cuda = torch.cuda.cudart()
    failed = int(cuda.cudaHostRegister(pictures.data_ptr(), pictures.numel(), 0))
    if not failed:
        weakref.finalize(pictures, cuda.cudaHostUnregister, pictures.data_ptr()).atexit = False
        return
    _log.warning("cannot pin the memory of decoded pictures (CUDA error %d); copies to the GPU are slower", failed)
    with suppress(RuntimeError):  # which would else meet the next one who launches a kernel
        torch.zeros(1, device=device)


def _kept_words(size: int, where: str, free: int) -> str:
    return f"decoded pictures are kept in {where} memory: {size_text(size)}, {size / free:.1%} of what is free"


def _too_large(size: int, where: str, share: float, free: int) -> str:
    return (
        f"decoded pictures take {size_text(size)}, more than {share:.0%} of the {size_text(free)} of free {where} "
        "memory, and are not kept there"
    )
