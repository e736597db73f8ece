"""Ends a run that no longer moves, and says which rank holds it up."""

import faulthandler
import itertools
import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from simclr_dali.model.process import Process, print_now
from simclr_dali.shards.errors import say_goodbye

EXIT_CODE = 3
SILENCE = 60.0  # seconds
_REPORT_EVERY, _LISTEN_EVERY = 1.0, 3.0  # seconds
_PATIENCE_WITH_STORE = 10.0  # seconds; rank 0, which holds it, may be the one that hangs


class Watchdog:
    """Every rank says where it is; one that stays in a place longer than ``timeout`` seconds ends the run.

    A rank that waits for another stays as long as the one it waits for, so the message lists where all of them are:
    one that reports something else than waiting for the others, or does not report any more, is to blame.

    Machines that are cut off or frozen are noticed sooner, after SILENCE seconds (or half of ``timeout``, where that is
    less): rank 0, which holds the key-value store, listens to the ranks of other machines, and they ask whether it
    answers.
    """

    def __init__(self, process: Process, timeout: float) -> None:
        self._process, self._timeout, self._silence = process, timeout, min(SILENCE, timeout / 2)
        self._since, self._place = time.monotonic(), "the start"
        self._ended = threading.Event()
        # The key-value store through which the ranks found each other.
        self._store = dist.distributed_c10d._get_default_store()
        self._heard_of: dict[int, tuple[bytes, float]] = {}  # by rank: its last report, and when it was new here
        self._answered = time.monotonic()  # when rank 0's store did
        elsewhere = process.peers.elsewhere if process.peers else ()
        self._listens_to = elsewhere if process.rank == 0 else tuple(rank for rank in elsewhere if rank == 0)
        for work in (self._report, self._look, *((self._listen,) if self._listens_to else ())):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()

    def at(self, place: str) -> None:
        """Say where this rank is now, which shows that it moves."""
        self._since, self._place = time.monotonic(), place

    def stop(self) -> None:
        self._ended.set()

    def _report(self) -> None:
        for count in itertools.count():
            seconds = time.monotonic() - self._since
            # The store fails where rank 0, which holds it, has left; there is nobody to report to then.
            with suppress(RuntimeError):
                self._store.set(f"place/{self._process.rank}", f"{count} {seconds:.0f} {self._place}")
            if self._ended.wait(_REPORT_EVERY):
                return

    def _look(self) -> None:
        period = min(1.0, self._timeout / 4)
        while True:
            asked = time.monotonic()
            if self._ended.wait(period):
                return
            now = time.monotonic()
            if now - asked > period + 5:  # this whole process was stopped for a while
                self._since = self._answered = now
                self._heard_of = {rank: (report, now) for rank, (report, _) in self._heard_of.items()}
            self._end_where_silent(now)
            stuck = time.monotonic() - self._since
            if stuck < self._timeout:
                continue
            _tell(f"error: rank {self._process.rank} has not moved for {stuck:.0f} s, it is at {self._place}")
            asking = threading.Thread(target=self._list_others, daemon=True)
            asking.start()
            asking.join(_PATIENCE_WITH_STORE)
            if asking.is_alive():
                _tell("rank 0, which keeps what the ranks report, does not answer")
            faulthandler.dump_traceback(all_threads=True)
            say_goodbye()
            os._exit(EXIT_CODE)

    def _listen(self) -> None:
        """What ranks on other machines report, which shows that they are there; asking hangs where the network does."""
        while not self._ended.wait(_LISTEN_EVERY):
            for rank in self._listens_to:
                key = f"place/{rank}"
                with suppress(RuntimeError):  # rank 0 has left: its silence shows it
                    report = self._store.get(key) if self._store.check([key]) else b""
                    now = time.monotonic()
                    self._answered = now
                    if self._heard_of.get(rank, (None, 0.0))[0] != report:
                        self._heard_of[rank] = (report, now)

    def _end_where_silent(self, now: float) -> None:
        """End this process where a rank on another machine has not been heard of for too long."""
        hosts = self._process.peers.hosts if self._process.peers else ()
        if self._process.rank and self._listens_to and now - self._answered > self._silence:
            self._end(f"rank 0 on {hosts[0]} has not answered for {now - self._answered:.0f} s")
        for rank, (_, since) in list(self._heard_of.items()):
            if now - since > self._silence:
                self._end(f"rank {rank} on {hosts[rank]} has not been heard of for {now - since:.0f} s")

    def _end(self, what: str) -> None:
        _tell(
            f"error: rank {self._process.rank}: {what}: its machine is cut off, frozen, or gone, or its process was "
            f"killed; the same command goes on from the last checkpoint, on fewer machines too"
        )
        say_goodbye()
        os._exit(EXIT_CODE)

    def _list_others(self) -> None:
        try:
            before = self._reports()
            time.sleep(3 * _REPORT_EVERY)
            after = self._reports()
        except RuntimeError:
            _tell("rank 0, which keeps what the ranks report, has left")
            return
        for rank, (first, now) in enumerate(zip(before, after, strict=True)):
            if now is None:
                _tell(f"rank {rank} never reported")
            else:
                _, seconds, place = now.split(" ", 2)
                # Compared by count, not by time: clocks of machines differ and jump.
                silence = " and does not report any more" if now == first else ""
                _tell(f"rank {rank} is at {place}, for {seconds} s{silence}")

    def _reports(self) -> list[str | None]:
        keys = [f"place/{rank}" for rank in range(self._process.world)]
        return [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]


def _tell(text: str) -> None:
    print_now(text, file=sys.stderr)
