"""Where inclusive networks could go wrong: precisions, layouts, compilers, hooks, averages, norms, the command line."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import surgery
import surgery_inclusive
from surgery.cli import app
from surgery.show import show
from surgery.taps import taps_of
from surgery.testing import ResidualSpec, tiny_networks, unsettle
from surgery_inclusive.norms import IndependentNorm, SharedNorm
from surgery_inclusive.selection import subnetworks_of
from tests.plugins.inclusive.literal import gradients

K = 4
IMAGES = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(4)
NETWORKS = tiny_networks()
FORMS = {"dense": {}, "shared": {"norm": "shared"}, "sparse": {"sparse": True}}


@cache
def _inclusive(form, name):
    source = NETWORKS[name]().double()
    return unsettle(surgery.convert(source, "inclusive", input_size=32, subnetworks=K, **FORMS[form]), seed=1)


def inclusive(form="dense", name="resnext"):
    return copy.deepcopy(_inclusive(form, name))


def outputs(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def loss_of(model, images=IMAGES, target=TARGET):
    return surgery.Objective(model, nn.CrossEntropyLoss())(model(images), target)


def assert_same_gradients(found, expected):
    largest = max(float(value.abs().max()) for value in gradients(expected).values())
    assert gradients(found).keys() == gradients(expected).keys()
    for name, value in gradients(expected).items():
        torch.testing.assert_close(
            gradients(found)[name],
            value,
            rtol=1e-9,
            atol=1e-12 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_buffers(found, expected):
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(found.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


# --- precisions and layouts ---


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_network_of_half_precision_trains_to_finite_numbers(form, dtype):
    model = inclusive(form).to(dtype).train()
    output = model(IMAGES.to(dtype))
    assert output.dtype == dtype
    surgery.Objective(model, nn.CrossEntropyLoss())(output, TARGET).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize(("name", "training"), [("resnext", True), ("resnext", False), ("timm wide resnet", False)])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_gives_logits_and_gradients_near_those_of_float32(form, name, training):
    """Eight bits of mantissa: the direction of logits and of all gradients together stays."""
    model = inclusive(form, name).float().train(training)
    found = []
    for enabled in (False, True):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), surgery.record(twin) as taps:
            twin(IMAGES.float())
            logits = torch.cat([taps[f"logits/{k}"] for k in range(1, K + 1)])
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        F.cross_entropy(logits.float(), TARGET.repeat(K)).backward()
        assert {gradient.dtype for gradient in gradients(twin).values()} == {torch.float32}
        found.append((logits.detach().float().flatten(), torch.cat([g.flatten() for g in gradients(twin).values()])))
    for exact, near in zip(*found, strict=True):
        assert 0 < float((exact - near).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["resnext", "timm wide resnet"])
def test_channels_last_computes_the_same(form, name):
    model = inclusive(form, name).train()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    loss_of(model).backward()
    loss_of(twin, IMAGES.contiguous(memory_format=torch.channels_last)).backward()
    assert_same_gradients(twin, model)
    assert_same_buffers(twin, model)
    for found, expected in zip(
        surgery_inclusive.anytime(twin, IMAGES.contiguous(memory_format=torch.channels_last)),
        surgery_inclusive.anytime(model, IMAGES),
        strict=True,
    ):
        close(found, expected)


def test_a_batch_of_one_trains_where_the_norms_have_positions():
    for form in FORMS:
        model = inclusive(form).train()
        loss_of(model, IMAGES[:1], TARGET[:1]).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_of_one_without_positions_is_refused_as_by_plain_norms():
    for form in FORMS:
        model = inclusive(form, "torchvision wide resnet").train()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(IMAGES[:1])
        model.train()
        assert subnetworks_of(model).span == (0, K)
        loss_of(model).backward()


# --- compilers ---


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_compiled_training_equals_eager_training(form):
    torch._dynamo.reset()
    plain = inclusive(form).train()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="eager")
    for _ in range(2):
        for net in (plain, compiled):
            net.zero_grad()
            surgery.Objective(net, nn.CrossEntropyLoss())(net(IMAGES), TARGET).backward()
        assert_same_gradients(twin, plain)
    assert_same_buffers(twin, plain)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_compiled_network_runs_the_subnetwork_that_is_chosen(form):
    torch._dynamo.reset()
    plain = inclusive(form).eval()
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    for k in (1, 3, 1):
        with surgery_inclusive.use(compiled, k), surgery_inclusive.use(plain, k):
            close(outputs(compiled), outputs(plain))
    close(outputs(compiled), outputs(plain))


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_pruned_and_whole_networks_are_exported(form):
    model = inclusive(form).eval()
    for net in (surgery.prune(model, subnetwork=2), model):
        program = torch.export.export(net.eval(), (IMAGES,)).module()
        close(program(IMAGES).detach(), outputs(net))


@pytest.mark.parametrize("form", FORMS)
def test_functional_calls_take_other_weights(form):
    """torch.func: the gradient of a functional call with the weights of a copy is that of the copy."""
    model, other = inclusive(form).eval(), inclusive(form).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    weights = {name: parameter.detach() for name, parameter in other.named_parameters()}

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (IMAGES,)), TARGET)

    found = torch.func.grad(loss)(weights)
    F.cross_entropy(other(IMAGES), TARGET).backward()
    for name, gradient in gradients(other).items():
        close(found[name], gradient)


# --- taps, hooks, recomputing ---


@pytest.mark.parametrize("form", FORMS)
def test_taps_hold_what_ran_and_nothing_of_an_earlier_forward(form):
    model = inclusive(form).eval()
    with surgery.record(model) as taps:
        outputs(model)
    assert set(taps) == {f"logits/{k}" for k in range(1, K + 1)}
    with surgery.record(model) as taps, surgery_inclusive.use(model, 2):
        output = outputs(model)
    assert torch.equal(taps["logits/2"], output)
    for k in (1, 3, 4):
        with pytest.raises(surgery.SurgeryError):
            taps[f"logits/{k}"]


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_an_earlier_forward_are_not_taken_for_those_of_this_one(form):
    """A forward in eval mode fills no tap, and the thin ones still hold those of other images: a loss of both."""
    model = inclusive(form).train()
    model(IMAGES.flip(0))
    output = model.eval()(IMAGES)
    with pytest.raises(surgery.SurgeryError, match="no forward pass has filled this tap"):
        surgery.Objective(model, nn.CrossEntropyLoss())(output, TARGET)


@pytest.mark.parametrize("form", FORMS)
def test_a_recording_of_one_subnetwork_holds_no_logits_of_an_earlier_one(form):
    model = inclusive(form).eval()
    with surgery.record(model) as taps:
        model(IMAGES)
        with surgery_inclusive.use(model, 2):
            output = model(IMAGES * 2)
    assert torch.equal(taps["logits/2"], output)
    for k in (1, 3, 4):
        with pytest.raises(surgery.SurgeryError, match="no forward pass has filled this tap"):
            taps[f"logits/{k}"]


@pytest.mark.parametrize("form", FORMS)
def test_hooks_on_the_network_see_one_call_and_those_on_blocks_one_for_each_subnetwork(form):
    model, calls = inclusive(form).train(), []
    model.register_forward_hook(lambda module, args, output: calls.append("network"))
    model.block("layer1.0").register_forward_hook(lambda module, args, output: calls.append("block"))
    loss_of(model).backward()
    assert calls == ["block"] * (1 if form == "sparse" else K) + ["network"]


@pytest.mark.parametrize("form", FORMS)
def test_one_block_may_be_recomputed(form):
    plain = inclusive(form).train()
    twin = copy.deepcopy(plain)
    twin.block("layer2.0").grad_checkpointing = True
    for _ in range(2):
        for net in (plain, twin):
            net.zero_grad()
            loss_of(net).backward()
        assert_same_gradients(twin, plain)
    assert_same_buffers(twin, plain)


@pytest.mark.parametrize("form", FORMS)
def test_a_recomputed_block_behind_use_is_of_the_subnetwork_that_ran(form):
    """The backward pass runs when the selection is over."""
    plain = inclusive(form).train()
    twin = copy.deepcopy(plain)
    twin.set_grad_checkpointing()
    for net in (plain, twin):
        with surgery_inclusive.use(net, 2):
            loss = F.cross_entropy(net(IMAGES), TARGET)
        loss.backward()
    assert_same_gradients(twin, plain)
    assert_same_buffers(twin, plain)


@pytest.mark.parametrize("form", FORMS)
def test_use_in_training_trains_one_subnetwork_alone(form):
    """The gradients are those of the pruned one."""
    model = inclusive(form).train()
    pruned = surgery.prune(model, subnetwork=2).train()
    with surgery_inclusive.use(model, 2):
        loss = loss_of(model)
    expected = F.cross_entropy(pruned(IMAGES), TARGET)
    close(loss, expected)
    loss.backward(), expected.backward()
    total = sum(float(gradient.square().sum()) for gradient in gradients(model).values())
    assert total == pytest.approx(sum(float(value.square().sum()) for value in gradients(pruned).values()), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_two_halves_add_up(form):
    """Norms in eval mode: their statistics are of the whole batch."""
    whole, halves = inclusive(form).train(), inclusive(form).train()
    for net in (whole, halves):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    loss_of(whole).backward()
    for part in (slice(0, 2), slice(2, 4)):
        (loss_of(halves, IMAGES[part], TARGET[part]) / 2).backward()
    assert_same_gradients(halves, whole)
    assert taps_of(whole).keys() == taps_of(halves).keys()


# --- averages of weights ---


@pytest.mark.parametrize("form", FORMS)
def test_averaged_weights_are_those_of_all_subnetworks(form):
    model = inclusive(form)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        close(parameter, model.get_parameter(name) * 2 / 3)
    for k, found in enumerate(surgery_inclusive.anytime(average, IMAGES), start=1):
        with surgery_inclusive.use(average, k):
            close(found, outputs(average))


def test_an_exponential_average_by_deepcopy_follows_the_statistics():
    model = inclusive().train()
    average = timm.utils.ModelEmaV3(model, decay=0.5, foreach=False)
    path = "layer1.0.bn1.thin.0.running_mean"
    before = model.get_buffer(path).clone()
    loss_of(model)
    average.update(model)
    close(average.module.get_buffer(path), (before + model.get_buffer(path)) / 2)
    assert average.module.training is False


# --- norms ---


def norms_of(model, kind):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("form", FORMS)
def test_recalibration_moves_the_statistics_of_all_subnetworks_and_nothing_else(form):
    model = inclusive(form).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert surgery.recalibrate_bn(model, [IMAGES[:2], IMAGES[2:]]) == 2
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {
        name for name in before if name.endswith(("running_mean", "running_var", "_batches", "_batches_tracked"))
    }
    again = copy.deepcopy(model)
    surgery.recalibrate_bn(again, [IMAGES[:2], IMAGES[2:]])
    assert_same_buffers(again, model)
    assert model.training


def test_recalibration_inside_of_use_moves_one_subnetwork_alone():
    model = inclusive()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with surgery_inclusive.use(model, 2):
        surgery.recalibrate_bn(model, [IMAGES])
    for name, module in norms_of(model, IndependentNorm).items():
        for k, thin in enumerate(module.thin):
            same = torch.equal(thin.running_mean, before[f"{name}.thin.{k}.running_mean"])
            assert same == (k != 1)


def test_a_recalibrated_sparse_network_has_the_statistics_of_its_prefixes():
    """Each part's statistics are of its own values, whichever sub-network computes them."""
    whole, thin = inclusive("sparse"), inclusive("sparse")
    surgery.recalibrate_bn(whole, [IMAGES])
    with surgery_inclusive.use(thin, 2):
        surgery.recalibrate_bn(thin, [IMAGES])
    for name, module in norms_of(whole, SharedNorm).items():
        half = module.num_features // 2
        close(thin.get_submodule(name).running_mean[:half], module.running_mean[:half])
        close(thin.get_submodule(name).running_var[:half], module.running_var[:half])


