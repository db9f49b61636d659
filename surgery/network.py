"""The converted network: a root GraphModule that calls its blocks, and still answers to the source's own methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from surgery.analysis import find_head
from surgery.errors import NotKept, SurgeryError, UnsupportedModel
from surgery.nesting import Nested
from surgery.recomputation import recomputed
from surgery.shapes import refresh, total_macs
from surgery.tracing import CONSTANT, MARK, SITE, TrainingFlag, is_training_flag

_KEPT_AS_IS = ("no_weight_decay", "group_matcher")
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPLACED = (
    "forward",
    "forward_features",
    "forward_head",
    "set_grad_checkpointing",
    "get_classifier",
    "reset_classifier",
)


class SurgeryModule(fx.GraphModule):
    """A GraphModule that keeps its module tree whole, deep-copies with everything on it, and is never pickled."""

    @classmethod
    def assemble(cls, tree: nn.Module, graph: fx.Graph) -> SurgeryModule:
        """Return a module that runs `graph` on the modules, parameters and buffers of `tree`, which it takes over."""
        module = cls(nn.Module(), fx.Graph(), class_name=type(tree).__name__)
        # Weights, submodules, hooks, the mode, and whatever the source's own methods read.
        module.__dict__.update(
            {key: value for key, value in tree.__dict__.items() if key not in ("_graph", "_code", "meta")}
        )
        for node in graph.nodes:
            if CONSTANT in node.meta:
                module.register_buffer(str(node.target), node.meta.pop(CONSTANT), persistent=False)
            if is_training_flag(node):
                path, _, name = str(node.target).rpartition(".")
                owner = module.get_submodule(path)
                owner.add_module(name, TrainingFlag().train(owner.training))
        module.graph = graph
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> SurgeryModule:
        """Return an independent copy: weights, graph, hooks, record and plain attributes."""
        twin: SurgeryModule = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {key: value for key, value in self.__dict__.items() if key not in ("_graph", "_code")}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin.graph = copy.deepcopy(self.graph, memo)
        type(twin).__name__ = type(self).__name__
        return twin

    def __reduce__(self) -> NoReturn:
        """Refuse pickling: it would lose the record and the graph's provenance.

        Raises:
            SurgeryError: Always.
        """
        raise SurgeryError(
            f"{type(self).__name__}: a converted network is not pickled; use surgery.save(model, path) and "
            "surgery.load(path), or torch.save(model.state_dict(), path) for the weights alone"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling, like `__reduce__`."""
        self.__reduce__()


@runtime_checkable
class Runner(Protocol):
    """A module that a method inserted into a block and that can compute the block in its own way, leaving work out.

    It is asked in eval mode and in eager execution only: what is compiled, exported or traced is the graph, which has
    to compute the same.

    Attributes:
        runs_block: True; a module of the source may have a method of the same name.
    """

    runs_block: bool

    def run(self, block: BlockModule, *args: Tensor) -> Tensor | None:
        """Return what the block returns for these inputs, or None to let its graph run."""


