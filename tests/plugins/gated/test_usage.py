"""Rates, multiply-adds and accuracies, against literal counts over the decisions of single images."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import surgery
from surgery.errors import InvalidOption
from surgery.models import CifarResNet, resnet
from surgery.testing import unsettle
from surgery_gated import AlwaysOn, Stochastic, Threshold, gated_blocks
from surgery_gated.inference import inference
from surgery_gated.method import Gated
from surgery_gated.usage import Usage, measure

CLASSES = 6
BODIES = {"layer1.0": 57_344, "layer2.0": 86_016, "layer3.0": 86_016}
"""Multiply-adds: 256 (4 4 + 9 4 4 + 4 16), 256 16 8 + 64 (9 8 8 + 8 32), 64 32 16 + 16 (9 16 16 + 16 64)."""
STEM_AND_HEAD = 256 * 27 * 4 + 64 * CLASSES
PROJECTIONS = 256 * 4 * 16 + 64 * 16 * 32 + 16 * 32 * 64
FULL = STEM_AND_HEAD + PROJECTIONS + sum(BODIES.values())
RATES = {"a": (1.0, 0.0, 0.5, 0.96), "b": (0.05, 0.9995, 0.9, 0.04)}
USAGE = Usage(20, "Threshold(tau=0.5)", RATES, RATES, 30.0, 40.0, 0.75)


def build(granularity, dependent):
    """Return a small network in eval mode, with gates that are open for some images."""
    torch.manual_seed(0)
    source = unsettle(CifarResNet(resnet(11, base=4), num_classes=CLASSES)).double()
    model = surgery.convert(
        source,
        Gated(granularity=granularity, dependent=dependent, group_size=2 if granularity == "channel" else None),
        input_size=16,
    )
    with torch.no_grad():
        for _, gates in gated_blocks(model):
            if dependent:
                gates.head.bias.zero_()
                gates.head.weight.normal_(std=2)
            else:
                gates.head.logits.normal_()
    return model.eval()


@pytest.fixture(scope="module", params=[("layer", True), ("layer", False), ("channel", True)], ids=str)
def model(request):
    """A network that every test leaves as it was."""
    return build(*request.param)


@pytest.fixture(scope="module")
def images():
    """Noise about a color of each image: gates read means over the positions."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(10, 3, 16, 16, dtype=torch.float64, generator=generator)
    return noise + 3 * torch.randn(10, 3, 1, 1, dtype=torch.float64, generator=generator)


def decisions_of(model, images):
    """Return the decisions of single images by block, in the order of the images."""
    found = []
    for image in images:
        with torch.no_grad(), surgery.record(model) as taps:
            model(image[None])
        found.append({name.removesuffix("/gates"): taps[name][0].tolist() for name in taps})
    return found


@pytest.mark.parametrize("mode", [Threshold(0.5), Threshold(0.6), AlwaysOn()], ids=str)
def test_rates_are_counts_over_single_images_whatever_the_batches(model, images, mode):
    with inference(model, mode):
        single = decisions_of(model, images)
        found = measure(model, images.split(4))  # 4, 4 and 2
        assert measure(model, [images]).rates == found.rates
    assert found.images == 10
    assert found.mode == str(mode)
    for path, rates in found.rates.items():
        counts = [sum(image[path][gate] for image in single) for gate in range(len(rates))]
        assert rates == tuple(count / 10 for count in counts)
    if mode == Threshold(0.5) and model.get_submodule("layer1.0.gated_gates").dependent:
        assert any(0 < rate < 1 for rates in found.rates.values() for rate in rates)


