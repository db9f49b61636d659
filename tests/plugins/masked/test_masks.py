"""Laws of the masks: Algorithm 1 by hand, the law of the draws, the training loop, copies, checkpoints, devices."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.testing import tiny_networks
from surgery_masked.masks import FLOOR, Masks, set_grad_scaler, uniform

TIGHT = {"rtol": 1e-12, "atol": 0.0}
IMAGE = torch.zeros(2, 3, 4, 4)


def masks(pairs=2, branches=4, fan_in=2, *, connectivity="learned", lr=0.2, seed=5, fixed=None):
    module = Masks(pairs, branches, fan_in, connectivity=connectivity, lr=lr, seed=seed, fixed=fixed)
    return module.double()


def rows(values):
    return torch.tensor([values], dtype=torch.float64)


def with_real(module, real):
    module.real.copy_(real)
    return module


def random_rows(pairs, branches):
    real = torch.rand(pairs, branches, branches, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.05
    return real / real.sum(dim=-1, keepdim=True)


def gradients(count, module):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, *module.real.shape, dtype=torch.float64, generator=generator)


def leave(module, gradient):
    """Run a training iteration whose gradient dl/dm is `gradient`, and return the mask that it used."""
    used = module(IMAGE)
    (used * gradient).sum().backward()
    return used.detach()


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def binary(values, count):
    """Return the `count` largest of every row, the first of equal ones, by a stable sort."""
    order = values.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(values).scatter(-1, order, 1.0)


# --- Algorithm 1 ---


def test_a_step_worked_by_hand():
    """C = 3, K = 1, lr = 1/2. The rows before the step, r - g/2, clipped, floored, and their sums:

    (0.5, 0.25, 0.25) - (1, -1.5, 0)/2   = (0, 1, 0.25)                       -> (1e-4, 1, 0.25)  sum 1.2501
    (0.5, 0.25, 0.25) - (2, -3, 0.5)/2   = (-0.5, 1.75, 0)   -> (0, 1, 0)     -> (1e-4, 1, 1e-4)  sum 1.0002
    (0.2, 0.3, 0.5) - (-0.4, 0, 0.2)/2   = (0.4, 0.3, 0.4)                                        sum 1.1
    """
    module = with_real(masks(1, 3, 1, lr=0.5), rows([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]))
    leave(module, rows([[1.0, -1.5, 0.0], [2.0, -3.0, 0.5], [-0.4, 0.0, 0.2]]))
    assert torch.equal(module.real, rows([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]))
    module(IMAGE)
    assert FLOOR == 1e-4
    expected = [
        [1e-4 / 1.2501, 1 / 1.2501, 0.25 / 1.2501],
        [1e-4 / 1.0002, 1 / 1.0002, 1e-4 / 1.0002],
        [4 / 11, 3 / 11, 4 / 11],
    ]
    torch.testing.assert_close(module.real, rows(expected), **TIGHT)


def test_a_step_of_real_masks_worked_by_hand():
    """C = 2, K = 2, lr = 0.1: (0.5, 0.5) - (1, -2)/10 = (0.4, 0.7), sum 1.1; the mask is 2r = (8/11, 14/11).

    The other row has no gradient: (0.25, 0.75), mask (0.5, 1.5).
    """
    module = with_real(masks(1, 2, 2, connectivity="real", lr=0.1), rows([[0.5, 0.5], [0.25, 0.75]]))
    assert torch.equal(leave(module, rows([[1.0, -2.0], [0.0, 0.0]])), rows([[1.0, 1.0], [0.5, 1.5]]))
    used = module(IMAGE).detach()
    torch.testing.assert_close(used, rows([[8 / 11, 14 / 11], [0.5, 1.5]]), **TIGHT)
    torch.testing.assert_close(module.real, rows([[4 / 11, 7 / 11], [0.25, 0.75]]), **TIGHT)
    assert module.drawn == 0


def test_the_gradient_is_that_of_the_mask_for_all_entries_drawn_or_not():
    """l = sum_j (sum_k m_jk f_k)^2, so dl/dm_jk = 2 (sum_i m_ji f_i) f_k."""
    module = masks(1, 4, 1, lr=0.01)
    before, outputs = module.real.clone(), torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    used = module(IMAGE)
    joined = used @ outputs
    joined.square().sum().backward()
    module(IMAGE)
    expected = before - 0.01 * 2 * joined.detach()[..., None] * outputs
    torch.testing.assert_close(module.real, expected / expected.sum(dim=-1, keepdim=True), **TIGHT)


def test_several_backward_passes_through_one_forward_add_up():
    once, twice = masks(), masks()
    first, second = gradients(2, once)
    leave(once, first + second)
    used = twice(IMAGE)
    (used * first).sum().backward(retain_graph=True)
    (used * second).sum().backward()
    once(IMAGE), twice(IMAGE)
    torch.testing.assert_close(once.real, twice.real, **TIGHT)


def test_of_two_forwards_before_a_backward_pass_the_last_counts():
    module, last = masks(), masks()
    first, second = gradients(2, module)
    used = module(IMAGE), module(IMAGE)
    ((used[0] * first).sum() + (used[1] * second).sum()).backward()
    leave(last, second)
    module(IMAGE), last(IMAGE)
    torch.testing.assert_close(module.real, last.real, **TIGHT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(value):
    module = with_real(masks(), real := random_rows(2, 4))
    gradient = gradients(1, module)[0]
    gradient[1, 2, 3] = value
    used = module(IMAGE)
    (used * 0 + gradient * used).sum().backward()
    module(IMAGE)
    torch.testing.assert_close(module.real, real, **TIGHT)
    leave(module, gradients(1, module)[0])
    module(IMAGE)
    assert (module.real - real).abs().max() > 0.01


def test_rows_stay_distributions_with_k_positive_entries():
    module = masks(3, 5, 2, lr=5.0)
    for gradient in gradients(30, module):
        used = leave(module, gradient)
        assert set(used.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(used.sum(dim=-1), torch.full((3, 5), 2.0, dtype=torch.float64))
        torch.testing.assert_close(module.real.sum(dim=-1), torch.ones(3, 5, dtype=torch.float64), **TIGHT)
        assert module.real.min() > FLOOR / 6
    assert module.drawn == 30


# --- what learns, and what stands ---


def test_a_forward_in_train_mode_without_gradients_changes_nothing():
    module = with_real(masks(), random_rows(2, 4))
    leave(module, gradients(1, module)[0])
    before = snapshot(module)
    with torch.no_grad():
        used = module(IMAGE)
    assert torch.equal(used, binary(module.real, 2))
    assert same(snapshot(module), before)
    module(IMAGE)
    assert not torch.equal(module.real, before["real"])


@pytest.mark.parametrize("connectivity", ["learned", "real"])
def test_eval_mode_uses_the_mask_that_stands(connectivity):
    module = with_real(masks(connectivity=connectivity), random_rows(2, 4)).eval()
    expected = binary(module.real, 2) if connectivity == "learned" else 2 * module.real
    before = snapshot(module)
    torch.testing.assert_close(module(IMAGE), expected, rtol=1e-15, atol=0.0)
    assert not module(IMAGE).requires_grad
    assert same(snapshot(module), before)


def test_of_equal_entries_the_first_are_active():
    assert torch.equal(masks(2, 4, 2).active, torch.tensor([True, True, False, False]).expand(2, 4, 4))
    values = torch.randint(0, 3, (200, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    for fan_in in range(1, 7):
        module = with_real(masks(200, 6, fan_in), values)
        assert torch.equal(module.active, binary(values, fan_in).bool())


def test_full_connectivity_is_all_ones_and_never_changes():
    module = masks(2, 4, 4, connectivity="full")
    before = snapshot(module)
    assert torch.equal(module(IMAGE), torch.ones(2, 4, 4, dtype=torch.float64))
    assert not module(IMAGE).requires_grad
    assert same(snapshot(module), before)
    assert torch.equal(module.real, torch.full((2, 4, 4), 0.25, dtype=torch.float64))


def test_learned_masks_of_all_branches_are_those_of_full_connectivity():
    module = masks(2, 4, 4)
    assert torch.equal(module(IMAGE), torch.ones(2, 4, 4, dtype=torch.float64))
    assert not module(IMAGE).requires_grad
    assert module.drawn == 0


def test_random_connections_are_the_given_ones_also_once_they_are_frozen():
    fixed = torch.tensor([[[0, 2], [1, 3], [3, 0], [2, 1]]])
    module = masks(1, 4, 2, connectivity="random", fixed=fixed)
    expected = rows([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).double()
    assert torch.equal(module(IMAGE), expected)
    assert torch.equal(module.real, expected / 2)
    module.set_extra_state(module.get_extra_state())
    module.freeze()
    assert torch.equal(module(IMAGE), expected)
    assert torch.equal(module.real, expected / 2)


def test_freezing_consumes_the_gradient_and_fixes_the_k_largest():
    module = masks()
    gradient = gradients(1, module)[0]
    leave(module, gradient)
    expected = (torch.full_like(module.real, 0.25) - 0.2 * gradient).clamp(0, 1).clamp(min=1e-4)
    module.freeze()
    torch.testing.assert_close(module.real, expected / expected.sum(dim=-1, keepdim=True), **TIGHT)
    before = snapshot(module)
    assert torch.equal(module(IMAGE), binary(expected, 2))
    assert not module(IMAGE).requires_grad
    module.freeze()
    assert same(snapshot(module), before)
    assert module.get_extra_state()[0] == 1
    assert not module.get_extra_state()[1:].any()


def test_frozen_real_masks_are_binary():
    module = with_real(masks(connectivity="real"), random_rows(2, 4))
    module.freeze()
    assert torch.equal(module(IMAGE), binary(module.real, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fan_in": 0}, "expected 1 to 4"),
        ({"fan_in": 5}, "expected 1 to 4"),
        ({"connectivity": "full"}, "expected 4"),
        ({"connectivity": "random"}, "expected \\(2, 4, 2\\)"),
        ({"connectivity": "random", "fixed": torch.zeros(2, 4, 3, dtype=torch.long)}, "expected \\(2, 4, 2\\)"),
        ({"fixed": torch.zeros(2, 4, 2, dtype=torch.long)}, "expected None"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        masks(**options)


def test_a_replica_of_data_parallel_is_refused_unless_frozen():
    module = masks()
    with pytest.raises(UnsupportedModel, match="DistributedDataParallel"):
        module._replicate_for_data_parallel()(IMAGE)
    module.freeze()
    replica = module._replicate_for_data_parallel()
    replica.real = module.real  # which replicate() sets
    assert torch.equal(replica(IMAGE), module(IMAGE))


# --- draws ---


def inclusion(p):
    """Return the chance of each entry to be among two draws: p_k + sum_{i != k} p_i p_k / (1 - p_i)."""
    return [p[k] + sum(p[i] * p[k] / (1 - p[i]) for i in range(len(p)) if i != k) for k in range(len(p))]


def test_inclusions_have_the_law_of_draws_without_replacement():
    """C = 4, K = 2, 20,000 draws (250 forwards of 80 rows): within 4 standard errors sqrt(q (1 - q) / 20,000).

    Proportional to 10 k would be (1, 0.6, 0.3, 0.1); what is expected is about (0.83, 0.67, 0.37, 0.13).
    """
    p = [0.5, 0.3, 0.15, 0.05]
    module = with_real(masks(20, 4, 2), torch.tensor(p, dtype=torch.float64).expand(20, 4, 4))
    found = torch.stack([module(IMAGE).detach() for _ in range(250)]).mean(dim=(0, 1, 2))
    expected = torch.tensor(inclusion(p), dtype=torch.float64)
    assert expected.sum() == pytest.approx(2, rel=1e-12)
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((found - expected).abs() < 4 * error).all()
    assert ((found - torch.tensor([1.0, 0.6, 0.3, 0.1])).abs() > 4 * error).all()


def chi_square(cells, count):
    """Return (statistic - degrees) / sqrt(2 degrees), which is about standard normal for independent uniform cells."""
    observed = torch.bincount(cells.flatten(), minlength=count).double()
    expected = cells.numel() / count
    statistic = ((observed - expected).square() / expected).sum()
    return float((statistic - (count - 1)) / (2 * (count - 1)) ** 0.5)


def noise(seed, drawn=256, count=1024):
    return uniform(torch.tensor(seed), torch.arange(drawn), count)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63)])
def test_the_noise_is_uniform_in_its_high_and_in_its_low_bits(seed):
    """2^18 numbers in 256 cells; each statistic within 4 standard deviations."""
    values = noise(seed)
    assert values.dtype == torch.float64
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert abs(chi_square((values * 256).long(), 256)) < 4
    assert abs(chi_square((values * 2**32).long() & 255, 256)) < 4


def test_no_two_entries_of_a_draw_have_the_same_noise():
    """Random words would repeat about 2^36 / 2^33 = 8 times among 2^18."""
    assert len(noise(0, 1, 2**18).unique()) == 2**18


def pairs_of_cells(one, other):
    return (one * 16).long() * 16 + (other * 16).long()


@pytest.mark.parametrize("apart", [1, 2, 16, 128])
def test_the_noise_of_near_entries_counters_and_seeds_is_independent(apart):
    """About 2^18 pairs in 16 x 16 cells; each statistic within 4 standard deviations."""
    values = noise(0)
    for one, other in (
        (values[:, apart:], values[:, :-apart]),
        (values[apart:], values[:-apart]),
        (values, noise(apart)),
        (values, noise(apart << 32)),
    ):
        assert abs(chi_square(pairs_of_cells(one, other), 256)) < 4


def test_counters_whose_keys_are_near_do_not_share_their_noise():
    """With one round of hashing, some of 2^14 counters of 2^7 entries have the same numbers in another order."""
    sums = (uniform(torch.tensor(0), torch.arange(2**14), 2**7) * 2**32).long().sum(dim=-1)
    assert len(sums.unique()) == 2**14


def test_draws_are_the_races_of_that_noise():
    module = with_real(masks(2, 4, 2, seed=11), random_rows(2, 4))
    for drawn in range(5):
        clocks = -uniform(torch.tensor(11), torch.tensor(drawn), 32).log().reshape(2, 4, 4)
        assert torch.equal(module(IMAGE).detach(), binary(module.real / clocks, 2))


def test_equal_seeds_and_counters_draw_the_same_in_both_precisions_and_touch_no_generator():
    state = torch.get_rng_state()
    double = with_real(masks(3, 8, 4), random_rows(3, 8))
    single = copy.deepcopy(double).float()
    draws = [double(IMAGE).detach() for _ in range(100)]
    assert all(torch.equal(draw.float(), single(IMAGE).detach()) for draw in draws)
    assert single(IMAGE).dtype == torch.float32
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 100
    other = with_real(masks(3, 8, 4, seed=6), random_rows(3, 8))
    assert not torch.equal(other(IMAGE).detach(), draws[0])
    assert torch.equal(torch.get_rng_state(), state)


# --- the user's training loop ---


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, weight_decay=0.1),
}


@pytest.mark.parametrize("clear", ["before the forward", "before the backward", "after the step"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_learn_the_same_whatever_optimizer_the_weights_have(optimizer, clear):
    network = nn.ModuleDict({"masks": masks(), "layer": nn.Linear(4, 4).double()})
    alone = masks()
    steps = OPTIMIZERS[optimizer](network.parameters())
    assert not list(network["masks"].parameters())
    for gradient in gradients(5, alone):
        if clear == "before the forward":
            network.zero_grad(), steps.zero_grad()
        used = network["masks"](IMAGE)
        if clear == "before the backward":
            network.zero_grad(), steps.zero_grad()
        ((used * gradient).sum() + network["layer"](torch.ones(4).double()).square().sum()).backward()
        steps.step()
        if clear == "after the step":
            network.zero_grad(), steps.zero_grad()
        assert torch.equal(leave(alone, gradient), used.detach())
        assert torch.equal(alone.real, network["masks"].real)


def converted():
    network = surgery.convert(tiny_networks()["resnext"]().double(), "coded", input_size=32)
    network.add_module("masks", masks())
    return network


def test_the_scale_of_the_loss_is_divided_out():
    """Of the forward, not of the next one: 1024, then 256. Powers of two are exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    network, plain = converted(), masks()
    set_grad_scaler(torch.compile(network, backend="eager"), scaler)
    module = network.masks
    for gradient, scale in zip(gradients(4, plain), (256.0, 64.0, 2.0, 8.0), strict=True):
        scaler.scale((module(IMAGE) * gradient).sum()).backward()
        twin = copy.deepcopy(module)
        scaler.update(scale)
        leave(plain, gradient)
        assert torch.equal(module.real, plain.real)
        assert torch.equal(module.get_extra_state(), plain.get_extra_state())
        assert twin.gradient_scale() == scale  # copies share the scaler
    module(IMAGE), plain(IMAGE)
    assert torch.equal(module.real, plain.real)
    assert (module.real != 0.25).all()


