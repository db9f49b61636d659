"""Make the modules of `examples/` and `benchmarks/` importable; to be imported before any of them."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
