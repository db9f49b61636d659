import dataclasses
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

import surgery
from surgery.errors import InvalidOption, PruneError
from surgery.testing import check_method, tiny_networks, unsettle
from surgery_gated import Gated, Threshold, gated_blocks, inference
from surgery_gated.modules import ChannelGate
from surgery_gated.pruner import judge

NETWORKS = tiny_networks()
OTHERS = {
    "pre-activation": partial(timm.create_model, "resnetv2_50", layers=(1, 2, 1, 1), num_classes=10),
    "squeeze-excite": partial(timm.create_model, "seresnet18", num_classes=10),
    "basic": partial(torchvision.models.resnet18, num_classes=10),
}
KINDS = {"layer": {}, "channel": {"granularity": "channel"}}


def settle_gates(model, *, every=2):
    """Close every second independent gate, or every `every`-th; let the likeliest side of dependent ones depend."""
    generator = torch.Generator().manual_seed(0)
    place = 0
    for _, gates in gated_blocks(model):
        head = gates.head
        shut = (torch.arange(gates.count) + place) % every == 0
        place += gates.count
        if gates.dependent:
            head.bias.data[:, 1] = head.bias.data[:, 0] + torch.where(shut, -0.1, 0.1)
            head.weight.data.copy_(50 * torch.randn(head.weight.shape, generator=generator))
        else:
            head.logits.data[:, 1] = head.logits.data[:, 0] + torch.where(shut, -3.0, 3.0)
    return model


def gated(source, **options):
    return surgery.convert(source.double().eval(), "gated", input_size=32, **options).double().eval()


def images(count=6, seed=1):
    noise = torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise + torch.linspace(-4, 4, count, dtype=torch.float64)[:, None, None, None]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [*NETWORKS, *OTHERS])
def test_the_pruned_network_equals_the_gated_one(network, kind):
    build = NETWORKS.get(network) or (lambda: unsettle(OTHERS[network]()))
    model = settle_gates(gated(build(), dependent=False, **KINDS[kind]))
    pruned = surgery.prune(model)
    assert not [module for module in pruned.modules() if type(module).__module__.startswith("surgery_gated")]
    with torch.no_grad():
        assert_same(pruned(images()), model(images()))
    if any(verdict.closed.any() for verdict in judge(model, 0.5).values()):
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("torchvision resnext", "layer"),
        ("timm efficientnet", "layer"),
        ("torchvision resnext", "channel"),
        ("torchvision mobilenetv2", "channel"),
        ("timm efficientnet", "channel"),
    ],
)
def test_gates_that_images_leave_undecided_stay(network, kind):
    model = settle_gates(gated(NETWORKS[network](), **KINDS[kind]))
    seen = images(8)
    verdicts = judge(model, 0.5, images=seen)
    live = sum(len(verdict.live) for verdict in verdicts.values())
    pruned = surgery.prune(model, images=seen)
    assert sum(gates.count for _, gates in gated_blocks(pruned)) == live > 0
    with torch.no_grad():
        assert_same(pruned(seen), model(seen))


def test_static_gates_follow_the_majority_of_the_images():
    model = settle_gates(gated(NETWORKS["torchvision resnext"](), granularity="channel"))
    seen = images(9)
    pruned = surgery.prune(model, images=[seen[:4], seen[4:]], static=True)
    assert not list(gated_blocks(pruned))
    with torch.no_grad(), surgery.record(model) as taps:
        model(seen)
    majority = {block.path: taps[f"{block.path}/gates"].mean(dim=0) > 0.5 for block, _ in gated_blocks(model)}
    fix_gates(model, majority)
    with torch.no_grad():
        assert_same(pruned(seen), model(seen))


class Fixed(nn.Module):
    """Gates that are the same for every image."""

    def __init__(self, opened):
        super().__init__()
        self.margins = torch.where(opened, 1.0, -1.0)

    def forward(self, x):
        return torch.stack([torch.zeros_like(self.margins), self.margins], dim=-1).expand(len(x), -1, -1)


def fix_gates(model, opened):
    for block, gates in gated_blocks(model):
        gates.head = Fixed(opened[block.path]).eval()


