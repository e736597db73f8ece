"""Who asks a run to stop, and how all ranks stop at the same step."""

import math
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_dali.model.process import Process
from simclr_dali.shards.launch import read_launch

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, SIGINT or SIGUSR1, or because its launcher is gone.

    DeepSpeed's launcher is two processes, the command itself and one that starts the ranks; torchrun is one. Neither a
    SIGTERM to the first of DeepSpeed's nor the death of any reaches the ranks, so all are watched. A second SIGINT ends
    the process at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._interrupted = -math.inf
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        launchers = _launchers()
        if not launchers and read_launch().launcher == "deepspeed":
            self.reason = "the end of its launcher"
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), name="launcher watch", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A terminal and a launcher may both send what was one Ctrl-C.
        if number == signal.SIGINT and time.monotonic() - self._interrupted > 1:
            if self._interrupted > -math.inf:
                os._exit(128 + number)
            self._interrupted = time.monotonic()
        self.reason = self.reason or signal.Signals(number).name

    def _watch(self, launchers: list[tuple[int, int]]) -> None:
        while not self.reason:
            time.sleep(0.5)
            with suppress(OSError):  # no descriptor free, for one: asked again
                if any(_parent(child) != parent for child, parent in launchers):
                    self.reason = "the end of its launcher"


def _launchers() -> list[tuple[int, int]]:
    """(child, parent) for each process of the launcher above this one."""
    own = os.getpid()
    starter = os.getppid()
    if read_launch().launcher == "torchrun":
        return [(own, starter)]
    if "deepspeed.launcher.launch" not in _command(starter):
        return []
    found = [(own, starter)]
    command = _parent(starter)
    if command is not None and "deepspeed" in _command(command):
        found.append((starter, command))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int | None:
    """The parent of a process, or None where it is gone. Raises OSError where that cannot be told."""
    try:
        # "pid (name) state parent ...", and the name may hold spaces and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


class StopVote:
    """At every step, whether any rank wants to stop, the same answer on all ranks.

    An answer is one step old: the message travels while the step is computed, and no step waits for it.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._flag: Tensor | None = None
        self._arrived: Any = None

    def cast(self, wanted: bool) -> bool:
        """Say what this rank wants now, and hear whether any wanted to stop at the call before. All ranks call it."""
        if self._process.world == 1:
            return wanted
        answer = self._answer()
        self._ask(wanted)
        return answer

    def finish(self) -> None:
        """Take the last message off the line."""
        self._answer()
        self._flag = None

    def _ask(self, wanted: bool) -> None:
        if self._process.device.type == "cuda":
            on_device = torch.full((1,), int(wanted), device=self._process.device, dtype=torch.int32)
            dist.all_reduce(on_device, dist.ReduceOp.MAX)
            self._flag = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self._flag.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.current_stream(self._process.device).record_event()
        else:
            self._flag = torch.full((1,), int(wanted), dtype=torch.int32)
            self._arrived = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)

    def _answer(self) -> bool:
        if self._flag is None:
            return False
        self._arrived.synchronize() if self._process.device.type == "cuda" else self._arrived.wait()
        return bool(self._flag)
