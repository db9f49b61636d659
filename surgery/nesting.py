"""Carve the blocks out of a flat graph: the root graph then calls each block as one module.

In one flat graph block hooks never fire, block-wise sharding fails, and neither gradient checkpointing nor gathered
skipping has anything to call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from surgery.errors import Refusal
from surgery.shapes import MACS, SIZE
from surgery.tracing import CONSTANT, MARK, OWNER, OWNERS

_KEPT_META = (SIZE, MACS, OWNER, CONSTANT, MARK)


@dataclass
class Nested:
    """A network as a root graph and one graph per block.

    Attributes:
        root: Graph whose `call_module` targets are leaves and block paths.
        blocks: Block path -> graph of that block, with targets relative to the block.
        refusals: Why a candidate stayed flat.
    """

    root: fx.Graph
    blocks: dict[str, fx.Graph]
    refusals: tuple[Refusal, ...]


def nest(flat: fx.Graph, paths: Iterable[str]) -> Nested:
    """Return `flat` with the modules at `paths` as calls.

    A module that runs twice, that has more than one tensor in or out, or that contains another of them, is refused and
    stays flat.
    """
    regions: dict[str, list[fx.Node]] = {}
    refusals: list[Refusal] = []
    for path in paths:
        nodes = [node for node in flat.nodes if path in node.meta.get(OWNERS, ())]
        reason = _why_not(flat, path, nodes)
        if reason:
            refusals.append(Refusal(path, reason))
        else:
            regions[path] = nodes
    for path in [path for path in regions if any(inner.startswith(f"{path}.") for inner in regions)]:
        del regions[path]
        refusals.append(Refusal(path, "it contains blocks of its own, which are taken instead"))
    return Nested(_root(flat, regions), {path: _inner(path, nodes) for path, nodes in regions.items()}, tuple(refusals))


def _why_not(flat: fx.Graph, path: str, nodes: list[fx.Node]) -> str:
    if any(f"{path}@1" in node.meta.get(OWNERS, ()) for node in flat.nodes):
        return "the module runs more than once in a forward pass, so it is not one block"
    inputs, outputs = _inputs(nodes), _outputs(nodes)
    if len(inputs) != 1 or len(outputs) != 1:
        return f"expected one tensor in and one out, found {len(inputs)} in and {len(outputs)} out"
    for node in nodes:
        if node.op in ("call_module", "get_attr") and not _is_local(node, path):
            return f"it uses {node.target}, which belongs to another module"
    return ""


def _is_local(node: fx.Node, path: str) -> bool:
    return str(node.target).startswith(f"{path}.") or CONSTANT in node.meta


def _inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    found = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return list(found)


def _outputs(nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def _root(flat: fx.Graph, regions: dict[str, list[fx.Node]]) -> fx.Graph:
    root = fx.Graph()
    inside = {node: path for path, nodes in regions.items() for node in nodes}
    exits = {_outputs(nodes)[0]: path for path, nodes in regions.items()}
    copies: dict[fx.Node, fx.Node] = {}
    for node in flat.nodes:
        if node in exits:
            path = exits[node]
            source = copies[_inputs(regions[path])[0]]
            copies[node] = root.create_node("call_module", path, (source,), name=path.replace(".", "_"))
            _copy_meta(node, copies[node])
        elif node not in inside:
            copies[node] = _copy(node, root, copies, prefix="")
    return root


def _inner(path: str, nodes: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    source = _inputs(nodes)[0]
    copies = {source: graph.placeholder("x")}
    copies[source].meta[SIZE] = source.meta.get(SIZE)
    for node in nodes:
        copies[node] = _copy(node, graph, copies, prefix=f"{path}.")
    graph.output(copies[_outputs(nodes)[0]])
    return graph


def _copy(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node], prefix: str) -> fx.Node:
    target = node.target
    if isinstance(target, str) and node.op in ("call_module", "get_attr"):
        target = target.removeprefix(prefix)
    args = fx.node.map_arg(node.args, lambda n: copies[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: copies[n])
    if node.op == "output":
        returned: fx.Node = graph.output(args[0])
        return returned
    name = target if isinstance(target, str) else getattr(target, "__name__", node.name)
    twin: fx.Node = graph.create_node(node.op, target, args, kwargs, name=name.replace(".", "_"))
    _copy_meta(node, twin)
    return twin


def _copy_meta(node: fx.Node, twin: fx.Node) -> None:
    twin.meta.update({key: node.meta[key] for key in _KEPT_META if key in node.meta})
