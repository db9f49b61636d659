"""Two processes train like one: losses and weights of every method under DistributedDataParallel and FSDP."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

import surgery
from surgery.errors import UnsupportedModel
from tests.processes import WORLD, fail_in_one, launch
from tests.trainings import ANY, CUTS, EQUAL, METHODS, bent, build, predict, train, train_everything, uneven, wrap

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    return launch(train_everything, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    """What one process makes of the whole batch: the trained network and the terms of every step, by form."""
    found = {}

    def run(name):
        if name not in found:
            model = build(EQUAL[name])
            terms = train(model, EQUAL[name], None)
            found[name] = model, terms
        return found[name]

    return run


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_have_the_losses_and_weights_of_one_with_the_whole_batch(ranks, alone, name, wrapper):
    first, second = (found[wrapper][name] for found in ranks)
    model, terms = alone(name)
    weights = model.state_dict()
    for one, other, expected in zip(first["terms"], second["terms"], terms, strict=True):
        assert one.keys() == other.keys() == expected.keys()
        for term, value in expected.items():
            assert math.isclose((one[term] + other[term]) / WORLD, value, rel_tol=1e-9), term
    assert list(first["weights"]) == list(weights)
    for key, value in weights.items():
        assert torch.equal(first["weights"][key], second["weights"][key]), key
        torch.testing.assert_close(first["weights"][key], value, **CLOSE, msg=key)


@pytest.mark.parametrize("name", EQUAL)
def test_training_moved_the_weights(alone, name):
    """So that equal weights say something."""
    before, after = build(EQUAL[name]).state_dict(), alone(name)[0].state_dict()
    moved = [key for key in before if "weight" in key and not torch.equal(before[key], after[key])]
    assert len(moved) > 0.9 * sum("weight" in key for key in before)


@pytest.mark.parametrize("name", METHODS)
def test_sharded_network_predicts_and_its_full_state_dict_loads_into_a_whole_one_and_back(ranks, alone, name):
    for found in (found["evaluated"][name] for found in ranks):
        torch.testing.assert_close(found["output"], predict(alone(name)[0]), **CLOSE)
    first, second = (found["evaluated"][name] for found in ranks)
    assert second["weights"] == {}
    whole = build(EQUAL[name])
    whole.load_state_dict(first["weights"])
    for state in (whole.state_dict(), first["other"], second["other"]):
        assert state.keys() == first["weights"].keys()
        assert all(torch.equal(value, first["weights"][key]) for key, value in state.items())


@pytest.mark.parametrize("name", ANY)
def test_no_parameter_is_left_without_a_gradient(ranks, name):
    """DistributedDataParallel would stop in the second step; it was not told to look for unused parameters."""
    first, second = (found["any"][name] for found in ranks)
    assert all(math.isfinite(value) for terms in first["terms"] + second["terms"] for value in terms.values())
    assert [terms["task"] for terms in first["terms"]] != [terms["task"] for terms in second["terms"]]
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())


@pytest.mark.parametrize("name", METHODS)
def test_compiled_wrapper_has_the_losses_of_the_plain_one(ranks, name):
    for found in ranks:
        plain, compiled = found["compiled"][name]
        for expected, terms in zip(plain, compiled, strict=True):
            assert terms == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("place", range(len(CUTS)), ids=[f"{cut} and {8 - cut}" for cut in CUTS])
def test_global_mean_and_its_gradient_are_those_of_the_whole_batch(ranks, place):
    """L = sum_g (m_g - 0.3)^3 with m_g = w_g mean_b x_bg, so dL/dw_g = 3 (m_g - 0.3)^2 mean_b x_bg."""
    inputs, weight = uneven()
    mean = inputs.sum(dim=0) / len(inputs)
    for found in ranks:
        loss, gradient = found["means"][place]
        torch.testing.assert_close(loss, bent(mean * weight), rtol=1e-12, atol=0.0)
        torch.testing.assert_close(gradient, 3 * (mean * weight - 0.3).square() * mean, rtol=1e-12, atol=0.0)


def test_gradient_that_no_wrapper_knows_is_the_mean_behind_every_backward_pass(ranks):
    """d/dm m^3 k c = 3 k c at m = 1, for k = 0, 1, 2 and c = 1 and 2 in the processes: 4.5 k, then twice."""
    once = torch.tensor([0.0, 4.5, 9.0], dtype=torch.float64)
    for found in ranks:
        assert torch.equal(found["leaf"][0], once)
        assert torch.equal(found["leaf"][1], 2 * once)


def save(model):
    surgery.save(model, "network.safetensors")


@pytest.mark.parametrize("call", [surgery.cost, surgery.plan, surgery.prune, save])
def test_what_needs_whole_weights_refuses_a_sharded_network_and_says_where_to_get_them(call):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = wrap(build(EQUAL["masked"]), "fsdp")
        with pytest.raises(UnsupportedModel, match=r"the model is sharded .*get_model_state_dict with full_state_dict"):
            call(model)
    finally:
        dist.destroy_process_group()


def test_failure_in_one_process_ends_all_and_shows_its_traceback(tmp_path):
    with pytest.raises(Exception, match=r"(?s)in fail_in_one.*ValueError: told to"):
        launch(fail_in_one, tmp_path)
