"""Every edit of the graph has a numeric law, is recorded, and is refused with a reason where it cannot be made."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from surgery.analysis import inspect
from surgery.conversion import convert
from surgery.errors import InvalidOption, RewriteError, TapNotFilled, TransformFailed
from surgery.rewriter import Rewriter
from surgery.taps import record
from tests.stand_ins import Unchanged, rebuilt


class Scale(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x, *others):
        for other in others:
            x = x + other
        return x * self.factor


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3), keepdim=True)


class Join(nn.Module):
    def forward(self, *outputs):
        return torch.stack(outputs).mean(0)


class Add(nn.Module):
    def forward(self, *values):
        return torch.stack(values).sum(0)


@pytest.fixture
def source():
    model = timm.create_model("resnext20_4x4d", zero_init_last=False).double().eval()
    for module in model.modules():  # statistics that differ from the identity, so that no law holds by accident
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.normal_(model.fc.weight)
    return model


@pytest.fixture
def rewriter(source):
    return Rewriter(rebuilt(source), "toy")


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 16, dtype=torch.float64)


def block_of(rewriter, path):
    return rewriter.architecture.block(path)


def forward_with(source, x, **changed):
    """Run the source with another forward for some blocks: `layer1_0=lambda block, x: ...`."""
    model = copy.deepcopy(source)
    for name, forward in changed.items():
        block = model.get_submodule(name.replace("_", "."))
        block.forward = lambda x, block=block, forward=forward: forward(block, x)
    return model(x)


def body_of(block, x):
    x = block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x))))))
    return block.bn3(block.conv3(x))


def shortcut_of(block, x):
    return x if block.downsample is None else block.downsample(x)


# decide


def test_a_decision_is_made_once_and_read_back_on_replay(source):
    made = []

    def choose():
        made.append(None)
        return [3, 1, 2]

    first = Rewriter(rebuilt(source), "toy")
    assert first.decide("order", choose) == [3, 1, 2]
    replayed = Rewriter(rebuilt(source), "toy", json.loads(json.dumps(first.decisions)))
    assert replayed.decide("order", choose) == [3, 1, 2]
    assert len(made) == 1


def test_only_a_replay_says_that_it_is_one(source):
    assert not Rewriter(rebuilt(source), "toy").replays
    assert Rewriter(rebuilt(source), "toy", {}).replays


def test_a_key_is_decided_once(rewriter):
    rewriter.decide("order", lambda: 1)
    with pytest.raises(RewriteError, match="toy: the decision 'order' is made twice"):
        rewriter.decide("order", lambda: 1)


def test_a_replayed_record_must_hold_the_decision(source):
    with pytest.raises(RewriteError, match="toy: the record has no decision 'order'"):
        Rewriter(rebuilt(source), "toy", {}).decide("order", lambda: 1)


# insert


def test_an_identity_behind_any_place_of_any_block_changes_no_bit(source, rewriter, x):
    for path in [block.path for block in rewriter.architecture.blocks]:
        for place in ("body", "shortcut", "join", "output", "input"):
            block = block_of(rewriter, path)
            rewriter.insert(nn.Identity(), getattr(block, place), at=block, role=f"watch_{place}")
    assert torch.equal(rewriter.finish()(x), source(x))


def test_a_module_behind_the_body_scales_the_body_alone(source, rewriter, x):
    block = block_of(rewriter, "layer2.0")
    name = rewriter.insert(Scale(2.0), block.body, at=block, role="gate")
    network = rewriter.finish()
    expected = forward_with(source, x, layer2_0=lambda b, x: b.act3(2 * body_of(b, x) + shortcut_of(b, x)))
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=0)
    assert name == "toy_gate"
    assert inspect(network).block("layer2.0").body == "toy_gate"
    assert set(network.state_dict()) == set(source.state_dict()) | {"layer2.0.toy_gate.factor"}


def test_a_second_module_stands_behind_the_first(source, rewriter, x):
    for _ in range(2):
        block = block_of(rewriter, "layer2.0")
        rewriter.insert(Scale(3.0), block.body, at=block, role="gate")
    network = rewriter.finish()
    expected = forward_with(source, x, layer2_0=lambda b, x: b.act3(9 * body_of(b, x) + shortcut_of(b, x)))
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=0)
    assert [site.node for site in rewriter.sites] == ["toy_gate", "toy_gate_2"]
    assert inspect(network).params == sum(p.numel() for p in source.parameters()) + 2


def test_further_inputs_are_arguments(source, rewriter, x):
    block = block_of(rewriter, "layer1.1")
    rewriter.insert(Scale(1.0), block.body, block.input, at=block, role="sum")
    expected = forward_with(source, x, layer1_1=lambda b, x: b.act3(body_of(b, x) + x + x))
    torch.testing.assert_close(rewriter.finish()(x), expected, rtol=1e-10, atol=0)


def test_only_the_named_users_read_the_new_value(source, rewriter, x):
    block = block_of(rewriter, "layer1.1")
    rewriter.insert(Scale(2.0), block.input, at=block, role="gate", users=["conv1"])
    expected = forward_with(source, x, layer1_1=lambda b, x: b.act3(body_of(b, 2 * x) + x))
    torch.testing.assert_close(rewriter.finish()(x), expected, rtol=1e-10, atol=0)
    assert block_of(rewriter, "layer1.1").shortcut == block.input


def test_a_module_goes_between_blocks(source, rewriter, x):
    rewriter.insert(Scale(2.0), rewriter.call_of(block_of(rewriter, "layer1.1")), at=None, role="gate")
    network = rewriter.finish()
    expected = forward_with(source, x, layer1_1=lambda b, x: 2 * b.act3(body_of(b, x) + x))
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=0)
    assert "toy_gate.factor" in network.state_dict()


def test_what_is_inserted_takes_type_and_mode_of_its_surroundings(source, x):
    for training in (True, False):
        rewriter = Rewriter(rebuilt(source.train(training)), "toy")
        block = block_of(rewriter, "layer1.0")
        inserted = nn.Sequential(Scale(), nn.Dropout(0.5)).train(not training)
        rewriter.insert(inserted, block.body, at=block, role="gate")
        assert inserted[0].factor.dtype == torch.float64
        assert [module.training for module in inserted.modules()] == [training] * 3


def test_a_place_that_does_not_exist_is_refused_with_those_that_do(rewriter):
    block = block_of(rewriter, "layer1.0")
    with pytest.raises(RewriteError, match=r"layer1.0: there is no node 'bn9'; its nodes are x, .*bn3"):
        rewriter.insert(nn.Identity(), "bn9", at=block, role="gate")


def test_a_value_that_does_not_exist_yet_is_refused(rewriter):
    block = block_of(rewriter, "layer1.1")
    with pytest.raises(RewriteError, match=r"layer1.1: bn1 would read toy_gate before it is computed"):
        rewriter.insert(Scale(), "conv1", "bn3", at=block, role="gate", users=["bn1"])


# compute and feed


def test_a_value_of_the_root_is_fed_into_a_block(source, rewriter, x):
    pooled = rewriter.compute(Pool(), "act1", at=None, role="pool")
    block = block_of(rewriter, "layer2.1")
    place = rewriter.feed(pooled, into=block)
    assert rewriter.feed(pooled, into=block) == place
    rewriter.insert(Scale(1.0), block.body, place, at=block, role="shift")
    pool = source.act1(source.bn1(source.conv1(x))).mean((1, 2, 3), keepdim=True)
    expected = forward_with(source, x, layer2_1=lambda b, x: b.act3(body_of(b, x) + pool + x))
    network = rewriter.finish()
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=0)
    network.train().set_grad_checkpointing()
    network(x).sum().backward()
    assert network.conv1.weight.grad is not None


def test_a_value_that_is_computed_later_cannot_be_fed(rewriter):
    later = rewriter.compute(Pool(), "layer2_1", at=None, role="pool")
    with pytest.raises(RewriteError, match="layer1_0 would read toy_pool before it is computed"):
        rewriter.feed(later, into=block_of(rewriter, "layer1.0"))


# replace


def test_a_layer_is_replaced_with_its_weights_and_keys(source, rewriter, x):
    old = rewriter.module("layer1.0.conv3")
    twin = nn.Conv2d(old.in_channels, old.out_channels, 1, bias=False)
    twin.weight = old.weight
    rewriter.replace("layer1.0.conv3", twin)
    network = rewriter.finish()
    assert torch.equal(network(x), source(x))
    assert network.layer1[0].conv3 is twin
    assert list(network.state_dict()) == list(source.state_dict())


def test_a_replacement_may_read_further_values(source, rewriter, x):
    rewriter.replace("layer1.1.act3", Scale(1.0), "x")
    expected = forward_with(source, x, layer1_1=lambda b, x: body_of(b, x) + x + x)
    torch.testing.assert_close(rewriter.finish()(x), expected, rtol=1e-10, atol=0)


def test_a_layer_of_the_root_is_replaced(source, rewriter, x):
    rewriter.replace("fc", nn.Linear(256, 3))
    assert rewriter.finish()(x).shape == (2, 3)


def test_a_replacement_that_reads_a_later_value_is_refused(rewriter):
    with pytest.raises(RewriteError, match=r"layer1.1: bn1 would read bn3 before it is computed"):
        rewriter.replace("layer1.1.bn1", Scale(), "bn3")


def test_a_module_that_is_not_called_cannot_be_replaced(rewriter):
    with pytest.raises(RewriteError, match="layer1: expected one call of this module, found 0"):
        rewriter.replace("layer1", nn.Identity())


# tap: an in-place operation behind it must not change what it shows


class Idiom(nn.Module):
    """A residual block, `after` being what happens to the convolution's value that is tapped."""

    def __init__(self, after, tail=None):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.after = after if isinstance(after, nn.Module) else None
        self.function = None if isinstance(after, nn.Module) else after
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.tail = tail

    def forward(self, x):
        value = self.conv1(x)
        value = self.function(value) if self.after is None else self.after(value)
        value = x + self.conv2(value)
        return value if self.tail is None else self.tail(value)