@runtime_checkable
class Repeater(Protocol):
    """A module that a method inserted into the root and that may run the graph more than once in one forward.

    Attributes:
        repeats_network: True; a module of the source may have a method of the same name.
    """

    repeats_network: bool

    def repeat(self, network: ConvertedNetwork, forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Return what the network returns for these inputs; `forward(*args)` runs its graph once."""


class BlockModule(SurgeryModule):
    """One block of the network, called by the root graph."""

    grad_checkpointing: bool = False

    def recompile(self) -> Any:
        """Generate the forward from the graph, and make it recompute in the backward pass where that is switched on.

        In eager eval mode a `Runner` among the modules of the block is asked first.
        """
        code = super().recompile()
        generated: Callable[..., Tensor] = type(self).forward
        runner = next((name for name, child in self.named_children() if isinstance(child, Runner)), None)

        def forward(self: BlockModule, *args: Tensor) -> Tensor:
            if runner is not None and not self.training and _is_eager():
                found: Tensor | None = self._modules[runner].run(self, *args)  # type: ignore[union-attr, operator]
                if found is not None:
                    return found
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                return recomputed(self, generated, *args)
            return generated(self, *args)

        type(self).forward = forward
        return code


def _is_eager() -> bool:
    tracing = is_fx_symbolic_tracing() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not (tracing or torch.compiler.is_compiling())


class ConvertedNetwork(SurgeryModule):
    """The root of a converted network.

    Attributes:
        meta: `meta["conversion"]` is the record of what was done, `meta["architecture"]` the recognised structure.
        not_kept: Public methods of the source class that the converted network cannot offer.
    """

    source_class: ClassVar[type[nn.Module]] = nn.Module
    not_kept: ClassVar[frozenset[str]] = frozenset()

    def recompile(self) -> Any:
        """Generate the forward from the graph; a `Repeater` among the modules of the root decides how often it runs."""
        code = super().recompile()
        generated: Callable[..., Tensor] = type(self).forward
        name = next((name for name, child in self.named_children() if isinstance(child, Repeater)), None)
        if name is None:
            return code

        @wraps(generated)
        def forward(self: ConvertedNetwork, *args: Tensor) -> Tensor:
            value: Tensor = self._modules[name].repeat(self, partial(generated, self), *args)  # type: ignore[union-attr, operator]
            return value

        type(self).forward = forward
        return code

    def __getattr__(self, name: str) -> Any:
        """Return a module, parameter or buffer; say so where a method of the source is not kept."""
        if name in type(self).not_kept:
            raise NotKept(
                f"{type(self).source_class.__name__}.{name} is not kept by conversion, which runs a rewritten graph; "
                "use forward_features, forward_head or taps, or call it on the unconverted model"
            )
        return super().__getattr__(name)

    def block(self, path: str) -> BlockModule:
        """Return the block at `path`."""
        module = self.get_submodule(path)
        assert isinstance(module, BlockModule)
        return module


def assemble(model: nn.Module, nested: Nested) -> ConvertedNetwork:
    """Return the converted form of `model`, whose modules it takes over; nothing has been rewritten yet."""
    _refuse_lost_hooks(model, nested)
    for path, graph in nested.blocks.items():
        block = BlockModule.assemble(model.get_submodule(path), graph)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, block)
    # mypy takes the hash of a class for that of its instances
    network = _network_class(type(model)).assemble(model, nested.root)  # type: ignore[arg-type]
    assert isinstance(network, ConvertedNetwork)
    return network


def _refuse_lost_hooks(model: nn.Module, nested: Nested) -> None:
    hooked = [path for path, module in model.named_modules() if any(module.__dict__[hooks] for hooks in _CALL_HOOKS)]
    called = {str(node.target) for node in nested.root.nodes if node.op == "call_module"}
    for path, graph in nested.blocks.items():
        called |= {f"{path}.{node.target}" for node in graph.nodes if node.op == "call_module"}
    leaves = called - nested.blocks.keys()
    for path in hooked:
        if path and path not in called and not any(path.startswith(f"{leaf}.") for leaf in leaves):
            raise UnsupportedModel(
                f"{path}: found a hook on a module that the converted network does not call, expected hooks on the "
                "network, its blocks and their layers; remove it before the conversion"
            )


@cache
def _network_class(source: type[nn.Module]) -> type[ConvertedNetwork]:
    public = {
        name
        for cls in source.__mro__
        if cls not in nn.Module.__mro__
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("_")
    }
    members: dict[str, Any] = {name: getattr(source, name) for name in _KEPT_AS_IS if name in public}
    ours = {
        "forward_features": _forward_features,
        "forward_head": _forward_head,
        "set_grad_checkpointing": _set_grad_checkpointing,
        "get_classifier": _get_classifier,
        "reset_classifier": _reset_classifier,
    }
    members |= {name: function for name, function in ours.items() if name in public}
    members |= _private_helpers(source)
    members["source_class"] = source
    members["not_kept"] = frozenset(public - members.keys() - set(_REPLACED) - set(dir(nn.Module)))
    return type(source.__name__, (ConvertedNetwork,), members)


def _private_helpers(source: type[nn.Module]) -> dict[str, Any]:
    """Return the methods that the kept ones may call on `self`."""
    taken = set(dir(ConvertedNetwork))
    helpers: dict[str, Any] = {}
    for cls in reversed([cls for cls in source.__mro__ if cls not in nn.Module.__mro__]):
        private = {name: value for name, value in vars(cls).items() if name.startswith("_") and not name.endswith("__")}
        helpers |= {name: value for name, value in private.items() if callable(value) and name not in taken}
    return helpers


def _forward_head(self: ConvertedNetwork, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the source network's own method makes of the features."""
    behind = _behind_features(self)
    if not behind or any(SITE in node.meta for node in behind):
        raise NotKept(
            f"{type(self).__name__}.forward_head: the surgery changed what happens behind the features; use "
            "surgery.record(model) and taps instead"
        )
    value: Tensor = type(self).source_class.forward_head(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    return value


def _behind_features(network: ConvertedNetwork) -> list[fx.Node]:
    nodes = list(network.graph.nodes)
    marked = [index for index, node in enumerate(nodes) if node.meta.get(MARK) == "forward_features"]
    return nodes[marked[0] + 1 :] if marked else []


def _forward_features(self: ConvertedNetwork, x: Tensor) -> Tensor:
    """Return the features before the head, shape as in the source network."""
    marked = [node for node in self.graph.nodes if node.meta.get(MARK) == "forward_features"]
    if not marked:
        raise NotKept(
            f"{type(self).__name__}.forward_features: the surgery moved the place where the features ended; use "
            "surgery.record(model) and taps instead"
        )
    prefix = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in self.graph.nodes:
        copies[node] = prefix.node_copy(node, lambda n: copies[n])
        if node is marked[0]:
            break
    prefix.output(copies[marked[0]])
    value: Tensor = fx.Interpreter(self, graph=prefix).run(x)
    return value


def _set_grad_checkpointing(self: ConvertedNetwork, enable: bool = True) -> None:
    """Recompute the activations of every block in the backward pass instead of storing them."""
    for module in self.modules():
        if isinstance(module, BlockModule):
            module.grad_checkpointing = enable


def _get_classifier(self: ConvertedNetwork) -> nn.Module:
    """Return what the source network's own method returns."""
    _refuse_several(self, "get_classifier")
    classifier: nn.Module = type(self).source_class.get_classifier(self)  # type: ignore[attr-defined]
    return classifier


def _refuse_several(network: ConvertedNetwork, name: str) -> None:
    if any(isinstance(module, ConvertedNetwork) for module in network.modules() if module is not network):
        raise NotKept(
            f"{type(network).__name__}.{name}: found a classifier in each copy of the network, expected one for all; "
            "replace the classifier before the conversion"
        )


def _refuse_rewritten_head(network: ConvertedNetwork) -> None:
    path = network.meta["architecture"].head.path
    if any(len(node.args) > 1 for node in network.graph.find_nodes(op="call_module", target=path)):
        raise NotKept(
            f"{type(network).__name__}.reset_classifier: {path} is a {type(network.get_submodule(str(path))).__name__} "
            "that reads more than the features, expected a classifier like the source's; replace the classifier before "
            "the conversion"
        )


def _reset_classifier(self: ConvertedNetwork, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """Replace the classifier as the source network's own method does, and write that into the record."""
    _refuse_several(self, "reset_classifier")
    _refuse_rewritten_head(self)
    type(self).source_class.reset_classifier(self, num_classes, *args, **kwargs)  # type: ignore[attr-defined]
    architecture = self.meta["architecture"]
    refresh(self, architecture.input_size, edited=())
    self.meta["architecture"] = replace(
        architecture,
        head=find_head(self, self.graph),
        macs=total_macs(self.graph),
        params=sum(parameter.numel() for parameter in self.parameters()),
    )
    self.meta["conversion"] = self.meta["conversion"].with_classifier(num_classes, args, kwargs)
