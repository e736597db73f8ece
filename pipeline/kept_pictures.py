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
_PIECE = 1 << 20  # samples


def bytes_to_keep(shards: ShardSet, ids: Ids | None, device: torch.device) -> int:
    """What the pictures of ``ids`` (default: of the set) take; counted piece by piece, for sets that never fit."""
    count = len(shards) if ids is None else len(ids)
    pieces = (slice(at, at + _PIECE) for at in range(0, count, _PIECE))
    return sum(int(_lengths(shards.samples[piece if ids is None else ids[piece]], device).sum()) for piece in pieces)


def _lengths(samples: npt.NDArray[Any], device: torch.device) -> npt.NDArray[np.int64]:
    """Bytes of each picture, with what lies between it and the next one."""
    length = CHANNELS * samples["height"].astype(np.int64) * samples["width"]
    aligned = _ALIGNED if device.type == "cuda" else 1
    return -(-length // aligned) * aligned


class Places:
    """Where each picture of a set is kept."""

    def __init__(self, shards: ShardSet, ids: Ids | None, device: torch.device) -> None:
        """ids: those that are kept at all (default: all of the set)."""
        self.height, self.width = shards.samples["height"], shards.samples["width"]
        every = slice(None) if ids is None else ids
        length = _lengths(shards.samples[every], device)
        ends = np.cumsum(length)
        self.bytes = int(ends[-1])
        self.start = np.full(len(shards), -1, np.int64)  # -1: is not kept
        self.start[every] = ends - length
        one_size = (self.height == self.height[0]).all() and (self.width == self.width[0]).all()
        self.gathered = bool(ids is None and device.type == "cpu" and one_size and length[0] <= _GATHERED)


class KeptPictures:
    """The pictures of a set that were decoded before; safe to use from many threads."""

    def __init__(self, places: Places, memory: torch.Tensor, there: npt.NDArray[np.uint8]) -> None:
        """memory: uint8 [places.bytes]. there: of each sample of the set, 1 once it is kept; may be shared, too."""
        self._places, self._memory, self._there = places, memory, there
        self._bytes = None if memory.is_cuda else memory.numpy()
        self._writing = threading.Lock()
        self._nothing = self._as_dali(torch.zeros(1, 1, CHANNELS, dtype=torch.uint8, device=memory.device))

    @property
    def device(self) -> torch.device:
        """Where the pictures lie."""
        return self._memory.device

    def has(self, ids: Ids) -> Bools:
        """Which of these samples are kept."""
        return self._there[ids].astype(np.bool_)

    def lacks(self, ids: Ids) -> Bools:
        """Which of these samples will be kept once they were decoded."""
        return (self._places.start[ids] >= 0) & (self._there[ids] == 0)

    def batch(self, ids: Ids, is_kept: Bools) -> Any:
        """These samples as DALI takes them, uint8 (height, width, 3) each; anything where ``is_kept`` is false.

        Not copied, but for small pictures of one size.
        """
        if self._places.gathered:
            assert self._bytes is not None
            height, width = int(self._places.height[0]), int(self._places.width[0])
            rows = self._bytes.reshape(-1, CHANNELS * height * width).take(ids, axis=0)
            return tensors.TensorListCPU(rows.reshape(-1, height, width, CHANNELS), _LAYOUT)
        pictures = [self._nothing] * len(ids)
        for row, sample in zip(np.flatnonzero(is_kept).tolist(), ids[is_kept].tolist(), strict=True):
            pictures[row] = self._as_dali(self._picture(sample))
        return pictures if self._bytes is None else tensors.TensorListCPU(pictures, contiguous=False)  # type: ignore[call-overload]

    def write(self, ids: Ids, decoded: Sequence[Any]) -> Ids:
        """Copy decoded pictures, a tensor of DALI for each of ``ids``, to their places; returns those that have one.

        They are not kept before :meth:`mark`, since copies to and from a GPU take their time.
        """
        written = []
        with self._writing:
            for sample, picture in zip(ids.tolist(), decoded, strict=True):
                if self._places.start[sample] < 0:
                    continue
                if tuple(picture.shape()) == (self._places.height[sample], self._places.width[sample], CHANNELS):
                    self._picture(sample).copy_(torch.utils.dlpack.from_dlpack(picture), non_blocking=True)
                    written.append(sample)
                else:  # than the table says, which DALI decoded when the set was packed
                    self._places.start[sample] = -1
        return np.array(written, np.int64)

    def mark(self, ids: Ids) -> None:
        """These samples were written."""
        with self._writing:  # released after the bytes and taken before the flags, it keeps them in that order
            self._there[ids] = 1

    def _as_dali(self, picture: torch.Tensor) -> Any:
        if picture.is_cuda:
            return tensors.TensorGPU(picture, _LAYOUT, picture.device.index)
        return tensors.TensorCPU(picture.numpy(), _LAYOUT)

    def _picture(self, sample: int) -> torch.Tensor:
        height, width = int(self._places.height[sample]), int(self._places.width[sample])
        at = int(self._places.start[sample])
        return self._memory[at : at + CHANNELS * height * width].view(height, width, CHANNELS)