def _add_in_place(value):
    value += 1.0
    return value


def _multiply_in_place(value):
    value *= 3.0
    return value


def _divide_in_place(value):
    value /= 3.0
    return value


IDIOMS = {
    "module": lambda: nn.ReLU(inplace=True),
    "module-silu": lambda: nn.SiLU(inplace=True),
    "function": lambda: lambda value: F.relu(value, inplace=True),
    "function-positional": lambda: lambda value: F.relu(value, True),
    "function-underscore": lambda: F.relu_,
    "torch-underscore": lambda: torch.relu_,
    "method": lambda: lambda value: value.relu_(),
    "method-clamp": lambda: lambda value: value.clamp_(0.2, 0.4),
    "method-add": lambda: lambda value: value.add_(1.0),
    "iadd": lambda: _add_in_place,
    "imul": lambda: _multiply_in_place,
    "itruediv": lambda: _divide_in_place,
    "behind-identity": lambda: nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
    "behind-dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True)),
    "behind-zero-dropout": lambda: nn.Sequential(nn.Dropout(0.0), nn.ReLU(inplace=True)),
    "behind-drop-path": lambda: nn.Sequential(DropPath(0.5), nn.ReLU(inplace=True)),
    "behind-view": lambda: lambda value: value.flatten(2).unflatten(2, (8, 8)).relu_(),
    "behind-function-dropout": lambda: lambda value: F.relu_(F.dropout(value, 0.5, training=False)),
    "dropout-in-place": lambda: nn.Dropout(0.5, inplace=True),
}


