"""Upper bounds: the eigenvalues behind them, the published values, and that no rounding can make them too small."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_coded.bounds import max_distance, most_words
from surgery_coded.delsarte import eigenvalues, most_words_by_programming


@pytest.mark.parametrize(("length", "weight"), [(4, 2), (6, 3), (7, 3), (7, 5), (8, 2)])
def test_eigenvalues_are_those_of_the_relations_between_all_words(length: int, weight: int) -> None:
    """An eigenvector of a generic sum of the relations is one of each; space k has C(n, k) - C(n, k - 1) dimensions."""
    words = np.array([[i in ones for i in range(length)] for ones in itertools.combinations(range(length), weight)])
    lacking = weight - words.astype(int) @ words.T.astype(int)
    relations = np.stack([(lacking == i).astype(np.float64) for i in range(min(weight, length - weight) + 1)])
    _, vectors = np.linalg.eigh(np.einsum("i,ijk->jk", np.pi ** np.arange(len(relations)), relations))
    measured = np.einsum("jv,ijk,kv->iv", vectors, relations, vectors)
    for k, column in enumerate(np.array(eigenvalues(length, weight), dtype=np.float64).T):
        found = int((np.abs(measured - column[:, None]) < 1e-9).all(axis=0).sum())
        assert found == math.comb(length, k) - (math.comb(length, k - 1) if k else 0)


def test_eigenvalues_of_the_octahedron() -> None:
    """J(4, 2): a vertex has 4 neighbors (eigenvalues 4, 0, -2) and one opposite (1, -1, 1)."""
    assert eigenvalues(4, 2) == ((1, 1, 1), (4, 0, -2), (1, -1, 1))


@pytest.mark.parametrize(
    ("length", "distance", "weight", "bound"),
    [
        (10, 6, 5, 6),
        (10, 6, 3, 3),
        (20, 10, 8, 20),
        (20, 6, 4, 30),
        (32, 14, 16, 295),
        (32, 10, 8, 436),
        (32, 12, 8, 36),
        (32, 6, 4, 80),
        (10, 4, 5, 36),
        (16, 6, 8, 150),
        (8, 6, 4, 2),
        (24, 10, 12, 247),
        (64, 26, 32, 20933),
        (64, 20, 16, 7619),
        (64, 22, 16, 618),
    ],
)
def test_bounds_are_as_low_as_the_published_ones(length: int, distance: int, weight: int, bound: int) -> None:
    assert most_words(length, distance, weight) <= bound
    assert most_words(length, distance, length - weight) <= bound


@pytest.mark.parametrize(
    ("length", "distance", "weight", "words"),
    [
        (7, 4, 3, 7),  # the lines of the Fano plane
        (8, 4, 4, 14),  # the extended Hamming code
        (24, 8, 8, 759),  # the octads of the Golay code
        (16, 6, 6, 112),  # the Nordstrom-Robinson code
        (71, 36, 35, 71),  # a symmetric design, beyond 64 columns: 71 * 18 // (35 * 35 - 71 * 17)
        (6, 4, 3, 4),
        (10, 6, 5, 6),
    ],
)
def test_bounds_are_met_where_the_best_scheme_is_known(length: int, distance: int, weight: int, words: int) -> None:
    assert most_words(length, distance, weight) == words


def test_the_program_alone_gives_delsartes_values() -> None:
    """J(8, 4), distance 6: E_3(1) / v_3 = (1 - 9) / 16 = -1/2 and E_4(1) / v_4 = -1, so y = (2, 0, 0, 0), 1 + 2 = 3."""
    assert [most_words_by_programming(*case) for case in [(8, 6, 4), (16, 6, 8), (24, 10, 12)]] == [3, 150, 247]
    assert most_words_by_programming(8, 10, 4) == 1


@pytest.mark.parametrize("factor", [0.25, 1 - 1e-3, 1 + 1e-3])
def test_inexact_multipliers_are_scaled_to_a_valid_bound(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A(16, 6, 8) = 150: a rounding error of the solver must not lower the bound."""
    solve = scipy.optimize.linprog
    monkeypatch.setattr(scipy.optimize, "linprog", lambda *a, **k: SimpleNamespace(x=factor * solve(*a, **k).x))
    assert most_words_by_programming(16, 6, 8) == 150


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-2, 10), min_size=4, max_size=4))
def test_no_multipliers_whatever_give_too_small_a_bound(multipliers: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy.optimize, "linprog", lambda *a, **k: SimpleNamespace(x=np.array(multipliers)))
        bound = most_words_by_programming(8, 4, 4)
    assert bound is None or bound >= 14


@pytest.mark.parametrize("answer", [None, np.full(5, np.nan), np.zeros(5)])
def test_without_valid_multipliers_johnsons_bound_stays(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A(9, 6, 4) <= 9 A(8, 6, 4) / 5 = 9 * 2 / 5, hence at most 3, and A(10, 6, 5) <= 10 A(9, 6, 4) / 5 = 6."""
    monkeypatch.setattr(scipy.optimize, "linprog", lambda *a, **k: SimpleNamespace(x=answer))
    assert most_words_by_programming(10, 6, 5) is None
    assert most_words(10, 6, 5) == 6


@pytest.mark.parametrize(
    ("parameters", "distance"),
    [
        ((10, 10, 5), 4),
        ((200, 16, 8), 4),
        ((365, 32, 8), 10),
        ((1000, 64, 16), 20),
        ((5000, 64, 16), 20),
        ((21841, 64, 32), 24),
        ((2, 9, 4), 8),
        ((2, 9, 5), 8),
        ((70, 70, 1), 2),
        ((1, 5, 5), 0),
        ((1, 8, 4), 0),
    ],
)
def test_largest_distance_that_is_not_excluded(parameters: tuple[int, int, int], distance: int) -> None:
    assert max_distance(*parameters) == distance


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.data())
def test_no_set_of_words_beats_the_bound(branches: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, branches - 1))
    words = [sum(1 << i for i in ones) for ones in itertools.combinations(range(branches), active)]
    order = data.draw(st.permutations(words))
    for distance in range(2, 2 * active + 1, 2):
        packed: list[int] = []
        for word in order:
            if all((word ^ other).bit_count() >= distance for other in packed):
                packed.append(word)
        assert len(packed) <= most_words(branches, distance, active)
        if len(packed) > 1:
            assert max_distance(len(packed), branches, active) >= distance
