"""The members at the same time, each in its own thread on its own device."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch

import surgery
from surgery.errors import InvalidOption, SurgeryError, UnsupportedModel
from surgery.testing import tiny_networks
from surgery_divided.concurrent import concurrent
from surgery_divided.ensemble import members

MANNERS = ["mean_logits", "max_logits", "mean_probabilities", "max_probabilities"]


def divided(networks=2, ensemble="mean_logits"):
    source = tiny_networks()["wide resnet"]()
    return surgery.convert(source, "divided", networks=networks, ensemble=ensemble).double().eval()


def images(channels=3, size=3):
    return torch.rand(size, channels, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("channels", [3, 6])
def test_concurrent_equals_the_network(manner, channels):
    model, image = divided(ensemble=manner), images(channels)
    with concurrent(model, ["cpu", "cpu"]) as together, torch.no_grad():
        assert torch.equal(together(image), model(image))


def test_every_member_keeps_its_view_when_others_are_cut_away():
    """Members 0 and 2 of three see channels 0-3 and 6-9; swapping those changes the result."""
    model, image = divided(3), images(9)
    rewriter = surgery.Rewriter(copy.deepcopy(model), "divided")
    rewriter.keep_members([0, 2])
    kept = rewriter.finish().eval()
    zero, _, two = (member(view) for member, view in zip(members(model), image.chunk(3, dim=1), strict=True))
    with concurrent(kept, ["cpu"] * 2) as together:
        torch.testing.assert_close(together(image), (zero + two) / 2, rtol=1e-12, atol=0)


def test_members_run_at_the_same_time():
    """Each member waits until the other has begun: one after another would break the barrier."""
    model, barrier = divided(), threading.Barrier(2, timeout=5)
    for member in members(model):
        member.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])
    with concurrent(model, ["cpu", "cpu"]) as together:
        together(images())
    assert not barrier.broken


def test_every_member_has_a_thread_of_its_own_and_keeps_it():
    model, seen = divided(), []
    for i, member in enumerate(members(model)):
        member.register_forward_hook(lambda *_, i=i: seen.append((i, threading.get_ident())))
    with concurrent(model, ["cpu", "cpu"]) as together:
        for _ in range(3):
            together(images())
    assert len(seen) == 6
    assert len(set(seen)) == len({thread for _, thread in seen}) == 2
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_members_share_the_threads_of_the_caller_and_nobody_else_loses_any():
    """Five threads among two members are two each; this thread and later ones still have five."""
    model, seen = divided(), []
    for member in members(model):
        member.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        with concurrent(model, ["cpu", "cpu"]) as together:
            together(images())
            assert seen == [2, 2]
            assert torch.get_num_threads() == 5
            later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert seen[-1] == 5
    finally:
        torch.set_num_threads(before)


def test_grad_and_inference_mode_reach_the_threads():
    model, modes = divided(), []
    for member in members(model):
        member.register_forward_hook(
            lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        )
    with concurrent(model, ["cpu", "cpu"]) as together:
        together(images())
        with torch.no_grad():
            together(images())
        with torch.inference_mode():
            assert together(images()).is_inference()
    assert modes == [(True, False)] * 2 + [(False, False)] * 2 + [(False, True)] * 2


def test_autocast_reaches_the_threads():
    model, image = divided().float(), images().float()
    with concurrent(model, ["cpu", "cpu"]) as together, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = together(image), model(image)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_gradients_reach_the_image_and_no_weight():
    model, image = divided(), images().requires_grad_()
    with concurrent(model, ["cpu", "cpu"]) as together:
        (found,) = torch.autograd.grad(together(image).square().sum(), image)
        assert not together(images()).requires_grad
    (expected,) = torch.autograd.grad(model(image).square().sum(), image)
    assert torch.equal(found, expected)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_network_stays_as_it_is_and_later_changes_do_not_show():
    model, image = divided().train(), images()
    before = copy.deepcopy(model.state_dict())
    with concurrent(model, ["cpu", "cpu"]) as together, torch.no_grad():
        first = together(image)
        assert torch.equal(first, copy.deepcopy(model).eval()(image))
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(together(image), first)


def test_error_of_a_member_reaches_the_caller_and_others_finish_first():
    model, finished = divided(), []

    def fail(*_):
        raise RuntimeError("member 0 is broken")

    members(model)[0].register_forward_pre_hook(fail)
    members(model)[1].register_forward_hook(lambda *_: finished.append(1))
    with concurrent(model, ["cpu", "cpu"]) as together:
        for calls in (1, 2):
            with pytest.raises(RuntimeError, match="member 0 is broken"):
                together(images())
            assert len(finished) == calls


def test_image_of_wrong_channels_is_refused():
    with concurrent(divided(), ["cpu", "cpu"]) as together, pytest.raises(InvalidOption, match="found an image of 4"):
        together(images(4))


@pytest.mark.parametrize("devices", [[], ["cpu"], ["cpu"] * 3, "cpu"])
def test_number_of_devices_must_be_that_of_the_members(devices):
    with pytest.raises(InvalidOption, match="expected 2, one for each small network"):
        concurrent(divided(), devices)


def test_undivided_network_is_refused():
    with pytest.raises(UnsupportedModel, match="expected a network converted by 'divided'"):
        concurrent(tiny_networks()["wide resnet"](), ["cpu"])


def test_closed_one_ends_its_threads_and_says_so():
    before = threading.active_count()
    together = concurrent(divided(), ["cpu", "cpu"])
    together(images())
    assert threading.active_count() == before + 2
    together.close()
    together.close()
    assert threading.active_count() == before
    with pytest.raises(SurgeryError, match="found it closed"):
        together(images())


def test_forgotten_one_ends_its_threads():
    before = set(threading.enumerate())
    together = concurrent(divided(), ["cpu", "cpu"])
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del together
    gc.collect()
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)


def test_copies_and_pickling_are_refused():
    with concurrent(divided(), ["cpu", "cpu"]) as together:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(SurgeryError, match="neither copied nor pickled"):
                attempt(together)


def test_no_warning_and_a_readable_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with concurrent(divided(), ["cpu", torch.device("cpu")]) as together:
            together(images())
    assert repr(together) == "Concurrent(cpu, cpu)"
