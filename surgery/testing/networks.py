"""Small networks to try a method on: the families of torchvision and timm in sizes that run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import timm.models.resnet as timm_resnet
import torch
import torchvision.models.mobilenetv2 as torchvision_mobilenet
import torchvision.models.resnet as torchvision_resnet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from surgery.models import CifarResNet, Layout, resnext, wide_resnet

Build = Callable[[], nn.Module]

CLASSES = 10
"""Number of classes of every network here."""
_RANGES = {"weight": (0.5, 1.5), "bias": (-0.2, 0.2), "running_mean": (-0.2, 0.2), "running_var": (0.5, 1.5)}


def tiny_networks() -> Mapping[str, Build]:
    """Return builders of small networks by name: ResNeXt, MobileNetV2 and WideResNet of both libraries, EfficientNet.

    Every builder returns the same weights each time, in which every norm has its own scale, shift and statistics, so
    that no block is the identity and no two channels are alike. They are made for images of 32 x 32.
    """
    builders: dict[str, Build] = {
        "resnext": partial(_cifar, resnext(8, 2, depth=11, base=8)),
        "torchvision resnext": partial(_torchvision_resnet, groups=8, width_per_group=4),
        "timm resnext": partial(_timm_resnet, cardinality=8, base_width=16),
        "torchvision mobilenetv2": _torchvision_mobilenet,
        "timm mobilenetv2": partial(_timm_efficientnet, "", nn.ReLU6),
        "timm efficientnet": partial(_timm_efficientnet, "_se0.25", nn.SiLU),
        "wide resnet": partial(_cifar, wide_resnet(10, 1)),
        "torchvision wide resnet": partial(_torchvision_resnet, groups=1, width_per_group=16),
        "timm wide resnet": partial(_timm_resnet, cardinality=1, base_width=128),
    }
    return MappingProxyType({name: partial(_settled, build) for name, build in builders.items()})


def plain_chain() -> nn.Module:
    """Return a small VGG: convolutions one after the other, no addition and no branch anywhere."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 16), (16, 16)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm of `model` scales, shifts and statistics of its own, in place, and return the model.

    A freshly built network hides mistakes: norms that start at zero make a block the identity, and equal statistics
    make it unimportant which of them a channel gets.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            for name, (low, high) in _RANGES.items():
                tensor = getattr(module, name, None)
                if tensor is not None:
                    tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model


def _settled(build: Build) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return unsettle(build())


def _cifar(layout: Layout) -> nn.Module:
    return CifarResNet(layout, num_classes=CLASSES)


def _torchvision_resnet(groups: int, width_per_group: int) -> nn.Module:
    model: nn.Module = torchvision_resnet.ResNet(
        torchvision_resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=groups, width_per_group=width_per_group
    )
    return model


def _timm_resnet(cardinality: int, base_width: int) -> nn.Module:
    return timm_resnet.ResNet(
        timm_resnet.Bottleneck,  # type: ignore[arg-type]  # annotated as an instance, called as a class
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        num_classes=CLASSES,
        cardinality=cardinality,
        base_width=base_width,
    )


def _torchvision_mobilenet() -> nn.Module:
    setting = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 2, 2]]
    model: nn.Module = torchvision_mobilenet.MobileNetV2(
        CLASSES, width_mult=0.5, inverted_residual_setting=setting, dropout=0.0
    )
    return model


def _timm_efficientnet(attention: str, act_layer: type[nn.Module]) -> nn.Module:
    stages = [[f"{stage}{attention}"] for stage in ("ds_r1_k3_s1_c8", "ir_r2_k3_s2_e4_c16", "ir_r2_k3_s2_e4_c24")]
    return EfficientNet(
        decode_arch_def(stages), num_classes=CLASSES, num_features=64, stem_size=8, act_layer=act_layer, fix_stem=True
    )
