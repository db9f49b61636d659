"""From a traced network to its `Architecture`, with a reason for everything that was left out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import groupby

from torch import fx, nn

from surgery.architecture import Architecture, Block, Head, Stage
from surgery.blocks import describe_block, is_addition
from surgery.errors import InvalidOption, Refusal
from surgery.nesting import Nested, nest
from surgery.shapes import MACS, SIZE, propagate, resolve_input_size
from surgery.tracing import OWNER, OWNERS, is_training_flag, trace


def inspect(model: nn.Module, input_size: int | tuple[int, int] | None = None) -> Architecture:
    """Find the stages, blocks, branches and the head of a network; the model is left untouched.

    Args:
        model: A torchvision or timm network, or your own, plain or converted.
        input_size: Side of the image in pixels, or (height, width); resolutions and MACs refer to it. Default: what the
            network's `pretrained_cfg` says, else 224.

    Returns:
        The architecture; `print` it for a table. Places that cannot be used are in `.refusals`, each with its reason.

    Raises:
        TraceError: If the network cannot be traced.
        UnsupportedModel: If it is wrapped, or cannot run at this size.
        InvalidOption: If `input_size` is no size, or another one than a converted network was converted for.
    """
    known = getattr(model, "meta", {}).get("architecture") if isinstance(model, fx.GraphModule) else None
    if isinstance(known, Architecture):
        size = resolve_input_size(model, fx.Graph(), input_size or known.input_size[1:])
        if size[1:] != known.input_size[1:]:
            raise InvalidOption(
                f"input_size: the network was converted for {known.input_size[1]} x {known.input_size[2]}, found "
                f"{size[1]} x {size[2]}; inspect the original, or convert it with that input_size"
            )
        return known
    return analyze(model, input_size)[0]


def analyze(model: nn.Module, input_size: int | tuple[int, int] | None = None) -> tuple[Architecture, Nested]:
    """Return the architecture of `model` and its graphs, root and blocks; the model is left untouched."""
    graph = trace(model)
    size = resolve_input_size(model, graph, input_size)
    propagate(model, graph, size)
    owners = _candidates(model, graph)
    nested = nest(graph, owners)
    refusals = [*nested.refusals]
    blocks: list[Block] = []
    for path in [path for path in owners if path in nested.blocks]:
        found = describe_block(path, nested.blocks[path], model.get_submodule(path))
        if isinstance(found, Block):
            blocks.append(found)
        else:
            refusals.append(found)
    if len(blocks) != len(nested.blocks):
        nested = nest(graph, [block.path for block in blocks])
    explained = [*(block.path for block in blocks), *(refusal.path for refusal in refusals)]
    architecture = Architecture(
        name=type(model).__name__,
        stem=_stem(nested.root, {block.path for block in blocks}),
        stages=_stages(blocks),
        head=find_head(model, graph),
        input_size=size,
        macs=sum(node.meta.get(MACS, 0) for node in graph.nodes),
        params=sum(parameter.numel() for parameter in model.parameters()),
        refusals=(*refusals, *_unused_joins(graph, explained)),
    )
    return architecture, nested


def _candidates(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Return the paths of modules that may be blocks, in the order of execution.

    Residual blocks are the owners of additions whose module holds a spatial convolution; blocks without a shortcut
    are their siblings: same place in the hierarchy, at least two convolutions.
    """
    joins = dict.fromkeys(node.meta[OWNER] for node in graph.nodes if is_addition(node) and node.meta.get(OWNER))
    residual = [path for path in joins if _spatial_convs(model, path) >= 1]
    residual = [path for path in residual if not _holds_several(path, residual)]
    residual = [path for path in residual if not any(path.startswith(f"{other}.") for other in residual)]
    patterns = {_pattern(path) for path in residual}
    entered = dict.fromkeys(owner for node in graph.nodes for owner in node.meta.get(OWNERS, ()) if "@" not in owner)
    siblings = [path for path in entered if path and _pattern(path) in patterns and _convs(model, path) >= 2]
    return [path for path in entered if path in residual or path in siblings]


def _holds_several(path: str, others: list[str]) -> bool:
    return sum(other.startswith(f"{path}.") for other in others) >= 2


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _convs(model: nn.Module, path: str) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.get_submodule(path).modules())


def _spatial_convs(model: nn.Module, path: str) -> int:
    modules = model.get_submodule(path).modules()
    return sum(isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 for module in modules)


def _stages(blocks: list[Block]) -> tuple[Stage, ...]:
    runs = [list(run) for _, run in groupby(blocks, key=lambda block: block.resolution)]
    parents = [{block.path.rpartition(".")[0] for block in run} for run in runs]
    shared = Counter(parent for group in parents for parent in group)
    stages = []
    for number, (run, group) in enumerate(zip(runs, parents, strict=True), start=1):
        only = next(iter(group))
        # A container may itself be called stage<number>; names of stages are unique.
        numbered = f"group{number}" if f"stage{number}" in shared else f"stage{number}"
        name = only if len(group) == 1 and only and shared[only] == 1 else numbered
        stages.append(Stage(name, tuple(replace(block, stage=name) for block in run)))
    return tuple(stages)


def _stem(root: fx.Graph, blocks: set[str]) -> tuple[str, ...]:
    paths: list[str] = []
    for node in root.nodes:
        if node.op == "call_module" and not is_training_flag(node):
            if node.target in blocks:
                return tuple(paths)
            paths.append(str(node.target))
    return ()


def find_head(model: nn.Module, graph: fx.Graph) -> Head:
    """Return the classifier: the linear layer or 1x1 convolution that the output of `graph` comes from.

    An addition or a norm on the way back means that the network ends with its features.
    """
    node = next(iter(graph.find_nodes(op="output"))).args[0]
    while isinstance(node, fx.Node):
        module = (
            model.get_submodule(str(node.target)) if node.op == "call_module" and not is_training_flag(node) else None
        )
        if isinstance(module, nn.Linear):
            return Head(str(node.target), module.out_features)
        if isinstance(module, nn.Conv2d):
            return Head(str(node.target), module.out_channels) if module.kernel_size == (1, 1) else Head(None, None)
        if isinstance(module, nn.modules.batchnorm._NormBase) or is_addition(node):
            return Head(None, None)
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return Head(None, None)


def _unused_joins(graph: fx.Graph, explained: list[str]) -> list[Refusal]:
    """Say for every kind of junction outside the `explained` modules why it is not one."""
    inside = set(explained)
    found: dict[str, Refusal] = {}
    for node in graph.nodes:
        owners = {owner.partition("@")[0] for owner in node.meta.get(OWNERS, ())}
        if inside & owners or SIZE not in node.meta:
            continue
        reason, cure = _reason(node)
        where = node.meta.get(OWNER) or node.name
        if reason:
            found.setdefault(_pattern(where) + reason, Refusal(f"{where} (node {node.name})", reason, cure))
    if not found and not explained:
        first = next(iter(graph.nodes)).name
        reason = "no residual addition was found: in a plain chain no layer can be left out, and no branch exists"
        found["chain"] = Refusal(f"(root) (node {first})", reason, "use a residual network such as resnext50_32x4d")
    return list(found.values())


def _reason(node: fx.Node) -> tuple[str, str]:
    name = getattr(node.target, "__name__", str(node.target))
    if name in ("cat", "concat", "concatenate"):
        return (
            "paths are joined by concatenation, expected an addition",
            "use a network whose blocks add their shortcut",
        )
    if is_addition(node):
        return (
            "the residual addition has no spatial convolution in its body, or its body is no module of its own",
            "use a convolutional network, or move the body and its addition into one nn.Module",
        )
    return "", ""
