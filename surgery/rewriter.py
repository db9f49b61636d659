"""The only code that mutates a graph. Plugins name nodes and modules; naming, provenance and checks live here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import fx, nn

from surgery import cutting, drops, replication
from surgery.architecture import Architecture, Block
from surgery.editing import Editor, hand_over_hooks
from surgery.errors import RewriteError
from surgery.history import Site
from surgery.network import ConvertedNetwork
from surgery.taps import Tap, taps_of

JSON = TypeVar("JSON")


class Rewriter:
    """Edit a converted network on behalf of one method.

    Nodes are referred to by name within the graph of the block they live in (`at=block`), or of the root (`at=None`);
    the names of a block's places are fields of `Block`. Every edit is recorded as a `Site` and stamped on the nodes it
    made. The places in `architecture` stay true while edits go on; its channels, resolutions and MACs are so behind
    every cut of a block that can run on what it reads then, and behind `finish`. They come from a run on meta tensors
    in eval mode: that must be possible with the modules that are put in, which there see shapes and no numbers.

    Args:
        network: What is edited, in place; `convert` hands over a copy.
        method: Name of the method.
        decisions: Decisions of an earlier run to be replayed, or None.
    """

    def __init__(self, network: ConvertedNetwork, method: str, decisions: Mapping[str, Any] | None = None) -> None:
        self.decisions: dict[str, Any] = {}
        self._editor = Editor(network, method)
        self._replayed = decisions

    @property
    def network(self) -> ConvertedNetwork:
        """The network, as edited so far."""
        return self._editor.network

    @property
    def architecture(self) -> Architecture:
        """What is known about the network, as edited so far."""
        return self._editor.architecture

    @property
    def sites(self) -> list[Site]:
        """The edits so far, in order."""
        return self._editor.sites

    @property
    def replays(self) -> bool:
        """Whether an earlier run is repeated: its weights follow, so none need be drawn or worked out."""
        return self._replayed is not None

    def module(self, path: str) -> nn.Module:
        """Return the module at `path` of the network."""
        return self._editor.module(path)

    def decide(self, key: str, choose: Callable[[], JSON]) -> JSON:
        """Return a random, searched or timed choice: made once by `choose()`, recorded, read back on replay.

        Args:
            key: Unique within the method.
            choose: Makes the choice; returns a JSON value.

        Raises:
            RewriteError: If the key was used before, or a replayed record lacks it.
        """
        if key in self.decisions:
            raise RewriteError(f"{self._editor.method}: the decision {key!r} is made twice; give each its own key")
        if self._replayed is not None and key not in self._replayed:
            raise RewriteError(
                f"{self._editor.method}: the record has no decision {key!r}; it was written by another version"
            )
        value: JSON = choose() if self._replayed is None else self._replayed[key]
        self.decisions[key] = value
        return value

    def insert(
        self, module: nn.Module, *inputs: str, at: Block | None, role: str, users: Iterable[str] | None = None
    ) -> str:
        """Call a new module behind `inputs[0]` and let its uses read the result.

        Args:
            module: The new module; it gets the device, dtype and mode of its surroundings.
            *inputs: Node names; the first is the value that is passed through or replaced, further ones are extra
                arguments.
            at: The block that the nodes live in, or None for the root graph.
            role: What it is for, such as "gate"; part of the new module's path.
            users: Names of the only nodes that should read the new value; default: all that read `inputs[0]`, but for
                those that the further inputs are computed from.

        Returns:
            Name of the new node.

        Raises:
            RewriteError: If a node does not exist, or would be read before it is computed.
        """
        return self._editor.insert(module, *inputs, at=at, role=role, users=users)

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
        editor = self._editor
        source, call, block = editor.node(node, None), editor.call(into), editor.owner(into)
        placeholders = list(block.graph.find_nodes(op="placeholder"))
        if source in call.args:
            return str(placeholders[call.args.index(source)].name)
        editor.check_order([call], source, at=None)
        with block.graph.inserting_after(placeholders[-1]):
            placeholder = block.graph.placeholder(f"{node}_in")
        call.args = (*call.args, source)
        editor.stamp(placeholder, into, "input")
        editor.touch(None)
        return placeholder.name

    def replace(self, path: str, module: nn.Module, *extra: str, role: str = "replacement") -> None:
        """Put `module` in the place of the one at `path`: same call and hooks, weights handed over explicitly.

        Args:
            path: Path of the old module, such as `block.merge`.
            module: The new one; parameters it shares with the old one keep their state-dict keys.
            *extra: Names of further arguments of the call, in the graph that calls the module.
            role: What it is for.

        Raises:
            RewriteError: If the graph does not call that module exactly once.
        """
        editor = self._editor
        at, node = editor.block_of(path), editor.call(path)
        editor.adopt(editor.owner(at), module, self.module(path))
        hand_over_hooks(self.module(path), module)
        self.network.set_submodule(path, module)
        node.args = (*node.args, *(editor.node(name, at) for name in extra))
        editor.check_order([node], *[argument for argument in node.args if isinstance(argument, fx.Node)], at=at)
        editor.stamp(node, at, role)

    def protect(self, node: str, *, at: Block | None) -> None:
        """Let nothing overwrite the value of `node`: in-place operations that would are made out-of-place."""
        self._editor.protect(self._editor.node(node, at), at)

    def tap(self, node: str, name: str, *, at: Block | None) -> str:
        """Record the value of `node` in every training forward, under `name`.

        An in-place operation that reads the value is made out-of-place, so that the tap shows what it was put on.

        Raises:
            RewriteError: If the model already has a tap of that name.
        """
        if name in taps_of(self.network):
            raise RewriteError(f"{name}: the model already has a tap of this name; taps are unique")
        self.protect(node, at=at)
        return self.insert(Tap(name), node, at=at, role="tap")

    def bypass(self, block: Block) -> None:
        """Remove the body of a residual block: its output becomes what the shortcut and the final activation give.

        Raises:
            RewriteError: If the block has no shortcut.
        """
        cutting.bypass(self._editor, block)

    def returns(self, node: str, *, at: Block) -> None:
        """Let a block return another of its values; what nobody reads any more is dropped, such as its addition.

        A block returns one tensor: pack several, such as body and shortcut, into one with `compute`, and unpack it with
        `rewire` or `insert(..., at=None)`.

        Raises:
            RewriteError: If the node does not exist.
        """
        graph = self._editor.owner(at).graph
        graph.output_node().args = (self._editor.node(node, at),)
        self._editor.sweep(at)
        self._editor.record(at, "output", node)

    def remove(self, path: str) -> None:
        """Take an inserted pass-through module out again: what read its result reads its first input.

        Raises:
            RewriteError: If no method inserted it, or it is not called exactly once.
        """
        cutting.remove(self._editor, path)

    def select(self, path: str, keep: Sequence[int]) -> None:
        """Replace an inserted module by the part of it that `keep` names, see `surgery.slicing.Selectable`.

        Further arguments of the call that the new module does not take are dropped, and what computed them.

        Raises:
            RewriteError: If the module is not selectable.
        """
        cutting.select(self._editor, path, keep)

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
        return cutting.keep(self._editor, block, branches, of)

    def narrow(self, path: str, *, inputs: Sequence[int] | None = None, outputs: Sequence[int] | None = None) -> None:
        """Keep only some channels of a convolution inside a block, with everything that is coupled to them.

        Channels that the block shares with its shortcut stay as they are: the body then reads them through a `Select`
        and writes them through a `Scatter`, so what is cut away must be zero there for the result to stay the same.

        Args:
            path: Path of the convolution.
            inputs: Input channels to keep, or None for all.
            outputs: Output channels to keep, or None for all.

        Raises:
            RewriteError: If these channels are coupled to something that cannot change, or none would be left.
        """
        cutting.narrow(self._editor, path, inputs, outputs)

    def keep_classes(self, classes: Sequence[int]) -> None:
        """Keep only these rows of the classifier, in this order.

        Raises:
            RewriteError: If no classifier was found, or a class does not exist.
        """
        cutting.keep_classes(self._editor, classes)

    def scale(self, widths: Mapping[str, int | Sequence[int]], *, exact: bool = True) -> None:
        """Set the output channels of convolutions, with everything in the network that is coupled to them.

        Args:
            widths: Convolution path -> number of channels, of which the first are kept, or the indices of those to
                keep. Convolutions that feed the same addition, and everything that reads them, change together, so
                naming one of each group is enough.
            exact: Whether the channels that are kept have to compute what they did before: see
                `surgery.channels.channel_map`.

        Raises:
            RewriteError: If two coupled convolutions are given different widths, or a group cannot change.
        """
        cutting.scale(self._editor, widths, exact=exact)

    def scale_drop_rates(self, factor: float) -> None:
        """Multiply the rates of all dropout, stochastic depth and DropBlock in the network by `factor`, at most 1."""
        drops.scale_drop_rates(self._editor, factor)

    def replicate(self, copies: int, join: nn.Module, split: nn.Module | None = None) -> None:
        """Run `copies` independent copies of the whole network side by side and join their outputs.

        The copies live at `members.<i>`; each has its own weights, equal to the source's until the method changes them.

        Args:
            copies: At least 1.
            join: Called with the outputs of all copies; returns one (B, classes) tensor.
            split: Called with the image, or with one for each copy along the channels, as `Architecture.input_size`
                says from then on; returns the tuple of what each copy sees. Default: all see the image.

        Raises:
            RewriteError: If the network has taps, whose names would not be unique any more, or `split` takes neither.
        """
        replication.replicate(self._editor, copies, join, split)

    def keep_members(self, members: Sequence[int]) -> None:
        """Keep only these of the copies that `replicate` made; the joining module joins what is left.

        Raises:
            RewriteError: If there are no copies, or one of them does not exist.
        """
        replication.keep_members(self._editor, members)

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
        editor = self._editor
        name = self.compute(combine, *inputs, at=None, role=f"{block.path.replace('.', '_')}_{role}")
        node, call = editor.node(name, None), editor.call(block)
        editor.check_order([call], node, at=None)
        call.args = (node, *call.args[1:])
        return name

    def call_of(self, place: Block | str) -> str:
        """Return the name of the node that calls a block, or the module at a path, for `insert` and `rewire`.

        The node of a block is in the root graph, that of a module in the graph of the block that holds it.

        Raises:
            RewriteError: If the module is not called exactly once.
        """
        return self._editor.call(place).name

    def input_of(self, place: Block | str) -> str:
        """Return the name of the node that a block, or the module at a path, reads first, beside that of `call_of`."""
        source = self._editor.call(place).args[0]
        assert isinstance(source, fx.Node)
        return source.name

    def finish(self) -> ConvertedNetwork:
        """Check and recompile every edited graph and return the network.

        Raises:
            RewriteError: If an edit left a graph that does not hold together.
        """
        self._editor.settle()
        self.network.meta["architecture"] = self.architecture
        return self.network
