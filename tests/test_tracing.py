"""The traced network is the network: in both modes, with its random parts, its statistics and its names."""

import copy

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from surgery.errors import TraceError, UnsupportedModel
from surgery.tracing import trace
from tests.stand_ins import rebuilt
from tests.zoo import UNTRACEABLE, build, weightless

TIMM = (
    "resnet10t",
    "resnet26d",
    "resnet50_gn",
    "resnetblur18",
    "resnetrs50",
    "resnetv2_50d_evos",
    "resnetv2_50d_frn",
    "resnetv2_50x1_bit",
    "resnext26ts",
    "resnet51q",
    "seresnext26d_32x4d",
    "skresnext50_32x4d",
    "legacy_seresnext26_32x4d",
    "ecaresnext26t_32x4d",
    "gcresnext26ts",
    "resnet50_clip",
    "regnetx_002",
    "regnety_002",
    "regnetv_040",
    "regnetz_b16_evos",
    "mobilenetv2_100",
    "mnasnet_small",
    "semnasnet_075",
    "efficientnet_b0_g8_gn",
    "efficientnet_blur_b0",
    "tf_efficientnet_lite0",
    "densenetblur121d",
)

# Networks that between them hold dropout, drop-path, attention dropout, batch statistics, joined activations, grouped
# statistics, scaled weights and constants; each at the smallest image it takes.
COMPARED = {
    ("torchvision", "resnet18"): ({}, 32),
    ("torchvision", "mobilenet_v3_small"): ({}, 32),
    ("torchvision", "efficientnet_b0"): ({}, 32),
    ("torchvision", "shufflenet_v2_x0_5"): ({}, 32),
    ("torchvision", "regnet_y_400mf"): ({}, 32),
    ("torchvision", "squeezenet1_1"): ({}, 64),
    ("torchvision", "swin_t"): ({"dropout": 0.2, "attention_dropout": 0.3}, 64),
    ("torchvision", "swin_v2_t"): ({"dropout": 0.2, "attention_dropout": 0.3}, 64),
    ("torchvision", "maxvit_t"): ({}, 224),
    ("timm", "resnext11_4x4d"): ({"drop_rate": 0.3}, 16),
    ("timm", "mobilenetv2_050"): ({"drop_rate": 0.3, "drop_path_rate": 0.5}, 32),
    ("timm", "resnet26t"): ({"drop_rate": 0.3, "drop_path_rate": 0.5}, 32),
    ("timm", "resnetv2_50d_evos"): ({"drop_path_rate": 0.5}, 32),
    ("timm", "skresnet18"): ({}, 32),
    ("timm", "resnest14d"): ({}, 32),
    ("timm", "convnext_atto"): ({"drop_path_rate": 0.5}, 32),
    ("timm", "vit_tiny_patch16_224"): ({"drop_path_rate": 0.5, "drop_rate": 0.1}, 224),
}


