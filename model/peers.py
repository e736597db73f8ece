"""Notices that another rank of this machine was killed from outside, and says so: its launcher does not."""

import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simclr_dali.shards.errors import groups

EXIT_CODE = 1
_PERIOD = 0.4  # seconds; DeepSpeed's launcher ends the other ranks about a second after one is gone
_LEFT = "a rank has left with a word"
# How gloo and NCCL say that the other end is gone.
_LOST = re.compile(r"connection (closed|reset)|broken pipe|remote process exited|network error", re.IGNORECASE)


class Peers:
    """The processes of the other ranks on this machine, watched by a thread until this one leaves."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        """All ranks call it together, once they have joined. store: the one at which they met."""
        everywhere: list[tuple[str, str, str]] = [("", "", "")] * world
        here, own = _machine(), str(os.getpid())
        dist.all_gather_object(everywhere, (here, own, socket.gethostname()))
        pids = {other: int(pid) for other, (machine, pid, _) in enumerate(everywhere) if machine == here}
        self.hosts = tuple(host for _, _, host in everywhere)
        """Of each rank, the name of its machine."""
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
        if not self.elsewhere or not _LOST.search(str(error)):
            return ""
        hosts = sorted({self.hosts[rank] for rank in self.elsewhere})
        named = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        said = str(error).partition(". ")[0].partition("\n")[0].strip()
        return (
            f"a process on another machine is gone, of {named} ({said}): look there for what was said; the same "
            f"command goes on from the last checkpoint, on fewer machines too"
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
