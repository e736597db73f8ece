"""Which pictures the JPEG engine of a GPU decodes: a choice by picture, never by batch.

An H100 or H200 has engines that decode JPEGs beside its processors. DALI would share a batch out between them and the
rest by its size, so that a picture's pixels, which both round in their own way, would depend on its neighbours. Here a
random number that belongs to the picture decides, and what its header says: engines take baseline JPEGs only.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.philox import ENGINE, philox, uniform
from simclr_dali.shards.jpeg import is_baseline

_UNKNOWN, _TAKES, _REFUSES = 0, 1, 2
_HEADER = 65_536  # bytes in which the frame of most pictures is announced; the engine is not asked for the others


class EngineChoice:
    """For ``share`` of a set's baseline JPEGs, the same ones in every run; safe to use from many threads."""

    def __init__(self, samples: int, share: float) -> None:
        self._share = share
        self._kind = np.zeros(samples, np.uint8)  # of each sample, once it was read

    def of(self, ids: Ids, encoded: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.bool_]:
        """Whether the engine decodes each of these samples, whose bytes are ``encoded``."""
        drawn = drawn_for_engine(ids, self._share)
        for place in np.flatnonzero(drawn & (self._kind[ids] == _UNKNOWN)).tolist():
            header = encoded[place][:_HEADER].tobytes()
            self._kind[ids[place]] = _TAKES if is_baseline(header) else _REFUSES
        found: npt.NDArray[np.bool_] = drawn & (self._kind[ids] == _TAKES)
        return found


def drawn_for_engine(ids: Ids, share: float) -> npt.NDArray[np.bool_]:
    """A number in 0..1 that belongs to each sample is below ``share``: who is in a share is in every larger one."""
    counters = np.zeros((len(ids), 4), np.uint32)
    counters[:, 0] = ids & 0xFFFFFFFF
    counters[:, 1] = ids >> 32
    counters[:, 3] = ENGINE
    drawn: npt.NDArray[np.bool_] = uniform(philox(0, counters)[:, 0]) < share
    return drawn
