"""Conversion: how a method is named, what is refused with which cure, and that the original stays as it was."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import surgery
import surgery_coded
from surgery.conversion import parse_options, parse_spec, resolve_method
from surgery.errors import (
    AlreadyConverted,
    ConformanceError,
    InvalidOption,
    NothingConverted,
    TransformFailed,
    UnsupportedModel,
)
from surgery.testing import ResidualSpec, plain_chain, tiny_networks
from tests.toys import FalseClaim, Scale, Toy, installed, package

RESNEXT = tiny_networks()["resnext"]


def fingerprint(model: nn.Module) -> str:
    """Hash everything that a network is: bytes, modes, gradients wanted, hooks, attributes, and the objects."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {id(tensor)} {tensor.requires_grad} {tensor.grad is None} {tensor.dtype}".encode())
        digest.update(tensor.detach().numpy().tobytes())
    for path, module in model.named_modules():
        plain = {key: repr(value) for key, value in vars(module).items() if not key.startswith("_")}
        hooks = {
            key: [*map(id, value.values())] for key, value in vars(module).items() if key.endswith("_hooks") and value
        }
        digest.update(f"{path} {id(module)} {type(module)} {sorted(plain.items())} {sorted(hooks.items())}".encode())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("coded", "coded", {}),
        (" coded{} ", "coded", {}),
        ("coded{mu=2}", "coded", {"mu": 2}),
        ("coded{mu=2.5, p_drop=0}", "coded", {"mu": 2.5, "p_drop": 0}),
        ("coded{scheme.layer2=4/8,scheme.layer3=2/8}", "coded", {"scheme": {"layer2": "4/8", "layer3": "2/8"}}),
        ("coded{scheme.blocks.2=4/8}", "coded", {"scheme": {"blocks.2": "4/8"}}),
        ("coded{branches=None,gradient=masked}", "coded", {"branches": None, "gradient": "masked"}),
        ('a-third_one{flag=True,other=false,text="1"}', "a-third_one", {"flag": True, "other": False, "text": "1"}),
    ],
)
def test_spec_strings_are_read(spec, name, options):
    assert parse_spec(spec) == (name, options)


@pytest.mark.parametrize("spec", ["", "coded{", "coded}", "coded mu=2", "{mu=2}", "coded{mu=2}x"])
def test_malformed_spec_strings_are_refused(spec):
    with pytest.raises(InvalidOption, match="expected a name, or name"):
        parse_spec(spec)


@pytest.mark.parametrize("pair", ["mu", "=2", ""])
def test_options_without_key_or_value_are_refused(pair):
    with pytest.raises(InvalidOption, match="expected key=value"):
        parse_options([pair])


def test_the_three_ways_to_name_a_method_give_the_same_network():
    model = RESNEXT()
    scheme = {"layer2": "4/8", "layer3": "2/8"}
    networks = [
        surgery.convert(model, "coded", input_size=32, scheme=scheme, mu=3.0, p_drop=0.2),
        surgery.convert(model, "coded{scheme.layer2=4/8,scheme.layer3=2/8,mu=3.0,p_drop=0.2}", input_size=32),
        surgery.convert(model, surgery_coded.Coded(scheme=scheme, mu=3.0, p_drop=0.2), input_size=32),
    ]
    records = [network.meta["conversion"] for network in networks]
    assert records[0] == records[1] == records[2]
    x = torch.randn(2, 3, 32, 32)
    outputs = [network.eval()(x) for network in networks]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_keyword_options_win_over_those_of_the_spec():
    assert resolve_method("coded{mu=2,p_drop=0.3}", {"mu": 5}) == surgery_coded.Coded(mu=5, p_drop=0.3)


def test_options_beside_an_instance_are_refused():
    with pytest.raises(InvalidOption, match=r"coded: options \['mu'\] go into the instance, not into convert"):
        surgery.convert(RESNEXT(), surgery_coded.Coded(), mu=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mew": 2}, r"coded: unknown option 'mew'; its options are scheme, mu, p_drop"),
        ({"mu": "high"}, r"coded: option 'mu' is 'high' \(str\), expected float"),
        ({"mu": True}, r"coded: option 'mu' is True \(bool\), expected float"),
        ({"branches": 2.5}, r"coded: option 'branches' is 2\.5 \(float\), expected int"),
        ({"gradient": "none"}, r"coded: option 'gradient' is 'none' \(str\), expected Literal"),
        ({"mu": -1.0}, r"coded: option 'mu' is -1\.0, expected a finite number of at least 0"),
        ({"p_drop": 1.0}, r"coded: option 'p_drop' is 1\.0, expected a probability in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, message):
    with pytest.raises(InvalidOption, match=message):
        surgery.convert(RESNEXT(), "coded", **options)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "wrapped in DistributedDataParallel; convert first, then wrap"),
        (DataParallel, "wrapped in DataParallel; convert first, then wrap"),
        (
            lambda model: torch.compile(model, backend="eager"),
            "wrapped in OptimizedModule; convert first, then compile",
        ),
        (lambda model: model.state_dict(), "expected an nn.Module, found OrderedDict"),
    ],
)
def test_wrapped_models_are_refused_with_the_cure(process_group, wrap, message):
    with pytest.raises(UnsupportedModel, match=message):
        surgery.convert(wrap(RESNEXT()), "coded", input_size=32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated, and still met
def test_scripted_models_are_refused_with_the_cure():
    scripted = torch.jit.script(plain_chain())
    with pytest.raises(UnsupportedModel, match="convert the eager network"):
        surgery.convert(scripted, "coded")


def test_nothing_converted_lists_a_reason_and_a_cure_for_each_block():
    with pytest.raises(NothingConverted) as caught:
        surgery.convert(ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, num_classes=10), "coded", input_size=32)
    assert [refusal.path for refusal in caught.value.refusals] == [f"stages.{n}.blocks.0" for n in range(4)]
    assert str(caught.value).splitlines() == [
        "coded: no block of ConvNeXt can be coded",
        *(
            f"  stages.{n}.blocks.0: no dense convolution joins its branches, expected one; use a ResNeXt"
            for n in range(4)
        ),
    ]


