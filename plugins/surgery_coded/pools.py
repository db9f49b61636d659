"""Pools of words at a large pairwise distance out of linear codes, and balanced schemes chosen from a pool.

Every product of irreducible factors of x^n - 1 over GF(2) is the check polynomial of a cyclic code. Spanned, extended
by a parity bit, and cut to the wanted length, its words of the wanted weight form a pool. BCH, Reed-Muller, quadratic
residue and Golay codes all turn up without being named.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery_coded.words import MAX_BRANCHES, Matrix, Words, below, sample, to_matrix

_LONGEST_CUT = 6
_LARGEST_DIMENSION = 17


@dataclass(frozen=True)
class Pool:
    """Words of one length and weight whose pairwise distance is at least `distance`."""

    words: Words
    distance: int
    name: str


def cyclic_pools(classes: int, branches: int, active: int, limit: int) -> list[Pool]:
    """Collect the pools of at least `classes` words, the largest distance first, and of equal distance the largest.

    Args:
        classes: Words needed.
        branches: Length N of the words.
        active: Weight of the words.
        limit: Pools of a distance above this, or of distance 2, which needs no code, are left out.
    """
    found: dict[tuple[int, int], Pool] = {}
    smallest_dimension = max(1, (classes - 1).bit_length())
    for length in range(max(3, branches - 1) | 1, min(branches + _LONGEST_CUT, MAX_BRANCHES), 2):
        for check, words in _cyclic_codes(length, smallest_dimension):
            for extended in (False, True):
                longer = words | (np.bitwise_count(words).astype(np.uint64) & np.uint64(1)) << np.uint64(length)
                total = length + extended
                if total < branches:
                    continue
                name = f"{'extended ' if extended else ''}cyclic code of length {length}, check polynomial {check:#x}"
                pool = _cut(longer if extended else words, branches, active, name)
                if len(pool.words) >= classes and 2 < pool.distance <= limit:
                    found.setdefault((pool.distance, len(pool.words)), pool)
    return [found[key] for key in sorted(found, reverse=True)]


def _cut(words: Words, branches: int, active: int, name: str) -> Pool:
    """Keep the words of the wanted weight that agree, in the most frequent way, on the columns beyond `branches`."""
    kept = words & np.uint64((1 << branches) - 1)
    tail = np.zeros(len(words), dtype=np.int64)
    if branches < MAX_BRANCHES:  # numpy does not define a shift by the whole width
        tail = (words >> np.uint64(branches)).astype(np.int64)
    weight = np.bitwise_count(kept)
    pattern = int(np.bincount(tail[weight == active], minlength=1).argmax())
    # Two words with the same tail differ by a word with an empty tail; equal weights make the distance even.
    smallest = weight[(tail == 0) & (kept != 0)]
    distance = int(smallest.min()) if len(smallest) else 0
    return Pool(kept[(weight == active) & (tail == pattern)], distance + distance % 2, name)


def _cyclic_codes(length: int, smallest_dimension: int) -> Iterator[tuple[int, Words]]:
    factors = factor_cyclic(length)
    for count in range(1, len(factors) + 1):
        for chosen in itertools.combinations(factors, count):
            dimension = sum(factor.bit_length() - 1 for factor in chosen)
            if smallest_dimension <= dimension <= _LARGEST_DIMENSION:
                check = 1
                for factor in chosen:
                    check = _multiply(check, factor)
                generator = _divide(1 << length | 1, check)[0]
                words = np.zeros(1, dtype=np.uint64)
                for shift in range(dimension):
                    words = np.concatenate([words, words ^ np.uint64(generator << shift)])
                yield check, words


def factor_cyclic(length: int) -> list[int]:
    """Factor x^length - 1, `length` odd, over GF(2); bit i of a factor is the coefficient of x^i.

    The sum e of x^i over a cyclotomic coset is its own square modulo x^length - 1, hence 0 or 1 modulo each
    irreducible factor, and the cosets together tell any two of the factors apart.
    """
    factors = [1 << length | 1]
    for start in range(1, length):
        idempotent, power = 0, start
        while not idempotent >> power & 1:
            idempotent |= 1 << power
            power = 2 * power % length
        parts = [(_gcd(factor, idempotent), _gcd(factor, idempotent ^ 1)) for factor in factors]
        factors = [part for pair in parts for part in pair if part != 1]
    return sorted(factors)


def _multiply(left: int, right: int) -> int:
    product = 0
    for shift in range(right.bit_length()):
        if right >> shift & 1:
            product ^= left << shift
    return product


def _divide(dividend: int, divisor: int) -> tuple[int, int]:
    quotient = 0
    while dividend.bit_length() >= divisor.bit_length():
        shift = dividend.bit_length() - divisor.bit_length()
        quotient |= 1 << shift
        dividend ^= divisor << shift
    return quotient, dividend


def _gcd(left: int, right: int) -> int:
    while right:
        left, right = right, _divide(left, right)[1]
    return left


def choose_balanced(pool: Words, classes: int, branches: int, steps: int, rng: random.Random) -> Matrix | None:
    """Choose `classes` words of a pool whose column sums differ by at most 1; None where `steps` did not suffice."""
    paired = _complement_pairs(pool, classes, branches, rng)
    if paired is not None:
        return paired
    bits = to_matrix(pool, branches)
    total = bits.sum(axis=0)
    ideal = classes * int(np.bitwise_count(pool[:1])[0]) // branches
    if total.min() < ideal or (len(pool) - total).min() < classes - ideal - 1:
        return None
    chosen = swap_walk(bits.astype(np.int32), classes, steps, rng)
    return None if chosen is None else bits[chosen]


def _complement_pairs(pool: Words, classes: int, branches: int, rng: random.Random) -> Matrix | None:
    """Choose words together with their complements: each pair adds 1 to every column."""
    complement = pool ^ np.uint64((1 << branches) - 1)
    first = np.sort(pool[pool < complement])
    if 2 * len(first) != len(pool) or not np.isin(complement, pool).all() or classes > len(pool):
        return None
    order = sample(len(first), (classes + 1) // 2, rng)
    chosen = first[np.array(order)]
    both = np.stack([chosen, chosen ^ np.uint64((1 << branches) - 1)], axis=1).reshape(-1)
    return to_matrix(both[:classes], branches)


def swap_walk(usage: NDArray[np.int32], count: int, steps: int, rng: random.Random) -> NDArray[np.int64] | None:
    """Choose `count` rows whose column sums differ by at most 1, by trades that even them out.

    A random chosen row leaves and the row that brings the sums closest to each other enters, unless that is worse.

    Returns:
        The numbers of the rows, or None where `steps` trades did not suffice.
    """
    order = np.array(sample(len(usage), len(usage), rng))
    inside, outside = order[:count].copy(), order[count:].copy()
    squares = (usage * usage).sum(axis=1)
    sums = usage[inside].sum(axis=0)
    for _ in range(steps if len(outside) else 0):
        if sums.max() - sums.min() <= 1:
            break
        leaving = below(count, rng)
        without = sums - usage[inside[leaving]]
        score = 2 * (usage[outside] @ without) + squares[outside]
        ties = np.flatnonzero(score == score.min())
        entering = int(ties[below(len(ties), rng)])
        stay = 2 * int(usage[inside[leaving]] @ without) + int(squares[inside[leaving]])
        if int(score[entering]) > stay and rng.random() < 0.99:
            continue
        inside[leaving], outside[entering] = outside[entering], inside[leaving]
        sums = without + usage[inside[leaving]]
    return inside if sums.max() - sums.min() <= 1 else None
