"""What a plan can take out of a network, and what the rewriter must leave alone meanwhile."""

import copy

import pytest
import timm
import torch
from torch import nn

import surgery.models  # noqa: F401  # registers the small networks
from surgery.errors import RewriteError
from surgery.rewriter import Rewriter
from surgery.taps import record
from tests.stand_ins import rebuilt

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Keep(nn.Module):
    """Multiply channels by zeros and ones, one for each."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, *_):
        return x * self.mask[:, None, None]

    def sliced(self, channels):
        return Keep(self.mask[channels])


class Copies(nn.Module):
    """Several norms, of which the first runs; takes a second argument."""

    def __init__(self, norms):
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, x, extra):
        return self.norms[0](x) + 0 * extra

    def selected(self, keep):
        return self.norms[keep[0]]


class Mean(nn.Module):
    def forward(self, *outputs):
        return torch.stack(outputs).mean(0)


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, 1)


def small(name="resnet20"):
    model = timm.create_model(name).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return rebuilt(model)


def masked(network, places):
    """Put masks on values of a block; return their nodes' paths."""
    rewriter = Rewriter(network, "test")
    for role, (at, node, users, mask) in places.items():
        rewriter.insert(Keep(mask), node, at=rewriter.architecture.block(at), role=role, users=users)
    return rewriter.finish()


def every_other(width):
    mask = torch.ones(width, dtype=torch.float64)
    mask[1::2] = 0
    return mask, list(range(0, width, 2))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_narrow_at_the_border_of_a_block_equals_the_mask(side):
    mask, keep = every_other(64)
    place = ("layer1.1", "x", ["conv1"], mask) if side == "inputs" else ("layer1.1", "bn3", None, mask)
    network = masked(small(), {"mask": place})
    narrow = Rewriter(copy.deepcopy(network), "test")
    narrow.narrow(f"layer1.1.{'conv1' if side == 'inputs' else 'conv3'}", **{side: keep})
    cut = narrow.finish()
    assert torch.equal(cut(IMAGES), network(IMAGES))
    assert cut.get_submodule("layer1.1.conv1").in_channels == (32 if side == "inputs" else 64)
    assert cut.get_submodule("layer1.1.conv3").out_channels == (32 if side == "outputs" else 64)


def test_narrow_inside_a_block_needs_no_index_and_keeps_the_architecture_true():
    network = small()
    mask, keep = every_other(16)
    network = masked(network, {"mask": ("layer1.1", "act2", None, mask)})
    rewriter = Rewriter(copy.deepcopy(network), "test")
    rewriter.narrow("layer1.1.conv2", outputs=keep)
    cut = rewriter.finish()
    assert torch.equal(cut(IMAGES), network(IMAGES))
    block = cut.meta["architecture"].block("layer1.1")
    assert (block.channels.hidden, block.cardinality, block.params) == (
        8,
        8,
        64 * 16 + 16 * 8 * 9 + 8 * 64 + 2 * (16 + 8 + 64),
    )
    assert not any("scatter" in node.name or "select" in node.name for node in cut.block("layer1.1").graph.nodes)


def test_narrow_refuses_to_leave_nothing():
    with pytest.raises(RewriteError, match="at least one channel"):
        Rewriter(small(), "test").narrow("layer1.1.conv2", outputs=[])


def test_narrow_of_a_grouped_convolution_refuses_parts_of_groups():
    with pytest.raises(RewriteError, match="whole groups"):
        Rewriter(small("resnext11_4x4d"), "test").narrow("layer1.0.conv2", outputs=[0, 1, 2])


def test_scale_by_index_cuts_a_stream_that_every_producer_leaves_empty():
    mask, keep = every_other(64)
    places = {"body0": ("layer1.0", "bn3", None, mask), "shortcut": ("layer1.0", "downsample_bn", None, mask)}
    network = masked(small(), {**places, "body1": ("layer1.1", "bn3", None, mask)})
    rewriter = Rewriter(copy.deepcopy(network), "test")
    rewriter.scale({"layer1.0.conv3": keep})
    cut = rewriter.finish()
    assert torch.equal(cut(IMAGES), network(IMAGES))
    assert cut.get_submodule("layer2.0.conv1").in_channels == 32
    assert cut.meta["architecture"].block("layer1.1").channels.output == 32


