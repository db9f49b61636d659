"""Which channel dimensions belong together: additions, per-channel layers and grouped convolutions couple them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor, fx, nn

from surgery.network import BlockModule, SurgeryModule
from surgery.shapes import SIZE
from surgery.widths import follow, follow_layer, function_name, readable

_PER_CHANNEL = (nn.modules.batchnorm._NormBase,)
_MIXING = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.ChannelShuffle)
_ARITHMETIC = ("add", "add_", "iadd", "sub", "isub", "mul", "mul_", "imul", "truediv")
_RECTIFIERS = ("relu", "relu_", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish")
_BOUNDED = ("hardtanh", "tanh", "sigmoid", "hardsigmoid")
_SPATIAL = ("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "boolean_dispatch", "mean", "flatten", "interpolate")
_SAME = ("contiguous", "clone", "detach", "float", "to", "dropout", "drop_path", "stochastic_depth")
_BY_CHANNEL = frozenset((*_ARITHMETIC, *_RECTIFIERS, *_BOUNDED, *_SPATIAL, *_SAME))


@runtime_checkable
class PerChannel(Protocol):
    """A module that a method inserted and that treats every channel by itself: a gate with one entry for each."""

    def sliced(self, channels: Tensor) -> nn.Module:
        """Return the module for the channels `channels` of those it has now."""


@runtime_checkable
class ChannelReader(Protocol):
    """A module that a method inserted and that turns channels into something else, such as the logits of a gate."""

    def reading(self, channels: Tensor) -> nn.Module:
        """Return the module for an input that keeps only the channels `channels` of its first argument."""


@runtime_checkable
class ChannelMixer(Protocol):
    """A module that a method inserted and whose result has channels of its own, even where it has as many as its input.

    Attributes:
        mixes_channels: True.
    """

    mixes_channels: bool


class Select(nn.Module):
    """Read only some channels of a value that others read in full.

    Args:
        index: (n,) channels to read.

    Shape:
        (B, C, ...) to (B, n, ...).
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """Return the selected channels."""
        return value.index_select(1, self.index)


