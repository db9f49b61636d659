"""All ways to ask a network with gates: votes by hand, runs that can be repeated, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from surgery.errors import InvalidOption
from surgery.models import CifarResNet, resnet
from surgery.testing import unsettle
from surgery_gated import AlwaysOn, Stochastic, Threshold, gated_blocks
from surgery_gated.inference import evaluate, inference, predict, recalibrate, set_inference, vote
from surgery_gated.method import Gated

CLASSES = 6


def build(granularity="layer", dependent=True):
    """Return a small network with gates between 0.1 and 0.9, in train mode."""
    torch.manual_seed(0)
    source = unsettle(CifarResNet(resnet(11, base=4), num_classes=CLASSES)).double()
    model = surgery.convert(source, Gated(granularity=granularity, dependent=dependent), input_size=16)
    with torch.no_grad():
        for _, gates in gated_blocks(model):
            if dependent:
                gates.head.bias.zero_()
                gates.head.weight.normal_(std=0.6)
            else:
                gates.head.logits.normal_()
    return model.train()


@pytest.fixture(scope="module", params=[("layer", True), ("channel", True), ("channel", False)], ids=str)
def model(request):
    """A network that every test leaves as it was."""
    return build(*request.param)


@pytest.fixture(scope="module")
def images():
    return torch.randn(9, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request):
    """After every test with a model, its modes, gates, weights and taps are those from before, also after errors."""
    if "model" not in request.fixturenames:
        yield
        return
    network = request.getfixturevalue("model")
    before = state(network)
    weights = copy.deepcopy(network.state_dict())
    yield
    assert state(network) == before
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def state(network):
    gates = [(module.mode, module.skipping, len(module._forward_pre_hooks)) for _, module in gated_blocks(network)]
    taps = [dict(tap._slot) for tap in network.modules() if isinstance(tap, surgery.Tap)]
    return gates, [module.training for module in network.modules()], taps


def literal(network, images, mode):
    """Return the logits of one eval forward on a copy of the network, without skipping."""
    twin = copy.deepcopy(network).eval()
    for _, gates in gated_blocks(twin):
        gates.mode, gates.skipping = mode, False
    with torch.no_grad():
        return twin(images)


# --- votes ---


def logits_of(*runs):
    """Return logits (R, 1, K) whose softmax is the given probabilities."""
    return torch.tensor(runs, dtype=torch.float64).log()[:, None]


def test_the_vote_is_the_majority_of_the_runs_and_not_the_mean():
    """Three runs say class 1 with 0.4, two say class 0 with 0.9: 3 votes to 2, though the means are 0.54 and 0.26."""
    runs = logits_of(*[[0.35, 0.4, 0.25]] * 3, *[[0.9, 0.05, 0.05]] * 2)
    assert vote(runs).tolist() == [[1]]
    assert (3 * 0.35 + 2 * 0.9) / 5 > (3 * 0.4 + 2 * 0.05) / 5


def test_ties_of_the_vote_are_broken_by_the_mean_probability_then_by_the_index():
    """Two runs each for 2 and 0, one for 1; class 0 has the mean (2 * 0.5 + 2 * 0.2 + 0.3) / 5 = 0.34, class 2 has
    (2 * 0.2 + 2 * 0.6 + 0.2) / 5 = 0.36. With 0.6 -> 0.5 in class 2 and all else symmetric both have the same mean."""
    runs = logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6], [0.3, 0.5, 0.2])
    assert vote(runs).tolist() == [[2]]
    assert vote(runs, 3).tolist() == [[2, 0, 1]]
    assert vote(logits_of([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])).tolist() == [[0]]
    assert vote(logits_of([0.25, 0.25, 0.5], [0.25, 0.5, 0.25])).tolist() == [[1]]


def test_the_best_five_are_the_most_frequent_of_the_runs_best_five():
    """Votes of the lists 01234, 01235, 01236, 12345, 12347 for 0..7: 3, 5, 5, 5, 3, 2, 1, 1.

    The means of 0 and 4 decide about their order; 1, 2 and 3 have five votes each, before them, by their own means.
    """
    lists = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 6], [1, 2, 3, 4, 5], [1, 2, 3, 4, 7]]
    runs = torch.zeros(5, 1, 8, dtype=torch.float64)
    for run, best in enumerate(lists):
        for place, k in enumerate(best):
            runs[run, 0, k] = 5 - place
    assert vote(runs, 5).tolist() == [[1, 2, 3, 0, 4]]
    assert vote(runs, 6).tolist()[0][5] == 5
    votes = [sum(k in best for best in lists) for k in range(8)]
    assert votes == [3, 5, 5, 5, 3, 2, 1, 1]


def test_many_votes_beat_a_larger_mean():
    """Two of three runs rank 1 second and 2 third; the third run is sure of 0 alone, then 2: top 2 is (0, 1)."""
    runs = logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.45, 0.05, 0.5])
    assert vote(runs, 2).tolist() == [[0, 1]]
    assert runs.exp().mean(dim=0)[0].argsort(descending=True).tolist() == [0, 2, 1]


# --- predictions ---


@pytest.mark.parametrize(("how", "mode"), [("threshold", Threshold(0.4)), ("always_on", AlwaysOn())])
def test_one_run_is_the_eval_forward_in_that_mode(model, images, how, mode):
    found = predict(model, images, how, tau=0.4, top=2)
    expected = literal(model, images, mode)
    torch.testing.assert_close(found.runs, expected[None], rtol=1e-10, atol=1e-12)
    assert torch.equal(found.classes, expected.topk(2).indices)
    assert torch.equal(found.mean_classes, found.classes)
    torch.testing.assert_close(found.probabilities, expected.softmax(dim=1), rtol=1e-10, atol=1e-12)
    assert found.classes.dtype == torch.int64


def test_the_threshold_matters(model, images):
    assert not torch.allclose(predict(model, images, tau=0.1).runs, predict(model, images, tau=0.7).runs)


def test_stochastic_runs_are_draws_and_the_first_decides(model, images):
    found = predict(model, images, "stochastic", runs=3, top=2, seed=5)
    assert found.runs.shape == (3, 9, CLASSES)
    assert not torch.equal(found.runs[0], found.runs[1])
    assert torch.equal(found.run_classes, found.runs.topk(2, dim=2).indices)
    assert torch.equal(found.classes, found.run_classes[0])
    torch.testing.assert_close(found.probabilities, found.runs.softmax(dim=2).mean(dim=0), rtol=1e-12, atol=0)
    assert torch.equal(found.mean_classes, found.runs.softmax(dim=2).mean(dim=0).topk(2).indices)


def test_the_ensemble_votes_over_the_same_runs(model, images):
    stochastic = predict(model, images, "stochastic", runs=7, seed=5)
    ensemble = predict(model, images, "ensemble", runs=7, seed=5)
    assert torch.equal(ensemble.runs, stochastic.runs)
    assert torch.equal(ensemble.classes, vote(stochastic.runs))
    assert torch.equal(ensemble.mean_classes, ensemble.probabilities.argmax(dim=1)[:, None])


def test_a_seed_repeats_the_runs_and_leaves_the_random_state_alone(model, images):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = predict(model, images, "stochastic", runs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(predict(model, images, "stochastic", runs=2, seed=3).runs, first.runs)
    assert not torch.equal(predict(model, images, "stochastic", runs=2, seed=4).runs, first.runs)
    before = torch.get_rng_state()
    predict(model, images, "threshold")
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_draws_come_from_the_global_state(model, images):
    torch.manual_seed(11)
    first = predict(model, images, "stochastic", runs=1)
    assert not torch.equal(predict(model, images, "stochastic", runs=1).runs, first.runs)
    torch.manual_seed(11)
    assert torch.equal(predict(model, images, "stochastic", runs=1).runs, first.runs)


def test_half_precision_is_averaged_in_single():
    network = build().bfloat16()
    found = predict(network, torch.randn(4, 3, 16, 16).bfloat16(), "ensemble", seed=0)
    assert found.runs.dtype == torch.bfloat16
    assert found.probabilities.dtype == torch.float32
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(4), rtol=1e-6, atol=0)


def test_predictions_leave_what_a_training_step_needs(model, images):
    """The values that a training forward put into the taps are still there for the losses, and modes are mixed."""
    network = copy.deepcopy(model).train()
    network.get_submodule("layer2").eval()
    network(images)
    before = state(network)
    assert [len(slot) for slot in before[2]] == [1, 0, 1]
    predict(network, images, "ensemble", runs=2)
    assert state(network) == before


# --- modes ---


def test_modes_return_after_an_exception(model):
    before = [gates.mode for _, gates in gated_blocks(model)]
    inside = []
    with pytest.raises(ZeroDivisionError), inference(model, Stochastic()):
        inside.append(1 / sum(gates.mode != Stochastic() for _, gates in gated_blocks(model)))
    assert not inside
    assert [gates.mode for _, gates in gated_blocks(model)] == before
    with pytest.raises(RuntimeError):
        predict(model, torch.zeros(1, 5, 16, 16, dtype=torch.float64), "always_on", seed=1)


def test_every_gate_gets_its_own_mode_back():
    network = build()
    modes = [Threshold(0.1 * n) for n, _ in enumerate(gated_blocks(network))]
    for mode, (_, gates) in zip(modes, gated_blocks(network), strict=True):
        gates.mode = mode
    with inference(network, AlwaysOn()), inference(network, Threshold(0.9)):
        assert {gates.mode for _, gates in gated_blocks(network)} == {Threshold(0.9)}
    assert [gates.mode for _, gates in gated_blocks(network)] == modes
    set_inference(network, AlwaysOn())
    assert {gates.mode for _, gates in gated_blocks(network)} == {AlwaysOn()}


# --- accuracy ---


def batched(images, targets, size=4):
    return list(zip(images.split(size), targets.split(size), strict=True))


def test_accuracy_counts_images_and_not_batches(model, images):
    """9 images in batches of 4, 4 and 1; the targets are the answer for 5 of them and wrong for the others."""
    answers = predict(model, images).classes[:, 0]
    targets = torch.where(torch.arange(9) < 5, answers, (answers + 1) % CLASSES)
    found = evaluate(model, batched(images, targets))
    assert (found.images, found.accuracy, found.mean_probability, found.runs) == (9, 5 / 9, 5 / 9, (5 / 9,))
    assert found.deviation == 0
    assert evaluate(model, batched(images, targets), top=CLASSES).accuracy == 1


def test_stochastic_accuracy_is_the_mean_over_the_runs_with_its_deviation(model, images):
    """Against a literal count with the draws of each batch; the deviation has R - 1 in its denominator."""
    targets = predict(model, images).classes[:, 0]
    before = torch.get_rng_state()
    found = evaluate(model, batched(images, targets), "stochastic", runs=4, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    seeds = torch.Generator().manual_seed(2)
    hits = [0, 0, 0, 0]
    for part, truth in batched(images, targets):
        seed = int(torch.randint(2**62, (), generator=seeds))
        for run, logits in enumerate(predict(model, part, "stochastic", runs=4, seed=seed).runs):
            hits[run] += sum(int(row.argmax()) == int(t) for row, t in zip(logits, truth, strict=True))
    shares = [count / 9 for count in hits]
    mean = sum(shares) / 4
    assert found.runs == pytest.approx(shares, rel=1e-12)
    assert found.accuracy == pytest.approx(mean, rel=1e-12)
    assert found.deviation == pytest.approx((sum((s - mean) ** 2 for s in shares) / 3) ** 0.5, rel=1e-10)
    assert evaluate(model, batched(images, targets), "stochastic", runs=4, seed=2) == found


def test_ensemble_accuracy_is_that_of_the_vote_beside_that_of_the_mean(model, images):
    found = predict(model, images, "ensemble", runs=6, seed=int(seed_of(2)))
    vote_only = found.classes[:, 0]
    accuracy = evaluate(model, [(images, vote_only)], "ensemble", runs=6, seed=2)
    assert accuracy.accuracy == 1
    assert accuracy.mean_probability == float((found.mean_classes[:, 0] == vote_only).double().mean())
    assert len(accuracy.runs) == 6


def seed_of(seed):
    return torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))


# --- batch-norm statistics ---


def test_statistics_are_those_of_the_graph_in_the_mode_that_is_asked_for(images):
    """As surgery.recalibrate_bn finds them where nothing may be skipped, and unlike those with all gates open."""
    for mode in (None, Threshold(0.5), AlwaysOn()):
        network, expected = build(), build()
        for _, gates in gated_blocks(network):
            gates.mode = Threshold(0.6)
        for _, gates in gated_blocks(expected):
            gates.mode, gates.skipping = mode or Threshold(0.6), False
        surgery.recalibrate_bn(expected, [images])
        before = state(network)
        assert recalibrate(network, [images, images], batches=1, mode=mode) == 1
        assert state(network) == before
        for (name, found), value in zip(network.state_dict().items(), expected.state_dict().values(), strict=True):
            if not name.endswith("_extra_state"):  # the threshold, which differs
                assert torch.equal(found, value), name


def test_a_body_sees_all_images_also_those_that_it_is_closed_for(images):
    """With every gate closed the first norm of a skipped body still gets the statistics of its own convolution."""
    network = build()
    recalibrate(network, [images], mode=Threshold(1.0))
    block = network.block("layer1.0")
    norm = next(module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 1
    assert float(norm.running_var.min()) > 0
    assert not torch.equal(norm.running_mean, build().block("layer1.0").get_submodule("bn1").running_mean)


def test_nothing_is_skipped_while_statistics_are_estimated(images, monkeypatch):
    def fails(*_):
        raise AssertionError("a block left work out")

    network = build().eval()
    monkeypatch.setattr("surgery_gated.skipping.run_layer", fails)
    with pytest.raises(AssertionError, match="left work out"):
        network(images)
    assert recalibrate(network, [images]) == 1


def test_skipping_is_back_after_an_exception(model):
    with pytest.raises(InvalidOption, match="no batch"):
        recalibrate(model, [], mode=Stochastic())
    with pytest.raises(InvalidOption, match="expected Threshold"):
        recalibrate(model, [], mode="stochastic")


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "vote"}, "how='vote', expected one of threshold, always_on, stochastic, ensemble"),
        ({"how": "ensemble", "runs": 0}, "runs=0, expected a whole number of at least 1"),
        ({"how": "ensemble", "runs": True}, "runs=True"),
        ({"how": "ensemble", "runs": 2.0}, "runs=2.0"),
        ({"top": 0}, "top=0"),
        ({"top": CLASSES + 1}, "top=7, expected at most 6"),
        ({"tau": 1.5}, "tau=1.5"),
        ({"tau": float("nan")}, "tau=nan"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, images, arguments, message):
    for ask in (lambda: predict(model, images, **arguments), lambda: evaluate(model, [(images, images)], **arguments)):
        with pytest.raises(InvalidOption, match=message):
            ask()


def test_a_network_without_gates_is_refused(images):
    plain = CifarResNet(resnet(11, base=4)).double()
    for call in (
        lambda: predict(plain, images),
        lambda: predict(torch.nn.Identity(), images),
        lambda: set_inference(plain, AlwaysOn()),
        lambda: recalibrate(plain, [images]),
        lambda: inference(torch.nn.Sequential(build()), AlwaysOn()).__enter__(),
    ):
        with pytest.raises(InvalidOption, match="found no gate in this"):
            call()
    with pytest.raises(InvalidOption, match="found 'threshold', expected Threshold"):
        set_inference(build(), "threshold")


def test_no_image_is_refused(model):
    with pytest.raises(InvalidOption, match="evaluate: found no image"):
        evaluate(model, [])
