"""Plans: figures worked out by hand, the way through JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import surgery
from surgery import Cut, PrunePlan
from surgery.cost import cost
from surgery.errors import InvalidOption, PruneError, SurgeryError, UnsupportedModel
from surgery.figures import Figures
from surgery.testing import ResidualSpec, tiny_networks
from tests.toys import Toy, installed, package

ONE_BLOCK = ResidualSpec((1,), groups=8, width=2)


def coded(spec: ResidualSpec = ONE_BLOCK, size: int = 8, **options) -> surgery.ConvertedNetwork:
    options = {"scheme": {"stages.0": "4/8"}, **options}
    return surgery.convert(spec.build(), "coded", input_size=size, **options)


def test_figures_are_those_worked_out_by_hand():
    """One bottleneck of 8 branches, 2 channels wide, at 8 x 8 pixels; half of the branches and one of ten classes stay.

    Weights: stem 3*16*9 = 432; 1x1 16*16 = 256 (128 stay); 3x3 in 8 groups 16*2*9 = 288 (144); 1x1 16*32 = 512 (256);
    projection 16*32 = 512; head 32*10 + 10 = 330 (33). Norms: stem 32, hidden 32 and 32 (16 and 16), output 64,
    projection 64.
    Parameters: 432 + 256 + 288 + 512 + 512 + 330 + 224 = 2554; 432 + 128 + 144 + 256 + 512 + 33 + 192 = 1697.
    Multiply-adds: 64 * (432 + 256 + 288 + 512 + 512) + 320 = 128320; 64 * (432 + 128 + 144 + 256 + 512) + 32 = 94240.
    """
    plan = surgery.plan(coded(), classes=[3])
    assert plan.before == Figures(2554, 128320, 576, 64 * 512)
    assert plan.after == Figures(1697, 94240, 576, 64 * 512)
    assert plan.kept_params == 1697 / 2554
    assert plan.kept_params_without_projections == (1697 - 576) / (2554 - 576)


def test_figures_are_those_of_the_pruned_network_and_the_cut_weights_have_the_shapes_worked_out():
    model = coded()
    plan = surgery.plan(model, classes=[3])
    pruned = surgery.prune(model, plan)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == plan.after.params
    assert cost(pruned).macs == plan.after.macs
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters() if tensor.dim() > 1}
    assert shapes == {
        "stem.0.weight": (16, 3, 3, 3),
        "stages.0.0.convs.0.weight": (8, 16, 1, 1),
        "stages.0.0.convs.1.weight": (8, 2, 3, 3),
        "stages.0.0.convs.2.weight": (32, 8, 1, 1),
        "stages.0.0.shortcut.0.weight": (32, 16, 1, 1),
        "head.weight": (1, 32),
    }
    block = surgery.inspect(pruned).block("stages.0.0")
    assert (block.cardinality, block.channels.hidden, block.channels.output) == (4, 8, 32)
    assert block.macs == plan.after.macs - 64 * 432 - 32
    assert surgery.inspect(pruned).head.classes == 1


def test_kept_weights_are_those_of_the_kept_branches_and_classes():
    model = coded()
    plan = surgery.plan(model, classes=[3, 7])
    keep = plan.cuts[0].keep
    channels = [2 * branch + offset for branch in keep for offset in (0, 1)]
    pruned, state = surgery.prune(model, plan).state_dict(), model.state_dict()
    assert torch.equal(pruned["stages.0.0.convs.0.weight"], state["stages.0.0.convs.0.weight"][channels])
    assert torch.equal(pruned["stages.0.0.convs.1.weight"], state["stages.0.0.convs.1.weight"][channels])
    assert torch.equal(pruned["stages.0.0.convs.2.weight"], state["stages.0.0.convs.2.weight"][:, channels])
    assert torch.equal(pruned["stages.0.0.norms.1.running_var"], state["stages.0.0.norms.1.running_var"][channels])
    assert torch.equal(pruned["head.weight"], state["head.weight"][[3, 7]])
    assert torch.equal(pruned["head.bias"], state["head.bias"][[3, 7]])


def test_plan_prints_what_goes_and_what_that_saves():
    assert str(surgery.plan(coded(), classes=[3])).splitlines() == [
        "prune plan of 'coded' for {'classes': [3]}",
        "  stages.0.0: 4 of 8 branches kept (codeword of class 3)",
        "  head: 1 of 10 classes kept (the classes asked for)",
        "  parameters            2,554 ->           1,697  (66.4 % kept)",
        "  MACs                128,320 ->          94,240  (73.4 % kept)",
        "without projection shortcuts",
        "  parameters            1,978 ->           1,121  (56.7 % kept)",
        "  MACs                 95,552 ->          61,472  (64.3 % kept)",
    ]


def test_plan_survives_json_and_prunes_the_same():
    model = coded()
    plan = surgery.plan(model, classes=[3, 1])
    again = PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(surgery.prune(model, again).eval()(x), surgery.prune(model, classes=[3, 1]).eval()(x))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("cuts"),
        lambda data: data.pop("after"),
        lambda data: data["before"].pop("macs"),
        lambda data: data["cuts"][0].pop("keep"),
        lambda data: data["cuts"][0].update(extra=1),
    ],
)
def test_damaged_plan_is_refused(damage):
    data = json.loads(json.dumps(surgery.plan(coded(), classes=[3]).to_dict()))
    damage(data)
    with pytest.raises(PruneError, match="the prune plan is incomplete or edited"):
        PrunePlan.from_dict(data)


def test_planning_and_pruning_leave_the_model_alone():
    model = coded()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    code = model.block("stages.0.0").code
    architecture, record = surgery.inspect(model), model.meta["conversion"]
    surgery.prune(model, surgery.plan(model, classes=[3]))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.block("stages.0.0").code == code
    assert surgery.inspect(model) == architecture
    assert model.meta["conversion"] == record


def test_plan_copies_no_weight(monkeypatch):
    """A plan is worked out on the meta device: the largest network can be planned where it fits once."""
    model, clone = coded(), torch.Tensor.clone

    def meta_only(tensor, *args, **kwargs):
        assert tensor.is_meta
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", meta_only)
    assert surgery.plan(model, classes=[3]).after.params == 1697


@pytest.mark.parametrize(
    "spec",
    [
        ResidualSpec((1,), groups=16, width=2),
        ResidualSpec((1,), groups=8, width=3),
        ResidualSpec((2,), groups=8, width=2),
        ResidualSpec((1, 1), groups=8, width=2),
    ],
)
def test_plan_for_another_network_is_refused(spec):
    plan = surgery.plan(coded(), classes=[3])
    active = "8/16" if spec.groups == 16 else "4/8"
    with pytest.raises(PruneError, match="plan"):
        surgery.prune(coded(spec, scheme={"stages.0": active}), plan)


def test_plan_of_another_method_is_refused():
    plan = replace(surgery.plan(coded(), classes=[3]), method="another")
    with pytest.raises(PruneError, match="'another', but the network is converted by coded"):
        surgery.prune(coded(), plan)


@pytest.mark.parametrize(
    "cut",
    [
        Cut("branches", "stages.9.0", (0,), 8),
        Cut("branches", "stages.0.0", (0, 99), 8),
        Cut("branches", "stages.0.0", (), 8),
        Cut("branches", "stages.0.0", (0,), 5),
        Cut("classes", "head", (0, 10), 10),
        Cut("classes", "head", (), 10),
        Cut("classes", "elsewhere", (0,), 10),
        Cut("classes", "head", (0,), 7),
        Cut("body", "stem", (), 1),
    ],
)
def test_cuts_that_do_not_fit_are_refused(cut):
    with pytest.raises(SurgeryError):
        PrunePlan.of(coded(), "coded", [cut], {})


def test_pruned_network_is_not_pruned_again():
    model = coded()
    pruned = surgery.prune(model, classes=[3, 4])
    for attempt in (
        lambda: surgery.prune(pruned, classes=[0]),
        lambda: surgery.plan(pruned, classes=[0]),
        lambda: surgery.prune(pruned, surgery.plan(model, classes=[0])),
    ):
        with pytest.raises(PruneError, match="pruned already; plan and prune the converted network it came from"):
            attempt()


def test_unconverted_and_wrapped_models_are_refused():
    with pytest.raises(PruneError, match=r"ResidualNetwork is not a converted network; call surgery\.convert"):
        surgery.prune(ONE_BLOCK.build(), classes=[0])
    with pytest.raises(UnsupportedModel, match="wrapped in DataParallel"):
        surgery.plan(DataParallel(coded()), classes=[0])


@pytest.mark.parametrize("classes", [[], [10], [-1], [1, 1], ["3"], [2.0]])
def test_classes_that_do_not_exist_are_refused(classes):
    with pytest.raises(InvalidOption, match=r"expected distinct class indices from 0 to 9 such as \[3\], at least one"):
        surgery.plan(coded(), classes=classes)


@pytest.mark.parametrize("criteria", [{}, {"kept": [1]}, {"classes": [1], "ratio": 0.5}])
def test_criteria_that_the_method_does_not_know_are_refused(criteria):
    with pytest.raises(InvalidOption, match=r"coded: prune expects classes=\[\.\.\.\]"):
        surgery.prune(coded(), **criteria)


def test_plan_together_with_criteria_is_refused():
    model = coded()
    with pytest.raises(InvalidOption, match=r"pass either a plan or criteria, found both: \['classes'\]"):
        surgery.prune(model, surgery.plan(model, classes=[1]), classes=[1])


def test_plan_of_a_method_that_did_not_convert_the_network_is_refused():
    with pytest.raises(InvalidOption, match="'toy' has not converted this network; coded has"):
        surgery.plan(coded(), method="toy", classes=[1])
    assert surgery.plan(coded(), method="coded", classes=[1]).method == "coded"


def test_bypassing_a_body_leaves_the_shortcut(monkeypatch):
    """Without its body a block is the activation of its projection; its convolutions are gone."""
    installed(monkeypatch, package(Toy))
    model = surgery.convert(ONE_BLOCK.build(), "toy", input_size=8)
    plan = surgery.plan(model)
    # The body's weights (256 + 288 + 512), its norms (128) and the factor of the toy go.
    assert plan.before.params - plan.after.params == 256 + 288 + 512 + 128 + 1
    assert plan.before.macs - plan.after.macs == 64 * (256 + 288 + 512)
    pruned = surgery.prune(model, plan).eval()
    block, x = ONE_BLOCK.build().eval().stages[0][0], torch.randn(2, 16, 8, 8)
    assert torch.equal(pruned.block("stages.0.0")(x), block.act(block.shortcut(x)))
    assert list(pruned.block("stages.0.0").state_dict()) == [f"shortcut.{name}" for name in block.shortcut.state_dict()]


def test_pruned_network_keeps_mode_dtype_and_api():
    model = surgery.convert(tiny_networks()["resnext"]().double().eval(), "coded", input_size=32)
    pruned = surgery.prune(model, classes=[1, 2, 5])
    assert not any(module.training for module in pruned.modules())
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.float64}
    assert pruned.num_classes == 3
    assert pruned.get_classifier().out_features == 3
    assert surgery.prune(model.train(), classes=[1]).training


def test_pruned_network_trains_and_recalibrates():
    pruned = surgery.prune(coded(), classes=[3, 4]).train()
    loss = nn.functional.cross_entropy(pruned(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    assert surgery.recalibrate_bn(pruned, batches) == 3


def test_record_of_a_pruned_network_holds_the_plan():
    model = coded()
    plan = surgery.plan(model, classes=[3])
    record = surgery.prune(model, plan).meta["conversion"]
    assert [operation.kind for operation in record.operations] == ["convert", "prune"]
    assert PrunePlan.from_dict(record.operations[-1].options) == plan
    assert {site.block for site in record.operations[-1].sites} == {"stages.0.0", ""}
