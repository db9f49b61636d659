"""Work that closed gates save: the result is that of multiplying by them, and the work is really left out."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import surgery
import surgery_gated
from surgery_gated.inference import set_inference
from surgery_gated.macs import network_macs
from surgery_gated.ranges import add_ranges, ranges_of, take_ranges

NETWORKS = ("resnet18", "resnext50_32x4d", "mobilenet_v2", "efficientnet_b0")


class Fixed(nn.Module):
    """Logits that open the gates in `decisions` (B, G)."""

    def __init__(self, decisions):
        super().__init__()
        self.decisions = self.logits = decisions

    def forward(self, x):
        return torch.stack([1 - self.decisions, self.decisions], dim=-1)


def gated(source, granularity, batch, keep=0.5, seed=0):
    """Return a network whose gates are open at random, the same for every forward."""
    network = surgery.convert(source, "gated", granularity=granularity).eval()
    generator = torch.Generator().manual_seed(seed)
    for _, gates in surgery_gated.gated_blocks(network):
        decisions = (torch.rand(batch, gates.count, generator=generator) < keep).double()
        gates.head = Fixed(decisions).eval()
    return network


def source_of(name, **options):
    """Return a network in float64 with norms that are no identity."""
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def multiplied(network, images):
    """Return the output of the graphs, which multiply."""
    twin = copy.deepcopy(network)
    for _, gates in surgery_gated.gated_blocks(twin):
        gates.skipping = False
    return twin(images)


def decide(network, decisions):
    for _, gates in surgery_gated.gated_blocks(network):
        gates.head = Fixed(decisions.double()).eval()


def calls_of(network, images):
    """Return the number of samples that every convolution that is called sees, by path."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: len(inputs[0])}))
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_skipped_layers_equal_multiplied_ones(name, memory, images):
    network = gated(source_of(name), "layer", 5)
    images = images.contiguous(memory_format=memory)
    torch.testing.assert_close(network(images), multiplied(network, images), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_cut_channels_equal_multiplied_ones(name, images):
    network = gated(source_of(name), "channel", 1)
    torch.testing.assert_close(network(images[:1]), multiplied(network, images[:1]), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_blocks_with_the_activation_in_front_equal_multiplied_ones(images):
    source = timm.create_model("resnetv2_50", pretrained=False, num_classes=10).double().eval()
    for granularity, batch in (("layer", 5), ("channel", 1)):
        network = gated(source, granularity, batch)
        found, expected = network(images[:batch]), multiplied(network, images[:batch])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_body_runs_on_the_open_samples_only(images):
    network = gated(source_of("resnet18"), "layer", 5)
    decide(network, torch.tensor([1, 0, 0, 1, 1])[:, None])
    seen = calls_of(network, images)
    assert {path: n for path, n in seen.items() if ".conv" in path} == {
        f"layer{stage}.{block}.conv{conv}": 3 for stage in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)
    }
    assert {n for path, n in seen.items() if "downsample" in path} == {5}


@torch.no_grad()
def test_no_layer_of_a_body_is_called_where_no_sample_needs_it(images):
    network = gated(source_of("resnet18"), "layer", 5)
    decide(network, torch.zeros(5, 1))
    assert not [path for path in calls_of(network, images) if ".conv" in path]
    torch.testing.assert_close(network(images), multiplied(network, images), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("granularity", "batch"), [("layer", 5), ("channel", 1)])
def test_open_gates_change_no_bit(granularity, batch, images):
    source = source_of("resnext50_32x4d")
    network = gated(source, granularity, batch, keep=1)
    assert torch.equal(network(images[:batch]), source(images[:batch]))


@torch.no_grad()
def test_the_arguments_are_left_as_they_were(images):
    """A block of layer1 reads what the test hands it: neither the addition nor the activation may write there."""
    network = gated(source_of("resnet18"), "layer", 5)
    decide(network, torch.tensor([1, 0, 0, 1, 0])[:, None])
    x = torch.randn(5, 64, 8, 8, dtype=torch.float64)
    before = x.clone()
    for decisions in (torch.zeros(5, 1), torch.tensor([[1], [0], [0], [1], [0]]), torch.ones(5, 1)):
        decide(network, decisions)
        assert network.get_submodule("layer1.1")(x) is not x
        assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize(("granularity", "batch"), [("layer", 5), ("channel", 1)])
def test_decisions_are_recorded(granularity, batch, images):
    network = gated(source_of("resnet18"), granularity, batch)
    with surgery.record(network) as taps:
        network(images[:batch])
    for block, gates in surgery_gated.gated_blocks(network):
        assert torch.equal(taps[f"{block.path}/gates"], gates.head.decisions)


@torch.no_grad()
def test_the_graph_runs_where_a_norm_collects_statistics(images):
    """Every norm sees five samples, whatever the gates say."""
    network = gated(source_of("resnet18"), "layer", 5)
    decide(network, torch.zeros(5, 1))
    network.get_submodule("layer1.0.bn1").train()
    assert calls_of(network, images)["layer1.0.conv1"] == 5
    assert "layer1.1.conv1" not in calls_of(network, images)


@torch.no_grad()
def test_a_tap_inside_the_body_sees_every_sample_while_it_records(images):
    network = gated(source_of("resnet18"), "layer", 5)
    decide(network, torch.tensor([1, 0, 0, 1, 0])[:, None])
    tap = surgery.Tap("inside").eval()
    block = network.block("layer1.0")
    block.add_module("inside", tap)
    conv = next(iter(block.graph.find_nodes(op="call_module", target="conv1")))
    with block.graph.inserting_after(conv):
        node = block.graph.call_module("inside", (conv,))
    conv.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    block.recompile()
    with surgery.record(network) as taps:
        network(images)
    assert len(taps["inside"]) == 5


@torch.no_grad()
@pytest.mark.parametrize(("granularity", "batch"), [("layer", 5), ("channel", 1)])
def test_what_is_remembered_follows_a_recompiled_graph(granularity, batch, images):
    """The activation behind the addition is taken out after a first forward."""
    network = gated(source_of("resnet18"), granularity, batch)
    network(images[:batch])
    block = network.block("layer4.1")
    last = block.graph.output_node().all_input_nodes[0]
    last.replace_all_uses_with(last.all_input_nodes[0])
    block.graph.erase_node(last)
    block.recompile()
    x = torch.randn(batch, 512, 2, 2, dtype=torch.float64)
    out = block(x)
    assert (out < 0).any()
    block.get_submodule("gated_gates").skipping = False
    torch.testing.assert_close(out, block(x), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("granularity", "batch"), [("layer", 5), ("channel", 1)])
def test_replaced_modules_and_copies_are_the_ones_that_run(granularity, batch, images):
    network = gated(source_of("resnet18"), granularity, batch)
    before = network(images[:batch])
    twin = copy.deepcopy(network)
    for path, module in list(twin.named_modules()):
        if isinstance(module, nn.Conv2d) and path.startswith("layer1"):
            twin.set_submodule(path, nn.Conv2d(64, 64, 3, padding=1, dtype=torch.float64))
    out = twin(images[:batch])
    assert not torch.equal(out, before)
    torch.testing.assert_close(out, multiplied(twin, images[:batch]), rtol=1e-10, atol=1e-12)
    assert torch.equal(network(images[:batch]), before)


def test_gradients_equal_those_of_the_multiplied_form(images):
    network = gated(source_of("resnet18"), "layer", 5)
    twin = copy.deepcopy(network)
    for _, gates in surgery_gated.gated_blocks(twin):
        gates.skipping = False
    for model in (network, twin):
        model(images).square().sum().backward()
    for (name, found), expected in zip(network.named_parameters(), twin.parameters(), strict=True):
        if ".gated_" not in name and found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2"])
def test_cut_channels_spend_the_macs_that_are_predicted(name, images):
    network = gated(source_of(name), "channel", 1)
    decisions = {b.path: gates.head.decisions for b, gates in surgery_gated.gated_blocks(network)}
    side = images.shape[-1]
    network = surgery.convert(source_of(name), "gated", granularity="channel", input_size=side).eval()
    for block, gates in surgery_gated.gated_blocks(network):
        gates.head = Fixed(decisions[block.path]).eval()
    with FlopCounterMode(display=False) as counter:
        network(images[:1])
    predicted = network_macs(network, decisions)
    assert counter.get_total_flops() / 2 == pytest.approx(float(predicted), rel=1e-6)


@torch.no_grad()
def test_one_decision_cuts_a_whole_batch(images):
    """Gates that do not depend on the image are cut for five images as for one."""
    network = surgery.convert(source_of("resnet18"), "gated", granularity="channel", dependent=False).eval()
    for _, gates in surgery_gated.gated_blocks(network):
        gates.head.logits.normal_()
    network.requires_grad_(False)
    full = copy.deepcopy(network)
    set_inference(full, surgery_gated.AlwaysOn())
    spent = []
    for model in (network, full):
        with FlopCounterMode(display=False) as counter:
            model(images)
        spent.append(counter.get_total_flops())
    assert spent[0] < 0.6 * spent[1]
    torch.testing.assert_close(network(images), multiplied(network, images), rtol=1e-10, atol=1e-12)


def test_decisions_without_numbers_leave_the_graph_to_run():
    network = surgery.convert(source_of("resnet18"), "gated").eval().to("meta")
    assert network.get_submodule("layer1.0")(torch.empty(5, 64, 8, 8, device="meta")).shape == (5, 64, 8, 8)


def test_ranges_cover_what_is_open():
    assert ranges_of(torch.tensor([0, 1, 1, 0, 0, 1])) == ((1, 3), (5, 6))
    assert ranges_of(torch.zeros(3)) == ()
    value = torch.arange(6.0)[:, None]
    taken = take_ranges(value, 0, ((1, 3), (5, 6)))
    assert taken.flatten().tolist() == [1, 2, 5]
    add_ranges(value, 0, ((1, 3), (5, 6)), taken)
    assert value.flatten().tolist() == [0, 2, 4, 3, 4, 10]