def test_dropped_blocks_of_resnet_50_save_the_multiply_adds_of_the_paper():
    """Supplement, table of Ind PB: the printed totals differ by 218,365,952 for each dropped block.

    By hand, of a bottleneck of the first stage: 56^2 (256 * 64 + 9 * 64 * 64 + 64 * 256) = 218,365,952.
    """
    model = surgery.convert(torchvision.models.resnet50(), "gated", dependent=False)
    plain = [(block, gates) for block, gates in gated_blocks(model) if not block.projected]
    assert len(plain) == 12
    for dropped, (_, gates) in enumerate(plain[::-1][:6], 1):
        gates.head.logits.data[:, 1] = -1
        plan = surgery.plan(model)
        assert plan.before.macs - plan.after.macs == dropped * 218_365_952


def test_a_threshold_decides_which_layers_go():
    model = gated(NETWORKS["wide resnet"](), dependent=False)
    margins = [-1.0, 1.0, 3.0]
    for (_, gates), margin in zip(gated_blocks(model), margins, strict=True):
        gates.head.logits.data[:] = torch.tensor([0.0, margin])
    # sigmoid of the margins: 0.269, 0.731, 0.953
    bodies = {tau: sum(cut.kind == "body" for cut in surgery.plan(model, tau=tau).cuts) for tau in (0.2, 0.5, 0.8)}
    assert bodies == {0.2: 0, 0.5: 1, 0.8: 2}
    with torch.no_grad(), inference(model, Threshold(0.8)):
        assert_same(surgery.prune(model, tau=0.8)(images()), model(images()))


def test_a_channel_that_every_block_of_a_stage_closes_leaves_the_stream():
    model = gated(NETWORKS["torchvision resnext"](), granularity="channel", dependent=False)
    stage = [block for block, _ in gated_blocks(model) if block.path.startswith("layer2.")]
    for block, gates in gated_blocks(model):
        if block in stage:
            for module in model.block(block.path).children():
                if isinstance(module, ChannelGate) and module.role in ("output", "projection"):
                    last = int(module.column.max())
                    gates.head.logits.data[last, 1] = -3
    pruned = surgery.prune(model)
    width = stage[0].channels.output
    left = width - width // 16
    assert pruned.get_submodule(f"{stage[0].path}.conv3").out_channels == left
    assert pruned.get_submodule(f"{stage[0].path}.bn3").num_features == left
    assert pruned.get_submodule(f"{stage[0].path}.downsample.0").out_channels == left
    assert pruned.get_submodule("layer3.0.conv1").in_channels == left
    assert pruned.get_submodule("layer3.0.downsample.0").in_channels == left
    with torch.no_grad():
        assert_same(pruned(images()), model(images()))


def test_a_norm_that_revives_zeros_keeps_the_stream():
    """A pre-activation block reads its stream through a norm, which makes its shift of a closed channel."""
    model = gated(unsettle(OTHERS["pre-activation"]()), granularity="channel", dependent=False)
    for block, gates in gated_blocks(model):
        for module in model.block(block.path).children():
            if isinstance(module, ChannelGate) and module.role in ("output", "projection"):
                gates.head.logits.data[int(module.column.max()), 1] = -3
    plan = surgery.plan(model)
    assert not [cut for cut in plan.cuts if cut.kind == "stream"]
    with torch.no_grad():
        assert_same(surgery.prune(model, plan)(images()), model(images()))


@pytest.mark.parametrize("round_to", [4, 16])
def test_widths_are_rounded_up_by_opening_the_likeliest_groups(round_to):
    model = settle_gates(gated(NETWORKS["torchvision wide resnet"](), granularity="channel", dependent=False))
    for _, gates in gated_blocks(model):
        gates.head.logits.data[:, 1] += torch.rand(gates.count, generator=torch.Generator().manual_seed(5))
    plan = surgery.plan(model, round_to=round_to)
    kept = [len(cut.keep) for cut in plan.cuts if cut.kind in ("inputs", "outputs", "stream")]
    assert kept
    assert all(count % round_to == 0 for count in kept)
    before = judge(model, 0.5)
    opened = {path: ~verdict.closed for path, verdict in rounded(model, before, round_to).items()}
    for path, verdict in before.items():
        again = opened[path] & verdict.closed
        assert (opened[path] | verdict.closed).all()
        if again.any():
            assert plan.after.macs > surgery.plan(model).after.macs
    pruned = surgery.prune(model, plan)
    fix_gates(model, opened)
    with torch.no_grad():
        assert_same(pruned(images()), model(images()))


