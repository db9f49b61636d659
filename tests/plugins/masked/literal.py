"""Masked networks by their definition: one branch, one stream, one slice of weights at a time.

Slow, and shares no code with the library. Branch j of a block reads

    x_j = act(a * sum_k m_jk s_k + b * sum_k m_jk F_k)

over the branches k of the block before it: s_k is the shortcut of stream k, F_k the residual of branch k, m the mask.
A branch begins at the last convolution that reads all channels; what is before it is applied to every stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2

Affine = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rule:
    """How branches are joined.

    Attributes:
        branches: C, the same in all blocks.
        fan_in: K of the masks; the last block joins all C branches, so there C stands in its place.
        aggregate: "resnext" divides the shortcuts by K, "mean" both parts, "sum" none.
        norm: "shared" normalises the sum of every consumer, "branch" the output of every branch.
        training: Whether norms use the statistics of the batch.
    """

    branches: int
    fan_in: int
    aggregate: str = "resnext"
    norm: str = "shared"
    training: bool = False


@dataclass(frozen=True)
class Unit:
    """A convolution and the norm behind it, with the path of the norm."""

    conv: nn.Conv2d
    path: str
    norm: nn.BatchNorm2d


@dataclass(frozen=True)
class Block:
    """A residual block in parts: units, shortcut or None, activations within and behind it."""

    units: tuple[Unit, ...]
    shortcut: tuple[str, nn.Module] | None
    inner: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor], Tensor]

    @property
    def begin(self) -> int:
        """The unit where branches begin, if not with the first: none behind it reads the channels of other branches."""
        return max([0] + [n for n, unit in enumerate(self.units[:-1]) if unit.conv.groups == 1])


class Literal:
    """A masked network over the tensors of an unconverted `source`, which may require gradients.

    Attributes:
        affines: Scale and shift of every branch, (C, c') each, by the path of the last norm; norm="branch" only.
        seen: Mean and unbiased variance of the batch by the path of the norm: one pair a stream or slice of channels.
    """

    def __init__(self, source: nn.Module, rule: Rule) -> None:
        self.source = source
        self.rule = rule
        self.before, self.blocks, self.after, self.classifier = parts(source)
        self.affines = branch_affines(self.blocks, rule.branches)
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Return the logits; `masks` has one (C, C) matrix for every block but the first, consumers in rows."""
        self.seen = {}
        branches = self.rule.branches
        streams = [self.apply(self.before, images)]
        for index, block in enumerate(self.blocks):
            shortcuts = [self.apply([block.shortcut], stream) if block.shortcut else None for stream in streams]
            begun = [self.prefix(block, stream) for stream in streams]
            if index == 0:
                shortcuts, begun = shortcuts * branches, begun * branches
            residuals = [self.branch(block, k, begun[k]) for k in range(branches)]
            if index == len(self.blocks) - 1:
                rows, fan_in = [[1.0] * branches], branches
            else:
                rows, fan_in = (
                    [[masks[index][j, k] for k in range(branches)] for j in range(branches)],
                    self.rule.fan_in,
                )
            streams = [self.join(block, row, fan_in, shortcuts, residuals) for row in rows]
        features = self.apply(self.after, streams[0])
        pooled = features.sum(dim=(2, 3)) / (features.shape[2] * features.shape[3])
        return F.linear(pooled, self.classifier.weight, self.classifier.bias)

    def apply(self, layers: Sequence[tuple[str, nn.Module]], x: Tensor) -> Tensor:
        """Apply plain layers of the source one after the other."""
        for path, layer in layers:
            if isinstance(layer, nn.Conv2d):
                x = F.conv2d(x, **geometry(layer))
            elif isinstance(layer, nn.BatchNorm2d):
                x = self.normalise(path, layer, x)
            elif isinstance(layer, InvertedResidual):
                conv = self.apply([(f"{path}.conv", layer.conv)], x)
                x = x + conv if layer.use_res_connect else conv
            elif isinstance(layer, nn.Sequential):
                x = self.apply([(f"{path}.{name}", child) for name, child in layer.named_children()], x)
            elif isinstance(layer, nn.ReLU):
                x = F.relu(x)
            else:
                x = layer(x)
        return x

    def prefix(self, block: Block, x: Tensor) -> Tensor:
        """Return what the branches of a block begin with, of one stream."""
        for unit in block.units[: block.begin]:
            x = block.inner(self.normalise(unit.path, unit.norm, F.conv2d(x, **geometry(unit.conv))))
        return x

    def branch(self, block: Block, k: int, x: Tensor) -> Tensor:
        """Return F_k where norms belong to branches, else what it is before its consumers' norm: W_k h_k."""
        *inner, last = block.units[block.begin :]
        for unit in inner:
            conv = unit.conv
            rows = share(conv.out_channels, k, self.rule.branches)
            groups = conv.groups // self.rule.branches if conv.groups > 1 else 1
            x = F.conv2d(x, **{**geometry(conv), "weight": conv.weight[rows], "groups": groups})
            x = block.inner(self.normalise(unit.path, unit.norm, x, rows))
        columns = share(last.conv.in_channels, k, self.rule.branches)
        x = F.conv2d(x, **{**geometry(last.conv), "weight": last.conv.weight[:, columns]})
        return x if self.rule.norm == "shared" else self.normalise_branch(last, k, x)

    def join(
        self,
        block: Block,
        row: Sequence[Tensor | float],
        fan_in: int,
        shortcuts: Sequence[Tensor | None],
        residuals: Sequence[Tensor],
    ) -> Tensor:
        """Return the input of one consumer with the mask `row`."""
        of_shortcuts = {"resnext": 1 / fan_in, "sum": 1.0, "mean": 1 / fan_in}[self.rule.aggregate]
        of_residuals = {"resnext": 1.0, "sum": 1.0, "mean": 1 / fan_in}[self.rule.aggregate]
        joined = total(row, residuals)
        if self.rule.norm == "shared":
            joined = self.normalise(block.units[-1].path, block.units[-1].norm, joined)
        joined = of_residuals * joined
        return block.outer(joined if block.shortcut is None else joined + of_shortcuts * total(row, shortcuts))

    def normalise(self, name: str, norm: nn.BatchNorm2d, x: Tensor, channels: slice = slice(None)) -> Tensor:
        """Normalise `x` with the affine and statistics of the source at `channels`."""
        affine = norm.weight[channels], norm.bias[channels]
        return self.standardise(name, x, (norm.running_mean[channels], norm.running_var[channels]), affine, norm.eps)

    def normalise_branch(self, unit: Unit, k: int, x: Tensor) -> Tensor:
        """Normalise the output of branch k with its own affine and its share of the statistics of the source."""
        scales, shifts = self.affines[unit.path]
        start = unit.norm.running_mean / self.rule.branches, unit.norm.running_var
        return self.standardise(unit.path, x, start, (scales[k], shifts[k]), unit.norm.eps)

    def standardise(self, name: str, x: Tensor, running: tuple[Tensor, Tensor], affine: Affine, eps: float) -> Tensor:
        mean, variance = running
        if self.rule.training:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            mean = x.sum(dim=(0, 2, 3)) / count
            variance = ((x - column(mean)) ** 2).sum(dim=(0, 2, 3)) / count
            self.seen.setdefault(name, []).append((mean.detach(), variance.detach() * count / (count - 1)))
        scale, shift = affine
        return (x - column(mean)) / torch.sqrt(column(variance) + eps) * column(scale) + column(shift)


Parts = tuple[list[tuple[str, nn.Module]], list[Block], list[tuple[str, nn.Module]], nn.Linear]


def parts(source: nn.Module) -> Parts:
    """Return what is before the blocks that can be masked, these, what follows them, and the classifier."""
    children = dict(source.named_children())
    if isinstance(source, MobileNetV2):
        names = list(dict(source.features.named_children()))
        layers = [(f"features.{name}", source.features[int(name)]) for name in names]
        # The first block has no convolution that reads all channels.
        blocks = [mobile_block(path, layer) for path, layer in layers[2:-1]]
        return layers[:2], blocks, layers[-1:], source.classifier[-1]
    blocks = [
        residual_block(f"{stage}.{name}", block)
        for stage, container in children.items()
        if stage.startswith("layer")
        for name, block in container.named_children()
    ]
    before = [(name, children[name]) for name in ("conv1", "bn1", "act1", "relu", "maxpool") if name in children]
    return before, blocks, [], children["fc"]


def residual_block(path: str, block: nn.Module) -> Block:
    """Return the parts of a block of conv1, bn1, ..., whose activation is ReLU."""
    children = dict(block.named_children())
    units = [
        Unit(children[f"conv{n}"], f"{path}.bn{n}", children[f"bn{n}"]) for n in (1, 2, 3) if f"conv{n}" in children
    ]
    shortcut = nn.Identity() if block.downsample is None else block.downsample
    return Block(tuple(units), (f"{path}.downsample", shortcut), F.relu, F.relu)


def mobile_block(path: str, block: InvertedResidual) -> Block:
    """Return the parts of an inverted residual, which has no activation behind it."""
    expand, depthwise, project, norm = block.conv
    units = (
        Unit(expand[0], f"{path}.conv.0.1", expand[1]),
        Unit(depthwise[0], f"{path}.conv.1.1", depthwise[1]),
        Unit(project, f"{path}.conv.3", norm),
    )
    shortcut = (f"{path}.shortcut", nn.Identity()) if block.use_res_connect else None
    return Block(units, shortcut, lambda x: x.clamp(0, 6), lambda x: x)


def branch_affines(blocks: Sequence[Block], branches: int) -> Mapping[str, Affine]:
    """Return a copy of the scale and a C-th of the shift of every block's last norm for each branch, as leaves."""
    found = {}
    for block in blocks:
        last = block.units[-1]
        scales = torch.stack([last.norm.weight.detach().clone() for _ in range(branches)])
        shifts = torch.stack([last.norm.bias.detach() / branches for _ in range(branches)])
        found[last.path] = scales.requires_grad_(), shifts.requires_grad_()
    return found


def geometry(conv: nn.Conv2d) -> dict[str, object]:
    return {"weight": conv.weight, "stride": conv.stride, "padding": conv.padding, "groups": conv.groups}


def share(channels: int, k: int, branches: int) -> slice:
    width = channels // branches
    return slice(k * width, (k + 1) * width)


def total(row: Sequence[Tensor | float], terms: Sequence[Tensor]) -> Tensor:
    result = row[0] * terms[0]
    for weight, term in zip(row[1:], terms[1:], strict=True):
        result = result + weight * term
    return result


def column(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)
