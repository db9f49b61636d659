"""Keep a value alive: follow it through everything that may pass on the same memory, and stop in-place writes to it."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

from surgery.network import BlockModule, ConvertedNetwork, SurgeryModule
from surgery.shapes import SIZE, hollow

_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}
_VIEWS = frozenset(
    [
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "flatten",
        "unflatten",
        "ravel",
        "squeeze",
        "unsqueeze",
        "transpose",
        "permute",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "expand",
        "expand_as",
        "narrow",
        "select",
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "diagonal",
        "unfold",
        "detach",
        "contiguous",
        "to",
        "type",
        "float",
        "half",
        "double",
        "bfloat16",
        "getitem",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "drop_path",
        "stochastic_depth",
    ]
)


def protect(network: ConvertedNetwork, path: str, node: fx.Node) -> list[str]:
    """Make every in-place operation that may write to the value of `node` an out-of-place one.

    A tap before an in-place activation would otherwise silently show the activation's output.

    Args:
        network: The network.
        path: Path of the block whose graph holds the node, or "" for the root.
        node: The node.

    Returns:
        Paths of the graphs that were changed.
    """
    changed: dict[str, None] = {}
    seen: set[fx.Node] = set()
    pending = [(path, node)]
    while pending:
        where, value = pending.pop()
        for place, reader, local in _readers(network, where, value):
            if reader in seen:
                continue
            seen.add(reader)
            owner: SurgeryModule = network.block(place) if place else network
            if _defuse(owner, reader, local):
                _read_written(reader, local)
                changed[place] = None
            elif _may_alias(owner, reader):
                pending.append((place, reader))
    return list(changed)


def _readers(network: ConvertedNetwork, path: str, node: fx.Node) -> Iterator[tuple[str, fx.Node, fx.Node]]:
    """Yield the nodes that read a value, in its own graph and, where it leaves or enters a block, in the other one.

    Each comes with the path of the graph it is in, and with the node that stands for the value there.
    """
    for reader in list(node.users):
        if reader.op == "output" and path:
            call = next(iter(network.graph.find_nodes(op="call_module", target=path)))
            yield from _readers(network, "", call)
        elif (
            reader.op == "call_module"
            and not path
            and isinstance(network.get_submodule(str(reader.target)), BlockModule)
        ):
            block = network.block(str(reader.target))
            placeholders = list(block.graph.find_nodes(op="placeholder"))
            for index, argument in enumerate(reader.args):
                if argument is node:
                    yield from _readers(network, str(reader.target), placeholders[index])
        else:
            yield path, reader, node


def _read_written(writer: fx.Node, value: fx.Node) -> None:
    """Let what read `value` after it had been overwritten read what the writer returns, which is other memory now."""
    behind = False
    for node in list(writer.graph.nodes):
        if behind and value in node.all_input_nodes:
            node.replace_input_with(value, writer)
        behind = behind or node is writer


def _defuse(owner: SurgeryModule, node: fx.Node, value: fx.Node) -> bool:
    """Make `node` out-of-place if it writes to its first argument; return whether it did."""
    if not node.args or (node.args[0] is not value and value not in node.all_input_nodes[:1]):
        return False
    if node.op == "call_module":
        called = owner.get_submodule(str(node.target))
        writers = [module for module in called.modules() if getattr(module, "inplace", False) is True]
        if not writers or not _overwrites(called, value):
            return False
        for module in writers:
            module.inplace = False  # type: ignore[assignment]
        return True
    if node.op == "call_function" and node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
        node.target = name.removesuffix("_")
        return True
    return _replace_inplace_function(node, name)


def _overwrites(module: nn.Module, value: fx.Node) -> bool:
    """Return whether a module with an in-place part writes to its input: a norm with an activation writes its own."""
    if not any(True for _ in module.parameters()) or SIZE not in value.meta:
        return True
    dtype = next(module.parameters()).dtype
    probe = torch.empty(value.meta[SIZE], dtype=dtype, device="meta")
    before = probe._version
    with torch.no_grad():
        hollow(module)(probe)
    return bool(probe._version > before)


def _replace_inplace_function(node: fx.Node, name: str) -> bool:
    if node.op != "call_function" or not name.endswith("_") or name.endswith("__"):
        return False
    module = nn.functional if hasattr(nn.functional, name.removesuffix("_")) else None
    if module is None:
        return False
    node.target = getattr(module, name.removesuffix("_"))
    return True


def _may_alias(owner: SurgeryModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _VIEWS
