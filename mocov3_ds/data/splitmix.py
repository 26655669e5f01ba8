"""Random numbers by counter: SplitMix64 (Steele, Lea and Flood, 2014).

A random number here is the hash of what it belongs to (seed, epoch, sample, ...), so it depends on
nothing else, neither on the rank nor on how many numbers were drawn before it. No generator of a
library is used, because such streams may change between versions. `views/native/draw.cpp` holds the
same hash in C++; tests compare the two.

Shape suffix: N = numbers of a stream.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def hash_word(word: int) -> int:
    """The first number of a SplitMix64 generator whose state is `word`: a 64-bit hash of it."""
    word = (word + _GOLDEN) & _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def hash_counters(seed: int, *counters: int) -> int:
    """One 64-bit hash of a seed and of counters, whose order matters."""
    word = hash_word(seed)
    for counter in counters:
        word = hash_word(word + counter)
    return word


def hash_words(seed_word: int, counter_N: NDArray[np.integer]) -> NDArray[np.uint64]:
    """`hash_word(seed_word + counter)` of many counters at once (N,), modulo 2^64."""
    word_N = counter_N.astype(np.uint64) + np.uint64(seed_word) + np.uint64(_GOLDEN)
    word_N = (word_N ^ (word_N >> np.uint64(30))) * np.uint64(_FIRST)
    word_N = (word_N ^ (word_N >> np.uint64(27))) * np.uint64(_SECOND)
    return word_N ^ (word_N >> np.uint64(31))


def draw_words(count: int, state: int) -> NDArray[np.uint64]:
    """The first `count` numbers (N,) of a SplitMix64 generator in this state."""
    steps_N = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)  # wraps around at 2^64
    return hash_words(state, steps_N)


def draw_permutation(count: int, state: int) -> NDArray[np.int64]:
    """A random order (N,) of 0 to `count` - 1: the numbers of a generator, sorted."""
    return np.argsort(draw_words(count, state), kind="stable")