@pytest.mark.parametrize("reload", [False, True])
def test_a_cumulative_average_of_shared_norms_goes_on_from_the_batches_before(reload):
    """Momentum None and three batches in the source: the next one has the weight 1/4, also from a state dict."""
    source = NETWORKS["resnext"]().double()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.num_batches_tracked.fill_(3)
    model = surgery.convert(source, "inclusive", input_size=32, subnetworks=2, sparse=True).train()
    if reload:
        model(3 * IMAGES)
        twin = surgery.convert(source, "inclusive", input_size=32, subnetworks=2, sparse=True).train()
        twin.load_state_dict(model.state_dict())
        model = twin
    norm, seen = model.get_submodule("bn1"), []
    before, weight = norm.running_mean.clone(), 1 / (5 if reload else 4)
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((0, 2, 3)).detach()))
    model(IMAGES)
    close(norm.running_mean, before + weight * (seen[0] - before))


def test_frozen_norms_leave_their_statistics_and_all_subnetworks_still_run():
    for form in FORMS:
        model = inclusive(form).train()
        for module in norms_of(model, nn.BatchNorm2d).values():
            module.eval()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        loss_of(model).backward()
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# --- what is printed, and the command line ---


@pytest.mark.parametrize("form", FORMS)
def test_what_was_done_is_shown(form):
    text = show(inclusive(form))
    assert "inclusive" in text
    assert "inclusive_subnetworks" in text
    assert f"{K}, sparse={form == 'sparse'}" in repr(subnetworks_of(inclusive(form)))


def call(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_converts_and_prunes(tmp_path):
    whole, thin = tmp_path / "whole.safetensors", tmp_path / "thin.safetensors"
    call("convert", "preresnext20_8x2d", "inclusive", "-o", "subnetworks=2", "-o", "sparse=true", "--out", str(whole))
    call("prune", str(whole), "-c", "subnetwork=1", "--out", str(thin))
    model, pruned = surgery.load(whole), surgery.load(thin)
    with surgery_inclusive.use(model, 1):
        torch.testing.assert_close(outputs(pruned, IMAGES.float()), outputs(model, IMAGES.float()))


def test_networks_without_norms_are_nested():
    source = ResidualSpec((1, 1), groups=4).build().double().eval()
    for path, module in list(source.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            source.set_submodule(path, nn.Identity())
    for options in FORMS.values():
        model = surgery.convert(source, "inclusive", input_size=32, subnetworks=2, **options).train()
        loss_of(model).backward()
        assert len(gradients(model)) == len(list(model.parameters()))
