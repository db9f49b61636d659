"""Coded ResNeXt: every class flows through its own branches."""

from surgery import Method, hookimpl
from surgery_coded.assignment import assign as assign
from surgery_coded.assignment import taxonomy_similarity as taxonomy_similarity
from surgery_coded.binary import BinaryReport as BinaryReport
from surgery_coded.binary import choose_threshold as choose_threshold
from surgery_coded.binary import judge as judge
from surgery_coded.decoding import early_decode as early_decode
from surgery_coded.method import Coded as Coded
from surgery_coded.pruner import mask_branches as mask_branches
from surgery_coded.pruner import switch_branches as switch_branches
from surgery_coded.scheme import CodingScheme as CodingScheme


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    """Provide the method `coded`."""
    return [Coded]
