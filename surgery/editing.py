"""What every edit of a graph is made of: finding places, putting modules in, keeping record, checking the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx, nn

from surgery.architecture import Architecture, Block, Channels
from surgery.errors import RewriteError
from surgery.history import Site
from surgery.inplace import protect
from surgery.network import ConvertedNetwork, SurgeryModule
from surgery.shapes import SIZE, forget, refresh, refresh_nested, total_macs
from surgery.tracing import MARK, SITE, upstream

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Editor:
    """The state of one method's edits, and the steps that they share.

    Args:
        network: What is edited, in place.
        method: Name of the method that edits.

    Attributes:
        network: The network.
        method: Name of the method.
        architecture: What is known about the network, as it is now.
        sites: What was edited, in order.
    """

    def __init__(self, network: ConvertedNetwork, method: str) -> None:
        self.network = network
        self.method = method
        self.architecture: Architecture = network.meta["architecture"]
        self.sites: list[Site] = []
        self._dirty: set[str] = set()
        self._unmeasured: set[str] = set()

    def module(self, path: str) -> nn.Module:
        """Return the module at `path` of the network."""
        return self.network.get_submodule(path)

    def owner(self, at: Block | None) -> SurgeryModule:
        """Return the module whose graph computes a block, or the root."""
        return self.network if at is None else self.network.block(at.path)

    def block_of(self, path: str) -> Block | None:
        """Return the block that holds the module at `path`, or None for the root."""
        holders = [block for block in self.architecture.blocks if path.startswith(f"{block.path}.")]
        return holders[0] if holders else None

    def call(self, place: Block | str) -> fx.Node:
        """Return the only call of a block or of the module at a path.

        Raises:
            RewriteError: If it is not called exactly once.
        """
        path = place if isinstance(place, str) else place.path
        at = self.block_of(path)
        local = path.removeprefix(f"{at.path}.") if at else path
        calls: list[fx.Node] = list(self.owner(at).graph.find_nodes(op="call_module", target=local))
        if len(calls) != 1:
            raise RewriteError(f"{path}: expected one call of this module, found {len(calls)}; choose another module")
        return calls[0]

    def node(self, name: str, at: Block | None) -> fx.Node:
        """Return the node called `name` in the graph of a block or of the root.

        Raises:
            RewriteError: If there is none.
        """
        nodes: dict[str, fx.Node] = {node.name: node for node in self.owner(at).graph.nodes}
        if name not in nodes:
            raise RewriteError(f"{_where(at)}: there is no node {name!r}; its nodes are {', '.join(nodes)}")
        return nodes[name]

    def check_order(self, readers: Iterable[fx.Node], *sources: fx.Node, at: Block | None) -> None:
        """Check that no reader runs before one of its new sources.

        Raises:
            RewriteError: If one does.
        """
        places = {node: place for place, node in enumerate(self.owner(at).graph.nodes)}
        for reader in readers:
            for source in sources:
                if places.get(source, -1) > places[reader]:
                    raise RewriteError(f"{_where(at)}: {reader.name} would read {source.name} before it is computed")

    def insert(
        self, module: nn.Module, *inputs: str, at: Block | None, role: str, users: Iterable[str] | None = None
    ) -> str:
        """Call a new module behind `inputs[0]`, see `Rewriter.insert`, and return the name of the new node."""
        owner = self.owner(at)
        nodes = [self.node(name, at) for name in inputs]
        before = upstream(*nodes[1:])
        readers = [node for node in nodes[0].users if node not in before]
        if users is not None:
            readers = [self.node(name, at) for name in users]
        attribute = self.attach(owner, module, role)
        latest = max(nodes, key=list(owner.graph.nodes).index)
        with owner.graph.inserting_after(latest):
            node = owner.graph.call_module(attribute, tuple(nodes))
        self.check_order(readers, node, at=at)
        for reader in readers:
            reader.replace_input_with(nodes[0], node)
        self.stamp(node, at, role)
        if users is None:
            self.move(at, nodes[0], node)
        return node.name

    def attach(self, owner: SurgeryModule, module: nn.Module, role: str) -> str:
        """Put a new module into `owner` and return its attribute, made of the method's name and the role."""
        name = attribute = f"{self.method}_{role}"
        taken = {child for child, _ in owner.named_children()} | vars(owner).keys()
        number = 1
        while attribute in taken:
            number += 1
            attribute = f"{name}_{number}"
        self.adopt(owner, module, owner)
        owner.add_module(attribute, module)
        return attribute

    def adopt(self, owner: SurgeryModule, module: nn.Module, near: nn.Module) -> None:
        """Give a new module device, dtype and mode of the module `near` it, or else of what surrounds that."""
        example = next(near.parameters(), None)
        example = next(owner.parameters(), next(self.network.parameters(), None)) if example is None else example
        if example is not None:
            shared = {id(tensor) for tensor in (*self.network.parameters(), *self.network.buffers())}
            device, dtype = example.device, example.dtype
            # What is taken over from the network stays as it is: a norm in float32 inside a half-precision network.
            module._apply(
                lambda tensor: (
                    tensor
                    if id(tensor) in shared
                    else tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                )
            )
        module.train(near.training)

    def protect(self, node: fx.Node, at: Block | None) -> None:
        """Let nothing overwrite the value of a node."""
        self._dirty.update(protect(self.network, at.path if at else "", node))

    def move(self, at: Block | None, old: fx.Node, new: fx.Node) -> None:
        """Let the places and marks of `old` name the node that stands for its value now."""
        if MARK in old.meta:
            new.meta[MARK] = old.meta.pop(MARK)
        if at is None:
            return
        current = self.architecture.block(at.path)
        for place in ("body", "shortcut", "output"):
            if getattr(current, place) == old.name:
                current = replace(current, **{place: new.name})  # type: ignore[arg-type]  # all three are names
        attended = tuple(new.name if name == old.name else name for name in current.attended)
        self.architecture = self.architecture.with_block(replace(current, attended=attended))

    def sweep(self, at: Block | None) -> None:
        """Drop what nobody reads from a graph, and from the root what it was fed with."""
        owner = self.owner(at)
        _drop_dead(owner)
        self.touch(at)
        if at is not None:
            call = self.call(at)
            for place, argument in list(zip(owner.graph.find_nodes(op="placeholder"), call.args, strict=True))[1:]:
                if not place.users:
                    owner.graph.erase_node(place)
                    call.args = tuple(other for other in call.args if other is not argument)
            self.describe(at)
            _drop_dead(self.network)
            self.touch(None)

    def stamp(self, node: fx.Node, at: Block | None, role: str) -> None:
        """Write into a node that the method made it, and into the record."""
        node.meta[SITE] = self.record(at, role, node.name)
        self.touch(at)

    def record(self, at: Block | None, role: str, node: str) -> Site:
        """Add an edit to the record."""
        site = Site(self.method, role, at.path if at else "", node)
        self.sites.append(site)
        return site

    def touch(self, at: Block | None) -> None:
        """Remember that the graph of a block, or the root, changed: shapes and code are out of date."""
        path = at.path if at else ""
        self._dirty.add(path)
        self._unmeasured |= {path, ""}

    def describe(self, at: Block | None) -> None:
        """Bring the shapes of a block, or of the whole network, and what the architecture says of it up to date.

        The shapes of what cannot run on what it reads now are unknown until `settle`: its inputs may yet be rewired.
        """
        try:
            self._measure(at)
        except RewriteError:
            for path in sorted(self._unmeasured) if at is None else [at.path]:
                forget(self._owner_at(path).graph)
        if at is not None:
            self.architecture = self.architecture.with_block(self._described(self.architecture.block(at.path)))

    def settle(self) -> None:
        """Check and recompile every edited graph, and bring shapes and the architecture up to date.

        Raises:
            RewriteError: If an edit left a graph that does not hold together or cannot run on meta tensors.
        """
        for path in sorted(self._dirty):
            owner = self._owner_at(path)
            try:
                owner.graph.lint()
            except (RuntimeError, AttributeError) as error:
                where = path or "(root)"
                raise RewriteError(f"{where}: the graph does not hold together after {self.method}: {error}") from error
            owner.recompile()
        self._dirty.clear()
        self._measure(None)

    def _owner_at(self, path: str) -> SurgeryModule:
        return self.network.block(path) if path else self.network

    def _measure(self, at: Block | None) -> None:
        if at is not None:
            if at.path in self._unmeasured and refresh_nested(self.network, at.path):
                self._unmeasured.discard(at.path)
        elif self._unmeasured:
            ran = refresh(self.network, self.architecture.input_size, self._unmeasured)
            self._unmeasured.clear()
            for block in self.architecture.blocks:
                if block.path in ran:
                    self.architecture = self.architecture.with_block(self._described(block))
            parameters = sum(parameter.numel() for parameter in self.network.parameters())
            self.architecture = replace(self.architecture, macs=total_macs(self.network.graph), params=parameters)

    def _described(self, current: Block) -> Block:
        owner = self.owner(current)
        nodes: dict[str, fx.Node] = {node.name: node for node in owner.graph.nodes}
        called = {f"{current.path}.{node.target}" for node in nodes.values() if node.op == "call_module"}
        output = owner.graph.output_node().all_input_nodes[0]
        size = output.meta.get(SIZE, ())
        spatial = self.module(current.spatial) if current.spatial in called else None
        hidden, cardinality = current.channels.hidden, current.cardinality
        if isinstance(spatial, nn.Conv2d):
            hidden = spatial.out_channels
            cardinality = spatial.groups if current.kind == "grouped" else hidden
        return replace(
            current,
            body=current.body if current.body in nodes else current.input,
            shortcut=current.shortcut if current.shortcut in nodes else None,
            join=current.join if current.join in nodes else None,
            output=output.name,
            attended=tuple(name for name in current.attended if name in nodes),
            split=current.split if current.split in called else None,
            merge=current.merge if current.merge in called else None,
            convs=tuple(conv for conv in current.convs if conv in called),
            channels=Channels(
                _width(nodes[current.input], current.channels.input), hidden, _width(output, current.channels.output)
            ),
            cardinality=cardinality,
            resolution=(int(size[2]), int(size[3])) if len(size) == 4 else current.resolution,
            macs=total_macs(owner.graph),
            params=sum(parameter.numel() for parameter in owner.parameters()),
        )


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let the hooks on a module that is replaced fire on the new one."""
    for name in _HOOKS:
        vars(new)[name].update(vars(old)[name])
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _where(at: Block | None) -> str:
    return at.path if at else "(root)"


def _drop_dead(owner: SurgeryModule) -> None:
    owner.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    owner.delete_all_unused_submodules()


def _width(node: fx.Node, known: int) -> int:
    size = node.meta.get(SIZE, ())
    return int(size[1]) if len(size) == 4 else known
