"""Laws of the coded merge convolution and of the branch mask."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from surgery.errors import InvalidOption, PruneError, UnsupportedModel
from surgery_coded import energy
from surgery_coded.loss import coding_loss
from surgery_coded.modules import BranchDropout, CodedConv2d
from tests.plugins.coded import oracle

TIGHT = {"rtol": 1e-10, "atol": 1e-13}
ROOT = Path(__file__).parents[3]
# N, d, C, kernel, stride, padding, bias
SHAPES = [
    (4, 3, 7, 1, 1, 0, False),
    (8, 2, 16, 1, 1, 0, True),
    (4, 4, 6, 1, 2, 0, True),
    (1, 5, 6, 1, 1, 0, False),
    (16, 1, 8, 1, 1, 0, False),
    (4, 2, 5, 3, 1, 1, True),
    (2, 3, 4, 3, 2, 1, False),
]


def make(n=4, d=3, c=7, kernel=1, stride=1, padding=0, bias=False, size=6, batch=3):
    torch.manual_seed(0)
    conv = nn.Conv2d(n * d, c, kernel, stride, padding, bias=bias).double()
    words = torch.stack([torch.randperm(n) < max(n // 2, 1) for _ in range(5)])
    hidden = torch.randn(batch, n * d, size, size, dtype=torch.float64).relu().requires_grad_()
    return CodedConv2d.from_conv(conv, words, "block/energy"), hidden, conv


def mask_of(kind, n, batch=3):
    if kind == "none":
        return None
    mask = (torch.rand(batch, n) < 0.7).double() / 0.9
    mask[0] = 0.0 if kind == "empty row" else mask[0]
    return mask


def leaves(coded, hidden):
    return [hidden, coded.weight, *([] if coded.bias is None else [coded.bias])]


def compare_with_oracle(coded, hidden, mask=None, active=None, **geometry):
    if active is not None:
        coded.active = active
    output = coded(hidden, mask)
    energies = coded.energy.value
    expected = oracle.coded_merge(hidden, coded.weight, coded.bias, coded.branches, mask, active, **geometry)
    torch.testing.assert_close((output, energies), expected, **TIGHT)
    pull = torch.randn_like(output)
    words = (torch.rand_like(energies) < 0.5).double()
    for parts in ((1.0, 0.0), (0.0, 1.0), (1.0, 2.0)):
        losses = [
            parts[0] * (output * pull).sum() + parts[1] * coding_loss(energies, words, 0.5),
            parts[0] * (expected[0] * pull).sum() + parts[1] * oracle.coding_loss(expected[1], words.tolist(), 0.5),
        ]
        gradients = [torch.autograd.grad(loss, leaves(coded, hidden), retain_graph=True) for loss in losses]
        torch.testing.assert_close(*gradients, **TIGHT)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["none", "random", "empty row"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_energies_and_gradients_equal_the_literal_form(shape, kind, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(energy, "_can_fuse", lambda *_: False)
    coded, hidden, _ = make(*shape)
    compare_with_oracle(coded, hidden, mask_of(kind, shape[0]), stride=shape[4], padding=shape[5])


@pytest.mark.parametrize("active", [[1, 0, 1, 0], [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]])
def test_inactive_branches_are_zeroed_before_the_normalization(active):
    coded, hidden, _ = make()
    compare_with_oracle(coded, hidden, mask_of("random", 4), torch.tensor(active, dtype=torch.float64))


def test_fused_path_is_the_one_taken_in_training(monkeypatch):
    calls = []
    apply = energy._PointwiseJoin.apply
    monkeypatch.setattr(energy._PointwiseJoin, "apply", lambda *a: calls.append(1) or apply(*a))
    coded, hidden, _ = make()
    coded(hidden)
    assert calls == [1]
    with torch.no_grad():
        coded(hidden)
    assert calls == [1]


def test_channels_last_training_equals_contiguous():
    coded, hidden, _ = make()
    results = []
    for source in (hidden, hidden.detach().to(memory_format=torch.channels_last).requires_grad_()):
        output = coded(source)
        loss = output.square().sum() + coded.energy.value.pow(3).sum()
        results.append((output, *torch.autograd.grad(loss, (source, coded.weight))))
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_and_gradgradcheck(bias):
    coded, hidden, _ = make(2, 2, 3, bias=bias, size=2, batch=2)
    mask = torch.tensor([[1.25, 0.0], [1.25, 1.25]], dtype=torch.float64)

    def run(h, w, b=None):
        gain = mask
        return energy.join(h, w, b, gain, torch.ones_like(gain), 2)

    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves(coded, hidden + 0.1)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_parts_get_no_gradient_and_leave_the_other_right(frozen):
    coded, hidden, _ = make(bias=True)
    pull = torch.randn_like(coded(hidden))
    everything = torch.autograd.grad(
        (coded(hidden) * pull).sum() + coded.energy.value.pow(4).sum(), leaves(coded, hidden)
    )
    (coded.weight if frozen == "weight" else hidden).requires_grad_(False)
    ((coded(hidden) * pull).sum() + coded.energy.value.pow(4).sum()).backward()
    for leaf, expected in zip(leaves(coded, hidden), everything, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected, **TIGHT)
        else:
            assert leaf.grad is None


def test_gradient_reaches_a_mask_that_asks_for_it():
    coded, hidden, _ = make()
    mask = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    pull = torch.randn_like(coded(hidden))
    found = torch.autograd.grad((coded(hidden, mask) * pull).sum(), mask)
    literal = oracle.coded_merge(hidden, coded.weight, None, 4, mask)[0]
    torch.testing.assert_close(found, torch.autograd.grad((literal * pull).sum(), mask), **TIGHT)


def test_state_dict_and_parameters_are_those_of_the_replaced_convolution():
    coded, _, conv = make(bias=True)
    assert list(coded.state_dict()) == ["weight", "bias"]
    assert coded.weight is conv.weight
    assert coded.bias is conv.bias
    assert copy.deepcopy(coded).codewords.equal(coded.codewords)


def test_parametrized_weight_keeps_its_parametrization():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 5, 1).double())
    originals = dict(conv.named_parameters())
    coded = CodedConv2d.from_conv(conv, torch.eye(4, dtype=torch.bool), "block/energy")
    assert {k: id(v) for k, v in coded.named_parameters()} == {k: id(v) for k, v in originals.items()}
    assert torch.equal(coded.weight, conv.weight)
    hidden = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    coded(hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in coded.parameters())
    torch.testing.assert_close(coded.pruned([1, 2])(hidden[:, 2:6]).shape, torch.Size([2, 5, 3, 3]))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(8, 8, 1, groups=4), "in 4 groups"),
        (nn.Conv2d(6, 8, 1), "multiple of 4"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(8, 8, 2, padding="same"), "pads unevenly"),
    ],
)
def test_convolutions_that_do_not_sum_branches_are_refused(conv, message):
    with pytest.raises(UnsupportedModel, match=message):
        CodedConv2d.from_conv(conv, torch.eye(4, dtype=torch.bool), "layer3.0/energy")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [[0], [2, 1], [0, 3]])
def test_pruned_equals_masked(shape, keep):
    if max(keep) >= shape[0]:
        keep = [0]
    coded, hidden, _ = make(*shape)
    coded.eval()
    pruned = coded.pruned(keep)
    coded.active = torch.zeros(shape[0], dtype=torch.float64).index_fill_(0, torch.tensor(keep), 1.0)
    kept_hidden = hidden.detach().unflatten(1, (shape[0], -1))[:, keep].flatten(1, 2)
    seen = []
    for module, source in ((coded, hidden.detach()), (pruned, kept_hidden)):
        module.energy.recording = True
        seen.append((module(source), module.energy.value))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(seen[0][1][:, keep], seen[1][1], rtol=1e-12, atol=1e-14)
    assert torch.equal(pruned.codewords, coded.codewords[:, keep])
    assert (pruned.branches, pruned.total_branches) == (len(keep), shape[0])
    assert pruned.weight.shape[1] == len(keep) * shape[1]
    assert not pruned.training


def test_pruning_twice_equals_pruning_once():
    coded, hidden, _ = make()
    once, twice = coded.pruned([1, 3]), coded.pruned([0, 1, 3]).pruned([1, 2])
    source = hidden.detach()[:, [3, 4, 5, 9, 10, 11]]
    assert torch.equal(once(source), twice(source))


@pytest.mark.parametrize("keep", [[], [0, 0], [4], [-1]])
def test_branches_that_cannot_be_kept_are_refused(keep):
    with pytest.raises(PruneError, match="of 4; give at least one"):
        make()[0].pruned(keep)


def test_zero_hidden_gives_zero_output_and_finite_gradients():
    for dtype in (torch.float64, torch.float32):
        coded = make(bias=False)[0].to(dtype)
        hidden = torch.zeros(2, 12, 4, 4, dtype=dtype, requires_grad=True)
        output = coded(hidden)
        (output.sum() + coding_loss(coded.energy.value, torch.ones(2, 4, dtype=dtype), 0.5)).backward()
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(coded.energy.value, torch.zeros(2, 4, dtype=dtype))
        assert hidden.grad.isfinite().all()
        assert coded.weight.grad.isfinite().all()


def test_zero_hidden_in_float16_gives_zero_output():
    coded = make()[0].half()
    assert torch.equal(
        coded(torch.zeros(2, 12, 4, 4, dtype=torch.float16)), torch.zeros(2, 7, 4, 4, dtype=torch.float16)
    )


def test_autocast_computes_energies_in_float32_from_the_rounded_inputs():
    coded, hidden, _ = make(8, 4, 16)
    coded.float()
    source = hidden.detach().float().requires_grad_()
    rounded = copy.deepcopy(coded)
    rounded.weight.data = coded.weight.data.bfloat16().float()
    reference = rounded(source.detach().bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        output = coded(source)
    energies = coded.energy.value
    assert (output.dtype, energies.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(energies, rounded.energy.value, rtol=1e-5, atol=0)
    # 32 products, each rounded by at most 2^-9 of itself, and the rounding of the result.
    torch.testing.assert_close(output.float(), reference, rtol=2**-8, atol=2**-9 * reference.abs().max().item() * 4)
    (output.float().sum() + energies.pow(4).sum()).backward()
    assert source.grad.dtype == coded.weight.grad.dtype == torch.float32
    assert source.grad.isfinite().all()


def test_fused_and_plain_autograd_agree_under_autocast(monkeypatch):
    coded, hidden, _ = make(8, 4, 16, bias=True)
    coded.float()
    source = hidden.detach().float().requires_grad_()
    found = []
    for fused in (True, False):
        monkeypatch.setattr(energy, "_can_fuse", lambda *_, fused=fused: fused)
        with torch.autocast("cpu", torch.bfloat16):
            output = coded(source)
        loss = output.float().square().mean() + coded.energy.value.pow(2).mean()
        found.append(torch.autograd.grad(loss, leaves(coded, source)))
    # Both round the gradients to bfloat16 on the way, in different places: compare with the largest entry.
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-6 * theirs.abs().max().item())


def test_compiled_equals_eager_with_one_graph():
    coded, hidden, _ = make(bias=True)
    mask = mask_of("random", 4)

    def run(h, m):
        output = coded(h, m)
        return output, coded.energy.value

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        output, energies = function(hidden, mask)
        loss = output.square().sum() + energies.pow(4).sum()
        results.append((output, energies, *torch.autograd.grad(loss, leaves(coded, hidden))))
    torch.testing.assert_close(*results, **TIGHT)


def test_exported_program_equals_eager():
    coded, hidden, _ = make(4, 2, 5, 3, 1, 1)
    coded.eval()
    program = torch.export.export(coded, (hidden.detach(),))
    torch.testing.assert_close(program.module()(hidden.detach()), coded(hidden.detach()), **TIGHT)


def test_xla_equals_eager_forward_and_backward():
    # A process of its own: the XLA runtime reads its configuration once, at import.
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", XLA_CHECK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


XLA_CHECK = """
import torch, torch_xla
from surgery_coded.modules import BranchDropout, CodedConv2d
from surgery_coded.loss import coding_loss, decode, target_codewords
torch.manual_seed(0)
for kernel in (1, 3):
    results = []
    conv = torch.nn.Conv2d(8, 6, kernel, padding=kernel // 2)
    words = torch.eye(4, dtype=torch.bool)
    hidden, target = torch.randn(3, 8, 5, 5), torch.tensor([2, 0, 3])
    mask = torch.tensor([[1.25, 0, 1.25, 1.25]] * 3)
    for device in ("cpu", torch_xla.device()):
        coded = CodedConv2d.from_conv(conv, words, "b/energy")
        state = {k: v.detach().clone() for k, v in coded.state_dict().items()}
        coded = CodedConv2d.from_conv(torch.nn.Conv2d(8, 6, kernel, padding=kernel // 2), words, "b/energy")
        coded.load_state_dict(state)
        coded = coded.to(device)
        source = hidden.clone().to(device).requires_grad_()
        output = coded(source, mask.to(device))
        energies = coded.energy.value
        wanted = target_codewords(coded.codewords, target.to(device))
        loss = output.square().mean() + coding_loss(energies, wanted, 0.25)
        loss.backward()
        gradients = [source.grad, coded.weight.grad, coded.bias.grad]
        found = [output, energies, loss, *gradients, decode(energies, coded.codewords)]
        results.append([value.detach().cpu() for value in found])
        drawn = BranchDropout(0.5, 4)(source)
        assert set(drawn.cpu().unique().tolist()) <= {0.0, 2.0}
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
"""


def test_mask_holds_zeros_and_the_inverse_keep_probability_in_the_right_proportion():
    """keep = 0.9 over 40000 draws: standard deviation sqrt(0.9 * 0.1 / 40000) = 0.0015; five of them are 0.0075."""
    torch.manual_seed(0)
    mask = BranchDropout(0.1, 40)(torch.empty(1000, 3, dtype=torch.float64))
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.9}
    kept = (mask > 0).double()
    assert abs(kept.mean().item() - 0.9) < 0.0075
    # Neither samples nor branches share draws: each column and row mean scatters as independent draws do.
    assert kept.mean(dim=0).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.5)
    assert kept.mean(dim=1).std().item() == pytest.approx((0.09 / 40) ** 0.5, rel=0.15)


def test_mask_is_deterministic_under_a_seed_and_takes_the_dtype_of_its_input():
    drop = BranchDropout(0.3, 8)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(drop(torch.empty(16, 1, dtype=torch.float32)))
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.float32


def test_nothing_is_drawn_in_eval_mode_or_for_p_zero():
    state = torch.get_rng_state()
    assert BranchDropout(0.5, 8).eval()(torch.empty(4, 2)) is None
    assert BranchDropout(0.0, 8)(torch.empty(4, 2)) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_probabilities_are_refused(p):
    with pytest.raises(InvalidOption, match="in \\[0, 1\\)"):
        BranchDropout(p, 4)
