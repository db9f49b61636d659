"""Shallow exits: where they stand, what they compute, what they cost, and what trains them."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from exits import ExitsLoss, ShallowExits

SIZE = 16


def network(name: str = "preresnext20_8x2d") -> nn.Module:
    """Return a network in float64 whose norms do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def exits(plain) -> ShallowExits:
    """Return exits behind the blocks 2, 3, 5 and 6 of six: 1.5, 3, 4.5 and 6, rounded up."""
    torch.manual_seed(1)
    model = ShallowExits(plain, 4, SIZE)
    for head in model.heads:
        head[-1].weight.data.normal_()
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)


def literal(plain: nn.Module, head: nn.Sequential, blocks: int, images: torch.Tensor, *, train: bool) -> torch.Tensor:
    """Return what the first blocks and a classifier behind them compute."""

    def norm(x, bn):
        mean, var = (None, None) if train else (bn.running_mean, bn.running_var)
        return F.batch_norm(x, mean, var, bn.weight, bn.bias, train, 0.1, bn.eps)

    x = F.conv2d(images, plain.conv1.weight, padding=1)
    stages = [plain.layer1, plain.layer2, plain.layer3]
    for number in range(blocks):
        if number in (2, 4):  # two blocks a stage
            x = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, x.shape[1]))
        block = stages[number // 2][number % 2]
        y = F.conv2d(norm(x, block.bn1).relu(), block.conv1.weight)
        y = F.conv2d(norm(y, block.bn2).relu(), block.conv2.weight, padding=1, groups=8)
        x = x + F.conv2d(norm(y, block.bn3).relu(), block.conv3.weight)
    pooled = norm(x, head[0]).relu().mean(dim=(2, 3))
    return pooled @ head[-1].weight.T + head[-1].bias


ENDS = (2, 3, 5)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        # nine blocks: with eight exits all but the first, as in the paper; with four 2.25, 4.5, 6.75 and 9 rounded up
        ("preresnext29_8x2d", 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        ("preresnext29_8x2d", 4, [2, 4, 6, 8]),
        ("preresnext29_8x2d", 1, [8]),
        ("preresnext20_8x2d", 4, [1, 2, 4, 5]),
    ],
)
def test_exits_are_behind_evenly_spaced_blocks(name, count, expected):
    model = ShallowExits(timm.create_model(name), count, SIZE)
    per_stage = 3 if "29" in name else 2
    assert model.blocks == tuple(f"layer{n // per_stage + 1}.{n % per_stage}" for n in expected)
    assert len(model.heads) == count - 1


def test_the_network_and_its_logits_are_unchanged(plain, exits, images):
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    assert torch.equal(exits(images), plain(images))
    assert torch.equal(exits.alone(4)(images), plain(images))
    twin = ShallowExits(plain, 4, SIZE)
    twin.train()(images)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert not plain.training


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_exit_equals_the_first_blocks_and_its_classifier(plain, exits, images, number):
    expected = literal(plain, exits.heads[number - 1], ENDS[number - 1], images, train=False)
    torch.testing.assert_close(exits.alone(number)(images), expected, rtol=1e-10, atol=1e-10)


def test_training_keeps_the_logits_of_all_exits(plain, images):
    torch.manual_seed(3)
    exits = ShallowExits(plain, 4, SIZE).train()
    last = exits(images)
    assert exits.logits[-1] is last
    for number in (1, 2, 3):
        expected = literal(plain, exits.heads[number - 1], ENDS[number - 1], images, train=True)
        torch.testing.assert_close(exits.logits[number - 1], expected, rtol=1e-10, atol=1e-10)


def test_a_shallow_network_has_nothing_of_what_is_behind_its_exit(exits):
    """Two blocks: stem 864, each norm 64 + 32 + 32, convolutions 512 + 16 * 2 * 9 + 512; norm 64, classifier 165."""
    shallow = exits.alone(1)
    assert sum(p.numel() for p in shallow.parameters()) == 864 + 2 * (128 + 512 + 288 + 512) + 64 + 165
    assert not any("layer2" in name or "fc" in name for name, _ in shallow.named_parameters())


def test_a_shallow_network_is_independent(exits, images):
    before = exits(images)
    shallow = exits.alone(1)
    for parameter in shallow.parameters():
        parameter.data.zero_()
    assert torch.equal(exits(images), before)
    assert exits.alone(1)(images).abs().sum() > 0


def test_multiply_adds_are_those_up_to_the_exit(exits):
    """A block has 256 * (512 + 288 + 512) at 16 x 16, and at a quarter of the pixels with twice the channels."""
    stem, block = 256 * 27 * 32, 256 * (512 + 288 + 512)
    widths = (32, 64, 128, 128)  # of the features at the exits
    expected = tuple(stem + n * block + 5 * width for n, width in zip((2, 3, 5, 6), widths, strict=True))
    assert exits.macs() == expected


def test_the_loss_is_the_sum_over_the_exits(plain, images):
    exits, labels = ShallowExits(plain, 4, SIZE).train(), torch.tensor([0, 3, 4])
    criterion = ExitsLoss(exits, nn.CrossEntropyLoss())
    output = exits(images)
    parts = [F.cross_entropy(logits, labels) for logits in exits.logits]
    loss = criterion(output, labels, 0.0)
    torch.testing.assert_close(loss, torch.stack(parts).sum(), rtol=1e-12, atol=0)
    assert criterion.terms["task"] == parts[-1]
    torch.testing.assert_close(criterion.terms["exits"], torch.stack(parts[:-1]).sum(), rtol=1e-12, atol=0)
    assert exits.logits == ()
    loss.backward()
    # a fresh classifier is near zero, not zero
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in exits.parameters())


def test_in_eval_mode_no_logits_are_kept(exits, images):
    exits(images)
    assert exits.logits == ()


@pytest.mark.parametrize(
    ("name", "first"),
    [("preresnext20_8x2d", nn.BatchNorm2d), ("mobilenetv2_050", nn.BatchNorm2d), ("resnext20_8x4d", None)],
)
def test_what_is_already_activated_is_not_normalized_again(name, first):
    exits = ShallowExits(timm.create_model(name, num_classes=5), 3, 32)
    for head in exits.heads:
        assert isinstance(head[0], first or nn.AdaptiveAvgPool2d)
        assert head[-1].out_features == 5


def test_what_cannot_be_is_refused(exits):
    with pytest.raises(ValueError, match=r"has 6 blocks, found exits=7; expected 1 to 6"):
        ShallowExits(network(), 7, SIZE)
    with pytest.raises(ValueError, match="found exits=0"):
        ShallowExits(network(), 0, SIZE)
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"found exit {number}, expected 1"):
            exits.alone(number)
    headless = timm.create_model("preresnext20_8x2d", num_classes=0)
    with pytest.raises(ValueError, match="no classifier"):
        ShallowExits(headless, 2, SIZE)
