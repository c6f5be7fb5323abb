"""Counter-based random numbers: each is computed from its index, without the preceding ones.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd and near 2^64 / golden ratio: multiples of it spread evenly
_MASK = (1 << 64) - 1


def mix(words: Words) -> Words:
    """A hash of each 64-bit word; different words give different hashes."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key(*parts: int) -> Words:
    """Hash a tuple of integers, which may be negative, to one word (1,)."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = mix(word * _STEP + np.array([part & _MASK], np.uint64) + _STEP)
    return word


def hashes(stream: Words, index: NDArray[Any]) -> Words:
    """Hash each integer of `index` (n,) under the key `stream` (1,). Distinct integers give distinct words."""
    return mix(stream + (index.astype(np.uint64) + np.uint64(1)) * _STEP)


def uniforms(stream: Words, index: NDArray[Any], lanes: int) -> NDArray[np.float64]:
    """Uniform numbers (n, lanes) in [0, 1): a function of the key, the integer in `index` and the lane."""
    lane = np.arange(1, lanes + 1, dtype=np.uint64) * _STEP
    words = mix(hashes(stream, index)[:, None] + lane)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
