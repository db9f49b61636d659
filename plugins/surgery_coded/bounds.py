"""Upper bounds on the minimum distance of constant-weight schemes.

A(n, d, w) is the largest number of words of length n and weight w at pairwise distance >= d. It is bounded by the
recursions A(n, d, w) <= n A(n - 1, d, w - 1) / w and A(n, d, w) <= n A(n - 1, d, w) / (n - w), by the second moment of
the column sums, and by Delsarte's linear program.

Reference: S. M. Johnson, "A new upper bound for error-correcting codes", 1962, theorems 2 and 3.
"""

import bisect
import functools
import math

from surgery_coded.delsarte import most_words_by_programming

_LONGEST = 64  # the recursions visit all shorter lengths, and the exact check of the program grows with the cube


@functools.cache
def max_distance(classes: int, branches: int, active: int) -> int:
    """Return the largest minimum distance that the bounds leave open for a scheme; 0 for a single class."""
    if classes < 2:
        return 0
    distances = range(2, 2 * min(active, branches - active) + 1, 2)
    # The largest distance at which enough words may exist: those at a larger distance are words at a smaller one too.
    return distances[bisect.bisect(distances, False, key=lambda d: most_words(branches, d, active) < classes) - 1]


def most_words(length: int, distance: int, weight: int) -> int:
    """Bound A(length, distance, weight) from above; `distance` is even and at least 2, `weight` below `length`.

    Beyond 64 columns only the second moment of the column sums is used.
    """
    weight = min(weight, length - weight)
    if length > _LONGEST:
        return _closed(length, distance, weight)
    bounds = [_by_recursion(length, distance, weight), most_words_by_programming(length, distance, weight)]
    return min(bound for bound in bounds if bound is not None)


@functools.cache
def _by_recursion(length: int, distance: int, weight: int) -> int:
    weight = min(weight, length - weight)
    bound = _closed(length, distance, weight)
    if bound == 1 or distance == 2:
        return bound
    return min(
        bound,
        length * _by_recursion(length - 1, distance, weight - 1) // weight,
        length * _by_recursion(length - 1, distance, weight) // (length - weight),
    )


def _closed(length: int, distance: int, weight: int) -> int:
    half = distance // 2
    if half > weight:
        return 1
    bound = math.comb(length, weight)
    slack = weight * weight - length * (weight - half)
    return min(bound, _column_count(length, half, weight, half * length // slack)) if slack > 0 else bound


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