def images(*size, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def seeded(model, x, seed=7):
    torch.manual_seed(seed)
    return model(x)


@pytest.mark.parametrize("network", torchvision.models.list_models(module=torchvision.models))
def test_every_torchvision_classifier_is_traced_or_refused_by_name(network):
    with weightless():
        model = build("torchvision", network)
    if network in UNTRACEABLE:
        module = {"googlenet": "aux1", "inception_v3": "AuxLogits"}[network]
        differs = rf"{type(model).__name__}, module '{module}': its graph differs between eval .*aux_logits=False"
        with pytest.raises(TraceError, match=differs):
            trace(model)
    else:
        assert next(iter(trace(model).find_nodes(op="output"))).args


def test_torchvision_has_eighty_classifiers():
    assert len(torchvision.models.list_models(module=torchvision.models)) == 80


@pytest.mark.parametrize("network", TIMM)
def test_timm_networks_are_traced(network):
    with weightless():
        assert len(trace(build("timm", network)).nodes) > 20


@pytest.mark.parametrize("network", sorted(UNTRACEABLE))
def test_without_auxiliary_heads_the_refused_ones_are_traced(network):
    model = torchvision.models.get_model(network, weights=None, aux_logits=False, init_weights=False).eval()
    x = images(1, 3, 96, 96)
    assert torch.equal(rebuilt(model, 96)(x), model(x))


@pytest.mark.parametrize(("network", "case"), COMPARED.items(), ids=lambda value: "-".join(map(str, value[:2])))
def test_traced_equals_eager_in_both_modes(network, case):
    options, side = case
    model = build(*network, **options)
    again = rebuilt(model.eval(), side)
    x = images(2, 3, side, side)
    with torch.no_grad():
        statistics = copy.deepcopy(again.state_dict())
        assert torch.equal(again(x), model(x))
        assert all(torch.equal(value, statistics[key]) for key, value in again.state_dict().items())
        model.train()
        again.train()
        assert torch.equal(seeded(again, x), seeded(model, x))
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_at_tracing_time_does_not_matter(mode):
    model = timm.create_model("mobilenetv2_035", drop_path_rate=0.5, drop_rate=0.3).train(mode == "train")
    again = rebuilt(model, 32)
    assert again.training == model.training
    x = images(2, 3, 32, 32)
    for training in (True, False):
        model.train(training)
        again.train(training)
        assert torch.equal(seeded(again, x), seeded(model, x))


def test_gradients_are_those_of_the_eager_network():
    model = timm.create_model("resnext11_4x4d").double()
    again = rebuilt(model)
    x = images(4, 3, 8, 8).double()
    for network in (model, again):
        seeded(network, x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in again.named_parameters())


def test_statistics_of_norms_with_an_activation_move_in_train_mode_only():
    again = rebuilt(timm.create_model("mobilenetv2_035").eval(), 32)
    before = copy.deepcopy(again.state_dict())
    keys = [key for key in before if key.endswith("num_batches_tracked")]
    again(images(2, 3, 32, 32))
    assert all(again.state_dict()[key] == 0 for key in keys)
    again.train()(images(2, 3, 32, 32))
    assert len(keys) == 52
    assert all(again.state_dict()[key] == 1 for key in keys)
    assert not torch.equal(again.state_dict()["bn1.running_mean"], before["bn1.running_mean"])


def test_drop_path_drops_in_train_mode_only():
    again = rebuilt(timm.create_model("resnet26t", drop_path_rate=0.9, drop_rate=0.5), 32)
    x = images(2, 3, 32, 32)
    again.eval()
    assert torch.equal(seeded(again, x, 1), seeded(again, x, 2))
    again.train()
    assert not torch.equal(seeded(again, x, 1), seeded(again, x, 2))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = F.dropout(self.conv(x), 0.5, self.training)
        return F.dropout(x, p=0.5, training=self.training).mean((2, 3))


def test_a_training_argument_follows_the_mode():
    model = FunctionalDropout()
    again = rebuilt(model, 4)
    x = images(2, 3, 4, 4)
    for training in (True, False):
        model.train(training)
        again.train(training)
        assert torch.equal(seeded(again, x), seeded(model, x))
    assert list(again.state_dict()) == list(model.state_dict())


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = FunctionalDropout()
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_part_that_is_put_into_eval_mode_stays_there():
    model = Nested()
    again = rebuilt(model, 4)
    x = images(2, 3, 4, 4)
    for network in (model, again):
        network.train()
        network.first.eval()
    assert torch.equal(seeded(again, x), seeded(model, x))
    assert torch.equal(seeded(again, x, 1), seeded(again, x, 2))


class DiffersByMode(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "operation" and self.training:
            x = x.relu()
        elif self.kind == "number":
            x = x * (2.0 if self.training else 3.0)
        elif self.kind == "constant":
            x = x * torch.tensor(2.0 if self.training else 3.0)
        elif self.kind == "arity":
            x = x.flatten(1) if self.training else x.flatten(1, 3)
        return x


@pytest.mark.parametrize("kind", ["operation", "number", "constant", "arity"])
def test_any_other_difference_between_the_modes_is_refused_by_module(kind):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), DiffersByMode(kind))
    with pytest.raises(
        TraceError, match=r"Sequential, module '1': its graph differs between eval mode .* and train mode"
    ):
        trace(model)


class ReadsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def test_control_flow_on_data_is_refused_by_module_with_the_cure():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), ReadsData())
    before = [list(vars(module)) for module in model.modules()]
    with pytest.raises(TraceError, match=r"module '1' of type ReadsData: cannot be traced.*register_notrace_module"):
        trace(model)
    assert [list(vars(module)) for module in model.modules()] == before


def test_a_module_declared_untraceable_is_a_leaf():
    class Declared(ReadsData):
        pass

    timm.layers.register_notrace_module(Declared)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Declared())
    assert [node.target for node in trace(model).find_nodes(op="call_module", target="1")] == ["1"]
    x = images(2, 3, 4, 4) - 0.7
    assert torch.equal(rebuilt(model, 4)(x), model(x))


@pytest.mark.parametrize("network", ["mobilenetv2_035", "tf_efficientnet_b0", "skresnet18", "convit_tiny"])
def test_modules_that_timm_declares_untraceable_are_leaves(network):
    with weightless():
        model = timm.create_model(network)
    called = {node.target for node in trace(model).find_nodes(op="call_module")}
    declared = tuple(timm.layers.get_notrace_modules())
    paths = [path for path, module in model.named_modules() if isinstance(module, declared)]
    assert paths
    assert set(paths) <= called


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("mean", torch.rand(3))
        self.offset = torch.rand(4, 1, 1)  # neither parameter nor buffer

    def forward(self, x):
        x = (x - self.mean.view(1, 3, 1, 1)) * torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
        return self.conv(x) + self.offset


class ConstantsInBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Constants()
        self.scale = torch.rand(1)
        self.project = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.project(x) * self.scale + self.body(x) * torch.tensor(0.25)


@pytest.mark.parametrize(
    "make", [Constants, ConstantsInBlock, lambda: nn.Sequential(ConstantsInBlock(), nn.Conv2d(4, 2, 1))]
)
def test_constants_and_plain_tensors_are_carried_and_leave_no_trace(make):
    model = make()
    attributes = [list(vars(module)) for module in model.modules()]
    again = rebuilt(model, 8)
    x = images(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(again)(x), model(x))
    assert [list(vars(module)) for module in model.modules()] == attributes
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_buffer_is_read_when_the_network_runs():
    model = Constants()
    again = rebuilt(model, 8)
    weights = {**model.state_dict(), "mean": torch.ones(3)}
    for network in (model, again):
        network.load_state_dict(weights)
    x = images(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))


def test_constants_move_with_the_network():
    model = Constants()
    model.offset = 1.0
    assert rebuilt(model, 8).to("meta")(torch.empty(2, 3, 8, 8, device="meta")).is_meta


def test_tracing_leaves_modes_weights_and_attributes_as_they_were():
    model = timm.create_model("resnet26t", drop_path_rate=0.2)
    model.layer2.eval()
    model.forward_features = model.forward_features  # an override of the user's own
    modes = {path: module.training for path, module in model.named_modules()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    trace(model)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_hooks_do_not_run_while_tracing():
    model = timm.create_model("resnext11_4x4d")
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(None))
    trace(model)
    assert calls == []


def test_nodes_are_named_after_the_modules_they_come_from():
    model = rebuilt(timm.create_model("resnext11_4x4d"))
    names = [node.name for node in model.graph.nodes]
    assert names[:4] == ["x", "conv1", "bn1", "act1"]
    assert "layer1_0" in names
    assert [node.name for node in model.block("layer1.0").graph.nodes][:4] == [
        "x",
        "downsample_conv",
        "downsample_bn",
        "conv1",
    ]


@pytest.mark.parametrize(
    ("wrap", "cure"),
    [
        (nn.DataParallel, "wrapped in DataParallel; convert first, then wrap"),
        (torch.compile, "wrapped in OptimizedModule; convert first, then compile"),
        (lambda model: torch.jit.trace(model, torch.rand(1, 3, 8, 8)), "convert the eager network"),
        (lambda model: DataLoader(TensorDataset(torch.rand(1))), "expected an nn.Module, found DataLoader"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_plain_network_is_refused_with_the_cure(wrap, cure):
    with pytest.raises(UnsupportedModel, match=cure):
        trace(wrap(nn.Sequential(nn.Conv2d(3, 2, 1))))
