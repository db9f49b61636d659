"""Laws that hold for every small residual network, whatever its blocks look like."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, find, given, settings
from torch import nn

import surgery
import surgery_coded
from surgery import Cut, Method, PrunePlan
from surgery.conversion import prepare
from surgery.testing import ResidualSpec, residual_networks
from tests.stand_ins import rebuilt
from tests.toys import Scale, Toy, installed, package

SIZE = 9  # odd, so that strides meet a border


def images(batch=3) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(model, x, *, train=False):
    with torch.no_grad():
        return model.train(train)(x)


@dataclass(frozen=True)
class Cutter(Method):
    """Insert nothing that matters, and keep the named branches of every block that can lose some."""

    name: ClassVar[str] = "cutter"
    preserves: ClassVar[str] = "output"

    def transform(self, architecture, rewriter):
        for block in architecture.blocks:
            rewriter.insert(nn.Identity(), block.body, at=block, role="mark")

    def losses(self, step):
        return {}

    def plan(self, model, **criteria: Any):
        blocks = [b for b in model.meta["architecture"].blocks if cuttable(b)]
        cuts = [Cut("branches", b.path, kept(b), b.cardinality, "asked for") for b in blocks]
        return PrunePlan.of(model, self.name, cuts, {})


def cuttable(block) -> bool:
    """A block with a convolution that joins its branches, and more than one of them."""
    return block.merge is not None and block.cardinality > 1


def kept(block) -> tuple[int, ...]:
    """Every other branch, the last one among them."""
    return tuple(range(block.cardinality))[::-2][::-1]


@settings(max_examples=12)
@given(residual_networks())
@example(ResidualSpec((1, 2), preactivation=True, attention="inside", projection="pool"))
@example(ResidualSpec((2, 1), kind="basic", attention="behind", projection="pad"))
def test_recognition_tracing_gates_and_files_hold_for_every_residual_network(spec):
    model = spec.build().double()
    found = surgery.inspect(model, SIZE)
    assert tuple(block.path for block in found.blocks) == spec.block_paths
    assert all(block.is_residual for block in found.blocks)
    assert [block.cardinality for block in found.blocks] == [
        spec.cardinality(int(p.split(".")[1])) for p in spec.block_paths
    ]
    assert found.refusals == ()

    # Traced equals eager in both modes; statistics move in train mode alone, and to the same values.
    network, eager, x = rebuilt(model, SIZE), copy.deepcopy(model), images()
    assert torch.equal(run(network, x), run(eager, x))
    untouched = {key: value.clone() for key, value in network.state_dict().items()}
    assert list(untouched) == list(model.state_dict())
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(network, x, train=True), run(eager, x, train=True))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in eager.state_dict().items())
    assert not torch.equal(network.state_dict()["stem.1.running_mean"], untouched["stem.1.running_mean"])

    # A gate of one, with a tap before it, changes no bit; a gate of zero is what bypassing the block gives.
    with pytest.MonkeyPatch.context() as patch:
        installed(patch, package(Toy))
        gated = surgery.convert(model, "toy", input_size=SIZE)
        assert torch.equal(run(gated, x), run(model, x))
        for index, path in enumerate(spec.block_paths):
            closed = copy.deepcopy(gated)
            [module for module in closed.modules() if isinstance(module, Scale)][index].factor.data.zero_()
            bypassed = surgery.prune(gated, block=index)
            assert torch.equal(run(bypassed, x), run(closed, x)), path
            assert not [key for key in bypassed.state_dict() if key.startswith(f"{path}.convs")]


@settings(max_examples=12)
@given(residual_networks())
@example(ResidualSpec((1, 1), groups=4, width=1, preactivation=True))
@example(ResidualSpec((1, 1), groups=1, width=3, kind="basic", projection="pad"))
def test_kept_branches_equal_silenced_ones_and_survive_a_file(tmp_path_factory, spec):
    model, x = spec.build().double().eval(), images()
    found = surgery.inspect(model, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        installed(patch, package(Cutter))
        converted = surgery.convert(model, "cutter", input_size=SIZE)
        pruned = surgery.prune(converted)
        silent = copy.deepcopy(model)
        for block in found.blocks:
            if cuttable(block):
                silence(silent, block, set(range(block.cardinality)) - set(kept(block)))
        expected = run(silent, x)
        torch.testing.assert_close(run(pruned, x), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
        if any(cuttable(block) for block in found.blocks):
            assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())

        path = tmp_path_factory.mktemp("file") / "network.safetensors"
        surgery.save(pruned, path, factory=lambda: spec.build().double())
        loaded = surgery.load(path, factory=lambda: spec.build().double())
        assert torch.equal(run(loaded, x), run(pruned, x))


def silence(model, block, branches) -> None:
    """Let whatever reads the channels of some branches ignore them: the merge, and squeeze-excite before it."""
    readers = [model.get_submodule(block.merge)]
    if block.attention is not None:
        readers.append(model.get_submodule(block.path).inside.down)
    width = block.channels.hidden // block.cardinality
    for reader in readers:
        for branch in branches:
            reader.weight.data[:, branch * width : (branch + 1) * width] = 0


def test_squeeze_excite_inside_a_block_is_cut_with_it_and_named_as_what_mixes_the_branches():
    spec = ResidualSpec((1,), groups=4, width=2, attention="inside")
    network = prepare(spec.build(), Toy(), SIZE)
    rewriter = surgery.Rewriter(network, "toy")
    block = rewriter.architecture.blocks[0]
    assert block.attention == "stages.0.0.inside"
    rewriter.keep(block, branches=[0, 3])
    inside = rewriter.finish().get_submodule(block.attention)
    assert (inside.down.in_channels, inside.down.out_channels, inside.up.out_channels) == (4, 4, 4)


@settings(max_examples=4)
@given(residual_networks())
def test_specs_are_data_and_build_the_same_network_each_time(spec):
    assert json.loads(json.dumps(list(spec.blocks))) == list(spec.blocks)
    before = torch.random.get_rng_state()
    model, twin = spec.build(), spec.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert model(torch.randn(2, 3, SIZE, SIZE)).shape == (2, 10)


def test_the_strategy_shrinks_to_one_plain_block():
    assert find(residual_networks(), lambda spec: True) == ResidualSpec(
        (1,), kind="basic", groups=1, width=1, preactivation=False, attention="none", projection="conv", inplace=False
    )


def test_coded_keeps_its_laws_where_a_random_network_has_groups():
    spec = ResidualSpec((1, 1), groups=8, width=1)
    coded = surgery.convert(spec.build().double(), "coded", input_size=SIZE)
    pruned = surgery.prune(coded, classes=[1, 2])
    expected = run(surgery_coded.mask_branches(coded, [1, 2]), images())[:, [1, 2]]
    torch.testing.assert_close(run(pruned, images()), expected, rtol=1e-12, atol=1e-12)
