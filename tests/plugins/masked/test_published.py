"""Sizes of the published networks: what a table of layers adds up to, what the paper prints, what conversion gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm

import surgery
import surgery.models  # registers the networks with timm
import surgery_masked

CLASSES = 100


@dataclass(frozen=True)
class Table:
    """A network of Table 5 of the paper, {depth, width, cardinality}, in the words of its rows.

    Three stages of (depth - 2) / 9 modules; every branch of a module is 1x1, 3x3, 1x1, as wide as `width` in the first
    stage and twice as wide in each further one; a stage puts out 4, 8 and 16 times the channels of the stem.
    """

    depth: int
    width: int
    branches: int
    stem: int

    def modules(self):
        """Yield (channels read, width of a branch, channels put out)."""
        inputs = self.stem
        for stage in range(3):
            outputs = 4 * self.stem * 2**stage
            for _ in range((self.depth - 2) // 9):
                yield inputs, self.width * 2**stage, outputs
                inputs = outputs


NETWORKS = {
    "resnext20_8x4d": Table(20, 4, 8, 16),
    "resnext29_8x4d": Table(29, 4, 8, 16),
    "resnext29_8x8d": Table(29, 8, 8, 16),
    "resnext29_8x64d": Table(29, 64, 8, 64),
}
SMALL = [name for name, table in NETWORKS.items() if table.width < 64]


def parameters_of(table, norm, classes=CLASSES):
    """Add up convolutions (no bias), norms (scale and shift) and the classifier (with bias).

    One branch is in*w + 2w, 9*w*w + 2w, w*out, and with a norm in every branch 2*out; with a shared norm 2*out come
    once a module. A module with out != in has one projection, in*out + 2*out, whatever the number of branches.
    {20, 4, 8}: stem 27*16 + 32 = 464; modules 8*(64+8+144+8+256+128) + 1024+128 = 6016, 8*(256+8+144+8+256+128) = 6400,
    8*(512+16+576+16+1024+256) + 8192+256 = 27648, 8*(1024+16+576+16+1024+256) = 23296,
    8*(2048+32+2304+32+4096+512) + 32768+512 = 105472, 8*(4096+32+2304+32+4096+512) = 88576; classifier 25600 + 100.
    464 + 6016 + 6400 + 27648 + 23296 + 105472 + 88576 + 25700 = 283572.
    """
    total, last = 27 * table.stem + 2 * table.stem, table.stem
    for inputs, width, outputs in table.modules():
        branch = inputs * width + 2 * width + 9 * width * width + 2 * width + width * outputs
        total += table.branches * branch
        total += 2 * outputs * (table.branches if norm == "branch" else 1)
        total += inputs * outputs + 2 * outputs if inputs != outputs else 0
        last = outputs
    return total + last * classes + classes


def converted(name, **options):
    source = timm.create_model(name, num_classes=CLASSES)
    return surgery.convert(source, "masked", connectivity="learned", **options)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "exact", "printed"),
    [
        ("resnext20_8x4d", 283_572, "0.28 M"),
        ("resnext29_8x8d", 858_292, "0.86 M"),
        pytest.param("resnext29_8x64d", 34_594_212, "34.59 M", marks=pytest.mark.slow),
    ],
)
def test_published_numbers_of_parameters(name, exact, printed):
    """The paper prints the first two, and for the last what ResNeXt has with ten classes and shared norms: 34.4 M."""
    assert parameters_of(NETWORKS[name], "branch") == exact
    assert f"{exact / 1e6:.2f} M" == printed
    assert parameters(converted(name, norm="branch")) == exact


def test_the_largest_is_printed_with_shared_norms_and_ten_classes():
    assert f"{parameters_of(NETWORKS['resnext29_8x64d'], 'shared', classes=10) / 1e6:.1f} M" == "34.4 M"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("norm", ["shared", "branch"])
def test_parameters_are_those_of_the_table(name, norm):
    assert parameters(converted(name, norm=norm)) == parameters_of(NETWORKS[name], norm)


def test_a_shared_norm_adds_no_parameter_to_the_source():
    """Its one affine serves every consumer; {20, 4, 8} has 283572 - 7 * 2 * 2 * (64 + 128 + 256) = 271028."""
    source = timm.create_model("resnext20_8x4d", num_classes=CLASSES)
    assert parameters(source) == parameters(converted("resnext20_8x4d", norm="shared")) == 271_028


@pytest.mark.parametrize("fan_in", [1, 4, 8])
def test_parameters_do_not_depend_on_fan_in(fan_in):
    """Figure 2 of the paper: all models have 0.28 M parameters."""
    assert parameters(converted("resnext20_8x4d", norm="branch", fan_in=fan_in)) == 283_572


def test_masks_are_no_parameters():
    """Five pairs of blocks, 8 x 8 connections each: 320 numbers that no optimizer of the user's sees."""
    model = converted("resnext20_8x4d", norm="branch")
    masks = [entry.real for entry in surgery_masked.connectivity(model).values()]
    assert sum(mask.numel() for mask in masks) == 320
    assert not any("mask" in name for name, _ in model.named_parameters())
