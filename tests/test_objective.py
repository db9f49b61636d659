"""The training side: terms, wrappers, taps, soft targets and parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel

import surgery
from surgery import ParameterRule
from surgery.errors import InvalidOption, TapNotFilled, UnsupportedModel
from surgery.taps import taps_of
from surgery.testing import ResidualSpec, tiny_networks
from tests.toys import Scale, Toy, installed, package

RESNEXT = tiny_networks()["resnext"]
LABELS = torch.tensor([1, 4, 9])


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32)


def coded(**options) -> surgery.ConvertedNetwork:
    return surgery.convert(RESNEXT(), "coded", input_size=32, **options)


def test_loss_is_the_task_plus_the_terms_of_the_method():
    model = coded()
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    assert criterion.terms == {}
    output = model(images())
    loss = criterion(output, LABELS)
    assert list(criterion.terms) == ["task", "coding"]
    assert torch.equal(criterion.terms["task"], F.cross_entropy(output, LABELS).detach())
    assert torch.equal(loss.detach(), criterion.terms["task"] + criterion.terms["coding"])
    assert not any(term.requires_grad for term in criterion.terms.values())
    assert loss.requires_grad


def test_terms_are_worked_out_from_the_method_of_the_record(monkeypatch):
    """Body values of 2 and a weight of 0.25: one block's mean square is 4, so the term is 1; the task is 0."""

    @dataclass(frozen=True)
    class Constant(Toy):
        def losses(self, step):
            assert step.progress == 2.5
            assert step.model is model
            assert isinstance(step.criterion, nn.CrossEntropyLoss)
            return {"size": self.weight * 4 * step.taps["stages.0.0/body"].new_ones(()), "task": step.output.sum() * 0}

    installed(monkeypatch, package(Constant))
    model = surgery.convert(ResidualSpec((1,)).build(), "toy", weight=0.25, input_size=32)
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    assert criterion(model(images()), LABELS, 2.5).item() == 1.0
    assert {name: term.item() for name, term in criterion.terms.items()} == {"task": 0.0, "size": 1.0}
    assert next(iter(criterion.terms)) == "task"


@pytest.mark.parametrize("progress", [0.0, 3.25, None])
def test_progress_reaches_the_method(monkeypatch, progress):
    seen = []

    @dataclass(frozen=True)
    class Watching(Toy):
        def losses(self, step):
            seen.append(step.progress)
            return {}

    installed(monkeypatch, package(Watching))
    model = surgery.convert(ResidualSpec((1,)).build(), "toy", input_size=32)
    surgery.Objective(model, nn.CrossEntropyLoss())(model(images()), LABELS, progress)
    assert seen == [progress]


def test_objective_has_no_parameters_and_does_not_switch_the_model():
    model = coded()
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    assert list(criterion.parameters()) == []
    assert [name for name, _ in criterion.named_modules()] == ["", "criterion"]
    criterion.eval()
    assert model.training
    assert not criterion.criterion.training
    criterion.train()
    model.eval()
    assert not model.training


def test_each_forward_is_consumed_once():
    model = coded()
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    output = model(images())
    criterion(output, LABELS)
    with pytest.raises(TapNotFilled, match=r"layer2\.0/energy.*train mode"):
        criterion(output, LABELS)
    assert not any(module._slot for module in model.modules() if isinstance(module, surgery.Tap))


def test_forward_in_eval_mode_leaves_nothing_to_read():
    model = coded().eval()
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    with pytest.raises(TapNotFilled, match="run the model in train mode, or in eval mode inside"):
        criterion(model(images()), LABELS)
    with surgery.record(model) as taps:
        model(images())
    assert all(taps[name].shape == (3, 8) for name in taps_of(model))


def test_a_loss_may_be_computed_inside_record_in_eval_mode():
    model = coded().eval()
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    with surgery.record(model):
        loss = criterion(model(images()), LABELS)
    assert loss.isfinite()


@dataclass(frozen=True)
class First(Toy):
    name: ClassVar[str] = "first"
    stacks: ClassVar[bool] = True

    def transform(self, architecture, rewriter):
        for block in architecture.residual_blocks():
            rewriter.insert(Scale(), block.body, at=block, role="scale")

    def losses(self, step):
        return {"task": step.output.sum()}


@dataclass(frozen=True)
class Second(First):
    name: ClassVar[str] = "second"


def test_two_owners_of_the_task_are_refused(monkeypatch):
    installed(monkeypatch, package(First, Second))
    model = surgery.convert(ResidualSpec((1,)).build(), "first", input_size=32)
    model = surgery.convert(model, "second")
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    with pytest.raises(InvalidOption, match="two methods of first, second define the term 'task'"):
        criterion(model(images()), LABELS)


