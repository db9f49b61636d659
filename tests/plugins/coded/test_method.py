"""The method `coded` on whole networks, against the definition of the method and the published figures."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import surgery
import surgery_coded
from surgery.errors import InvalidOption, NothingConverted
from surgery.models import CifarResNet, resnext
from surgery.testing import ResidualSpec, check_method, tiny_networks, unsettle
from surgery_coded import (
    BinaryReport,
    Coded,
    CodingScheme,
    choose_threshold,
    early_decode,
    judge,
    mask_branches,
)
from surgery_coded.modules import BranchDropout, CodedConv2d
from surgery_coded.pruner import coded_blocks
from tests.plugins.coded import oracle

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def network(depth: int = 20, groups: int = 8, classes: int = 10) -> nn.Module:
    """Return a ResNeXt of three stages, two blocks each for depth 20, in float64."""
    torch.manual_seed(0)
    return unsettle(CifarResNet(resnext(groups, 2, depth=depth, base=8), num_classes=classes)).double()


def images(batch: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


# --- what is coded ---


@pytest.mark.parametrize(
    ("build", "stages"),
    [
        (lambda: torchvision.models.resnext50_32x4d(), {"layer3": 6, "layer4": 3}),
        (lambda: timm.create_model("resnext50_32x4d"), {"layer3": 6, "layer4": 3}),
        (lambda: timm.create_model("resnext29_8x64d"), {"layer2": 3, "layer3": 3}),
    ],
)
def test_default_codes_the_last_two_stages_of_every_library(build, stages):
    model = build()
    coded = surgery.convert(model, "coded", input_size=64)
    blocks = [block for block, _ in coded_blocks(coded)]
    assert {name: sum(block.stage == name for block in blocks) for name in stages} == stages
    assert len(blocks) == sum(stages.values())
    halves = {block.stage: module.ratio for block, module in coded_blocks(coded)}
    assert list(halves.values()) == [0.5, 0.25]
    assert coded.eval()(torch.randn(1, 3, 64, 64)).shape == (1, coded.meta["architecture"].head.classes)
    assert list(coded.state_dict()) == list(model.state_dict())


def test_default_takes_the_next_ratio_that_has_enough_codewords():
    """Of 4 branches C(4, 2) = 6 words have two ones, C(4, 1) = 4 have one: for 6 classes both stages take 2/4."""
    coded = surgery.convert(network(groups=4, classes=6), "coded", input_size=32)
    assert {block.stage: module.ratio for block, module in coded_blocks(coded)} == {"layer2": 0.5, "layer3": 0.5}


def test_default_refuses_where_no_ratio_has_enough_codewords():
    """Of 8 branches at most C(8, 4) = 70 words have equally many ones."""
    with pytest.raises(
        NothingConverted, match=r"layer2: 8 branches have too few codewords for 71 classes; use a wider"
    ):
        surgery.convert(network(classes=71), "coded", input_size=32)


def test_blocks_of_ratio_one_stay_untouched():
    model = network()
    coded = surgery.convert(model, "coded", input_size=32, scheme={"layer1": "8/8", "layer2": "1", "layer3": "2/8"})
    assert {block.stage for block, _ in coded_blocks(coded)} == {"layer3"}
    plain = surgery.convert(model, "coded", input_size=32, scheme={"layer2": "4/8"})
    for path in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        assert type(coded.get_submodule(path).conv3) is nn.Conv2d
        if path.startswith("layer1"):
            assert coded.block(path).code == plain.block(path).code
            assert str(coded.block(path)) == str(plain.block(path))


def test_all_stages_at_ratio_one_is_no_conversion():
    with pytest.raises(
        NothingConverted, match="layer3: its ratio is 1, which leaves it untouched; choose a ratio below 1"
    ):
        surgery.convert(network(), "coded", scheme={"layer3": "8/8"}, input_size=32)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"layer9": "4/8"}, r"'layer9' is not a stage of CifarResNet; its stages are layer1, layer2, layer3"),
        ({"layer3": "half"}, r"stage 'layer3' has the ratio 'half', expected a fraction such as '8/32'"),
        ({"layer3": "1/0"}, r"stage 'layer3' has the ratio '1/0', expected a fraction"),
        (
            {"layer3": "3/7"},
            r"stage 'layer3' has 8 branches, of which 3/7 is 3\.42857; expected a whole number from 1 to 8",
        ),
        ({"layer3": "0/8"}, r"expected a whole number from 1 to 8"),
        ({"layer3": "9/8"}, r"expected a whole number from 1 to 8"),
        ({"layer3": 0.5}, r"stage 'layer3' has 0\.5, expected a ratio such as '8/32' or a CodingScheme"),
        ({"layer3": "1/8"}, r"10"),  # 8 words of weight 1 for 10 classes
        ({"layer3": {"format": "other"}}, r"coding scheme record: found format 'other'"),
    ],
)
def test_schemes_that_do_not_fit_are_refused(scheme, message):
    with pytest.raises(InvalidOption, match=message):
        surgery.convert(network(), "coded", scheme=scheme, input_size=32)


@pytest.mark.parametrize(("classes", "branches"), [(9, 8), (10, 10)])
def test_scheme_for_another_network_is_refused(classes, branches):
    scheme = CodingScheme.search(classes, branches, 4)
    expected = (
        rf"has 8 branches and the network 10 classes, found a scheme for {classes} classes over {branches} branches"
    )
    with pytest.raises(InvalidOption, match=expected):
        surgery.convert(network(), "coded", scheme={"layer3": scheme}, input_size=32)


def test_scheme_that_is_no_table_is_refused():
    with pytest.raises(InvalidOption, match=r"option 'scheme' is '4/8', expected stage names with ratios"):
        surgery.convert(network(), "coded", scheme="4/8", input_size=32)


def test_scheme_given_as_object_as_json_and_as_ratio_are_the_same():
    scheme = CodingScheme.search(10, 8, 4)
    networks = [
        surgery.convert(network(), "coded", scheme={"layer3": value}, input_size=32)
        for value in (scheme, scheme.to_dict(), "4/8")
    ]
    for coded in networks:
        assert all(torch.equal(module.codewords, scheme.codewords) for _, module in coded_blocks(coded))
    assert torch.equal(run(networks[0], images()), run(networks[1], images()))
    assert torch.equal(run(networks[0], images()), run(networks[2], images()))


def test_searched_scheme_is_in_the_record_and_a_given_one_in_the_options():
    searched = surgery.convert(network(), "coded", scheme={"layer3": "4/8"}, input_size=32)
    (operation,) = searched.meta["conversion"].operations
    assert operation.decisions == {"scheme/layer3": CodingScheme.search(10, 8, 4).to_dict()}
    given = surgery.convert(network(), "coded", scheme={"layer3": CodingScheme.search(10, 8, 4)}, input_size=32)
    (operation,) = given.meta["conversion"].operations
    assert operation.decisions == {}
    assert operation.options["scheme"] == {"layer3": CodingScheme.search(10, 8, 4).to_dict()}
    assert Coded.from_options(operation.options).options() == operation.options


# --- the definition ---


def literal(
    model: nn.Module, coded: surgery.ConvertedNetwork, masks: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Make a plain network compute what the method defines, block by block; return where its energies appear."""
    energies: dict[str, torch.Tensor] = {}

    def code(block: surgery.Block, module: CodedConv2d) -> None:
        def hook(conv, inputs, output):
            merged, energies[f"{block.path}/energy"] = oracle.coded_merge(
                inputs[0], conv.weight, conv.bias, module.branches, masks.get(block.stage), stride=conv.stride
            )
            return merged

        model.get_submodule(block.merge).register_forward_hook(hook)

    for block, module in coded_blocks(coded):
        code(block, module)
    return energies


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", ["resnext", "torchvision resnext", "timm resnext"])
def test_whole_network_equals_the_literal_definition(name, dropped, monkeypatch):
    """Logits, energies, total loss and all gradients, in train mode, with and without a given mask of branches."""
    model = tiny_networks()[name]().double()
    mu, p = 3.0, 0.25 if dropped else 0.0
    coded = surgery.convert(model, "coded", mu=mu, p_drop=p, input_size=32)
    stages = dict.fromkeys(block.stage for block, _ in coded_blocks(coded))
    masks = {stage: (torch.rand(4, 8, dtype=torch.float64) < 0.75) / 0.75 for stage in stages} if dropped else {}
    given = iter(masks.values())
    monkeypatch.setattr(BranchDropout, "forward", lambda self, x: next(given))
    energies = literal(model, coded, masks)
    labels = torch.tensor([3, 0, 9, 3])

    output = coded(images())
    found_energies = dict(surgery.taps.taps_of(coded))
    criterion = surgery.Objective(coded, nn.CrossEntropyLoss(label_smoothing=0.1))
    loss = criterion(output, labels)
    loss.backward()

    expected_output = model(images())
    task = F.cross_entropy(expected_output, labels, label_smoothing=0.1)
    coding = [
        oracle.coding_loss(energies[module.energy.name], module.codewords[labels].int().tolist(), module.ratio)
        for _, module in coded_blocks(coded)
    ]
    (task + mu * sum(coding)).backward()

    torch.testing.assert_close(output, expected_output, **CLOSE)
    assert list(found_energies) == list(energies)
    for tap, expected in energies.items():
        torch.testing.assert_close(found_energies[tap], expected, **CLOSE)
        torch.testing.assert_close(found_energies[tap].mean(dim=1), torch.ones(4, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(criterion.terms["task"], task.detach(), **CLOSE)
    torch.testing.assert_close(criterion.terms["coding"], (mu * sum(coding)).detach(), **CLOSE)
    expected_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, _ in coded.named_parameters()] == list(expected_gradients)
    for name, parameter in coded.named_parameters():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-10, atol=1e-10 * scale)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(coded.state_dict()[key], value, **CLOSE)


