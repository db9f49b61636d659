"""Random small residual networks: every way in which residual blocks differ, in one description that can be shrunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.testing.networks import CLASSES, unsettle

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

BlockKind = Literal["basic", "bottleneck"]
Attention = Literal["none", "inside", "behind"]
Projection = Literal["conv", "pool", "pad"]


@dataclass(frozen=True)
class ResidualSpec:
    """Description of a small residual network; `build()` makes it.

    Attributes:
        blocks: Blocks of each stage; the first block of a stage changes the width.
        kind: "basic" is two 3x3 convolutions, "bottleneck" is 1x1, 3x3 (grouped), 1x1.
        groups: Groups of the 3x3 convolution of a bottleneck.
        width: Channels of one group in the first stage; doubles per stage.
        stride: Of the first block of every stage but the first.
        preactivation: Whether norm and activation stand before each convolution instead of behind it.
        attention: Squeeze-excite before the last convolution ("inside"), after the body ("behind"), or none.
        projection: Shortcut of a block that changes shape: strided 1x1 convolution, pooled 1x1 convolution, or pooling
            and zero channels.
        inplace: Whether activations write to their input.
    """

    blocks: tuple[int, ...] = (1, 1)
    kind: BlockKind = "bottleneck"
    groups: int = 2
    width: int = 2
    stride: int = 2
    preactivation: bool = False
    attention: Attention = "none"
    projection: Projection = "conv"
    inplace: bool = True

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the blocks, in order: what recognition has to find."""
        return tuple(f"stages.{stage}.{index}" for stage, count in enumerate(self.blocks) for index in range(count))

    def cardinality(self, stage: int) -> int:
        """Return the number of branches of the blocks of a stage."""
        hidden = self.groups * self.width << stage
        return self.groups if self.kind == "bottleneck" and self.groups > 1 else hidden

    def build(self, seed: int = 0) -> ResidualNetwork:
        """Return the network; equal seeds give equal weights, and the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ResidualNetwork(self)
        unsettle(network, seed)
        return network


def residual_networks() -> SearchStrategy[ResidualSpec]:
    """Return a hypothesis strategy of `ResidualSpec`; it shrinks towards one plain block in one stage.

    Example:
        >>> @given(residual_networks())
        ... def test_my_law(spec):
        ...     converted = surgery.convert(spec.build(), "mine", input_size=16)
    """
    from hypothesis import strategies as st  # only those who write property tests need it

    return st.builds(
        ResidualSpec,
        blocks=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
        kind=st.sampled_from(["basic", "bottleneck"]),
        groups=st.sampled_from([1, 2, 4, 8]),
        width=st.integers(1, 3),
        stride=st.sampled_from([2, 1]),
        preactivation=st.booleans(),
        attention=st.sampled_from(["none", "inside", "behind"]),
        projection=st.sampled_from(["conv", "pool", "pad"]),
        inplace=st.booleans(),
    )


class ResidualNetwork(nn.Module):
    """The network of a `ResidualSpec`: a 3x3 stem, `stages`, average pooling, `head`.

    Shape:
        (N, 3, H, W) to (N, 10).
    """

    def __init__(self, spec: ResidualSpec) -> None:
        super().__init__()
        hidden = spec.groups * spec.width
        self.stem = nn.Sequential(nn.Conv2d(3, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden))
        channels = hidden
        stages: list[nn.Module] = []
        for stage, count in enumerate(spec.blocks):
            units: list[nn.Module] = []
            for index in range(count):
                stride = spec.stride if stage and not index else 1
                units.append(ResidualBlock(spec, channels, hidden << stage, stride=stride))
                channels = 2 * hidden << stage
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """One block of a `ResidualNetwork`; its output is twice as wide as its hidden channels.

    Shape:
        (N, inputs, H, W) to (N, 2 * hidden, H / stride, W / stride), rounded up.
    """

    def __init__(self, spec: ResidualSpec, inputs: int, hidden: int, *, stride: int) -> None:
        super().__init__()
        outputs = 2 * hidden
        convs = [nn.Conv2d(inputs, hidden, 3, stride, 1, bias=False), nn.Conv2d(hidden, outputs, 3, 1, 1, bias=False)]
        if spec.kind == "bottleneck":
            convs = [
                nn.Conv2d(inputs, hidden, 1, bias=False),
                nn.Conv2d(hidden, hidden, 3, stride, 1, groups=spec.groups, bias=False),
                nn.Conv2d(hidden, outputs, 1, bias=False),
            ]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(conv.in_channels if spec.preactivation else conv.out_channels) for conv in convs
        )
        self.preactivation = spec.preactivation
        self.act = nn.ReLU(inplace=spec.inplace)
        self.inside = SqueezeExcite(hidden) if spec.attention == "inside" else None
        self.behind = SqueezeExcite(outputs) if spec.attention == "behind" else None
        self.shortcut = _shortcut(spec.projection, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut plus the body, activated unless the activation stands before the convolutions."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if index == last and self.inside is not None:
                x = self.inside(x)
            if self.preactivation:
                x = conv(self.act(norm(x)))
            else:
                x = norm(conv(x))
                x = x if index == last else self.act(x)
        x = x if self.behind is None else self.behind(x)
        joined: Tensor = x + shortcut if self.preactivation else self.act(x + shortcut)
        return joined


class SqueezeExcite(nn.Module):
    """Scale every channel by a factor that depends on all channels.

    Shape:
        (N, C, H, W), the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, max(channels // 2, 1), 1)
        self.up = nn.Conv2d(max(channels // 2, 1), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled channels."""
        scaled: Tensor = x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return scaled


class PadShortcut(nn.Module):
    """Shrink by average pooling and append channels of zeros: a shortcut without weights.

    Shape:
        (N, C, H, W) to (N, C + extra, H / stride, W / stride), rounded up.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded input."""
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra))


def _shortcut(kind: Projection, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if kind == "pad" and outputs >= inputs:
        return PadShortcut(outputs - inputs, stride)
    if kind == "pool":
        pool = nn.AvgPool2d(stride, ceil_mode=True)
        return nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
