import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import data
import glyphs
import warps


def test_digits_are_split_without_overlap_and_alike_within_each_class():
    digits = data.load("digits", image_size=8)
    both = torch.cat([digits.train.images, digits.test.images])[:, 0]
    assert both.shape == (1797, 8, 8)
    from sklearn.datasets import load_digits

    source = torch.tensor(load_digits().images * 255 / 16).round().to(torch.uint8)
    assert sorted(image.numpy().tobytes() for image in both) == sorted(image.numpy().tobytes() for image in source)
    train, test = (torch.bincount(split.targets) for split in (digits.train, digits.test))
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    # each class sends a fifth of its samples to the test part, give or take one
    assert ((train + test) * 360 / 1797 - test).abs().max() < 1
    again = data.load("digits", image_size=8)
    assert torch.equal(again.test.images, digits.test.images)
    assert torch.equal(again.train.targets, digits.train.targets)


def test_digits_are_normalised_with_three_equal_channels():
    digits = data.load("digits")
    assert (digits.image_size, digits.channels, digits.classes) == (16, 3, tuple("0123456789"))
    images = digits.train.batch(torch.arange(len(digits.train))).double()
    assert images.shape == (1437, 3, 16, 16)
    assert abs(images.mean()) < 1e-6
    assert abs(images.std(correction=0) - 1) < 1e-6
    assert torch.equal(images[:, 0], images[:, 2])


def test_augmentation_follows_from_its_seed_alone():
    split = data.load("digits").train
    indices = torch.arange(20)
    torch.manual_seed(1)
    first = split.batch(indices, seed=5)
    torch.manual_seed(2)
    assert torch.equal(split.batch(indices, seed=5), first)
    assert not torch.equal(split.batch(indices, seed=6), first)
    assert not torch.equal(split.batch(indices), first)


def test_cifar_augmentation_leaves_the_global_generators_alone():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    augment = warps.crop_flip_randaugment(32, layers=3, magnitude=4)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(2), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    first = augment(images, 11)
    drawn = torch.rand(2), np.random.rand(), random.random()
    assert torch.equal(drawn[0], expected[0])
    assert drawn[1:] == expected[1:]
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(augment(images, 11), first)
    assert not torch.equal(augment(images, 12), first)


def test_a_warp_of_size_zero_is_the_identity():
    images = torch.rand(3, 1, 9, 9, dtype=torch.float32)
    warped = warps.warp(images, torch.Generator().manual_seed(0), degrees=0, shift=0, scale=0, shear=0)
    # the sampling grid is rounded in float32
    torch.testing.assert_close(warped, images, rtol=0, atol=1e-5)


def test_a_shift_moves_the_ink_by_at_most_its_range():
    images = torch.zeros(200, 1, 41, 41)
    images[:, :, 20, 20] = 1
    warped = warps.warp(images, torch.Generator().manual_seed(0), degrees=0, shift=0.1, scale=0, shear=0)
    rows = (warped.sum(3)[:, 0] * torch.arange(41)).sum(1) - 20
    assert 3.5 < rows.abs().max() <= 4.1 + 1e-3
    assert rows.min() < 0 < rows.max()


def test_glyphs_are_a_hundred_classes_in_twenty_groups_of_five():
    drawn = data.load("glyphs", train_variants=1, test_variants=1)
    assert len(drawn.classes) == len(set(drawn.classes)) == 100
    assert len(drawn.group_names) == len(set(drawn.group_names)) == 20
    assert torch.bincount(torch.tensor(drawn.groups)).tolist() == [5] * 20
    for name, characters in glyphs.GROUPS.items():
        group = drawn.group_names.index(name)
        assert [drawn.classes[k] for k in range(100) if drawn.groups[k] == group] == list(characters)
    assert torch.bincount(drawn.train.targets).tolist() == [11] * 100
    assert torch.bincount(drawn.test.targets).tolist() == [5] * 100


def test_every_character_is_really_drawn_whole_and_unlike_the_others_in_every_face():
    from matplotlib import get_data_path
    from PIL import ImageFont

    for face in (*glyphs.TRAIN_FACES, *glyphs.TEST_FACES):
        images = glyphs.draw_face(face)[:, 0]
        assert (images.flatten(1) > 128).sum(1).min() >= 40, face
        assert len({image.numpy().tobytes() for image in images}) == 100, face
        border = images.clone()
        border[:, 1:-1, 1:-1] = 0
        assert not border.any(), f"{face}: a character is cut off"
        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{face}.ttf", glyphs.FONT_SIZE)
        unmapped = bytes(font.getmask("\U0010fffe"))
        assert all(bytes(font.getmask(character)) != unmapped for character in glyphs.CHARACTERS), face


def test_train_and_test_share_no_face_and_no_drawing():
    assert not set(glyphs.TRAIN_FACES) & set(glyphs.TEST_FACES)
    train, test = (
        {image.numpy().tobytes() for face in faces for image in glyphs.draw_face(face)}
        for faces in (glyphs.TRAIN_FACES, glyphs.TEST_FACES)
    )
    assert not train & test


def test_glyphs_follow_from_their_seed():
    make = glyphs.render.__wrapped__  # without the cache
    first = make(glyphs.TEST_FACES[:2], 2, 7)
    again = make(glyphs.TEST_FACES[:2], 2, 7)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(make(glyphs.TEST_FACES[:2], 2, 8)[0], first[0])
    assert first[0].shape == (400, 1, 32, 32)
    assert first[0].flatten(1).any(1).all()
    assert not torch.equal(first[0][:100], first[0][100:200])
    assert torch.equal(first[1], torch.arange(100).repeat(4))


