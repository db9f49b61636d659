"""Anytime prediction: one step after the other, until all are sure, within a budget; the model is left as it was."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
import surgery_inclusive
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.taps import taps_of
from surgery.testing import tiny_networks, unsettle
from surgery_inclusive import anytime, predict_within, subnetwork_macs
from surgery_inclusive.heads import Heads
from surgery_inclusive.selection import subnetworks_of
from surgery_inclusive.triangular import NestedTriangularConv2d

K = 4
IMAGES = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RESNEXT = tiny_networks()["resnext"]
FORMS = {"dense": {}, "shared": {"norm": "shared"}, "sparse": {"sparse": True}}


def inclusive(form="dense", name="resnext"):
    """Return a copy of one network for each form, in eval mode."""
    return copy.deepcopy(_inclusive(form, name))


@cache
def _inclusive(form, name):
    source = tiny_networks()[name]().double()
    model = surgery.convert(source, "inclusive", input_size=32, subnetworks=K, **FORMS[form])
    model = unsettle(model, seed=1).eval()
    with torch.no_grad():  # classes that images are sure of, some earlier than others
        for linear in [*model.get_submodule("fc").thin, model.get_submodule("fc")] if name == "resnext" else []:
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(3)))
    subnetwork_macs(model)  # counted once for all copies
    return model


def alone(model, k, images=IMAGES):
    with torch.no_grad(), surgery_inclusive.use(model, k):
        return copy.deepcopy(model).eval()(images)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def state_of(model):
    """Return everything a step could change: modes, taps, gradients, caches, statistics, what is chosen."""
    subnetworks = subnetworks_of(model)
    readers = [
        module
        for module in surgery.objective.unwrap(model).modules()
        if isinstance(module, (Heads, NestedTriangularConv2d))
    ]
    return (
        torch.is_grad_enabled(),
        [module.training for module in model.modules()],
        (subnetworks.chosen, subnetworks.span, subnetworks.idle),
        [(id(module.cache), module.cache._stop, len(module.cache._parts), module.remembering) for module in readers],
        [module.recording for module in model.modules() if isinstance(module, surgery.Tap)],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same_state(model, before):
    after = state_of(model)
    assert after[:-1] == before[:-1]
    assert all(torch.equal(value, before[-1][name]) for name, value in after[-1].items())


# --- steps ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["resnext", "timm mobilenetv2"])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_step_k_gives_the_logits_of_subnetwork_k(form, name, batch):
    model = inclusive(form, name)
    steps = list(anytime(model, IMAGES[:batch]))
    assert len(steps) == K
    assert not any(step.requires_grad for step in steps)
    for k, step in enumerate(steps, start=1):
        close(step, alone(model, k, IMAGES[:batch]))


@pytest.mark.parametrize("size", [(24, 40), (17, 33)])
@pytest.mark.parametrize("form", FORMS)
def test_images_may_have_another_size_than_at_the_conversion(form, size):
    model, images = inclusive(form), torch.randn(2, 3, *size, dtype=torch.float64)
    for k, step in enumerate(anytime(model, images), start=1):
        close(step, alone(model, k, images))
    assert subnetwork_macs(model, size) != subnetwork_macs(model)
    assert predict_within(model, images, macs=subnetwork_macs(model, size)[2]).subnetwork == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_as_before_between_the_steps_and_after_them(form, training):
    model = inclusive(form).train(training)
    model.get_submodule("layer1").eval()  # modes may be mixed
    before = state_of(model)
    for _ in anytime(model, IMAGES):
        assert_same_state(model, before)
    assert_same_state(model, before)
    for _ in anytime(model, IMAGES, confidence=0.5):
        break
    assert_same_state(model, before)
    predict_within(model, IMAGES, macs=1e12), predict_within(model, IMAGES, milliseconds=1e6)
    assert_same_state(model, before)


@pytest.mark.parametrize("failing", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_as_before_after_a_step_that_fails(form, failing):
    model = inclusive(form).train()
    before, calls = state_of(model), itertools.count(1)

    def fail(module, args):
        if next(calls) == failing:
            raise KeyError("on purpose")

    handle = model.block("layer2.0").register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        list(anytime(model, IMAGES))
    handle.remove()
    assert_same_state(model, before)
    assert len(list(anytime(model, IMAGES))) == K


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("predict", ["anytime", "predict_within", "subnetwork_macs"])
def test_the_taps_of_a_training_forward_wait_for_their_loss(form, predict):
    """A prediction between forward and loss empties them: TapNotFilled. `surgery.taps.undisturbed` is for that."""
    model = inclusive(form).train()
    output = model(IMAGES)
    before = dict(taps_of(model))
    calls = {
        "anytime": lambda: list(anytime(model, IMAGES[:2])),
        "predict_within": lambda: predict_within(model, IMAGES[:2], macs=1e12),
        "subnetwork_macs": lambda: subnetwork_macs(model),
    }
    calls[predict]()
    assert all(taps_of(model)[name] is value for name, value in before.items())
    surgery.Objective(model, nn.CrossEntropyLoss())(output, torch.arange(6)).backward()


@pytest.mark.parametrize("form", FORMS)
def test_interleaved_predictions_do_not_meet(form):
    model = inclusive(form)
    others = IMAGES.flip(0)[:4] * 2
    expected = list(anytime(model, IMAGES)), list(anytime(model, others))
    pairs = list(zip(anytime(model, IMAGES), anytime(model, others), strict=True))
    for k, pair in enumerate(pairs):
        assert torch.equal(pair[0], expected[0][k])
        assert torch.equal(pair[1], expected[1][k])


@pytest.mark.parametrize("form", FORMS)
def test_other_forwards_and_training_steps_may_come_between(form):
    model = inclusive(form)
    expected = list(anytime(model, IMAGES))
    for found, step in zip(anytime(model, IMAGES), expected, strict=True):
        assert torch.equal(found, step)
        model(IMAGES[:2])
        with surgery_inclusive.use(model, 2):
            model(IMAGES[:3]).sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_inside_of_use_and_of_record_is_its_own(form):
    model = inclusive(form)
    expected = list(anytime(model, IMAGES))
    with surgery_inclusive.use(model, 2):
        assert all(map(torch.equal, anytime(model, IMAGES), expected))
        assert subnetworks_of(model).chosen == 2


def test_a_copy_made_between_two_steps_is_independent():
    model = inclusive("sparse")
    steps = anytime(model, IMAGES)
    next(steps)
    twin = copy.deepcopy(model)
    close(list(anytime(twin, IMAGES))[3], alone(model, 4))
    close(next(steps), alone(model, 2))


def test_steps_may_leave_inference_mode():
    """A buffer that is made in inference mode cannot be written outside of it."""
    model = inclusive("sparse")
    steps = anytime(model, IMAGES)
    with torch.inference_mode():
        next(steps)
    close(next(steps), alone(model, 2))


class Wrapper(nn.Module):
    """What FSDP and others look like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_wrapped_networks_predict_as_bare_ones(form, wrap):
    model = inclusive(form)
    wrapped = wrap(model)
    assert all(map(torch.equal, anytime(wrapped, IMAGES), list(anytime(model, IMAGES))))
    assert subnetwork_macs(wrapped) == subnetwork_macs(model)
    budget = subnetwork_macs(model)[1]
    assert torch.equal(
        predict_within(wrapped, IMAGES, macs=budget).logits, predict_within(model, IMAGES, macs=budget).logits
    )


