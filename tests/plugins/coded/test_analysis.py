"""What the analyses measure, against literal versions on a small network in float64."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery.errors import InvalidOption
from surgery.models import CifarResNet, resnext
from surgery.testing import unsettle
from surgery_coded import choose_threshold, early_decode, judge, mask_branches, switch_branches
from surgery_coded.analysis import agreement, binary_reports, collect, energy_by_class
from surgery_coded.probes import output_distribution, removal_accuracy
from surgery_coded.pruner import coded_blocks
from tests.plugins.coded import oracle

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
BLOCK, CLASSES = "layer2.1", 6


@pytest.fixture(scope="module")
def coded():
    """A coded ResNeXt of two coded stages, 8 branches, 4 and 2 active; never to be changed."""
    torch.manual_seed(0)
    model = unsettle(CifarResNet(resnext(8, 2, depth=20, base=8), num_classes=CLASSES)).double()
    with torch.no_grad():
        model.get_submodule(BLOCK).bn3.weight.mul_(8)  # the prediction shall depend on this block
    return surgery.convert(model, "coded", scheme={"layer2": "4/8", "layer3": "2/8"}, input_size=16).eval()


@pytest.fixture(scope="module")
def samples(coded):
    """Images and targets; two of three targets are what the network predicts, so that its accuracy can fall."""
    x = torch.randn(24, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        predicted = coded(x).argmax(dim=1)
    y = torch.arange(24) % CLASSES
    return x, torch.where(torch.arange(24) % 3 > 0, predicted, y)


def batched(samples, size: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(*(part.split(size) for part in samples), strict=True))


def merge_of(model, block: str = BLOCK):
    return {found.path: module for found, module in coded_blocks(model)}[block]


@contextmanager
def hooked(handle):
    try:
        yield
    finally:
        handle.remove()


# --- collect ---


def test_collect_gathers_what_single_calls_return(coded, samples):
    x, y = samples
    seen = collect(coded, DataLoader(TensorDataset(x, y), batch_size=5))
    with torch.no_grad(), surgery.record(coded) as taps:
        logits = coded(x)
    torch.testing.assert_close(seen.logits, logits, **CLOSE)
    assert torch.equal(seen.targets, y)
    decoded = early_decode(coded, x)
    assert list(seen.decoded) == list(seen.energies) == list(decoded)
    for block, classes in decoded.items():
        assert torch.equal(seen.decoded[block], classes)
        torch.testing.assert_close(seen.energies[block], taps[f"{block}/energy"], **CLOSE)
        assert seen.decoder_accuracy[block] == int((classes == y).sum()) / 24
    assert seen.accuracy == int((logits.argmax(dim=1) == y).sum()) / 24


def test_mean_energies_of_a_class_are_those_of_its_samples(coded, samples):
    x, y = samples
    y = y.clamp(max=CLASSES - 2)  # no sample of the last class
    seen = collect(coded, batched((x, y)))
    for block, means in energy_by_class(seen).items():
        for k in range(CLASSES - 1):
            if bool((y == k).any()):
                torch.testing.assert_close(means[k], seen.energies[block][y == k].mean(dim=0), **CLOSE)
        assert bool(means[-1].isnan().all())


# --- agreement ---


def test_agreement_worked_by_hand():
    """Predictions 0, 1, 1, 0, right in the first and third; decoders agree 2, 1, 0, 0 times."""
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    decoded = {"a": torch.tensor([0, 1, 0, 1]), "b": torch.tensor([0, 0, 0, 1])}
    found = agreement(decoded, logits, torch.tensor([0, 0, 1, 1]))
    assert found.count.tolist() == [2, 1, 1]
    assert found.share.tolist() == [0.5, 0.25, 0.25]
    assert found.accuracy.tolist() == [0.5, 0.0, 1.0]


def test_agreement_of_no_sample_has_no_accuracy():
    found = agreement({"a": torch.tensor([1])}, torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert found.count.tolist() == [0, 1]
    assert math.isnan(found.accuracy[0])
    assert float(found.accuracy[1]) == 0.0


def test_agreement_refuses_lengths_that_differ():
    with pytest.raises(InvalidOption, match=r"1 early decoders and lengths \[2, 3\]"):
        agreement({"a": torch.tensor([0, 1])}, torch.rand(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InvalidOption, match="0 early decoders"):
        agreement({}, torch.rand(3, 2), torch.zeros(3, dtype=torch.long))


# --- removal ---


def switched(model, samples, size: int, **options):
    """Return the accuracies and, for every forward in order, the branches that were on."""
    seen = []
    module = merge_of(model)
    with hooked(module.register_forward_pre_hook(lambda m, _: seen.append(m.active.clone()))):
        found = removal_accuracy(model, batched(samples, size), BLOCK, **options)
    return found, seen


def test_removal_of_k_branches_takes_k_of_the_true_class_or_of_the_others(coded, samples):
    x, y = samples
    found, masks = switched(coded, samples, len(x))
    words = merge_of(coded).codewords[y]
    assert list(found.active) == list(found.inactive) == [0, 1, 2, 3, 4]
    for number, on in enumerate(masks):  # active with k = 0..4, then inactive
        kind, k = (words, ~words)[number // 5], number % 5
        assert (on == 0)[kind].view(len(x), 4).sum(dim=1).tolist() == [k] * len(x)
        assert bool((on[~kind] == 1).all())


def test_removal_accuracy_is_that_of_branches_set_to_zero_literally(coded, samples):
    """The outputs of the block are computed from all t_n, those of removed branches replaced by zeros."""
    x, y = samples
    found, masks = switched(coded, samples, len(x))
    module, literal = merge_of(coded), []
    for on in masks:

        def replaced(m, inputs, _, on=on):
            return oracle.coded_merge(inputs[0], m.weight, m.bias, 8, active=on)[0]

        with hooked(module.register_forward_hook(replaced)), torch.no_grad():
            literal.append(int((coded(x).argmax(dim=1) == y).sum()) / len(x))
    assert [*found.active.values(), *found.inactive.values()] == literal
    assert len(set(literal)) > 2  # the measure tells something here


def test_removal_of_all_active_branches_keeps_the_inactive_ones(coded, samples):
    _, y = samples
    module, outputs = merge_of(coded), []
    with hooked(module.register_forward_hook(lambda _, i, output: outputs.append((i[0], output)))):
        removal_accuracy(coded, batched(samples, 24), BLOCK, counts=[4])
    hidden, output = outputs[0]
    word = module.codewords[y].double()
    expected, _ = oracle.coded_merge(hidden, module.weight, module.bias, 8, active=1 - word)
    torch.testing.assert_close(output, expected.detach(), **CLOSE)


@pytest.mark.parametrize("size", [1, 5])
def test_removal_does_not_depend_on_the_batches_but_on_the_seed(coded, samples, size):
    whole, masks = switched(coded, samples, 24, counts=[2])
    parts, smaller = switched(coded, samples, size, counts=[2])
    assert parts == whole
    assert torch.equal(torch.cat(smaller[::2]), masks[0])
    assert torch.equal(torch.cat(smaller[1::2]), masks[1])
    assert not torch.equal(switched(coded, samples, 24, counts=[2], seed=1)[1][0], masks[0])


def test_every_active_branch_is_removed_equally_often(coded):
    """600 samples of class 0, one of its four branches each: 150 +- 11 expected."""
    x, y = torch.randn(600, 3, 4, 4, dtype=torch.float64), torch.zeros(600, dtype=torch.long)
    _, masks = switched(coded, (x, y), 600, counts=[1])
    removed = (masks[0] == 0).sum(dim=0)[merge_of(coded).codewords[0]]
    assert bool(((removed - 150).abs() < 45).all())


def test_counts_beyond_one_kind_are_left_out_of_it(coded, samples):
    found = removal_accuracy(coded, batched(samples), "layer3.1", counts=[0, 2, 6])
    assert (list(found.active), list(found.inactive)) == ([0, 2], [0, 2, 6])
    with pytest.raises(InvalidOption, match=r"counts=\[7\].*2 active and 6 inactive"):
        removal_accuracy(coded, batched(samples), "layer3.1", counts=[7])


@pytest.mark.parametrize("before", [None, torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0], dtype=torch.float64)])
def test_switches_and_hooks_are_put_back_also_after_an_exception(coded, samples, before):
    def broken():
        yield samples
        raise RuntimeError("no more")

    class Broken:
        def __iter__(self):
            return broken()

    switch_branches(coded, BLOCK, before)
    module = merge_of(coded)
    try:
        removal_accuracy(coded, batched(samples), BLOCK, counts=[1])
        output_distribution(coded, batched(samples), BLOCK, branches=1)
        for probe in (removal_accuracy, output_distribution):
            with pytest.raises(RuntimeError, match="no more"):
                probe(coded, Broken(), BLOCK)
        assert (module.active is None) if before is None else torch.equal(module.active, before)
        assert not module._forward_pre_hooks
        assert not any(tap.recording for tap in coded.modules() if isinstance(tap, surgery.taps.Tap))
    finally:
        switch_branches(coded, BLOCK, None)


def test_nothing_is_nan_with_every_branch_removed(coded, samples):
    for block, module in coded_blocks(coded):
        switch_branches(coded, block.path, torch.zeros(module.branches))
    try:
        seen = collect(coded, batched(samples))
        spread = output_distribution(coded, batched(samples), BLOCK, bins=3)
    finally:
        for block, _ in coded_blocks(coded):
            switch_branches(coded, block.path, None)
    assert bool(seen.logits.isfinite().all())
    assert all(not bool(energies.any()) for energies in seen.energies.values())
    assert spread.edges.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert int(spread.active[:, 1:].sum() + spread.inactive[:, 1:].sum()) == 0


# --- outputs of the branches ---


@pytest.mark.parametrize("block", [BLOCK, "layer3.0"])
def test_output_distribution_counts_the_literal_outputs(coded, samples, block):
    x, y = samples
    module, hidden = merge_of(coded, block), []
    found = output_distribution(coded, batched(samples), block, branches=3, bins=4)
    with hooked(module.register_forward_pre_hook(lambda _, i: hidden.append(i[0]))), torch.no_grad():
        coded(x)
    outputs = [t.detach() for t in oracle.branch_outputs(hidden[0], module.weight, 8)]
    mean_energy = sum(oracle.energy(t) for t in outputs) / 8
    values = [(t / mean_energy.sqrt()[:, None, None, None]).abs() for t in outputs[:3]]
    largest = max(float(t.max()) for t in values)
    torch.testing.assert_close(found.edges, torch.linspace(0, largest, 5, dtype=torch.float64), **CLOSE)
    for n, t in enumerate(values):
        uses = module.codewords[y, n]
        for counts, chosen in ((found.active, uses), (found.inactive, ~uses)):
            quarters = t[chosen] * 4 / largest
            literal = [int(((quarters >= low) & (quarters < low + 1)).sum()) for low in range(4)]
            literal[3] = int((quarters >= 3).sum())  # the last bin holds its upper edge
            assert counts[n].tolist() == literal


def test_output_distribution_needs_batches_that_can_be_read_twice(coded, samples):
    with pytest.raises(InvalidOption, match="type generator, which can be read only once"):
        output_distribution(coded, (pair for pair in batched(samples)), BLOCK)
    with pytest.raises(InvalidOption, match="expected 1 to 8 branches"):
        output_distribution(coded, batched(samples), BLOCK, branches=9)


# --- networks for one class ---


def test_binary_reports_equal_the_masked_network_judged_by_hand(coded, samples):
    x, y = samples
    chosen = [k for k in range(CLASSES) if int((y[:12] == k).sum()) > 0 and int((y[12:] == k).sum()) > 0][:2]
    found = binary_reports(coded, batched((x[:12], y[:12])), batched((x[12:], y[12:])), chosen)
    assert list(found) == chosen
    for k, report in found.items():
        with torch.no_grad():
            logits = mask_branches(coded, [k])(x)[:, k]
        threshold = choose_threshold(logits[:12], y[:12] == k)
        expected = judge(logits[12:], y[12:] == k, threshold)
        assert report.threshold == pytest.approx(expected.threshold, rel=1e-10)
        assert (report.precision, report.recall) == (expected.precision, expected.recall)


def test_negatives_are_drawn_for_each_positive(coded, samples):
    """All 12 test samples called positive: precision is the share of positives, 1/2 with one negative for each."""
    x, y = samples
    k = int(y.mode().values)
    batches = batched((x.repeat(2, 1, 1, 1), torch.cat([y, torch.full_like(y, (k + 1) % CLASSES)])))
    reports = binary_reports(coded, batches, batches, [k], negatives=1)
    again = binary_reports(coded, batches, batches, [k], negatives=1)
    assert reports == again
    network = surgery.prune(coded, classes=[k]).eval()
    with torch.no_grad():
        called = network(torch.cat([images for images, _ in batches]))[:, 0] > reports[k].threshold
    positive = torch.cat([targets for _, targets in batches]) == k
    hits, own = int((called & positive).sum()), int(positive.sum())
    assert reports[k].recall == hits / own
    assert reports[k].precision >= hits / (hits + own)  # at most as many negatives as positives were called
    with pytest.raises(InvalidOption, match="negatives=0"):
        binary_reports(coded, batches, batches, [k], negatives=0)


def test_class_without_samples_is_named(coded, samples):
    x, y = samples[0][:4], torch.tensor([0, 0, 1, 1])
    with pytest.raises(InvalidOption, match=r"found 0 samples of class 5 and 4 others"):
        binary_reports(coded, batched((x, y)), batched((x, y)), [5])


# --- what is refused ---


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, -1]), "found targets from -1 to 2, expected classes 0 to 5"),
        (torch.tensor([0, 1, 2, 6]), "found targets from 0 to 6, expected classes 0 to 5"),
        (torch.ones(4, CLASSES), r"found targets \(4, 6\) of torch.float32, expected class indices \(4,\)"),
        (torch.tensor([0, 1, 2]), r"found targets \(3,\)"),
        (torch.tensor([True, False, True, True]), "torch.bool"),
    ],
)
def test_analyses_refuse_targets_that_are_no_classes(coded, samples, targets, message):
    bad, good = [(samples[0][:4], targets)], batched(samples)
    seen = collect(coded, [(samples[0][:4], torch.arange(4))])
    for analysis in (
        lambda: collect(coded, bad),
        lambda: removal_accuracy(coded, bad, BLOCK, counts=[0]),
        lambda: output_distribution(coded, bad, BLOCK),
        lambda: binary_reports(coded, bad, good, [1]),
        lambda: binary_reports(coded, good, bad, [1]),
        lambda: energy_by_class(replace(seen, targets=targets)),
    ):
        with pytest.raises(InvalidOption, match=message):
            analysis()


def test_agreement_refuses_targets_that_are_no_classes():
    with pytest.raises(InvalidOption, match="found targets from -1 to 1, expected classes 0 to 1"):
        agreement({"a": torch.tensor([0, 1])}, torch.eye(2), torch.tensor([-1, 1]))


def test_targets_may_be_of_any_integer_type(coded, samples):
    x, y = samples
    for dtype in (torch.uint8, torch.int32):
        assert removal_accuracy(coded, [(x, y.to(dtype))], BLOCK, [1]) == removal_accuracy(coded, [(x, y)], BLOCK, [1])
        assert collect(coded, [(x, y.to(dtype))]).targets.dtype == torch.int64


def test_analyses_refuse_numbers_that_are_not_whole(coded, samples):
    batches = batched(samples)
    for analysis, message in (
        (lambda: removal_accuracy(coded, batches, BLOCK, counts=[1.5]), r"count=1\.5"),
        (lambda: removal_accuracy(coded, batches, BLOCK, counts=[True]), "count=True"),
        (lambda: removal_accuracy(coded, batches, BLOCK, counts=[-1]), "count=-1"),
        (lambda: removal_accuracy(coded, batches, BLOCK, counts=[5]), "expected numbers from 0 to 4"),
        (lambda: removal_accuracy(coded, batches, BLOCK, counts=[]), r"counts=\[\]"),
        (lambda: output_distribution(coded, batches, BLOCK, bins=1.5), r"bins=1\.5"),
        (lambda: output_distribution(coded, batches, BLOCK, branches=0), "branches=0"),
        (lambda: binary_reports(coded, batches, batches, []), r"classes=\[\], expected one or more of 0 to 5"),
        (lambda: binary_reports(coded, batches, batches, [6]), r"classes=\[6\], expected one or more of 0 to 5"),
        (lambda: binary_reports(coded, batches, batches, [1.5]), r"class=1\.5"),
        (lambda: binary_reports(coded, batches, batches, [1], negatives=1.5), r"negatives=1\.5"),
    ):
        with pytest.raises(InvalidOption, match=message):
            analysis()


def test_thresholds_and_reports_refuse_what_does_not_fit():
    logits, positive = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([False, True, True])
    for call in (choose_threshold, lambda z, p: judge(z, p, 0.5)):
        for z, p, message in (
            (logits, positive[:1], "found 3 logits, 0 of them not finite, and 1 truth values"),
            (logits / torch.tensor([0.0, 1.0, 1.0]), positive, "1 of them not finite"),
            (logits, torch.tensor([3, 1, 0]), "positive other than 0 and 1"),
        ):
            with pytest.raises(InvalidOption, match=message):
                call(z, p)
    for steps in (0, 2.5):
        with pytest.raises(InvalidOption, match=f"steps={steps}"):
            choose_threshold(logits, positive, steps=steps)


def test_analyses_refuse_what_is_not_whole_or_not_coded_or_empty(coded, samples):
    pruned = surgery.prune(coded, classes=[3]).eval()
    batches = batched(samples)
    for analysis in (
        collect,
        lambda m, b: removal_accuracy(m, b, BLOCK),
        lambda m, b: output_distribution(m, b, BLOCK),
        lambda m, b: binary_reports(m, b, b),
    ):
        for model, found, message in (
            (torch.nn.Linear(2, 2), batches, "found a Linear"),
            (pruned, batches, "was cut"),
            (coded, [], "found no batch"),
        ):
            with pytest.raises(InvalidOption, match=message):
                analysis(model, found)
        try:
            with pytest.raises(InvalidOption, match="train mode"):
                analysis(coded.train(), batches)
        finally:
            coded.eval()
    for probe in (removal_accuracy, output_distribution):
        with pytest.raises(InvalidOption, match=r"'layer1\.0' is no coded block, expected one of layer2\.0"):
            probe(coded, batches, "layer1.0")