def idiom_network(after, tail=None):
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), Idiom(after, tail), Idiom(nn.ReLU(inplace=True)), nn.Conv2d(4, 2, 1)
    ).double()


def tapped(model, node, x):
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.tap(node, "seen", at=rewriter.architecture.block("1"))
    network = rewriter.finish()
    with record(network) as taps:
        output = network(x)
    return taps["seen"], output


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_tap_shows_the_value_before_an_in_place_operation(idiom, training):
    model = idiom_network(IDIOMS[idiom]()).train(training)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model[1].conv1(model[0](x))
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    value, output = tapped(model, "conv1", x)
    assert torch.equal(value, before)
    assert torch.equal(output, expected)


class StartsInPlace(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        x = self.function(x)
        return x + self.conv(x)


class ReadsWhatItOverwrote(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        value = self.conv1(x)
        return x + self.conv2(F.relu_(value)) * value  # the second `value` is the activation's output


def test_what_reads_the_overwritten_value_still_does():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ReadsWhatItOverwrote()).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model[1].conv1(model[0](x))
    value, output = tapped(model, "conv1", x)
    assert torch.equal(value, before)
    assert torch.equal(output, model(x))


@pytest.mark.parametrize("between", [None, nn.Identity, lambda: nn.Dropout(0.5)], ids=["direct", "identity", "dropout"])
@pytest.mark.parametrize("function", [F.relu_, _add_in_place], ids=["relu_", "iadd"])
def test_a_tap_shows_the_value_before_the_next_block_overwrites_it(function, between):
    passing = [] if between is None else [between()]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Idiom(nn.ReLU()), *passing, StartsInPlace(function)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model[1](model[0](x))
    expected = model(x)
    value, output = tapped(model, "add", x)
    assert torch.equal(value, before)
    assert torch.equal(output, expected)


def test_a_tap_on_the_input_of_a_block_shows_it_before_the_block_overwrites_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), StartsInPlace(F.relu_), StartsInPlace(F.relu_)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    value, output = tapped(model, "x", x)
    assert torch.equal(value, model[0](x))
    assert torch.equal(output, expected)