def test_owner_of_the_task_replaces_the_criterion(monkeypatch):
    class Never(nn.Module):
        def forward(self, output, target):
            raise AssertionError("called")

    installed(monkeypatch, package(First))
    model = surgery.convert(ResidualSpec((1,)).build(), "first", input_size=32)
    output = model(images())
    assert torch.equal(surgery.Objective(model, Never())(output, LABELS), output.sum())


def test_loss_that_is_made_of_taps_alone_reaches_the_output_and_gives_it_no_gradient(monkeypatch):
    """FSDP waits for a gradient of the output. Without one it shares none, and two steps add up what they found."""

    @dataclass(frozen=True)
    class Taps(Toy):
        def losses(self, step):
            return {"task": torch.stack([body.square().mean() for body in step.taps.values()]).sum()}

    installed(monkeypatch, package(Taps))
    model = surgery.convert(ResidualSpec((1,)).build(), "toy", input_size=32)
    output = model(images())
    output.retain_grad()
    surgery.Objective(model, nn.CrossEntropyLoss())(output, LABELS).backward()
    assert torch.equal(output.grad, torch.zeros(3, 10))
    assert not model.head.weight.grad.any()
    assert model.stem[0].weight.grad.any()


def test_output_may_be_no_tensor_or_be_changed_before_the_backward_pass(monkeypatch):
    installed(monkeypatch, package(Toy))
    model = surgery.convert(ResidualSpec((1,)).build(), "toy", input_size=32)
    output = model(images())
    loss = surgery.Objective(model, nn.CrossEntropyLoss())(output, LABELS)
    with torch.no_grad():
        output.sigmoid_()  # for a metric
    loss.backward()
    expected = model.head.weight.grad.clone()

    class OfNamed(nn.CrossEntropyLoss):
        def forward(self, output, target):
            return super().forward(output["logits"], target)

    torch.manual_seed(0)
    model.zero_grad()
    surgery.Objective(model, OfNamed())({"logits": model(images())}, LABELS).backward()
    assert model.head.weight.grad.any()
    assert expected.any()


def test_term_that_is_no_scalar_is_refused(monkeypatch):
    class Wide(Toy):
        def losses(self, step):
            return {"size": step.output[:, 0]}

    installed(monkeypatch, package(Wide))
    model = surgery.convert(ResidualSpec((1,)).build(), "toy", input_size=32)
    with pytest.raises(InvalidOption, match=r"toy: the term 'size' has shape \(3,\), expected a scalar"):
        surgery.Objective(model, nn.CrossEntropyLoss())(model(images()), LABELS)


