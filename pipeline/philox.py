"""Philox4x32-10, a counter-based random generator, vectorised over counters.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The output is a pure function of
key and counter, so what a sample draws needs no stream, no state and no order of asking. NumPy's own Philox takes one
key and counter per object; here one call serves a whole batch, each sample with a counter of its own.
"""

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

# The last word of the counter keeps the uses apart: the same epoch and sample draw other words for another purpose.
SHARD_ORDER, WINDOW_ORDER, VIEW, HELD_OUT, SUBSET, ENGINE = 1, 2, 3, 4, 5, 6


def philox(seed: int, counters: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Random words for ``counters`` (n, 4) under the 64-bit key ``seed``; returns (n, 4) uint32."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    words = np.ascontiguousarray(counters.T, dtype=np.uint64)
    c0, c1, c2, c3 = words
    product0, product1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(_ROUNDS):  # in place, which is a third faster
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product1)
        np.right_shift(product1, _HALF, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(key[0])
        np.bitwise_and(product1, _LOW, out=c1)
        np.right_shift(product0, _HALF, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(key[1])
        np.bitwise_and(product0, _LOW, out=c3)
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _WEYL, strict=True)]
    return words.T.astype(np.uint32)


def permutation(count: int, seed: int, purpose: int, epoch: int, stream: int = 0) -> npt.NDArray[np.int64]:
    """A permutation of 0..count-1, int64, that sorts a random 32-bit word per element.

    Equal words, one pair in 4 billion, keep their order. The element rides in the low half of the sorted keys: they
    are then all different, and sorting plain numbers is several times faster than a stable argsort.
    """
    blocks = -(-count // 4)
    counters = np.zeros((blocks, 4), np.uint32)
    counters[:, 0] = np.arange(blocks)
    counters[:, 1] = stream
    counters[:, 2] = epoch
    counters[:, 3] = purpose
    words = philox(seed, counters).reshape(-1)[:count].astype(np.uint64)
    keys = np.sort(words << _HALF | np.arange(count, dtype=np.uint64))
    return (keys & _LOW).astype(np.int64)


def uniform(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Map words to the middle of their cell in (0, 1), float64."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32
