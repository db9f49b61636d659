"""Recompute everything a coding scheme claims, by other means than the search used.

`python -m surgery_coded.verify` prints a line per shipped scheme and fails where one does not hold what its file says.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from surgery.errors import InvalidOption
from surgery_coded.bounds import max_distance
from surgery_coded.scheme import CodingScheme
from surgery_coded.search import compute, shipped_parameters, shipped_record


@dataclass(frozen=True)
class Verification:
    """What was counted on the codewords.

    Attributes:
        weights: Smallest and largest number of ones in a row.
        column_sums: Smallest and largest number of ones in a column.
        min_distance: Smallest Hamming distance over all pairs of rows; 0 for one row.
        upper_bound: Johnson's bound on that distance, for any scheme of these parameters.
    """

    weights: tuple[int, int]
    column_sums: tuple[int, int]
    min_distance: int
    upper_bound: int

    @property
    def proven_optimal(self) -> bool:
        """Whether no scheme of these parameters has a larger minimum distance."""
        return self.min_distance == self.upper_bound


def verify(scheme: CodingScheme) -> Verification:
    """Count weights and column sums, and compare all pairs of codewords bit by bit."""
    bits = scheme.codewords.numpy()
    rows, columns = bits.sum(axis=1), bits.sum(axis=0)
    packed = [int.from_bytes(row.tobytes(), "big") for row in np.packbits(bits, axis=1)]
    distance = min(
        (min((word ^ other).bit_count() for other in packed[:index]) for index, word in enumerate(packed) if index),
        default=0,
    )
    return Verification(
        weights=(int(rows.min()), int(rows.max())),
        column_sums=(int(columns.min()), int(columns.max())),
        min_distance=distance,
        upper_bound=max_distance(scheme.classes, scheme.branches, scheme.active),
    )


def verify_record(record: Mapping[str, object]) -> Verification:
    """Verify a shipped record against the figures it states.

    Raises:
        InvalidOption: The scheme is damaged or does not have the stated figures.
    """
    scheme = CodingScheme.from_json(json.dumps(record["scheme"]))
    counted = verify(scheme)
    found = {"min_distance": counted.min_distance, "column_sums": list(counted.column_sums)}
    stated = {key: record[key] for key in found}
    if found != stated:
        raise InvalidOption(f"shipped coding scheme {scheme}: found {found}, expected {stated}; regenerate the file")
    return counted


def make_record(classes: int, branches: int, active: int, seed: int = 0) -> dict[str, object]:
    """Compute a scheme and return the record to ship it as, in the order in which the file lists it."""
    found = compute(classes, branches, active, seed)
    scheme = CodingScheme(torch.from_numpy(found.codewords))
    counted = verify(scheme)
    return {
        "method": found.method,
        "seed": seed,
        "min_distance": counted.min_distance,
        "column_sums": list(counted.column_sums),
        "scheme": scheme.to_dict(),
    }


def main() -> int:
    """Verify all shipped schemes; return the exit code."""
    for parameters in shipped_parameters():
        record = shipped_record(*parameters)
        counted = verify_record(record) if record else None
        print(parameters, counted, record and record["method"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
