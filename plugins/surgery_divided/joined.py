"""S small networks as one graph, on values that hold the channels of all of them: (B, S*C, H, W)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor, fx, nn

from surgery.errors import UnsupportedModel
from surgery_divided.channelwise import is_channelwise
from surgery_divided.choice import SEPARATE, Chooser
from surgery_divided.ensemble import SplitViews
from surgery_divided.folding import CONVS, SHAPE, TENSORS, Layers, layers_of, module_of

_INPUT = "images"


@dataclass(frozen=True)
class _Value:
    """What a node of one small network is in the graph of all.

    Attributes:
        kind: "joined": one tensor, networks along the channels. "apart": what each network has. "same": what all have
            in common and is no tensor, such as a size. "views": one view of the image for all, or one for each.
        nodes: One; S where apart.
    """

    kind: Literal["joined", "apart", "same", "views"]
    nodes: tuple[fx.Node, ...]


class FirstConv(nn.Module):
    """The first convolutions of all networks as one, on one view of an image or on one for each network.

    Args:
        convs: One for each network, with one group.

    Shape:
        (B, C, H, W) or (B, S*C, H, W) to (B, S*D, H, W).
    """

    def __init__(self, convs: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.own = joined_conv(convs)
        self.shared = copy.copy(self.own)  # with the same weights
        self.shared.groups, self.shared.in_channels = 1, convs[0].in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Return what every network sees first."""
        conv = self.shared if images.shape[1] == self.shared.in_channels else self.own
        result: Tensor = conv(images)
        return result


class AllViews(nn.Module):
    """Repeat an image that all networks see, so that each has a view of its own.

    Shape:
        (B, C, H, W) or (B, S*C, H, W) to (B, S*C, H, W).
    """

    def __init__(self, networks: int, channels: int) -> None:
        super().__init__()
        self.networks, self.channels = networks, channels

    def forward(self, images: Tensor) -> Tensor:
        """Return one view for each network."""
        return images.repeat(1, self.networks, 1, 1) if images.shape[1] == self.channels else images


class JoinedLinear(nn.Module):
    """Linear layers of S networks as one batched product.

    Shape:
        (B, S*inputs) to (B, S*outputs).
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.T for layer in layers]), requires_grad=False)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)[:, None], requires_grad=False) if biases else None

    def forward(self, value: Tensor) -> Tensor:
        """Return what each network makes of its own part."""
        parts = value.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        if self.bias is None:
            return torch.bmm(parts, self.weight).transpose(0, 1).flatten(1)
        return torch.baddbmm(self.bias, parts, self.weight).transpose(0, 1).flatten(1)


def joined_conv(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Return one convolution with S times the groups."""
    joined = copy.deepcopy(convs[0])
    joined.groups, joined.in_channels = joined.groups * len(convs), joined.in_channels * len(convs)
    joined.out_channels *= len(convs)
    joined.weight = nn.Parameter(torch.cat([conv.weight for conv in convs]), requires_grad=False)
    biases = [conv.bias for conv in convs if conv.bias is not None]
    joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return joined


