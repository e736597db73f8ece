"""What ranks find out about each other: machines, cores, and who was killed from outside, which no launcher says."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from simclr_dali.shards.errors import groups
from simclr_dali.shards.interface import own_address

EXIT_CODE = 1
_PERIOD = 0.4  # seconds; DeepSpeed's launcher ends the other ranks about a second after one is gone
_LEFT = "a rank has left with a word"
# How gloo and NCCL say that the other end is gone.
_LOST = re.compile(
    r"connection (closed|reset|refused|timed out)|broken pipe|no route to host|pair closure|remote process exited"
    r"|network error",
    re.IGNORECASE,
)


class _Facts(NamedTuple):
    """What a rank says of itself."""

    machine: str
    pid: int
    host: str
    address: str
    """By which others reach its machine; empty where that is unknown."""
    cores: tuple[int, ...]


class Peers:
    """The processes of the other ranks on this machine, watched by a thread until this one leaves."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        """All ranks call it together, once they have joined. store: the one at which they met."""
        own = _Facts(
            _machine(), os.getpid(), socket.gethostname(), own_address(), tuple(sorted(os.sched_getaffinity(0)))
        )
        everywhere = [own] * world
        dist.all_gather_object(everywhere, own)
        pids = {other: found.pid for other, found in enumerate(everywhere) if found.machine == own.machine}
        self.hosts = tuple(found.host for found in everywhere)
        """Of each rank, the name of its machine."""
        self.machines = tuple(found.machine for found in everywhere)
        """Of each rank, what is its machine's alone; names of machines may be equal."""
        self.same_cores = tuple(other for other in pids if everywhere[other].cores == own.cores)
        """Ranks that may use the same cores as this one, itself among them; a launcher may give each its own."""
        self._addresses = {found.address: found.host for found in everywhere if found.address}
        self.is_first_here = rank == min(pids)
        self.elsewhere = tuple(other for other in range(world) if other not in pids)
        """Ranks on other machines."""
        self._pids = {other: pid for other, pid in pids.items() if other != rank and is_alive(pid)}
        self._store = store
        self._leaving = threading.Event()
        self._told = False
        groups.append(self)
        if self._pids:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Leave the group with all the others; whose process ends from now on has done its work."""
        self._leaving.set()
        dist.barrier()
        groups.remove(self)
        dist.destroy_process_group()

    def say_goodbye(self) -> None:
        self._leaving.set()
        self._store.set(_LEFT, "1")
        time.sleep(2 * _PERIOD)  # rank 0 holds the store: the others must have looked before it ends

    def is_told(self) -> bool:
        """Whether another rank has left with an error that it told."""
        return self._told or self._has_goodbye()

    def _has_goodbye(self) -> bool:
        if self._told or (0 in self._pids and not is_alive(self._pids[0])):
            return self._told  # rank 0 took the store along, and asking a store that is gone prints pages
        with suppress(RuntimeError):
            self._told = self._told or bool(self._store.check([_LEFT]))
        return self._told

    def _watch(self) -> None:
        while not self._leaving.wait(_PERIOD):
            self.look()
            if self._told:
                return

    def look(self) -> None:
        """End this process, saying why, where another one is gone without a word."""
        gone = next((rank for rank, pid in self._pids.items() if not is_alive(pid)), None)
        if not self._has_goodbye() and gone is not None and not self._leaving.is_set():
            _tell(
                f"error: rank {gone} (process {self._pids[gone]}) is gone without a word: killed from outside, or "
                f"crashed. Look for 'Out of memory' in dmesg, and for the memory limit of the job or container; "
                f"the same command goes on from the last checkpoint"
            )
            os._exit(EXIT_CODE)

    def lost_to(self, error: Exception) -> str:
        """What an error of a collective says of a machine that is gone; empty where it says nothing of one."""
        return lost_connection(error, self._addresses) if self.elsewhere else ""


def lost_connection(error: Exception, hosts: Mapping[str, str]) -> str:
    """What an error of gloo or NCCL says of the other end that is gone, in a sentence; empty where it says nothing.

    hosts: names of machines, by their addresses.
    """
    if not _LOST.search(str(error)):
        return ""
    said = str(error).partition(". ")[0].partition("\n")[0].strip()
    named = [host for address, host in hosts.items() if re.search(rf"\b{re.escape(address)}\b", said)]
    return (
        f"a process on {named[0] if named else 'another machine'} is gone ({said}): look there for what was said; the "
        f"same command goes on from the last checkpoint, on fewer machines too"
    )


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in (b"Z", b"X")


def _machine() -> str:
    """Equal where two processes see each other's numbers and reach each other without a network."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "net"))])
    except OSError:
        return f"unknown to others {os.urandom(8).hex()}"


def _tell(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
