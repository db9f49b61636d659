"""Upper bounds on the minimum distance of constant-weight schemes, by Johnson's inequalities.

A(n, d, w) is the largest number of words of length n and weight w at pairwise distance >= d.

Reference: S. M. Johnson, "A new upper bound for error-correcting codes", 1962, theorems 2 and 3.
"""

import functools
import math


@functools.cache
def most_words(length: int, distance: int, weight: int) -> int:
    """Bound A(length, distance, weight) from above; `distance` is even and at least 2."""
    weight = min(weight, length - weight)
    half = distance // 2
    if half > weight:
        return 1
    if half == 1:
        return math.comb(length, weight)
    bounds = [
        length * most_words(length - 1, distance, weight - 1) // weight,
        length * most_words(length - 1, distance, weight) // (length - weight),
    ]
    slack = weight * weight - length * (weight - half)
    if slack > 0:
        bounds.append(_column_count(length, half, weight, half * length // slack))
    return min(bounds)


def _column_count(length: int, half: int, weight: int, count: int) -> int:
    """Lower `count` until that many words can share as few ones as distance 2 * half asks for.

    With column sums as equal as whole numbers allow, M words have `pairs` ordered pairs that meet in a column, and
    each of the M (M - 1) ordered pairs of words may meet in at most weight - half columns.
    """
    while count > 1:
        each, rest = divmod(count * weight, length)
        pairs = length * each * (each - 1) + 2 * each * rest
        if pairs <= (weight - half) * count * (count - 1):
            break
        count -= 1
    return count


def max_distance(classes: int, branches: int, active: int) -> int:
    """Return the largest minimum distance that the bounds leave open for a scheme; 0 for a single class."""
    if classes < 2:
        return 0
    distance = 2 * min(active, branches - active)
    while distance > 2 and most_words(branches, distance, active) < classes:
        distance -= 2
    return distance
