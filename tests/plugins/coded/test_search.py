"""The search for schemes: what it promises for any request, and what it reaches for the published ones."""

import hashlib
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import InvalidOption
from surgery_coded import search
from surgery_coded.anneal import anneal
from surgery_coded.orbits import orbit_scheme, transitive_groups
from surgery_coded.pools import choose_balanced, cyclic_pools, factor_cyclic
from surgery_coded.scheme import CodingScheme
from surgery_coded.verify import main, make_record, verify, verify_record
from surgery_coded.words import balanced_words, min_distance, to_matrix, to_words

# (classes, branches, active, minimum distance, smallest and largest column sum). The first six are the published
# networks'; the paper has distances 4, 4, 8, 4, 10, 6 there.
REACHED = [
    (10, 10, 5, 4, 5, 5),
    (10, 10, 3, 4, 3, 3),
    (100, 20, 8, 8, 40, 40),
    (100, 20, 4, 4, 20, 20),
    (1000, 32, 16, 12, 500, 500),
    (1000, 32, 8, 8, 250, 250),
    (100, 16, 8, 6, 50, 50),
    (100, 32, 8, 10, 25, 25),
    (100, 32, 16, 12, 50, 50),
    (200, 16, 8, 4, 100, 100),
    (365, 32, 8, 8, 91, 92),
    (1000, 32, 4, 4, 125, 125),
    (1000, 64, 16, 18, 250, 250),
    (100, 10, 5, 2, 50, 50),
    (10, 8, 4, 4, 5, 5),
    (1000, 24, 12, 8, 500, 500),
    (5000, 64, 16, 16, 1250, 1250),
]
OPEN = {(100, 32, 16): 14, (365, 32, 8): 10, (1000, 64, 16): 20, (5000, 64, 16): 20}  # the others are proven optimal


@pytest.mark.parametrize(("classes", "branches", "active", "distance", "least", "most"), REACHED)
def test_shipped_schemes_reach_their_figures(
    classes: int, branches: int, active: int, distance: int, least: int, most: int
) -> None:
    scheme = CodingScheme.search(classes, branches, active)
    assert scheme.codewords.shape == (classes, branches)
    rows = [int("".join(map(str, row)), 2) for row in scheme.codewords.int().tolist()]
    assert {row.bit_count() for row in rows} == {active}
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(rows, 2)) == distance
    sums = [sum(row >> column & 1 for row in rows) for column in range(branches)]
    assert (min(sums), max(sums)) == (least, most)
    assert scheme.min_distance == distance
    assert scheme.upper_bound == OPEN.get((classes, branches, active), distance)
    assert scheme.column_sums.tolist() == sums[::-1]


def test_every_shipped_file_holds_what_it_says() -> None:
    shipped = search.shipped_parameters()
    assert sorted((k, n, active) for k, n, active, seed in shipped) == sorted(row[:3] for row in REACHED)
    for parameters in shipped:
        record = search.shipped_record(*parameters)
        assert record is not None
        assert record["seed"] == parameters[3]
        least, most = verify_record(record).column_sums
        assert most - least <= 1


def test_the_verifier_refuses_a_record_that_claims_too_much() -> None:
    record = make_record(10, 10, 3)
    with pytest.raises(InvalidOption, match=r"found.*'min_distance': 4.*expected.*'min_distance': 6"):
        verify_record(record | {"min_distance": 6})


@pytest.mark.parametrize(
    "parameters",
    [
        (10, 10, 5),
        (10, 10, 3),
        (100, 20, 8),
        (100, 20, 4),
        (1000, 32, 16),
        pytest.param((1000, 32, 8), marks=pytest.mark.slow),
        (100, 32, 8),
        (200, 16, 8),
        (1000, 24, 12),
    ],
)
def test_shipped_schemes_are_what_the_search_computes(parameters: tuple[int, int, int]) -> None:
    assert make_record(*parameters) == search.shipped_record(*parameters, 0)


@pytest.mark.parametrize(
    ("parameters", "distance"),
    [((10, 10, 5), 4), ((10, 10, 3), 4), ((100, 20, 8), 8), ((100, 20, 4), 4), ((1000, 32, 16), 12), ((200, 16, 8), 4)],
)
def test_another_seed_reaches_the_bound_too(parameters: tuple[int, int, int], distance: int) -> None:
    scheme = CodingScheme.search(*parameters, seed=1)
    assert scheme != CodingScheme.search(*parameters)
    counted = verify(scheme)
    assert (counted.min_distance, counted.proven_optimal) == (distance, True)
    assert counted.column_sums[0] == counted.column_sums[1]


