"""Laws of the gates: what they draw, what their gradient is, how likely they open, and every way to run them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption
from surgery.testing import tiny_networks
from surgery_gated import gated_blocks
from surgery_gated.gates import AlwaysOn, DependentHead, Gates, IndependentHead, Stochastic, Threshold, draw
from surgery_gated.method import Gated
from surgery_gated.modules import ChannelGate, LayerGate
from tests.plugins.gated import oracle

TIGHT = {"rtol": 1e-10, "atol": 1e-13}
DRAWS = 20_000
MARGINS = torch.tensor([-3.0, -1.0, -0.2, 0.0, 0.5, 1.9, 3.9], dtype=torch.float64)


def dependent(channels=5, count=3, granularity="channel", dtype=torch.float64):
    """Return gates with weights and statistics of their own; the library's start is the same for every image."""
    torch.manual_seed(0)
    gates = Gates(DependentHead(channels, count, (0.1, 2.0)), granularity).to(dtype)
    head = gates.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.7)
        head.norm.running_mean.normal_()
        head.norm.running_var.uniform_(0.5, 1.5)
    return gates


def independent(logits):
    logits = torch.as_tensor(logits)
    gates = Gates(IndependentHead(len(logits), (0.0, 0.0)), "channel").to(logits.dtype)
    with torch.no_grad():
        gates.head.logits.copy_(logits)
    return gates


def images(batch=6, channels=5, dtype=torch.float64):
    return torch.randn(batch, channels, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- a draw ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_drawn_gate_is_exactly_zero_or_one(dtype):
    """Hard + soft - soft would be 1 + 6e-8 for one soft gate in a few."""
    drawn = draw(torch.randn(DRAWS, 7).to(dtype))
    assert drawn.dtype == dtype
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


def test_a_gate_opens_with_probability_sigmoid_of_the_margin():
    """Over n draws the rate scatters by sqrt(p (1 - p) / n) <= 0.0035; five of those are allowed."""
    rates = draw(MARGINS.expand(DRAWS, -1)).mean(dim=0)
    for rate, margin in zip(rates.tolist(), MARGINS.tolist(), strict=True):
        p = oracle.sigmoid(margin)
        assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)


def test_a_draw_has_the_distribution_of_two_gumbel_noises_and_argmax():
    """The difference of two independent rates scatters by sqrt(2 p (1 - p) / n); five of those are allowed."""
    logits = torch.stack([torch.linspace(-1, 1, len(MARGINS), dtype=torch.float64)] * 2, dim=1)
    logits[:, 1] += MARGINS
    literal = oracle.gumbel_softmax_gates(logits, DRAWS, torch.Generator().manual_seed(7)).double()
    drawn = draw((logits[:, 1] - logits[:, 0]).expand(DRAWS, -1))
    for found, expected, margin in zip(drawn.mean(dim=0), literal.mean(dim=0), MARGINS.tolist(), strict=True):
        p = oracle.sigmoid(margin)
        assert abs(found - expected) < 5 * math.sqrt(2 * p * (1 - p) / DRAWS)


def test_draws_of_images_and_gates_are_independent():
    """The correlation of independent columns scatters by 1 / sqrt(n) = 0.007; five of those are allowed."""
    drawn = independent(torch.zeros(4, 2, dtype=torch.float64)).train()(torch.zeros(DRAWS, 1, 1, 1))
    correlation = torch.corrcoef(drawn.T.double())
    assert (correlation - torch.eye(4)).abs().max() < 5 / math.sqrt(DRAWS)
    neighbours = torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0]]).double())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(DRAWS)


def test_value_and_gradient_are_those_of_the_soft_gate_of_the_same_noise():
    """z = [s > 1/2] and dz/dmargin = ds/dmargin = s (1 - s)."""
    margin = torch.randn(50, 7, dtype=torch.float64).requires_grad_()
    pull = torch.randn(50, 7, dtype=torch.float64)
    torch.manual_seed(3)
    drawn = draw(margin)
    torch.manual_seed(3)
    soft = oracle.soft_gate(margin, torch.rand(50, 7, dtype=torch.float64))
    assert torch.equal(drawn, (soft > 0.5).double())
    found = torch.autograd.grad((drawn * pull).sum(), margin)[0]
    torch.testing.assert_close(found, torch.autograd.grad((soft * pull).sum(), margin)[0], **TIGHT)
    torch.testing.assert_close(found, soft * (1 - soft) * pull, **TIGHT)


