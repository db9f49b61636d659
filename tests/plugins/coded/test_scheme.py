"""Coding schemes as data: what is accepted, what the paper prints, and the way to JSON and back."""

import json
from fractions import Fraction

import pytest
import torch

from surgery.errors import InvalidOption
from surgery_coded.scheme import CIFAR10_CLASSES, CodingScheme
from surgery_coded.verify import verify

# Two classes of three share one of two branches: distance 2 between any two rows, column sums 2, 2, 2.
TRIANGLE = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()


def test_properties_of_a_scheme_counted_by_hand() -> None:
    scheme = CodingScheme(TRIANGLE)
    assert (scheme.classes, scheme.branches, scheme.active, scheme.min_distance) == (3, 3, 2, 2)
    assert scheme.ratio == Fraction(2, 3)
    assert scheme.column_sums.tolist() == [2, 2, 2]
    assert repr(scheme) == "CodingScheme(3 classes, 2/3 branches active, min_distance 2 (optimal), column sums 2..2)"
    assert (scheme.upper_bound, scheme.proven_optimal) == (2, True)


def test_a_scheme_that_may_not_be_the_best_says_what_is_possible() -> None:
    """Two words of weight 2 share a branch where they need not: distance 2, and 4 is possible."""
    scheme = CodingScheme(torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool())
    assert (scheme.min_distance, scheme.upper_bound, scheme.proven_optimal) == (2, 4, False)
    assert "min_distance 2 (at most 4), column sums 0..2)" in repr(scheme)


@pytest.mark.parametrize("ratio", ["5/10", "3/10"])
def test_the_printed_schemes_are_optimal(ratio: str) -> None:
    assert CodingScheme.cifar10(ratio).proven_optimal


def test_a_single_class_has_distance_zero_and_may_use_all_branches() -> None:
    scheme = CodingScheme(torch.ones(1, 4, dtype=torch.bool))
    assert (scheme.min_distance, scheme.ratio) == (0, 1)
    assert (scheme.upper_bound, scheme.proven_optimal) == (0, True)


def test_schemes_compare_and_hash_by_value() -> None:
    same, other = CodingScheme(TRIANGLE.clone()), CodingScheme(TRIANGLE[[1, 0, 2]])
    assert CodingScheme(TRIANGLE) == same
    assert CodingScheme(TRIANGLE) != other
    assert CodingScheme(TRIANGLE) != TRIANGLE.tolist()
    assert len({CodingScheme(TRIANGLE), same, other}) == 2


def test_the_scheme_is_untouched_by_later_writes_to_its_source() -> None:
    source = TRIANGLE.clone()
    scheme = CodingScheme(source)
    source.zero_()
    assert torch.equal(scheme.codewords, TRIANGLE)


@pytest.mark.parametrize(
    ("codewords", "reason"),
    [
        (TRIANGLE.int(), r"found dtype torch.int32.*call \.bool\(\)"),
        (TRIANGLE.tolist(), r"found list, expected a bool tensor"),
        (TRIANGLE[0], r"found shape \(3,\)"),
        (TRIANGLE[:0], r"found shape \(0, 3\)"),
        (torch.zeros(1, 3).bool(), r"0 to 0 ones"),
        (torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), r"1 to 2 ones"),
        (TRIANGLE[[0, 1, 0]], r"classes 0 and 2 have the same codeword"),
    ],
)
def test_what_is_no_scheme_is_refused_with_the_reason(codewords: object, reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        CodingScheme(codewords)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ratio", "active"), [("5/10", 5), ("3/10", 3)])
def test_table_4_has_the_distance_and_column_sums_that_the_paper_states(ratio: str, active: int) -> None:
    scheme = CodingScheme.cifar10(ratio)
    assert verify(scheme).weights == (active, active)
    assert verify(scheme).min_distance == scheme.min_distance == 4
    assert scheme.column_sums.tolist() == [active] * 10
    horse, ship = (scheme.codewords[CIFAR10_CLASSES.index(name)] for name in ("horse", "ship"))
    assert int((horse ^ ship).sum()) == 4


def test_table_4_rows_are_spelled_from_the_left() -> None:
    frog = CodingScheme.cifar10("5/10").codewords[CIFAR10_CLASSES.index("frog")]
    assert frog.int().tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 0, 0]


def test_a_ratio_that_table_4_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidOption, match="found ratio '4/10', expected one of 5/10, 3/10"):
        CodingScheme.cifar10("4/10")


@pytest.mark.parametrize(
    "scheme",
    [
        CodingScheme(TRIANGLE),
        CodingScheme.cifar10("5/10"),
        CodingScheme(torch.eye(70).bool()),  # wider than a machine word
        CodingScheme(torch.ones(1, 1).bool()),
    ],
)
def test_json_gives_back_the_same_scheme(scheme: CodingScheme) -> None:
    assert CodingScheme.from_json(scheme.to_json()) == scheme
    assert CodingScheme.from_dict(scheme.to_dict()) == scheme


def test_json_spells_rows_in_hexadecimal() -> None:
    assert CodingScheme(TRIANGLE).to_dict()["rows"] == "6 5 3"


def test_json_of_the_imagenet_scheme_stays_small() -> None:
    assert len(CodingScheme.search(1000, 32, 16).to_json()) <= 9200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": "6 5 5"}, "do not match their checksum"),
        ({"rows": 7}, "'rows' is not text"),
        ({"branches": "3"}, "'branches' no positive number"),
        ({"branches": 2}, "not 2 bits wide"),
        ({"branches": 5}, "not 5 bits wide"),
        ({"classes": 4}, "found 3 rows of weight 2, expected 4 of weight 2"),
        ({"active": 1}, "expected 3 of weight 1"),
        ({"format": "zip"}, "found format 'zip', expected 'surgery-coding-scheme'"),
        ({"version": 2}, "found version 2, expected 1; update"),
        ({"rows": "6 5 x", "crc32": 0xA18BEFD2}, "not hexadecimal"),
    ],
)
def test_a_damaged_record_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        CodingScheme.from_json(json.dumps(CodingScheme(TRIANGLE).to_dict() | change))


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[1]", "found list"), ("{}", "found format None")])
def test_text_that_is_no_record_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        CodingScheme.from_json(text)


def test_a_cut_record_is_refused_wherever_it_is_cut() -> None:
    text = CodingScheme.cifar10("3/10").to_json()
    for end in range(len(text)):
        with pytest.raises(InvalidOption):
            CodingScheme.from_json(text[:end])