def test_layers_cost_the_sum_of_their_open_bodies_image_by_image(images):
    """Full 339,328; an image costs what is always computed plus 57,344, 86,016 and 86,016 for each open body."""
    model = build("layer", dependent=True)
    assert FULL == 339_328 == surgery.cost(CifarResNet(resnet(11, base=4), num_classes=CLASSES), 16).macs
    for block, gates in gated_blocks(model):
        gates.mode = Threshold(measure(model, [images]).probabilities[block.path][0])  # open for about half of them
    single = decisions_of(model, images)
    costs = [FULL - sum(BODIES[path] for path, (z,) in image.items() if z == 0) for image in single]
    assert len(set(costs)) > 3
    found = measure(model, images.split(3))
    assert found.macs == sum(costs) / 10
    assert found.full_macs == FULL
    assert found.macs_share == pytest.approx(sum(costs) / 10 / FULL, rel=1e-12)


def test_channels_cost_the_mean_of_products_and_not_the_product_of_means(images):
    """Each image: S^2 (a_in a_1 + 9 a_1 a_2 / s^2 + a_2 a_out / s^2) + S_out^2 C_in a_sht, with its own open channels.

    The sides S of the block inputs are 16, 16 and 8, the strides s 1, 2 and 2.
    """
    model = build("channel", dependent=True)
    roles = ("input", "inner", "inner_2", "output", "projection")
    costs = []
    for image in decisions_of(model, images):
        total = STEM_AND_HEAD
        for (path, values), side, stride, width in zip(image.items(), (16, 16, 8), (1, 2, 2), (4, 16, 32), strict=True):
            z = torch.tensor([values], dtype=torch.float64)
            masks = [model.get_submodule(f"{path}.gated_{role}").mask(z).sum().item() for role in roles]
            a_in, a_1, a_2, a_out, a_sht = masks
            s = stride**2
            total += side**2 * (a_in * a_1 + 9 * a_1 * a_2 / s + a_2 * a_out / s) + side**2 / s * width * a_sht
        costs.append(total)
    assert len(set(costs)) > 5
    found = measure(model, images.split(4))
    assert found.macs == pytest.approx(sum(costs) / 10, rel=1e-12)
    assert found.full_macs == pytest.approx(FULL, rel=1e-12)


def test_probabilities_are_means_over_the_images(model, images):
    """Against sigmoid(a_1 - a_0) of every image by itself, with all that was decided before it."""
    found = measure(model, images.split(4))
    sums = {path: torch.zeros(len(values), dtype=torch.float64) for path, values in found.probabilities.items()}
    twin = graphs_only(model)
    for block, gates in gated_blocks(twin):
        gates.register_forward_pre_hook(lambda g, x, path=block.path: add(sums[path], sigmoid(g.head(x[0]))))
    for image in images:
        with torch.no_grad():
            twin(image[None])
    assert list(sums) == ["layer1.0", "layer2.0", "layer3.0"]
    for path, values in found.probabilities.items():
        assert values == pytest.approx((sums[path] / 10).tolist(), rel=1e-10)


def add(total, values):
    total += values[0]


def sigmoid(logits):
    return 1 / (1 + torch.exp(logits[..., 0] - logits[..., 1]))


def graphs_only(model):
    twin = copy.deepcopy(model)
    for _, gates in gated_blocks(twin):
        gates.skipping = False
    return twin


def test_accuracy_counts_images_where_there_are_targets(model, images):
    with torch.no_grad():
        answers = model(images).argmax(dim=1)
    targets = torch.where(torch.arange(10) < 7, answers, (answers + 1) % CLASSES)
    batches = list(zip(images.split(4), targets.split(4), strict=True))
    assert measure(model, batches).accuracy == 0.7
    assert measure(model, [list(batch) for batch in batches]).accuracy == 0.7
    assert measure(model, images.split(4)).accuracy is None


def test_stochastic_rates_are_those_of_the_draws(model, images):
    with inference(model, Stochastic()):
        torch.manual_seed(7)
        found = measure(model, [images])
        torch.manual_seed(7)
        with torch.no_grad(), surgery.record(twin := graphs_only(model)) as taps:
            twin(images)
    for path, rates in found.rates.items():
        assert rates == tuple(taps[f"{path}/gates"].mean(dim=0).tolist())
    assert found.mode == "Stochastic()"


