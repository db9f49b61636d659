"""Rates of dropout, in whatever form a network has them, are scaled and still drop in training alone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropBlock2d, DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from surgery import Rewriter
from surgery.conversion import prepare
from tests.toys import Toy


def scaled(model, factor):
    """Return the network with its rates multiplied by `factor`, not converted otherwise."""
    rewriter = Rewriter(prepare(model, Toy(), 32), "toy")
    rewriter.scale_drop_rates(factor)
    return rewriter.finish()


def rates(model, kind, name):
    return [getattr(module, name) for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("build", "kind", "name"),
    [
        (lambda: torchvision.models.efficientnet_b0(), StochasticDepth, "p"),
        (lambda: torchvision.models.mobilenet_v2(dropout=0.4), nn.Dropout, "p"),
        (lambda: timm.create_model("resnet18", drop_path_rate=0.4), DropPath, "drop_prob"),
        (lambda: timm.create_model("resnet18", drop_block_rate=0.2), DropBlock2d, "drop_prob"),
    ],
)
def test_the_rates_of_layers_are_scaled(build, kind, name):
    source = build()
    before = rates(source, kind, name)
    assert any(before)
    assert rates(scaled(source, 0.5), kind, name) == pytest.approx([rate / 2 for rate in before])
    assert rates(source, kind, name) == before


class Dropping(nn.Module):
    """One residual block with a function between its convolutions, called in one of the ways there are."""

    def __init__(self, drop):
        super().__init__()
        self.body = Body(drop)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(F.dropout(self.body(x).mean((2, 3)), 0.8, self.training))


class Body(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop = drop

    def forward(self, x):
        return x + self.conv2(self.drop(self.conv1(x), self.training))


DROPS = {
    "of torch itself": (lambda x, training: torch.dropout(x, 0.6, training), 0.6),
    "by position": (lambda x, training: F.dropout(x, 0.6, training, True), 0.6),
    "by name": (lambda x, training: F.dropout2d(x, training=training, p=0.6), 0.6),
    "by default": (lambda x, training: F.dropout(x, training=training), 0.5),
}


@pytest.mark.parametrize("way", DROPS)
def test_the_rates_of_functions_are_scaled(way):
    """The function is the source's own, with the new rate: from the same random state it drops the same values."""
    drop, rate = DROPS[way]
    source = Dropping(drop)
    model = scaled(source, 0.25)
    images = torch.rand(64, 4, 6, 6)
    torch.manual_seed(0)
    found = model.train()(images)
    torch.manual_seed(0)
    function = F.dropout2d if way == "by name" else F.dropout
    hidden = function(source.body.conv1(images), rate / 4, True)
    expected = source.fc(F.dropout((images + source.body.conv2(hidden)).mean((2, 3)), 0.2, True))
    torch.testing.assert_close(found, expected)
    assert torch.equal(model.eval()(images), source.eval()(images))


def test_a_layer_written_after_those_of_timm_is_found():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_prob = 0.4

        def forward(self, x):
            return x

    source = Dropping(lambda x, training: x)
    source.body.conv2 = nn.Sequential(source.body.conv2, Skip())
    assert scaled(source, 0.5).body.conv2[1].drop_prob == pytest.approx(0.2)


def test_a_rate_stays_scaled_in_a_copy():
    model = scaled(timm.create_model("resnet18", drop_path_rate=0.4), 0.5)
    assert rates(copy.deepcopy(model), DropPath, "drop_prob")[-1] == pytest.approx(0.2)
