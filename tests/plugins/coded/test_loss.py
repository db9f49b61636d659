"""Laws of the coding loss and of the decoder."""

from __future__ import annotations

import pytest
import torch

from surgery.errors import InvalidOption
from surgery_coded.loss import coding_loss, decode, target_codewords
from tests.plugins.coded.oracle import coding_loss as literal_loss

WORDS = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)


def test_coding_loss_worked_by_hand():
    """N=4, two active, r = 1/2, codeword (1, 1, 0, 0), e = (1, 2, 1, 0), so r e = (1/2, 1, 1/2, 0).

    Differences (-1/2, 0, 1/2, 0); fourth powers 1/16, 0, 1/16, 0; mean (2/16) / 4 = 1/32.
    Second sample: e = (2, 2, 0, 0) meets its codeword exactly: 0. Mean over the batch 1/64.
    With the square (1/4 + 1/4) / 4 = 1/8 and 1/16; with the absolute value (1/2 + 1/2) / 4 = 1/4 and 1/8.
    """
    energies = torch.tensor([[1.0, 2.0, 1.0, 0.0], [2.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    words = target_codewords(WORDS, torch.tensor([0, 0]))
    assert coding_loss(energies, words, 0.5).item() == 1 / 64
    assert coding_loss(energies, words, 0.5, exponent=2).item() == 1 / 16
    assert coding_loss(energies, words, 0.5, exponent=1).item() == 1 / 8


@pytest.mark.parametrize("exponent", [1, 1.5, 2, 4])
def test_coding_loss_and_gradient_equal_the_literal_sum(exponent):
    torch.manual_seed(0)
    energies = (torch.rand(6, 4, dtype=torch.float64) * 3).requires_grad_()
    target = torch.tensor([0, 1, 2, 2, 1, 0])
    found = coding_loss(energies, target_codewords(WORDS, target).double(), 0.5, exponent)
    expected = literal_loss(energies, WORDS[target].int().tolist(), 0.5, exponent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, energies)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-16)


def test_soft_targets_weigh_the_codewords():
    """0.75 of class 0 and 0.25 of class 2: (1, 1, 0, 0) * 0.75 + (1, 0, 1, 0) * 0.25 = (1, 0.75, 0.25, 0)."""
    soft = torch.tensor([[0.75, 0.0, 0.25]], dtype=torch.float64)
    assert torch.equal(target_codewords(WORDS, soft), torch.tensor([[1.0, 0.75, 0.25, 0.0]], dtype=torch.float64))


def test_one_hot_soft_targets_equal_class_indices():
    target = torch.tensor([2, 0, 1])
    soft = torch.nn.functional.one_hot(target, 3).float()
    assert torch.equal(target_codewords(WORDS, soft), target_codewords(WORDS, target))


@pytest.mark.parametrize(
    "target", [torch.rand(2, 4), torch.rand(2), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.bool)]
)
def test_targets_of_a_wrong_form_are_refused(target):
    with pytest.raises(InvalidOption, match="3 classes of the scheme"):
        target_codewords(WORDS, target)


def test_a_class_index_beyond_the_scheme_is_an_index_error():
    with pytest.raises(IndexError):
        target_codewords(WORDS, torch.tensor([3]))


def test_loss_refuses_codewords_of_another_shape_and_exponents_that_are_not_positive():
    with pytest.raises(InvalidOption, match="one codeword per sample"):
        coding_loss(torch.rand(2, 4), torch.rand(3, 4), 0.5)
    with pytest.raises(InvalidOption, match="exponent=0"):
        coding_loss(torch.rand(2, 4), torch.rand(2, 4), 0.5, exponent=0)


def test_decoder_equals_the_nearest_codeword_and_ignores_the_scale():
    torch.manual_seed(0)
    words = torch.stack([torch.randperm(12) < 5 for _ in range(40)])
    energies = torch.rand(64, 12, dtype=torch.float64)
    scaled_to_active = energies / energies.sum(dim=1, keepdim=True) * 5
    nearest = torch.cdist(scaled_to_active, words.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    assert torch.equal(decode(energies, words), nearest)
    assert torch.equal(decode(energies * 2.0 ** torch.arange(-32, 32)[:, None], words), nearest)


def test_decoder_returns_the_lowest_class_of_a_tie():
    words = torch.cat([WORDS[2:], WORDS, WORDS])
    assert torch.equal(decode(torch.ones(3, 4), words), torch.zeros(3, dtype=torch.long))
    assert torch.equal(decode(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), words), torch.tensor([2]))
