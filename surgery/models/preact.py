"""Pre-activation ResNeXts that widen without a projection: zero channels are appended between the scales.

Every block is y = x + F(x) with F = BN-ReLU-1x1, BN-ReLU-3x3 in groups, BN-ReLU-1x1; nothing is normalized after the
last convolution, no convolution has a stride or a bias, and the shortcut is the identity throughout.

Reference:
    Lee and Shin, 2018, "Anytime Neural Prediction via Slicing Networks Vertically", appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import Tensor, nn

from surgery.errors import InvalidOption
from surgery.models.classifier import ResidualClassifier, init_classifier
from surgery.models.layout import blocks_per_stage

StemKind = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class PreActLayout:
    """Shape of a pre-activation ResNeXt.

    Attributes:
        blocks: Residual blocks in each stage.
        width: Channels of the stem and, times `widths[0]`, of the first stage (W).
        branch: Channels of one path of the first stage (B).
        groups: Paths of every block, in all stages (C).
        widths: Factor of `width` and `branch` in each stage; no stage is narrower than the one before.
        stem: `cifar` is a 3x3 convolution; `imagenet` is a 7x7 one of stride 2 and a 3x3 max pooling of stride 2.
    """

    blocks: int
    width: int
    branch: int
    groups: int
    widths: tuple[int, ...] = (1, 2, 4)
    stem: StemKind = "cifar"

    def __post_init__(self) -> None:
        """Refuse widths that no network can have."""
        for name in ("blocks", "width", "branch", "groups"):
            found = getattr(self, name)
            if found < 1:
                raise InvalidOption(f"layout: found {name}={found}, expected at least 1; choose a larger {name}")
        if not self.widths or self.widths[0] != 1 or list(self.widths) != sorted(self.widths):
            raise InvalidOption(
                f"layout: found widths={self.widths}, expected factors from 1 upwards, one a stage, because channels "
                "are only ever appended; choose for example (1, 2, 4)"
            )
        if self.stem not in ("cifar", "imagenet"):
            raise InvalidOption(f"layout: found stem={self.stem!r}, expected cifar or imagenet; choose one of the two")

    @property
    def outputs(self) -> tuple[int, ...]:
        """Channels between the blocks of each stage."""
        return tuple(self.width * factor for factor in self.widths)


def preact_resnext(
    groups: int,
    branch: int,
    *,
    depth: int = 29,
    width: int = 64,
    widths: tuple[int, ...] = (1, 2, 4),
    stem: StemKind = "cifar",
) -> PreActLayout:
    """Describe a pre-activation ResNeXt of `groups` paths, each `branch` channels wide in the first stage.

    Args:
        groups: Cardinality.
        branch: Channels of one path in the first stage.
        depth: Layers: 3 a block, plus stem and classifier, so that L blocks are 3 L + 2.
        width: Channels between the blocks of the first stage.
        widths: See `PreActLayout`.
        stem: See `PreActLayout`.

    Raises:
        InvalidOption: If `depth - 2` is no multiple of 3 * stages, or a width cannot be.
    """
    blocks = blocks_per_stage(depth, extra=2, layers=3 * max(len(widths), 1))
    return PreActLayout(blocks=blocks, width=width, branch=branch, groups=groups, widths=widths, stem=stem)


class PreActBottleneck(nn.Module):
    """Add a pre-activated 1x1, grouped 3x3 and 1x1 convolution to the input.

    Shape:
        (N, width, H, W) to the same.
    """

    def __init__(self, width: int, hidden: int, *, groups: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width, hidden, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(hidden)
        self.act3 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus the body."""
        body = self.conv1(self.act1(self.bn1(x)))
        body = self.conv2(self.act2(self.bn2(body)))
        joined: Tensor = x + self.conv3(self.act3(self.bn3(body)))
        return joined


class AppendChannels(nn.Module):
    """Append channels of zeros behind the others.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out, no fewer.

    Shape:
        (N, inputs, H, W) to (N, outputs, H, W).

    Reference:
        He et al., 2016, shortcut of type A.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the wider value."""
        return F.pad(x, (0, 0, 0, 0, 0, self.outputs - self.inputs))

    def extra_repr(self) -> str:
        """Return the widths, for `print`."""
        return f"{self.inputs}, {self.outputs}"


class PreActResNeXt(ResidualClassifier):
    """Pre-activation ResNeXt: stem, `layer1` and so on with `down2` and so on between them, norm, pooling, classifier.

    Args:
        cfg: Widths and depth; the name is the one timm's model builder passes it by.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; empty leaves it out.
        drop_rate: Probability of dropout before the classifier, in [0, 1).

    Shape:
        (N, in_chans, H, W) to (N, num_classes).
    """

    def __init__(
        self,
        cfg: PreActLayout,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = cfg
        self.num_features = cfg.outputs[-1]
        self.grad_checkpointing = False
        self.feature_info = _feature_info(cfg)

        self.conv1, self.pool1 = _stem(cfg, in_chans)
        layers = _trunk(cfg)
        self._trunk = tuple(layers)
        for name, module in layers.items():
            self.add_module(name, module)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.act = nn.ReLU(inplace=True)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool)
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalized and rectified feature map of the last stage, (N, num_features, h, w)."""
        x = self.conv1(x)
        x = x if self.pool1 is None else self.pool1(x)
        trunk = [self.get_submodule(name) for name in self._trunk]
        if self.grad_checkpointing:
            x = checkpoint_seq(trunk, x, flatten=True)
        else:
            for module in trunk:
                x = module(x)
        features: Tensor = self.act(self.norm(x))
        return features

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups parameters for layer-wise learning rates."""
        return {"stem": r"^conv1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        init_classifier(self.fc)


def _feature_info(cfg: PreActLayout) -> list[dict[str, int | str]]:
    first = 1 if cfg.stem == "cifar" else 4
    last = "conv1" if cfg.stem == "cifar" else "pool1"
    stem: dict[str, int | str] = {"num_chs": cfg.width, "reduction": first, "module": last}
    return [stem] + [
        {"num_chs": outputs, "reduction": first << index, "module": f"layer{index + 1}"}
        for index, outputs in enumerate(cfg.outputs)
    ]


def _stem(cfg: PreActLayout, in_chans: int) -> tuple[nn.Conv2d, nn.MaxPool2d | None]:
    if cfg.stem == "cifar":
        return nn.Conv2d(in_chans, cfg.width, 3, padding=1, bias=False), None
    return nn.Conv2d(in_chans, cfg.width, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)


def _trunk(cfg: PreActLayout) -> dict[str, nn.Sequential]:
    """Build the stages and what lies between them, by name, in order."""
    layers: dict[str, nn.Sequential] = {}
    before = cfg.outputs[0]
    for number, (outputs, factor) in enumerate(zip(cfg.outputs, cfg.widths, strict=True), start=1):
        if number > 1:
            layers[f"down{number}"] = _transition(before, outputs)
        hidden = cfg.groups * cfg.branch * factor
        blocks = (PreActBottleneck(outputs, hidden, groups=cfg.groups) for _ in range(cfg.blocks))
        layers[f"layer{number}"] = nn.Sequential(*blocks)
        before = outputs
    return layers


def _transition(inputs: int, outputs: int) -> nn.Sequential:
    transition = nn.Sequential(nn.AvgPool2d(2))
    if outputs > inputs:
        transition.append(AppendChannels(inputs, outputs))
    return transition
