"""The norm of a branch is the sum of the absolute weights that its channels enter the merge with."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption
from surgery.testing import tiny_networks
from surgery_inclusive.contributions import branch_norms
from surgery_inclusive.method import Inclusive

RESNEXT = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.merge = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.merge(self.split(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(x[:, :1].expand(-1, 4, -1, -1)).mean((2, 3)))


def settled(merge):
    network = Network().double()
    network.block.merge.weight.data.copy_(torch.tensor(merge)[..., None, None])
    return network


def test_the_norm_is_that_of_the_columns_of_a_branch():
    """Branch 1 has columns 1 and 2, row by row (1 + 2) + 1 + 3 + 1 = 8; branch 2 has 4 + 0 + (1 + 1) + (2 + 2) = 10."""
    merge = [[1.0, -2.0, 4.0, 0.0], [0.0, 1.0, 0.0, 0.0], [-3.0, 0.0, 1.0, -1.0], [0.0, 1.0, 2.0, -2.0]]
    norms = branch_norms(settled(merge), input_size=8)
    assert list(norms) == ["block"]
    assert torch.equal(norms["block"], torch.tensor([8.0, 10.0], dtype=torch.float64))
    assert torch.equal(branch_norms(settled(merge), branches=1)["block"], torch.tensor([18.0], dtype=torch.float64))


def literal(weight, branches):
    """Return the norms of a dense merge, one weight at a time."""
    width = weight.shape[1] // branches
    columns = [weight[:, n * width : (n + 1) * width] for n in range(branches)]
    sums = [sum(abs(value) for value in part.flatten().tolist()) for part in columns]
    return torch.tensor(sums, dtype=weight.dtype)


@pytest.mark.parametrize("name", ["torchvision resnext", "timm resnext"])
def test_plain_networks_are_inspected(name):
    network = tiny_networks()[name]().double()
    norms = branch_norms(network, input_size=32)
    assert list(norms) == RESNEXT
    for path, found in norms.items():
        torch.testing.assert_close(found, literal(network.get_submodule(f"{path}.conv3").weight, 8), rtol=1e-10, atol=0)


def test_norms_carry_no_gradient_and_leave_the_network_alone():
    network = tiny_networks()["torchvision resnext"]()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not any(found.requires_grad for found in branch_norms(network, input_size=32).values())
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_channels_of_plain_convolutions_can_be_taken_together():
    """Four branches of a plain block are the sums over its quarters."""
    network = tiny_networks()["torchvision wide resnet"]().double()
    each, four = branch_norms(network, input_size=32), branch_norms(network, branches=4, input_size=32)
    for path, found in four.items():
        weight = network.get_submodule(f"{path}.conv3").weight
        assert each[path].shape == (weight.shape[1],)
        torch.testing.assert_close(found, literal(weight, 4), rtol=1e-10, atol=0)


def test_a_dense_conversion_has_the_norms_of_its_source():
    network = tiny_networks()["torchvision resnext"]().double()
    converted = surgery.convert(network, Inclusive(subnetworks=4), input_size=32)
    expected = branch_norms(network, input_size=32)
    found = branch_norms(converted)
    assert list(found) == RESNEXT
    assert all(torch.equal(found[path], expected[path]) for path in RESNEXT)


def test_a_sparse_conversion_has_the_norms_of_the_diagonal_blocks():
    """Merged in 4 groups, the 8 branches enter a quarter of the outputs each."""
    network = tiny_networks()["torchvision resnext"]().double()
    converted = surgery.convert(network, Inclusive(subnetworks=4, sparse=True), input_size=32)
    for path, found in branch_norms(converted).items():
        weight = network.get_submodule(f"{path}.conv3").weight.detach()
        mask = torch.block_diag(*[torch.ones(len(weight) // 4, weight.shape[1] // 4)] * 4).to(weight)
        torch.testing.assert_close(found, literal(weight * mask[..., None, None], 8), rtol=1e-10, atol=0)
        assert found.sum() < 0.5 * weight.abs().sum()


def test_a_sub_network_has_the_norms_of_its_branches():
    """Of 8 branches, sub-network 3 of 4 has the first 6."""
    network = tiny_networks()["torchvision resnext"]().double()
    converted = surgery.convert(network, Inclusive(subnetworks=4), input_size=32)
    pruned = surgery.prune(converted, subnetwork=3)
    for path, found in branch_norms(pruned, branches=6).items():
        torch.testing.assert_close(found, branch_norms(network, input_size=32)[path][:6], rtol=1e-10, atol=0)


def test_networks_without_a_merge_are_refused():
    with pytest.raises(InvalidOption, match=r"found no block of .* whose branches are merged by a convolution"):
        branch_norms(nn.Sequential(nn.Conv2d(3, 3, 3)))


def test_branches_that_do_not_divide_are_refused():
    with pytest.raises(InvalidOption, match=r"layer1\.0: cannot form 3 branches out of 32 grouped ones"):
        branch_norms(timm.create_model("resnext50_32x4d"), branches=3)
