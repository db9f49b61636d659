"""The networks that timm knows by name once this module is imported: `timm.list_models(module="cifar")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from surgery.models.deep import DeepLayout, DeepResNet, deep_resnet
from surgery.models.layout import Layout, resnet, resnext, wide_resnet
from surgery.models.network import CifarResNet
from surgery.models.preact import PreActLayout, PreActResNeXt, preact_resnext

AnyLayout = Layout | PreActLayout | DeepLayout

LAYOUTS: dict[str, AnyLayout] = {
    # Zhao et al., 2022, tables 2 and 3. ResNeXt-29 16x64d: Xie et al., 2017, section 5.2.
    "resnet110": resnet(110),
    "resnet164": resnet(164),
    "seresnet110": resnet(110, reduction=4),
    "seresnet164": resnet(164, reduction=4),
    "wrn_16_8": wide_resnet(16, 8),
    "wrn_28_10": wide_resnet(28, 10),
    "wrn_40_10": wide_resnet(40, 10),
    "resnext29_8x64d": resnext(8, 64),
    "resnext29_16x64d": resnext(16, 64),
    # Avranas and Kountouris, 2022, table 1: the rows of the classifier are used one by one, so it has no bias.
    "resnext29_10x11d": resnext(10, 11, shortcut="stride", classifier_bias=False),
    "resnext29_20x6d": resnext(20, 6, shortcut="stride", classifier_bias=False),
    # Ahmed and Torresani, 2017, table 5: a quarter as wide outside the 3x3 convolutions.
    "resnext20_8x4d": resnext(8, 4, depth=20, base=16, shortcut="stride"),
    "resnext29_8x4d": resnext(8, 4, base=16, shortcut="stride"),
    "resnext29_8x8d": resnext(8, 8, base=16, shortcut="stride"),
    # Lee and Shin, 2018, section 4 and appendix B: 9 and 21 blocks of width 64, 15 of width 96, 20 of width 160 for
    # ImageNet, whose scales are W, 2W, 4W, 4W as printed. The paper gives no cardinality and no width of a path for the
    # last two: 24 divides by its 6 parts, 40 by its 5, and 40 x 4 is as wide as the block's input, as 24 x 4 is.
    "preresnext29_8x4d": preact_resnext(8, 4),
    "preresnext65_8x4d": preact_resnext(8, 4, depth=65),
    "preresnext47_24x4d": preact_resnext(24, 4, depth=47, width=96),
    "preresnext62_40x4d": preact_resnext(40, 4, depth=62, width=160, widths=(1, 2, 4, 4), stem="imagenet"),
    # Zhao et al., 2022, table 4. The printed size and cost of the network with squeeze-excite are those of a stem that
    # stays 64 wide; the stems of the others widen to 128.
    "resnet50_deep": deep_resnet(50),
    "wrn_50_2": deep_resnet(50, width=128),
    "wrn_50_3": deep_resnet(50, width=192),
    "resnext101_64x4d_deep": deep_resnet(101, width=4, groups=64),
    "seresnext101_64x4d_deep": deep_resnet(101, width=4, groups=64, stem=(64, 64, 64), reduction=16),
    # Small ones, which train within minutes on a CPU.
    "preresnext20_8x2d": preact_resnext(8, 2, depth=20, width=32),
    "preresnext29_8x2d": preact_resnext(8, 2, width=32),
    "resnet20": resnet(20),
    "resnext11_4x4d": resnext(4, 4, depth=11, base=16),
    "resnext20_4x4d": resnext(4, 4, depth=20, base=16),
    "resnext20_10x4d": resnext(10, 4, depth=20, base=16, shortcut="stride"),
    "resnext20_20x2d": resnext(20, 2, depth=20, base=16, shortcut="stride"),
    "resnext29_4x4d": resnext(4, 4, base=16),
    "wrn_10_1": wide_resnet(10, 1),
    "wrn_10_4": wide_resnet(10, 4),
    "wrn_16_1": wide_resnet(16, 1),
    "wrn_16_2": wide_resnet(16, 2),
    "wrn_16_4": wide_resnet(16, 4),
    "wrn_28_1": wide_resnet(28, 1),
    "wrn_40_2": wide_resnet(40, 2),
}

_CIFAR = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
_IMAGENET = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}


def _config(layout: AnyLayout) -> dict[str, Any]:
    deep = isinstance(layout, DeepLayout)
    large = deep or (isinstance(layout, PreActLayout) and layout.stem == "imagenet")
    first = "stem.conv1" if deep else "conv1"
    shared = {"url": "", "interpolation": "bilinear", "first_conv": first, "classifier": "fc"}
    return {**shared, **(_IMAGENET if large else _CIFAR)}


def _network(layout: AnyLayout) -> tuple[type[nn.Module], int]:
    """Return the class of the network and the number of its stages."""
    match layout:
        case PreActLayout():
            return PreActResNeXt, len(layout.widths)
        case DeepLayout():
            return DeepResNet, len(layout.blocks)
        case _:
            return CifarResNet, 3


default_cfgs = generate_default_cfgs({name: _config(layout) for name, layout in LAYOUTS.items()})


def _entry_point(name: str, layout: AnyLayout) -> Callable[..., nn.Module]:
    network, stages = _network(layout)
    features = {"out_indices": tuple(range(stages + 1))}

    # timm hands the caller's own arguments and its bookkeeping over as keywords; build_model_with_cfg sorts them.
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(
            network, name, pretrained, model_cfg=layout, feature_cfg=features, **kwargs
        )
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}: {layout}."
    return build


for _name, _layout in LAYOUTS.items():
    # register_model lists the name in this module's __all__, so the module has to hold it.
    globals()[_name] = register_model(_entry_point(_name, _layout))