def test_a_scaler_for_a_network_without_masks_is_refused():
    network = surgery.convert(tiny_networks()["resnext"](), "coded", input_size=32)
    with pytest.raises(UnsupportedModel, match="no masks"):
        set_grad_scaler(network, torch.amp.GradScaler("cpu"))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.masks = masks(1, 4, 2)

    def forward(self, image):
        values = image.new_tensor([0.5, -1.0, 2.0, 3.0])
        return (self.masks(image)[0] @ values).square().sum() + image.sum()


def test_compiled_training_computes_the_same():
    torch._dynamo.reset()
    plain, other = Mixing(), Mixing()
    compiled = torch.compile(other, backend="eager")
    for _ in range(4):
        losses = [module(IMAGE.double()) for module in (plain, compiled)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    assert same(plain.state_dict(), other.state_dict())
    assert plain.masks.get_extra_state().any()
    plain.eval(), compiled.eval()
    assert torch.equal(plain(IMAGE.double()), compiled(IMAGE.double()))


# --- copies, checkpoints, other places ---


@pytest.mark.parametrize("connectivity", ["learned", "real"])
def test_a_training_that_is_resumed_between_backward_and_forward_computes_the_same(connectivity):
    module = masks(connectivity=connectivity)
    steps = gradients(6, module)
    for gradient in steps[:3]:
        leave(module, gradient)
    resumed = masks(connectivity=connectivity, seed=99)
    resumed.load_state_dict(snapshot(module))
    for gradient in steps[3:]:
        assert same(module.state_dict(), resumed.state_dict())
        assert torch.equal(leave(module, gradient), leave(resumed, gradient))
    assert same(module.state_dict(), resumed.state_dict())


def test_the_state_dict_keeps_that_masks_are_frozen_and_one_size():
    module = masks()
    sizes = {name: value.shape for name, value in module.state_dict().items()}
    leave(module, gradients(1, module)[0])
    assert {name: value.shape for name, value in module.state_dict().items()} == sizes
    module.freeze()
    loaded = masks(seed=1)
    loaded.load_state_dict(snapshot(module))
    assert loaded.frozen
    assert torch.equal(loaded(IMAGE), module(IMAGE))
    assert same(loaded.state_dict(), module.state_dict())
    thawed = masks()
    module.load_state_dict(thawed.state_dict())
    assert not module.frozen


def test_loading_replaces_a_gradient_that_is_not_consumed():
    module, fresh = masks(), masks()
    leave(module, gradients(1, module)[0])
    module.load_state_dict(fresh.state_dict())
    module(IMAGE), fresh(IMAGE)
    assert torch.equal(module.real, fresh.real)


@pytest.mark.parametrize("when", ["after the forward", "after the backward"])
def test_deep_copies_go_on_by_themselves(when):
    module = masks()
    first, second = gradients(2, module)
    used = module(IMAGE)
    if when == "after the backward":
        (used * first).sum().backward()
    before = snapshot(module)
    twin = copy.deepcopy(module)
    leave(twin, second), twin(IMAGE)
    assert same(snapshot(module), before)
    if when == "after the forward":
        (used * first).sum().backward()
    leave(module, second), module(IMAGE)
    assert torch.equal(twin.real, module.real) == (when == "after the backward")


def test_a_cast_after_the_forward_keeps_the_gradient():
    module = Masks(2, 4, 2, connectivity="learned", lr=0.2, seed=5)
    gradient = gradients(1, module)[0]
    used = module(IMAGE)
    module.double()
    (used * gradient.float()).sum().backward()
    module(IMAGE)
    expected = (torch.full((2, 4, 4), 0.25).double() - 0.2 * gradient.float().double()).clamp(0, 1).clamp(min=1e-4)
    torch.testing.assert_close(module.real, expected / expected.sum(dim=-1, keepdim=True), **TIGHT)


@pytest.mark.parametrize("connectivity", ["learned", "real"])
def test_a_copy_without_data_runs_and_has_a_state(connectivity):
    module = masks(connectivity=connectivity)
    leave(module, gradients(1, module)[0])
    memo = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in module.buffers()}
    for twin in (copy.deepcopy(module, memo), copy.deepcopy(module).to("meta")):
        assert twin.eval()(IMAGE.to("meta")).shape == (2, 4, 4)
        state = twin.state_dict()
        assert all(value.is_meta for value in state.values())
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in module.state_dict().items()
        }
        twin.load_state_dict(state)


