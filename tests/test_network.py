"""A network of blocks stays what its owner expects: its methods, names, hooks, modes and copies."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from surgery.analysis import inspect
from surgery.errors import NotKept, SurgeryError, UnsupportedModel
from surgery.network import BlockModule, ConvertedNetwork, SurgeryModule
from surgery.rewriter import Rewriter
from tests.stand_ins import rebuilt


def small(**options):
    return timm.create_model("resnext11_4x4d", **options).eval()


@pytest.fixture(scope="module")
def timm_resnet():
    return timm.create_model("resnet18").eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 16)


def test_the_api_of_a_timm_network_is_kept(timm_resnet):
    network = rebuilt(timm_resnet, 64)
    assert isinstance(network, ConvertedNetwork)
    assert type(network).__name__ == "ResNet"
    assert network.num_classes == 1000
    assert network.num_features == 512
    assert network.pretrained_cfg["architecture"] == "resnet18"
    assert network.default_cfg is network.pretrained_cfg
    assert network.feature_info == timm_resnet.feature_info
    assert network.get_classifier() is network.fc
    assert network.group_matcher() == timm_resnet.group_matcher()
    assert (
        network.no_weight_decay() == timm_resnet.no_weight_decay() if hasattr(timm_resnet, "no_weight_decay") else True
    )


def test_a_networks_list_of_undecayed_weights_is_kept():
    model = timm.create_model("vit_tiny_patch16_224")
    assert rebuilt(model).no_weight_decay() == model.no_weight_decay()


def test_features_and_head_are_those_of_the_source(timm_resnet):
    network = rebuilt(timm_resnet, 64)
    x = torch.rand(2, 3, 64, 64)
    features = network.forward_features(x)
    assert torch.equal(features, timm_resnet.forward_features(x))
    assert torch.equal(network.forward_head(features), network(x))
    assert torch.equal(
        network.forward_head(features, pre_logits=True), timm_resnet.forward_head(features, pre_logits=True)
    )


def test_gradients_flow_through_the_features(x):
    network = rebuilt(small())
    network.forward_features(x).sum().backward()
    assert network.conv1.weight.grad is not None


@pytest.mark.parametrize(
    "name", ["resnet18", "regnetx_002", "mobilenetv2_035", "efficientnet_b0", "resnetv2_18", "densenet121"]
)
def test_the_classifier_is_reset_as_the_source_does_it(name):
    model = timm.create_model(name).eval()
    network = rebuilt(model, 64)
    parameters, macs = inspect(network).params, inspect(network).macs
    network.reset_classifier(7)
    model.reset_classifier(7)
    model.load_state_dict(network.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network(x), model(x))
    assert network(x).shape == (2, 7)
    assert network.num_classes == 7
    found, expected = inspect(network), inspect(model, 64)
    assert (found.head, found.params, found.macs) == (expected.head, expected.params, expected.macs)
    assert found.params < parameters
    assert found.macs < macs
    operation = network.meta["conversion"].operations[-1]
    assert (operation.kind, operation.options["num_classes"]) == ("classifier", 7)


def test_the_classifier_can_be_taken_off_and_put_on(x):
    network = rebuilt(small(), 16)
    network.reset_classifier(0)
    assert network(x).shape == (2, network.num_features)
    assert inspect(network).head.classes is None
    network.reset_classifier(4)
    assert network(x).shape == (2, 4)
    assert inspect(network) == inspect(timm.create_model("resnext11_4x4d", num_classes=4), 16)


@pytest.mark.parametrize("method", ["forward_intermediates", "prune_intermediate_layers", "init_weights"])
def test_what_is_not_kept_says_so(timm_resnet, method):
    network = rebuilt(timm_resnet, 64)
    with pytest.raises(NotKept, match=f"ResNet.{method} is not kept by conversion.*use forward_features"):
        getattr(network, method)
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = network.nothing_of_the_kind
    assert not hasattr(network, method)


def test_methods_that_the_source_lacks_are_not_invented():
    network = rebuilt(torchvision.models.resnet18(), 32)
    for method in ("forward_features", "reset_classifier", "set_grad_checkpointing"):
        assert not hasattr(network, method)


def test_the_features_of_a_network_without_a_marked_end_are_refused(x):
    network = rebuilt(small())
    for node in network.graph.nodes:
        node.meta.pop("mark", None)
    with pytest.raises(NotKept, match="forward_features: the surgery moved the place"):
        network.forward_features(x)
    with pytest.raises(NotKept, match="forward_head: the surgery changed what happens behind"):
        network.forward_head(x)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_state_dict_keys_order_and_loading_are_those_of_the_source(library):
    make = {"timm": small, "torchvision": torchvision.models.mobilenet_v2}[library]
    model, other = make(), make()
    network = rebuilt(model, 32)
    assert list(network.state_dict()) == list(model.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in model.named_parameters()]
    network.load_state_dict(other.state_dict())
    assert torch.equal(network.eval()(torch.ones(2, 3, 32, 32)), other.eval()(torch.ones(2, 3, 32, 32)))


def test_the_source_is_untouched_and_shares_nothing(x):
    model = small()
    expected = model(x)
    network = rebuilt(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert type(model.layer1[0]).__name__ == "Bottleneck"
    assert not any(isinstance(module, SurgeryModule) for module in model.modules())


def test_blocks_are_modules_with_their_class_name_and_attributes():
    network = rebuilt(torchvision.models.resnet18(), 32)
    block = network.layer2[0]
    assert isinstance(block, BlockModule)
    assert type(block).__name__ == "BasicBlock"
    assert block.stride == 2
    assert block is network.block("layer2.0")


def test_containers_can_still_be_called(x):
    model = small()
    network = rebuilt(model)
    stem = network.act1(network.bn1(network.conv1(x)))
    assert isinstance(network.layer1, nn.Sequential)
    assert torch.equal(network.layer3(network.layer2(network.layer1(stem))), model.forward_features(x))


@pytest.mark.parametrize("path", ["", "layer1.0", "layer1.0.conv2", "fc", "bn1"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_network_its_blocks_and_its_layers_fire(x, path, when):
    calls = []

    def hook(module, inputs, output):
        calls.append(type(output))

    model = small()
    if when == "before":
        model.get_submodule(path).register_forward_hook(hook)
    network = rebuilt(model)
    if when == "after":
        network.get_submodule(path).register_forward_hook(hook)
    network(x)
    assert calls == [torch.Tensor]


def test_a_hook_that_would_never_fire_is_refused():
    model = small()
    model.layer1.register_forward_hook(lambda *_: None)
    with pytest.raises(
        UnsupportedModel, match="layer1: found a hook on a module that the converted network does not call"
    ):
        rebuilt(model)


def test_gradient_hooks_of_blocks_fire(x):
    network = rebuilt(small())
    calls = []
    network.layer2[0].register_full_backward_hook(lambda *_: calls.append(None))
    network(x).sum().backward()
    assert calls == [None]


def test_checkpointing_recomputes_every_block_with_the_same_gradients(x):
    network = rebuilt(small().double()).train()
    twin = copy.deepcopy(network)
    twin.set_grad_checkpointing()
    calls = {"plain": 0, "checkpointed": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    network.layer1[0].conv1.register_forward_hook(count("plain"))
    twin.layer1[0].conv1.register_forward_hook(count("checkpointed"))
    for model in (network, twin):
        model(x.double()).square().sum().backward()
    assert calls == {"plain": 1, "checkpointed": 2}
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in twin.named_parameters())
    twin.set_grad_checkpointing(enable=False)
    twin(x.double()).sum().backward()
    assert calls["checkpointed"] == 3


def test_checkpointing_draws_the_same_random_numbers_again(x):
    network = rebuilt(timm.create_model("resnet26t", drop_path_rate=0.5, drop_rate=0.3), 32).double().train()
    gradients = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        torch.manual_seed(0)
        network(x.double()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_a_deep_copy_keeps_everything_and_shares_nothing(x):
    network = rebuilt(small())
    network.remark = ["mine"]
    calls = []
    network.layer1[0].register_forward_hook(lambda *_: calls.append(None))
    network.conv1.weight.requires_grad_(requires_grad=False)
    network.layer1[0].conv1.eval()
    twin = copy.deepcopy(network)
    assert torch.equal(twin(x), network(x))
    assert calls == [None, None]
    assert twin.remark == ["mine"]
    assert twin.remark is not network.remark
    assert twin.meta == network.meta
    assert type(twin).__name__ == type(network).__name__
    assert type(twin.layer1[0]).__name__ == "Bottleneck"
    assert [m.training for m in twin.modules()] == [m.training for m in network.modules()]
    assert not twin.conv1.weight.requires_grad
    assert [node.name for node in twin.graph.nodes] == [node.name for node in network.graph.nodes]
    assert [node.meta for node in twin.graph.nodes] == [node.meta for node in network.graph.nodes]
    ours = {parameter.data_ptr() for parameter in network.parameters()}
    assert not any(parameter.data_ptr() in ours for parameter in twin.parameters())
    twin.reset_classifier(3)
    assert network(x).shape == (2, 10)


def test_recompiling_a_copy_leaves_the_original_alone(x):
    network = rebuilt(small())
    expected = network(x)
    twin = copy.deepcopy(network)
    block = twin.block("layer1.0")
    join = next(node for node in block.graph.nodes if node.name == inspect(twin).block("layer1.0").join)
    join.target = torch.sub
    block.recompile()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(network(x), expected)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return x + self.second(self.first(x))


def test_tied_weights_stay_tied():
    model = nn.Sequential(Tied(), nn.Conv2d(3, 3, 3))
    for network in (rebuilt(model, 8), copy.deepcopy(rebuilt(model, 8))):
        assert network.get_submodule("0").first.weight is network.get_submodule("0").second.weight
        assert len(list(network.parameters())) == len(list(model.parameters()))


def test_parametrized_weights_survive(x):
    model = small()
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv2)
    network = rebuilt(model)
    assert torch.equal(network(x), model(x))
    assert list(network.state_dict()) == list(model.state_dict())


def test_frozen_weights_device_type_and_memory_format_are_kept(x):
    model = small().double().to(memory_format=torch.channels_last)
    model.layer1.requires_grad_(requires_grad=False)
    network = rebuilt(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in network.named_parameters() if not parameter.requires_grad} == frozen
    assert network.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert network(x.double()).dtype == torch.float64
    features = network.forward_features(x.double().contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch.save"]
)
def test_pickling_is_refused_with_the_cure(write):
    with pytest.raises(SurgeryError, match=r"is not pickled; use surgery.save\(model, path\)"):
        write(rebuilt(small()))


def test_weights_alone_are_saved_and_loaded_without_pickle(x):
    network, other = rebuilt(small()), rebuilt(small())
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), network(x))


def test_compiles_into_one_graph(x):
    network = rebuilt(small())
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), network(x))


def test_exports_in_eval_mode(x):
    network = rebuilt(small())
    exported = torch.export.export(network, (x,))
    assert torch.equal(exported.module()(x), network(x))
    assert set(exported.state_dict) == set(network.state_dict())


def test_exports_a_checkpointed_network_too(x):
    network = rebuilt(small())
    network.set_grad_checkpointing()
    assert torch.equal(torch.export.export(network, (x,)).module()(x), network(x))


def test_runs_under_automatic_mixed_precision(x):
    network = rebuilt(small())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x).dtype == torch.bfloat16


@pytest.fixture
def single_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_trains_under_ddp_with_the_same_gradients(single_process, x):
    network = rebuilt(small().double()).train()
    twin = copy.deepcopy(network)
    wrapped = DistributedDataParallel(twin)
    for model in (network, wrapped):
        model(x.double()).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=0)


def test_blocks_can_be_sharded_one_by_one(single_process, x):
    network = rebuilt(small().double()).train()
    expected = copy.deepcopy(network)(x.double())
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in [module for module in network.modules() if isinstance(module, BlockModule)]:
        dist.fsdp.fully_shard(block, mesh=mesh)
    dist.fsdp.fully_shard(network, mesh=mesh)
    output = network(x.double())
    output.sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=0)


class Zero(nn.Module):
    """Compute a block as zero, or leave it to the graph."""

    runs_block = True

    def __init__(self):
        super().__init__()
        self.willing = True

    def forward(self, x):
        return x

    def run(self, block, x):
        return x.new_zeros(len(x), 64, *x.shape[2:]) if self.willing else None


@pytest.fixture
def run_by_zero():
    network = rebuilt(small(), 16)
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer1.0")
    rewriter.insert(Zero(), block.input, at=block, role="zero")
    return rewriter.finish()


def test_a_runner_computes_its_block_in_eager_eval_mode(run_by_zero):
    block = run_by_zero.block("layer1.0")
    inside = torch.rand(2, 16, 8, 8)
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    assert not block(inside).any()
    assert not seen[0].any()
    assert block.train()(inside).any()
    assert block.eval()(inside).any() == copy.deepcopy(block)(inside).any() == torch.tensor(False)
    block.test_zero.willing = False
    assert block(inside).any()


def test_what_is_compiled_exported_or_traced_is_the_graph(run_by_zero, x):
    zero = run_by_zero(x)
    run_by_zero.block("layer1.0").test_zero.willing = False
    plain = run_by_zero(x)
    run_by_zero.block("layer1.0").test_zero.willing = True
    assert not torch.equal(zero, plain)
    assert torch.equal(torch.compile(run_by_zero, backend="eager", fullgraph=True)(x), plain)
    assert torch.equal(torch.export.export(run_by_zero, (x,)).module()(x), plain)
    assert torch.equal(torch.jit.trace(run_by_zero, x, check_trace=False)(x), plain)


class Twice(nn.Module):
    """Run the network twice and add the results up; it also shows the graph how often that was."""

    repeats_network = True

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x

    def repeat(self, network, forward, *args):
        return forward(*args) + forward(*args) if network.training else forward(*args)


def repeated(model):
    network = rebuilt(model, 16)
    rewriter = Rewriter(network, "toy")
    rewriter.insert(Twice(), "x", at=None, role="twice")
    return rewriter.finish()


def test_a_repeater_decides_how_often_the_graph_runs(x):
    model = small()
    network = repeated(model).train()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()  # the second run would read other statistics
    assert torch.equal(network(x), 2 * model(x))
    assert network.toy_twice.runs == 2
    assert torch.equal(network.eval()(x), model(x))
    assert network.toy_twice.runs == 3


def test_a_repeater_works_in_copies_on_their_own_modules(x):
    network = repeated(small()).train()
    twin = copy.deepcopy(network)
    twin(x)
    assert (network.toy_twice.runs, twin.toy_twice.runs) == (0, 2)


def test_removing_the_repeater_leaves_a_plain_network(x):
    model = small()
    network = repeated(model)
    rewriter = Rewriter(network, "toy")
    rewriter.remove("toy_twice")
    plain = rewriter.finish().train()
    assert torch.equal(plain(x), small_like(model, x))
    assert not hasattr(type(plain).forward, "__wrapped__")


def small_like(model, x):
    return copy.deepcopy(model).train()(x)


def test_the_classifier_is_not_reset_where_a_method_lets_it_read_more():
    network = rebuilt(small(), 16)
    rewriter = Rewriter(network, "toy")

    class Two(nn.Linear):
        def forward(self, features, other):
            return super().forward(features)

    linear = network.fc
    rewriter.replace("fc", Two(linear.in_features, linear.out_features), "x")
    with pytest.raises(NotKept, match="reset_classifier: fc is a Two that reads more than the features"):
        rewriter.finish().reset_classifier(3)