def test_the_relaxed_gate_is_the_softmax_of_the_logits_with_two_noises():
    """g_1 - g_0 = logit(u): the scalar form is the softmax over two logits, gradient included."""
    logits = torch.randn(9, 2, dtype=torch.float64).requires_grad_()
    noise = -torch.log(-torch.log(torch.rand(9, 2, dtype=torch.float64)))
    both = torch.softmax(logits + noise, dim=1)[:, 1]
    scalar = oracle.soft_gate(logits[:, 1] - logits[:, 0], torch.sigmoid(noise[:, 1] - noise[:, 0]))
    torch.testing.assert_close(both, scalar, **TIGHT)
    pull = torch.randn(9, dtype=torch.float64)
    gradients = [torch.autograd.grad((soft * pull).sum(), logits)[0] for soft in (both, scalar)]
    torch.testing.assert_close(*gradients, **TIGHT)


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_sure_gates_and_finite_gradients(size, dtype):
    gates = independent(torch.tensor([[size, -size], [-size, size]], dtype=dtype)).train()
    drawn = gates(torch.zeros(100, 1, 1, 1, dtype=dtype))
    assert torch.equal(drawn, torch.tensor([[0.0, 1.0]], dtype=dtype).expand(100, -1))
    drawn.sum().backward()
    assert gates.head.logits.grad.isfinite().all()
    assert gates.probabilities(torch.zeros(1, 1, 1, 1)).tolist()[0] == pytest.approx([0, 1], abs=1e-40)


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_numbers_give_numbers(edge, monkeypatch):
    """torch.rand returns 0 once in 2^24 draws, and never 1; log(0) is infinite, and must not become a NaN."""
    monkeypatch.setattr(torch, "rand_like", lambda value: torch.full_like(value, edge))
    margin = torch.tensor([-1e4, -1.0, 0.0, 1.0], requires_grad=True)
    drawn = draw(margin)
    drawn.sum().backward()
    assert drawn.isfinite().all()
    assert margin.grad.isfinite().all()
    assert drawn[1:].tolist() == [float(edge > 0)] * 3


# --- how likely gates are open ---


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"granularity": "layer", "dependent": True}, 0.870),
        ({"granularity": "layer", "dependent": False}, 0.980),
        ({"granularity": "channel", "dependent": True}, 0.980),
        ({"granularity": "channel", "dependent": False}, 0.980),
    ],
)
def test_fresh_gates_are_open_with_the_probability_of_the_paper(options, expected, training):
    """Biases (0.1, 2) give 1 / (1 + e^-1.9) = 0.8699, (0.1, 4) 1 / (1 + e^-3.9) = 0.9802, whatever the image is."""
    model = surgery.convert(tiny_networks()["wide resnet"](), Gated(**options), input_size=32)
    for block, gates in gated_blocks(model.train(training)):
        found = gates.probabilities(5 * torch.randn(6, block.channels.input, 8, 8))
        assert found.shape == (6, gates.count)
        assert {round(value, 3) for value in found.flatten().tolist()} == {expected}


@pytest.mark.parametrize("training", [False, True])
def test_dependent_gates_equal_a_loop_over_images_and_gates(training):
    gates = dependent().train(training)
    x = images().requires_grad_()
    leaves = [x, *gates.head.parameters()]
    logits = oracle.dependent_logits(x, dict(gates.head.state_dict(keep_vars=True)), training)
    expected = torch.softmax(logits, dim=-1)[..., 1]
    found = gates.probabilities(x)
    torch.testing.assert_close(found, expected, **TIGHT)
    pull = torch.randn_like(found)
    gradients = [torch.autograd.grad((value * pull).sum(), leaves) for value in (found, expected)]
    torch.testing.assert_close(*gradients, **TIGHT)