def test_eval_mode_equals_the_literal_definition_and_drops_nothing():
    model = network()
    coded = surgery.convert(model, "coded", p_drop=0.5, input_size=32)
    literal(model, coded, {})
    torch.testing.assert_close(run(coded, images()), run(model, images()), **CLOSE)


def test_objective_is_the_task_plus_mu_times_the_sum_over_blocks():
    coded = surgery.convert(network(), "coded", mu=5.0, exponent=2, p_drop=0.0, input_size=32)
    criterion = surgery.Objective(coded, nn.CrossEntropyLoss())
    output = coded(images())
    energies = dict(surgery.taps.taps_of(coded))
    labels = torch.tensor([1, 2, 3, 4])
    loss = criterion(output, labels)
    blocks = [
        (module.ratio * energies[module.energy.name] - module.codewords[labels].double()).square().mean()
        for _, module in coded_blocks(coded)
    ]
    assert len(blocks) == 4
    torch.testing.assert_close(loss, F.cross_entropy(output, labels) + 5.0 * sum(blocks), rtol=1e-12, atol=0)


# --- dropping branches ---


def masks_of(coded: surgery.ConvertedNetwork) -> dict[str, torch.Tensor]:
    """Return the mask that every coded block was given in one training forward."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for block, module in coded_blocks(coded):

        def remember(module, inputs, path=block.path):
            seen[path] = inputs[1]

        handles.append(module.register_forward_pre_hook(remember))
    coded.train()(images(64))
    for handle in handles:
        handle.remove()
    return seen


def test_consecutive_blocks_of_one_scheme_share_the_mask_and_others_do_not():
    masks = masks_of(surgery.convert(network(), "coded", p_drop=0.5, input_size=32))
    assert masks["layer2.0"] is masks["layer2.1"]
    assert masks["layer3.0"] is masks["layer3.1"]
    assert not torch.equal(masks["layer2.0"], masks["layer3.0"])
    for mask in masks.values():
        assert mask.shape == (64, 8)
        assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_stages_with_one_scheme_share_the_mask_unless_another_stage_is_between():
    scheme = CodingScheme.search(10, 8, 4)
    neighbours = {"layer2": scheme, "layer3": scheme}
    masks = masks_of(surgery.convert(network(), "coded", scheme=neighbours, p_drop=0.5, input_size=32))
    assert len({id(mask) for mask in masks.values()}) == 1
    apart = {"layer1": scheme, "layer3": scheme}
    masks = masks_of(surgery.convert(network(), "coded", scheme=apart, p_drop=0.5, input_size=32))
    assert len({id(mask) for mask in masks.values()}) == 2


def test_a_fresh_mask_is_drawn_in_every_forward_and_none_in_eval_mode_or_without_dropping():
    coded = surgery.convert(network(), "coded", p_drop=0.5, input_size=32)
    assert not torch.equal(masks_of(coded)["layer2.0"], masks_of(coded)["layer2.0"])
    assert torch.equal(run(coded, images()), run(coded, images()))
    without = surgery.convert(network(), "coded", p_drop=0.0, input_size=32)
    assert not any(isinstance(module, BranchDropout) for module in without.modules())


# --- cutting classes out ---


@pytest.mark.parametrize("classes", [[3], [9, 0], [1, 4, 6], list(range(10))])
@pytest.mark.parametrize("name", ["resnext", "timm resnext"])
def test_pruned_equals_masked(name, classes):
    coded = surgery.convert(tiny_networks()[name]().double(), "coded", input_size=32)
    pruned = surgery.prune(coded, classes=classes)
    expected = run(mask_branches(coded, classes), images())[:, classes]
    torch.testing.assert_close(run(pruned, images()), expected, rtol=1e-12, atol=1e-12)
    for block, module in coded_blocks(coded):
        union = module.codewords[classes].any(dim=0)
        assert surgery.inspect(pruned).block(block.path).cardinality == int(union.sum())


def test_masking_switches_off_what_the_definition_switches_off():
    """Inactive branches are zeroed before the normalization, whose mean still divides by all branches."""
    model = network()
    coded = surgery.convert(model, "coded", input_size=32)
    for block, module in coded_blocks(coded):
        active = module.codewords[3].double()

        def hook(conv, inputs, output, active=active, branches=module.branches):
            return oracle.coded_merge(inputs[0], conv.weight, conv.bias, branches, None, active)[0]

        model.get_submodule(block.merge).register_forward_hook(hook)
    torch.testing.assert_close(run(mask_branches(coded, [3]), images()), run(model, images()), **CLOSE)


def test_masking_leaves_the_network_alone():
    coded = surgery.convert(network(), "coded", input_size=32)
    before = run(coded, images())
    masked = mask_branches(coded, [3])
    assert not torch.equal(run(masked, images()), before)
    assert torch.equal(run(coded, images()), before)


@pytest.mark.parametrize(
    ("build", "scheme", "size", "shares"),
    [
        (lambda: timm.create_model("resnext29_10x11d"), {"layer2": "5/10", "layer3": "3/10"}, 32, ("46.3", "37.2")),
        (
            lambda: timm.create_model("resnext29_20x6d", num_classes=100),
            {"layer2": "8/20", "layer3": "4/20"},
            32,
            ("37.4", "27.1"),
        ),
        (lambda: torchvision.models.resnext50_32x4d(), {"layer3": "16/32", "layer4": "8/32"}, 224, ("41.6", "34.3")),
    ],
    ids=["CIFAR-10", "CIFAR-100", "ImageNet"],
)
def test_share_of_parameters_that_one_class_keeps_is_the_published_one(build, scheme, size, shares):
    """Avranas and Kountouris, 2022: with projection shortcuts counted, and left out of both counts."""
    with torch.device("meta"):
        model = build()
    model = model.to_empty(device="cpu")
    coded = surgery.convert(model, "coded", scheme=scheme, input_size=size)
    for target in (0, 7):
        plan = surgery.plan(coded, classes=[target])
        kept = (plan.kept_params, plan.kept_params_without_projections)
        assert tuple(f"{100 * share:.1f}" for share in kept) == shares
        assert all(f"({share} % kept)" in str(plan) for share in shares)


# --- reading classes off ---


def test_early_decoders_choose_the_nearest_codeword():
    coded = surgery.convert(network(), "coded", input_size=32).eval()
    decoded = early_decode(coded, images(16))
    with surgery.record(coded) as taps, torch.no_grad():
        coded(images(16))
    assert list(decoded) == ["layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    for block, module in coded_blocks(coded):
        values = module.ratio * taps[f"{block.path}/energy"]
        words = module.codewords.int().tolist()
        distances = [
            [sum((v - w) ** 2 for v, w in zip(row, word, strict=True)) for word in words] for row in values.tolist()
        ]
        assert decoded[block.path].tolist() == [row.index(min(row)) for row in distances]
        assert decoded[block.path].dtype == torch.int64


def test_early_decoding_leaves_no_trace():
    coded = surgery.convert(network(), "coded", input_size=32).eval()
    state = {key: value.clone() for key, value in coded.state_dict().items()}
    early_decode(coded, images())
    assert all(torch.equal(value, state[key]) for key, value in coded.state_dict().items())
    assert not any(tap._slot for tap in coded.modules() if isinstance(tap, surgery.Tap))


# --- the binary classifier ---


def test_precision_recall_and_f1_worked_by_hand():
    """Logits 4, 3, 2, 1, 0 of which 4, 2, 0 are of the class; above 1.5 are 4, 3, 2: two hits of three called.

    Precision 2/3, recall 2/3, F1 = 2 * 2 / (3 + 3) = 2/3.
    """
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    positive = torch.tensor([True, False, True, False, True])
    assert judge(logits, positive, 1.5) == BinaryReport(1.5, 2 / 3, 2 / 3, 2 / 3)
    # Strictly above: 2 is not called, so one hit of two called; F1 = 2 * 1 / (2 + 3).
    assert judge(logits, positive, 2.0) == BinaryReport(2.0, 1 / 2, 1 / 3, 2 / 5)
    assert judge(logits, positive, 9.0) == BinaryReport(9.0, 0.0, 0.0, 0.0)
    assert judge(logits, torch.zeros(5, dtype=torch.bool), 1.5) == BinaryReport(1.5, 0.0, 0.0, 0.0)


def test_threshold_is_the_candidate_with_the_best_f1_worked_by_hand():
    """Negatives 0, 1, 4 (median 1), positives 2, 5, 6 (median 5); five candidates 1, 2, 3, 4, 5.

    Called above 1: 4, 2, 5, 6, so F1 = 2*3/(4+3) = 6/7. Above 2: 4, 5, 6: 2*2/(3+3) = 2/3. Above 3: the same. Above 4:
    5, 6: 2*2/(2+3) = 4/5. Above 5: 6: 2*1/(1+3) = 1/2. The best is 1.
    """
    logits = torch.tensor([0.0, 1.0, 4.0, 2.0, 5.0, 6.0])
    positive = torch.tensor([False, False, False, True, True, True])
    assert choose_threshold(logits, positive, steps=5) == 1.0
    # Without the positive at 2 the negatives at 4 and 1 are worth leaving out: above 4 are 5 and 6, F1 = 1.
    assert choose_threshold(logits[[0, 1, 2, 4, 5]], positive[[0, 1, 2, 4, 5]], steps=5) == 4.0


@pytest.mark.parametrize("positive", [[True, True], [False, False]])
def test_threshold_needs_both_kinds(positive):
    with pytest.raises(InvalidOption, match="expected images of the class and others, found only one kind"):
        choose_threshold(torch.tensor([0.0, 1.0]), torch.tensor(positive))


# --- living with it ---


def test_loss_after_another_classifier_is_refused():
    coded = surgery.convert(timm.create_model("resnext11_4x4d", num_classes=6), "coded", input_size=32)
    coded.reset_classifier(5)
    output = coded(torch.randn(2, 3, 32, 32))
    expected = "the network has 5 outputs, its schemes 6 classes; reset the classifier of the unconverted network"
    with pytest.raises(InvalidOption, match=expected):
        surgery.Objective(coded, nn.CrossEntropyLoss())(output, torch.tensor([0, 1]))


def test_fresh_process_restores_the_network_and_the_pruned_one(tmp_path):
    coded = surgery.convert(timm.create_model("resnext20_8x4d"), "coded", input_size=32, mu=4.0)
    surgery.Objective(coded, nn.CrossEntropyLoss())(coded(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    pruned = surgery.prune(coded, classes=[2, 5])
    x = torch.randn(2, 3, 32, 32)
    for name, model in (("coded", coded), ("pruned", pruned)):
        surgery.save(model, tmp_path / f"{name}.safetensors")
    torch.save(x, tmp_path / "images.pt")
    script = f"""