@pytest.mark.slow
def test_as_many_classes_as_imagenet_21k_has() -> None:
    counted = verify(CodingScheme.search(21841, 64, 32))
    assert (counted.min_distance, counted.proven_optimal, counted.column_sums) == (24, True, (10920, 10921))


@pytest.mark.parametrize("branches", [30, 64, 70, 130])
def test_the_verifier_finds_the_closest_pair_wherever_it_is(branches: int) -> None:
    """Rows 3 and 1050 are made to differ in two bits; they lie in different blocks of the comparison."""
    bits = torch.rand(1100, branches, generator=torch.Generator().manual_seed(branches)).argsort(dim=1) < branches // 2
    bits[1050] = bits[3]
    bits[1050, bits[3].nonzero()[0]], bits[1050, (~bits[3]).nonzero()[0]] = False, True
    rows = [int("".join(map(str, row)), 2) for row in bits.int().tolist()]
    closest = min((a ^ b).bit_count() for a, b in itertools.combinations(rows, 2))
    assert verify(CodingScheme(bits)).min_distance == CodingScheme(bits).min_distance == closest == 2
    without = CodingScheme(bits[torch.arange(len(bits)) != 1050])
    closest = min((a ^ b).bit_count() for a, b in itertools.combinations(rows[:1050] + rows[1051:], 2))
    assert verify(without).min_distance == without.min_distance == closest


def test_the_verifier_prints_a_line_per_shipped_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(REACHED)
    assert lines[1] == (
        "10 classes, 3/10 branches active, seed 0: min_distance 4 (proven optimal), column sums 3..3; "
        "rectangle annealing"
    )
    assert sum("(proven optimal)" in line for line in lines) == len(REACHED) - len(OPEN)