def test_the_same_method_twice_and_methods_that_do_not_stack_are_refused(monkeypatch):
    installed(monkeypatch, package(Toy))
    coded = surgery.convert(RESNEXT(), "coded", input_size=32)
    with pytest.raises(AlreadyConverted, match="already converted by 'coded'; convert the original again instead"):
        surgery.convert(coded, "coded")
    with pytest.raises(AlreadyConverted, match="'toy' cannot be applied on top of coded: coded does not stack"):
        surgery.convert(coded, "toy")
    with pytest.raises(AlreadyConverted, match="the network is pruned; convert the original, then prune"):
        surgery.convert(surgery.prune(coded, classes=[1]), "toy")


@dataclass(frozen=True)
class Lower(Toy):
    name: ClassVar[str] = "lower"
    stacks: ClassVar[bool] = True

    def transform(self, architecture, rewriter):
        for block in architecture.residual_blocks():
            rewriter.insert(Scale(), block.body, at=block, role="scale")

    def losses(self, step):
        return {self.name: step.output.sum() * 0}


@dataclass(frozen=True)
class Upper(Lower):
    name: ClassVar[str] = "upper"


def test_methods_that_both_stack_are_applied_in_order_and_recorded(monkeypatch, tmp_path):
    installed(monkeypatch, package(Lower, Upper))
    build = ResidualSpec((1,)).build
    lower = surgery.convert(build(), "lower", input_size=32)
    both = surgery.convert(lower, "upper")
    assert both.meta["conversion"].methods == ("lower", "upper")
    assert lower.meta["conversion"].methods == ("lower",)
    paths = [name for name, module in both.named_modules() if isinstance(module, Scale)]
    assert paths == ["stages.0.0.lower_scale", "stages.0.0.upper_scale"]
    criterion = surgery.Objective(both, nn.CrossEntropyLoss())
    criterion(both(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
    assert list(criterion.terms) == ["task", "lower", "upper"]
    surgery.save(both, tmp_path / "both.safetensors", factory=build)
    loaded = surgery.load(tmp_path / "both.safetensors", factory=build)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), both.eval()(x))


@dataclass(frozen=True)
class Fails(Toy):
    when: str = "late"

    def transform(self, architecture, rewriter):
        for number, block in enumerate(architecture.blocks):
            if number == (0 if self.when == "early" else 2):
                raise ZeroDivisionError("nothing to divide by")
            rewriter.insert(Scale(), block.body, at=block, role="scale")
            rewriter.module(block.spatial).weight.data.zero_()


@pytest.mark.parametrize(("when", "where"), [("early", "before its first edit"), ("late", r"after scale at layer2\.0")])
def test_failing_transform_says_where_and_leaves_the_model_alone(monkeypatch, when, where):
    installed(monkeypatch, package(Fails))
    model = RESNEXT()
    before = fingerprint(model)
    expected = f"toy: the transform failed {where}: ZeroDivisionError: nothing to divide by"
    with pytest.raises(TransformFailed, match=expected) as caught:
        surgery.convert(model, "toy", input_size=32, when=when)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert fingerprint(model) == before


def test_transform_that_changes_nothing_is_an_error_and_never_silent(monkeypatch):
    class Idle(Toy):
        def transform(self, architecture, rewriter):
            return None

    installed(monkeypatch, package(Idle))
    with pytest.raises(NothingConverted, match="toy: the transform changed nothing in"):
        surgery.convert(RESNEXT(), "toy", input_size=32)


