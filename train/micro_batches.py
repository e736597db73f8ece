"""The micro-batches of a step, which gradient caching goes through twice."""

import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class MicroBatches:
    """The views of one step's micro-batches, to be gone through any number of times.

    The first time they come from the loader, one by one, so that it works on the next while the caller works on one.
    On a GPU they are copied to pinned host memory meanwhile and come back in turn the second time, so that the device
    holds a few of them however many there are; on the CPU, and where a step has one only, they stay as they are.
    A tensor that iterating gives may be overwritten after the next one is asked for.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._count = count
        self._source: Iterator[Tensor] | None = None
        self._waited = 0.0
        self._here: list[Tensor] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" and count > 1 else None
        self._host: list[Tensor] = []
        self._leaving: deque[torch.cuda.Event] = deque()
        self._slots: list[Tensor] = []
        self._free: list[torch.cuda.Event | None] = [None, None]

    def __len__(self) -> int:
        return self._count

    def begin(self, source: Iterator[Tensor]) -> None:
        """A step begins: its ``len(self)`` micro-batches, of equal shape, are the next of ``source``."""
        self._source = source
        self._here.clear()

    def waited(self) -> float:
        """Seconds that the caller has waited for ``source`` since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def __iter__(self) -> Iterator[Tensor]:
        source, self._source = self._source, None
        if source is not None:
            return self._from_source(source)
        return iter(self._here) if self._copies is None else self._from_host()

    def _from_source(self, source: Iterator[Tensor]) -> Iterator[Tensor]:
        for number in range(self._count):
            asked = time.perf_counter()
            views = next(source)
            self._waited += time.perf_counter() - asked
            if self._copies is None:
                self._here.append(views)
            else:
                self._send(number, views)
            yield views

    def _send(self, number: int, views: Tensor) -> None:
        """Start the copy of a micro-batch to the host; at most two are on their way, and keep their views."""
        assert self._copies is not None
        if number == len(self._host):  # in the first step
            self._host.append(torch.empty_like(views, device="cpu", pin_memory=True))
        if not self._slots:
            self._slots = [torch.empty_like(views), torch.empty_like(views)]
        if len(self._leaving) == 2:
            self._leaving.popleft().synchronize()
        # Copies out of this memory in the step before are on the same stream, so they are done first.
        self._copies.wait_stream(torch.cuda.current_stream(views.device))
        with torch.cuda.stream(self._copies):
            self._host[number].copy_(views, non_blocking=True)
        views.record_stream(self._copies)
        self._leaving.append(self._copies.record_event())

    def _from_host(self) -> Iterator[Tensor]:
        current = torch.cuda.current_stream(self._slots[0].device)
        arrived = self._fetch(0)
        for number in range(self._count):
            ready = arrived
            if number + 1 < self._count:
                arrived = self._fetch(number + 1)
            current.wait_event(ready)
            yield self._slots[number % 2]
            self._free[number % 2] = current.record_event()

    def _fetch(self, number: int) -> torch.cuda.Event:
        """Start the copy of a micro-batch to the device; the event says when it is there."""
        assert self._copies is not None
        free = self._free[number % 2]
        if free is not None:
            self._copies.wait_event(free)
        with torch.cuda.stream(self._copies):
            self._slots[number % 2].copy_(self._host[number], non_blocking=True)
        return self._copies.record_event()
