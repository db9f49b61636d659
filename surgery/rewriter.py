"""The only code that mutates a graph. Plugins name nodes and modules; naming, provenance and checks live here."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from surgery.architecture import Architecture, Block, Channels
from surgery.channels import ChannelMap, Scatter, Select, channel_map
from surgery.errors import InvalidOption, RewriteError
from surgery.history import Site
from surgery.inplace import protect
from surgery.network import ConvertedNetwork, SurgeryModule
from surgery.shapes import MACS, SIZE
from surgery.slicing import Selectable, count_macs, cut_spaces, keep_branches, slice_module, widths_to_channels
from surgery.taps import Tap, taps_of
from surgery.tracing import MARK, SITE

JSON = TypeVar("JSON")


class Rewriter:
    """Edit a converted network on behalf of one method.

    Nodes are referred to by name within the graph of the block they live in (`at=block`), or of the root (`at=None`); the
    names of a block's places are fields of `Block`. Every edit is recorded as a `Site` and stamped on the nodes it made, and
    `architecture` stays true while edits go on.

    Args:
        network: What is edited, in place; `convert` hands over a copy.
        method: Name of the method.
        decisions: Decisions of an earlier run to be replayed, or None.
    """

    def __init__(self, network: ConvertedNetwork, method: str, decisions: Mapping[str, Any] | None = None) -> None:
        self.network = network
        self.architecture: Architecture = network.meta["architecture"]
        self.sites: list[Site] = []
        self.decisions: dict[str, Any] = {}
        self._method = method
        self._replayed = decisions
        self._dirty: dict[str, SurgeryModule] = {}

    def module(self, path: str) -> nn.Module:
        """Return the module at `path` of the network."""
        return self.network.get_submodule(path)

    def decide(self, key: str, choose: Callable[[], JSON]) -> JSON:
        """Return a random, searched or timed choice: made once by `choose()`, stored in the record, read back on replay.

        Args:
            key: Unique within the method.
            choose: Makes the choice; returns a JSON value.

        Raises:
            RewriteError: If the key was used before, or a replayed record lacks it.
        """
        if key in self.decisions:
            raise RewriteError(f"{self._method}: the decision {key!r} is made twice; give each its own key")
        if self._replayed is not None and key not in self._replayed:
            raise RewriteError(f"{self._method}: the record has no decision {key!r}; it was written by another version")
        value: JSON = choose() if self._replayed is None else self._replayed[key]
        self.decisions[key] = value
        return value

    def insert(
        self, module: nn.Module, *inputs: str, at: Block | None, role: str, users: Iterable[str] | None = None
    ) -> str:
        """Call a new module behind `inputs[0]` and let its uses read the result.

        Args:
            module: The new module; it gets the device, dtype and mode of its surroundings.
            *inputs: Node names; the first is the value that is passed through or replaced, further ones are extra arguments.
            at: The block that the nodes live in, or None for the root graph.
            role: What it is for, such as "gate"; part of the new module's path.
            users: Names of the only nodes that should read the new value; default: all that read `inputs[0]`, but for those
                that the further inputs are computed from.

        Returns:
            Name of the new node.

        Raises:
            RewriteError: If a node does not exist, or would be read before it is computed.
        """
        owner = self._owner(at)
        nodes = [self._node(owner, name, at) for name in inputs]
        before = upstream(*nodes[1:])
        readers = [node for node in nodes[0].users if node not in before]
        if users is not None:
            readers = [self._node(owner, name, at) for name in users]
        attribute = self._attach(owner, module, f"{self._method}_{role}")
        latest = max(nodes, key=list(owner.graph.nodes).index)
        with owner.graph.inserting_after(latest):
            node = owner.graph.call_module(attribute, tuple(nodes))
        self._order(readers, node, at=at)
        for reader in readers:
            reader.replace_input_with(nodes[0], node)
        self._stamp(node, at, role)
        if readers and SIZE in nodes[0].meta:
            node.meta[SIZE] = nodes[0].meta[SIZE]
        if users is None:
            self._move(at, nodes[0], node)
        return node.name

    def compute(self, module: nn.Module, *inputs: str, at: Block | None, role: str) -> str:
        """Call a new module on `inputs` and return the name of its node; nobody reads it yet.

        Use it for values that `feed` or a later `insert` passes on.
        """
        return self.insert(module, *inputs, at=at, role=role, users=())

    def feed(self, node: str, *, into: Block) -> str:
        """Pass a value of the root graph into a block as a further argument.

        Returns:
            Name of the new placeholder in the block's graph. Feeding the same node twice returns the same one.

        Raises:
            RewriteError: If the value is computed after the block runs.
        """
        source = self._node(self.network, node, None)
        call = self._call(into)
        block = self._owner(into)
        placeholders = list(block.graph.find_nodes(op="placeholder"))
        if source in call.args:
            return str(placeholders[call.args.index(source)].name)
        self._order([call], source, at=None)
        with block.graph.inserting_after(placeholders[-1]):
            placeholder = block.graph.placeholder(f"{node}_in")
        call.args = (*call.args, source)
        self._stamp(placeholder, into, "input")
        self._touch(self.network, None)
        return placeholder.name

    def replace(self, path: str, module: nn.Module, *extra: str, role: str = "replacement") -> None:
        """Put `module` in the place of the one at `path`: same call, weights handed over explicitly.

        Args:
            path: Path of the old module, such as `block.merge`.
            module: The new one; parameters it shares with the old one keep their state-dict keys.
            *extra: Names of further arguments of the call, in the graph that calls the module.
            role: What it is for.

        Raises:
            RewriteError: If the graph does not call that module exactly once.
        """
        at = self._block_of(path)
        owner, node = self._owner(at), self._call(path)
        self._adopt(owner, module, self.module(path))
        self._set(owner, str(node.target), module)
        node.args = (*node.args, *(self._node(owner, name, at) for name in extra))
        self._order([node], *[argument for argument in node.args if isinstance(argument, fx.Node)], at=at)
        self._stamp(node, at, role)

    def tap(self, node: str, name: str, *, at: Block | None) -> str:
        """Record the value of `node` in every training forward, under `name`.

        An in-place operation that reads the value is made out-of-place, so that the tap shows what it was put on.

        Raises:
            RewriteError: If the model already has a tap of that name.
        """
        if name in taps_of(self.network):
            raise RewriteError(f"{name}: the model already has a tap of this name; taps are unique")
        self._protect(self._node(self._owner(at), node, at), at)
        return self.insert(Tap(name), node, at=at, role="tap")

    def bypass(self, block: Block) -> None:
        """Remove the body of a residual block: its output becomes what the shortcut and the final activation give.

        Raises:
            RewriteError: If the block has no shortcut.
        """
        if block.join is None or block.shortcut is None:
            raise RewriteError(
                f"{block.path}: it has no shortcut, so nothing is left when its body is removed; keep the block"
            )
        owner = self._owner(block)
        join = self._node(owner, block.join, block)
        self._protect(join, block)
        join.replace_all_uses_with(self._node(owner, block.shortcut, block))
        self._sweep(block)
        self._record(block, "bypass", block.join)

    def returns(self, node: str, *, at: Block) -> None:
        """Let a block return another of its values; what nobody reads any more is dropped, such as its addition.

        A block returns one tensor: pack several, such as body and shortcut, into one with `compute`, and unpack it with
        `rewire` or `insert(..., at=None)`.

        Raises:
            RewriteError: If the node does not exist.
        """
        owner = self._owner(at)
        owner.graph.output_node().args = (self._node(owner, node, at),)
        self._sweep(at)
        self._record(at, "output", node)

    def remove(self, path: str) -> None:
        """Take an inserted pass-through module out again: what read its result reads its first input.

        Raises:
            RewriteError: If no method inserted it, or it is not called exactly once.
        """
        node, at = self._call(path), self._block_of(path)
        if SITE not in node.meta:
            raise RewriteError(f"{path}: it belongs to the source network, expected a module that a method inserted")
        source = node.all_input_nodes[0]
        self._protect(node, at)
        node.replace_all_uses_with(source)
        self._move(at, node, source)
        self._sweep(at)
        self._record(at, "remove", source.name)

    def select(self, path: str, keep: Sequence[int]) -> None:
        """Replace an inserted module by the part of it that `keep` names, see `surgery.slicing.Selectable`.

        Further arguments of the call that the new module does not take are dropped, and what computed them.

        Raises:
            RewriteError: If the module is not selectable.
        """
        node, at, old = self._call(path), self._block_of(path), self.module(path)
        if not isinstance(old, Selectable):
            raise RewriteError(f"{path}: {type(old).__name__} has no method `selected`, so no part of it can be kept")
        new = old.selected(keep)
        self._set(self.network, path, new)
        node.args = node.args[: positional(new)]
        self._sweep(at)
        self._stamp(node, at, "select")

    def keep(self, block: Block, *, branches: Sequence[int], of: int | None = None) -> Block:
        """Keep only these branches of a block and cut the rest out of its weights.

        Inserted modules that implement `surgery.slicing.Prunable` decide themselves what that means for them.

        Args:
            block: A block with a `merge`.
            branches: Indices, in order; at least one.
            of: Into how many equal branches the block's channels are partitioned; default: its cardinality.

        Returns:
            The block as it is now.

        Raises:
            RewriteError: If the block's channels cannot be cut apart there.
        """
        owner = self._owner(block)
        kept = keep_branches(owner, block, branches, of)
        self.architecture = self.architecture.with_block(kept)
        self._touch(owner, block)
        self._record(kept, "keep", block.merge or block.output)
        return kept

    def narrow(self, path: str, *, inputs: Sequence[int] | None = None, outputs: Sequence[int] | None = None) -> None:
        """Keep only some channels of a convolution inside a block, with everything that is coupled to them.

        Channels that the block shares with its shortcut stay as they are: the body then reads them through a `Select` and
        writes them through a `Scatter`, so what is cut away must be zero there for the result to stay the same.

        Args:
            path: Path of the convolution.
            inputs: Input channels to keep, or None for all.
            outputs: Output channels to keep, or None for all.

        Raises:
            RewriteError: If these channels are coupled to something that cannot change, or none would be left.
        """
        at = self._block_of(path)
        if at is None:
            raise RewriteError(f"{path}: expected a convolution inside a block, found one of the root; use scale")
        if (inputs is not None and not inputs) or (outputs is not None and not outputs):
            raise RewriteError(f"{path}: expected at least one channel to keep; use bypass to remove the whole body")
        owner, call = self._owner(at), self._call(path)
        for keep, node in ((inputs, call.all_input_nodes[0]), (outputs, call)):
            if keep is None:
                continue
            channels = channel_map(owner)
            if channels.pins_of(channels.nodes["", node.name]):
                node = self._detach(channels, node, call, at)
                channels = channel_map(owner)
            cut_spaces(owner, channels, {channels.nodes["", node.name]: torch.tensor(keep)}, path)
        self._describe(at)
        self._touch(owner, at)
        self._record(at, "narrow", call.name)

    def _detach(self, channels: ChannelMap, node: fx.Node, call: fx.Node, at: Block) -> fx.Node:
        """Give the convolution that `call` runs its own copy of the channels of `node`, and return a node that has them."""
        width = channels.sizes[channels.find(channels.nodes["", node.name])]
        everything = torch.arange(width)
        if node is call:
            last = node
            while len(users := list(last.users)) == 1 and _hands_on(channels, users[0]):
                last = users[0]
            self.insert(Scatter(everything, width), last.name, at=at, role="scatter")
            return node
        reader = call
        while len(node.users) == 1 and _hands_on(channels, node):
            reader, node = node, node.all_input_nodes[0]
        name = self.insert(Select(everything), node.name, at=at, role="select", users=[reader.name])
        return self._node(self._owner(at), name, at)

    def keep_classes(self, classes: Sequence[int]) -> None:
        """Keep only these rows of the classifier, in this order.

        Raises:
            RewriteError: If no classifier was found, or a class does not exist.
        """
        head = self.architecture.head
        if head.path is None or head.classes is None:
            raise RewriteError(f"{self.architecture.name}: no classifier was found, so no class can be removed")
        if not classes or min(classes) < 0 or max(classes) >= head.classes:
            raise RewriteError(
                f"{head.path}: expected classes in 0..{head.classes - 1}, at least one, found {list(classes)}"
            )
        rows = torch.tensor(list(classes))
        self._set(self.network, head.path, slice_module(self.module(head.path), None, rows))
        self.architecture = replace(self.architecture, head=replace(head, classes=len(classes)))
        if "num_classes" in vars(self.network):
            vars(self.network)["num_classes"] = len(classes)
        for node in self.network.graph.find_nodes(op="call_module", target=head.path):
            node.meta[MACS] = node.meta.get(MACS, 0) * len(classes) // head.classes
            self._stamp(node, None, "classes")

    def scale(self, widths: Mapping[str, int | Sequence[int]]) -> None:
        """Set the output channels of convolutions, together with everything that is coupled to them in the whole network.

        Args:
            widths: Convolution path -> number of channels, of which the first are kept, or the indices of those to keep.
                Convolutions that feed the same addition, and everything that reads them, change together, so naming one
                of each group is enough.

        Raises:
            RewriteError: If two coupled convolutions are given different widths, or a group cannot change.
        """
        for path in widths_to_channels(self.network, widths):
            self._record(self._block_of(path), "scale", path)
        for block in self.architecture.blocks:
            self._describe(block)
        self._touch(self.network, None)

    def replicate(self, copies: int, join: nn.Module, split: nn.Module | None = None) -> None:
        """Run `copies` independent copies of the whole network side by side and join their outputs.

        The copies live at `members.<i>`; each has its own weights, equal to the source's until the method changes them.

        Args:
            copies: At least 1.
            join: Called with the outputs of all copies; returns one (B, classes) tensor.
            split: Called with the image; returns the tuple of what each copy sees. Default: all see the image.

        Raises:
            RewriteError: If the network has taps, whose names would not be unique any more.
        """
        if copies < 1:
            raise InvalidOption(f"replicate: expected at least one copy, found {copies}")
        if len(taps_of(self.network)):
            raise RewriteError("replicate: found taps in the network, expected none yet; put them on behind the copies")
        single = ConvertedNetwork.assemble(_shell(self.network), copy.deepcopy(self.network.graph))
        members = nn.ModuleList([copy.deepcopy(single) for _ in range(copies)])
        graph = fx.Graph()
        image = graph.placeholder("x")
        views: list[fx.Node] = [image] * copies
        for tensors in ("_modules", "_parameters", "_buffers"):
            self.network.__dict__[tensors] = {}
        self.network.members = members
        if split is not None:
            divided = graph.call_module(self._attach(self.network, split, f"{self._method}_split"), (image,))
            views = [graph.call_function(operator.getitem, (divided, i)) for i in range(copies)]
        outputs = [
            graph.create_node("call_module", f"members.{i}", (views[i],), name=f"members_{i}") for i in range(copies)
        ]
        joined = graph.call_module(self._attach(self.network, join, f"{self._method}_join"), tuple(outputs))
        graph.output(joined)
        self.network.graph = graph
        self.architecture = replace(
            self.architecture, stem=(), stages=(), head=replace(self.architecture.head, path=None)
        )
        self._stamp(joined, None, "replicate")

    def keep_members(self, members: Sequence[int]) -> None:
        """Keep only these of the copies that `replicate` made; the joining module joins what is left.

        Raises:
            RewriteError: If there are no copies, or one of them does not exist.
        """
        copies = [node for node in self.network.graph.nodes if str(node.target).startswith("members.")]
        if not members or not 0 <= min(members) <= max(members) < len(copies):
            raise RewriteError(
                f"members: expected indices of {len(copies)} copies, at least one, found {list(members)}"
            )
        (join,) = copies[0].users
        join.args = tuple(copies[i] for i in members)
        path = str(join.target)
        if isinstance(old := self.module(path), Selectable):
            self._set(self.network, path, old.selected(members))
        self._sweep(None)
        self._stamp(join, None, "members")

    def rewire(self, block: Block, inputs: Sequence[str], combine: nn.Module, *, role: str = "input") -> str:
        """Let a block read a combination of earlier values instead of its predecessor's output.

        Args:
            block: The block whose first argument changes.
            inputs: Nodes of the root graph, all computed before the block.
            combine: Called with them; returns the block's new input.
            role: What it is for.

        Returns:
            Name of the combining node.
        """
        node = self._node(
            self.network, self.compute(combine, *inputs, at=None, role=f"{block.path.replace('.', '_')}_{role}"), None
        )
        call = self._call(block)
        self._order([call], node, at=None)
        call.args = (node, *call.args[1:])
        return node.name

    def call_of(self, place: Block | str) -> str:
        """Return the name of the node that calls a block, or the module at a path: its output, for `insert` and `rewire`.

        The node of a block is in the root graph, that of a module in the graph of the block that holds it.

        Raises:
            RewriteError: If the module is not called exactly once.
        """
        return self._call(place).name

    def input_of(self, place: Block | str) -> str:
        """Return the name of the node that a block, or the module at a path, reads first, in the same graph as `call_of`."""
        source = self._call(place).args[0]
        assert isinstance(source, fx.Node)
        return source.name

    def finish(self) -> ConvertedNetwork:
        """Check and recompile every edited graph and return the network.

        Raises:
            RewriteError: If an edit left a graph that does not hold together.
        """
        for path, module in self._dirty.items():
            try:
                module.graph.lint()
            except (RuntimeError, AttributeError) as error:
                raise RewriteError(
                    f"{path or '(root)'}: the graph does not hold together after {self._method}: {error}"
                ) from error
            module.recompile()
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.architecture = replace(self.architecture, macs=count_macs(self.network), params=parameters)
        self.network.meta["architecture"] = self.architecture
        return self.network

    def _owner(self, at: Block | None) -> SurgeryModule:
        return self.network if at is None else self.network.block(at.path)

    def _block_of(self, path: str) -> Block | None:
        holders = [block for block in self.architecture.blocks if path.startswith(f"{block.path}.")]
        return holders[0] if holders else None

    def _call(self, place: Block | str) -> fx.Node:
        path = place if isinstance(place, str) else place.path
        at = self._block_of(path)
        local = path.removeprefix(f"{at.path}.") if at else path
        calls: list[fx.Node] = list(self._owner(at).graph.find_nodes(op="call_module", target=local))
        if len(calls) != 1:
            raise RewriteError(f"{path}: expected one call of this module, found {len(calls)}; choose another module")
        return calls[0]

    def _node(self, owner: SurgeryModule, name: str, at: Block | None) -> fx.Node:
        for node in owner.graph.nodes:
            if node.name == name:
                found: fx.Node = node
                return found
        where = at.path if at else "(root)"
        names = ", ".join(node.name for node in owner.graph.nodes)
        raise RewriteError(f"{where}: there is no node {name!r}; its nodes are {names}")

    def _order(self, readers: Iterable[fx.Node], *sources: fx.Node, at: Block | None) -> None:
        for reader in readers:
            order = list(reader.graph.nodes)
            for source in sources:
                if source in order and order.index(source) > order.index(reader):
                    where = at.path if at else "(root)"
                    raise RewriteError(f"{where}: {reader.name} would read {source.name} before it is computed")

    def _attach(self, owner: SurgeryModule, module: nn.Module, name: str) -> str:
        attribute, number = name, 1
        while attribute in owner._modules or attribute in vars(owner):
            number += 1
            attribute = f"{name}_{number}"
        self._adopt(owner, module, owner)
        owner.add_module(attribute, module)
        return attribute

    def _adopt(self, owner: SurgeryModule, module: nn.Module, near: nn.Module) -> None:
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

    def _set(self, owner: nn.Module, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(owner.get_submodule(parent), name, module)

    def _protect(self, node: fx.Node, at: Block | None) -> None:
        for changed in protect(self.network, at.path if at else "", node):
            self._dirty[changed] = self.network.block(changed) if changed else self.network

    def _move(self, at: Block | None, old: fx.Node, new: fx.Node) -> None:
        """Let the places and marks of `old` name the node that stands for its value now."""
        if MARK in old.meta:
            new.meta[MARK] = old.meta.pop(MARK)
        if at is None:
            return
        current = self.architecture.block(at.path)
        moved = {place: new.name for place in ("body", "shortcut", "output") if getattr(current, place) == old.name}
        if moved:
            self.architecture = self.architecture.with_block(replace(current, **moved))  # type: ignore[arg-type]

    def _sweep(self, at: Block | None) -> None:
        """Drop what nobody reads from a graph, and from the root what it was fed with."""
        owner = self._owner(at)
        _drop_dead(owner)
        if at is not None:
            call = self._call(at)
            for place, argument in list(zip(owner.graph.find_nodes(op="placeholder"), call.args, strict=True))[1:]:
                if not place.users:
                    owner.graph.erase_node(place)
                    call.args = tuple(other for other in call.args if other is not argument)
            self._describe(at)
            _drop_dead(self.network)
            self._touch(self.network, None)
        self._touch(owner, at)

    def _describe(self, block: Block) -> None:
        """Bring what the architecture says about a block up to date: places that are gone, widths and counts."""
        owner, current = self._owner(block), self.architecture.block(block.path)
        nodes = {node.name: node for node in owner.graph.nodes}
        called = {f"{block.path}.{node.target}" for node in nodes.values() if node.op == "call_module"}
        output = owner.graph.output_node().all_input_nodes[0]
        spatial = self.module(block.spatial) if block.spatial in called else None
        hidden, cardinality = current.channels.hidden, current.cardinality
        if isinstance(spatial, nn.Conv2d):
            hidden = spatial.out_channels
            cardinality = spatial.groups if block.kind == "grouped" else hidden
        updated = replace(
            current,
            body=current.body if current.body in nodes else current.input,
            shortcut=current.shortcut if current.shortcut in nodes else None,
            join=current.join if current.join in nodes else None,
            output=output.name,
            split=current.split if current.split in called else None,
            merge=current.merge if current.merge in called else None,
            convs=tuple(conv for conv in current.convs if conv in called),
            channels=Channels(
                _width(nodes[current.input], current.channels.input), hidden, _width(output, current.channels.output)
            ),
            cardinality=cardinality,
            macs=sum(node.meta.get(MACS, 0) for node in nodes.values()),
            params=sum(parameter.numel() for parameter in owner.parameters()),
        )
        self.architecture = self.architecture.with_block(updated)

    def _stamp(self, node: fx.Node, at: Block | None, role: str) -> None:
        node.meta[SITE] = self._record(at, role, node.name)
        self._touch(self._owner(at), at)

    def _record(self, at: Block | None, role: str, node: str) -> Site:
        site = Site(self._method, role, at.path if at else "", node)
        self.sites.append(site)
        return site

    def _touch(self, module: SurgeryModule, at: Block | None) -> None:
        self._dirty[at.path if at else ""] = module


def upstream(*nodes: fx.Node) -> set[fx.Node]:
    """Return the nodes and everything that they are computed from, within their graph."""
    seen, pending = set(nodes), list(nodes)
    while pending:
        new = set(pending.pop().all_input_nodes) - seen
        seen |= new
        pending += new
    return seen


def positional(module: nn.Module) -> int | None:
    """Return how many arguments the forward of `module` takes, or None where it takes any number."""
    parameters = inspect.signature(module.forward).parameters.values()
    return None if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)


def _hands_on(channels: ChannelMap, node: fx.Node) -> bool:
    """Return whether `node` hands on the channels of its first input, and of no other value."""
    values = [channels.nodes.get(("", value.name)) for value in (node, *node.all_input_nodes)]
    spaces = [channels.find(space) for space in values if space is not None]
    return len(spaces) > 1 and spaces.count(spaces[0]) == 2 and spaces[0] == spaces[1]


def _drop_dead(owner: SurgeryModule) -> None:
    owner.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    owner.delete_all_unused_submodules()


def _width(node: fx.Node, known: int) -> int:
    return int(node.meta[SIZE][1]) if SIZE in node.meta else known


def _shell(network: ConvertedNetwork) -> nn.Module:
    shell = nn.Module()
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        shell.__dict__[name] = copy.copy(network.__dict__[name])
    shell.training = network.training
    return shell