import pathlib, torch, surgery
torch.set_num_threads(1)
folder = pathlib.Path({str(tmp_path)!r})
for name in ("coded", "pruned"):
    model = surgery.load(folder / (name + ".safetensors")).eval()
    with torch.no_grad():
        torch.save(model(torch.load(folder / "images.pt")), folder / (name + ".pt"))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "coded.pt"), run(coded, x))
    assert torch.equal(torch.load(tmp_path / "pruned.pt"), run(pruned, x))


TWO_PROCESSES = """
import os, sys, pathlib, torch, surgery
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from surgery.testing import tiny_networks

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
distributed.init_process_group("gloo", store=distributed.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
x, labels = torch.load(folder / "batch.pt")
model = surgery.convert(tiny_networks()["resnext"]().double(), "coded", p_drop=0.0, input_size=32)
wrapped = DistributedDataParallel(model)
criterion = surgery.Objective(wrapped, nn.CrossEntropyLoss())
optimizer = torch.optim.SGD(surgery.param_groups(wrapped, lr=0.1, weight_decay=5e-4), momentum=0.9)
losses = []
for _ in range(3):
    wrapped.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    loss = criterion(wrapped(x[rank::2]), labels[rank::2])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())
torch.save((torch.stack(losses), model.state_dict()), folder / f"{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_train_like_one_with_the_whole_batch(tmp_path):
    """Frozen norms, float64: the mean of the two losses and the weights after three steps are those of one process."""
    x, labels = images(6), torch.tensor([0, 3, 5, 9, 2, 2])
    torch.save((x, labels), tmp_path / "batch.pt")
    workers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", TWO_PROCESSES, str(rank), str(tmp_path)])
        for rank in (0, 1)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    (first, weights), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))

    model = surgery.convert(tiny_networks()["resnext"]().double(), "coded", p_drop=0.0, input_size=32)
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(surgery.param_groups(model, lr=0.1, weight_decay=5e-4), momentum=0.9)
    for step in range(3):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        loss = criterion(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close((first + second)[step] / 2, loss.detach(), rtol=1e-10, atol=0)
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], other[key])
        torch.testing.assert_close(weights[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [3, [3], (3,), np.array([3]), torch.tensor([3]), np.int64(3)])
def test_class_may_be_given_in_any_integer_form(classes):
    coded = surgery.convert(network(), "coded", input_size=32)
    assert surgery.plan(coded, classes=classes).criteria == {"classes": [3]}


@pytest.mark.parametrize("classes", [True, [True], "3", 3.0, None])
def test_what_is_no_class_index_is_refused(classes):
    coded = surgery.convert(network(), "coded", input_size=32)
    with pytest.raises(InvalidOption, match="coded"):
        surgery.plan(coded, classes=classes)


@pytest.mark.parametrize(
    "options", [{"mu": True}, {"mu": float("inf")}, {"mu": "a"}, {"gradient": "Masked"}, {"scheme": "3/10"}]
)
def test_instance_is_checked_like_a_name_with_options(options):
    with pytest.raises(InvalidOption, match="coded: option"):
        Coded(**options)


def test_early_decoding_refuses_what_it_cannot_decode():
    coded = surgery.convert(network(), "coded", input_size=32)
    pruned = surgery.prune(coded, classes=[3]).eval()
    for model, message in ((network(), "expected a network"), (coded.train(), "train mode"), (pruned, "was cut")):
        with pytest.raises(InvalidOption, match=message):
            early_decode(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("classes", [[], [-1], [6], [1.5], [True], [0, 0], "3", None])
def test_masking_refuses_what_pruning_refuses(classes):
    coded = surgery.convert(network(groups=4, classes=6), "coded", input_size=32)
    for call in (lambda: surgery_coded.mask_branches(coded, classes), lambda: surgery.plan(coded, classes=classes)):
        with pytest.raises(InvalidOption, match=r"classes=|expects classes"):
            call()


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        (torch.ones(3), r"shape \(3,\), expected \(4,\) or \(B, 4\)"),
        (torch.tensor([1, 1, 0.5, 0]), "active other than 0 and 1, expected bool"),
        (torch.tensor([1, 1, torch.nan, 0]), "active other than 0 and 1, expected bool"),
        ([1, 1, -1, 0], "active other than 0 and 1, expected bool"),
    ],
)
def test_switching_refuses_what_is_neither_on_nor_off(active, expected):
    coded = surgery.convert(network(groups=4, classes=6), "coded", input_size=32)
    with pytest.raises(InvalidOption, match=expected):
        surgery_coded.switch_branches(coded, "layer3.0", active)


def test_switching_and_masking_name_a_network_that_is_not_coded():
    plain = network(groups=4, classes=6)
    with pytest.raises(InvalidOption, match="switch_branches: found a CifarResNet, expected a network converted"):
        surgery_coded.switch_branches(plain, "layer3.0", None)
    with pytest.raises(InvalidOption, match="mask_branches: found a CifarResNet, expected a network converted"):
        surgery_coded.mask_branches(plain, [0])
    coded = surgery.convert(plain, "coded", input_size=32)
    with pytest.raises(InvalidOption, match=r"'layer1.0' is no coded block, expected one of layer2.0, "):
        surgery_coded.switch_branches(coded, "layer1.0", None)


def test_onnx_file_of_a_network_with_a_silent_block_is_finite():
    """On one of the images every branch that is left of the last block outputs zero, and nothing may divide by it."""
    spec = ResidualSpec((2, 2, 2), "bottleneck", groups=1, width=2, attention="inside", projection="pad", inplace=True)
    build = {"silent": spec.build}
    laws = ["exports_to_onnx"]
    report = check_method("coded", build, criteria={"classes": [3, 7]}, laws=laws, input_size=16)
    assert report.held == {"silent": ("exports_to_onnx",)}
