"""Delsarte's linear programming bound on constant-weight schemes.

Two words of length n and weight w are i-th associates where each has i ones that the other lacks, so that their
distance is 2 i. These relations form the Johnson scheme J(n, w), with valencies v_i = C(w, i) C(n - w, i) and with
eigenvalues, the Eberlein polynomials,

    E_i(k) = sum_j (-1)^j C(k, j) C(w - k, i - j) C(n - w - k, i - j),    0 <= i, k <= min(w, n - w).

With A_i the mean number of i-th associates of a word, sum_i A_i E_i(k) / v_i >= 0 holds for every k. Any multipliers
y_k >= 0 with sum_k y_k E_i(k) / v_i <= -1 for all distances 2 i that are allowed therefore show that there are at most
1 + sum_k y_k words.

Reference: P. Delsarte, "An algebraic approach to the association schemes of coding theory", 1973, sections 3.3, 4.2.
"""

import functools
import math
from fractions import Fraction

import numpy as np

_DENOMINATOR = 1 << 40


@functools.cache
def eigenvalues(length: int, weight: int) -> tuple[tuple[int, ...], ...]:
    """Return the eigenvalues of J(length, weight); row i, column k holds E_i(k), and column 0 the valencies v_i."""
    comb, last = math.comb, min(weight, length - weight)
    return tuple(
        tuple(
            sum(
                (-1) ** j * comb(k, j) * comb(weight - k, i - j) * comb(length - weight - k, i - j)
                for j in range(min(i, k) + 1)
            )
            for k in range(last + 1)
        )
        for i in range(last + 1)
    )


def most_words_by_programming(length: int, distance: int, weight: int) -> int | None:
    """Bound the number of words at pairwise distance >= `distance`; None where the program gave no valid multipliers.

    The program is solved in floating point. Its multipliers are then rounded to fractions and scaled up, in exact
    arithmetic, until they satisfy every inequality, so that no rounding error can enter the bound.
    """
    from scipy.optimize import linprog  # takes 0.3 s, which who never asks for a bound shall not wait

    allowed = eigenvalues(length, weight)[distance // 2 :]
    if not allowed:
        return 1
    terms = [[Fraction(value, row[0]) for value in row[1:]] for row in allowed]  # E_i(k) / v_i, all in [-1, 1]
    solved = linprog(np.ones(len(terms[0])), A_ub=np.array(terms, dtype=np.float64), b_ub=-np.ones(len(terms)))
    if solved.x is None or not np.isfinite(solved.x).all():
        return None
    multipliers = [Fraction(max(0, round(y * _DENOMINATOR)), _DENOMINATOR) for y in solved.x.tolist()]
    reached = min(-sum(y * term for y, term in zip(multipliers, row, strict=True)) for row in terms)
    return math.floor(1 + sum(multipliers) / reached) if reached > 0 else None
