"""What training loops do to a masked network: checkpoints around it, empty batches, half precision, odd kernels."""

from __future__ import annotations

import copy
import mmap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import surgery
import surgery_masked
from surgery.testing import tiny_networks
from surgery_masked import memory
from surgery_masked.network import masks_of


def masked(**options):
    torch.manual_seed(0)
    return surgery.convert(tiny_networks()["resnext"]().double(), "masked", input_size=32, **options).train()


def images(count=3):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_checkpoint_around_the_network_uses_the_masks_of_its_forward_pass():
    plain = masked(fan_in=1)
    wrapped = copy.deepcopy(plain)
    plain(images()).square().sum().backward()
    checkpoint(wrapped, images(), use_reentrant=False).square().sum().backward()
    assert masks_of(wrapped).drawn == masks_of(plain).drawn == 1
    for (name, found), expected in zip(wrapped.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-10, atol=1e-16), name
    plain(images()), wrapped(images())  # consumes the gradients of the masks
    assert torch.allclose(masks_of(wrapped).real, masks_of(plain).real, rtol=1e-10, atol=0)
    assert not torch.equal(masks_of(plain).real, torch.full_like(masks_of(plain).real, 1 / 8))  # they moved


def test_reentrant_checkpoint_around_the_network_uses_the_masks_that_stand_throughout():
    model = masked(fan_in=1)
    frozen = copy.deepcopy(model)
    surgery_masked.freeze(frozen)
    frozen(images()).square().sum().backward()
    checkpoint(model, images().requires_grad_(), use_reentrant=True).square().sum().backward()
    assert masks_of(model).drawn == 0
    for (name, found), expected in zip(model.named_parameters(), frozen.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-10, atol=1e-16), name


@pytest.mark.parametrize("norm", ["shared", "branch"])
def test_empty_batch_leaves_the_statistics_alone(norm):
    model = masked(norm=norm)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    assert model(images()[:0]).shape == (0, 10)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_masks_stay_in_float32_in_a_network_of_half_precision():
    model = masked(fan_in=1).float().to(torch.bfloat16)
    assert masks_of(model).real.dtype == torch.float32
    model(images().to(torch.bfloat16)).float().square().sum().backward()
    model(images().to(torch.bfloat16))
    assert masks_of(model).real.dtype == torch.float32


def test_kernel_without_huge_pages_gets_ordinary_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, option):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    found = memory.empty(torch.zeros(1), (2, 1 << 20))
    assert found.shape == (2, 1 << 20)
    assert torch.equal(found.fill_(3), torch.full((2, 1 << 20), 3.0))


def test_figures_take_what_connectivity_returns(tmp_path):
    connections = surgery_masked.connectivity(masked(fan_in=1))
    for number, given in enumerate((connections, list(connections.values()))):
        surgery_masked.draw_connections(given, tmp_path / f"{number}.png")
        surgery_masked.draw_masks(given, tmp_path / f"{number}-masks.png")
        surgery_masked.draw_active({"one": given}, tmp_path / f"{number}-active.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