def test_remove_takes_an_inserted_module_out_without_trace():
    network = small()
    before = copy.deepcopy(network)
    mask = torch.ones(64, dtype=torch.float64)
    masked(network, {"mask": ("layer1.1", "bn3", None, mask)})
    rewriter = Rewriter(network, "test")
    rewriter.remove("layer1.1.test_mask")
    after = rewriter.finish()
    assert str(after.block("layer1.1").graph) == str(before.block("layer1.1").graph)
    assert after.state_dict().keys() == before.state_dict().keys()
    assert after.meta["architecture"] == before.meta["architecture"]


def test_remove_refuses_modules_of_the_source():
    with pytest.raises(RewriteError, match=r"layer1\.1\.bn3: it belongs to the source"):
        Rewriter(small(), "test").remove("layer1.1.bn3")


def test_select_keeps_a_part_and_drops_what_only_the_whole_read():
    network = small()
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer1.1")
    other = nn.BatchNorm2d(64).double()
    scalar = rewriter.compute(Mean(), rewriter.call_of("conv1"), at=None, role="scalar")
    norm = rewriter.module("layer1.1.bn3")
    rewriter.replace("layer1.1.bn3", Copies([norm, other]), rewriter.feed(scalar, into=block))
    rewriter.finish()
    rewriter = Rewriter(network, "test")
    rewriter.select("layer1.1.bn3", [1])
    selected = rewriter.finish()
    assert selected.get_submodule("layer1.1.bn3") is other
    assert len(selected.block("layer1.1").graph.find_nodes(op="placeholder")) == 1
    assert not any("scalar" in node.name for node in selected.graph.nodes)


def test_replicate_gives_every_copy_its_view_and_keep_members_keeps_one():
    network = small("resnext11_4x4d")
    alone = copy.deepcopy(network)
    rewriter = Rewriter(network, "test")
    rewriter.replicate(2, Mean(), Halves())
    both = rewriter.finish()
    views = torch.cat([IMAGES, IMAGES.flip(0)], dim=1)
    assert torch.equal(both(views), torch.stack([alone(IMAGES), alone(IMAGES.flip(0))]).mean(0))
    assert set(both.state_dict()) == {f"members.{i}.{key}" for i in range(2) for key in alone.state_dict()}
    rewriter = Rewriter(both, "test")
    rewriter.keep_members([1])
    assert torch.equal(rewriter.finish()(views), alone(IMAGES.flip(0)))


def test_bypass_leaves_the_input_of_the_block_as_it_was():
    network = small()
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer1.1")
    negative = rewriter.insert(
        Keep(-torch.ones(64, dtype=torch.float64)), rewriter.input_of(block), at=None, role="sign"
    )
    rewriter.tap(negative, "input", at=None)
    rewriter.bypass(block)
    with record(rewriter.finish()) as taps:
        network(IMAGES)
    assert (taps["input"] < 0).any()
    closed = network.meta["architecture"].block("layer1.1")
    assert (closed.is_residual, closed.convs, closed.params, closed.macs) == (False, (), 0, 0)


def test_insert_does_not_feed_what_its_own_arguments_are_computed_from():
    network = small()
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer1.1")
    scores = rewriter.compute(nn.Identity(), block.input, at=block, role="scores")
    mask = rewriter.insert(Keep(torch.ones(64, dtype=torch.float64)), block.input, scores, at=block, role="mask")
    rewriter.finish()
    readers = {
        node.name: [source.name for source in node.all_input_nodes] for node in network.block("layer1.1").graph.nodes
    }
    assert readers[scores] == ["x"]
    assert readers[mask] == ["x", scores]
    assert readers["conv1"] == readers["add"][1:] == [mask]


def test_returns_lets_a_block_put_out_another_value():
    network = small()
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer3.1")
    rewriter.returns(block.body, at=block)
    rewriter.finish()
    assert network.meta["architecture"].block("layer3.1").join is None
    assert (network.block("layer3.1")(torch.rand(1, 256, 8, 8, dtype=torch.float64)) < 0).any()


def test_new_parts_of_a_replacement_get_the_dtype_of_what_they_replace_beside_shared_weights():
    network = small()
    norm = network.get_submodule("layer1.1.bn3")
    copies = Copies([norm, nn.BatchNorm2d(64)])
    Rewriter(network, "test").replace("layer1.1.bn3", copies, "conv3")
    assert copies.norms[0] is norm
    assert copies.norms[1].weight.dtype == copies.norms[1].running_var.dtype == torch.float64
    assert copies.norms[1].num_batches_tracked.dtype == torch.int64