def test_the_three_channels_of_the_glyphs_take_the_memory_of_one():
    images = data.load("glyphs", train_variants=1, test_variants=1).train.images
    assert images.shape[1:] == (3, 32, 32)
    assert images.untyped_storage().nbytes() == len(images) * 32 * 32


def test_small_glyphs_of_some_groups_are_the_large_ones_averaged():
    large = data.load("glyphs", train_variants=1, test_variants=1)
    small = data.load("glyphs", train_variants=1, test_variants=1, image_size=16, groups=3)
    assert small.classes == large.classes[:15]
    assert (small.groups, small.group_names) == (large.groups[:15], large.group_names[:3])
    wanted = large.test.targets < 15
    assert torch.equal(small.test.targets, large.test.targets[wanted])
    averaged = torch.nn.functional.avg_pool2d(large.test.images[wanted].double(), 2)
    # both were rounded from the same canvas, the large ones before they are averaged here
    assert small.test.images.shape[1:] == (3, 16, 16)
    assert (small.test.images.double() - averaged).abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "expected"), [({"image_size": 24}, "divisor of 64"), ({"groups": 21}, "1 to 20"), ({"groups": 0}, "1")]
)
def test_glyphs_refuse_what_they_cannot_draw(options, expected):
    with pytest.raises(ValueError, match=rf"glyphs: found .*expected .*{expected}"):
        data.load("glyphs", **options)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_missing_cifar_says_where_what_and_from_where(tmp_path, name, folder):
    with pytest.raises(data.DataNotFound) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
    for part in (f"{tmp_path / folder} does not exist", "University of Toronto", f"tar -xzf {archive} -C {tmp_path}"):
        assert part in message
    assert ("data_batch_5, test_batch" if name == "cifar10" else "train, test and meta") in message


def test_damaged_cifar_is_told_from_a_missing_one(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    with pytest.raises(data.DataNotFound, match="fail torchvision's checksums"):
        data.load("cifar10", tmp_path)


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))


def test_cifar10_is_read_from_the_official_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    for k in range(5):
        write_pickle(folder / f"data_batch_{k + 1}", {"data": pixels[2 * k : 2 * k + 2], "labels": [k, 9 - k]})
    write_pickle(folder / "test_batch", {"data": pixels[10:], "labels": [3, 4]})
    write_pickle(folder / "batches.meta", {"label_names": [f"class {k}" for k in range(10)]})
    cifar = data.load("cifar10", tmp_path, randaugment=[3, 4])
    assert torch.equal(cifar.train.images, torch.from_numpy(pixels[:10]).view(10, 3, 32, 32))
    assert cifar.train.targets.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert cifar.test.targets.tolist() == [3, 4]
    assert (cifar.classes[3], cifar.groups) == ("class 3", None)
    assert cifar.train.batch(torch.arange(4), seed=0).shape == (4, 3, 32, 32)
    channels = torch.from_numpy(pixels[:10]).double().view(10, 3, -1) / 255
    torch.testing.assert_close(torch.tensor(cifar.mean).double(), channels.mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(cifar.std).double(), channels.std((0, 2), correction=0), rtol=1e-6, atol=0)


def test_cifar100_has_its_coarse_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels, fine = np.zeros((100, 3072), dtype=np.uint8), list(range(100))
    entry = {"data": pixels, "fine_labels": fine, "coarse_labels": [k % 20 for k in fine]}
    write_pickle(folder / "train", entry)
    write_pickle(folder / "test", entry)
    names = {"fine_label_names": [str(k) for k in fine], "coarse_label_names": [f"group {k}" for k in range(20)]}
    write_pickle(folder / "meta", names)
    cifar = data.load("cifar100", tmp_path)
    assert cifar.groups == tuple(k % 20 for k in range(100))
    assert cifar.group_names[19] == "group 19"


def make_folder(root, classes=("cat", "dog")):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for k in range(2):
                Image.fromarray(pixels[k]).save(root / part / name / f"{k}.png")


def test_imagefolder_reads_crops_and_augments(tmp_path):
    make_folder(tmp_path)
    options = {"auto_augment": "rand-m7-mstd0.5-inc1", "erasing": 0.4, "erasing_count": 3}
    folder = data.load("imagefolder", tmp_path, train_size=24, test_size=32, **options)
    assert (folder.classes, folder.image_size) == (("cat", "dog"), 24)
    assert folder.train.targets.tolist() == [0, 0, 1, 1]
    assert folder.test.batch(torch.tensor([0, 3])).shape == (2, 3, 32, 32)
    state = torch.get_rng_state()
    first = folder.train.batch(torch.tensor([0, 1]), seed=1)
    assert first.shape == (2, 3, 24, 24)
    assert torch.equal(first, folder.train.batch(torch.tensor([0, 1]), seed=1))
    assert not torch.equal(first, folder.train.batch(torch.tensor([0, 1]), seed=2))
    assert torch.equal(state, torch.get_rng_state())


def test_missing_or_unequal_imagefolder_is_refused(tmp_path):
    with pytest.raises(data.DataNotFound, match="one folder of images per class"):
        data.load("imagefolder", tmp_path)
    make_folder(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(data.DataNotFound, match=r"different classes, such as \['dog', 'wolf'\]"):
        data.load("imagefolder", tmp_path)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="'mnist'; choose one of digits, glyphs, cifar10"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data digits: unknown options size; it has image_size, degrees, shift"):
        data.load("digits", size=3)