def rounded(model, verdicts, round_to):
    from surgery_gated.pruner import _rounded

    blocks = {block.path: block for block, _ in gated_blocks(model)}
    return {path: _rounded(model, blocks[path], verdict, round_to) for path, verdict in verdicts.items()}


def test_a_network_without_any_body_is_refused():
    model = settle_gates(gated(NETWORKS["wide resnet"](), dependent=False), every=1)
    with pytest.raises(PruneError, match="the gates of all 3 blocks are closed, so nothing but shortcuts"):
        surgery.plan(model)


def test_a_dead_path_is_refused_with_the_tensor_that_dies():
    model = gated(NETWORKS["wide resnet"](), granularity="channel", dependent=False)
    block, gates = next(iter(gated_blocks(model)))
    gate = model.get_submodule(f"{block.path}.gated_inner")
    first = int(gate.column.max())
    gate.column[gate.column == -1] = first  # as a gate on the first group would be
    gates.head.logits.data[gate.column.unique(), 1] = -3
    with pytest.raises(PruneError, match=rf"{block.path}\.conv1: every channel that it writes is closed"):
        surgery.plan(model)


@pytest.mark.parametrize(
    ("options", "criteria", "message"),
    [
        ({}, {}, "pass images="),
        ({"dependent": False}, {"images": torch.zeros(1, 3, 32, 32)}, "expected neither"),
        ({"dependent": False}, {"static": True}, "expected neither"),
        ({"dependent": False}, {"tau": 1.5}, r"tau=1.5, expected a probability in \[0, 1\]"),
        ({"dependent": False}, {"round_to": 8}, "expected none where gates open whole layers"),
        ({"dependent": False, "granularity": "channel"}, {"round_to": 0}, "expected a number of channels"),
        ({"dependent": False, "granularity": "channel"}, {"round_to": True}, "expected a number of channels"),
        ({"dependent": False}, {"keep": 3}, "unknown criteria keep"),
    ],
)
def test_criteria_that_cannot_be_used_are_refused(options, criteria, message):
    model = gated(NETWORKS["wide resnet"](), **options)
    with pytest.raises(InvalidOption, match=message):
        surgery.plan(model, **criteria)


def test_a_fresh_network_loses_its_gates_and_nothing_else():
    source = NETWORKS["torchvision mobilenetv2"]().double().eval()
    for kind in KINDS.values():
        pruned = surgery.prune(gated(source, dependent=False, **kind))
        assert pruned.state_dict().keys() == source.state_dict().keys()
        assert torch.equal(pruned(images()), source(images()))


@dataclasses.dataclass(frozen=True)
class Trained(Gated):
    """Gated networks whose gates have been trained."""

    preserves = "weights"

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        settle_gates(rewriter.network)


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_keeps_the_laws(kind):
    method = Trained(dependent=False, **KINDS[kind])
    networks = {name: NETWORKS[name] for name in ("torchvision resnext", "timm mobilenetv2", "wide resnet")}
    report = check_method(
        method,
        networks,
        criteria={"tau": 0.5},
        muted=lambda model, criteria: model,
        laws=["empty_plan", "pruned_smaller", "pruned_equals_muted", "exports"],
    )
    assert not report.refused
    assert all(len(laws) == 4 for laws in report.held.values())


def test_a_pruned_network_survives_a_file(tmp_path):
    model = settle_gates(gated(NETWORKS["torchvision resnext"](), granularity="channel"))
    pruned = surgery.prune(model, images=images())
    surgery.save(pruned, tmp_path / "pruned.safetensors", factory=NETWORKS["torchvision resnext"])
    loaded = surgery.load(tmp_path / "pruned.safetensors", factory=NETWORKS["torchvision resnext"]).eval()
    assert [gates.count for _, gates in gated_blocks(loaded)] == [gates.count for _, gates in gated_blocks(pruned)]
    with torch.no_grad():
        assert torch.equal(loaded(images()), pruned(images()))
