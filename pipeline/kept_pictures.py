"""Decoded pictures that are kept, so that a set which fits into memory is read and decoded once.

What is kept are a picture's bytes as the decoder gave them, so views of it are the same to the bit. Pictures are kept
as they are met; where the memory is shared, every process of a machine finds what another one has decoded.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import tensors

from simclr_dali.pipeline.order import Ids
from simclr_dali.shards.manifest import ShardSet

Bools = npt.NDArray[np.bool_]
CHANNELS = 3
_LAYOUT = "HWC"
# Bytes of a picture up to which a batch is gathered in one call; above, copying costs more than an object for each.
_GATHERED = 16_384
_ALIGNED = 64  # bytes; where a picture begins, on a GPU


class Places:
    """Where each picture of a set is kept, and how much memory that takes."""

    def __init__(self, shards: ShardSet, ids: Ids | None, device: torch.device) -> None:
        """ids: those that are kept at all (default: all of the set)."""
        samples = shards.samples if ids is None else shards.samples[ids]
        self.height = shards.samples["height"].astype(np.int64)
        self.width = shards.samples["width"].astype(np.int64)
        length = CHANNELS * samples["height"].astype(np.int64) * samples["width"].astype(np.int64)
        aligned = _ALIGNED if device.type == "cuda" else 1
        ends = np.cumsum(-(-length // aligned) * aligned)
        self.start = np.full(len(shards), -1, np.int64)  # -1: is not kept
        self.start[slice(None) if ids is None else ids] = np.concatenate([[0], ends[:-1]])
        self.bytes = int(ends[-1]) if len(ends) else 0
        sizes = np.unique(np.stack([samples["height"], samples["width"]]), axis=1).shape[1]
        self.gathered = sizes == 1 and ids is None and aligned == 1 and length[0] <= _GATHERED


class KeptPictures:
    """The pictures of a set that were decoded before; safe to use from many threads."""

    def __init__(self, places: Places, memory: torch.Tensor, there: npt.NDArray[np.uint8]) -> None:
        """memory: uint8 [places.bytes]. there: of each sample of the set, 1 once it is kept; may be shared, too."""
        self._places, self._memory, self._there = places, memory, there
        self._bytes = None if memory.is_cuda else memory.numpy()
        self._lock = threading.Lock()
        self._nothing = self._as_dali(torch.zeros(1, 1, CHANNELS, dtype=torch.uint8, device=memory.device))

    @property
    def device(self) -> torch.device:
        """Where the pictures lie."""
        return self._memory.device

    def has(self, ids: Ids) -> Bools:
        """Which of these samples are kept."""
        return self._there[ids].astype(np.bool_)

    def batch(self, ids: Ids, kept: Bools) -> Any:
        """These samples as DALI takes them, uint8 (height, width, 3) each; anything where ``kept`` is false."""
        if self._places.gathered:
            assert self._bytes is not None
            height, width = int(self._places.height[0]), int(self._places.width[0])
            rows = self._bytes.reshape(-1, CHANNELS * height * width).take(ids, axis=0)
            return tensors.TensorListCPU(rows.reshape(-1, height, width, CHANNELS), _LAYOUT)
        pictures = [self._nothing] * len(ids)
        for place, sample in zip(np.flatnonzero(kept).tolist(), ids[kept].tolist(), strict=True):
            pictures[place] = self._as_dali(self._picture(sample))
        return pictures if self._bytes is None else tensors.TensorListCPU(pictures)

    def write(self, ids: Ids, decoded: Sequence[Any]) -> Ids:
        """Copy decoded pictures, a tensor of DALI for each of ``ids``, to their places; returns those that have one.

        They are not kept before :meth:`mark`, since copies to and from a GPU take their time.
        """
        written = []
        for sample, picture in zip(ids.tolist(), decoded, strict=True):
            shape = (self._places.height[sample], self._places.width[sample], CHANNELS)
            # The size in the table is what the picture was packed with; what decodes otherwise is not kept.
            if self._places.start[sample] >= 0 and tuple(picture.shape()) == shape:
                self._picture(sample).copy_(torch.utils.dlpack.from_dlpack(picture), non_blocking=True)
                written.append(sample)
        return np.array(written, np.int64)

    def mark(self, ids: Ids) -> None:
        """These samples were written."""
        with self._lock:  # a lock also orders the writes before it, for processors that would not
            self._there[ids] = 1

    def _as_dali(self, picture: torch.Tensor) -> Any:
        if picture.is_cuda:
            return tensors.TensorGPU(picture, _LAYOUT)
        return tensors.TensorCPU(picture.numpy(), _LAYOUT)

    def _picture(self, sample: int) -> torch.Tensor:
        height, width = int(self._places.height[sample]), int(self._places.width[sample])
        at = int(self._places.start[sample])
        return self._memory[at : at + CHANNELS * height * width].view(height, width, CHANNELS)