# --- confidence ---


def confidences(model):
    return [step.softmax(1).amax(1) for step in anytime(model, IMAGES)]


@pytest.mark.parametrize("form", FORMS)
def test_images_that_are_settled_keep_their_logits(form):
    model = inclusive(form)
    plain = list(anytime(model, IMAGES))
    sure = confidences(model)
    threshold = float(sure[0].median())  # the lower one of two: half of the images are settled at once
    settled = torch.zeros(6, dtype=torch.bool)
    expected = plain[0].clone()
    steps = []
    for k, found in enumerate(anytime(model, IMAGES, confidence=threshold)):
        expected = torch.where(settled[:, None], expected, plain[k])
        close(found, expected)
        if steps:
            assert torch.equal(found[settled], steps[-1][settled])
        settled |= expected.softmax(1).amax(1) >= threshold
        steps.append(found)
        assert settled.sum() > 0
    assert len(steps) > 1


@pytest.mark.parametrize("form", FORMS)
def test_the_steps_end_when_all_images_are_settled(form):
    model = inclusive(form)
    sure = confidences(model)
    assert len(list(anytime(model, IMAGES, confidence=float(sure[0].min())))) == 1
    assert len(list(anytime(model, IMAGES[:0], confidence=0.5))) == 1
    with torch.no_grad():
        for linear in [*model.fc.thin, model.fc]:
            linear.weight.zero_(), linear.bias.zero_()
    assert len(list(anytime(model, IMAGES, confidence=1.0))) == K
    assert len(list(anytime(model, IMAGES, confidence=0.1))) == 1  # ten classes alike are as sure as that