def joined_norm(norms: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """Return one norm of all channels, in eval mode."""
    joined = copy.deepcopy(norms[0])
    joined.num_features *= len(norms)
    for name, tensor in (*joined.named_parameters(), *joined.named_buffers()):
        if tensor.dim():  # the number of batches is of no use here
            tensor.data = torch.cat([getattr(norm, name) for norm in norms])
    return joined


def join(members: Sequence[fx.GraphModule], chooser: Chooser) -> fx.GraphModule:
    """Return one graph that maps images to a tuple of S logits.

    Args:
        members: As `folding.folded` returns them.
        chooser: Asked for every convolution but the first.

    Raises:
        UnsupportedModel: If the networks differ in more than their weights.
    """
    check_alike(members)
    return _Joiner(members, chooser).run()


def check_alike(members: Sequence[fx.GraphModule]) -> None:
    """Refuse networks that differ in more than their weights.

    Raises:
        UnsupportedModel: If some do.
    """
    first, *others = ((str(member.graph), _kinds(member)) for member in members)
    for number, other in enumerate(others, 1):
        if other != first:
            raise UnsupportedModel(
                f"members.{number}: its layers differ from those of members.0, expected the same in all networks; "
                "run them one after the other, form='apart'"
            )


def _kinds(member: fx.GraphModule) -> dict[str, str]:
    return {path: repr(module) for path, module in member.named_modules() if path}


class _Joiner:
    """Build the graph of all networks, node by node of the first of them."""

    def __init__(self, members: Sequence[fx.GraphModule], chooser: Chooser) -> None:
        self.members, self.chooser = members, chooser
        self.own: list[Layers] = [layers_of(member) for member in members]
        self.networks = len(members)
        self.graph, self.layers = fx.Graph(), Layers()
        self.values: dict[fx.Node, _Value] = {}
        self._other_kinds: dict[tuple[fx.Node, str], tuple[fx.Node, ...]] = {}
        self._numbers = count()

    def run(self) -> fx.GraphModule:
        for node in self.members[0].graph.nodes:
            if node.op == "placeholder":
                self.values[node] = _Value("views", (self.graph.placeholder(_INPUT),))
            elif node.op == "output":
                self.graph.output(self._apart(node.args[0]))
            else:
                self.values[node] = self._value(node)
        self.graph.lint()
        return fx.GraphModule(self.layers, self.graph).eval().requires_grad_(requires_grad=False)

    def _value(self, node: fx.Node) -> _Value:
        if not node.meta[TENSORS]:
            return _Value("same", (self._copy(node, 0),))
        modules = [module_of(node, layers) for layers in self.own]
        if None in modules:
            modules = [None] * self.networks  # a hook on one of them counts for all
        joined = self._weighted(node, modules)
        if joined is not None:
            return joined
        if is_channelwise(node, modules[0]):
            kinds = {self.values[source].kind for source in node.all_input_nodes if source.meta[SHAPE] is not None}
            if kinds == {"views"} and len(node.meta[SHAPE]) == 4:
                return _Value("views", (self._call(node, self._views, modules[0]),))
            if kinds != {"apart"}:
                return _Value("joined", (self._call(node, self._joined, modules[0]),))
        return _Value("apart", tuple(self._copy(node, i) for i in range(self.networks)))

    def _weighted(self, node: fx.Node, modules: Sequence[nn.Module | None]) -> _Value | None:
        """Return the value of a layer whose weights can be those of all networks; None where they cannot."""
        first = modules[0]
        made: nn.Module
        if first is None or len(node.args) != 1 or not isinstance(source := node.args[0], fx.Node):
            return None
        if type(first) in CONVS and len(node.meta[SHAPE]) == 4:
            convs = [module for module in modules if isinstance(module, nn.Conv2d)]
            if self.values[source].kind == "views" and convs[0].groups == 1:
                return _Value("joined", (self._call(node, self._views, FirstConv(convs)),))
            made = joined_conv(convs)
            if self.chooser.choose(str(node.target), made, convs, source.meta[SHAPE]) == SEPARATE:
                return None
        elif type(first) is nn.BatchNorm2d and first.running_mean is not None:
            made = joined_norm([module for module in modules if isinstance(module, nn.BatchNorm2d)])
        elif type(first) is nn.Linear and len(node.meta[SHAPE]) == 2:
            made = JoinedLinear([module for module in modules if isinstance(module, nn.Linear)])
        else:
            return None
        return _Value("joined", (self._call(node, self._joined, made),))

    def _call(self, node: fx.Node, of: Callable[[fx.Node], fx.Node], module: nn.Module | None) -> fx.Node:
        """Add one call for all networks, and return its node."""
        target = node.target
        if module is not None:
            target = f"{node.name}_joined"
            self.layers[target] = module
        args, kwargs = fx.node.map_arg(node.args, of), fx.node.map_arg(node.kwargs, of)
        return self.graph.create_node(node.op, target, args, kwargs, name=node.name)

    def _copy(self, node: fx.Node, i: int) -> fx.Node:
        """Add the call of network i, and return its node."""
        target = node.target
        if node.op in ("call_module", "get_attr"):
            target = f"members.{i}.{node.target}"
            self.layers[target] = self.own[i][str(node.target)]
        args = fx.node.map_arg(node.args, lambda source: self._apart(source)[i])
        kwargs = fx.node.map_arg(node.kwargs, lambda source: self._apart(source)[i])
        return self.graph.create_node(node.op, target, args, kwargs, name=f"{node.name}_{i}")

    def _apart(self, source: fx.Node) -> tuple[fx.Node, ...]:
        value = self.values[source]
        if value.kind == "apart":
            return value.nodes
        if value.kind == "same":
            return value.nodes * self.networks
        return self._once(source, "apart", self._split)

    def _joined(self, source: fx.Node) -> fx.Node:
        value = self.values[source]
        if value.kind in ("joined", "same"):
            return value.nodes[0]
        return self._once(source, "joined", self._gather)[0]

    def _views(self, source: fx.Node) -> fx.Node:
        return self.values[source].nodes[0]

    def _once(self, source: fx.Node, kind: str, make: Callable[[fx.Node], tuple[fx.Node, ...]]) -> tuple[fx.Node, ...]:
        key = (source, kind)
        if key not in self._other_kinds:
            self._other_kinds[key] = make(source)
        return self._other_kinds[key]

    def _split(self, source: fx.Node) -> tuple[fx.Node, ...]:
        value = self.values[source]
        if value.kind == "views":
            parts = self._added(SplitViews(self.networks, source.meta[SHAPE][1]), value.nodes[0])
        else:
            parts = self.graph.call_method("chunk", (value.nodes[0], self.networks, 1))
        return tuple(self.graph.call_function(operator.getitem, (parts, i)) for i in range(self.networks))

    def _gather(self, source: fx.Node) -> tuple[fx.Node, ...]:
        value = self.values[source]
        if value.kind == "views":
            return (self._added(AllViews(self.networks, source.meta[SHAPE][1]), value.nodes[0]),)
        return (self.graph.call_function(torch.cat, (list(value.nodes), 1)),)

    def _added(self, module: nn.Module, *args: fx.Node) -> fx.Node:
        target = f"{type(module).__name__.lower()}_{next(self._numbers)}"
        self.layers[target] = module
        return self.graph.call_module(target, args)
