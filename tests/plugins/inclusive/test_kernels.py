"""Narrow groups are computed in pairs: other groups, the same convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery_inclusive import kernels
from surgery_inclusive.convs import SlicedConv2d
from surgery_inclusive.kernels import paired, pointwise_sum


def rand(*size):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size)))


def test_the_joined_weight_holds_the_groups_on_its_diagonal():
    """Two groups of 4 inputs and 3 outputs become one: rows 0..2 read inputs 0..3, rows 3..5 read 4..7."""
    weight = rand(6, 4, 1, 1)
    joined, groups = paired(weight, 2)
    assert groups == 1
    by_hand = torch.zeros(6, 8, 1, 1, dtype=torch.float64)
    by_hand[:3, :4], by_hand[3:, 4:] = weight[:3], weight[3:]
    assert torch.equal(joined, by_hand)


@pytest.mark.parametrize(
    ("groups", "width", "left"), [(8, 4, 4), (8, 2, 2), (4, 8, 4), (5, 4, 5), (8, 1, 8), (6, 3, 6)]
)
def test_only_groups_of_two_and_four_channels_are_joined_and_only_in_whole_pairs(groups, width, left):
    weight = rand(groups * 3, width, 3, 3)
    joined, found = paired(weight, groups)
    assert found == left
    assert (joined is weight) == (found == groups)


@pytest.mark.parametrize("side", [3, 9])
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_the_sum_over_parts_is_the_convolution_of_all_of_them(side, limit, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", limit)
    parts = [rand(3, channels, side, side) for channels in (2, 4, 1)]
    weight = rand(5, 7, 1, 1)
    expected = F.conv2d(torch.cat(parts, dim=1), weight)
    torch.testing.assert_close(pointwise_sum(parts, weight), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(pointwise_sum(parts[:1], weight[:, :2]), F.conv2d(parts[0], weight[:, :2]))


@pytest.mark.parametrize("span", [(0, 4), (0, 2)])
def test_training_a_grouped_convolution_gives_the_values_and_gradients_of_the_plain_one(span):
    plain = nn.Conv2d(32, 32, 3, padding=1, groups=8, dtype=torch.float64)
    sliced = SlicedConv2d(plain, 4, reads=True, writes=True).train()
    channels = 8 * span[1]
    images, weight = rand(2, channels, 5, 5), plain.weight[:channels]
    expected = F.conv2d(images, weight, plain.bias[:channels], padding=1, groups=2 * span[1])
    pull = rand(*expected.shape)
    literal = torch.autograd.grad(expected, (plain.weight, plain.bias), pull)
    found = sliced(images, span)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    gradients = torch.autograd.grad(found, (sliced.weight, sliced.bias), pull)
    torch.testing.assert_close(gradients, literal, rtol=1e-12, atol=1e-13)
