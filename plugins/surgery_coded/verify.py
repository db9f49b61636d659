"""Recompute everything a coding scheme claims, by other means than the search used.

`python -m surgery_coded.verify` prints a line per shipped scheme and fails where one does not hold what its file says.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import InvalidOption
from surgery_coded.scheme import CodingScheme
from surgery_coded.search import compute, shipped_parameters, shipped_record

_BLOCK = 256  # rows compared at a time with all others


@dataclass(frozen=True)
class Verification:
    """What was counted on the codewords.

    Attributes:
        weights: Smallest and largest number of ones in a row.
        column_sums: Smallest and largest number of ones in a column.
        min_distance: Smallest Hamming distance over all pairs of rows; 0 for one row.
        upper_bound: Largest minimum distance that is not proven impossible, see `CodingScheme.upper_bound`.
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
    return Verification(
        weights=(int(rows.min()), int(rows.max())),
        column_sums=(int(columns.min()), int(columns.max())),
        min_distance=_closest(np.packbits(bits, axis=1)),
        upper_bound=scheme.upper_bound,
    )


def _closest(rows: NDArray[np.uint8]) -> int:
    """Return the fewest bits in which two rows, packed to bytes, differ; 0 for one row."""
    if len(rows) < 2:
        return 0
    words = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))).view(np.uint64)  # (K, N / 64)
    closest = []
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        differing = np.bitwise_count(block[:, None] ^ words[start:]).sum(axis=2, dtype=np.uint32)
        differing[np.tril_indices(len(block))] = 8 * words[0].nbytes  # pairs seen before, and of a row with itself
        closest.append(differing.min())
    return int(min(closest))


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
        if record is None:
            continue
        counted = verify_record(record)
        known = "proven optimal" if counted.proven_optimal else f"at most {counted.upper_bound}"
        least, most = counted.column_sums
        classes, branches, active, seed = parameters
        print(
            f"{classes} classes, {active}/{branches} branches active, seed {seed}: min_distance "
            f"{counted.min_distance} ({known}), column sums {least}..{most}; {record['method']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
