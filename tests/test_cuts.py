"""What a plan can take out of a network, and what the rewriter must leave alone meanwhile."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

import surgery
from surgery.errors import NotKept, RewriteError
from surgery.rewriter import Rewriter
from surgery.shapes import MACS, SIZE
from surgery.taps import record
from tests.stand_ins import Unchanged, rebuilt

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
        return self.norms[0](x) + 0 * extra.mean()

    def selected(self, keep):
        return self.norms[keep[0]]


class Mean(nn.Module):
    def forward(self, *outputs):
        return torch.stack(outputs).mean(0)


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, 1)


class Second(nn.Module):
    def forward(self, values):
        return values[1]


class Shift(nn.Module):
    def forward(self, x, by):
        return x + by.mean()


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


def test_a_bypass_does_not_take_a_norm_with_an_activation_for_one_that_overwrites_its_input():
    # A pre-activation block reads its input twice: through a norm that has an in-place ReLU, and on its shortcut.
    network = timm.create_model("resnetv2_50", layers=(1, 3, 1, 1), num_classes=10).double().eval()
    network = rebuilt(network, 32)
    expected = copy.deepcopy(network)
    expected.block("stages.1.blocks.1").conv3.weight.data.zero_()
    rewriter = Rewriter(network, "test")
    rewriter.bypass(rewriter.architecture.block("stages.1.blocks.1"))
    assert torch.equal(rewriter.finish()(IMAGES), expected(IMAGES))


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


# shapes and multiply-adds


@dataclass(frozen=True)
class Wider(Unchanged):
    """Lead the body of one block through fewer positions, more channels and back again; pool the stem."""

    name: ClassVar[str] = "wider"

    def transform(self, architecture, rewriter):
        block = architecture.block("layer2.1")
        rewriter.insert(nn.AvgPool2d(2), rewriter.call_of("act1"), at=None, role="pool")
        rewriter.replace(block.spatial, nn.Conv2d(32, 48, 5, stride=2, padding=2))
        rewriter.replace("layer2.1.bn2", nn.BatchNorm2d(48))
        rewriter.replace(block.merge, nn.ConvTranspose2d(48, 128, 4, stride=2, padding=1))

    def plan(self, model, **criteria):
        return surgery.PrunePlan.of(model, self.name, [surgery.Cut("classes", "fc", (0, 3), 10)], {})


def check_figures(network):
    """Compare what the network says of itself with what its parts cost, read and write when they run."""
    architecture, measured = network.meta["architecture"], surgery.cost(network)
    assert (architecture.macs, architecture.params) == (measured.macs, measured.params)
    described = [(block.path, block.macs, block.params) for block in architecture.blocks]
    assert described == [(block.path, block.macs, block.params) for block in measured.blocks]
    shapes = {}

    def note(module, inputs, output):
        shapes[module] = (inputs[0].shape, output.shape)

    hooks = [network.block(block.path).register_forward_hook(note) for block in architecture.blocks]
    network(torch.rand(2, *architecture.input_size, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    for block in architecture.blocks:
        read, written = shapes[network.block(block.path)]
        assert (block.channels.input, block.channels.output) == (read[1], written[1])
        assert block.resolution == tuple(written[2:])


def test_shapes_and_multiply_adds_follow_a_layer_of_another_shape():
    """Behind the pool layer2.1 works at 8 x 8: 1x1 128 -> 32, 5x5 32 -> 48 at 4 x 4, 4x4 48 -> 128 transposed."""
    network = surgery.convert(timm.create_model("resnext20_4x4d").double().eval(), Wider(), input_size=32)
    check_figures(network)
    block = network.meta["architecture"].block("layer2.1")
    assert block.resolution == (8, 8)
    assert block.macs == 8 * 8 * 128 * 32 + 4 * 4 * 48 * 32 * 25 + 4 * 4 * 48 * 128 * 16
    plan = surgery.plan(network)
    assert plan.before.macs == surgery.cost(network).macs
    assert plan.after.macs == surgery.cost(surgery.prune(network, plan)).macs == plan.before.macs - 8 * 256


CUTS = {
    "keep": lambda rewriter: rewriter.keep(rewriter.architecture.block("layer2.0"), branches=[1, 3]),
    "narrow": lambda rewriter: rewriter.narrow("layer2.1.conv1", inputs=[0, 5], outputs=list(range(8))),
    "bypass": lambda rewriter: rewriter.bypass(rewriter.architecture.block("layer2.0")),
    "scale": lambda rewriter: rewriter.scale({"layer2.0.conv3": 100, "conv1": [3, 5]}),
    "classes": lambda rewriter: rewriter.keep_classes([3]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_shapes_and_multiply_adds_follow_every_cut(cut):
    network = small("resnext20_4x4d")
    rewriter = Rewriter(network, "test")
    CUTS[cut](rewriter)
    blocks = rewriter.architecture.blocks
    rewriter.finish()
    assert network.meta["architecture"].blocks == blocks
    check_figures(network)


def test_a_fed_value_has_its_shape_and_other_values_have_none():
    network = small()
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer2.0")
    halves = rewriter.compute(Halves(), rewriter.call_of("conv1"), at=None, role="halves")
    place = rewriter.feed(rewriter.compute(Second(), halves, at=None, role="second"), into=block)
    rewriter.insert(Shift(), block.body, place, at=block, role="shift")
    rewriter.finish()
    root = {node.name: node for node in network.graph.nodes}
    assert SIZE not in root[halves].meta
    assert root["test_second"].meta[SIZE] == (2, 8, 32, 32)
    fed = next(node for node in network.block("layer2.0").graph.nodes if node.name == place)
    assert fed.meta[SIZE] == (2, 8, 32, 32)


class Pack(nn.Module):
    def forward(self, body, shortcut):
        return torch.cat([body, shortcut], 1)


def test_a_block_may_be_cut_before_what_it_reads_is_rewired():
    """Behind a block that returns its two sides, the next one reads twice the channels, of which it keeps every one."""
    network = small()
    rewriter = Rewriter(network, "test")
    first, second = (rewriter.architecture.block(f"layer1.{i}") for i in range(2))
    rewriter.returns(rewriter.compute(Pack(), first.body, first.shortcut, at=first, role="pack"), at=first)
    rewriter.replace(second.split, nn.Conv2d(128, 16, 1))
    rewriter.insert(nn.Conv2d(128, 64, 1), second.input, at=second, role="fit", users=[second.join])
    cut = rewriter.keep(rewriter.architecture.block(second.path), branches=range(4))
    assert (cut.channels.hidden, cut.cardinality) == (4, 4)
    rewriter.finish()
    check_figures(network)
    assert network.meta["architecture"].block(second.path).channels.input == 128


class ReadsNumbers(nn.Module):
    def forward(self, x):
        return x if x.max() > 0 else -x


def test_an_inserted_module_that_reads_numbers_is_refused_with_its_place():
    rewriter = Rewriter(small(), "test")
    block = rewriter.architecture.block("layer1.1")
    rewriter.insert(ReadsNumbers(), block.body, at=block, role="sign")
    with pytest.raises(RewriteError, match=r"^layer1\.1\.test_sign: cannot run on meta tensors in eval mode"):
        rewriter.finish()


def test_a_layer_that_does_not_fit_what_it_reads_is_refused_with_its_place():
    rewriter = Rewriter(small(), "test")
    rewriter.replace("layer1.1.conv2", nn.Conv2d(16, 17, 3, padding=1))
    with pytest.raises(RewriteError, match=r"^layer1\.1\.conv3: cannot run on meta tensors"):
        rewriter.finish()


def test_a_layer_of_the_source_may_read_numbers():
    source = timm.create_model("resnet20").double().eval()
    source.layer1[1].act3 = ReadsNumbers()
    network = rebuilt(source)
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer1.1")
    rewriter.insert(nn.Conv2d(64, 64, 1), block.body, at=block, role="mix")
    rewriter.keep(block, branches=range(8))
    check_figures(rewriter.finish())


# replicate


def test_copies_with_views_of_their_own_say_what_they_read_and_cost():
    network = small("resnext11_4x4d")
    alone = surgery.cost(network).macs
    rewriter = Rewriter(network, "test")
    rewriter.replicate(2, Mean(), Halves())
    rewriter.finish()
    assert network.meta["architecture"].input_size == (6, 32, 32)
    assert network.meta["architecture"].macs == surgery.cost(network).macs == 2 * alone
    members = [node for node in network.graph.nodes if str(node.target).startswith("members.")]
    assert [node.meta[MACS] for node in members] == [alone, alone]


def test_a_split_that_gives_the_copies_other_images_is_refused():
    with pytest.raises(
        RewriteError, match=r"replicate: Halves returned .* for one view and .* for 3, expected 3 images"
    ):
        Rewriter(small(), "test").replicate(3, Mean(), Halves())


def test_what_was_edited_before_is_in_the_copies_and_in_what_they_cost():
    network = small("resnext11_4x4d")
    rewriter = Rewriter(network, "test")
    block = rewriter.architecture.block("layer2.0")
    rewriter.insert(nn.Conv2d(128, 128, 3, padding=1), block.body, at=block, role="mix")
    rewriter.replicate(3, Mean())
    rewriter.finish()
    assert network.meta["architecture"].macs == surgery.cost(network).macs


def test_several_copies_have_no_one_classifier():
    network = small("resnext11_4x4d")
    assert network.get_classifier() is network.fc
    rewriter = Rewriter(network, "test")
    rewriter.replicate(2, Mean())
    rewriter.finish()
    with pytest.raises(NotKept, match="get_classifier: found a classifier in each copy of the network, expected one"):
        network.get_classifier()
    with pytest.raises(NotKept, match="reset_classifier: found a classifier in each copy of the network"):
        network.reset_classifier(5)
