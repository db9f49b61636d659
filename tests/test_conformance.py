"""The conformance kit: an honest method passes it, and every law is broken by a method made to break it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
import surgery_coded
from surgery.errors import ConformanceError, InvalidOption
from surgery.testing import (
    LAWS,
    OPTIONAL,
    ResidualSpec,
    assert_rewrites,
    check_method,
    plain_chain,
    tiny_networks,
)
from surgery.testing.conversion_laws import _compare_snapshots, _snapshot
from tests import toys
from tests.toys import Toy, installed, muted, package

RESNEXTS = {name: build for name, build in tiny_networks().items() if "resnext" in name}
TINY = {"residual": ResidualSpec((1, 1)).build}
BROKEN = {
    "installed": [toys.OtherName],
    "converts": [toys.TapClash],
    "options": [toys.LossyOptions],
    "original_untouched": [toys.Mutates, toys.AddsHooks],
    "preserves": [toys.FalseClaim],
    "settings_kept": [toys.Unfreezes],
    "source_weights_load": [toys.DropsWeights],
    "record": [toys.NoJson],
    "replays": [toys.Unrecorded],
    "unsupported_refused": [toys.ConvertsAnything],
    "modes": [toys.FrozenStatistics],
    "losses": [toys.NotANumber, toys.NoScalar],
    "gradients": [toys.UnusedParameter],
    "taps": [toys.LeakyTaps],
    "deepcopies": [toys.KeepsActivations],
    "saves_and_loads": [toys.ForgetsState],
    "pruned_smaller": [toys.WrongFigures, toys.PlansNothing],
    "pruned_equals_muted": [toys.PrunesAnother],
    "compiles": [toys.DiffersCompiled],
    "distributes": [toys.DiffersDistributed],
    "exports": [toys.CannotExport],
}
# Kept by the library itself: a method has no say in them, so none can break them alone.
BY_THE_CORE = {"twice_refused", "empty_plan", "pruned_saves_and_loads", "exports_to_onnx"}


def switched_off(model, criteria):
    """Compute the outputs of the classes with their branches alone, by the full network."""
    full = surgery_coded.mask_branches(model, criteria["classes"])
    return lambda images: full(images)[:, criteria["classes"]]


@pytest.mark.parametrize("name", ["resnext", "timm efficientnet", "wide resnet"])
def test_coded_keeps_every_law_on_what_the_matrix_leaves_out(name):
    build = tiny_networks()[name]
    report = check_method("coded", {name: build}, criteria={"classes": [3, 7]}, muted=switched_off)
    assert report.held == {name: tuple(law for law in LAWS if law not in OPTIONAL)}


def test_coded_forms_as_many_branches_as_it_is_told_in_every_family():
    laws = ["preserves", "gradients", "pruned_smaller", "pruned_equals_muted"]
    method = surgery_coded.Coded(branches=8)
    report = check_method(method, tiny_networks(), criteria={"classes": [0]}, muted=switched_off, laws=laws)
    assert report.held == dict.fromkeys(tiny_networks(), tuple(laws))


def test_honest_method_keeps_every_law(monkeypatch):
    installed(monkeypatch, package(Toy))
    report = check_method("toy{weight=0.5}", TINY, muted=muted)
    assert report.held == {"residual": tuple(law for law in LAWS if law not in OPTIONAL)}
    assert report.passed_over == {"residual": {}}
    assert str(report) == f"conformance of 'toy'\n  residual: {len(LAWS) - len(OPTIONAL)} laws hold"


@pytest.mark.parametrize(("law", "method"), [(law, method) for law, methods in BROKEN.items() for method in methods])
def test_broken_method_fails_with_the_name_of_the_law(law, method, monkeypatch):
    installed(monkeypatch, package(Toy if method is toys.OtherName else method))
    build = toys.remembered(RESNEXTS["resnext"])
    with pytest.raises(ConformanceError, match=rf"^{law}: toy on resnext: "):
        check_method(method(), {"resnext": build}, muted=muted, laws=[law] if law in LAWS else None)


def test_every_law_can_be_broken_and_says_what_it_holds():
    assert set(BROKEN) - {"converts"} | BY_THE_CORE == set(LAWS)
    assert all(law.__doc__ for law in LAWS.values())


def test_method_that_refuses_every_network_fails(monkeypatch):
    with pytest.raises(ConformanceError, match=r"^converts: coded refused every network"):
        check_method("coded", {"chain": plain_chain})


def test_refusal_without_a_reason_fails(monkeypatch):
    class Silent(Toy):
        def transform(self, architecture, rewriter):
            raise surgery.NothingConverted("no")

    installed(monkeypatch, package(Silent))
    with pytest.raises(ConformanceError, match=r"^converts: toy on residual: refused without a reason"):
        check_method(Silent(), TINY)


def test_options_that_do_not_fit_a_network_are_a_refusal():
    networks = {"thin": ResidualSpec((1,), groups=2).build, "wide": ResidualSpec((1,), groups=4).build}
    report = check_method("inclusive", networks, laws=["installed"])
    assert report.held == {"wide": ("installed",)}
    reason = "option 'subnetworks' is 4, but the blocks have 2 branches; expected one of 2"
    assert report.refused == {"thin": f"inclusive: {reason}"}


def test_pruning_laws_look_at_the_settled_network(monkeypatch):
    """Settled to 5, the factor of the first block makes the output that the pruned network is compared with another."""
    installed(monkeypatch, package(Toy))
    outputs = []

    def remember(model, criteria):
        silent = muted(model, criteria)
        outputs.append(silent(torch.ones(1, 3, 32, 32, dtype=torch.float64)))
        return silent

    def settle(model):
        next(module for module in model.modules() if isinstance(module, toys.Scale)).factor.data.fill_(5.0)

    for settled in (None, settle):
        check_method("toy", TINY, muted=remember, settle=settled, laws=["pruned_equals_muted"])
    assert not torch.equal(*outputs)


def test_pruning_laws_are_passed_over_where_criteria_are_needed():
    laws = ["pruned_smaller", "pruned_equals_muted", "modes"]
    report = check_method("coded", {"resnext": RESNEXTS["resnext"]}, laws=laws)
    assert report.held == {"resnext": ("modes",)}
    assert (
        "pass criteria= to check pruning; coded: prune expects classes="
        in report.passed_over["resnext"]["pruned_smaller"]
    )
    assert "pass muted=" in report.passed_over["resnext"]["pruned_equals_muted"]
    assert "pruned_smaller passed over" in str(report)


def test_unknown_law_is_refused():
    with pytest.raises(InvalidOption, match=r"unknown laws \['nonsense'\]; the laws are installed, options"):
        check_method("coded", laws=["nonsense"])


def test_onnx_law_holds_for_coded():
    laws = ["exports_to_onnx"]
    report = check_method("coded", {"resnext": RESNEXTS["resnext"]}, criteria={"classes": [3]}, laws=laws)
    assert report.held == {"resnext": ("exports_to_onnx",)}


@pytest.mark.parametrize("name", tiny_networks())
def test_tiny_networks_are_repeatable_small_and_unsettled(name):
    build = tiny_networks()[name]
    before = torch.random.get_rng_state()
    model, twin = build(), build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    found = surgery.inspect(model, 32)
    assert len(found.blocks) >= 3
    assert found.head.classes == 10
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.weight.std() > 0 and norm.running_var.std() > 0 for norm in norms)


def _rename(model):
    model.fc.renamed = "x"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("values", lambda model: model.fc.weight.data.mul_(2)),
        ("values", lambda model: model.bn1.running_mean.add_(1)),
        ("tensors", lambda model: model.fc.weight.requires_grad_(False)),
        ("tensors", lambda model: setattr(model.fc, "weight", nn.Parameter(model.fc.weight.detach().clone()))),
        ("modules", lambda model: setattr(model, "fc", nn.Linear(128, 10))),
        ("modes", lambda model: model.bn1.eval()),
        ("hooks", lambda model: model.fc.register_forward_hook(lambda *_: None)),
        ("attributes", _rename),
        ("attributes", lambda model: setattr(model.act1, "inplace", False)),
    ],
)
def test_any_change_of_the_original_is_seen(kind, change):
    model = RESNEXTS["resnext"]()
    before = _snapshot(model)
    _compare_snapshots(before, _snapshot(model), "untouched")
    change(model)
    with pytest.raises(ConformanceError, match=r"after, the (\w+) of the original differ") as caught:
        _compare_snapshots(before, _snapshot(model), "after")
    assert kind in str(caught.value) or kind == "modules"


def test_assert_rewrites_counts_nodes_and_compares_text(monkeypatch):
    installed(monkeypatch, package(Toy))
    network = ResidualSpec((1,), kind="basic").build()
    expected = """
        ResidualNetwork after convert toy: 2 nodes inserted (+), 0 replaced (~), 0 gone (-)
          x (input)
          stem.0(x)                                       Conv2d
    """
    converted = assert_rewrites(network, "toy", inserted=2, removed=0, replaced=0)
    assert isinstance(converted, surgery.ConvertedNetwork)
    text = surgery.show(converted, network) if callable(getattr(surgery, "show", None)) else None
    if text is not None:
        assert_rewrites(network, "toy", "\n".join(f"    {line}" for line in text.splitlines()))
    with pytest.raises(ConformanceError, match=r"^rewrites: toy on ResidualNetwork: 2 nodes inserted, expected 3"):
        assert_rewrites(network, "toy", inserted=3)
    with pytest.raises(ConformanceError, match=r"the text differs:\n--- expected\n\+\+\+ found"):
        assert_rewrites(network, "toy", expected)


def test_assert_rewrites_counts_replaced_calls():
    network = RESNEXTS["resnext"]()
    # Two coded stages of one block: a merge replaced in each, one mask drawn and fed into each.
    assert_rewrites(network, "coded{p_drop=0}", inserted=0, removed=0, replaced=2)
    assert_rewrites(network, "coded", inserted=4, removed=0, replaced=2)