def test_the_search_gives_the_same_scheme_everywhere() -> None:
    """The digests were computed once; a machine, Python, numpy or torch that changes them breaks reproducibility."""
    digests = {
        parameters: hashlib.sha256(search.compute(*parameters, seed=7).codewords.tobytes()).hexdigest()[:16]
        for parameters in [(10, 8, 4), (30, 10, 4), (100, 16, 4), (60, 16, 5)]
    }
    assert digests == {
        (10, 8, 4): "02f19c1cf7e8b0c4",
        (30, 10, 4): "043e86ef46acf844",
        (100, 16, 4): "74394597e2baa0ea",
        (60, 16, 5): "70528f70d96d5d3d",
    }


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (CodingScheme.search(12, 9, 4, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@st.composite
def feasible(draw: st.DrawFn) -> tuple[int, int, int]:
    branches = draw(st.integers(2, 16))
    active = draw(st.integers(1, branches - 1))
    return draw(st.integers(1, min(40, math.comb(branches, active)))), branches, active


@settings(max_examples=40, deadline=None)
@given(feasible(), st.integers(0, 3))
def test_any_feasible_request_gets_a_valid_balanced_scheme(parameters: tuple[int, int, int], seed: int) -> None:
    scheme = CodingScheme.search(*parameters, seed)
    assert (scheme.classes, scheme.branches, scheme.active) == parameters
    counted = verify(scheme)
    assert counted.column_sums[1] - counted.column_sums[0] <= 1
    assert counted.min_distance == scheme.min_distance <= counted.upper_bound
    assert counted.min_distance >= 2 or scheme.classes == 1


@pytest.mark.parametrize("parameters", [(6, 4, 2), (252, 10, 5), (250, 10, 5), (16, 16, 1), (64, 64, 63), (1, 5, 5)])
def test_requests_that_leave_no_choice_are_answered(parameters: tuple[int, int, int]) -> None:
    counted = verify(CodingScheme.search(*parameters))
    assert counted.column_sums[1] - counted.column_sums[0] <= 1
    assert counted.proven_optimal


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ((10, 4, 2), r"C\(4, 2\) = 6 < 10 classes"),
        ((2, 8, 8), r"C\(8, 8\) = 1 < 2; ratio 1 needs no scheme"),
        ((10, 8, 9), "10 classes with 9/8 active branches: expected 1 <= active <= branches"),
        ((10, 8, 0), "found active=0, expected a whole number of at least 1"),
        ((0, 8, 4), "found classes=0, expected a whole number of at least 1"),
        ((10, 65, 4), "at most 64 branches"),
    ],
)
def test_infeasible_requests_are_refused_with_the_inequality(parameters: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        CodingScheme.search(*parameters)


@pytest.mark.parametrize("value", ["10", 10.0, None, True, -1])
@pytest.mark.parametrize("name", ["classes", "branches", "active", "seed"])
def test_what_is_no_whole_number_is_refused(name: str, value: object) -> None:
    numbers: dict[str, object] = {"classes": 10, "branches": 10, "active": 5, "seed": 0, name: value}
    with pytest.raises(InvalidOption, match=f"found {name}={value!r}, expected a whole number"):
        CodingScheme.search(**numbers)  # type: ignore[arg-type]


def test_integers_of_any_type_ask_for_the_same_scheme() -> None:
    ten = np.int64(10)
    assert CodingScheme.search(ten, ten, np.int64(5), np.int64(0)) == CodingScheme.search(10, 10, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [7, 15, 21, 31, 63])
def test_factors_of_a_cyclic_polynomial_multiply_back(length: int) -> None:
    product = np.array([1], dtype=np.int64)
    for factor in factor_cyclic(length):
        coefficients = np.array([factor >> power & 1 for power in range(factor.bit_length())])
        product = np.convolve(product, coefficients) % 2
    assert product.tolist() == [1] + [0] * (length - 1) + [1]


def test_factors_are_as_many_as_cyclotomic_cosets() -> None:
    """x^7 - 1 = (x + 1)(x^3 + x + 1)(x^3 + x^2 + 1) over GF(2)."""
    assert factor_cyclic(7) == [0b11, 0b1011, 0b1101]
    assert [len(factor_cyclic(length)) for length in (15, 23, 31, 63)] == [5, 3, 7, 13]


def test_pools_contain_the_golay_dodecads() -> None:
    best = cyclic_pools(1000, 24, 12, limit=8)[0]
    assert (best.distance, len(best.words)) == (8, 2576)
    assert min_distance(to_matrix(best.words, 24)) == 8


def test_pools_keep_the_distance_that_they_state() -> None:
    for pool in cyclic_pools(20, 11, 5, limit=10):
        rows = [int(word) for word in pool.words]
        assert {row.bit_count() for row in rows} == {5}
        assert min((a ^ b).bit_count() for a, b in itertools.combinations(rows, 2)) >= pool.distance


def test_choosing_from_a_closed_pool_takes_complement_pairs() -> None:
    pool = to_words(np.array(list(itertools.product([False, True], repeat=6)), dtype=bool))
    pool = pool[np.bitwise_count(pool) == 3]
    chosen = choose_balanced(pool, 9, 6, steps=0, rng=random.Random(0))
    assert chosen is not None
    assert sorted(chosen.sum(axis=0).tolist()) == [4, 4, 4, 5, 5, 5]


def test_annealing_keeps_all_row_and_column_sums() -> None:
    start = to_matrix(balanced_words(30, 12, 5, random.Random(3)), 12)
    raised = anneal(start, 4, 20_000, random.Random(3))
    assert raised is not None
    assert min_distance(raised) >= 4
    assert raised.sum(axis=0).tolist() == start.sum(axis=0).tolist()
    assert set(raised.sum(axis=1).tolist()) == {5}


def test_annealing_gives_up_on_the_impossible() -> None:
    start = to_matrix(balanced_words(15, 8, 4, random.Random(0)), 8)
    assert anneal(start, 4, 2_000, random.Random(0)) is None  # A(8, 4, 4) = 14


@pytest.mark.parametrize("branches", [2, 6, 9, 16, 32])
def test_groups_are_closed_transitive_and_start_with_the_identity(branches: int) -> None:
    for group in transitive_groups(branches, 8 * branches):
        elements = {tuple(row) for row in group.images.tolist()}
        assert len(elements) == len(group.images)
        assert group.images[0].tolist() == list(range(branches))
        assert set(group.images[:branches, 0].tolist()) == set(range(branches))
        first, last = group.images[len(group.images) // 2], group.images[-1]
        assert tuple(first[last].tolist()) in elements


def test_orbits_give_a_balanced_scheme_at_the_asked_distance() -> None:
    group = next(group for group in transitive_groups(16, 160) if group.name == "2^4:(5:2)")
    found = orbit_scheme(100, 8, 6, group, random.Random(0))
    assert found is not None
    assert min_distance(found) >= 6
    assert found.sum(axis=0).tolist() == [50] * 16


def test_words_and_rows_convert_into_each_other() -> None:
    matrix = torch.rand(20, 64, generator=torch.Generator().manual_seed(0)).numpy() > 0.5
    assert np.array_equal(to_matrix(to_words(matrix), 64), matrix)
    assert to_words(matrix[:1, :3]).tolist() == [int(matrix[0, 0]) + 2 * int(matrix[0, 1]) + 4 * int(matrix[0, 2])]
