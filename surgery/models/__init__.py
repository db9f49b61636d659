"""The papers' networks, registered with timm: `timm.create_model("resnext29_8x64d")`; `"wrn_50_2"` for ImageNet."""

from surgery.models.cifar import LAYOUTS
from surgery.models.deep import DeepLayout, DeepResNet, deep_resnet
from surgery.models.layout import Layout, resnet, resnext, wide_resnet
from surgery.models.network import CifarResNet
from surgery.models.preact import AppendChannels, PreActLayout, PreActResNeXt, preact_resnext

__all__ = [
    "LAYOUTS",
    "AppendChannels",
    "CifarResNet",
    "DeepLayout",
    "DeepResNet",
    "Layout",
    "PreActLayout",
    "PreActResNeXt",
    "deep_resnet",
    "preact_resnext",
    "resnet",
    "resnext",
    "wide_resnet",
]
