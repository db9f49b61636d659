"""Sets of equally heavy binary words as uint64 masks (bit i = column i), the raw material of the scheme search.

Everything random draws only on ``random.Random.random()``, whose sequence Python guarantees for a given seed, and all
costs are integers: the same seed gives the same words on any machine.
"""

import itertools
import math
import random
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]
Matrix: TypeAlias = NDArray[np.bool_]

MAX_BRANCHES = 64


def to_matrix(words: Words, branches: int) -> Matrix:
    """Spell masks out as rows of bits.

    Shape: (K,) in, (K, N) out.
    """
    return (words[:, None] >> np.arange(branches, dtype=np.uint64) & np.uint64(1)).astype(bool)


def to_words(matrix: Matrix) -> Words:
    """Pack rows of bits, at most 64 columns, into masks: the inverse of `to_matrix`."""
    weights = np.uint64(1) << np.arange(matrix.shape[1], dtype=np.uint64)
    return np.asarray((matrix * weights).sum(axis=1, dtype=np.uint64))


def min_distance(matrix: Matrix) -> int:
    """Return the smallest Hamming distance between two rows of equal weight; 0 where there are fewer than two rows."""
    if len(matrix) < 2:
        return 0
    bits = matrix.astype(np.float32)  # products of 0 and 1 summed over at most a few thousand columns: exact in float32
    largest_overlap = 0
    for start in range(0, len(bits), 1024):
        overlap = bits[start : start + 1024] @ bits[start:].T  # the earlier rows were compared with these
        np.fill_diagonal(overlap, -1)
        largest_overlap = max(largest_overlap, int(overlap.max()))
    return 2 * (int(matrix[0].sum()) - largest_overlap)


def spread(matrix: Matrix) -> int:
    """Return the largest minus the smallest column sum."""
    sums = matrix.sum(axis=0)
    return int(sums.max() - sums.min())


def below(limit: int, rng: random.Random) -> int:
    """Draw an integer of range(limit)."""
    return int(rng.random() * limit)


def sample(population: int, count: int, rng: random.Random) -> list[int]:
    """Draw `count` distinct integers of range(population), in random order."""
    moved: dict[int, int] = {}
    drawn = []
    for last in range(population - 1, population - 1 - count, -1):
        position = below(last + 1, rng)
        drawn.append(moved.get(position, position))
        moved[position] = moved.get(last, last)
    return drawn


def balanced_words(classes: int, branches: int, active: int, rng: random.Random) -> Words:
    """Draw distinct words of weight `active` whose column sums differ by at most 1.

    Such a set exists whenever C(branches, active) >= classes: as long as column i is used two times more often than
    column j, more words hold i without j than j without i, so one of the former can trade i for j and stay distinct.
    """
    words = _distinct_words(classes, branches, active, rng)
    taken = set(words)
    sums = [sum(word >> column & 1 for word in words) for column in range(branches)]
    while max(sums) - min(sums) > 1:
        high, low = sums.index(max(sums)), sums.index(min(sums))
        trade = 1 << high | 1 << low
        start = below(classes, rng)
        row = next(
            row % classes
            for row in range(start, start + classes)
            if words[row % classes] & trade == 1 << high and words[row % classes] ^ trade not in taken
        )
        taken.remove(words[row])
        words[row] ^= trade
        taken.add(words[row])
        sums[high] -= 1
        sums[low] += 1
    return np.array(words, dtype=np.uint64)


def _distinct_words(classes: int, branches: int, active: int, rng: random.Random) -> list[int]:
    total = math.comb(branches, active)
    if total <= 4 * classes:
        everything = [sum(1 << i for i in chosen) for chosen in itertools.combinations(range(branches), active)]
        return [everything[index] for index in sample(total, classes, rng)]
    words: dict[int, None] = {}  # a dict, for it keeps the order of insertion
    while len(words) < classes:
        words[sum(1 << i for i in sample(branches, active, rng))] = None
    return list(words)
