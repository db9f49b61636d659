"""Compare what a method does to a network with a text that people can read."""

from __future__ import annotations

import difflib
import textwrap

from torch import nn

from surgery.conversion import convert, prepare, resolve_method
from surgery.errors import ConformanceError
from surgery.method import Method
from surgery.network import ConvertedNetwork, SurgeryModule
from surgery.show import show
from surgery.tracing import SITE


def assert_rewrites(
    network: nn.Module,
    method: Method | str,
    expected: str | None = None,
    *,
    inserted: int | None = None,
    removed: int | None = None,
    replaced: int | None = None,
    input_size: int | tuple[int, int] | None = 32,
) -> ConvertedNetwork:
    """Convert a network and require the result to read as expected.

    Args:
        network: The network; it is left untouched.
        method: As in `surgery.convert`.
        expected: What `surgery.show` prints, compared without common indentation and surrounding blank lines.
        inserted: Number of nodes that are new, root and blocks together.
        removed: Number of nodes that are gone.
        replaced: Number of nodes that were there before and call another module, or other arguments, now.
        input_size: As in `surgery.convert`.

    Returns:
        The converted network, for further checks.

    Raises:
        ConformanceError: If the text or a number differs; the message holds the differing lines.
    """
    instance = resolve_method(method, {})
    converted = convert(network, instance, input_size=input_size)
    before, after = _nodes(prepare(network, instance, input_size)), _nodes(converted)
    stamped = sum(after[name] for name in after.keys() & before.keys())
    counts = {
        "inserted": (len(after.keys() - before.keys()), inserted),
        "removed": (len(before.keys() - after.keys()), removed),
        "replaced": (stamped, replaced),
    }
    wrong = [
        f"{found} nodes {kind}, expected {wanted}"
        for kind, (found, wanted) in counts.items()
        if wanted not in (None, found)
    ]
    text = show(converted, network)
    if expected is not None and textwrap.dedent(expected).strip() != text.strip():
        lines = difflib.unified_diff(
            textwrap.dedent(expected).strip().splitlines(), text.splitlines(), "expected", "found", lineterm=""
        )
        wrong.append("the text differs:\n" + "\n".join(lines))
    if wrong:
        raise ConformanceError(f"rewrites: {instance.name} on {type(network).__name__}: " + "; ".join(wrong))
    return converted


def _nodes(network: ConvertedNetwork) -> dict[tuple[str, str], bool]:
    """Return the nodes of all graphs by block path and name, and whether a method stamped them."""
    found: dict[tuple[str, str], bool] = {}
    for path, module in network.named_modules():
        if isinstance(module, SurgeryModule):
            found |= {(path, node.name): SITE in node.meta for node in module.graph.nodes}
    return found