@pytest.mark.parametrize("form", FORMS)
def test_only_unsettled_images_are_computed(form):
    model = inclusive(form)
    threshold, seen = float(confidences(model)[0].median()), []
    handle = model.block("layer2.0").register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    list(anytime(model, IMAGES, confidence=threshold))
    handle.remove()
    first = int((confidences(model)[0] < threshold).sum())
    assert seen[:2] == [6, first]
    assert seen == sorted(seen, reverse=True)
    assert 0 < first < 6


@pytest.mark.parametrize("form", FORMS)
def test_an_image_without_a_probability_is_not_settled(form):
    """NaN reaches no threshold."""
    assert len(list(anytime(inclusive(form), IMAGES * float("nan"), confidence=0.5))) == K


@pytest.mark.parametrize("confidence", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_confidences_that_are_no_probability_are_refused_at_the_call(confidence):
    with pytest.raises(InvalidOption, match=r"anytime: found confidence=.*, expected a probability in \(0, 1\]"):
        anytime(inclusive(), IMAGES, confidence=confidence)


@pytest.mark.parametrize(
    "call", [lambda m: anytime(m, IMAGES), subnetwork_macs, lambda m: predict_within(m, IMAGES, macs=1)]
)
def test_networks_without_subnetworks_are_refused_at_the_call(call):
    with pytest.raises(UnsupportedModel, match="expected a converted network, found CifarResNet"):
        call(RESNEXT())
    for other in (surgery.convert(RESNEXT(), "gated", input_size=32), surgery.prune(inclusive(), subnetwork=1)):
        with pytest.raises(InvalidOption, match="has no sub-networks; expected a network that was converted by"):
            call(other)


# --- budgets ---


@pytest.mark.parametrize("form", FORMS)
def test_multiply_adds_are_those_of_the_pruned_networks(form):
    model = inclusive(form)
    subnetworks_of(model).macs.clear()
    expected = tuple(surgery.cost(surgery.prune(model, subnetwork=k)).macs for k in range(1, K + 1))
    assert subnetwork_macs(model) == subnetwork_macs(model, 32) == subnetwork_macs(model, (32, 32)) == expected
    assert list(expected) == sorted(set(expected))
    assert subnetwork_macs(model, (16, 48)) == tuple(
        surgery.cost(surgery.prune(model, subnetwork=k), (16, 48)).macs for k in range(1, K + 1)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_budget_of_multiply_adds_gives_the_largest_subnetwork_that_fits(form):
    model = inclusive(form)
    costs = subnetwork_macs(model)
    for k, cost in enumerate(costs, start=1):
        for budget, expected in ((cost, k), (cost + 0.5, k), (cost - 1, k - 1)):
            if not expected:
                continue
            found = predict_within(model, IMAGES, macs=budget)
            assert (found.subnetwork, found.macs) == (expected, costs[expected - 1])
            close(found.logits, alone(model, expected))
            assert not found.logits.requires_grad
    with pytest.raises(InvalidOption, match=rf"the thinnest sub-network needs {costs[0]:,}; expected at least that"):
        predict_within(model, IMAGES, macs=costs[0] - 1)


class Clock:
    """Seconds that pass with the multiply-adds that are computed, and nothing else."""

    def __init__(self, model, per_mac=1e-9):
        self.now, self.computed, costs = 0.0, [], subnetwork_macs(model)
        subnetworks = subnetworks_of(model)

        def count(module, args, output):
            start, stop = output
            macs = costs[stop - 1] - (costs[start - 1] if start else 0)
            self.computed.append(output)
            self.now += per_mac * macs

        subnetworks.register_forward_hook(count)

    def __call__(self):
        return self.now


@pytest.mark.parametrize("form", FORMS)
def test_time_runs_the_thinnest_and_then_what_the_multiply_adds_say_there_is_time_for(form):
    """A clock of a nanosecond a multiply-add; a budget of t milliseconds is t million of them.

    Sparse: a step is taken while its total c_k fits. Dense: c_1 is spent, so sub-network j fits if c_1 + c_j does.
    """
    costs = subnetwork_macs(inclusive(form))
    for budget in (0.0, costs[0] - 1, costs[1] - 10, costs[1] + 10, costs[2] + 10, costs[0] + costs[2] + 10, 2e9):
        model = inclusive(form)
        clock = Clock(model)
        found = predict_within(model, IMAGES, milliseconds=budget * 1e-6, clock=clock)
        spent = 0 if form == "sparse" else costs[0]
        fits = [k for k in range(2, K + 1) if spent + costs[k - 1] <= budget]
        k = max(fits, default=1)
        assert found.subnetwork == k
        assert found.milliseconds == pytest.approx(clock.now * 1e3)
        if form == "sparse":
            assert clock.computed == [(j - 1, j) for j in range(1, k + 1)]
        else:
            assert clock.computed == [(0, j) for j in ([1] if k == 1 else [1, k])]
        close(found.logits, alone(model, k))


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_more_time_never_gives_a_thinner_subnetwork(form):
    """Also with a clock on which later steps take three times as long as their multiply-adds say."""
    found = []
    for budget in range(0, 40, 4):
        model = inclusive(form)
        clock = Clock(model)
        slow = lambda clock=clock: clock.now * (1 if len(clock.computed) < 2 else 3)  # noqa: E731
        found.append(predict_within(model, IMAGES, milliseconds=budget, clock=slow).subnetwork)
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, K)


def test_a_step_that_took_longer_makes_the_next_one_look_longer():
    """Costs c; after two steps that took three times c_2, the third should end at 3 c_3: it is taken at that budget."""
    costs = subnetwork_macs(inclusive("sparse"))
    for budget, expected in ((3 * costs[2] - 1000, 2), (3 * costs[2] + 1000, 3)):
        model = inclusive("sparse")
        clock = Clock(model, per_mac=3e-9)
        assert predict_within(model, IMAGES, milliseconds=budget * 1e-6, clock=clock).subnetwork == expected


@pytest.mark.parametrize("budget", [{}, {"macs": 1e9, "milliseconds": 1}])
def test_exactly_one_budget_is_needed(budget):
    with pytest.raises(InvalidOption, match="expected exactly one of them"):
        predict_within(inclusive(), IMAGES, **budget)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_take_autocast_and_half_precision(form):
    model, images = inclusive(form).float(), IMAGES.float()
    with torch.autocast("cpu", torch.bfloat16):
        steps = list(anytime(model, images, confidence=0.999))
    assert steps[0].dtype == torch.bfloat16
    assert F.cosine_similarity(steps[0].float(), alone(model, 1, images)).min() > 0.99
    half = model.to(torch.bfloat16)
    assert [step.dtype for step in anytime(half, images.bfloat16())] == [torch.bfloat16] * K


class Overwriting(nn.Module):
    """A block that rectifies its input in place once its first convolution has read it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        body = self.conv3(torch.relu(self.conv2(self.conv1(x))))
        return F.relu_(x) + body


def test_a_later_step_reads_what_was_there_before_the_block_overwrote_it():
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    source = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Overwriting(), *head).double().eval()
    model = surgery.convert(source, "inclusive", input_size=8, subnetworks=4, sparse=True)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for k, logits in enumerate(anytime(model, images), start=1):
        with surgery_inclusive.use(model, k), torch.no_grad():
            torch.testing.assert_close(logits, model(images), rtol=1e-10, atol=1e-12)