class Scatter(nn.Module):
    """Put channels to their places in a value of `width` channels that is zero elsewhere.

    Args:
        index: (n,) where they belong.
        width: C.

    Shape:
        (B, n, ...) to (B, C, ...).
    """

    index: Tensor

    def __init__(self, index: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.width = width

    def forward(self, value: Tensor) -> Tensor:
        """Return the full value."""
        full = value.new_zeros(value.shape[0], self.width, *value.shape[2:])
        return full.index_copy(1, self.index, value)


@dataclass(frozen=True)
class Use:
    """A module with weights that are indexed by channels, or a parameter that a graph reads itself.

    Attributes:
        path: Its path within the analysed module.
        reads: Space of its input channels, or None where it has no such dimension.
        writes: Space of its output channels.
        mixes: Whether it is a parameter, or a layer that exact pruning leaves alone.
    """

    path: str
    reads: int | None
    writes: int | None
    mixes: bool = False


@dataclass(frozen=True)
class Link:
    """A grouped convolution: its input and output spaces keep or lose whole groups together.

    So do a space and what is left of it when some of its channels are folded into one, where that is followed.
    """

    reads: int
    writes: int
    groups: int


@dataclass(frozen=True)
class Pin:
    """Why a space cannot change.

    Attributes:
        space: The space.
        reason: What holds it.
        path: Path of the module that holds it, or "" where it is no module.
        boundary: Whether it is what the analysed module reads or returns, so that only what lies outside holds it.
    """

    space: int
    reason: str
    path: str = ""
    boundary: bool = False


@dataclass
class ChannelMap:
    """Spaces of coupled channels of one module.

    Attributes:
        uses: Modules to slice when a space shrinks.
        links: Grouped convolutions.
        nodes: Space of the channels of each node, by (prefix, node name).
        sizes: Number of channels of each space.
        pins: What keeps spaces from changing; one space can be held in several places.
        exact: Whether what is left of a space has to compute what it did before.
    """

    uses: list[Use] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    nodes: dict[tuple[str, str], int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    exact: bool = True
    _parents: list[int] = field(default_factory=list)

    def find(self, space: int) -> int:
        """Return the representative of `space`."""
        while self._parents[space] != space:
            space = self._parents[space]
        return space

    def new(self, size: int, reason: str = "", path: str = "") -> int:
        """Create a space of `size` channels, pinned where a reason is given."""
        self._parents.append(len(self._parents))
        self.sizes.append(size)
        if reason:
            self.pin(len(self.sizes) - 1, reason, path)
        return len(self.sizes) - 1

    def union(self, first: int, second: int) -> int:
        """Couple two spaces of one size."""
        first, second = self.find(first), self.find(second)
        if first != second:
            self._parents[second] = first
        return first

    def follow(self, path: str, space: int) -> None:
        """Let the parameter or mixing layer at `path` shrink with `space`."""
        self.uses.append(Use(path, None, space, mixes=True))

    def fold(self, space: int, size: int) -> int:
        """Return the space of `size` channels that are left of `space` where several are folded into each."""
        self.links.append(Link(self.new(size), space, size))
        return self.links[-1].reads

    def pin(self, space: int, reason: str, path: str = "", *, boundary: bool = False) -> None:
        """Declare that `space` cannot change, because of the module at `path` if one is given."""
        self.pins.append(Pin(space, reason, path, boundary))

    def pins_of(self, space: int) -> list[Pin]:
        """Return everything that keeps `space` from changing."""
        root = self.find(space)
        return [pin for pin in self.pins if self.find(pin.space) == root]


def channel_map(module: SurgeryModule, *, exact: bool = True) -> ChannelMap:
    """Return the coupled channels of a block, or of a whole network with all its blocks.

    Args:
        module: The block or network; its shapes are up to date.
        exact: Whether the channels that are kept have to compute what they did before, so that what mixes channels,
            such as a group norm, holds them. Without, for weights that are drawn or trained anew, only what is written
            for a number of channels holds them, such as an attention with fixed heads.
    """
    channels = ChannelMap(exact=exact)
    first = next(iter(module.graph.nodes))
    size = first.meta[SIZE][1] if SIZE in first.meta else 0
    source = channels.new(size)
    channels.pin(source, "it is the input of the module", boundary=True)
    out = _walk(channels, module, "", source)
    if out is not None:
        channels.pin(out, "it is the output of the module", boundary=True)
    return channels


def _walk(channels: ChannelMap, module: SurgeryModule, prefix: str, source: int | None) -> int | None:
    spaces: dict[fx.Node, int | None] = {}
    result: int | None = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            spaces[node] = source if not spaces else None
        elif node.op == "output":
            value = node.args[0]
            result = spaces.get(value) if isinstance(value, fx.Node) else None
        elif node.op == "call_module":
            spaces[node] = _call(channels, module, prefix, node, spaces)
        elif channels.exact:
            spaces[node] = _function(channels, node, spaces)
        else:
            spaces[node] = follow(channels, prefix, node, spaces)
        space = spaces.get(node)
        if not channels.exact and space is not None and channels.sizes[space] == 1:
            spaces[node] = space = None  # one channel looks like every dimension of one entry
        if space is not None:
            channels.nodes[prefix, node.name] = space
    return result


def _call(
    channels: ChannelMap, owner: SurgeryModule, prefix: str, node: fx.Node, spaces: dict[fx.Node, int | None]
) -> int | None:
    target = str(node.target)
    module, path = owner.get_submodule(target), f"{prefix}{target}"
    sources = [spaces.get(argument) for argument in node.all_input_nodes]
    source = sources[0] if sources else None
    if isinstance(module, BlockModule):
        return _walk(channels, module, f"{path}.", source)
    if not channels.exact and isinstance(module, (nn.Conv2d, nn.Linear)):
        source = readable(channels, module, path, source)
    if isinstance(module, nn.Conv2d) and source is not None:
        return _convolution(channels, module, path, source)
    if isinstance(module, nn.Linear) and source is not None:
        return _linear(channels, module, path, source)
    if isinstance(module, (*_PER_CHANNEL, PerChannel)) and source is not None:
        channels.uses.append(Use(path, None, source))
        return source
    if isinstance(module, ChannelReader) and source is not None:
        channels.uses.append(Use(path, source, None))
        return None
    if isinstance(module, (Select, Scatter)) and source is not None:
        return _indexed(channels, module, path, source)
    mixes = isinstance(module, (*_MIXING, ChannelMixer))
    if not channels.exact and not isinstance(module, (nn.ChannelShuffle, ChannelMixer)):
        return None if source is None else follow_layer(channels, module, path, node, source)
    width = None if source is None else channels.sizes[channels.find(source)]
    # A buffer with an entry for every channel, such as the kernel of a blurring pool, would have to be cut as well.
    weights = any(True for _ in module.parameters()) or any(width in buffer.shape for buffer in module.buffers())
    if source is not None and not weights and not mixes and _width(node) in (None, width):
        return source
    reason = f"{path} ({type(module).__name__}) uses it in a way that cannot be cut"
    return _opaque(channels, node, sources, reason, path)


def _indexed(channels: ChannelMap, module: Select | Scatter, path: str, source: int) -> int:
    if isinstance(module, Scatter):
        channels.uses.append(Use(path, source, None))
        return channels.new(module.width, f"{path} writes into it by index")
    channels.pin(source, f"{path} reads it by index")
    out = channels.new(len(module.index))
    channels.uses.append(Use(path, None, out))
    return out


def _convolution(channels: ChannelMap, conv: nn.Conv2d, path: str, source: int) -> int:
    if conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1:
        channels.uses.append(Use(path, None, source))
        return source
    out = channels.new(conv.out_channels)
    channels.uses.append(Use(path, source, out))
    if conv.groups > 1:
        channels.links.append(Link(source, out, conv.groups))
    return out


def _linear(channels: ChannelMap, linear: nn.Linear, path: str, source: int) -> int:
    if linear.in_features != channels.sizes[channels.find(source)]:
        channels.pin(source, f"{path} reads it flattened together with its positions")
    out = channels.new(linear.out_features)
    channels.uses.append(Use(path, source, out))
    return out


def _function(channels: ChannelMap, node: fx.Node, spaces: dict[fx.Node, int | None]) -> int | None:
    sources = [spaces.get(argument) for argument in node.all_input_nodes]
    known = [space for space in sources if space is not None]
    if not known:
        return None
    sizes = {channels.sizes[channels.find(space)] for space in known}
    if (
        function_name(node) not in _BY_CHANNEL
        or len(sizes) != 1
        or _width(node) not in (None, *sizes)
        or _reads_other_channels(node, spaces)
    ):
        return _opaque(channels, node, sources, f"{node.name} uses it in a way that cannot be cut")
    for space in known[1:]:
        channels.union(known[0], space)
    return known[0]


def _width(node: fx.Node) -> int | None:
    size = node.meta.get(SIZE)
    return None if size is None or len(size) < 2 else int(size[1])


def _reads_other_channels(node: fx.Node, spaces: dict[fx.Node, int | None]) -> bool:
    """Return whether `node` combines its channels with a parameter, or what is made of one, with a number for each."""
    rank = len(node.meta.get(SIZE, ()))
    for source in node.all_input_nodes:
        size = source.meta.get(SIZE, ())
        place = 1 - rank + len(size)  # of the channels, where the last dimensions are aligned
        if spaces.get(source) is None and 0 <= place < len(size) and size[place] != 1:
            return True
    return False


def _opaque(channels: ChannelMap, node: fx.Node, sources: list[int | None], reason: str, path: str = "") -> int | None:
    for space in sources:
        if space is not None:
            channels.pin(space, reason, path)
    size = node.meta.get(SIZE)
    return channels.new(size[1], reason, path) if size is not None and len(size) > 1 else None
