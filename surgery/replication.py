"""Independent copies of the whole network, side by side."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from surgery.editing import Editor
from surgery.errors import InvalidOption, RewriteError
from surgery.network import ConvertedNetwork
from surgery.shapes import hollow
from surgery.slicing import Selectable
from surgery.taps import taps_of

_ALONE = (
    "one of the copies of a replicated network, expected the whole one; let surgery.prune cut it out and use what that "
    "returns"
)


def replicate(editor: Editor, copies: int, join: nn.Module, split: nn.Module | None) -> None:
    """Run copies of the whole network side by side, see `Rewriter.replicate`."""
    network, architecture = editor.network, editor.architecture
    if copies < 1:
        raise InvalidOption(f"replicate: expected at least one copy, found {copies}")
    if len(taps_of(network)):
        raise RewriteError("replicate: found taps in the network, expected none yet; put them on behind the copies")
    size = architecture.input_size if split is None else _input_size(split, copies, architecture.input_size)
    editor.touch(None)  # its shapes are copied below
    editor.settle()
    single = ConvertedNetwork.assemble(_shell(network), copy.deepcopy(network.graph))
    single.meta = {**network.meta, "architecture": editor.architecture, "methods": (), "incomplete": _ALONE}
    members = nn.ModuleList([copy.deepcopy(single) for _ in range(copies)]).train(network.training)
    for tensors in ("_modules", "_parameters", "_buffers"):
        network.__dict__[tensors] = {}
    network.members = members
    head = replace(architecture.head, path=None)
    editor.architecture = replace(editor.architecture, stem=(), stages=(), head=head, input_size=size)
    editor.stamp(_side_by_side(editor, copies, join, split), None, "replicate")


def keep_members(editor: Editor, members: Sequence[int]) -> None:
    """Keep only some of the copies, see `Rewriter.keep_members`."""
    network = editor.network
    copies = [node for node in network.graph.nodes if str(node.target).startswith("members.")]
    if not members or not 0 <= min(members) <= max(members) < len(copies):
        raise RewriteError(f"members: expected indices of {len(copies)} copies, at least one, found {list(members)}")
    (join,) = copies[0].users
    join.args = tuple(copies[i] for i in members)
    path = str(join.target)
    if isinstance(old := editor.module(path), Selectable):
        network.set_submodule(path, old.selected(members))
    editor.sweep(None)
    editor.stamp(join, None, "members")


def _side_by_side(editor: Editor, copies: int, join: nn.Module, split: nn.Module | None) -> fx.Node:
    """Give the network the graph that runs its members and return the node that joins them."""
    graph = fx.Graph()
    image = graph.placeholder("x")
    views: list[fx.Node] = [image] * copies
    if split is not None:
        whole = graph.call_module(editor.attach(editor.network, split, "split"), (image,))
        views = [graph.call_function(operator.getitem, (whole, i)) for i in range(copies)]
    outputs = [
        graph.create_node("call_module", f"members.{i}", (views[i],), name=f"members_{i}") for i in range(copies)
    ]
    joined = graph.call_module(editor.attach(editor.network, join, "join"), tuple(outputs))
    graph.output(joined)
    editor.network.graph = graph
    return joined


def _input_size(split: nn.Module, copies: int, view: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the size of the image that `split` divides into views of this size: one for all, or one a copy.

    Raises:
        RewriteError: If it does neither.
    """
    channels, height, width = view
    found: list[object] = []
    for size in ((channels, height, width), (copies * channels, height, width)):
        try:
            views = hollow(split)(torch.empty(2, *size, device="meta"))
        except Exception as error:  # a third party's module may raise anything where the size is not the one it takes
            found.append(error)
            continue
        shapes = [tuple(value.shape[1:]) if isinstance(value, Tensor) else None for value in views]
        if shapes == [view] * copies:
            return size
        found.append(shapes)
    raise RewriteError(
        f"replicate: {type(split).__name__} returned {found[0]} for one view and {found[1]} for {copies}, expected "
        f"{copies} images of {view}"
    )


def _shell(network: ConvertedNetwork) -> nn.Module:
    shell = nn.Module()
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        shell.__dict__[name] = copy.copy(network.__dict__[name])
    shell.training = network.training
    return shell
