import copy
import logging

import pytest
import torch
import torchvision
from torch import nn

import surgery
from surgery.cost import Cost, cost
from surgery.errors import InvalidOption, UnsupportedModel


class Unit(nn.Module):
    def __init__(self, width, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.bn(self.conv1(x)))))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(Unit(8), Unit(8, groups=4))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(self.stem(x))
        gram = x.flatten(2) @ x.flatten(2).transpose(1, 2)  # (N, 8, 8); not counted
        return self.fc(x.mean((2, 3)) + gram.mean(2))


# At 8 x 8 the stem writes 4 x 4 = 16 places.
STEM = 16 * 8 * (3 * 9)
UNIT = 16 * 8 * (8 * 9) + 16 * 8 * 8
GROUPED = 16 * 8 * (2 * 9) + 16 * 8 * 8
FC = 8 * 5


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "mobilenet_v2", "wide_resnet50_2"])
def test_agrees_with_torchvision(name):
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    found = cost(model)
    assert found.macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=0.005)
    assert found.params == weights.meta["num_params"]


def test_counts_convolutions_and_linear_layers_only():
    found = cost(Small(), 8)
    assert found.macs == STEM + UNIT + GROUPED + FC
    assert [(block.path, block.macs) for block in found.blocks] == [("body.0", UNIT), ("body.1", GROUPED)]


def test_counts_parameters_whole_and_per_block():
    found = cost(Small(), 8)
    assert [block.params for block in found.blocks] == [8 * 72 + 16 + 72, 8 * 18 + 16 + 72]
    assert found.params == (3 * 9 * 8 + 8) + sum(block.params for block in found.blocks) + 45


def test_a_flop_is_half_a_mac():
    found = cost(Small(), 8)
    assert found.flops == 2 * found.macs
    assert found.blocks[0].flops == 2 * found.blocks[0].macs


def test_input_size_scales_the_convolutions():
    tall, square = cost(Small(), (16, 8)), cost(Small(), 8)
    assert tall.macs - FC == 2 * (square.macs - FC)
    assert tall.input_size == (3, 16, 8)


def test_model_is_left_untouched():
    model = Small().train()
    model.fc.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    cost(model, 8)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_random_state_is_left_untouched():
    model, state = Small(), torch.get_rng_state()
    cost(model, 8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_costs_the_same(dtype):
    model = Small()
    assert cost(copy.deepcopy(model).to(dtype), 8) == cost(model, 8)


def test_other_logging_is_heard_and_fvcore_is_not(caplog):
    class Talking(Small):
        def forward(self, x):
            logging.getLogger("mine").warning("running")
            return super().forward(x)

    cost(Talking(), 8)
    assert {record.name for record in caplog.records} == {"mine"}


def test_converted_network_can_be_counted_at_another_size():
    model = surgery.analysis.analyze(Small(), 8)
    network = surgery.network.assemble(Small(), model[1])
    network.meta["architecture"] = model[0]
    assert cost(network) == cost(network, 8) == cost(Small(), 8)
    assert cost(network, 16).macs == cost(Small(), 16).macs


def test_table_has_units_blocks_and_what_is_left():
    assert str(cost(Small(), 8)).splitlines() == [
        "Small: convolutions and linear layers, one image of 3 x 8 x 8",
        "block   parameters      %  MMACs      %",
        "body.0         664   57.0  0.010   60.0",
        "body.1         232   19.9  0.003   19.5",
        "rest           269   23.1  0.003   20.5",
        "total        1,165  100.0  0.017  100.0",
    ]


def test_table_in_flops():
    found = Cost("Net", (3, 8, 8), "flops", 1_500_000, 10, ())
    assert str(found).splitlines()[1:] == [
        "block  parameters      %  MFLOPs      %",
        "total          10  100.0   3.000  100.0",
    ]


def test_unknown_unit_is_refused():
    with pytest.raises(InvalidOption, match="expected 'macs' or 'flops', found 'bytes'"):
        cost(Small(), 8, count="bytes")


def test_impossible_size_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 3 * 3, 2))
    with pytest.raises(UnsupportedModel, match="cannot run on an image of 3 x 32 x 32"):
        cost(model, 32)
    with pytest.raises(InvalidOption, match="input_size"):
        cost(Small(), 0)
