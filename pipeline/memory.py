"""Memory for the views on the CPU, used again once nothing refers to it.

A batch of views is tens of megabytes. Fresh memory of that size comes from the system page by page, which took a
tenth of the whole input path's time; used memory costs only the copy.
"""

import math
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch


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
