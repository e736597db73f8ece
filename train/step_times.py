"""Where the time of a step goes: marks between its parts, on the device's own clock where that is a GPU."""

import itertools
import time
from collections import defaultdict

import torch

PARTS = ("input", "forward", "loss", "backward", "update", "other")
"""Of a step: waiting for its views; embedding them (with several micro-batches, without gradient); the loss and its
gradient; backward, with the reduction over processes and, with several micro-batches, the second forward; the update of
the weights; and what lies between steps, as reports and checkpoints."""

Mark = float | torch.cuda.Event


class StepTimes:
    """Seconds by part; no mark waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Mark]] = []

    def mark(self, part: str) -> None:
        """What is computed from here on belongs to ``part``."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def spent(self) -> dict[str, float]:
        """Seconds by part, up to the last mark, since this was last asked; on a GPU it waits for that mark."""
        marks, self._marks = self._marks, self._marks[-1:]
        seconds: defaultdict[str, float] = defaultdict(float)
        if marks and isinstance(marks[-1][1], torch.cuda.Event):
            marks[-1][1].synchronize()
        for (part, begun), (_, ended) in itertools.pairwise(marks):
            seconds[part] += _between(begun, ended)
        return {part: seconds[part] for part in PARTS} if len(marks) > 1 else {}

    def forget(self) -> None:
        """Leave out what lies between the last mark and the next one."""
        self._marks.clear()


def no_mark(_: str) -> None:
    """A mark that nobody reads."""


def _between(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, float) and isinstance(ended, float):
        return ended - begun
    assert isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    return begun.elapsed_time(ended) / 1000
