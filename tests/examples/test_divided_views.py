"""What a divided network's recipe asks of the data: several views, mixed batches, erased squares, and its schedule."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import batches
import data
import splits
import training
import views
import warps
from recipe import Component, Recipe, RecipeError, Training

MEAN, STD = (0.21, 0.31, 0.41), (0.5, 0.6, 0.7)  # no pixel of 0 to 255 is the mean


def tiny(augment: warps.Augment | None = None, erasing: v2.RandomErasing | None = None) -> data.Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(12) % 4
    train = splits.MemorySplit(images, labels, MEAN, STD, augment or warps.shift_and_rotate(10, 0.1), erasing)
    return data.Data("tiny", train, splits.MemorySplit(images, labels, MEAN, STD), tuple("abcd"), 8, MEAN, STD)


# --- views ---


def test_the_first_view_is_what_a_plain_network_sees_and_the_others_are_drawn_anew():
    plain = tiny()
    several = views.several(plain, 3)
    indices = torch.tensor([3, 1, 4])
    seen = several.train.batch(indices, seed=7)
    assert seen.shape == (3, 9, 8, 8)
    first, second, third = seen.chunk(3, dim=1)
    assert torch.equal(first, plain.train.batch(indices, seed=7))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(several.train.batch(indices, seed=7), seen)
    assert not torch.equal(several.train.batch(indices, seed=8)[:, 3:], seen[:, 3:])


def test_all_views_are_of_the_same_images():
    """Augmentation that keeps the image and adds a number of its seed: views differ by a constant alone."""

    def brighten(images: torch.Tensor, seed: int) -> torch.Tensor:
        return (images // 2 + seed % 100).to(torch.uint8)

    several = views.several(tiny(brighten), 2)
    one, other = several.train.batch(torch.arange(12), seed=1).double().chunk(2, dim=1)
    shift = (one - other) * torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(shift, shift[0, 0, 0, 0].expand_as(shift), rtol=0, atol=1e-6)
    assert shift.abs().min() > 0
    assert torch.equal(several.train.targets, torch.arange(12) % 4)


def test_the_test_part_and_batches_without_augmentation_have_one_view():
    plain = tiny()
    several = views.several(plain, 2)
    assert several.test is plain.test
    assert several.train.batch(torch.arange(5)).shape == (5, 3, 8, 8)
    assert len(several.train) == 12


def test_a_file_is_decoded_once_for_all_its_views(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "cat" / "0.png")
    several = views.several(data.load("imagefolder", tmp_path, train_size=24, test_size=24), 2)
    opened: list[str] = []
    loader = several.train.folder.loader
    several.train.folder.loader = lambda file: (opened.append(file), loader(file))[1]
    one, other = several.train.batch(torch.tensor([0]), seed=1).chunk(2, dim=1)
    assert len(opened) == 1
    assert one.shape == (1, 3, 24, 24)
    assert not torch.equal(one, other)
    assert several.test.batch(torch.tensor([0])).shape == (1, 3, 24, 24)


def test_the_table_is_taken_apart():
    table = {"networks": 4, "views": True, "cotraining": 0.1}
    plan = views.Plan.of(Component("divided", table))
    assert plan == views.Plan(Component("divided", {"networks": 4, "cotraining": 0.1}), 4, True)
    assert table == {"networks": 4, "views": True, "cotraining": 0.1}
    assert views.Plan.of(Component("divided")) == views.Plan(Component("divided"), 2, False)
    plain = tiny()
    assert plan.seen(plain).train.batch(torch.arange(2), seed=0).shape == (2, 12, 8, 8)
    assert views.Plan.of(Component("divided")).seen(plain) is plain


@pytest.mark.parametrize("found", [1, "true", 2.0])
def test_views_that_are_neither_on_nor_off_are_refused(found):
    with pytest.raises(RecipeError, match=r"method\.views is .*; expected true or false"):
        views.Plan.of(Component("divided", {"views": found}))


# --- mixup ---


def test_a_mixed_batch_is_a_sum_of_neighbours_with_one_coefficient_for_all_views():
    """The coefficient is read off the labels: the classes 0 1 2 3 of the batch are all different."""
    split = views.several(tiny(), 2).train
    images, targets = split.batch(torch.arange(4), seed=3), torch.arange(4)
    mixed, labels = batches.Mixing(0.2, 4)(images, targets, seed=5)
    share = labels[0, 0]
    assert 0 < share < 1
    partner = torch.arange(4).roll(1)
    torch.testing.assert_close(labels, share * torch.eye(4) + (1 - share) * torch.eye(4)[partner], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner], rtol=1e-5, atol=1e-6)


def test_mixing_follows_from_its_step_alone_and_leaves_the_generators_alone():
    split = tiny().train
    mixing = batches.Mixing(0.2, 4)
    plain, mixed = (batches.Batches(split, 4, seed=1, mixing=kind) for kind in (None, mixing))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = mixed[5]
    assert torch.equal(torch.rand(2), expected)
    again, other = mixed[5], mixed[6]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1].max(), other[1].max())
    # the images that are mixed, and their order, are those of a run without it
    images, targets = plain[5]
    remade = mixing(images, targets, batches.derive_seed("mixup", 1, 5, 0))
    assert torch.equal(remade[0], first[0])
    assert torch.equal(remade[1], first[1])


def test_a_recipe_can_mix_and_its_run_goes_on_digit_for_digit(tmp_path):
    recipe = Recipe(training=Training(epochs=2, batch_size=4, lr=0.01, mixup=0.2, checkpoint_steps=1))

    class Stopped(Exception):
        pass

    def run(folder: Path, stop_before: int | None = None) -> tuple[str, list[int]]:
        def on_step(step: training.Step) -> None:
            if step.step + 1 == stop_before:
                raise Stopped

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
        dimensions: list[int] = []

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            dimensions.append(target.dim())
            return torch.nn.functional.cross_entropy(output, target)

        training.train(model, training.Task(loss), tiny(), recipe, run_dir=folder, progress=False, on_step=on_step)
        return (folder / training.STEPS).read_text(), dimensions

    whole, dimensions = run(tmp_path / "whole")
    assert dimensions == [2] * 6
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop_before=4)
    assert run(tmp_path / "stopped")[0] == whole


# --- random erasing, AutoAugment ---


def test_a_square_of_the_right_size_is_set_to_the_mean():
    """A quarter of 8 x 8 pixels is 4 x 4; normalised, the mean is zero, and no pixel of these images is the mean."""
    split = tiny(lambda images, seed: images, warps.square_erasing(1.0, (0.25, 0.25))).train
    plain, erased = split.batch(torch.arange(12)), split.batch(torch.arange(12), seed=1)
    assert (plain != 0).all()
    hidden = erased == 0
    assert hidden.flatten(1).sum(1).tolist() == [3 * 16] * 12
    assert torch.equal(erased[~hidden], plain[~hidden])
    corners = [tuple(map(int, mask[0].nonzero()[0])) for mask in hidden]
    for mask, (row, column) in zip(hidden, corners, strict=True):
        assert mask[:, row : row + 4, column : column + 4].all()
    assert len(set(corners)) > 3  # drawn for every image apart
    assert torch.equal(split.batch(torch.arange(12), seed=1), erased)


def test_erasing_is_as_frequent_and_as_large_as_asked():
    erasing = warps.square_erasing(0.5, (0.125, 0.2))
    images = torch.ones(400, 1, 32, 32)
    area = (warps.erase(images, erasing, seed=0) == 0).flatten(1).double().mean(1)
    assert 0.42 < (area > 0).double().mean() < 0.58
    sides = (area[area > 0] * 1024).sqrt()
    assert torch.equal(sides, sides.round())
    # sides are rounded to pixels
    assert sides.min() == round(math.sqrt(0.125 * 1024))
    assert sides.max() == round(math.sqrt(0.2 * 1024))


def test_nothing_is_erased_unless_asked_or_without_augmentation():
    assert warps.square_erasing(0.0, (0.1, 0.2)) is None
    split = tiny(erasing=warps.square_erasing(1.0, (0.25, 0.25))).train
    assert (split.batch(torch.arange(12)) != 0).all()


def test_the_erased_place_does_not_follow_from_the_draws_of_the_augmentation():
    """Both draw from the same generators; the first draw of each is made to show."""
    drawn: list[torch.Tensor] = []

    class Shown(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            drawn.append(torch.rand(1))
            return image

    def augment(images: torch.Tensor, seed: int) -> torch.Tensor:
        with warps.seeded(seed):
            drawn.append(torch.rand(1))
        return images

    tiny(augment, Shown()).train.batch(torch.arange(1), seed=4)
    assert len(drawn) == 2
    assert not torch.equal(*drawn)


def test_autoaugment_comes_behind_crop_and_flip():
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, policy = (warps.crop_flip_randaugment(32, 0, 0, autoaugment=on) for on in (False, True))
    first = policy(images, 1)
    assert first.shape == images.shape
    assert torch.equal(policy(images, 1), first)
    assert not torch.equal(plain(images, 1), first)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    def make(kind: str, **options: object) -> data.Data:
        drawn = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        parts, classes = ((drawn, torch.arange(8)), (drawn, torch.arange(8))), tuple("abcdefgh")
        monkeypatch.setattr(data, "_read_cifar", lambda *found: (parts, classes))
        return data.load(kind, tmp_path, **options)

    return make


def test_cifar_erases_and_augments_as_the_options_say(cifar):
    found = cifar("cifar10", randaugment=[0, 0], autoaugment=True, erasing=0.5, erasing_area=[0.125, 0.2])
    erasing = found.train.erasing
    assert (erasing.p, tuple(erasing.scale), tuple(erasing.ratio)) == (0.5, (0.125, 0.2), (1.0, 1.0))
    assert found.test.erasing is None
    assert found.train.batch(torch.arange(8), seed=0).shape == (8, 3, 32, 32)
    assert cifar("cifar10").train.erasing is None


def test_imagefolder_erases_squares_and_crops_as_the_options_say(tmp_path):
    pixels = np.full((40, 50, 3), 255, dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "cat" / "0.png")
    options = {"train_scale": [0.1, 1.0], "train_interpolation": "bicubic", "auto_augment": None}
    folder = data.load(
        "imagefolder", tmp_path, train_size=32, test_size=32, erasing=1.0, erasing_area=[0.25, 0.25], **options
    )
    image = folder.train.batch(torch.tensor([0]), seed=0)
    assert (image == 0).sum() == 3 * 16 * 16
    assert [len(channel.unique()) for channel in image[0]] == [2, 2, 2]  # the rest is as white as it was
    crop = folder.train.augmented.transforms[0].transforms[0]
    assert tuple(crop.scale) == (0.1, 1.0)
    assert "bicubic" in str(crop)
    plain = data.load("imagefolder", tmp_path, train_size=32, test_size=32)
    assert tuple(plain.train.augmented.transforms[0].scale) == (0.08, 1.0)


# --- the schedule ---


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 5e-3), (10, 0.0525), (20, 0.1), (160, 0.05005), (300, 1e-4)],
)
def test_the_cosine_can_begin_behind_the_warm_up(epoch, expected):
    """300 epochs, 20 of them warm-up: halfway up at 10, at the top at 20, halfway down at 20 + 280 / 2."""
    t = Training(
        epochs=300, lr=0.1, final_lr=1e-4, warmup_epochs=20, warmup_lr=5e-3, warmup_prefix=True, lr_unit="step"
    )
    assert training.learning_rate(t, epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"schedule": "constant", "warmup_prefix": True},
            'warmup_prefix belongs to schedule = "cosine", found \'const',
        ),
        ({"mixup": -0.1}, r"training\.mixup is -0\.1; expected at least 0"),
    ],
)
def test_settings_that_contradict_are_refused(table, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_tables({"training": table})


def test_settings_of_a_run_are_part_of_it_where_they_are_used():
    used = Recipe(training=Training(mixup=0.2, warmup_prefix=True)).identity()["training"]
    assert (used["mixup"], used["warmup_prefix"]) == (0.2, True)
    assert not {"mixup", "warmup_prefix"} & set(Recipe().identity()["training"])
