"""Edits that take something away: a body, branches, channels, classes, or parts of what a method inserted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from surgery.architecture import Block
from surgery.channels import ChannelMap, Scatter, Select, channel_map
from surgery.editing import Editor, hand_over_hooks
from surgery.errors import RewriteError
from surgery.slicing import Selectable, cut_spaces, cut_widths, keep_branches, slice_module
from surgery.tracing import SITE


def bypass(editor: Editor, block: Block) -> None:
    """Remove the body of a residual block, see `Rewriter.bypass`."""
    if block.join is None or block.shortcut is None:
        raise RewriteError(
            f"{block.path}: it has no shortcut, so nothing is left when its body is removed; keep the block"
        )
    join = editor.node(block.join, block)
    editor.protect(join, block)
    join.replace_all_uses_with(editor.node(block.shortcut, block))
    editor.sweep(block)
    editor.record(block, "bypass", block.join)


def remove(editor: Editor, path: str) -> None:
    """Take an inserted pass-through module out again, see `Rewriter.remove`."""
    node, at = editor.call(path), editor.block_of(path)
    if SITE not in node.meta:
        raise RewriteError(f"{path}: it belongs to the source network, expected a module that a method inserted")
    source = node.all_input_nodes[0]
    editor.protect(node, at)
    node.replace_all_uses_with(source)
    editor.move(at, node, source)
    editor.sweep(at)
    editor.record(at, "remove", source.name)


def select(editor: Editor, path: str, keep: Sequence[int]) -> None:
    """Replace an inserted module by a part of it, see `Rewriter.select`."""
    node, at, old = editor.call(path), editor.block_of(path), editor.module(path)
    if not isinstance(old, Selectable):
        raise RewriteError(f"{path}: {type(old).__name__} has no method `selected`, so no part of it can be kept")
    new = old.selected(keep)
    if not [*old.parameters(), *old.buffers()]:  # it could not tell its part where to be
        editor.adopt(editor.owner(at), new, old)
    hand_over_hooks(old, new)
    editor.network.set_submodule(path, new)
    node.args = node.args[: _positional(new)]
    editor.sweep(at)
    editor.stamp(node, at, "select")


def keep(editor: Editor, block: Block, branches: Sequence[int], of: int | None) -> Block:
    """Keep only some branches of a block, see `Rewriter.keep`."""
    editor.describe(block)
    kept = keep_branches(editor.owner(block), block, branches, of)
    editor.architecture = editor.architecture.with_block(kept)
    editor.touch(block)
    editor.describe(block)
    editor.record(kept, "keep", block.merge or block.output)
    return editor.architecture.block(block.path)


def narrow(editor: Editor, path: str, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> None:
    """Keep only some channels of a convolution inside a block, see `Rewriter.narrow`."""
    at = editor.block_of(path)
    if at is None:
        raise RewriteError(f"{path}: expected a convolution inside a block, found one of the root; use scale")
    if (inputs is not None and not inputs) or (outputs is not None and not outputs):
        raise RewriteError(f"{path}: expected at least one channel to keep; use bypass to remove the whole body")
    owner, call = editor.owner(at), editor.call(path)
    editor.describe(at)
    for wanted, node in ((inputs, call.all_input_nodes[0]), (outputs, call)):
        if wanted is None:
            continue
        channels = channel_map(owner)
        if channels.pins_of(channels.nodes["", node.name]):
            node = _detach(editor, channels, node, call, at)
            channels = channel_map(owner)
        cut_spaces(owner, channels, {channels.nodes["", node.name]: torch.tensor(wanted)}, path)
        editor.touch(at)
        editor.describe(at)
    editor.record(at, "narrow", call.name)


def keep_classes(editor: Editor, classes: Sequence[int]) -> None:
    """Keep only some rows of the classifier, see `Rewriter.keep_classes`."""
    network, head = editor.network, editor.architecture.head
    if head.path is None or head.classes is None:
        raise RewriteError(f"{editor.architecture.name}: no classifier was found, so no class can be removed")
    if not classes or min(classes) < 0 or max(classes) >= head.classes:
        raise RewriteError(
            f"{head.path}: expected classes in 0..{head.classes - 1}, at least one, found {list(classes)}"
        )
    rows = torch.tensor(list(classes))
    network.set_submodule(head.path, slice_module(editor.module(head.path), None, rows))
    editor.architecture = replace(editor.architecture, head=replace(head, classes=len(classes)))
    if "num_classes" in vars(network):
        vars(network)["num_classes"] = len(classes)
    for node in network.graph.find_nodes(op="call_module", target=head.path):
        editor.stamp(node, None, "classes")


def scale(editor: Editor, widths: Mapping[str, int | Sequence[int]], *, exact: bool = True) -> None:
    """Set the output channels of convolutions throughout the network, see `Rewriter.scale`."""
    editor.describe(None)
    editor.touch(None)
    for path in cut_widths(editor.network, widths, exact=exact):
        editor.touch(editor.block_of(path))
    for path in widths:
        editor.record(editor.block_of(path), "scale", path)
    editor.describe(None)


def _detach(editor: Editor, channels: ChannelMap, node: fx.Node, call: fx.Node, at: Block) -> fx.Node:
    """Give the convolution that `call` runs its own copy of the channels of `node`, and return a node that has them."""
    width = channels.sizes[channels.find(channels.nodes["", node.name])]
    everything = torch.arange(width)
    if node is call:
        last = node
        while len(users := list(last.users)) == 1 and _hands_on(channels, users[0]):
            last = users[0]
        editor.insert(Scatter(everything, width), last.name, at=at, role="scatter")
    else:
        reader = call
        while len(node.users) == 1 and _hands_on(channels, node):
            reader, node = node, node.all_input_nodes[0]
        name = editor.insert(Select(everything), node.name, at=at, role="select", users=[reader.name])
        node = editor.node(name, at)
    editor.describe(at)
    return node


def _hands_on(channels: ChannelMap, node: fx.Node) -> bool:
    """Return whether `node` hands on the channels of its first input, and of no other value."""
    values = [channels.nodes.get(("", value.name)) for value in (node, *node.all_input_nodes)]
    spaces = [channels.find(space) for space in values if space is not None]
    return len(spaces) > 1 and spaces.count(spaces[0]) == 2 and spaces[0] == spaces[1]


def _positional(module: nn.Module) -> int | None:
    """Return how many arguments the forward of `module` takes, or None where it takes any number."""
    parameters = inspect.signature(module.forward).parameters.values()
    return None if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)