def test_measuring_leaves_the_network_as_it_was(model, images):
    """Modes of modules, gates, weights, statistics, hooks, and what a training forward left in the taps."""
    network = copy.deepcopy(model).train()
    for n, (_, gates) in enumerate(gated_blocks(network)):
        gates.skipping = n != 1
    network.get_submodule("layer2").eval()
    network(images)
    for broken in (False, True):
        before, weights = state(network), copy.deepcopy(network.state_dict())
        if broken:
            with pytest.raises(RuntimeError):
                measure(network, [images, images[:, :2]])
        else:
            measure(network, [images])
        assert state(network) == before
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def state(network):
    gates = [(module.mode, module.skipping, len(module._forward_pre_hooks)) for _, module in gated_blocks(network)]
    taps = [(tap.recording, dict(tap._slot)) for tap in network.modules() if isinstance(tap, surgery.Tap)]
    return gates, [module.training for module in network.modules()], taps


def test_nothing_is_skipped_while_it_is_measured(model, images, monkeypatch):
    def fails(*_):
        raise AssertionError("a block left work out")

    for name in ("run_layer", "run_channels"):
        monkeypatch.setattr(f"surgery_gated.skipping.{name}", fails)
    with pytest.raises(AssertionError, match="left work out"):
        model(images)
    assert measure(model, [images]).images == 10


def test_modes_that_differ_are_all_named(images):
    model = build("layer", dependent=False)
    next(gates for _, gates in gated_blocks(model)).mode = AlwaysOn()
    assert measure(model, [images]).mode == "AlwaysOn() and Threshold(tau=0.5)"


def test_polarization_counts_gates_that_are_nearly_always_on_or_off():
    """Of 8 gates: 1.0, 0.96, 0.9995 on; 0.0, 0.05, 0.04 off; 0.5, 0.9 between. At their mode: 1, 0 and 0.9995.

    Decisions that are the mode of their gate: (1 + 1 + 0.5 + 0.96 + 0.95 + 0.9995 + 0.9 + 0.96) / 8 = 0.9086875.
    """
    found = USAGE.polarization()
    assert (found.gates, found.tolerance) == (8, 0.05)
    assert (found.on, found.off, found.between, found.at_mode) == (3 / 8, 3 / 8, 2 / 8, 3 / 8)
    assert found.mode_share == pytest.approx(0.9086875, rel=1e-12)
    strict = USAGE.polarization(tolerance=0)
    assert (strict.on, strict.off) == (1 / 8, 1 / 8)
    loose = USAGE.polarization(tolerance=0.1)
    assert (loose.on, loose.off, loose.between) == (4 / 8, 3 / 8, 1 / 8)
    assert USAGE.rate == pytest.approx((1 + 0.5 + 0.96 + 0.05 + 0.9995 + 0.9 + 0.04) / 8, rel=1e-12)


@pytest.mark.parametrize("tolerance", [-0.1, 0.5, float("nan")])
def test_tolerances_that_let_a_gate_be_both_are_refused(tolerance):
    with pytest.raises(InvalidOption, match="expected a share in"):
        USAGE.polarization(tolerance)


def test_usage_is_json():
    data = USAGE.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["rates"] == {"a": [1.0, 0.0, 0.5, 0.96], "b": [0.05, 0.9995, 0.9, 0.04]}
    assert (data["macs"], data["full_macs"], data["macs_share"], data["accuracy"]) == (30, 40, 0.75, 0.75)
    assert data["polarization"]["on"] == 3 / 8
    assert replace(USAGE, accuracy=None).to_dict()["accuracy"] is None


def test_what_cannot_be_measured_is_refused(model, images):
    targets = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(InvalidOption, match="measure: found 0 images"):
        measure(model, [])
    with pytest.raises(InvalidOption, match="20 images, 10 of them with a target"):
        measure(model, [(images, targets), images])
    with pytest.raises(InvalidOption, match="found no gate in this CifarResNet"):
        measure(CifarResNet(resnet(11, base=4)), [images])
