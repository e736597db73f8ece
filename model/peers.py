"""Notices that another rank of this machine was killed from outside, and says so: its launcher does not."""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from simclr_dali.shards.errors import before_leaving

EXIT_CODE = 1
_PERIOD = 0.4  # seconds; DeepSpeed's launcher ends the other ranks about a second after one is gone
_LEFT = "a rank has left with a word"


class Peers:
    """The processes of the other ranks on this machine, watched by a thread until this one leaves."""

    def __init__(self, rank: int, world: int) -> None:
        """All ranks call it together, once they have joined."""
        everywhere: list[tuple[str, int]] = [("", 0)] * world
        here = socket.gethostname()
        dist.all_gather_object(everywhere, (here, os.getpid()))
        self._pids = {other: pid for other, (host, pid) in enumerate(everywhere) if host == here and other != rank}
        self._rank = rank
        self._store = dist.distributed_c10d._get_default_store()
        self._leaving = threading.Event()
        before_leaving.append(self._say_goodbye)
        if self._pids:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Leave the group with all the others; whose process ends from now on has done its work."""
        self._leaving.set()
        dist.barrier()
        before_leaving.remove(self._say_goodbye)
        dist.destroy_process_group()

    def _say_goodbye(self) -> None:
        self._leaving.set()
        self._store.set(_LEFT, "1")
        time.sleep(2 * _PERIOD)  # rank 0 holds the store: the others must have looked before it ends

    def _watch(self) -> None:
        while not self._leaving.wait(_PERIOD):
            with suppress(RuntimeError):  # the store is gone with rank 0
                if self._store.check([_LEFT]):
                    return
            gone = next((rank for rank, pid in self._pids.items() if not is_alive(pid)), None)
            if gone is not None and not self._leaving.is_set():
                _tell(
                    f"error: rank {gone} (process {self._pids[gone]}) is gone without a word: killed from outside, or "
                    f"crashed. Look for 'Out of memory' in dmesg, and for the memory limit of the job or container; "
                    f"the same command goes on from the last checkpoint"
                )
                os._exit(EXIT_CODE)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in (b"Z", b"X")


def _tell(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