@pytest.mark.parametrize("connectivity", ["learned", "real"])
def test_export_keeps_the_mask_that_stands(connectivity):
    module = with_real(masks(connectivity=connectivity), random_rows(2, 4)).eval()
    program = torch.export.export(module, (IMAGE,)).module()
    assert torch.equal(program(IMAGE), module(IMAGE))


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra `export`")
def test_an_onnx_file_keeps_the_mask_that_stands_with_ties(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = with_real(masks(3, 4, 2), torch.tensor([0.1, 0.4, 0.1, 0.4]).double().expand(3, 4, 4))
    module.real[0] = 0.25
    module = Onward(module).eval()
    torch.onnx.export(module, (IMAGE,), tmp_path / "masks.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "masks.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    assert torch.equal(torch.from_numpy(found), module(IMAGE))


class Onward(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.masks = module

    def forward(self, image):
        return self.masks(image) + image.sum()


PROCESS = """
import sys, pathlib, torch
from torch import distributed
from surgery_masked.masks import Masks

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
store = distributed.FileStore(str(folder / "store"), 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
reduce, calls = distributed.all_reduce, []
distributed.all_reduce = lambda *args, **options: calls.append(1) or reduce(*args, **options)
module = Masks(2, 4, 2, connectivity="learned", lr=0.2, seed=5).double()
found = []
for gradient in torch.load(folder / "gradients.pt")[:, rank]:
    used = module(torch.zeros(1))
    if not (gradient == 0).all():
        (used * gradient).sum().backward()
    module.eval()(torch.zeros(1))
    module.train()
    found.append((used.detach(), module.real.clone(), len(calls)))
module.freeze()
found.append((module(torch.zeros(1)), module.real.clone(), len(calls)))
torch.save(found, folder / f"{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_draw_the_same_and_average_their_gradients(tmp_path):
    """Of six iterations the second has no backward pass in process 1, and in the fourth its gradient is not finite.

    One reduction at the end of every backward pass, and in process 1 one in the third forward for the one it left out.
    """
    alone = masks()
    each = torch.stack([gradients(6, alone), 2 * gradients(12, alone)[6:]], dim=1)
    each[1, 1] = 0
    each[3, 1, 0, 0, 0] = float("inf")
    torch.save(each, tmp_path / "gradients.pt")
    workers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", PROCESS, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = [(leave(alone, gradient), alone.real.clone()) for gradient in each.mean(dim=1).nan_to_num(posinf=1e400)]
    alone.freeze()
    expected.append((alone(IMAGE), alone.real.clone()))
    for step, (one, other, (mask, real)) in enumerate(zip(first, second, expected, strict=True)):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[2] == min(step + 1, 6)
        assert other[2] == (1 if step == 1 else min(step + 1, 6))
        assert torch.equal(one[0], mask)
        torch.testing.assert_close(one[1], real, **TIGHT)


XLA = """
import copy, torch, torch_xla
from surgery_masked.masks import Masks

torch.manual_seed(0)
cpu = Masks(2, 8, 4, connectivity="learned", lr=0.2, seed=5).double()
device = torch_xla.device()
xla = copy.deepcopy(cpu).to(device)
for gradient in torch.randn(5, 2, 8, 8, dtype=torch.float64):
    used = [module(torch.zeros(1)) for module in (cpu, xla)]
    for mask in used:
        (mask * gradient.to(mask.device)).sum().backward()
    torch_xla.sync()
    assert torch.equal(used[0].detach(), used[1].detach().cpu())
    torch.testing.assert_close(xla.real.cpu(), cpu.real, rtol=1e-12, atol=0.0)
assert torch.equal(cpu.eval()(None), xla.eval()(None).cpu())
print("xla")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla has no release for this Python or torch"
)
def test_masks_on_xla_are_those_on_the_cpu():
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", XLA], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla")
