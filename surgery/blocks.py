"""Recognise one block: its addition, its body and shortcut, and the convolutions that its branches consist of."""

from __future__ import annotations

import operator
from typing import Literal

import torch
from torch import fx, nn

from surgery.architecture import Block, BranchKind, Channels
from surgery.errors import Refusal
from surgery.shapes import MACS, SIZE
from surgery.tracing import OWNER, is_training_flag, upstream

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)


def is_addition(node: fx.Node) -> bool:
    """Return whether `node` adds two tensors that the graph computes."""
    named = node.op == "call_function" and node.target in _ADDITIONS
    method = node.op == "call_method" and node.target in ("add", "add_")
    return (named or method) and len([arg for arg in node.args if isinstance(arg, fx.Node)]) == 2 and SIZE in node.meta


def describe_block(path: str, graph: fx.Graph, module: nn.Module) -> Block | Refusal:
    """Return the block that `graph`, the graph of the module at `path`, computes, or why it is none."""
    placeholder = next(iter(graph.nodes))
    output = _returned(graph)
    join = _join(graph, module, output)
    if not all(len(node.meta.get(SIZE, ())) == 4 for node in (placeholder, output)):
        return Refusal(path, "it passes on tokens, expected feature maps (N, C, H, W)", "use a convolutional network")
    if join is None:
        body, shortcut = output, None
    else:
        body, shortcut = _sides(join, module)
        if any(_conv(module, node) for node in upstream(body) & upstream(shortcut)):
            return Refusal(
                path,
                "its shortcut starts behind a convolution, expected at the block's input",
                "put every addition together with its body into an nn.Module of its own",
            )
    main = _main_path(body, placeholder)
    convs = [node for node in main if _conv(module, node)]
    if not convs:
        return Refusal(
            path, "no convolution on the residual body, expected at least one", "use a convolutional network"
        )
    kind, index = _branching(module, convs)
    return _block(path, graph, module, (placeholder, body, shortcut, join, output), main, convs, kind, index)


def _block(
    path: str,
    graph: fx.Graph,
    module: nn.Module,
    places: tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None, fx.Node],
    main: list[fx.Node],
    convs: list[fx.Node],
    kind: BranchKind,
    index: int,
) -> Block:
    placeholder, body, shortcut, join, output = places
    spatial = convs[index]
    merge = convs[index + 1] if index + 1 < len(convs) and _conv_of(module, convs[index + 1]).groups == 1 else None
    hidden = _conv_of(module, spatial).out_channels
    return Block(
        path=path,
        stage="",
        kind=kind,
        input=placeholder.name,
        body=body.name,
        shortcut=shortcut.name if shortcut else None,
        join=join.name if join else None,
        output=output.name,
        split=f"{path}.{convs[index - 1].target}" if index else None,
        spatial=f"{path}.{spatial.target}",
        merge=f"{path}.{merge.target}" if merge else None,
        convs=tuple(f"{path}.{conv.target}" for conv in convs),
        attention=_attention(path, main, spatial, merge) if merge else None,
        attended=_attended(main, spatial, merge) if merge else (),
        channels=Channels(placeholder.meta[SIZE][1], hidden, output.meta[SIZE][1]),
        cardinality=_conv_of(module, spatial).groups if kind == "grouped" else hidden,
        projected=shortcut is not None and _conv_count(shortcut, module) > 0,
        resolution=(int(output.meta[SIZE][-2]), int(output.meta[SIZE][-1])),
        macs=sum(node.meta.get(MACS, 0) for node in graph.nodes),
        params=sum(parameter.numel() for parameter in module.parameters()),
    )


def _returned(graph: fx.Graph) -> fx.Node:
    value = graph.output_node().args[0]
    assert isinstance(value, fx.Node)
    return value


def _join(graph: fx.Graph, module: nn.Module, output: fx.Node) -> fx.Node | None:
    """Return the last addition with only activations behind it, whose two sides both come from the block's input."""
    node = output
    while True:
        if is_addition(node) and not _is_attention(node):
            return node if all(_reads_input(source) for source in node.all_input_nodes) else None
        sources = node.all_input_nodes
        if node.op == "placeholder" or len(sources) != 1 or _conv(module, node):
            return None
        node = sources[0]


