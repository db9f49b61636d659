"""Residual blocks: BN after every convolution, ReLU after the addition, the stride on the (first) 3x3 convolution."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from surgery.models.layout import ShortcutKind


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions to the shortcut.

    Shape:
        (N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, shortcut: ShortcutKind) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride=stride, kind=shortcut)
        self.act2 = nn.ReLU(inplace=True)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalization right before the addition."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(shortcut + body)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        joined: Tensor = self.act2(x + shortcut)
        return joined


class Bottleneck(nn.Module):
    """Add a 1x1, a grouped 3x3 and a 1x1 convolution to the shortcut.

    Args:
        inputs: Channels that come in.
        hidden: Channels of the 3x3 convolution.
        outputs: Channels that go out.
        groups: Groups of the 3x3 convolution.
        stride: Stride of the 3x3 convolution.
        shortcut: See `projection`.
        squeeze: Channels inside the squeeze-excite that scales the body; None leaves it out.

    Shape:
        (N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up.
    """

    se: SqueezeExcitation | None

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        groups: int,
        stride: int,
        shortcut: ShortcutKind,
        squeeze: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        # An attribute that is None would count as a setting and change the fingerprint that older checkpoints hold.
        self.register_module("se", None if squeeze is None else SqueezeExcitation(outputs, squeeze))
        self.downsample = projection(inputs, outputs, stride=stride, kind=shortcut)
        self.act3 = nn.ReLU(inplace=True)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalization behind the last convolution."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(shortcut + body)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = x if self.se is None else self.se(x)
        joined: Tensor = self.act3(x + shortcut)
        return joined


def projection(inputs: int, outputs: int, *, stride: int, kind: ShortcutKind) -> nn.Sequential | None:
    """Build the shortcut of a block that changes shape; None where the identity fits.

    Reference:
        `pool`: He et al., 2019 (ResNet-D), as used by Zhao et al., 2022; odd sizes round up.
    """
    if stride == 1 and inputs == outputs:
        return None
    pooled = stride > 1 and kind == "pool"
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if pooled:
        # Without padding the same either way, but torch_xla takes the gradient of the default to the host.
        layers["pool"] = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    layers["conv"] = nn.Conv2d(inputs, outputs, 1, stride=1 if pooled else stride, bias=False)
    layers["bn"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(layers)
