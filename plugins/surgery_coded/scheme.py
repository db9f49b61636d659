"""Coding schemes: which branches work for which class.

Reference: Coded ResNeXt, NeurIPS 2022, appendix A, rules A (equal weight of the codewords), B (branches used equally
often) and C (large minimum distance); Table 4 for the printed CIFAR-10 schemes.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from surgery.errors import InvalidOption
from surgery_coded import bounds as _bounds
from surgery_coded import search as _search
from surgery_coded import words as _words

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_TABLE_4 = {
    "5/10": (
        "1010100011 0101010101 1101100010 0011001101 1010010101 1001001110 1011101000 0100011110 0110111000 0100110011"
    ),
    "3/10": (
        "1001001000 0110001000 1010000001 0000001110 0001010100 0010100100 0000110010 0100010001 0001100001 1100000010"
    ),
}
_FORMAT, _VERSION = "surgery-coding-scheme", 1


@dataclass(frozen=True, eq=False, repr=False)
class CodingScheme:
    """One codeword per class: class k is to be decided by the branches where its codeword is one.

    Schemes compare by their codewords and can be keys of a dict. A branch that no class uses is allowed, since few
    classes over many branches leave no choice.

    Attributes:
        codewords: Shape (K, N), dtype bool, on the CPU; a copy of what was passed, not to be written to.

    Raises:
        InvalidOption: The table is not 2-D and bool, or its rows are empty, repeat, or differ in weight.
    """

    codewords: Tensor

    def __post_init__(self) -> None:
        """Copy the table and refuse what is not a scheme."""
        _check(self.codewords)
        object.__setattr__(self, "codewords", self.codewords.detach().to("cpu", copy=True).contiguous())

    @property
    def classes(self) -> int:
        """Number K of classes."""
        return self.codewords.shape[0]

    @property
    def branches(self) -> int:
        """Number N of branches."""
        return self.codewords.shape[1]

    @property
    def active(self) -> int:
        """Branches that work for one class."""
        return int(self.codewords[0].sum())

    @property
    def ratio(self) -> Fraction:
        """Share of active branches, in (0, 1]; in lowest terms, so N is not to be read off it."""
        return Fraction(self.active, self.branches)

    @cached_property
    def min_distance(self) -> int:
        """Smallest Hamming distance between two codewords; 0 for a single class, which has no pair."""
        return _words.min_distance(self.codewords.numpy())

    @cached_property
    def upper_bound(self) -> int:
        """Largest minimum distance that is not proven impossible for so many classes, branches and active branches.

        It is 0 for a single class, which has no pair. The proof is Johnson's or, checked in exact arithmetic,
        Delsarte's; beyond 64 branches a weaker one of Johnson's alone.

        Reference: S. M. Johnson, "A new upper bound for error-correcting codes", 1962; P. Delsarte, "An algebraic
        approach to the association schemes of coding theory", 1973.
        """
        return _bounds.max_distance(self.classes, self.branches, self.active)

    @property
    def proven_optimal(self) -> bool:
        """Whether no scheme of these numbers has a larger minimum distance; false means that it is not known."""
        return self.min_distance == self.upper_bound

    @property
    def column_sums(self) -> Tensor:
        """Number of classes that use each branch, shape (N,), dtype int64."""
        return self.codewords.sum(dim=0)

    def __eq__(self, other: object) -> bool:
        """Compare by codewords."""
        return isinstance(other, CodingScheme) and torch.equal(self.codewords, other.codewords)

    def __hash__(self) -> int:
        """Hash by codewords."""
        return hash((self.codewords.shape, self.codewords.numpy().tobytes()))

    def __repr__(self) -> str:
        """Sum the scheme up in a line."""
        sums = self.column_sums
        known = "optimal" if self.proven_optimal else f"at most {self.upper_bound}"
        return (
            f"CodingScheme({self.classes} classes, {self.active}/{self.branches} branches active, min_distance "
            f"{self.min_distance} ({known}), column sums {int(sums.min())}..{int(sums.max())})"
        )

    @classmethod
    def search(cls, classes: int, branches: int, active: int, seed: int = 0) -> Self:
        """Find a scheme with a large minimum distance and column sums that differ by at most 1.

        Schemes that are shipped as data are looked up; any other is computed.

        Args:
            classes: Number K of codewords.
            branches: Their length N, at most 64.
            active: Ones per codeword.
            seed: Non-negative; the same arguments give the same scheme on any machine.

        Raises:
            InvalidOption: A number is no integer, or no such scheme exists; the message names what fails.
        """
        _search.check_feasible(classes, branches, active, seed)
        record = _search.shipped_record(classes, branches, active, seed)
        if record is not None:
            return cls.from_dict(_mapping(record["scheme"]))
        return cls(torch.from_numpy(_search.compute(classes, branches, active, seed).codewords))

    @classmethod
    def cifar10(cls, ratio: str) -> Self:
        """Return a scheme printed in Table 4, "5/10" or "3/10", its rows in the order of `CIFAR10_CLASSES`.

        Raises:
            InvalidOption: The paper prints no scheme of that ratio.
        """
        if ratio not in _CIFAR10_TABLE_4:
            raise InvalidOption(
                f"printed CIFAR-10 schemes: found ratio {ratio!r}, expected one of {', '.join(_CIFAR10_TABLE_4)}; "
                f"for another use CodingScheme.search"
            )
        rows = _CIFAR10_TABLE_4[ratio].split()
        return cls(torch.tensor([[bit == "1" for bit in row] for row in rows]))

    def to_dict(self) -> dict[str, str | int]:
        """Return the scheme as values that JSON can hold; "rows" spells each codeword in hexadecimal digits."""
        digits = -(-self.branches // 4)
        bits = ("".join("01"[bit] for bit in row) for row in self.codewords.int().tolist())
        rows = " ".join(format(int(row, 2), f"0{digits}x") for row in bits)
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "classes": self.classes,
            "branches": self.branches,
            "active": self.active,
            "crc32": zlib.crc32(rows.encode()),
            "rows": rows,
        }

    def to_json(self) -> str:
        """Return the scheme as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Self:
        """Rebuild a scheme from `to_dict`.

        Raises:
            InvalidOption: The record is foreign, of a newer version, or damaged.
        """
        if record.get("format") != _FORMAT:
            raise InvalidOption(f"coding scheme record: found format {record.get('format')!r}, expected {_FORMAT!r}")
        version = record.get("version")
        if version != _VERSION:
            raise InvalidOption(f"coding scheme record: found version {version!r}, expected {_VERSION}; update surgery")
        scheme = cls(_rows_to_codewords(record))
        found, stated = (scheme.classes, scheme.active), (record.get("classes"), record.get("active"))
        if found != stated:
            raise _damaged(f"found {found[0]} rows of weight {found[1]}, expected {stated[0]} of weight {stated[1]}")
        return scheme

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a scheme from `to_json`.

        Raises:
            InvalidOption: The text is no such record, of a newer version, or damaged.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise _damaged(f"the text is not JSON ({error})") from error
        return cls.from_dict(_mapping(record))


