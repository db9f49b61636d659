"""The papers' networks, CIFAR-size but for one, registered with timm: `timm.create_model("resnext29_8x64d")`."""

from surgery.models.cifar import LAYOUTS
from surgery.models.layout import Layout, resnet, resnext, wide_resnet
from surgery.models.network import CifarResNet
from surgery.models.preact import AppendChannels, PreActLayout, PreActResNeXt, preact_resnext

__all__ = [
    "LAYOUTS",
    "AppendChannels",
    "CifarResNet",
    "Layout",
    "PreActLayout",
    "PreActResNeXt",
    "preact_resnext",
    "resnet",
    "resnext",
    "wide_resnet",
]