def test_unconverted_models_are_refused():
    with pytest.raises(
        UnsupportedModel, match=r"expected a converted network, found CifarResNet; call surgery\.convert"
    ):
        surgery.Objective(RESNEXT(), nn.CrossEntropyLoss())


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [DistributedDataParallel, DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_give_the_same_loss(process_group, wrap):
    x, plain = images(), coded(p_drop=0.0)
    expected = surgery.Objective(plain, nn.CrossEntropyLoss())(plain(x), LABELS)
    model = wrap(coded(p_drop=0.0))
    found = surgery.Objective(model, nn.CrossEntropyLoss())(model(x), LABELS)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiled_and_distributed_model_is_unwrapped_through_both(process_group):
    model = coded()
    wrapped = torch.compile(DistributedDataParallel(model), backend="eager")
    assert surgery.Objective(wrapped, nn.CrossEntropyLoss())._model == (model,)


def test_soft_targets_weigh_the_codewords():
    """One image, half class 0 and half class 3: the target of branch n is the mean of the two codewords' bits."""
    model = coded(p_drop=0.0, mu=3.0).double()
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    soft = torch.zeros(1, 10, dtype=torch.float64)
    soft[0, 0] = soft[0, 3] = 0.5
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    output = model(x)
    energies = {name: tap.value for name, tap in _taps(model).items()}
    loss = criterion(output, soft)
    expected = 0.0
    for name, path in (("layer2.0/energy", "layer2.0.conv3"), ("layer3.0/energy", "layer3.0.conv3")):
        words = model.get_submodule(path).codewords.double()
        ratio = words[0].mean()
        expected += ((ratio * energies[name][0] - (words[0] + words[3]) / 2) ** 4).mean()
    torch.testing.assert_close(criterion.terms["coding"], 3.0 * expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.terms["task"], F.cross_entropy(output, soft).detach(), rtol=1e-12, atol=0)
    assert torch.equal(loss.detach(), sum(criterion.terms.values()))


def _taps(model):
    return {module.name: module for module in model.modules() if isinstance(module, surgery.Tap)}


def test_targets_that_the_method_does_not_know_are_refused():
    model = coded()
    with pytest.raises(InvalidOption, match="10 classes of the scheme"):
        surgery.Objective(model, nn.MSELoss())(model(images()), torch.zeros(3, 4))


def test_pruned_network_trains_on_the_task_alone():
    pruned = surgery.prune(coded(), classes=[1, 4])
    criterion = surgery.Objective(pruned, nn.CrossEntropyLoss())
    output = pruned(images())
    assert torch.equal(criterion(output, torch.tensor([0, 1, 1])), F.cross_entropy(output, torch.tensor([0, 1, 1])))
    assert list(criterion.terms) == ["task"]


def grouped(groups) -> dict[int, tuple[float, float]]:
    """Return the learning rate and decay of every parameter, each of which must be there once."""
    found = [(id(p), (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_norms_and_biases_are_not_decayed_and_every_parameter_is_in_one_group():
    model = coded()
    found = grouped(surgery.param_groups(model, lr=0.1, weight_decay=5e-4))
    assert set(found) == {id(p) for p in model.parameters()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = name == "bias" or isinstance(module, nn.BatchNorm2d)
            assert found[id(parameter)] == (0.1, 0.0 if plain else 5e-4), f"{path}.{name}"
    assert {decay for _, decay in found.values()} == {0.0, 5e-4}


def test_frozen_parameters_are_left_out():
    source = RESNEXT()
    source.layer1.requires_grad_(False)
    model = surgery.convert(source, "coded", input_size=32)
    found = grouped(surgery.param_groups(model, lr=0.1, weight_decay=5e-4))
    assert set(found) == {id(p) for name, p in model.named_parameters() if not name.startswith("layer1.")}


def test_tied_parameters_are_in_one_group():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    model = Tied()
    assert set(grouped(surgery.param_groups(model, lr=0.1, weight_decay=0.5))) == {id(p) for p in model.parameters()}


def test_rules_of_the_method_set_rate_and_decay(monkeypatch):
    @dataclass(frozen=True)
    class Ruled(Toy):
        def parameter_rules(self, model):
            names = [name for name, _ in model.named_parameters() if name.endswith("scale.factor")]
            return (ParameterRule(frozenset(names), lr_scale=10.0, weight_decay=0.25),)

    installed(monkeypatch, package(Ruled))
    model = surgery.convert(ResidualSpec((1, 1)).build(), "toy", input_size=32)
    groups = surgery.param_groups(model, lr=0.01, weight_decay=5e-4)
    found = grouped(groups)
    factors = {id(module.factor) for module in model.modules() if isinstance(module, Scale)}
    assert len(factors) == 2
    assert {key for key, value in found.items() if value == (0.1, 0.25)} == factors
    assert [group["name"] for group in groups] == ["lr0.01_wd0.0005", "lr0.01_wd0", "lr0.1_wd0.25"]


def test_a_rule_can_scale_the_decay(monkeypatch):
    class Ruled(Toy):
        def parameter_rules(self, model):
            names = [name for name, _ in model.named_parameters() if name.endswith("scale.factor")]
            return (ParameterRule(frozenset(names), decay_scale=0.5),)

    installed(monkeypatch, package(Ruled))
    model = surgery.convert(ResidualSpec((1, 1)).build(), "toy", input_size=32)
    found = grouped(surgery.param_groups(model, lr=0.01, weight_decay=5e-4))
    factors = {id(module.factor) for module in model.modules() if isinstance(module, Scale)}
    assert {key for key, value in found.items() if value == (0.01, 2.5e-4)} == factors


def test_groups_of_a_wrapped_and_of_a_plain_model(process_group):
    model = coded()
    expected = [[id(p) for p in group["params"]] for group in surgery.param_groups(model, 0.1, 1e-4)]
    wrapped = DistributedDataParallel(model)
    assert [[id(p) for p in group["params"]] for group in surgery.param_groups(wrapped, 0.1, 1e-4)] == expected
    plain = timm.create_model("resnext11_4x4d")
    assert set(grouped(surgery.param_groups(plain, 0.1, 1e-4))) == {id(p) for p in plain.parameters()}


def test_names_that_the_network_lists_are_not_decayed():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 4))
            self.layer = nn.Linear(4, 4)

        def no_weight_decay(self):
            return {"token"}

    model = Listed()
    found = grouped(surgery.param_groups(model, lr=0.1, weight_decay=0.5))
    assert found == {id(model.token): (0.1, 0.0), id(model.layer.weight): (0.1, 0.5), id(model.layer.bias): (0.1, 0.0)}


def test_optimizer_takes_the_groups_and_a_step_changes_every_parameter():
    model = coded()
    optimizer = torch.optim.SGD(surgery.param_groups(model, lr=0.1, weight_decay=5e-4), momentum=0.9, nesterov=True)
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    criterion(model(images()), LABELS).backward()
    optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