def test_a_tap_in_the_root_shows_the_value_before_the_block_overwrites_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), StartsInPlace(F.relu_)).double().eval()
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.tap(rewriter.input_of(rewriter.architecture.block("1")), "seen", at=None)
    network = rewriter.finish()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with record(network) as taps:
        output = network(x)
    assert torch.equal(taps["seen"], model[0](x))
    assert torch.equal(output, model(x))


def test_gradients_with_a_tap_are_those_without():
    model = idiom_network(nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.train()(x).square().sum().backward()
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.tap("conv1", "seen", at=rewriter.architecture.block("1"))
    network = rewriter.finish()
    network.zero_grad()
    network(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in network.named_parameters())


def test_the_original_keeps_its_in_place_operations():
    model = idiom_network(nn.ReLU(inplace=True))
    tapped(model, "conv1", torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert model[1].after.inplace


def test_taps_have_unique_names(rewriter):
    block = block_of(rewriter, "layer1.0")
    rewriter.tap(block.body, "seen", at=block)
    with pytest.raises(RewriteError, match="seen: the model already has a tap of this name"):
        rewriter.tap("conv1", "seen", at=block)


def test_a_tap_that_no_forward_has_filled_is_an_error(rewriter):
    block = block_of(rewriter, "layer1.0")
    rewriter.tap(block.body, "seen", at=block)
    with (
        record(rewriter.finish()) as taps,
        pytest.raises(TapNotFilled, match="seen: no forward pass has filled this tap"),
    ):
        _ = taps["seen"]


# bypass


@pytest.mark.parametrize("path", ["layer1.1", "layer2.0"])
def test_a_bypassed_block_is_its_shortcut(source, rewriter, x, path):
    rewriter.bypass(block_of(rewriter, path))
    network = rewriter.finish()
    without = {path.replace(".", "_"): lambda b, x: b.act3(shortcut_of(b, x))}
    torch.testing.assert_close(network(x), forward_with(source, x, **without), rtol=1e-10, atol=0)
    gone = set(source.state_dict()) - set(network.state_dict())
    assert gone == {key for key in source.state_dict() if key.startswith(path) and "downsample" not in key}
    removed = sum(value.numel() for key, value in source.named_parameters() if key in gone)
    assert inspect(network).params == inspect(source).params - removed
    assert block_of(rewriter, path).join is None


def test_a_bypass_leaves_the_value_of_the_shortcut_alone():
    # Behind the removed addition an in-place activation would write to the block's input, which a tap shows.
    model = idiom_network(nn.ReLU(), nn.ReLU(inplace=True)).eval()
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    block = rewriter.architecture.block("1")
    rewriter.tap("_0", "seen", at=None)
    rewriter.bypass(block)
    network = rewriter.finish()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with record(network) as taps:
        network(x)
    assert torch.equal(taps["seen"], model[0](x))


def test_the_multiply_adds_of_a_bypassed_body_are_gone(source, rewriter):
    block = block_of(rewriter, "layer1.1")
    rewriter.bypass(block)
    assert inspect(rewriter.finish()).macs == inspect(source).macs - block.macs


def test_a_block_without_a_shortcut_cannot_be_bypassed():
    rewriter = Rewriter(rebuilt(timm.create_model("mobilenetv2_035"), 32), "toy")
    first = rewriter.architecture.blocks[0]
    with pytest.raises(RewriteError, match=f"{first.path}: it has no shortcut"):
        rewriter.bypass(first)


# keep


def masked(model, merge, gone):
    """Return a copy of the model whose branches `gone` (channels) do not reach the merging convolution."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule(merge).weight[:, gone] = 0
    return twin


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2, 3]])
def test_a_block_with_fewer_branches_equals_the_masked_one(source, rewriter, x, kept):
    block = block_of(rewriter, "layer2.0")
    described = rewriter.keep(block, branches=kept)
    network = rewriter.finish()
    width = block.channels.hidden // 4
    gone = [c for c in range(block.channels.hidden) if c // width not in kept]
    torch.testing.assert_close(network(x), masked(source, block.merge, gone)(x), rtol=1e-10, atol=1e-12)
    assert described.cardinality == len(kept)
    assert network.layer2[0].conv2.groups == len(kept)
    assert described == inspect(network).block("layer2.0")
    assert described.params == sum(p.numel() for p in network.layer2[0].parameters())
    fresh = inspect(copy.deepcopy(network))
    assert fresh.macs == inspect(source).macs - block.macs + described.macs


def test_the_multiply_adds_of_the_kept_branches_are_a_fraction(source, rewriter):
    block = block_of(rewriter, "layer1.1")
    kept = rewriter.keep(block, branches=[2])
    assert kept.macs * 4 == block.macs  # no projection: every convolution of the block is per branch


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet18"])
def test_depthwise_and_plain_blocks_keep_channels(name):
    model = timm.create_model(name).double().eval()
    rewriter = Rewriter(rebuilt(model, 32), "toy")
    block = next(block for block in rewriter.architecture.residual_blocks())
    kept = list(range(0, block.cardinality, 2))
    rewriter.keep(block, branches=kept)
    gone = [c for c in range(block.cardinality) if c % 2]
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(rewriter.finish()(x), masked(model, block.merge, gone)(x), rtol=1e-10, atol=1e-12)


def test_a_block_with_squeeze_and_excitation_equals_the_one_masked_before_it():
    model = timm.create_model("efficientnet_b0").double().eval()
    rewriter = Rewriter(rebuilt(model, 32), "toy")
    block = rewriter.architecture.blocks[2]
    kept = list(range(0, block.cardinality, 3))
    rewriter.keep(block, branches=kept)
    mask = torch.zeros(1, block.cardinality, 1, 1, dtype=torch.float64)
    mask[:, kept] = 1
    model.get_submodule(block.attention).register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask,))
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(rewriter.finish()(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_block_whose_channels_are_normalised_together_cannot_lose_some():
    rewriter = Rewriter(rebuilt(timm.create_model("convnext_atto"), 32), "toy")
    block = rewriter.architecture.blocks[0]
    with pytest.raises(
        RewriteError, match=rf"{block.path}: these channels cannot be cut: norm \(LayerNorm2d\) uses it"
    ):
        rewriter.keep(block, branches=[0])


@pytest.mark.parametrize("branches", [[], [4], [-1], [0, 9]])
def test_branches_that_do_not_exist_are_refused(rewriter, branches):
    with pytest.raises(RewriteError, match=r"layer1.0: expected indices of its 4 branches, at least one"):
        rewriter.keep(block_of(rewriter, "layer1.0"), branches=branches)


def test_branches_without_a_merging_convolution_are_refused():
    rewriter = Rewriter(rebuilt(nn.Sequential(nn.Conv2d(3, 4, 1), StartsInPlace(F.relu)), 8), "toy")
    with pytest.raises(RewriteError, match="no convolution joins its branches"):
        rewriter.keep(rewriter.architecture.blocks[0], branches=[0])


# keep_classes


def test_only_the_named_classes_remain_in_their_order(source, rewriter, x):
    rewriter.keep_classes([7, 2])
    network = rewriter.finish()
    torch.testing.assert_close(network(x), source(x)[:, [7, 2]], rtol=1e-10, atol=0)
    assert network.num_classes == 2
    assert inspect(network).head.classes == 2


@pytest.mark.parametrize("classes", [[], [10], [-1]])
def test_classes_that_do_not_exist_are_refused(rewriter, classes):
    with pytest.raises(RewriteError, match=r"fc: expected classes in 0..9, at least one"):
        rewriter.keep_classes(classes)


# replicate


def test_equal_copies_joined_by_their_mean_are_the_network(source, rewriter, x):
    rewriter.replicate(4, Join())
    network = rewriter.finish()
    torch.testing.assert_close(network(x), source(x), rtol=1e-12, atol=0)
    assert len(network.state_dict()) == 4 * len(source.state_dict())
    assert inspect(network).params == 4 * inspect(source).params
    assert inspect(network).macs == 4 * inspect(source).macs
    torch.testing.assert_close(copy.deepcopy(network)(x), source(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_copies_are_in_the_mode_of_the_source(source, training):
    rewriter = Rewriter(rebuilt(source.train(training)), "toy")
    rewriter.replicate(2, Join())
    assert {module.training for module in rewriter.finish().modules()} == {training}


def test_copies_have_their_own_weights(source, rewriter, x):
    rewriter.replicate(2, Join())
    network = rewriter.finish()
    with torch.no_grad():
        network.members[1].fc.weight.zero_()
        network.members[1].fc.bias.zero_()
    torch.testing.assert_close(network(x), source(x) / 2, rtol=1e-12, atol=0)


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=1)


def test_copies_may_see_different_images(source, rewriter, x):
    rewriter.replicate(2, Join(), Halves())
    y = torch.rand_like(x)
    torch.testing.assert_close(rewriter.finish()(torch.cat([x, y], 1)), (source(x) + source(y)) / 2, rtol=1e-12, atol=0)


def test_some_of_the_copies_are_kept(source, rewriter, x):
    rewriter.replicate(3, Join())
    with torch.no_grad():
        rewriter.network.members[0].fc.weight.zero_()
    rewriter.keep_members([1, 2])
    torch.testing.assert_close(rewriter.finish()(x), source(x), rtol=1e-12, atol=0)


def test_no_copies_are_refused(rewriter):
    with pytest.raises(InvalidOption, match="replicate: expected at least one copy, found 0"):
        rewriter.replicate(0, Join())


# rewire


def test_a_block_reads_the_sum_of_earlier_outputs(source, rewriter, x):
    assert rewriter.input_of(block_of(rewriter, "layer1.0")) == "act1"
    earlier = [rewriter.call_of(block_of(rewriter, path)) for path in ("layer1.0", "layer1.1")]
    rewriter.rewire(block_of(rewriter, "layer2.0"), earlier, Add())
    network = rewriter.finish()
    a = source.layer1[0](source.act1(source.bn1(source.conv1(x))))
    b = source.layer1[1](a)
    features = source.layer3(source.layer2[1](source.layer2[0](a + b)))
    torch.testing.assert_close(network(x), source.forward_head(features), rtol=1e-10, atol=0)


def test_a_block_cannot_read_what_comes_after_it(rewriter):
    later = rewriter.call_of(block_of(rewriter, "layer3.0"))
    with pytest.raises(RewriteError, match="before it is computed"):
        rewriter.rewire(block_of(rewriter, "layer1.0"), [later], Add())


# remove and returns


def test_removing_what_was_inserted_gives_the_network_back(source, rewriter, x):
    block = block_of(rewriter, "layer1.0")
    rewriter.insert(Scale(3.0), block.body, at=block, role="gate")
    rewriter.remove("layer1.0.toy_gate")
    network = rewriter.finish()
    assert torch.equal(network(x), source(x))
    assert list(network.state_dict()) == list(source.state_dict())
    assert inspect(network).block("layer1.0") == block


def test_a_layer_of_the_source_cannot_be_removed(rewriter):
    with pytest.raises(RewriteError, match=r"layer1.0.bn1: it belongs to the source network"):
        rewriter.remove("layer1.0.bn1")


def test_a_block_may_return_another_of_its_values(source, rewriter, x):
    rewriter.returns(block_of(rewriter, "layer1.1").body, at=block_of(rewriter, "layer1.1"))
    expected = forward_with(source, x, layer1_1=body_of)
    torch.testing.assert_close(rewriter.finish()(x), expected, rtol=1e-10, atol=0)


# the record


def test_every_edit_is_a_site_and_stamped_on_its_node(rewriter):
    block = block_of(rewriter, "layer1.0")
    rewriter.insert(Scale(), block.body, at=block, role="gate")
    rewriter.tap("layer2_0", "seen", at=None)
    network = rewriter.finish()
    assert [(site.method, site.role, site.block, site.node) for site in rewriter.sites] == [
        ("toy", "gate", "layer1.0", "toy_gate"),
        ("toy", "tap", "", "toy_tap"),
    ]
    stamped = [n.name for m in (network, network.layer1[0]) for n in m.graph.nodes if "site" in n.meta]
    assert sorted(stamped) == ["toy_gate", "toy_tap"]


def test_a_graph_that_does_not_hold_together_is_refused(rewriter):
    rewriter.insert(Scale(), "act1", at=None, role="gate")
    del rewriter.network.conv1
    with pytest.raises(RewriteError, match=r"\(root\): the graph does not hold together after toy"):
        rewriter.finish()


class Breaks(Unchanged):
    def transform(self, architecture, rewriter):
        block = architecture.blocks[0]
        rewriter.insert(Scale(), block.body, at=block, role="gate")
        raise ZeroDivisionError("of a third party")


def test_an_exception_inside_a_transform_names_method_and_place(source, x):
    before, output = copy.deepcopy(source.state_dict()), source(x)
    with pytest.raises(
        TransformFailed, match=r"unchanged: the transform failed after gate at layer1.0: ZeroDivisionError"
    ):
        convert(source, Breaks())
    assert torch.equal(source(x), output)
    assert list(before) == list(source.state_dict())


def test_edits_are_found_again_in_a_deep_copy(source, rewriter, x):
    block = block_of(rewriter, "layer1.0")
    rewriter.insert(Scale(2.0), block.body, at=block, role="gate")
    network = rewriter.finish()
    twin = copy.deepcopy(network)
    again = Rewriter(twin, "other")
    again.remove("layer1.0.toy_gate")
    assert torch.equal(again.finish()(x), source(x))
    assert not torch.equal(network(x), source(x))