def _reads_input(node: fx.Node) -> bool:
    return any(ancestor.op == "placeholder" for ancestor in upstream(node))


def _is_attention(node: fx.Node) -> bool:
    sizes = [argument.meta[SIZE] for argument in node.all_input_nodes if SIZE in argument.meta]
    return len(sizes) == 2 and sizes[0][-2:] != sizes[1][-2:]


def _sides(join: fx.Node, module: nn.Module) -> tuple[fx.Node, fx.Node]:
    first, second = (argument for argument in join.args[:2] if isinstance(argument, fx.Node))
    body, shortcut = sorted((first, second), key=lambda node: _weight(node, module), reverse=True)
    return body, shortcut


def _weight(node: fx.Node, module: nn.Module) -> tuple[int, int]:
    convs = [conv for conv in (_conv(module, n) for n in upstream(node)) if conv]
    return len(convs), sum(max(conv.kernel_size) for conv in convs)


def _conv_count(node: fx.Node, module: nn.Module) -> int:
    return sum(_conv(module, ancestor) is not None for ancestor in upstream(node))


def _main_path(body: fx.Node, placeholder: fx.Node) -> list[fx.Node]:
    """Walk from the body back to the input along the widest tensor, so that gates and attention are side paths."""
    path = [body]
    while path[-1] is not placeholder:
        sources = [source for source in path[-1].all_input_nodes if source.meta.get(SIZE) is not None]
        if not sources:
            break
        path.append(_scaled(path[-1], sources) or max(sources, key=_area))
    return path[::-1]


def _scaled(node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """Return the factor of a product at a single position that the other one, a gate as large, is computed from."""
    if node.target not in (*_PRODUCTS, "mul", "mul_") or any(_area(source) != 1 for source in sources):
        return None
    return next((source for source in sources if all(source in upstream(other) for other in sources)), None)


def _area(node: fx.Node) -> int:
    size: torch.Size = node.meta[SIZE]
    return int(size[-1] * size[-2]) if len(size) == 4 else 1


def _branching(module: nn.Module, convs: list[fx.Node]) -> tuple[BranchKind, int]:
    """Return how the branches show, and the index of the convolution that they consist of."""
    kinds: list[BranchKind] = [_kind(_conv_of(module, node)) for node in convs]
    wanted: tuple[Literal["grouped", "depthwise"], ...] = ("grouped", "depthwise")
    for kind in wanted:
        if kind in kinds:
            return kind, kinds.index(kind)
    return "plain", max(len(convs) - 2, 0)


def _kind(conv: nn.Conv2d) -> BranchKind:
    if conv.groups == 1:
        return "plain"
    return "depthwise" if conv.groups == conv.in_channels == conv.out_channels else "grouped"


def _attention(path: str, main: list[fx.Node], spatial: fx.Node, merge: fx.Node) -> str | None:
    between = main[main.index(spatial) + 1 : main.index(merge)]
    for node in between:
        if len([source for source in node.all_input_nodes if SIZE in source.meta]) > 1:
            owner = str(node.meta.get(OWNER, path))
            return owner if owner.startswith(f"{path}.") else f"{path}.{node.name}"
    return None


def _attended(main: list[fx.Node], spatial: fx.Node, merge: fx.Node) -> tuple[str, ...]:
    """Return the values between `spatial` and `merge` that a side path reads, too."""
    places = range(main.index(spatial), main.index(merge))
    return tuple(
        main[place].name
        for place in places
        if any(user is not main[place + 1] and SIZE in user.meta for user in main[place].users)
    )


def _conv(module: nn.Module, node: fx.Node) -> nn.Conv2d | None:
    if node.op != "call_module" or is_training_flag(node):
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, nn.Conv2d) else None


def _conv_of(module: nn.Module, node: fx.Node) -> nn.Conv2d:
    conv = _conv(module, node)
    assert conv is not None
    return conv