def test_verify_checks_the_claim(monkeypatch):
    class Spoils(Toy):
        preserves: ClassVar[str] = "weights"

        def transform(self, architecture, rewriter):
            super().transform(architecture, rewriter)
            rewriter.module("fc").weight.data[0, 0] += 1e-6

    installed(monkeypatch, package(FalseClaim))
    model = RESNEXT()
    surgery.convert(model, "toy", input_size=32)
    with pytest.raises(ConformanceError, match="preserves: toy claims equal outputs, but they differ by up to "):
        surgery.convert(model, "toy", input_size=32, verify=True)
    installed(monkeypatch, package(Spoils))
    with pytest.raises(
        ConformanceError, match=r"preserves: toy claims to keep the weights, but changed or lost \['fc\.weight'\]"
    ):
        surgery.convert(model, "toy", input_size=32, verify=True)
    installed(monkeypatch, package(Toy))
    assert torch.equal(
        surgery.convert(model, "toy", input_size=32, verify=True).eval()(torch.ones(1, 3, 32, 32)),
        model.eval()(torch.ones(1, 3, 32, 32)),
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mode_and_dtype_are_those_of_the_source(train, dtype):
    model = RESNEXT().to(dtype).train(train)
    coded = surgery.convert(model, "coded", input_size=32)
    assert {module.training for module in coded.modules()} == {train}
    assert {tensor.dtype for tensor in coded.parameters()} == {dtype}
    assert coded(torch.randn(2, 3, 32, 32, dtype=dtype)).dtype == dtype


def test_device_is_that_of_the_source():
    model = RESNEXT().to("meta")
    coded = surgery.convert(model, "coded", input_size=32)
    assert {tensor.device.type for tensor in [*coded.parameters(), *coded.buffers()]} == {"meta"}


def test_mixed_modes_inside_the_source_are_kept():
    model = RESNEXT()
    model.layer2[0].bn2.eval()
    model.bn1.eval()
    coded = surgery.convert(model, "coded", input_size=32)
    assert [name for name, module in coded.named_modules() if not module.training] == ["bn1", "layer2.0.bn2"]


def test_frozen_weights_stay_frozen():
    model = RESNEXT()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    coded = surgery.convert(model, "coded", input_size=32)
    assert [name for name, parameter in coded.named_parameters() if parameter.requires_grad] == ["fc.weight", "fc.bias"]


def test_tied_weights_stay_tied():
    model = ResidualSpec((2, 1), groups=8, width=1).build()
    first, second = model.stages[0][0].norms[1], model.stages[0][1].norms[1]
    second.weight = first.weight
    coded = surgery.convert(model, "coded", input_size=32)
    assert coded.get_parameter("stages.0.0.norms.1.weight") is coded.get_parameter("stages.0.1.norms.1.weight")
    assert coded.get_parameter("stages.0.0.norms.1.weight") is not first.weight


def test_class_name_and_plain_attributes_are_those_of_the_source():
    model = RESNEXT()
    model.owner = {"name": "somebody"}
    coded = surgery.convert(model, "coded", input_size=32)
    assert type(coded).__name__ == "CifarResNet"
    assert coded.owner == {"name": "somebody"}
    assert (coded.num_classes, coded.num_features) == (10, 128)


@pytest.mark.parametrize("name", [name for name in tiny_networks() if "resnext" in name])
def test_conversion_is_pure(name):
    model = tiny_networks()[name]()
    model.register_forward_hook(lambda module, inputs, output: None)
    model.layer1.eval()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before = fingerprint(model)
    random = torch.random.get_rng_state()
    coded = surgery.convert(model, "coded", input_size=32)
    assert fingerprint(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    surgery.Objective(coded, nn.CrossEntropyLoss())(coded(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    for parameter in coded.parameters():
        parameter.data.zero_()
    assert fingerprint(model) == before


def test_gradients_of_the_source_are_its_own():
    model = RESNEXT()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    coded = surgery.convert(model, "coded", input_size=32)
    shared = {id(p.grad) for p in model.parameters()} & {id(p.grad) for p in coded.parameters() if p.grad is not None}
    assert not shared


def test_input_size_is_recorded_and_read_back(tmp_path):
    build = ResidualSpec((1,), groups=8).build
    coded = surgery.convert(build(), "coded", input_size=(12, 20), scheme={"stages.0": "4/8"})
    assert surgery.inspect(coded).input_size == (3, 12, 20)
    assert coded.meta["conversion"].operations[-1].input_size == (12, 20)
    surgery.save(coded, tmp_path / "a.safetensors", factory=build)
    assert surgery.inspect(surgery.load(tmp_path / "a.safetensors", factory=build)).input_size == (3, 12, 20)


def test_record_names_every_site_and_the_provider():
    coded = surgery.convert(RESNEXT(), "coded", input_size=32)
    (operation,) = coded.meta["conversion"].operations
    assert (operation.kind, operation.method, operation.distribution) == ("convert", "coded", "surgery")
    assert {(site.role, site.block) for site in operation.sites if site.role == "energy"} == {
        ("energy", "layer2.0"),
        ("energy", "layer3.0"),
    }
    for site in operation.sites:
        graph = (coded.block(site.block) if site.block else coded).graph
        assert site.node in [node.name for node in graph.nodes]
