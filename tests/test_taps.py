"""Taps: when they record, how long they hold on to a value, and what they leave alone."""

import copy
import gc
import weakref

import pytest
import timm
import torch
from torch import nn

from surgery.errors import TapNotFilled
from surgery.rewriter import Rewriter
from surgery.taps import Tap, consume, record, taps_of
from tests.stand_ins import rebuilt


@pytest.fixture
def network():
    rewriter = Rewriter(rebuilt(timm.create_model("resnext11_4x4d", zero_init_last=False).double()), "toy")
    for path in ("layer1.0", "layer2.0", "layer3.0"):
        block = rewriter.architecture.block(path)
        rewriter.tap(block.body, f"{path}/body", at=block)
    return rewriter.finish()


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, dtype=torch.float64)


def body(network, path, x):
    """Return what leaves the body of a block, by a hook on its last norm."""
    seen = []
    handle = network.get_submodule(path).bn3.register_forward_hook(lambda *arguments: seen.append(arguments[2].clone()))
    output = network(x)
    handle.remove()
    return seen[0], output


def test_a_tap_passes_its_value_on():
    value = torch.rand(3)
    assert Tap("name")(value) is value


def test_training_records_by_itself(network, x):
    expected, _ = body(network.train(), "layer2.0", x)
    assert torch.equal(taps_of(network)["layer2.0/body"], expected)


def test_evaluation_records_only_where_it_is_asked_to(network, x):
    network.eval()(x)
    with pytest.raises(
        TapNotFilled, match=r"layer1.0/body: no forward pass has filled this tap; .*surgery.record\(model\)"
    ):
        _ = taps_of(network)["layer1.0/body"]
    with record(network) as taps:
        expected, _ = body(network, "layer1.0", x)
    assert torch.equal(taps["layer1.0/body"], expected)
    network(x)
    with pytest.raises(TapNotFilled):
        _ = taps_of(network)["layer1.0/body"]


def test_values_are_live_inside_the_context_and_stay_behind_it(network, x):
    with record(network.eval()) as taps:
        network(x)
        first = taps["layer1.0/body"]
        network(2 * x)
        assert not torch.equal(taps["layer1.0/body"], first)
        second = taps["layer1.0/body"]
    network(3 * x)
    assert taps["layer1.0/body"] is second


def test_recording_does_not_change_the_output(network, x):
    network.eval()
    plain = network(x)
    with record(network):
        assert torch.equal(network(x), plain)


def test_an_exception_inside_the_context_ends_the_recording(network, x):
    network.eval()
    with pytest.raises(ZeroDivisionError), record(network):
        raise ZeroDivisionError
    network(x)
    with pytest.raises(TapNotFilled):
        _ = taps_of(network)["layer1.0/body"]


def test_values_from_before_the_context_are_not_seen_in_it(network, x):
    network.train()(x)
    with record(network) as taps, pytest.raises(TapNotFilled):
        _ = taps["layer1.0/body"]


def test_the_mapping_lists_every_tap_in_the_networks_order(network):
    taps = taps_of(network)
    assert list(taps) == ["layer1.0/body", "layer2.0/body", "layer3.0/body"]
    assert len(taps) == 3
    assert "layer1.0/body" in taps
    assert "layer9.0/body" not in taps


def test_a_tap_that_the_model_lacks_is_refused_with_those_that_it_has(network):
    with pytest.raises(
        TapNotFilled, match=r"layer9.0/body: the model has no tap of this name; it has: layer1.0/body, "
    ):
        _ = taps_of(network)["layer9.0/body"]
    with pytest.raises(TapNotFilled, match="it has: none"):
        _ = taps_of(nn.Identity())["anything"]


def test_consuming_empties_the_model_and_keeps_the_values(network, x):
    expected, _ = body(network.train(), "layer3.0", x)
    taps = consume(network)
    assert torch.equal(taps["layer3.0/body"], expected)
    with pytest.raises(TapNotFilled):
        _ = consume(network)["layer3.0/body"]


def test_the_next_forward_overwrites(network, x):
    network.train()(x)
    first = taps_of(network)["layer1.0/body"]
    network(2 * x)
    assert not torch.equal(taps_of(network)["layer1.0/body"], first)


def test_gradients_flow_through_a_tap(network, x):
    network.train()(x)
    taps_of(network)["layer2.0/body"].square().sum().backward()
    assert network.layer1[0].conv1.weight.grad is not None
    assert network.layer3[0].conv1.weight.grad is None


def test_nothing_is_kept_alive_after_consuming(network, x):
    network.train()(x)
    value = weakref.ref(consume(network)["layer1.0/body"])
    gc.collect()
    assert value() is None


def test_values_are_never_copied_and_the_copy_records_for_itself(network, x):
    network.train()(x)  # its values carry a graph, which cannot be copied
    twin = copy.deepcopy(network)
    with pytest.raises(TapNotFilled):
        _ = taps_of(twin)["layer1.0/body"]
    value = taps_of(network)["layer1.0/body"]
    twin.train()(2 * x)
    assert taps_of(network)["layer1.0/body"] is value
    assert [tap.training for tap in twin.modules() if isinstance(tap, Tap)] == [True] * 3


def test_taps_are_not_in_the_state_dict(network, x):
    network.train()(x)
    plain = timm.create_model("resnext11_4x4d").state_dict()
    assert list(network.state_dict()) == list(plain)
    assert network.load_state_dict(plain)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_does_not_fill_a_tap_again(network, x, training):
    network.train(training).set_grad_checkpointing()
    with record(network):
        output = network(x)
        consume(network)
        output.sum().backward()
        with pytest.raises(TapNotFilled):
            _ = taps_of(network)["layer1.0/body"]


def test_a_loss_on_a_tap_has_the_same_gradients_under_checkpointing(network, x):
    network.train()
    gradients = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        output = network(x)
        taps = consume(network)
        (output.sum() + taps["layer1.0/body"].square().sum() + taps["layer3.0/body"].exp().mean()).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_taps_record_under_a_compiled_network(network, x):
    expected, output = body(network.train(), "layer2.0", x)
    consume(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), output)
    assert torch.equal(consume(network)["layer2.0/body"], expected)


def test_a_tap_says_its_name(network):
    assert "Tap('layer1.0/body')" in repr(network)


def test_forward_that_does_not_record_forgets_what_an_earlier_one_left():
    tap = Tap("a")
    tap.train()(torch.ones(2))
    tap.eval()(torch.zeros(2))
    with pytest.raises(TapNotFilled, match="no forward pass has filled this tap"):
        _ = tap.value


def test_model_without_taps_has_nothing_to_record():
    with pytest.raises(TapNotFilled, match="Linear has no tap"), record(nn.Linear(2, 2)):
        pass
