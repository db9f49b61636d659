"""The networks that recognition is specified on, and what has to be found in them.

The numbers are those of the papers and of the networks' configurations: blocks per stage, groups of the grouped
convolutions, additions. Of a network that holds nothing to convert, the reason has to be found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torchvision
from torch import nn


@dataclass(frozen=True)
class Expected:
    """What `inspect` has to find.

    Attributes:
        library: "torchvision" or "timm"; the latter also builds `surgery.models`.
        network: Name of the builder.
        stages: Stage name -> number of blocks.
        residual: Number of blocks with a shortcut.
        projected: Number of shortcuts with a convolution.
        cardinality: Branch counts per stage, in order of appearance; one per hidden channel of a depthwise or plain
            block.
        kinds: Kinds of branches that occur.
        classes: Outputs of the classifier.
    """

    library: str
    network: str
    stages: dict[str, int]
    residual: int
    projected: int
    cardinality: tuple[tuple[int, ...], ...]
    kinds: frozenset[str]
    classes: int = 1000

    def __str__(self) -> str:
        return f"{self.library}-{self.network}"


def _layers(*blocks: int) -> dict[str, int]:
    return {f"layer{number}": count for number, count in enumerate(blocks, start=1)}


def _stages(prefix: str, *blocks: int, suffix: str = "", start: int = 0) -> dict[str, int]:
    return {f"{prefix}{number}{suffix}": count for number, count in enumerate(blocks, start=start)}


def _each(*counts: int) -> tuple[tuple[int, ...], ...]:
    return tuple((count,) for count in counts)


def _resnet(
    library: str, network: str, blocks: tuple[int, ...], cardinality: tuple[int, ...], kind: str = "plain", **other
):
    projected = other.pop("projected", 4)
    stages = other.pop("stages", None) or _layers(*blocks)
    found = frozenset({kind})
    return Expected(library, network, stages, sum(blocks), projected, _each(*cardinality), found, **other)


_WIDE = (64, 128, 256, 512)
_GROUPED = frozenset({"grouped"})
_DEPTHWISE = frozenset({"depthwise"})

# A basic block's hidden channels are those between its two 3x3 convolutions, a bottleneck's those of its 3x3.
# The first stage of a ResNet of basic blocks keeps the stem's 64 channels and resolution: its shortcut is the identity.
RECOGNISED = (
    _resnet("torchvision", "resnet18", (2, 2, 2, 2), _WIDE, projected=3),
    _resnet("torchvision", "resnet34", (3, 4, 6, 3), _WIDE, projected=3),
    _resnet("torchvision", "resnet50", (3, 4, 6, 3), _WIDE),
    _resnet("torchvision", "resnet101", (3, 4, 23, 3), _WIDE),
    _resnet("torchvision", "wide_resnet50_2", (3, 4, 6, 3), (128, 256, 512, 1024)),
    _resnet("torchvision", "resnext50_32x4d", (3, 4, 6, 3), (32, 32, 32, 32), "grouped"),
    _resnet("torchvision", "resnext101_32x8d", (3, 4, 23, 3), (32, 32, 32, 32), "grouped"),
    _resnet("torchvision", "resnext101_64x4d", (3, 4, 23, 3), (64, 64, 64, 64), "grouped"),
    # RegNetX-400MF: widths 32, 64, 160, 400 in groups of 16.
    _resnet(
        "torchvision",
        "regnet_x_400mf",
        (1, 2, 7, 12),
        (2, 4, 10, 25),
        "grouped",
        stages=_stages("trunk_output.block", 1, 2, 7, 12, start=1),
    ),
    # RegNetX-8GF: group width 120, but its first stage is 80 wide: one group.
    Expected(
        "torchvision",
        "regnet_x_8gf",
        _stages("trunk_output.block", 2, 5, 15, 1, start=1),
        23,
        4,
        _each(80, 2, 6, 16),
        frozenset({"plain", "grouped"}),
    ),
    _resnet(
        "torchvision",
        "regnet_y_400mf",
        (1, 3, 6, 6),
        (6, 13, 26, 55),
        "grouped",
        stages=_stages("trunk_output.block", 1, 3, 6, 6, start=1),
    ),
    # MobileNetV2: expansion 6 of the inputs 16, 24, 24, 32 ... but 1 in the first block; 17 blocks, 10 shortcuts.
    Expected(
        "torchvision",
        "mobilenet_v2",
        {"stage1": 1, "stage2": 2, "stage3": 3, "stage4": 7, "stage5": 4},
        10,
        0,
        ((32,), (96, 144), (144, 192), (192, 384, 576), (576, 960)),
        _DEPTHWISE,
    ),
    Expected(
        "torchvision",
        "mobilenet_v3_small",
        {"stage1": 1, "stage2": 2, "stage3": 5, "stage4": 3},
        6,
        0,
        ((16,), (72, 88), (96, 240, 120, 144), (288, 576)),
        _DEPTHWISE,
    ),
    Expected(
        "torchvision",
        "mobilenet_v3_large",
        {"stage1": 1, "stage2": 2, "stage3": 3, "stage4": 6, "stage5": 3},
        10,
        0,
        ((16,), (64, 72), (72, 120), (240, 200, 184, 480, 672), (672, 960)),
        _DEPTHWISE,
    ),
    Expected(
        "torchvision",
        "efficientnet_b0",
        {"features.1": 1, "features.2": 2, "features.3": 2, "stage4": 6, "stage5": 5},
        9,
        0,
        ((32,), (96, 144), (144, 240), (240, 480, 672), (672, 1152)),
        _DEPTHWISE,
    ),
    # The fused blocks of the first three stages hold no depthwise convolution: 2 + 4 + 4; the rest is 6 + 9 + 15.
    Expected(
        "torchvision",
        "efficientnet_v2_s",
        {"features.1": 2, "features.2": 4, "features.3": 4, "stage4": 15, "features.6": 15},
        35,
        0,
        ((24,), (96, 192), (192, 256), (256, 512, 768, 960), (960, 1536)),
        frozenset({"plain", "depthwise"}),
    ),
    # The eighth of `layers` is the first stage; the separable convolution before it has no shortcut and no siblings.
    Expected(
        "torchvision",
        "mnasnet1_0",
        {"layers.8": 3, "layers.9": 3, "stage3": 5, "stage4": 5},
        10,
        0,
        ((48, 72), (72, 120), (240, 480, 576), (576, 1152)),
        _DEPTHWISE,
    ),
    Expected(
        "torchvision",
        "convnext_tiny",
        {"features.1": 3, "features.3": 3, "features.5": 9, "features.7": 3},
        18,
        0,
        _each(96, 192, 384, 768),
        _DEPTHWISE,
    ),
    # The attention after each MBConv is a transformer's; the MBConvs remain, four times as wide as their output.
    Expected(
        "torchvision",
        "maxvit_t",
        {"stage1": 2, "stage2": 2, "stage3": 5, "stage4": 2},
        11,
        4,
        _each(256, 512, 1024, 2048),
        _DEPTHWISE,
    ),
    _resnet("timm", "resnet10t", (1, 1, 1, 1), _WIDE, projected=3),
    _resnet("timm", "resnet26d", (2, 2, 2, 2), _WIDE),
    _resnet("timm", "resnext50_32x4d", (3, 4, 6, 3), (32, 32, 32, 32), "grouped"),
    _resnet("timm", "seresnext26d_32x4d", (2, 2, 2, 2), (32, 32, 32, 32), "grouped"),
    _resnet("timm", "skresnext50_32x4d", (3, 4, 6, 3), (32, 32, 32, 32), "grouped"),
    _resnet("timm", "ecaresnext26t_32x4d", (2, 2, 2, 2), (32, 32, 32, 32), "grouped"),
    _resnet("timm", "legacy_seresnext26_32x4d", (2, 2, 2, 2), (32, 32, 32, 32), "grouped"),
    # GroupNorm-like statistics and global context add numbers too, inside the blocks: no block more for that.
    _resnet("timm", "gcresnext26ts", (2, 2, 2, 2), (2, 4, 8, 16), "grouped", stages=_stages("stages.", 2, 2, 2, 2)),
    _resnet(
        "timm",
        "resnetv2_50d_evos",
        (3, 4, 6, 3),
        _WIDE,
        stages=_stages("stages.", 3, 4, 6, 3, suffix=".blocks"),
    ),
    _resnet("timm", "resnetv2_50", (3, 4, 6, 3), _WIDE, stages=_stages("stages.", 3, 4, 6, 3, suffix=".blocks")),
    _resnet(
        "timm",
        "resnetv2_18",
        (2, 2, 2, 2),
        _WIDE,
        projected=3,
        stages=_stages("stages.", 2, 2, 2, 2, suffix=".blocks"),
    ),
    _resnet("timm", "resnet50_gn", (3, 4, 6, 3), _WIDE),
    _resnet("timm", "resnetblur18", (2, 2, 2, 2), _WIDE, projected=3),
    # RegNetX-200MF: widths 24, 56, 152, 368 in groups of 8.
    _resnet("timm", "regnetx_002", (1, 1, 4, 7), (3, 7, 19, 46), "grouped", stages=_stages("s", 1, 1, 4, 7, start=1)),
    _resnet("timm", "regnety_002", (1, 1, 4, 7), (3, 7, 19, 46), "grouped", stages=_stages("s", 1, 1, 4, 7, start=1)),
    # RegNetZ: groups of 16 out of the expanded width, shortcuts only where nothing changes: 22 blocks, 18 shortcuts.
    Expected(
        "timm",
        "regnetz_b16",
        _stages("stages.", 2, 6, 12, 2),
        18,
        0,
        ((6, 9), (9, 18), (18, 36), (36, 54)),
        _GROUPED,
    ),
    Expected(
        "timm",
        "mobilenetv2_100",
        {"blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "stage4": 7, "stage5": 4},
        10,
        0,
        ((32,), (96, 144), (144, 192), (192, 384, 576), (576, 960)),
        _DEPTHWISE,
    ),
    Expected(
        "timm",
        "efficientnet_b0",
        {"blocks.0": 1, "blocks.1": 2, "blocks.2": 2, "stage4": 6, "stage5": 5},
        9,
        0,
        ((32,), (96, 144), (144, 240), (240, 480, 672), (672, 1152)),
        _DEPTHWISE,
    ),
    # Groups of 8 of the same widths.
    Expected(
        "timm",
        "efficientnet_b0_g8_gn",
        {"blocks.0": 1, "blocks.1": 2, "blocks.2": 2, "stage4": 6, "stage5": 5},
        9,
        0,
        ((4,), (12, 18), (18, 30), (30, 60, 84), (84, 144)),
        _GROUPED,
    ),
    Expected(
        "timm",
        "mnasnet_100",
        {"blocks.0": 1, "blocks.1": 3, "blocks.2": 3, "stage4": 5, "stage5": 5},
        10,
        0,
        ((32,), (48, 72), (72, 120), (240, 480, 576), (576, 1152)),
        _DEPTHWISE,
    ),
    # CIFAR: three stages; d = 9n + 2 for bottlenecks, 6n + 4 for basic blocks.
    _resnet("timm", "resnext29_8x64d", (3, 3, 3), (8, 8, 8), "grouped", projected=3, classes=10),
    _resnet("timm", "resnext29_16x64d", (3, 3, 3), (16, 16, 16), "grouped", projected=3, classes=10),
    _resnet("timm", "resnext11_4x4d", (1, 1, 1), (4, 4, 4), "grouped", projected=3, classes=10),
    _resnet("timm", "wrn_16_8", (2, 2, 2), (128, 256, 512), projected=3, classes=10),
    _resnet("timm", "wrn_28_10", (4, 4, 4), (160, 320, 640), projected=3, classes=10),
    _resnet("timm", "resnet110", (12, 12, 12), (16, 32, 64), projected=3, classes=10),
    _resnet("timm", "resnet164", (18, 18, 18), (16, 32, 64), projected=3, classes=10),
)

_CHAIN = "plain chain"
_CONCATENATION = "joined by concatenation"
_NO_CONVOLUTION = "no spatial convolution in its body"

REFUSED = {
    ("torchvision", "alexnet"): (_CHAIN,),
    ("torchvision", "vgg16_bn"): (_CHAIN,),
    ("torchvision", "squeezenet1_1"): (_CONCATENATION,),
    ("torchvision", "densenet121"): (_CONCATENATION,),
    ("torchvision", "shufflenet_v2_x1_0"): (_CONCATENATION,),
    ("torchvision", "vit_b_16"): (_NO_CONVOLUTION,),
    ("torchvision", "swin_t"): (_NO_CONVOLUTION,),
    ("torchvision", "swin_v2_t"): (_NO_CONVOLUTION,),
    ("timm", "densenet121"): (_CONCATENATION,),
    ("timm", "vit_tiny_patch16_224"): (_NO_CONVOLUTION,),
}

UNTRACEABLE = {"googlenet", "inception_v3"}
"""Classifiers of torchvision that run auxiliary heads in train mode only."""


def build(library: str, network: str, **options: object) -> nn.Module:
    """Build a network of either library, with random weights."""
    if library == "timm":
        return timm.create_model(network, **options)
    return torchvision.models.get_model(
        network, weights=None, **({"init_weights": False} if network in UNTRACEABLE else options)
    )


@contextmanager
def weightless() -> Iterator[None]:
    """Let modules be built without memory or initialisation for their weights.

    Unlike `torch.device("meta")` this leaves alone the numbers that a builder computes widths from, as RegNet's does.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
