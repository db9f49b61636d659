"""What of a network a sub-network uses: which convolutions and norms are divided, and which stay whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils import parametrize

from surgery import Architecture, Block, ConvertedNetwork, Refusal, Rewriter
from surgery.channels import ChannelMap, Use, channel_map
from surgery.errors import InvalidOption, NothingConverted
from surgery.network import SurgeryModule
from surgery.tracing import upstream

CURE = "use plain convolutions and batch norms there, as ResNeXt, MobileNetV2, ResNet and WideResNet do"
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


@dataclass(frozen=True)
class Conv:
    """A convolution of which sub-networks use a part.

    Attributes:
        path: Module path.
        reads: Whether its input is divided.
        writes: Whether its output is.
    """

    path: str
    reads: bool
    writes: bool


@dataclass(frozen=True)
class Body:
    """The body of a block whose hidden channels are divided.

    Attributes:
        block: The block.
        convs: What of its convolutions is divided.
        norms: Paths of the norms of hidden channels.
    """

    block: Block
    convs: tuple[Conv, ...]
    norms: tuple[str, ...]


def body(rewriter: Rewriter, block: Block, parts: int) -> Body | Refusal:
    """Return what is divided in the body of a block: all channels between its first convolution and its merge.

    Raises:
        InvalidOption: If the channels cannot be divided into `parts`.
    """
    owner = rewriter.network.block(block.path)
    if block.merge is None or block.merge not in block.convs:
        return Refusal(block.path, "no convolution joins its branches, expected one at the end of its body", CURE)
    block.partition(parts)
    channels, inside = channel_map(owner), _inside(owner, block)
    hidden = _hidden(channels, block)
    pins = [pin.reason for space in hidden for pin in channels.pins_of(space) if not pin.boundary]
    if pins:
        return Refusal(block.path, f"its branches cannot be told apart: {pins[0]}", CURE)
    for space in hidden:
        check_divisible(channels.sizes[space], parts, block.path)
    uses = [use for use in channels.uses if use.path in inside]
    found = [_divided(owner, block, use, channels, hidden, parts) for use in uses]
    refusals = [part for part in found if isinstance(part, Refusal)]
    convs = tuple(part for part in found if isinstance(part, Conv))
    if not refusals and not any(conv.path == block.merge and conv.reads for conv in convs):
        reason = f"{block.merge} does not read the channels that the other convolutions write"
        refusals.append(Refusal(block.path, reason, CURE))
    return refusals[0] if refusals else Body(block, convs, tuple(part for part in found if isinstance(part, str)))


def _divided(
    owner: SurgeryModule, block: Block, use: Use, channels: ChannelMap, hidden: set[int], parts: int
) -> Conv | str | Refusal | None:
    """Return what is divided of a convolution, the path of a norm, why it cannot be, or None for what stays whole."""
    module, path = owner.get_submodule(use.path), f"{block.path}.{use.path}"
    reads, writes = (_is_in(channels, hidden, space) for space in (_read(module, use), use.writes))
    if not (reads or writes):
        return None
    if isinstance(module, _NORMS):
        return path
    if not (isinstance(module, nn.Conv2d) and is_plain(module)):
        return Refusal(block.path, f"{path} ({type(module).__name__}) acts on its branches and cannot be cut", CURE)
    if module.groups > 1:
        check_divisible(module.groups, parts, path)
        if not reads and path != block.convs[0]:
            return Refusal(block.path, f"{path} is grouped and reads more than the branches", CURE)
    return Conv(path, reads, writes and path != block.merge)


def _inside(owner: SurgeryModule, block: Block) -> set[str]:
    """Return the modules that are called between the first convolution of the body and the merge, both included."""
    calls = {f"{block.path}.{node.target}": node for node in owner.graph.find_nodes(op="call_module")}
    assert block.merge is not None
    first, last = calls[block.convs[0]], calls[block.merge]
    before = upstream(last) | {last}
    return {str(node.target) for node in calls.values() if node in before and first in upstream(node) | {node}}


def _is_in(channels: ChannelMap, spaces: set[int], space: int | None) -> bool:
    return space is not None and channels.find(space) in spaces


def _hidden(channels: ChannelMap, block: Block) -> set[int]:
    """Return the spaces that the convolutions before the merge write."""
    assert block.merge is not None
    before = block.convs[: block.convs.index(block.merge)]
    local = {path.removeprefix(f"{block.path}.") for path in before}
    return {channels.find(use.writes) for use in channels.uses if use.path in local and use.writes is not None}


def _read(module: nn.Module, use: Use) -> int | None:
    """Return the space that a module reads; a depthwise convolution reads what it writes."""
    return use.writes if isinstance(module, nn.Conv2d) and use.reads is None else use.reads


def is_plain(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is computed from its weight and settings alone."""
    plain = type(conv).forward is nn.Conv2d.forward and conv.padding_mode == "zeros"
    return plain and has_own_weight(conv)


def has_own_weight(module: nn.Module) -> bool:
    """Return whether the weight is a parameter, not worked out of others as in weight or spectral normalization."""
    return not parametrize.is_parametrized(module) and "weight" in module._parameters


def check_divisible(size: int, parts: int, where: str) -> None:
    """Refuse channels or groups that cannot be divided.

    Raises:
        InvalidOption: If `parts` does not divide `size`.
    """
    if size % parts:
        raise InvalidOption(
            f"inclusive: {where}: found {size} channels or groups, expected a multiple of {parts}, the number of "
            f"sub-networks; pass subnetworks= a divisor of {size}"
        )


def norm_paths(network: ConvertedNetwork, architecture: Architecture) -> list[str]:
    """Return the paths of all batch norms, in the order of the network.

    Raises:
        NothingConverted: If a norm cannot have copies for the sub-networks.
    """
    called = list(_called(network, architecture))
    found = [path for path in called if isinstance(network.get_submodule(path), nn.modules.batchnorm._NormBase)]
    unusable: list[str] = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        if path not in found and any(path.startswith(f"{leaf}.") for leaf in called):
            unusable.append(f"{path} ({type(module).__name__}) is inside a layer that is called as a whole")
        elif path in found and type(module) not in _NORMS:
            unusable.append(f"{path} is a {type(module).__name__}, expected a BatchNorm2d")
    if unusable:
        raise NothingConverted(
            f"inclusive: a norm of {architecture.name} cannot be given to every sub-network",
            tuple(Refusal(text.partition(" ")[0], text, CURE) for text in unusable),
        )
    return found


def _called(network: ConvertedNetwork, architecture: Architecture) -> Iterator[str]:
    """Yield the paths of the modules that the graphs call."""
    blocks = {block.path for block in architecture.blocks}
    for node in network.graph.find_nodes(op="call_module"):
        if node.target in blocks:
            graph: fx.Graph = network.block(str(node.target)).graph
            yield from (f"{node.target}.{inner.target}" for inner in graph.find_nodes(op="call_module"))
        else:
            yield str(node.target)


def refuse_count(blocks: Sequence[Block], count: int) -> None:
    """Refuse a number of sub-networks that the blocks do not allow.

    Raises:
        InvalidOption: With the numbers that they allow.
    """
    common = gcd(*(block.cardinality for block in blocks))
    if common % count:
        allowed = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
        raise InvalidOption(
            f"inclusive: option 'subnetworks' is {count}, but the blocks have "
            f"{'/'.join(str(n) for n in sorted({block.cardinality for block in blocks}))} branches; expected "
            f"{f'one of {allowed}' if allowed else 'blocks with a common divisor: use another network'}"
        )
