import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
# the examples are scripts: they import their neighbours, as Python lets a script do
sys.path.insert(0, str(EXAMPLES))
