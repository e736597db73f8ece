"""Memory for the views on the CPU, used again once nothing refers to it.

A batch of views is tens of megabytes. Fresh memory of that size comes from the system page by page, which took a
tenth of the whole input path's time; used memory costs only the copy.
"""

import ctypes
import math
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

# Parameters of glibc's mallopt (malloc.h) and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_MOST = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc accepts no more


def keep_freed_memory() -> None:
    """Make malloc keep what is freed for the next allocation, where it is glibc's.

    DALI allocates each decoded picture and each step's result on the CPU with malloc. By default those above 128 kB
    come from the system page by page and go back when freed, several megabytes an image. The process keeps its largest
    size instead. One arena, since what one thread frees another allocates.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, _MOST)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_ARENA_MAX, 1)


class Recycled:
    """Hands out uninitialised CPU tensors. What a caller keeps is never handed out again while it is kept."""

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and type, in memory that no living tensor refers to."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._free.pop() if self._free else np.empty(size, np.uint8)
        if len(memory) != size:  # the short last batch of an evaluation
            memory = np.empty(size, np.uint8)
        # The tensor, and every view of it, keeps this array alive; when the last of them goes, its memory is free.
        handed_out = memory.view()
        weakref.finalize(handed_out, self._free.append, memory).atexit = False
        return torch.from_numpy(handed_out).view(dtype).view(shape)
