"""Pruned networks against frozen ones in float64, and what is left worked out by hand."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import surgery
import surgery_masked
from surgery.errors import InvalidOption, PruneError
from surgery.testing import ResidualSpec, tiny_networks, unsettle
from surgery_masked.masks import Masks

IMAGES = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FOUR = ResidualSpec((4,), groups=4)
"""Four blocks of four branches that are two channels wide, so three masks; b1 to b4 below."""

ONE = [[[0], [2], [3], [3]], [[1], [3], [1], [0]], [[0], [0], [2], [2]]]
TWO = [
    [[0, 1], [2, 3], [1, 3], [0, 1]],
    [[1, 2], [1, 2], [1, 2], [0, 3]],
    [[0, 1], [0, 1], [1, 2], [0, 2]],
]


def preactivated():
    torch.manual_seed(0)
    shape = {"layers": (1, 2, 1, 1), "channels": (16, 32, 64, 64), "stem_chs": 8, "num_classes": 10}
    return unsettle(timm.create_model("resnetv2_50", **shape))


def with_silu():
    torch.manual_seed(0)
    return unsettle(
        ResNet(
            Bottleneck,
            (1, 2, 1, 1),
            channels=(16, 32, 64, 64),
            cardinality=4,
            base_width=16,
            num_classes=10,
            act_layer=nn.SiLU,
        )
    )


FAMILIES = {
    **{name: build for name, build in tiny_networks().items() if "efficientnet" not in name},
    "pre-activation": preactivated,
    "SiLU": with_silu,
    "basic": ResidualSpec((2, 2), "basic", width=4).build,
    "pre-activated": ResidualSpec((2, 2), groups=4, preactivation=True).build,
    "two chains": ResidualSpec((3, 2), groups=4, projection="pad").build,
    "pooling": ResidualSpec((2, 2), groups=4, projection="pool").build,
}


def masked(source, **options):
    return surgery.convert(source.double().eval(), "masked", input_size=32, **options)


def masks_of(model):
    [found] = [module for module in model.modules() if isinstance(module, Masks)]
    return found


def connect(model, rows):
    """Let branch j of the block behind pair i read the branches rows[i][j]."""
    masks = masks_of(model)
    index = torch.tensor(rows)
    masks.real.copy_(torch.zeros_like(masks.real).scatter(2, index, 1 / index.shape[2]))
    return model


def by_hand(rows, **options):
    return connect(masked(FOUR.build(), fan_in=len(rows[0][0]), **options), rows)


def frozen(model):
    still = copy.deepcopy(model)
    surgery_masked.freeze(still)
    return still


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.detach().abs().max()))


def outputs(*models):
    with torch.no_grad():
        return [model.eval()(IMAGES) for model in models]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# --- by hand ---


def test_a_branch_that_no_surviving_branch_reads_goes_and_takes_others_with_it():
    """K = 1. b4 keeps all; they read 0, 0, 2, 2 of b3, so 1 and 3 go.

    Branches 0 and 2 of b3 read 1 and 1 of b2; 3 and 0 were read by those that went. Branch 1 of b2 reads 2 of b1.
    """
    used = surgery_masked.used_branches(by_hand(ONE))
    assert used == {"stages.0.0": (2,), "stages.0.1": (1,), "stages.0.2": (0, 2), "stages.0.3": (0, 1, 2, 3)}


def test_two_branches_read_keep_what_either_reads():
    """K = 2. b4 reads 01 01 12 02: 3 of b3 goes. 0, 1, 2 of b3 read 1 and 2 of b2, and these 2, 3 and 1, 3 of b1."""
    used = surgery_masked.used_branches(by_hand(TWO))
    assert used == {"stages.0.0": (1, 2, 3), "stages.0.1": (1, 2), "stages.0.2": (0, 1, 2), "stages.0.3": (0, 1, 2, 3)}


@pytest.mark.parametrize("aggregate", ["resnext", "sum", "mean"])
@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("rows", [ONE, TWO], ids=["one", "two"])
def test_connections_by_hand_pruned_equal_those_frozen(rows, norm, aggregate):
    model = by_hand(rows, norm=norm, aggregate=aggregate)
    pruned, fixed, live = surgery.prune(model), frozen(model), copy.deepcopy(model)
    found, expected, alive = outputs(pruned, fixed, live)
    assert_same(found, expected)
    assert_same(alive, expected)


def test_parameters_and_weights_before_and_after_are_those_worked_out_by_hand():
    """Hidden 8, output 16. Stem 216 + 16; head 170; together 402.

    b1: 1x1 8*8 + 16, 3x3 8*2*9 + 16, 1x1 8*16 + 32, projection 8*16 + 32: 560; others 16*8 + 16, 144 + 16, 128 + 32:
    464. 402 + 560 + 3 * 464 = 2354. A branch of b1 is 16 + 4 + 36 + 4 + 32 = 92, of the others 32 + 4 + 36 + 4 + 32 =
    108, the norm behind them 32. Left are 1, 1, 2 and 4: 402 + (160 + 92 + 32) + 140 + 248 + 464 = 1538.
    Norms in every branch are 3 * 32 more in each of four blocks before, and 32 + 96 more in b3 and b4 after.
    """
    for norm, before, after in (("shared", 2354, 1538), ("branch", 2354 + 384, 1538 + 128)):
        model = by_hand(ONE, norm=norm)
        plan = surgery.plan(model)
        pruned = surgery.prune(model, plan)
        assert (plan.before.params, plan.after.params) == (before, after)
        assert (parameters(model), parameters(pruned)) == (before, after)
    shapes = {name: tuple(value.shape) for name, value in pruned.named_parameters() if value.dim() > 1}
    assert shapes == {
        "stem.0.weight": (8, 3, 3, 3),
        **{
            f"stages.0.{n}.convs.0.weight": (2 * left, 8 if n == 0 else 16, 1, 1) for n, left in enumerate((1, 1, 2, 4))
        },
        **{f"stages.0.{n}.convs.1.weight": (2 * left, 2, 3, 3) for n, left in enumerate((1, 1, 2, 4))},
        **{f"stages.0.{n}.convs.2.weight": (16, 2 * left, 1, 1) for n, left in enumerate((1, 1, 2, 4))},
        "stages.0.0.shortcut.0.weight": (16, 8, 1, 1),
        "head.weight": (10, 16),
    }


def test_the_weights_left_are_those_of_the_branches_that_are_used():
    """b1 keeps branch 2, which is channels 4 and 5; b3 keeps 0 and 2, channels 0, 1, 4, 5."""
    model = by_hand(ONE)
    pruned = surgery.prune(model)
    ours, theirs = pruned.state_dict(), model.state_dict()
    for block, channels in (("stages.0.0", [4, 5]), ("stages.0.2", [0, 1, 4, 5])):
        assert torch.equal(ours[f"{block}.convs.0.weight"], theirs[f"{block}.convs.0.weight"][channels])
        assert torch.equal(ours[f"{block}.convs.2.weight"], theirs[f"{block}.convs.2.weight"][:, channels])
        assert torch.equal(ours[f"{block}.norms.1.running_var"], theirs[f"{block}.norms.1.running_var"][channels])


def test_the_plan_says_what_goes():
    text = str(surgery.plan(by_hand(ONE))).splitlines()
    assert text[:11] == [
        "prune plan of 'masked'",
        "  stages.0.0.norms.2: 1 of 4 parts kept (one for each branch that reads)",
        "  stages.0.0.masked_mask: 1 of 16 parts kept (fixed connections)",
        "  stages.0.0: 1 of 4 branches kept (the others are read by no branch that is left)",
        "  stages.0.1.norms.2: 2 of 4 parts kept (one for each branch that reads)",
        "  stages.0.1.masked_mask: 2 of 16 parts kept (fixed connections)",
        "  stages.0.1: 1 of 4 branches kept (the others are read by no branch that is left)",
        "  stages.0.2.norms.2: 4 of 4 parts kept (one for each branch that reads)",
        "  stages.0.2.masked_mask: 4 of 16 parts kept (fixed connections)",
        "  stages.0.2: 2 of 4 branches kept (the others are read by no branch that is left)",
        "  stages.0.3: 4 of 4 branches kept (all are joined)",
    ]
    assert text[11].split() == ["parameters", "2,354", "->", "1,538", "(65.3", "%", "kept)"]


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("only", range(4))
def test_a_single_branch_may_be_left_everywhere(only, norm):
    model = by_hand([[[only]] * 4] * 3, norm=norm)
    assert surgery_masked.used_branches(model) == {
        **{f"stages.0.{n}": (only,) for n in range(3)},
        "stages.0.3": (0, 1, 2, 3),
    }
    pruned = surgery.prune(model)
    assert_same(*outputs(pruned, frozen(model)))
    pruned.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


# --- all families ---


@pytest.mark.parametrize(("fan_in", "norm"), [(1, "shared"), (2, "branch")])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_networks_equal_frozen_ones(name, fan_in, norm):
    model = masked(FAMILIES[name](), connectivity="random", fan_in=fan_in, norm=norm)
    pruned = surgery.prune(model)
    assert_same(*outputs(pruned, frozen(model)))
    used = surgery_masked.used_branches(model)
    branches = masks_of(model).real.shape[1]
    removed = sum(branches - len(left) for left in used.values())
    assert (parameters(pruned) < parameters(model)) == (removed > 0)
    assert fan_in > 1 or removed > 0
    assert not any(isinstance(module, Masks) for module in pruned.modules())


def test_learned_connections_are_pruned_as_eval_mode_has_them():
    model = masked(FOUR.build(), fan_in=2).train()
    for _ in range(3):
        F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    pruned = surgery.prune(model)
    assert_same(*outputs(pruned, model))


def test_full_connectivity_leaves_every_branch():
    model = masked(FOUR.build(), connectivity="full")
    plan = surgery.plan(model)
    assert plan.before.params == plan.after.params
    assert_same(*outputs(surgery.prune(model, plan), model))


def test_branches_formed_of_several_groups_are_pruned_whole():
    """Eight groups in four branches of two."""
    model = masked(tiny_networks()["resnext"](), connectivity="random", fan_in=1, branches=4)
    pruned = surgery.prune(model)
    assert_same(*outputs(pruned, model))
    left = surgery_masked.used_branches(model)["layer1.0"]
    before, after = (net.get_parameter("layer1.0.conv3.weight").shape[1] for net in (model, pruned))
    assert after == len(left) * before // 4 < before


# --- refusals ---


def test_real_valued_masks_are_pruned_once_they_are_frozen():
    model = masked(FOUR.build(), connectivity="real", fan_in=1)
    for call in (surgery.plan, surgery.prune):
        with pytest.raises(
            PruneError, match=r"connectivity='real' every branch reads all .* call surgery_masked.freeze"
        ):
            call(model)
    connect(model, ONE)
    surgery_masked.freeze(model)
    assert surgery.plan(model).after.params == 1538
    assert_same(*outputs(surgery.prune(model), model))


def test_criteria_are_refused():
    with pytest.raises(InvalidOption, match="masked: prune expects no criteria, found classes"):
        surgery.plan(by_hand(ONE), classes=[3])


def test_a_pruned_network_has_no_masks_left():
    pruned = surgery.prune(by_hand(ONE))
    for call in (surgery_masked.connectivity, surgery_masked.used_branches, surgery_masked.freeze):
        with pytest.raises(InvalidOption, match=r"ResidualNetwork has no masks; .* is not pruned"):
            call(pruned)
    with pytest.raises(PruneError):
        surgery.prune(pruned)


def test_planning_and_pruning_leave_the_model_alone():
    model = by_hand(ONE).train()
    F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    surgery.prune(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert masks_of(model).learns


# --- what a pruned network can do ---


@pytest.mark.parametrize("norm", ["shared", "branch"])
def test_pruned_networks_survive_files_and_copies(norm, tmp_path):
    pruned = surgery.prune(by_hand(TWO, norm=norm))
    surgery.save(pruned, tmp_path / "pruned.safetensors", factory=FOUR.build)
    loaded = surgery.load(tmp_path / "pruned.safetensors", factory=FOUR.build)
    expected = outputs(pruned)[0]
    assert torch.equal(outputs(copy.deepcopy(pruned))[0], expected)
    assert_same(outputs(loaded.double())[0], expected)
    assert {key: value.shape for key, value in loaded.state_dict().items()} == {
        key: value.shape for key, value in pruned.state_dict().items()
    }


def step(model, training):
    model.train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    optimizer.step()
    return model


STEPPED = {name: FAMILIES[name] for name in ("timm resnext", "timm mobilenetv2", "pre-activation", "pooling")}


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize(
    ("name", "training"), [("by hand", True), ("by hand", False), *((name, True) for name in STEPPED)]
)
def test_a_training_step_of_the_pruned_network_is_that_of_the_frozen_one(name, norm, training):
    """Weights and statistics that are left are the same, whether pruned before or after the step."""
    if name == "by hand":
        model = frozen(by_hand(TWO, norm=norm))
    else:
        model = masked(STEPPED[name](), connectivity="random", fan_in=1, norm=norm)
    before = {key: value.clone() for key, value in surgery.prune(model).state_dict().items()}
    ours = step(surgery.prune(model), training).state_dict()
    theirs = surgery.prune(step(model, training)).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    assert not torch.equal(ours[next(iter(ours))], before[next(iter(ours))])
    moved = [key for key in ours if key.endswith("running_mean") and not torch.equal(ours[key], before[key])]
    assert bool(moved) == training


def test_a_pruned_network_recomputes_as_the_one_before():
    model = surgery.prune(masked(tiny_networks()["timm resnext"](), connectivity="random", fan_in=2)).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    for net in (model, twin):
        F.cross_entropy(net(IMAGES), torch.arange(4)).backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)
    for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
