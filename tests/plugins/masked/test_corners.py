"""Where masked networks could go wrong: gradients inside blocks, precisions, layouts, compilers, files, processes."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck, ResNet
from torch import distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

import surgery
import surgery_masked
from surgery.calibration import RunningNorm
from surgery.testing import ResidualSpec, tiny_networks, unsettle
from surgery_masked.masks import Masks

NETWORKS = {name: build for name, build in tiny_networks().items() if "efficientnet" not in name}
RESNEXT = NETWORKS["resnext"]
IMAGES = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(4)


def small(**options):
    torch.manual_seed(0)
    shape = {"layers": (1, 2, 1, 1), "channels": (8, 16, 16, 16), "cardinality": 4, "base_width": 32}
    return unsettle(ResNet(Bottleneck, **{**shape, "num_classes": 10, **options}))


def preactivated():
    torch.manual_seed(0)
    shape = {"layers": (1, 2, 1, 1), "channels": (16, 32, 32, 32), "stem_chs": 8, "num_classes": 10}
    return unsettle(timm.create_model("resnetv2_50", **shape))


def masked(source, **options):
    return surgery.convert(source, "masked", input_size=32, **options)


def masks_of(model):
    [found] = [module for module in model.modules() if isinstance(module, Masks)]
    return found


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.detach().abs().max()))


def loss_of(model, images=IMAGES):
    return F.cross_entropy(model(images), TARGET)


def gradients(model):
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, expected):
    largest = max(float(value.abs().max()) for value in expected.values())
    assert set(found) == set(expected)
    for key, value in expected.items():
        named = lambda text, key=key: f"{key}: {text}"  # noqa: E731
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12 * largest, msg=named)


# --- gradients that end or begin inside a block ---

INSIDE = {
    "timm": (lambda: small(), "layer3.0.downsample.1"),
    "pre-activation": (preactivated, "stages.2.blocks.0.downsample.conv"),
    "wide": (NETWORKS["timm wide resnet"], "layer3.0.downsample.1"),
    "shortcut before body": (ResidualSpec((1, 1, 1), groups=4).build, "stages.2.0.shortcut.1"),
}


def seen(model, path):
    values = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: values.append(output))
    logits = model(IMAGES)
    handle.remove()
    return logits, values[-1]


def first_stream(value, like):
    """Return what one branch reads, which with full connectivity is what the source has there."""
    return value[:, : like.shape[1]]


@pytest.mark.parametrize("name", INSIDE)
def test_a_loss_on_a_projection_alone_reaches_what_is_before_it(name):
    """The branches of that block take no part in the loss."""
    build, path = INSIDE[name]
    source = build().double().eval()
    model = masked(source, connectivity="full")
    _, theirs = seen(source, path)
    _, ours = seen(model, path)
    theirs.square().sum().backward()
    first_stream(ours, theirs).square().sum().backward()
    expected = {key: value for key, value in gradients(source).items() if value.any()}
    assert len(expected) > 10
    found = {key: value for key, value in gradients(model).items() if value.any()}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("name", INSIDE)
def test_a_loss_on_a_projection_adds_to_that_on_the_logits(name):
    build, path = INSIDE[name]
    source = build().double().eval()
    model = masked(source, connectivity="full")
    found = []
    for net in (source, model):
        logits, value = seen(net, path)
        width = value.shape[1] if net is source else found[0]
        found.append(width)
        (F.cross_entropy(logits, TARGET) + value[:, :width].square().mean()).backward()
    assert_same_gradients(gradients(model), gradients(source))


@pytest.mark.parametrize("name", INSIDE)
def test_a_pass_to_the_projections_leaves_the_next_pass_alone(name):
    source = INSIDE[name][0]().double().eval()
    model = masked(source, connectivity="full")
    loss_of(source).backward()
    loss = loss_of(model)
    projections = [parameter for key, parameter in model.named_parameters() if "downsample" in key or "shortcut" in key]
    torch.autograd.grad(loss, projections, retain_graph=True)
    loss.backward()
    assert_same_gradients(gradients(model), gradients(source))


@pytest.mark.parametrize("name", INSIDE)
def test_a_pass_to_the_output_of_a_block_leaves_the_next_pass_alone(name):
    source = INSIDE[name][0]().double().eval()
    model = masked(source, connectivity="full")
    loss_of(source).backward()
    path = model.meta["architecture"].blocks[2].path
    logits, value = seen(model, path)
    loss = F.cross_entropy(logits, TARGET)
    [first] = torch.autograd.grad(loss, value, retain_graph=True)
    assert first.any()
    value.retain_grad()
    loss.backward()
    assert_same(value.grad, first)
    assert_same_gradients(gradients(model), gradients(source))


def test_full_backward_hooks_on_the_convolutions_leave_the_gradients_alone():
    source = small().double().eval()
    model = masked(source, connectivity="full")
    loss_of(source).backward()
    calls = []
    for name, module in model.named_modules():
        if name.endswith((".conv1", ".downsample.0")) and "layer1" not in name:
            module.register_full_backward_hook(lambda module, inputs, outputs: calls.append(outputs[0].abs().sum() > 0))
    loss_of(model).backward()
    assert len(calls) > 5
    assert all(calls)
    assert_same_gradients(gradients(model), gradients(source))


# --- precisions and layouts ---


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_a_network_of_half_precision_trains_to_finite_numbers(dtype, norm):
    model = masked(RESNEXT(), norm=norm).to(dtype).train()
    for _ in range(2):
        logits = model(IMAGES.to(dtype))
        assert logits.dtype == dtype
        F.cross_entropy(logits.float(), TARGET).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert masks_of(model).get_extra_state()[1:].any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("name", ["resnext", "torchvision mobilenetv2"])
def test_autocast_is_as_close_to_float32_as_that_of_the_source(name, norm, training):
    """Eight bits of mantissa give errors that depend on the network, so the source under autocast is the yardstick.

    Logits and gradients as a whole: single entries of a gradient are sums that cancel. The masked network rounds at
    other places than the source; measured on both networks, it is off by 0.7 to 1.5 times as much.
    """
    source = NETWORKS[name]().train(training)
    model = masked(source, connectivity="full", norm=norm)
    for ours, theirs in zip(autocast_errors(model), autocast_errors(source), strict=True):
        assert 0 < ours < 2 * theirs


def autocast_errors(model):
    """Return the errors of logits and of all gradients, relative to those of float32."""
    runs = []
    for enabled in (False, True):
        net = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = net(IMAGES.float())
        F.cross_entropy(logits.float(), TARGET).backward()
        assert {value.dtype for value in gradients(net).values()} == {torch.float32}
        runs.append((logits.detach().float(), torch.cat([value.flatten() for value in gradients(net).values()])))
    return [float((found - exact).norm() / exact.norm()) for exact, found in zip(*runs, strict=True)]


@pytest.mark.parametrize("name", ["resnext", "timm wide resnet", "timm mobilenetv2"])
def test_channels_last_images_and_weights_compute_the_same(name):
    model = masked(NETWORKS[name]().double(), connectivity="random").train()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = []
    for net, images in ((model, IMAGES), (twin, IMAGES.contiguous(memory_format=torch.channels_last))):
        loss = loss_of(net, images)
        loss.backward()
        found.append(loss.detach())
    assert_same(found[1], found[0])
    assert_same_gradients(gradients(twin), gradients(model))


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_none_or_one_passes_in_eval_mode(batch):
    model = masked(RESNEXT(), norm="branch").double().eval()
    with torch.no_grad():
        whole = model(IMAGES)
        assert_same(model(IMAGES[:batch]), whole[:batch]) if batch else None
        assert model(IMAGES[:batch]).shape == (batch, 10)


@pytest.mark.parametrize("size", [(17, 31), (33, 16)])
def test_images_of_odd_sizes_pass(size):
    source = small().double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert_same(masked(source, connectivity="full")(images), source(images))


# --- statistics ---


def norms_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, RunningNorm)}


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("name", ["resnext", "timm wide resnet", "torchvision mobilenetv2"])
def test_recalibration_moves_the_statistics_of_every_norm_and_nothing_else(name, norm):
    model = masked(NETWORKS[name](), norm=norm).train()
    loss_of(model, IMAGES.float()).backward()  # leaves a gradient for the masks
    before = {key: value.clone() for key, value in model.state_dict().items()}
    surgery.recalibrate_bn(model, [IMAGES[:2].float(), IMAGES[2:].float()])
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = {key for key in before if key.endswith(statistics)}
    assert moved == expected
    assert len(norms_of(model)) == len([module for module in NETWORKS[name]().modules() if _is_norm(module)])
    assert all(module.num_batches_tracked == 2 for module in norms_of(model).values())
    assert model.training


def _is_norm(module):
    return isinstance(module, nn.BatchNorm2d)


def test_recalibrated_statistics_are_the_average_over_the_batches():
    """Two batches: the average of the statistics that momentum 1 leaves after either alone."""
    model = masked(RESNEXT(), connectivity="random").double()
    single = []
    for batch in (IMAGES[:2], 3 * IMAGES[2:]):
        alone = copy.deepcopy(model).eval()
        for module in norms_of(alone).values():
            module.momentum = 1.0
            module.train()
        with torch.no_grad():
            alone(batch)
        single.append(alone.state_dict())
    surgery.recalibrate_bn(model, [IMAGES[:2], 3 * IMAGES[2:]])
    for name in norms_of(model):
        for kind in ("running_mean", "running_var"):
            first, second, found = (state[f"{name}.{kind}"] for state in (*single, model.state_dict()))
            assert not torch.equal(first, second)
            assert_same(found, (first + second) / 2)


@pytest.mark.parametrize("norm", ["shared", "branch"])
def test_statistics_begin_anew_where_they_are_reset(norm):
    for module in norms_of(masked(RESNEXT(), norm=norm)).values():
        module.reset_running_stats()
        assert not module.running_mean.any()
        assert bool((module.running_var == 1).all())
        assert module.num_batches_tracked == 0


# --- recomputing ---


@pytest.mark.parametrize("connectivity", ["learned", "random", "real"])
@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("switch", ["set_grad_checkpointing", "recompute"])
def test_recomputing_changes_neither_gradients_nor_statistics_nor_masks(connectivity, norm, switch):
    torch.manual_seed(0)
    options = {"connectivity": connectivity, "norm": norm}
    plain = masked(small().double(), **options)
    if switch == "recompute":
        again = masked(small().double(), recompute=True, **options)
        again.load_state_dict(plain.state_dict())
    else:
        again = copy.deepcopy(plain)
        again.set_grad_checkpointing(True)
    assert any(module.grad_checkpointing for module in map(again.block, paths(again)))
    assert not any(module.grad_checkpointing for module in map(plain.block, paths(plain)))
    for _ in range(2):
        for net in (plain.train(), again.train()):
            net.zero_grad()
            loss_of(net).backward()
        assert_same_gradients(gradients(again), gradients(plain))
    state = plain.state_dict()
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-6, atol=1e-7)  # real masks are of float32
    assert {int(module.num_batches_tracked) for module in norms_of(again).values()} == {2}
    assert masks_of(again).drawn == (2 if connectivity == "learned" else 0)


def paths(model):
    return [block.path for block in model.meta["architecture"].blocks]


# --- compilers, files, processes ---


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (RESNEXT, {}),
        (preactivated, {"norm": "branch"}),
        (RESNEXT, {"connectivity": "real", "norm": "branch"}),
        (preactivated, {"recompute": True}),
    ],
    ids=["learned", "pre-activation", "real", "recomputed"],
)
def test_compiled_training_equals_eager_training(build, options):
    torch._dynamo.reset()
    plain = masked(build().double(), **options).train()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="eager")
    for _ in range(2):
        for net in (plain, compiled):
            net.zero_grad()
            loss_of(net).backward()
        assert_same_gradients(gradients(twin), gradients(plain))
    torch.testing.assert_close(masks_of(twin).real, masks_of(plain).real, rtol=1e-6, atol=1e-7)
    assert not torch.equal(masks_of(plain).real, masks_of(masked(build())).real)
    for key, value in plain.state_dict().items():
        if "running" in key:
            assert_same(twin.state_dict()[key], value)


def frozen(source, **options):
    model = masked(source, **options)
    surgery_masked.freeze(model)
    return model


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("kind", ["frozen", "pruned"])
def test_exported_networks_compute_the_same(kind, norm):
    model = frozen(small().double(), connectivity="random", fan_in=2, norm=norm).eval()
    model = surgery.prune(model).eval() if kind == "pruned" else model
    program = torch.export.export(model, (IMAGES,)).module()
    with torch.no_grad():
        assert_same(program(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", ["frozen", "pruned"])
def test_onnx_files_compute_the_same(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = frozen(RESNEXT(), connectivity="random", fan_in=2).eval()
    model = surgery.prune(model).eval() if kind == "pruned" else model
    torch.onnx.export(model, (IMAGES.float(),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: IMAGES.float().numpy()})
    with torch.no_grad():
        # Another library's float32: relative to the largest logit.
        expected = model(IMAGES.float())
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"norm": "branch"}, {"recompute": True}, {"connectivity": "real"}], ids=str)
@pytest.mark.usefixtures("group")
def test_a_wrapped_network_trains_as_the_bare_one(options):
    plain = masked(RESNEXT().double(), **options).train()
    twin = copy.deepcopy(plain)
    wrapped = DistributedDataParallel(twin)
    for _ in range(3):
        losses = []
        for net in (plain, wrapped):
            net.zero_grad()
            losses.append(loss_of(net))
            losses[-1].backward()
        assert math.isclose(*(loss.item() for loss in losses), rel_tol=1e-10)
        assert_same_gradients(gradients(twin), gradients(plain))
    assert torch.equal(masks_of(twin).real, masks_of(plain).real)
    surgery_masked.freeze(wrapped)
    assert masks_of(twin).frozen
    assert surgery_masked.connectivity(wrapped).keys() == surgery_masked.connectivity(plain).keys()
    assert surgery_masked.used_branches(wrapped) == surgery_masked.used_branches(twin)


def test_a_masked_network_survives_its_file(tmp_path):
    model = masked(RESNEXT(), fan_in=3, norm="branch", aggregate="mean").train()
    loss_of(model, IMAGES.float()).backward()
    surgery.save(model, tmp_path / "masked.safetensors", factory=RESNEXT)
    twin = surgery.load(tmp_path / "masked.safetensors", factory=RESNEXT).train()
    for net in (model, twin):
        loss_of(net, IMAGES.float())
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert not torch.equal(masks_of(model).real, masks_of(masked(RESNEXT())).real)


def test_a_frozen_network_stays_frozen_in_its_file(tmp_path):
    model = masked(ResidualSpec((2,), groups=4).build()).train()
    surgery_masked.freeze(model)
    surgery.save(model, tmp_path / "masked.safetensors", factory=ResidualSpec((2,), groups=4).build)
    twin = surgery.load(tmp_path / "masked.safetensors", factory=ResidualSpec((2,), groups=4).build)
    assert masks_of(twin).frozen