def test_dependent_gates_collect_statistics_in_train_mode_alone():
    """With momentum 0.1: 0.9 of the old, 0.1 of the batch's mean and unbiased variance."""
    gates = dependent()
    before = copy.deepcopy(gates.head.norm)
    gates.eval()(images())
    assert torch.equal(gates.head.norm.running_mean, before.running_mean)
    gates.train()(images())
    values = nn.functional.linear(images().mean(dim=(2, 3)), gates.head.reduce.weight, gates.head.reduce.bias)
    expected = 0.9 * before.running_mean + 0.1 * values.mean(dim=0)
    torch.testing.assert_close(gates.head.norm.running_mean, expected, **TIGHT)
    expected = 0.9 * before.running_var + 0.1 * values.var(dim=0)
    torch.testing.assert_close(gates.head.norm.running_var, expected, **TIGHT)


def test_dependent_gates_learn_from_the_first_step_on():
    """The last layer starts at zero, so in the first step only it and its bias have a gradient that is not zero."""
    gates = Gates(DependentHead(5, 3, (0.1, 2.0)), "channel").double().train()
    (gates(images()) * torch.randn(6, 3, dtype=torch.float64)).sum().backward()
    assert gates.head.weight.grad.abs().sum(dim=2).min() > 0
    assert gates.head.bias.grad.abs().min() > 0
    assert all(parameter.grad is not None for parameter in gates.parameters())


# --- modes ---


def test_a_gate_is_open_where_its_probability_exceeds_the_threshold():
    """Logits (0, l) for l = -1, 0, 1, 2 open with 0.269, 0.5, 0.731, 0.881; the threshold itself is closed."""
    gates = independent(torch.tensor([[0, -1], [0, 0], [0, 1], [0, 2]], dtype=torch.float64)).eval()
    x = torch.zeros(2, 1, 1, 1)
    for tau, expected in (
        (0.5, [0, 0, 1, 1]),
        (0.8, [0, 0, 0, 1]),
        (0.2, [1, 1, 1, 1]),
        (0.0, [1] * 4),
        (1.0, [0] * 4),
    ):
        gates.mode = Threshold(tau)
        assert gates(x).tolist() == [expected] * 2
    assert Gates(gates.head, "layer").mode == Threshold(0.5)


def test_always_on_opens_gates_that_are_never_open():
    gates = independent([[9.0, -9.0]] * 3).eval()
    gates.mode = AlwaysOn()
    assert torch.equal(gates(torch.zeros(2, 1, 1, 1)), torch.ones(2, 3))


@pytest.mark.parametrize("mode", [Threshold(0.9), AlwaysOn(), Stochastic()])
def test_train_mode_draws_whatever_the_mode_of_eval_is(mode):
    gates = independent([[0.0, 0.0]]).train()
    gates.mode = mode
    assert 0.4 < gates(torch.zeros(2000, 1, 1, 1)).mean() < 0.6


def test_stochastic_gates_are_those_of_training():
    gates = dependent().eval()
    gates.mode = Stochastic()
    torch.manual_seed(4)
    found = gates(images())
    torch.manual_seed(4)
    soft = oracle.soft_gate(gates.margins(images()), torch.rand(6, 3, dtype=torch.float64))
    assert torch.equal(found, (soft > 0.5).double())
    assert not torch.equal(found, torch.stack([gates(images()) for _ in range(5)]).mean(dim=0))


def test_eval_mode_draws_nothing():
    state = torch.random.get_rng_state()
    for mode in (Threshold(), AlwaysOn()):
        gates = dependent().eval()
        gates.mode = mode
        torch.random.set_rng_state(state)
        gates(images())
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("tau", [-0.01, 1.01, math.nan, math.inf, "0.5", None, True])
def test_what_is_no_probability_is_no_threshold(tau):
    with pytest.raises(InvalidOption, match=r"gated: tau=.*, expected a probability in \[0, 1\]"):
        Threshold(tau)


@pytest.mark.parametrize("tau", [0, 0.0, 0.5, 1, 1.0])
def test_both_ends_are_thresholds(tau):
    assert Threshold(tau).tau == tau


