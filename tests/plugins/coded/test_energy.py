"""Laws of the energies and of their normalization."""

from __future__ import annotations

import pytest
import torch

from surgery_coded.energy import branch_energies, normalize
from tests.plugins.coded.oracle import branch_outputs, energy

TIGHT = {"rtol": 1e-10, "atol": 1e-14}
GEOMETRIES = [
    # N, d, C, kernel, stride, padding, dilation, size
    (4, 3, 7, (1, 1), (1, 1), (0, 0), (1, 1), (5, 4)),
    (8, 2, 16, (1, 1), (2, 2), (0, 0), (1, 1), (5, 7)),
    (1, 6, 5, (1, 1), (1, 1), (0, 0), (1, 1), (3, 3)),
    (6, 1, 4, (1, 1), (1, 1), (0, 0), (1, 1), (1, 1)),
    (2, 3, 5, (1, 1), (1, 1), (1, 2), (1, 1), (4, 4)),
    (4, 2, 6, (3, 3), (1, 1), (1, 1), (1, 1), (5, 6)),
    (2, 4, 3, (3, 3), (2, 2), (1, 1), (1, 1), (7, 6)),
    (3, 2, 8, (3, 2), (2, 1), (2, 1), (1, 2), (8, 9)),
]


@pytest.mark.parametrize(("n", "d", "c", "kernel", "stride", "padding", "dilation", "size"), GEOMETRIES)
def test_energies_and_gradients_equal_those_of_materialised_outputs(n, d, c, kernel, stride, padding, dilation, size):
    torch.manual_seed(0)
    hidden = torch.randn(3, n * d, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(c, n * d, *kernel, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(3, n, dtype=torch.float64)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    found = branch_energies(hidden, weight, n, **geometry)
    expected = torch.stack([energy(t) for t in branch_outputs(hidden, weight, n, **geometry)], dim=1)
    torch.testing.assert_close(found, expected, **TIGHT)
    for ours, theirs in zip(
        torch.autograd.grad((found * pull).sum(), (hidden, weight)),
        torch.autograd.grad((expected * pull).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **TIGHT)


def test_energy_worked_by_hand():
    """N=2, d=1, C=2, one position, h = (3, 2).

    W_1 = (1, 2), so t_1 = (3, 6) and E_1 = (9 + 36) / 2 = 22.5; W_2 = (-1, 0), so t_2 = (-2, 0) and E_2 = 2.
    """
    hidden = torch.tensor([3.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    weight = torch.tensor([[1.0, -1.0], [2.0, 0.0]], dtype=torch.float64).reshape(2, 2, 1, 1)
    assert torch.equal(branch_energies(hidden, weight, 2), torch.tensor([[22.5, 2.0]], dtype=torch.float64))


def test_channels_last_input_gives_the_same_energies():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 12, 5, 6, dtype=torch.float64), torch.randn(8, 12, 1, 1, dtype=torch.float64)
    strided = branch_energies(hidden.to(memory_format=torch.channels_last), weight, 4)
    torch.testing.assert_close(strided, branch_energies(hidden, weight, 4), rtol=1e-12, atol=0)


def test_normalized_energies_sum_to_the_number_of_branches():
    energies = torch.rand(5, 32, dtype=torch.float64) * 10 ** torch.linspace(-6, 6, 5, dtype=torch.float64)[:, None]
    scale, normalized = normalize(energies)
    torch.testing.assert_close(normalized.sum(dim=1), torch.full((5,), 32.0, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(normalized, energies * scale[:, None] ** 2, rtol=1e-12, atol=0)


def test_normalization_divides_by_the_original_number_of_branches():
    """Energies 1, 4, 4 of formerly nine branches: mean 9/9 = 1, so the scale is 1; of three: mean 3."""
    energies = torch.tensor([[1.0, 4.0, 4.0]], dtype=torch.float64)
    assert torch.equal(normalize(energies, total=9)[1], energies)
    torch.testing.assert_close(normalize(energies)[1], energies / 3, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_energies_are_float32_and_do_not_overflow(dtype):
    """h = 200 and W = 4 in 64 channels, one branch: t = 64 * 200 * 4 = 51200, and t^2 is far beyond float16."""
    hidden, weight = torch.full((1, 64, 2, 2), 200.0, dtype=dtype), torch.full((3, 64, 1, 1), 4.0, dtype=dtype)
    found = branch_energies(hidden, weight, 1)
    assert found.dtype == torch.float32
    assert found.item() == 51200.0**2


def test_energies_are_never_negative():
    """Rounding alone decides the sign of <G, S> where W h is nearly zero: W = (1, 1), h = (x, -x(1 + 1e-7))."""
    torch.manual_seed(0)
    x = torch.randn(4096, 1, 1, 1)
    hidden = torch.cat([x, -x * (1 + 1e-7)], dim=1)
    raw = branch_energies(hidden, torch.ones(3, 2, 1, 1) / 3, 1)
    assert (raw >= 0).all()
