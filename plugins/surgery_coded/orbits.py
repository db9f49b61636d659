"""Schemes as unions of orbits of a group that moves every branch to every other.

Each orbit is then perfectly balanced by itself, and distances need only be compared between one word of each orbit and
all words of the others. What remains is a heaviest-clique problem on a few hundred orbits.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery_coded.pools import choose_balanced, swap_walk
from surgery_coded.words import Matrix, Words, below, sample, to_matrix, to_words

_BASE_WORDS = 30_000
_MOST_ORBITS = 2500
_MOST_COMPARISONS = 10**9  # orbits squared times the order of the group
_CLIQUE_MOVES = 12_000
_SWAP_STEPS = 500
_CLIQUES_TRIED = 20
_PROBED = 48  # group elements tried on a word before all the others
# Primitive polynomials over GF(2) of degree 1 to 6, bit i the coefficient of x^i.
_PRIMITIVE = {1: 0b11, 2: 0b111, 3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011}


@dataclass(frozen=True)
class Group:
    """A transitive permutation group of the branches; row g of `images`, shape (order, N), is one permutation."""

    name: str
    images: NDArray[np.int64]


def transitive_groups(branches: int, largest: int) -> list[Group]:
    """List groups of at most `largest` elements, the largest first.

    These are the cyclic group of the branches extended by multipliers, and for N = 2^m the additive group of the field
    with N elements extended by multiplications and Frobenius maps.
    """
    groups = [*_affine_cyclic(branches, largest), *_affine_field(branches, largest)]
    return sorted(groups, key=lambda group: -len(group.images))


def _affine_cyclic(branches: int, largest: int) -> Iterator[Group]:
    points = np.arange(branches)
    seen = []
    for unit in range(1, branches):
        powers = [1]
        while math.gcd(unit, branches) == 1 and powers[-1] * unit % branches != 1:
            powers.append(powers[-1] * unit % branches)
        if math.gcd(unit, branches) == 1 and sorted(powers) not in seen and branches * len(powers) <= largest:
            seen.append(sorted(powers))
            images = [(power * points + shift) % branches for power in powers for shift in range(branches)]
            yield Group(f"Z{branches}:<{unit}>", np.array(images))


def _affine_field(branches: int, largest: int) -> Iterator[Group]:
    degree = branches.bit_length() - 1
    if branches != 1 << degree or degree not in _PRIMITIVE:
        return
    powers = [1]
    while len(powers) < branches - 1:
        double = powers[-1] << 1
        powers.append(double ^ _PRIMITIVE[degree] if double >> degree else double)
    logarithm = {power: exponent for exponent, power in enumerate(powers)}
    for turns in _divisors(branches - 1):
        for squarings in _divisors(degree):
            if branches * turns * squarings > largest:
                continue
            maps = [
                [0] + [powers[((branches - 1) // turns * turn + logarithm[point] * root) % (branches - 1)]
                       for point in range(1, branches)]
                for turn in range(turns)
                for root in (1 << degree // squarings * power for power in range(squarings))
            ]  # fmt: skip
            images = np.array(maps)[:, None, :] ^ np.arange(branches)[None, :, None]
            yield Group(f"2^{degree}:({turns}:{squarings})", images.reshape(-1, branches))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def orbit_scheme(classes: int, active: int, distance: int, group: Group, rng: random.Random) -> Matrix | None:
    """Search for `classes` balanced words at pairwise distance >= `distance` among unions of orbits of `group`."""
    branches = group.images.shape[1]
    overlap = active - distance // 2
    orbits = _separated_orbits(_base_words(group, active, rng), group, overlap, rng)
    if len(orbits) == 0:
        return None
    sizes = np.array([len(np.unique(orbit)) for orbit in orbits])
    cliques = _heavy_cliques(_compatible(orbits, branches, overlap), sizes, classes, rng)
    for clique in itertools.islice(cliques, _CLIQUES_TRIED):
        pool = np.unique(orbits[clique])
        chosen = _choose_atoms(pool, classes, group, rng)
        if chosen is None:
            chosen = choose_balanced(pool, classes, branches, _SWAP_STEPS, rng)
        if chosen is not None:
            return chosen
    return None


def _choose_atoms(pool: Words, classes: int, group: Group, rng: random.Random) -> Matrix | None:
    """Choose whole orbits ("atoms") of a small subgroup that moves all branches.

    Such an orbit uses all branches of one orbit of branches equally often, so far fewer sums have to be evened out:
    at N = 64 and with a subgroup of order 8, eight instead of 64.
    """
    branches = group.images.shape[1]
    bits = to_matrix(pool, branches)
    for order in _divisors(branches)[-3:0:-1]:
        if classes % order:
            continue
        subgroup = group.images[: branches : branches // order]  # of the shifts, the first N elements of every group
        images = np.stack([to_words(bits[:, permutation]) for permutation in subgroup])  # (order, words)
        _, first, sizes = np.unique(images.min(axis=0), return_index=True, return_counts=True)
        first = first[sizes == order]
        if len(first) * order < classes:
            continue
        owners = subgroup.min(axis=0)  # the smallest branch of each branch's orbit
        usage = np.stack([bits[first][:, owners == owner].sum(axis=1) for owner in np.unique(owners)], axis=1)
        chosen = swap_walk(usage.astype(np.int32), classes // order, _SWAP_STEPS, rng)
        if chosen is not None:
            return to_matrix(images[:, first[chosen]].reshape(-1), branches)
    return None


def _base_words(group: Group, active: int, rng: random.Random) -> list[list[int]]:
    """Draw words that hold branch 0, and unions of cycles of group elements, which lie in short orbits."""
    order, branches = group.images.shape
    count = min(_BASE_WORDS, 2 * math.comb(branches - 1, active - 1))
    words = [[0, *(point + 1 for point in sample(branches - 1, active - 1, rng))] for _ in range(count)]
    for _ in range(count // 4):
        cycles = _cycles(group.images[below(order, rng)].tolist())
        word: list[int] = []
        for index in sample(len(cycles), len(cycles), rng):
            if len(word) + len(cycles[index]) <= active:
                word += cycles[index]
        if len(word) == active:
            words.append(word)
    return words


def _cycles(permutation: list[int]) -> list[list[int]]:
    cycles, seen = [], [False] * len(permutation)
    for start in range(len(permutation)):
        cycle, point = [], start
        while not seen[point]:
            seen[point] = True
            cycle.append(point)
            point = permutation[point]
        if cycle:
            cycles.append(cycle)
    return cycles


def _separated_orbits(bases: list[list[int]], group: Group, overlap: int, rng: random.Random) -> Words:
    """Return the distinct orbits whose words meet in at most `overlap` ones, shape (orbits, order)."""
    masks = np.uint64(1) << group.images.T.astype(np.uint64)  # (N, order)
    order = masks.shape[1]
    kept, least, fixing = [], [], []
    for start in range(0, len(bases), 100):
        points = np.array(bases[start : start + 100])
        points = points[_fits(_orbits(masks[:, :_PROBED], points), overlap)]  # most words fail here already
        orbits = _orbits(masks, points)
        fits = _fits(orbits, overlap)
        kept.append(points[fits])  # all the orbits together would take gigabytes
        least.append(orbits[fits].min(axis=1))
        fixing.append((orbits[fits] == orbits[fits, :1]).sum(axis=1))
    first = np.unique(np.concatenate(least), return_index=True)[1]
    points, distinct = np.concatenate(kept)[first], order // np.concatenate(fixing)[first]
    long, short = np.flatnonzero(distinct == order), np.flatnonzero(distinct < order)
    most = min(_MOST_ORBITS, math.isqrt(_MOST_COMPARISONS // order))
    short = short[sample(len(short), min(len(short), most // 4), rng)]
    long = long[sample(len(long), min(len(long), most - len(short)), rng)]
    return _orbits(masks, points[np.concatenate([long, short])])


def _orbits(masks: Words, points: NDArray[np.int64]) -> Words:
    """Map words, given by their ones, by group elements: (words, weight) to (words, elements)."""
    orbits = np.zeros((len(points), masks.shape[1]), dtype=np.uint64)
    for ones in points.T:
        orbits |= masks[ones]
    return orbits


def _fits(orbits: Words, overlap: int) -> NDArray[np.bool_]:
    """Tell which words, the first of their orbits, meet the other words in at most `overlap` ones."""
    base = orbits[:, :1]  # the identity comes first in every group
    shared = np.bitwise_count(orbits & base)
    return np.asarray(((shared <= overlap) | (orbits == base)).all(axis=1))


def _compatible(orbits: Words, branches: int, overlap: int) -> NDArray[np.bool_]:
    """Tell which pairs of orbits meet in at most `overlap` ones everywhere."""
    count = len(orbits)
    first = to_matrix(orbits[:, 0], branches).astype(np.float32)  # sums of at most 64 ones: exact
    compatible = np.zeros((count, count), dtype=bool)
    for index in range(count):
        shared = to_matrix(orbits[index], branches).astype(np.float32) @ first.T  # (order, count)
        compatible[index] = shared.max(axis=0) <= overlap
    np.fill_diagonal(compatible, False)
    return compatible


def _heavy_cliques(
    compatible: NDArray[np.bool_], sizes: NDArray[np.int64], target: int, rng: random.Random
) -> Iterator[list[int]]:
    """Walk through cliques; yield those of at least `target` words as they turn up.

    Every move lets in the orbit whose words outnumber most those of the members it drives out, even when none gains;
    what was driven out stays out for a while, so the walk does not turn back.
    """
    clashing = ~compatible
    np.fill_diagonal(clashing, False)
    lost = np.zeros(len(sizes), dtype=np.int64)  # words of the clique that letting an orbit in would drive out
    inside = np.zeros(len(sizes), dtype=bool)
    barred_until = np.zeros(len(sizes), dtype=np.int64)
    for move in range(_CLIQUE_MOVES):
        open_to = np.flatnonzero(~inside & (barred_until <= move))
        if not len(open_to):
            continue
        gain = sizes[open_to] - lost[open_to]
        ties = open_to[gain == gain.max()]
        entering = int(ties[below(len(ties), rng)])
        leaving = np.flatnonzero(inside & clashing[entering])
        inside[entering] = True
        lost += clashing[entering] * sizes[entering]
        for member in leaving.tolist():
            inside[member] = False
            lost -= clashing[member] * sizes[member]
            barred_until[member] = move + 7 + below(10, rng)
        if gain.max() > 0 and sizes[inside].sum() >= target:
            yield np.flatnonzero(inside).tolist()
