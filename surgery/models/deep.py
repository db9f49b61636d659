"""Bottleneck networks for ImageNet whose stem is three 3x3 convolutions and whose shortcuts average before they shrink.

Reference:
    Zhao et al., 2022, "Divide and Co-training", table 4; stem and shortcut after He et al., 2019 (ResNet-D).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from timm.models import checkpoint_seq
from torch import Tensor, nn

from surgery.errors import InvalidOption
from surgery.models.blocks import Bottleneck
from surgery.models.classifier import ResidualClassifier, init_classifier
from surgery.models.network import init_residual

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@dataclass(frozen=True)
class DeepLayout:
    """Shape of a bottleneck network for large images.

    Attributes:
        blocks: Residual blocks of each stage.
        hidden: Channels of the 3x3 convolutions of the first stage, all groups together; doubles per stage.
        output: Output channels of the first stage; doubles per stage.
        groups: Groups of the 3x3 convolutions of bottlenecks, the same in all stages.
        stem: Output channels of the three first convolutions; the first of them has a stride of 2.
        reduction: Squeeze-excite at the end of each body, with this many times fewer channels inside; None leaves it
            out.
    """

    blocks: tuple[int, ...]
    hidden: int
    output: int = 256
    groups: int = 1
    stem: tuple[int, int, int] = (64, 64, 128)
    reduction: int | None = None

    def __post_init__(self) -> None:
        """Refuse widths that no network can have."""
        smallest = min((*self.blocks, self.hidden, self.output, self.groups, *self.stem), default=0)
        if not self.blocks or smallest < 1:
            raise InvalidOption(
                f"layout: found {self}, expected one stage or more and numbers of at least 1; choose larger ones"
            )
        if self.hidden % self.groups:
            raise InvalidOption(
                f"layout: found hidden={self.hidden} with groups={self.groups}, expected a multiple of the groups; "
                "choose hidden = groups * width"
            )
        if self.reduction is not None and not 1 <= self.reduction <= self.output:
            raise InvalidOption(
                f"layout: found reduction={self.reduction}, expected 1 to the {self.output} channels of the first "
                "stage, or None for no squeeze-excite"
            )

    @property
    def outputs(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        return tuple(self.output << index for index in range(len(self.blocks)))


def deep_resnet(
    depth: int,
    *,
    width: int = 64,
    groups: int = 1,
    stem: tuple[int, int, int] = (64, 64, 128),
    reduction: int | None = None,
) -> DeepLayout:
    """Describe a ResNet, wide ResNet or ResNeXt of 50 or 101 layers for ImageNet.

    Args:
        depth: Layers, 50 or 101.
        width: Channels of one group of the 3x3 convolutions of the first stage; the outputs stay 256, 512, 1024, 2048.
        groups: See `DeepLayout`.
        stem: See `DeepLayout`.
        reduction: See `DeepLayout`.

    Raises:
        InvalidOption: If the depth is another one, or a width is below 1.
    """
    if depth not in _BLOCKS:
        raise InvalidOption(f"layout: found depth={depth}, expected 50 or 101; describe others as a DeepLayout")
    return DeepLayout(_BLOCKS[depth], hidden=groups * width, groups=groups, stem=stem, reduction=reduction)


class DeepResNet(ResidualClassifier):
    """Residual network for large images: a stem that shrinks four times, `layer1` and so on, pooling, classifier.

    Args:
        cfg: Widths and depth; the name is the one timm's model builder passes it by.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; empty leaves it out.
        drop_rate: Probability of dropout before the classifier, in [0, 1).
        zero_init_last: Whether the last normalization of a block starts at zero, that is, the block as its shortcut.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).
    """

    def __init__(
        self,
        cfg: DeepLayout,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.layout = cfg
        self.num_features = cfg.outputs[-1]
        self.grad_checkpointing = False
        self.feature_info = _feature_info(cfg)

        self.stem = _stem(cfg, in_chans)
        self._stages = tuple(f"layer{number}" for number, _ in enumerate(cfg.blocks, start=1))
        for index, name in enumerate(self._stages):
            self.add_module(name, _stage(cfg, index))
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool)
        init_residual(self, zero_init_last=zero_init_last)
        init_classifier(self.fc)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map of the last stage, (N, num_features, H / 32, W / 32) behind four stages."""
        x = self.stem(x)
        stages = [self.get_submodule(name) for name in self._stages]
        if self.grad_checkpointing:
            checkpointed: Tensor = checkpoint_seq(stages, x, flatten=True)
            return checkpointed
        for stage in stages:
            x = stage(x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups parameters for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _feature_info(cfg: DeepLayout) -> list[dict[str, int | str]]:
    stem: dict[str, int | str] = {"num_chs": cfg.stem[-1], "reduction": 4, "module": "stem"}
    return [stem] + [
        {"num_chs": outputs, "reduction": 4 << index, "module": f"layer{index + 1}"}
        for index, outputs in enumerate(cfg.outputs)
    ]


def _stem(cfg: DeepLayout, in_chans: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = in_chans
    for number, outputs in enumerate(cfg.stem, start=1):
        stride = 2 if number == 1 else 1
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"act{number}"] = nn.ReLU(inplace=True)
        inputs = outputs
    layers["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(layers)


def _stage(cfg: DeepLayout, index: int) -> nn.Sequential:
    hidden, outputs = cfg.hidden << index, cfg.outputs[index]
    inputs = (cfg.stem[-1], *cfg.outputs)[index]
    blocks = [
        Bottleneck(
            outputs if number else inputs,
            hidden,
            outputs,
            groups=cfg.groups,
            stride=2 if index and not number else 1,
            shortcut="pool",
            squeeze=None if cfg.reduction is None else outputs // cfg.reduction,
        )
        for number in range(cfg.blocks[index])
    ]
    return nn.Sequential(*blocks)