# --- some of the gates ---


@pytest.mark.parametrize("keep", [[0], [2, 0], [0, 1, 2], [1, 2]])
@pytest.mark.parametrize("training", [False, True])
def test_selected_gates_are_those_gates(keep, training):
    for gates in (dependent(), independent(torch.randn(3, 2, dtype=torch.float64))):
        gates.train(training)
        expected = gates.probabilities(images())[:, keep]
        gates.mode, gates.skipping = Threshold(0.7), False
        chosen = gates.selected(keep)
        torch.testing.assert_close(chosen.probabilities(images()), expected, **TIGHT)
        assert (chosen.count, chosen.granularity, chosen.dependent) == (len(keep), "channel", gates.dependent)
        assert (chosen.mode, chosen.skipping, chosen.training) == (Threshold(0.7), False, training)
        assert chosen.head.training == training


def test_gates_for_a_narrowed_input_read_the_channels_that_are_left():
    """The mean of a channel that is zero everywhere adds nothing to the first layer."""
    gates = dependent().eval()
    gates.mode, gates.skipping = AlwaysOn(), False
    keep = torch.tensor([3, 0, 4])
    narrow = gates.reading(keep)
    emptied = images()
    emptied[:, [1, 2]] = 0
    torch.testing.assert_close(narrow.probabilities(images()[:, keep]), gates.probabilities(emptied), **TIGHT)
    assert narrow.head.reduce.in_features == 3
    assert (narrow.mode, narrow.skipping, narrow.training) == (AlwaysOn(), False, False)
    assert gates.head.reduce.in_features == 5


def test_independent_gates_read_no_channel():
    gates = independent(torch.randn(3, 2, dtype=torch.float64))
    narrow = gates.reading(torch.tensor([1]))
    assert torch.equal(narrow.probabilities(images()[:, [1]]), gates.probabilities(images()))


@pytest.mark.parametrize("frozen", [False, True])
def test_some_of_the_gates_keep_dtype_and_freezing(frozen):
    for gates in (dependent(), independent(torch.randn(3, 2, dtype=torch.float64))):
        gates.requires_grad_(not frozen)
        for twin in (gates.selected([0, 2]), gates.reading(torch.tensor([0, 1]))):
            assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
            assert {parameter.requires_grad for parameter in twin.parameters()} == {not frozen}


def test_selected_gates_share_no_weight_with_all():
    for gates in (dependent(), independent(torch.randn(3, 2, dtype=torch.float64))):
        before = {name: value.clone() for name, value in gates.state_dict().items()}
        with torch.no_grad():
            for value in gates.selected([0, 1, 2]).parameters():
                value.add_(1)
        assert all(torch.equal(value, before[name]) for name, value in gates.state_dict().items())


# --- numbers of few bits, copies, compilers ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_gates_of_half_precision_decide_in_float32(dtype, training):
    reference = dependent().train(training)
    gates = copy.deepcopy(reference).to(dtype)
    x = images(dtype=dtype)
    found = gates(x)
    assert found.dtype == dtype
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert gates.probabilities(x).dtype == torch.float32
    # Means, 5 products and 16 products that are each rounded to 8 bits.
    torch.testing.assert_close(gates.probabilities(x).double(), reference.probabilities(images()), rtol=0, atol=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_leaves_decisions_and_gradients_whole(training):
    reference = dependent().train(training)
    gates = copy.deepcopy(reference).float()
    x = images(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        probabilities, found = gates.probabilities(x), gates(x)
    assert found.dtype == torch.bfloat16
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.double(), reference.probabilities(images()), rtol=0, atol=0.05)
    probabilities.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in gates.parameters())
    assert {parameter.grad.dtype for parameter in gates.parameters()} == {torch.float32}


def test_a_copy_computes_the_same_and_shares_nothing():
    for gates in (dependent(), independent(torch.randn(3, 2, dtype=torch.float64))):
        gates.mode = Threshold(0.7)
        gates.train()(images()).sum().backward()
        twin = copy.deepcopy(gates.eval())
        assert torch.equal(twin.probabilities(images()), gates.probabilities(images()))
        assert twin.mode == Threshold(0.7)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert not torch.equal(twin.probabilities(images()), gates.probabilities(images()))


