"""Coding schemes computed anew, beside the figures of the paper, and codewords handed out by similarity.

python benchmarks/schemes.py

No shipped file is read. Seconds are CPU time and do not influence the result, for the search counts moves. Distance and
column sums are recounted by the verifier. The paper has figures for its own networks alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from harness import write
from numpy.typing import NDArray

from surgery_coded import CodingScheme, assign, taxonomy_similarity
from surgery_coded.search import compute
from surgery_coded.verify import verify

# (classes, branches, active) -> minimum distance, smallest and largest column sum in the paper's appendix.
PAPER: dict[tuple[int, int, int], tuple[int, int, int] | None] = {
    (10, 10, 5): (4, 5, 5),
    (10, 10, 3): (4, 3, 3),
    (100, 20, 8): (8, 40, 40),
    (100, 20, 4): (4, 20, 20),
    (1000, 32, 16): (10, 499, 501),
    (1000, 32, 8): (6, 249, 251),
    (100, 10, 5): None,
    (200, 16, 8): None,
    (365, 32, 8): None,
    (1000, 64, 16): None,
    (1000, 32, 4): None,
    (10, 8, 4): None,
    (100, 32, 8): None,
    (1000, 24, 12): None,
    (5000, 64, 16): None,
    (21841, 64, 32): None,
}
# Made-up trees: the number of classes of a group at each level, coarse to fine.
TREES = {(100, 20, 8): (5,), (1000, 32, 16): (100, 10), (1000, 32, 8): (100, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    found, assigned = [], []
    for parameters in PAPER:
        row, scheme = search(parameters)
        found.append(row)
        if parameters in TREES:
            assigned.append(hand_out(scheme, TREES[parameters]))
        print(row, flush=True)
    print(write("schemes", {"seed": 0, "schemes": found, "assignment": assigned}))


def search(parameters: tuple[int, int, int]) -> tuple[dict[str, Any], CodingScheme]:
    start = time.process_time()
    computed = compute(*parameters, seed=0)
    seconds = time.process_time() - start
    scheme = CodingScheme(torch.from_numpy(computed.codewords))
    counted = verify(scheme)
    paper = PAPER[parameters]
    row = {
        **dict(zip(("classes", "branches", "active"), parameters, strict=True)),
        "min_distance": counted.min_distance,
        "column_sums": list(counted.column_sums),
        "spread": counted.column_sums[1] - counted.column_sums[0],
        "upper_bound": counted.upper_bound,
        "proven_optimal": counted.proven_optimal,
        "paper": None if paper is None else {"min_distance": paper[0], "column_sums": list(paper[1:])},
        "seconds": seconds,
        "method": computed.method,
    }
    return row, scheme


def hand_out(scheme: CodingScheme, sizes: tuple[int, ...]) -> dict[str, Any]:
    similarity = taxonomy_similarity([[k // size for k in range(scheme.classes)] for size in sizes])
    shuffled = CodingScheme(
        scheme.codewords[torch.randperm(scheme.classes, generator=torch.Generator().manual_seed(0))]
    )
    start = time.process_time()
    assigned = assign(shuffled, similarity)
    seconds = time.process_time() - start
    return {
        "classes": scheme.classes,
        "branches": scheme.branches,
        "active": scheme.active,
        "group_sizes": list(sizes),
        "random": shared(shuffled, similarity),
        "assigned": shared(assigned, similarity),
        "most": scheme.active - scheme.min_distance // 2,
        "seconds": seconds,
    }


def shared(scheme: CodingScheme, similarity: NDArray[np.float64]) -> list[float]:
    """Return the mean number of branches that two classes share, by the depth of their common ancestor."""
    bits = scheme.codewords.numpy().astype(np.float64)
    overlap, other = bits @ bits.T, ~np.eye(len(bits), dtype=bool)
    return [float(overlap[(similarity == value) & other].mean()) for value in np.unique(similarity)]


if __name__ == "__main__":
    main()
