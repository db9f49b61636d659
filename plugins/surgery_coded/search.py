"""The search for coding schemes: few ones in common, branches used equally often.

A request is first weighed against what is possible, then answered from the shipped schemes, else computed: a random
balanced scheme, the words of linear codes, rectangle annealing one distance higher at a time, and orbits of transitive
groups. Budgets count moves, never seconds, so the answer depends on the arguments and the seed alone.
"""

import json
import math
import random
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from surgery.errors import InvalidOption
from surgery_coded.anneal import anneal
from surgery_coded.bounds import max_distance
from surgery_coded.checks import whole_number
from surgery_coded.orbits import orbit_scheme, transitive_groups
from surgery_coded.pools import choose_balanced, cyclic_pools
from surgery_coded.words import MAX_BRANCHES, Matrix, balanced_words, min_distance, to_matrix

_POOLS_TRIED = 6
_GROUPS_TRIED = 6
_SWAP_STEPS = 2_000
_ANNEAL_MOVES = 60_000
_LARGEST_ANNEALED = 4_096  # classes; the pairwise overlaps of more than these do not fit a small machine


@dataclass(frozen=True)
class Found:
    """A computed scheme, shape (K, N), and the method that found it."""

    codewords: Matrix
    method: str

    @cached_property
    def distance(self) -> int:
        """Smallest distance between two codewords."""
        return min_distance(self.codewords)


def check_feasible(classes: int, branches: int, active: int, seed: int = 0) -> None:
    """Refuse what no search can answer.

    Raises:
        InvalidOption: The numbers are no integers or out of range, or fewer than `classes` distinct codewords exist.
    """
    numbers = {"classes": (classes, 1), "branches": (branches, 1), "active": (active, 1), "seed": (seed, 0)}
    for name, (value, least) in numbers.items():
        whole_number(value, least, "coding scheme search", name)
    asked = f"coding scheme for {classes} classes with {active}/{branches} active branches"
    if active > branches:
        raise InvalidOption(f"{asked}: expected 1 <= active <= branches; change the ratio")
    if active == branches and classes > 1:
        raise InvalidOption(f"{asked}: C({branches}, {branches}) = 1 < {classes}; ratio 1 needs no scheme")
    if math.comb(branches, active) < classes:
        balance = "" if 2 * active == branches else " or a ratio closer to 1/2"
        raise InvalidOption(
            f"{asked}: C({branches}, {active}) = {math.comb(branches, active)} < {classes} classes, so distinct "
            f"codewords do not exist; use more branches{balance}"
        )
    if branches > MAX_BRANCHES:
        raise InvalidOption(
            f"{asked}: the search handles at most {MAX_BRANCHES} branches; merge branches into groups, or pass "
            f"codewords of your own to CodingScheme"
        )


def compute(classes: int, branches: int, active: int, seed: int = 0) -> Found:
    """Compute a scheme whose column sums differ by at most 1, with as large a minimum distance as the budget finds.

    Args:
        classes: Number K of codewords.
        branches: Their length N, at most 64.
        active: Ones per codeword.
        seed: Non-negative; the same seed gives the same scheme on any machine.

    Raises:
        InvalidOption: No such scheme exists, or the seed is negative.
    """
    check_feasible(classes, branches, active, seed)
    if 2 * active > branches and active < branches:
        mirrored = compute(classes, branches, branches - active, seed)
        return Found(~mirrored.codewords, f"complement: {mirrored.method}")
    rng = random.Random(seed)
    start = to_matrix(balanced_words(classes, branches, active, rng), branches)
    found = Found(start, "random balanced words")
    limit = max_distance(classes, branches, active)
    for improve in (_from_pools, _by_annealing, _from_orbits):
        if found.distance < limit:
            found = improve(found, limit, rng)
    return found


def _from_pools(best: Found, limit: int, rng: random.Random) -> Found:
    classes, branches = best.codewords.shape
    pools = cyclic_pools(classes, branches, int(best.codewords[0].sum()), limit)
    for pool in [pool for pool in pools if pool.distance > best.distance][:_POOLS_TRIED]:
        chosen = choose_balanced(pool.words, classes, branches, _SWAP_STEPS, rng)
        if chosen is not None:
            return Found(chosen, f"{len(pool.words)} words of the {pool.name}")
    return best


def _by_annealing(best: Found, limit: int, rng: random.Random) -> Found:
    while best.distance < limit and len(best.codewords) <= _LARGEST_ANNEALED:
        higher = anneal(best.codewords, best.distance + 2, _ANNEAL_MOVES, rng)
        if higher is None:
            break
        best = Found(higher, "rectangle annealing")
    return best


def _from_orbits(best: Found, limit: int, rng: random.Random) -> Found:
    classes, branches = best.codewords.shape
    if classes < 2 * branches:  # a single orbit is nearly all that is wanted, and annealing is at its best
        return best
    groups = transitive_groups(branches, classes * 8 // 5)[:_GROUPS_TRIED]
    while best.distance < limit:
        for group in groups:
            higher = orbit_scheme(classes, int(best.codewords[0].sum()), best.distance + 2, group, rng)
            if higher is not None:
                best = Found(higher, f"orbits of the group {group.name} of order {len(group.images)}")
                break
        else:
            return best
    return best


def shipped_record(classes: int, branches: int, active: int, seed: int) -> dict[str, object] | None:
    """Return the record shipped for these arguments: method, seed and figures, and the scheme under "scheme"."""
    path = resources.files("surgery_coded") / "schemes" / f"{classes}-{branches}-{active}-seed{seed}.json"
    if not path.is_file():
        return None
    record: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return record


def shipped_parameters() -> list[tuple[int, int, int, int]]:
    """List (classes, branches, active, seed) of the shipped schemes."""
    names = [path.name for path in (resources.files("surgery_coded") / "schemes").iterdir()]
    parts = [name.removesuffix(".json").replace("seed", "").split("-") for name in names if name.endswith(".json")]
    return sorted((int(k), int(n), int(active), int(seed)) for k, n, active, seed in parts)
