"""Where the views of a step's micro-batches wait for their two passes."""

from collections.abc import Iterator

import torch
from torch import Tensor


class Parked:
    """The views of one step's micro-batches, to be gone through any number of times.

    On a GPU they wait in pinned host memory and come back in turn, the next while the caller works on one, so that the
    device holds two of them however many there are. On the CPU, and where a step has one only, they stay as they are.
    A tensor that iterating gives is overwritten after the next one is asked for.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._here: list[Tensor] = []
        self._host: list[Tensor] = []
        self._count = count
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" and count > 1 else None
        self._slots: list[Tensor] = []
        self._free: list[torch.cuda.Event | None] = [None, None]

    def __len__(self) -> int:
        return self._count

    def fill(self, micro_batches: Iterator[Tensor]) -> None:
        """Take the next ``len(self)`` micro-batches of equal shape in place of those before."""
        self._here.clear()
        for number in range(self._count):
            views = next(micro_batches)
            if self._copies is None:
                self._here.append(views)
                continue
            if number == len(self._host):  # in the first step
                self._host.append(torch.empty_like(views, device="cpu", pin_memory=True))
            if not self._slots:
                self._slots = [torch.empty_like(views), torch.empty_like(views)]
            # Ordered after the copies out of this memory in the step before, which are on the same stream.
            self._copies.wait_stream(torch.cuda.current_stream(views.device))
            with torch.cuda.stream(self._copies):
                self._host[number].copy_(views, non_blocking=True)
            views.record_stream(self._copies)

    def __iter__(self) -> Iterator[Tensor]:
        if self._copies is None:
            yield from self._here
            return
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
