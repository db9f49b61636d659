"""Nest thin sub-networks in a network."""

from __future__ import annotations

from timm.layers import Linear
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn

from surgery import Architecture, Block, Refusal, Rewriter
from surgery.errors import NothingConverted
from surgery_inclusive.convs import FirstChannels, SlicedConv2d
from surgery_inclusive.heads import Heads
from surgery_inclusive.norms import IndependentNorm, SharedNorm
from surgery_inclusive.placement import Body, body, has_own_weight, norm_paths, refuse_count
from surgery_inclusive.selection import Subnetworks
from surgery_inclusive.taxonomy import Taxonomy


class Edit:
    """What both forms put into a network.

    Args:
        rewriter: Edits the network.
        architecture: What recognition found.
        count: K.
        sparse: Whether features are divided as well.

    Raises:
        NothingConverted: If no classifier was found.
    """

    def __init__(self, rewriter: Rewriter, architecture: Architecture, count: int, *, sparse: bool) -> None:
        self.rewriter, self.architecture, self.count, self.sparse = rewriter, architecture, count, sparse
        self.head = _head(rewriter, architecture)
        self._span: str | None = None

    def start(self, norm: str | None) -> None:
        """Put in the module that decides which sub-networks run."""
        chosen = Subnetworks(self.count, sparse=self.sparse, heads=self.head, norm=norm)
        # Before everything else: every block is fed with what it returns.
        image = next(iter(self.rewriter.network.graph.nodes)).name
        self._span = self.rewriter.compute(chosen, image, at=None, role="subnetworks")

    def span(self, path: str) -> str:
        """Return the node of the span in the graph that calls the module, or is that of the block, at `path`."""
        assert self._span is not None
        for block in self.architecture.blocks:
            if path == block.path or path.startswith(f"{block.path}."):
                return self.rewriter.feed(self._span, into=self.rewriter.architecture.block(block.path))
        return self._span

    def replace(self, path: str, module: nn.Module, role: str) -> None:
        """Put a module that reads the span in the place of another."""
        self.rewriter.replace(path, module, self.span(path), role=role)

    def protect(self, path: str) -> None:
        """Let nothing overwrite what the module at `path` reads."""
        self.rewriter.protect(self.rewriter.input_of(path), at=self._block(path))

    def norm(self, path: str, module: nn.Module) -> None:
        """Put a norm in the place of another, and behind it what that did besides."""
        old = self.rewriter.module(path)
        self.replace(path, module, "norm")
        if isinstance(old, BatchNormAct2d):
            behind = nn.Sequential(old.drop, old.act)
            self.rewriter.insert(behind, self.rewriter.call_of(path), at=self._block(path), role="act")

    def heads(self, taxonomy: Taxonomy | None) -> None:
        """Give every sub-network its classifiers."""
        linear = self.rewriter.module(self.head)
        assert isinstance(linear, nn.Linear)
        coarse = {} if taxonomy is None else dict(zip(taxonomy.levels, taxonomy.sizes, strict=True))
        self.replace(self.head, Heads(linear, self.count, sparse=self.sparse, coarse=coarse), "heads")

    def _block(self, path: str) -> Block | None:
        blocks = self.rewriter.architecture.blocks
        return next((block for block in blocks if path.startswith(f"{block.path}.")), None)


def nest(
    architecture: Architecture, rewriter: Rewriter, count: int, *, independent: bool, taxonomy: Taxonomy | None
) -> None:
    """Let sub-network k use the first k/K of the branches of every block.

    Raises:
        NothingConverted: If no block can be divided, with the reason for each.
        InvalidOption: If the branches of a block cannot be divided into `count`.
    """
    norms = norm_paths(rewriter.network, architecture)
    edit = Edit(rewriter, architecture, count, sparse=False)
    bodies = _bodies(rewriter, architecture, count)
    edit.start(norms[0] if norms else None)
    for place in bodies:
        _open(edit, place.block)
        for conv in place.convs:
            module = rewriter.module(conv.path)
            assert isinstance(module, nn.Conv2d)
            edit.replace(conv.path, SlicedConv2d(module, count, reads=conv.reads, writes=conv.writes), "conv")
    hidden = {path for place in bodies for path in place.norms}
    for path in norms:
        norm = rewriter.module(path)
        assert isinstance(norm, nn.BatchNorm2d)
        if independent:
            step = norm.num_features // count
            widths = [step * k if path in hidden else norm.num_features for k in range(1, count)]
            edit.norm(path, IndependentNorm(norm, widths))
        elif path in hidden:
            edit.norm(path, SharedNorm(norm, count))
    edit.heads(taxonomy)


def _bodies(rewriter: Rewriter, architecture: Architecture, count: int) -> list[Body]:
    joined = [block for block in architecture.blocks if block.merge is not None]
    if joined:
        refuse_count(joined, count)
    found = [body(rewriter, block, count) for block in architecture.blocks]
    bodies = [place for place in found if isinstance(place, Body)]
    if not bodies:
        refusals = [place for place in found if isinstance(place, Refusal)]
        raise NothingConverted(
            f"inclusive: no block of {architecture.name} can be divided", (*refusals, *architecture.refusals)
        )
    return bodies


def _open(edit: Edit, block: Block) -> None:
    """Let a block that begins with a depthwise or grouped convolution read the channels of its sub-network alone."""
    rewriter, path = edit.rewriter, block.convs[0]
    first = rewriter.module(path)
    assert isinstance(first, nn.Conv2d)
    if first.groups > 1:
        reader, source = rewriter.call_of(path), rewriter.input_of(path)
        module = FirstChannels(first.in_channels, edit.count)
        rewriter.insert(module, source, edit.span(block.path), at=block, role="first", users=[reader])


def _head(rewriter: Rewriter, architecture: Architecture) -> str:
    """Return the path of the classifier.

    Raises:
        NothingConverted: If there is none, or not a plain linear one whose result is the output.
    """
    path = architecture.head.path
    module = None if path is None else rewriter.module(path)
    reason = ""
    if path is None:
        reason = "no classifier was found, expected a linear one, which every sub-network gets its own of"
    elif type(module) not in (nn.Linear, Linear) or not has_own_weight(module):  # type: ignore[arg-type]
        reason = f"the classifier is a {type(module).__name__}, expected a plain linear layer"
    elif (behind := _behind(rewriter, path)) is not None:
        reason = f"{behind} changes what the classifier returns, expected its logits as the output"
    if reason:
        cure = "end the network with its linear classifier"
        raise NothingConverted(
            f"inclusive: {architecture.name} cannot be converted", (Refusal(path or "(root)", reason, cure),)
        )
    assert path is not None
    return path


def _behind(rewriter: Rewriter, head: str) -> str | None:
    """Return what comes between the classifier and the output, if anything does."""
    node = rewriter.network.graph.output_node().args[0]
    while isinstance(node, fx.Node) and node.target != head:
        module = rewriter.module(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Identity):
            return node.name
        node = node.args[0]
    return None