def _check(codewords: Tensor) -> None:
    if not isinstance(codewords, Tensor) or codewords.dtype != torch.bool:
        found = f"dtype {codewords.dtype}" if isinstance(codewords, Tensor) else type(codewords).__name__
        raise InvalidOption(f"CodingScheme: found {found}, expected a bool tensor; call .bool() on a tensor of 0 and 1")
    if codewords.ndim != 2 or 0 in codewords.shape:
        raise InvalidOption(
            f"CodingScheme: found shape {tuple(codewords.shape)}, expected (classes, branches), at least one of each"
        )
    weights = codewords.sum(dim=1)
    if int(weights[0]) == 0 or bool((weights != weights[0]).any()):
        raise InvalidOption(
            f"CodingScheme: found codewords of {int(weights.min())} to {int(weights.max())} ones, expected the same "
            f"number, at least one, in each"
        )
    first: dict[bytes, int] = {}
    for index, row in enumerate(np.packbits(codewords.detach().cpu().numpy(), axis=1)):
        earlier = first.setdefault(row.tobytes(), index)
        if earlier != index:
            raise InvalidOption(
                f"CodingScheme: classes {earlier} and {index} have the same codeword, expected distinct ones; "
                f"CodingScheme.search finds such a table"
            )


def _rows_to_codewords(record: Mapping[str, object]) -> Tensor:
    rows, branches = record.get("rows"), record.get("branches")
    if not isinstance(rows, str) or not isinstance(branches, int) or branches < 1:
        raise _damaged("'rows' is not text or 'branches' no positive number")
    if zlib.crc32(rows.encode()) != record.get("crc32"):
        raise _damaged("the rows do not match their checksum")
    digits = -(-branches // 4)
    try:
        numbers = [int(row, 16) for row in rows.split(" ") if len(row) == digits]
    except ValueError as error:
        raise _damaged("the rows are not hexadecimal") from error
    if len(numbers) != len(rows.split(" ")) or max(numbers, default=0) >> branches:
        raise _damaged(f"the rows are not {branches} bits wide")
    return torch.tensor([[bit == "1" for bit in format(number, f"0{branches}b")] for number in numbers])


def _damaged(reason: str) -> InvalidOption:
    return InvalidOption(f"coding scheme record: {reason}; the text was damaged or edited, write it anew with to_json")


def _mapping(record: object) -> Mapping[str, object]:
    if not isinstance(record, dict):
        raise _damaged(f"found {type(record).__name__}, expected an object")
    return record
