"""Which blocks can be masked, and what in them has to work on several streams.

    input -> prefix -> reader -> ... -> merge -> norm -> + -> activation
      |                                                  |
      '------------------> shortcut ---------------------'

The branches begin at the reader, a convolution whose outputs are divided among them, and end at the merge. What comes
before the reader, and the shortcut, belongs to no branch: it is applied to every stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn

from surgery import Architecture, Block, Refusal, Rewriter
from surgery.errors import InvalidOption, RewriteError
from surgery.network import BlockModule
from surgery.slicing import check_branches
from surgery.tracing import OWNER, upstream

MAX_BRANCHES = 32
"""Into how many branches channels are divided at most by default."""
_MOST_FORMED = 8  # of branches that the source does not have: every one of them is a stream

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Hardtanh)
_RECTIFIERS = ("relu", "relu_")
_BY_CHANNEL = (*_ACTIVATIONS, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout)
_CURE = "use a ResNeXt, or another network of plain residual blocks"


@dataclass(frozen=True)
class Place:
    """A block that can be masked.

    Attributes:
        block: The block.
        reader: Path of the convolution that the branches begin at.
        norm: Path of the norm behind the merge, or None.
        convs: Paths of the convolutions before the reader and on the shortcut.
        norms: Paths of the norms there.
        activation: Path of the activation behind the addition, "relu" for a call of that function, or None.
        only_first: Why the block cannot read several streams, or "".
    """

    block: Block
    reader: str
    norm: str | None
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    activation: str | None
    only_first: str


def chains(rewriter: Rewriter, architecture: Architecture) -> tuple[list[list[Place]], list[Refusal]]:
    """Return the runs of two or more blocks that can be masked, and why the others cannot be."""
    refusals: list[Refusal] = []
    found: list[list[Place]] = [[]]
    for block in architecture.blocks:
        place = _placed(rewriter, block)
        if isinstance(place, Refusal):
            refusals.append(place)
            found.append([])
            continue
        if place.only_first or not (found[-1] and _follows(rewriter, found[-1][-1].block, block)):
            found.append([])
        found[-1].append(place)
    for chain in found:
        if len(chain) == 1:
            reason = chain[0].only_first or "no block that can be masked comes right before or after it"
            refusals.append(Refusal(chain[0].block.path, reason, _CURE))
    return [chain for chain in found if len(chain) > 1], refusals


def branch_count(blocks: list[Block], asked: int | None) -> int:
    """Return into how many branches each block is divided.

    Raises:
        InvalidOption: If the channels of a block cannot be divided so, or by nothing at all.
    """
    common = gcd(*(block.cardinality for block in blocks))
    if asked is not None:
        for block in blocks:
            block.partition(asked)
        return asked
    grouped = [block.cardinality for block in blocks if block.kind == "grouped"]
    most = MAX_BRANCHES if grouped else _MOST_FORMED
    count = max((n for n in range(2, most + 1) if common % n == 0), default=0)
    if not count:
        found = "/".join(str(n) for n in sorted({block.cardinality for block in blocks}))
        raise InvalidOption(
            f"masked: the blocks have {found} branches, expected a common divisor above 1; use another network"
        )
    return count


def _placed(rewriter: Rewriter, block: Block) -> Place | Refusal:
    owner = rewriter.network.block(block.path)
    try:
        return _describe(_Reading(owner, block))
    except _Unusable as error:
        return Refusal(block.path, str(error), _CURE)


class _Unusable(Exception):
    """Why a block cannot be masked."""


class _Reading:
    """The graph of a block."""

    def __init__(self, owner: BlockModule, block: Block) -> None:
        self.owner, self.block = owner, block
        self.nodes: dict[str, fx.Node] = {node.name: node for node in owner.graph.nodes}
        self.calls = {f"{block.path}.{node.target}": node for node in self.nodes.values() if node.op == "call_module"}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.owner.get_submodule(str(node.target)) if node.op == "call_module" else None

    def path(self, node: fx.Node) -> str:
        return f"{self.block.path}.{node.target}"

    def once(self, node: fx.Node) -> bool:
        """Return whether the module of `node` is called there alone."""
        return sum(other.target == node.target for other in self.nodes.values()) == 1

    def between(self, first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
        """Yield the nodes behind `first` up to `last`, which must follow one another with nothing beside them.

        Raises:
            _Unusable: If they do not.
        """
        node = first
        while node is not last:
            users = list(node.users)
            if len(users) != 1 or len(users[0].all_input_nodes) != 1:
                readers = ", ".join(dict.fromkeys(str(user.meta.get(OWNER) or user.name) for user in users))
                raise _Unusable(
                    f"the joined branches, {node.name}, are read by {readers}, as squeeze-excite does; expected one "
                    "value after the other"
                )
            node = users[0]
            yield node


def _describe(reading: _Reading) -> Place:
    block = reading.block
    merge = _merge(reading)
    body, join = reading.nodes[block.body], reading.nodes[block.join] if block.join else None
    norm = _norm_behind(reading, merge, body)
    reader = _reader(block)
    outside, reason = _outside(reading, reader)
    conv = reading.owner.get_submodule(reader.removeprefix(f"{block.path}."))
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        reason = reason or f"its branches begin at {reader}, which is grouped, expected a convolution that reads all"
    return Place(
        block=block,
        reader=reader,
        norm=norm,
        convs=tuple(reading.path(node) for node in outside if isinstance(reading.module(node), nn.Conv2d)),
        norms=tuple(reading.path(node) for node in outside if isinstance(reading.module(node), _NORMS)),
        activation=_activation(reading, join or body),
        only_first=reason,
    )


def _reader(block: Block) -> str:
    """Return the path of the convolution that the branches begin at: in a plain block all channels enter it."""
    return block.spatial if block.kind == "plain" or block.split is None else block.split


def _merge(reading: _Reading) -> fx.Node:
    """Return the node of the merge.

    Raises:
        _Unusable: If the branches do not end there, or are mixed before.
    """
    block = reading.block
    if block.merge is None or block.merge != block.convs[-1]:
        raise _Unusable("its body does not end with a dense convolution that joins the branches, expected one")
    if block.attention:
        raise _Unusable(f"{block.attention} mixes the branches before they are joined")
    merge = reading.calls[block.merge]
    conv = reading.module(merge)
    assert isinstance(conv, nn.Conv2d)
    for path in {block.merge, _reader(block)}:
        found = reading.owner.get_submodule(path.removeprefix(f"{block.path}."))
        if type(found).forward is not nn.Conv2d.forward or not _has_plain_padding(found):
            raise _Unusable(f"{path} is a {type(found).__name__} of its own kind, expected a plain Conv2d")
    if conv.bias is not None:
        raise _Unusable(f"{block.merge} has a bias, which belongs to no branch, expected none")
    try:
        check_branches(reading.owner, block)
    except RewriteError as error:
        reason = str(error).removeprefix(f"{block.path}: ")
        raise _Unusable(f"its branches cannot be told apart: {reason}") from error
    return merge


def _has_plain_padding(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _norm_behind(reading: _Reading, merge: fx.Node, body: fx.Node) -> str | None:
    """Return the path of the norm between merge and addition.

    Raises:
        _Unusable: If anything else is there that does something.
    """
    norm: str | None = None
    for node in reading.between(merge, body):
        module = reading.module(node)
        if isinstance(module, _NORMS) and norm is None and _is_plain_norm(module) and reading.once(node):
            norm = reading.path(node)
        elif not _does_nothing(module):
            what = f"{reading.path(node)} ({type(module).__name__})" if module else node.name
            raise _Unusable(
                f"{what} acts on the joined branches before the addition, expected only a batch norm with affine "
                "parameters and running statistics"
            )
    return norm


def _is_plain_norm(norm: nn.BatchNorm2d | BatchNormAct2d) -> bool:
    acts = isinstance(norm, BatchNormAct2d) and not (_does_nothing(norm.act) and _does_nothing(norm.drop))
    return norm.affine and norm.track_running_stats and not acts


def _does_nothing(module: nn.Module | None) -> bool:
    """Return whether `module` passes on what it gets in train mode, too."""
    rate = getattr(module, "drop_prob", getattr(module, "p", None))
    return isinstance(module, nn.Identity) or (rate == 0 and not any(True for _ in module.parameters()))  # type: ignore[union-attr]


def _outside(reading: _Reading, reader: str) -> tuple[list[fx.Node], str]:
    """Return the nodes before the reader and on the shortcut, and why they cannot work on several streams, or ""."""
    block = reading.block
    source = reading.nodes[block.input]
    ends = [reading.calls[reader].all_input_nodes[0]]
    ends += [reading.nodes[block.shortcut]] if block.shortcut else []
    outside = [node for node in reading.nodes.values() if node in upstream(*ends) and node is not source]
    for node in outside:
        module = reading.module(node)
        if isinstance(module, nn.Conv2d):
            fits = type(module).forward is nn.Conv2d.forward and _has_plain_padding(module) and reading.once(node)
        elif isinstance(module, _NORMS):
            fits = module.affine and module.track_running_stats and reading.once(node)
        elif module is not None:
            fits = isinstance(module, _BY_CHANNEL)
        else:
            fits = node.op in ("call_function", "call_method") and _name(node) in _RECTIFIERS
        if not fits:
            what = f"{reading.path(node)} ({type(module).__name__})" if module else node.name
            return outside, f"{what} cannot be applied to several streams"
    return outside, ""


def _activation(reading: _Reading, joined: fx.Node) -> str | None:
    """Return what is between the addition and the output.

    Raises:
        _Unusable: If it is more than an activation.
    """
    found: str | None = None
    for node in reading.between(joined, reading.nodes[reading.block.output]):
        module = reading.module(node)
        if isinstance(module, nn.Identity):
            continue
        named = reading.path(node) if isinstance(module, _ACTIVATIONS) else None
        named = "relu" if module is None and _name(node) in _RECTIFIERS else named
        if named is None or found is not None:
            raise _Unusable(f"{node.name} follows the addition, expected nothing but an activation")
        found = named
    return found


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _follows(rewriter: Rewriter, before: Block, block: Block) -> bool:
    """Return whether `block` reads what `before` returns, and nobody else does."""
    graph = rewriter.network.graph
    first, second = (next(n for n in graph.nodes if n.name == rewriter.call_of(b)) for b in (before, block))
    return list(second.all_input_nodes) == [first] and list(first.users) == [second]
