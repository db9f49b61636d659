"""CIFAR-size networks of the papers, registered with timm: `timm.create_model("resnext29_8x64d", num_classes=100)`."""

from surgery.models.cifar import LAYOUTS
from surgery.models.layout import Layout, resnet, resnext, wide_resnet
from surgery.models.network import CifarResNet

__all__ = ["LAYOUTS", "CifarResNet", "Layout", "resnet", "resnext", "wide_resnet"]
