"""The method as users meet it: its options, what conversion inserts, its record, and what it asks of the optimizer."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import surgery
from surgery.errors import AlreadyConverted, InvalidOption, NothingConverted
from surgery.testing import residual_networks, tiny_networks
from surgery_gated import Gated, gated_blocks
from surgery_gated.modules import ChannelGate, LayerGate
from tests.zoo import build, weightless

KINDS = [(granularity, dependent) for granularity in ("layer", "channel") for dependent in (True, False)]
NETWORKS = ("torchvision resnext", "timm mobilenetv2", "timm efficientnet", "wide resnet")


def convert(name="wide resnet", **options):
    return surgery.convert(tiny_networks()[name]().double(), "gated", input_size=32, **options)


def images(batch=4, dtype=torch.float64):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def run(model, x):
    with torch.no_grad():
        return model.eval()(x)


def gated_paths(model):
    return [block.path for block, _ in gated_blocks(model)]


def stir(model):
    """Let about half of the gates be open, others for other images where they depend on the image."""
    with torch.no_grad():
        for _, gates in gated_blocks(model):
            if gates.dependent:
                gates.head.bias.zero_()[::2, 0] = 0.5
                gates.head.weight.normal_(std=0.1)
            else:
                gates.head.logits.zero_()[::2, 0] = 1.0
    return model


# --- options ---


def test_defaults_are_those_of_the_paper():
    """Layer gates that depend on the image, target 0.5 per batch, weight 1 on ImageNet, 40 in the decay of gates."""
    assert Gated().options() == {
        "granularity": "layer",
        "dependent": True,
        "target": 0.5,
        "loss": "batch",
        "weight": 1.0,
        "group_size": None,
        "one_sided": False,
        "anneal": 0.0,
        "decay": 40.0,
        "gate_lr": 1.0,
    }


BAD = [
    ({"granularity": "filter"}, "option 'granularity' is 'filter'"),
    ({"granularity": None}, "option 'granularity' is None"),
    ({"dependent": 1}, "option 'dependent' is 1 "),
    ({"dependent": "yes"}, "option 'dependent' is 'yes'"),
    ({"target": -0.1}, r"option 'target' is -0.1, expected numbers in \[0, 1\]"),
    ({"target": 1.1}, r"option 'target' is 1.1, expected numbers in \[0, 1\]"),
    ({"target": math.nan}, r"option 'target' is nan, expected numbers in \[0, 1\]"),
    ({"target": True}, r"option 'target' is True, expected numbers in \[0, 1\]"),
    ({"target": "0.5"}, r"option 'target' is '0.5', expected numbers in \[0, 1\]"),
    ({"target": [0.5]}, r"option 'target' is \[0.5\], expected numbers in \[0, 1\]"),
    ({"target": None}, r"option 'target' is None, expected numbers in \[0, 1\]"),
    ({"target": {"layer1": 2}, "loss": "gate"}, r"option 'target' is {'layer1': 2}, expected numbers in \[0, 1\]"),
    ({"target": {"layer1": True}, "loss": "gate"}, r"option 'target' is {'layer1': True}, expected numbers"),
    (
        {"target": {"layer1": 0.5}},
        "option 'target' is .*, expected one number where loss='batch' averages.*pass loss='gate' for targets by",
    ),
    ({"loss": "pergate"}, "option 'loss' is 'pergate'"),
    ({"weight": -1.0}, "option 'weight' is -1.0, expected a finite number of at least 0"),
    ({"weight": math.inf}, "option 'weight' is inf, expected a finite number of at least 0"),
    ({"weight": math.nan}, "option 'weight' is nan, expected a finite number of at least 0"),
    ({"weight": "1"}, "option 'weight' is '1'"),
    ({"weight": True}, "option 'weight' is True"),
    ({"granularity": "channel", "group_size": 0}, "option 'group_size' is 0, expected at least 1"),
    ({"granularity": "channel", "group_size": -4}, "option 'group_size' is -4, expected at least 1"),
    ({"granularity": "channel", "group_size": 2.5}, "option 'group_size' is 2.5"),
    ({"granularity": "channel", "group_size": True}, "option 'group_size' is True"),
    ({"group_size": 8}, "option 'group_size' is 8, expected none for granularity='layer'"),
    ({"one_sided": 1}, "option 'one_sided' is 1"),
    ({"anneal": -1.0}, "option 'anneal' is -1.0, expected a finite number of epochs of at least 0"),
    ({"anneal": math.inf}, "option 'anneal' is inf, expected a finite number of epochs of at least 0"),
    ({"anneal": math.nan}, "option 'anneal' is nan, expected a finite number of epochs"),
    ({"decay": -1.0}, "option 'decay' is -1.0, expected a finite number of at least 0"),
    ({"decay": math.inf}, "option 'decay' is inf, expected a finite number of at least 0"),
    ({"gate_lr": 0.0}, "option 'gate_lr' is 0.0, expected a finite number above 0"),
    ({"gate_lr": math.nan}, "option 'gate_lr' is nan, expected a finite number above 0"),
    ({"gate_lr": math.inf}, "option 'gate_lr' is inf, expected a finite number above 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_option_is_refused_by_name_and_as_an_instance(options, message):
    for make in (lambda: Gated(**options), lambda: convert(**options)):
        with pytest.raises(InvalidOption, match=f"^gated: {message}"):
            make()


def test_an_unknown_option_is_refused_with_those_that_exist():
    with pytest.raises(
        InvalidOption, match="gated: unknown option 'tau'; its options are granularity, dependent, target"
    ):
        convert(tau=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0},
        {"target": 1},
        {"weight": 0},
        {"anneal": 5},
        {"decay": 0},
        {"gate_lr": 1e-3},
        {"granularity": "channel", "group_size": 1},
        {"loss": "gate", "target": {}},
        {"loss": "gate", "target": {"layer1": 0, "layer2.0": 1}},
    ],
    ids=str,
)
def test_ends_of_the_ranges_are_options(options):
    assert Gated(**options) == Gated.from_options(json.loads(json.dumps(Gated(**options).options())))


# --- targets by stage and block ---


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"layer1": 0.5}, ["layer1.0"]),
        ({"layer3": 0.5, "layer1.0": 0.2}, ["layer1.0", "layer3.0"]),
        ({"layer1": 1.0, "layer2": 0.3, "layer3": 1}, ["layer2.0"]),
        ({"layer1": 0.5, "layer1.0": 1.0, "layer2": 0.0}, ["layer2.0"]),
        ({"layer1": 1.0, "layer1.0": 0.7}, ["layer1.0"]),
    ],
    ids=str,
)
def test_blocks_with_the_target_one_and_those_left_out_get_no_gate(granularity, target, expected):
    model = convert(granularity=granularity, target=target, loss="gate")
    assert gated_paths(model) == expected
    gated_modules = [path for path, module in model.named_modules() if isinstance(module, (LayerGate, ChannelGate))]
    assert {path.rsplit(".", 1)[0] for path in gated_modules} == set(expected)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_schedule_of_convnet_aig_can_be_written_down(granularity):
    """[1, 1, .8, 1, t, t, t, 1, t, t, t, t, t, 1, .7, 1] for the 16 blocks of ResNet-50: 10 gated blocks."""
    t = 0.5
    schedule = [1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1]
    blocks = [f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)]
    target = dict(zip(blocks, schedule, strict=True))
    with weightless():
        source = build("torchvision", "resnet50")
    model = surgery.convert(source, "gated", granularity=granularity, target=target, loss="gate")
    assert gated_paths(model) == [path for path, value in target.items() if value < 1]
    assert len(gated_paths(model)) == 10


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", ["layer9", "layer1.7", "stem", "conv1", ""])
def test_a_target_for_what_is_neither_stage_nor_block_is_refused(granularity, name):
    message = rf"gated: target names {name!r}, expected stages or blocks of CifarResNet: layer1, .*layer3, layer1\.0, "
    with pytest.raises(InvalidOption, match=message):
        convert(granularity=granularity, target={"layer1": 0.5, name: 0.5}, loss="gate")


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("target", [{}, {"layer1": 1.0}], ids=str)
def test_targets_that_leave_every_block_without_a_gate_are_named_as_the_reason(granularity, target):
    """The network is not to blame: every block of it can have gates."""
    with pytest.raises((NothingConverted, InvalidOption), match="target"):
        convert(granularity=granularity, target=target, loss="gate")


def test_targets_belong_to_the_method_they_were_given_to():
    """A sweep that goes on using its mapping changes no network that it has converted before."""
    target = {"layer1": 0.3}
    method = Gated(loss="gate", target=target)
    model = convert(loss="gate", target=target)
    target["layer1"] = 0.9
    assert method.target == {"layer1": 0.3}
    assert model.meta["conversion"].operations[-1].options["target"] == {"layer1": 0.3}
    objective = surgery.Objective(stir(model).train(), nn.CrossEntropyLoss())
    output = model(images())
    rate = float(next(module for module in model.modules() if isinstance(module, surgery.Tap)).value.detach().mean())
    objective(output, torch.arange(4))
    assert float(objective.terms["activation"]) == pytest.approx((rate - 0.3) ** 2, rel=1e-12)


# --- what conversion does ---


@pytest.mark.parametrize(("granularity", "dependent"), KINDS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_gates_change_no_bit_in_eval_mode(name, granularity, dependent, dtype):
    source = tiny_networks()[name]().to(dtype)
    model = surgery.convert(source, "gated", granularity=granularity, dependent=dependent, input_size=32)
    for batch in (1, 4):
        for skipping in (True, False):
            for _, gates in gated_blocks(model):
                gates.skipping = skipping
            assert torch.equal(run(model, images(batch, dtype)), run(source, images(batch, dtype)))


@settings(max_examples=30)
@given(residual_networks())
def test_any_residual_network_keeps_its_bits_or_is_refused(spec):
    source = spec.build().double()
    x = images()[:, :, ::2, ::2]
    for granularity in ("layer", "channel"):
        try:
            model = surgery.convert(source, "gated", granularity=granularity, input_size=16)
        except NothingConverted:
            assert granularity == "channel"
            continue
        assert torch.equal(run(model, x), run(source, x))
        with surgery.record(model) as taps:
            run(model, x)
        assert list(taps) == [f"{path}/gates" for path in gated_paths(model)]


@pytest.mark.parametrize(("granularity", "dependent"), KINDS)
def test_decisions_are_recorded_under_the_path_of_their_block(granularity, dependent):
    model = convert(granularity=granularity, dependent=dependent)
    with surgery.record(model) as taps:
        run(model, images())
    assert list(taps) == ["layer1.0/gates", "layer2.0/gates", "layer3.0/gates"]
    for block, gates in gated_blocks(model):
        decisions = taps[f"{block.path}/gates"]
        assert decisions.dtype == torch.float64
        assert torch.equal(decisions, torch.ones(4, gates.count, dtype=torch.float64))
        assert gates.granularity == granularity
        assert gates.dependent == dependent


@pytest.mark.parametrize(("granularity", "dependent"), KINDS)
def test_train_mode_draws_for_every_image_and_keeps_the_decisions_with_their_gradient(granularity, dependent):
    model = stir(convert(granularity=granularity, dependent=dependent)).train()
    model(images(64))
    for tap in (module for module in model.modules() if isinstance(module, surgery.Tap)):
        assert set(tap.value.unique().tolist()) == {0.0, 1.0}
        assert len(tap.value) == 64
        assert tap.value.requires_grad
        assert not torch.equal(tap.value, tap.value[:1].expand(64, -1))


def test_names_of_what_is_inserted():
    names = {
        "layer": ["gates", "layer", "tap"],
        "channel": ["gates", "inner", "input", "output", "projection", "tap"],
    }
    for granularity, expected in names.items():
        children = [name for name, _ in convert(granularity=granularity).block("layer2.0").named_children()]
        assert sorted(name for name in children if name.startswith("gated")) == [f"gated_{name}" for name in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_have_the_dtype_of_the_network(dtype):
    source = tiny_networks()["wide resnet"]().to(dtype)
    for granularity, dependent in KINDS:
        model = surgery.convert(source, "gated", granularity=granularity, dependent=dependent, input_size=32)
        assert {value.dtype for _, gates in gated_blocks(model) for value in gates.parameters()} == {dtype}
        assert torch.equal(run(model, images(2, dtype)), run(source, images(2, dtype)))


def test_the_source_and_its_keys_are_kept():
    source = tiny_networks()["timm mobilenetv2"]()
    before = copy.deepcopy(source.state_dict())
    model = surgery.convert(source, "gated", granularity="channel", input_size=32)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert not unexpected
    assert missing
    assert all(".gated_gates." in name for name in set(missing) | set(model.state_dict()) - set(before))
    assert set(before) < set(model.state_dict())


def test_gates_learn_in_a_frozen_network():
    source = tiny_networks()["wide resnet"]().requires_grad_(False)
    model = surgery.convert(source, "gated", input_size=32)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".gated_gates." in name for name in trained)


def test_a_gated_network_is_not_gated_again():
    with pytest.raises(AlreadyConverted):
        surgery.convert(convert(), "gated")


# --- the record ---


ROUND_TRIPS = [
    {},
    {"dependent": False, "one_sided": True, "anneal": 3.0, "weight": 2.0, "gate_lr": 5.0},
    {"granularity": "channel", "group_size": 4, "decay": 10.0},
    {"granularity": "channel", "dependent": False, "loss": "gate", "target": {"layer1": 0.3, "layer3.0": 0.6}},
    {"loss": "gate", "target": {"layer2": 0.3, "layer3": 1.0}},
]


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=str)
def test_a_saved_network_comes_back_with_gates_options_and_decisions(options, tmp_path):
    model = stir(convert(**options))
    optimizer = torch.optim.SGD(surgery.param_groups(model, lr=0.1, weight_decay=1e-4))
    surgery.Objective(model, nn.CrossEntropyLoss())(model.train()(images()), torch.arange(4)).backward()
    optimizer.step()
    surgery.save(model, tmp_path / "gated.safetensors", factory=tiny_networks()["wide resnet"])
    twin = surgery.load(tmp_path / "gated.safetensors", factory=tiny_networks()["wide resnet"])
    recorded = twin.meta["conversion"].operations[-1]
    assert recorded.method == "gated"
    assert Gated.from_options(recorded.options) == Gated(**options)
    assert gated_paths(twin) == gated_paths(model)
    with surgery.record(model) as expected, surgery.record(twin) as found:
        outputs = [run(network, images(16)) for network in (model, twin)]
    assert torch.equal(*outputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(value.mean() < 1 for value in expected.values())
    terms = []
    for network in (model, twin):
        torch.manual_seed(0)
        objective = surgery.Objective(network, nn.CrossEntropyLoss())
        objective(network.train()(images()), torch.arange(4), 1.0)
        terms.append(dict(objective.terms))
    assert terms[0] == terms[1]


def test_a_gated_network_can_be_taken_back(tmp_path):
    source = tiny_networks()["wide resnet"]
    model = surgery.convert(source(), "gated", granularity="channel", input_size=32)
    surgery.save(model, tmp_path / "gated.safetensors", factory=source)
    plain = surgery.revert(model, factory=source)
    assert torch.equal(run(plain, images(dtype=torch.float32)), run(source(), images(dtype=torch.float32)))


# --- what the optimizer is told ---


def is_plain(model, name):
    """Whether a parameter is a bias or belongs to a norm, which are not decayed anywhere."""
    path, _, leaf = name.rpartition(".")
    return leaf == "bias" or isinstance(model.get_submodule(path), nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(("granularity", "dependent"), KINDS)
@pytest.mark.parametrize(("gate_lr", "decay"), [(1.0, 40.0), (5.0, 10.0)])
def test_exactly_the_gates_get_another_learning_rate_and_channel_gates_another_decay(
    granularity, dependent, gate_lr, decay
):
    """decay / number of gates for channels: 40 / 728 on ResNet-50; layers keep the user's decay."""
    model = convert(granularity=granularity, dependent=dependent, gate_lr=gate_lr, decay=decay)
    count = sum(gates.count for _, gates in gated_blocks(model))
    factor = decay / count if granularity == "channel" else 1.0
    own = {id(parameter) for _, gates in gated_blocks(model) for parameter in gates.parameters()}
    groups = surgery.param_groups(model, lr=0.1, weight_decay=1e-3)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(own) == (18 if dependent else 3)
    for name, parameter in model.named_parameters():
        rate, decayed = found[id(parameter)]
        assert rate == pytest.approx(0.1 * gate_lr if id(parameter) in own else 0.1, rel=1e-12)
        expected = 0.0 if is_plain(model, name) else 1e-3 * (factor if id(parameter) in own else 1.0)
        assert decayed == pytest.approx(expected, rel=1e-12)
    (rule,) = Gated(granularity=granularity, gate_lr=gate_lr, decay=decay).parameter_rules(model)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert rule.names == names
    assert (rule.lr_scale, rule.decay_scale, rule.weight_decay) == (gate_lr, pytest.approx(factor), None)


def test_the_decay_of_resnet50_is_40_over_728():
    with weightless():
        source = build("torchvision", "resnet50")
    model = surgery.convert(source, "gated", granularity="channel", dependent=False)
    (rule,) = Gated(granularity="channel", dependent=False).parameter_rules(model)
    assert rule.decay_scale == 40 / 728
    assert len(rule.names) == 16