def test_a_copied_network_trains_apart_from_its_original():
    model = surgery.convert(tiny_networks()["wide resnet"](), "gated", input_size=32).train()
    x, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    surgery.Objective(model, nn.CrossEntropyLoss())(model(x), labels).backward()
    twin = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgery.Objective(twin, nn.CrossEntropyLoss())(twin(x), labels).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"granularity": "channel", "dependent": False}], ids=str
)
def test_a_compiled_network_draws_and_learns_as_an_eager_one(options):
    torch._dynamo.reset()
    model = surgery.convert(tiny_networks()["wide resnet"]().double(), "gated", input_size=32, **options).train()
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    found = []
    for function in (copy.deepcopy(model), torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)):
        objective = surgery.Objective(function, nn.CrossEntropyLoss())
        torch.manual_seed(5)
        loss = objective(function(x), labels)
        loss.backward()
        gradients = {name.removeprefix("_orig_mod."): value.grad for name, value in function.named_parameters()}
        found.append((loss.detach(), objective.terms["activation"], gradients))
    torch.testing.assert_close(*found, **TIGHT)


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"granularity": "channel", "dependent": False}], ids=str
)
@pytest.mark.parametrize("name", ["timm mobilenetv2", "timm resnext"])
def test_checkpointed_blocks_draw_their_gates_again(name, options):
    model = surgery.convert(tiny_networks()[name]().double(), "gated", input_size=32, **options).train()
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        loss = surgery.Objective(model, nn.CrossEntropyLoss())(model(x), labels)
        loss.backward()
        found.append((loss.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}))
    torch.testing.assert_close(*found, **TIGHT)


# --- what multiplies ---


def test_a_layer_gate_multiplies_every_image_by_its_decision():
    body = images()
    decisions = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.float64)[:, None]
    found = LayerGate()(body, decisions)
    for image, out, decision in zip(body, found, decisions.flatten().tolist(), strict=True):
        assert torch.equal(out, image if decision else torch.zeros_like(image))


def test_a_channel_gate_multiplies_channels_by_the_gates_of_their_group():
    """Channels 0 and 1 are always open; 2 belongs to gate 1, 3 and 4 to gate 0."""
    gate = ChannelGate(torch.tensor([-1, -1, 1, 0, 0]), 2, "inner")
    decisions = torch.tensor([[1, 0], [0, 1], [0, 0]], dtype=torch.float64)
    expected = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.float64)
    assert torch.equal(gate.mask(decisions), expected)
    assert torch.equal(gate(images(3), decisions), oracle.masked(images(3), expected.tolist()))


def test_the_gradient_of_a_decision_is_what_its_channels_carry():
    gate = ChannelGate(torch.tensor([-1, -1, 1, 0, 0]), 2, "inner")
    decisions = torch.tensor([[1, 0], [0, 1]], dtype=torch.float64, requires_grad=True)
    pull, x = torch.randn(2, 5, 4, 3, dtype=torch.float64), images(2)
    (gate(x, decisions) * pull).sum().backward()
    carried = (x * pull).sum(dim=(2, 3))
    torch.testing.assert_close(
        decisions.grad, torch.stack([carried[:, 3] + carried[:, 4], carried[:, 2]], dim=1), **TIGHT
    )


def test_a_channel_gate_can_be_cut_and_thinned():
    gate = ChannelGate(torch.tensor([-1, -1, 1, 0, 0, 2]), 3, "inner")
    cut = gate.sliced(torch.tensor([1, 2, 5]))
    assert (cut.column.tolist(), cut.count, cut.role) == ([-1, 1, 2], 3, "inner")
    thin = gate.selected([2, 0])
    assert (thin.column.tolist(), thin.count, thin.role) == ([-1, -1, -1, 1, 1, 0], 2, "inner")
    decisions = torch.tensor([[1.0, 1.0, 0.0]])
    assert torch.equal(thin.mask(decisions[:, [2, 0]]), gate.mask(decisions))
    assert list(gate.state_dict()) == []
