"""Memory for decoded pictures: planned and set aside before a training begins, shared by the processes of a machine."""

import logging
import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from simclr_dali.pipeline.kept_pictures import KeptPictures, Places
from simclr_dali.pipeline.order import Ids
from simclr_dali.shards.free_memory import free_memory
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.wording import size_text

Place = Literal["auto", "no", "gpu", "host"]
# Of the memory that is free: what "auto" takes at most, since the rest of the machine has its needs, and what a place
# that was named may take.
SHARE, SHARE_IF_NAMED = 0.5, 0.9

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


def set_aside(
    shards: ShardSet,
    place: Place,
    device: torch.device,
    *,
    ids: Ids | None = None,
    beside: int | None = None,
    processes: Processes = ALONE,
) -> tuple[KeptPictures | None, str]:
    """Memory for the decoded pictures of ``ids`` (default: of the set), and a sentence on what was decided.

    place: "gpu", "host", "no", or "auto": the GPU for a process that is alone on its machine, else the host's memory,
    of which a machine holds one copy. What does not fit there is kept in the host's, or not at all. beside: bytes of
    the GPU that the training itself will take; None: unknown, and "auto" takes the host's memory.
    """
    if place == "no":
        return None, "decoded pictures are not kept"
    machines = processes.gather(_machine())
    neighbours = [rank for rank, machine in enumerate(machines) if machine == machines[processes.rank]]
    share = SHARE if place == "auto" else SHARE_IF_NAMED
    kept, words = None, ""
    alone_on_gpu = device.type == "cuda" and len(neighbours) == 1
    if place == "gpu" or (place == "auto" and alone_on_gpu and beside is not None):
        kept, words = _on_gpu(shards, ids, device, share, beside or 0)
    # Who found no room on a GPU shares memory with the others of its machine, which the first of them makes.
    wanting = processes.gather(kept is None)
    places = Places(shards, ids, torch.device("cpu"))
    offer = None
    if processes.rank == neighbours[0] and any(wanting[rank] for rank in neighbours):
        offer = _offer(places, share, len(neighbours))
    offers = processes.gather(offer)
    if kept is None:
        kept, of_host = _in_host_memory(places, offers[neighbours[0]], device)
        words = "; ".join(filter(None, [words, of_host]))
    processes.gather(None)  # all have opened it
    if offer and offer.descriptor >= 0:
        os.close(offer.descriptor)
    return kept, words


def _machine() -> tuple[str, ...]:
    """The same for processes that can open each other's memory: one kernel and one table of processes."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, str(Path("/proc/self/ns/pid").readlink())
    return os.uname().nodename, str(os.getpid())


def _on_gpu(
    shards: ShardSet, ids: Ids | None, device: torch.device, share: float, beside: int
) -> tuple[KeptPictures | None, str]:
    if device.type != "cuda":
        return None, "there is no GPU to keep decoded pictures"
    places = Places(shards, ids, device)
    free = max(0, torch.cuda.mem_get_info(device)[0] - beside)
    if places.bytes <= share * free:
        with suppress(torch.cuda.OutOfMemoryError):
            memory = torch.empty(places.bytes, dtype=torch.uint8, device=device)
            there = np.zeros(len(shards), np.uint8)
            return KeptPictures(places, memory, there), _kept_words(places, "GPU", free)
    return None, _too_large(places, "GPU", share, free)


def _offer(places: Places, share: float, neighbours: int) -> _Offer:
    free = free_memory()
    size = _size(places)
    if size > share * free:
        return _Offer(_too_large(places, "host", share, free))
    # Memory without a name: it needs no room in /dev/shm, and is gone with the last process, however that ends.
    descriptor = os.memfd_create("decoded pictures")
    os.ftruncate(descriptor, size)
    copies = f", one copy for {neighbours} processes" if neighbours > 1 else ""
    return _Offer(_kept_words(places, "host", free) + copies, os.getpid(), descriptor)


def _in_host_memory(places: Places, offer: _Offer, device: torch.device) -> tuple[KeptPictures | None, str]:
    if offer.descriptor < 0:
        return None, offer.words
    try:
        with Path(f"/proc/{offer.process}/fd/{offer.descriptor}").open("r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), _size(places)), np.uint8)
    except OSError as error:
        words = f"a process cannot open the decoded pictures of process {offer.process} ({error.strerror})"
        _log.warning("%s; it decodes each picture in every epoch", words)
        return None, words
    there, pictures = memory[: len(places.start)], torch.from_numpy(memory[_begin(places) :])
    if device.type == "cuda":
        _pin(pictures)
    return KeptPictures(places, pictures, there), offer.words


def _begin(places: Places) -> int:
    """Where the pictures begin, a page after the flags."""
    return -(-len(places.start) // mmap.PAGESIZE) * mmap.PAGESIZE


def _size(places: Places) -> int:
    return _begin(places) + places.bytes


def _pin(pictures: torch.Tensor) -> None:
    """Fix the memory in its place, so that copies to a GPU need no help of a processor."""
    cuda = torch.cuda.cudart()
    failed = int(cuda.cudaHostRegister(pictures.data_ptr(), pictures.numel(), 0))
    if failed:
        _log.warning("cannot pin the memory of decoded pictures (CUDA error %d); copies to the GPU are slower", failed)
    else:
        weakref.finalize(pictures, cuda.cudaHostUnregister, pictures.data_ptr()).atexit = False


def _kept_words(places: Places, where: str, free: int) -> str:
    return (
        f"decoded pictures are kept in {where} memory: {size_text(places.bytes)}, {places.bytes / free:.0%} of what is "
        "free"
    )


def _too_large(places: Places, where: str, share: float, free: int) -> str:
    return (
        f"decoded pictures take {size_text(places.bytes)}, more than {share:.0%} of the {size_text(free)} of free "
        f"{where} memory, and are not kept there"
    )
