from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import surgery
from surgery import plugins
from surgery.method import Method
from surgery.plugins import Provider
from surgery.show import show


class Gate(nn.Module):
    def forward(self, x):
        return x

    def extra_repr(self):
        return "open"


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Sequential(*(Unit() for _ in range(blocks)))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.layer(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Toy(Method):
    name: ClassVar[str] = "toy"
    preserves: ClassVar[str] = "nothing"

    what: str = "insert"

    def transform(self, architecture, rewriter):
        for block in architecture.blocks[1:]:
            if self.what == "insert":
                rewriter.insert(Gate(), block.body, at=block, role="gate")
            elif self.what == "replace":
                rewriter.replace(f"{block.path}.conv2", nn.Conv2d(4, 4, 1), role="narrow")
            else:
                rewriter.bypass(block)

    def losses(self, step):
        return {}

    def plan(self, model, **criteria):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr(plugins, "providers", lambda: (Provider(Toy, "toy", "toys", "1"),))


def _aligned(lines):
    return [" ".join(line.split()) for line in lines]


def _shown(model, source=None):
    return _aligned(show(model, source).splitlines())


def test_plain_network_is_one_line_per_block():
    assert show(Net()).splitlines() == [
        "Net, not converted",
        "  x (input)",
        "  stem(x)                 Conv2d",
        "  layer.0(stem)           7 nodes, unchanged",
        "  layer.1(layer_0)        7 nodes, unchanged",
        "  layer.2(layer_1)        7 nodes, unchanged",
        "  .mean(layer_2, (2, 3))",
        "  fc(mean)                Linear",
    ]


def test_inserted_nodes_stand_between_two_lines_of_context():
    converted = surgery.convert(Net(), "toy", input_size=8)
    assert show(converted).splitlines() == [
        "Net after convert toy: 2 nodes inserted (+), 0 replaced (~)",
        "  x (input)",
        "  stem(x)                 Conv2d",
        "  layer.0(stem)           7 nodes, unchanged",
        "  layer.1(layer_0)        8 nodes",
        "      ... 3 more",
        "      relu(bn1)           ReLU",
        "      conv2(relu)         Conv2d",
        "+     toy_gate(conv2)     Gate(open)",
        "      add(x, toy_gate)",
        "      relu_1 = relu(add)  ReLU",
        "  layer.2(layer_1)        8 nodes, changed as layer.1",
        "  .mean(layer_2, (2, 3))",
        "  fc(mean)                Linear",
    ]


def test_replaced_nodes_say_what_they_were_where_the_source_is_known():
    source = Net()
    converted = surgery.convert(source, "toy", input_size=8, what="replace")
    line = "~ conv2(relu) Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1))"
    assert line in _shown(converted)
    assert f"{line}, was Conv2d" in _shown(converted, source)
    assert _shown(converted)[0] == "Net after convert toy: 0 nodes inserted (+), 2 replaced (~)"


def test_vanished_nodes_are_shown_against_the_source():
    source = Net()
    converted = surgery.convert(source, "toy", input_size=8, what="bypass")
    assert "layer.1(layer_0) 2 nodes, toy bypass" in _shown(converted)
    shown = _shown(converted, source)
    assert shown[0] == "Net after convert toy: 0 nodes inserted (+), 0 replaced (~), 10 gone (-)"
    start = shown.index("layer.1(layer_0) 7 nodes, toy bypass")
    assert shown[start + 1 : start + 8] == [
        "x (input)",
        "- conv1(x)",
        "- bn1(conv1)",
        "- relu(bn1)",
        "- conv2(relu)",
        "- add(x, conv2)",
        "relu_1 = relu(x) ReLU",
    ]
    assert "layer.2(layer_1) 7 nodes, toy bypass, changed as layer.1" in shown


def test_text_is_the_same_every_time_and_after_a_copy():
    source = Net()
    converted = surgery.convert(source, "toy", input_size=8, what="bypass")
    assert show(converted, source) == show(surgery.convert(source, "toy", input_size=8, what="bypass"), Net())


def test_showing_leaves_the_model_untouched():
    model = Net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    show(model)
    assert isinstance(model.layer[0], Unit)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
