"""Random choices that every worker can compute for itself: numbers of a hash, alike on all machines and in any order.

SplitMix64 (Steele, Lea and Flood 2014) over integers that are digests already, so that folds, samples and splits need no
array over the whole pool.
"""

import numpy as np
from numpy.typing import NDArray

from influencespace.core.arrays import FloatArray, IntArray


def hashed(values: IntArray, seed: int) -> NDArray[np.uint64]:
    """A pseudo-random number of each integer (n,) for a seed: (n,)."""
    start = _mix(np.array([seed % 2**63], np.uint64))
    return _mix(np.asarray(values).astype(np.uint64) ^ start)


def uniform(values: IntArray, seed: int) -> FloatArray:
    """A number in [0, 1) of each integer (n,) for a seed: (n,)."""
    return (hashed(values, seed) >> np.uint64(11)).astype(np.float64) / 2.0**53


def fold_of(image: IntArray, count: int, seed: int) -> IntArray:
    """Fold 0 .. count-1 of pairs by the number of their image (n,): (n,). All pairs of an image share one."""
    return (hashed(image, seed) % np.uint64(count)).astype(np.int64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
