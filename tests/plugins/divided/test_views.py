"""S views of an image side by side on channels."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from surgery.errors import InvalidOption
from surgery_divided.ensemble import SplitViews
from surgery_divided.views import Views, several_views


class Counted:
    """A transform that adds 1, 2, 3, ... to the image."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return image + self.calls


class Noisy(Dataset):
    """Two channels of 3 x 3: item i is i plus noise, its target is what `target` makes of i."""

    def __init__(self, target=int):
        self.target = target

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return index + torch.rand(2, 3, 3, dtype=torch.float64), self.target(index)


def test_transform_is_applied_once_a_view_and_its_results_stand_side_by_side():
    """Zeros (2, 1, 1) plus 1, 2 and 3 are the channels 1 1 2 2 3 3."""
    views = several_views(Counted(), 3)(torch.zeros(2, 1, 1))
    assert views.flatten().tolist() == [1, 1, 2, 2, 3, 3]


def test_views_are_what_the_network_splits():
    transform = several_views(Counted(), 2)
    batch = torch.stack([transform(torch.zeros(3, 4, 4)) for _ in range(5)])
    first, second = SplitViews(2, 3)(batch)
    assert first[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9]
    assert second[:, 2, 3, 3].tolist() == [2, 4, 6, 8, 10]


def test_views_differ_and_follow_the_random_state():
    transform = several_views(v2.RandomCrop(4), 2)
    image = torch.arange(3 * 16 * 16.0).reshape(3, 16, 16)
    torch.manual_seed(1)
    views = transform(image)
    torch.manual_seed(1)
    one_by_one = [v2.RandomCrop(4)(image), v2.RandomCrop(4)(image)]
    assert torch.equal(views, torch.cat(one_by_one))
    assert not torch.equal(one_by_one[0], one_by_one[1])


def test_one_view_is_the_transform_itself():
    assert torch.equal(several_views(Counted(), 1)(torch.zeros(3, 2, 2)), torch.ones(3, 2, 2))


def test_dataset_is_asked_once_a_view():
    torch.manual_seed(3)
    image, target = Views(Noisy(), 3)[4]
    torch.manual_seed(3)
    assert torch.equal(image, torch.cat([Noisy()[4][0] for _ in range(3)]))
    assert target == 4
    assert len(Views(Noisy(), 3)) == 6
    assert len(list(Views(Noisy(), 3))) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_runs_in_a_loader(workers):
    batches = list(DataLoader(Views(Noisy(), 2), batch_size=3, num_workers=workers))
    assert [tuple(images.shape) for images, _ in batches] == [(3, 4, 3, 3)] * 2
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 3, 4, 5]
    views = torch.cat([images for images, _ in batches]).chunk(2, dim=1)
    assert not torch.equal(views[0], views[1])
    assert all(torch.equal(view[:, 0, 0, 0].floor().long(), torch.arange(6)) for view in views)


def test_transform_runs_in_the_workers_of_a_loader():
    data = [(several_views(v2.Identity(), 2), 0)]
    ((transform, _),) = next(iter(DataLoader(data, num_workers=1, collate_fn=list)))
    assert torch.equal(transform(torch.ones(3, 1, 1)), torch.ones(6, 1, 1))


@pytest.mark.parametrize("target", [lambda i: torch.tensor([i, 2.0]), lambda i: [i, 2.0], str, lambda i: None])
def test_equal_targets_of_any_kind_agree(target):
    assert str(Views(Noisy(target), 2)[1][1]) == str(target(1))


@pytest.mark.parametrize("wrap", [int, torch.tensor, lambda value: torch.tensor([value, 0])])
def test_targets_that_change_are_refused(wrap):
    count = iter(range(9))
    with pytest.raises(InvalidOption, match=r"item 1 of Noisy has the targets .*0.* and .*1.*, expected the same"):
        Views(Noisy(lambda i: wrap(next(count))), 2)[1]


def test_mixup_of_the_batch_treats_all_views_of_an_image_alike():
    """Image j is j everywhere in view 0 and 100 j in view 1; whatever mixup does to the one, it does to the other.

    With coefficient m and partners p, view 0 becomes m j + (1 - m) p_j and view 1 a hundred times that.
    """
    labels = torch.arange(8)
    level = labels.double().reshape(8, 1, 1, 1).expand(8, 3, 2, 2)
    mixed, targets = v2.MixUp(alpha=1.0, num_classes=8)(torch.cat([level, 100 * level], dim=1), labels)
    first, second = SplitViews(2, 3)(mixed)
    torch.testing.assert_close(second, 100 * first, rtol=1e-12, atol=1e-12)
    # mixup returns targets in float32
    torch.testing.assert_close(first[:, 0, 0, 0], targets.double() @ labels.double(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(first, level)


def test_images_that_are_no_tensors_are_refused():
    with pytest.raises(InvalidOption, match=r"the transform returned a list, expected an image tensor \(C, H, W\)"):
        several_views(lambda image: [image], 2)(torch.zeros(3, 2, 2))
    with pytest.raises(InvalidOption, match=r"the transform returned a tensor \(1, 3, 2, 2\), expected"):
        several_views(lambda image: image[None], 2)(torch.zeros(3, 2, 2))
    with pytest.raises(InvalidOption, match="the image of item 0 of list is a str, expected"):
        Views([("image", 0)], 2)[0]


def test_views_of_different_sizes_are_refused():
    sizes = iter([2, 3])
    with pytest.raises(InvalidOption, match=r"of size \(3, 2, 2\) once and \(3, 3, 3\) another time"):
        several_views(lambda image: torch.zeros(3, *[next(sizes)] * 2), 2)(None)


def test_what_is_no_dataset_of_pairs_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(InvalidOption, match="found a Stream without a length"):
        Views(Stream(), 2)
    with pytest.raises(InvalidOption, match=r"item 0 of list is a tensor \(3, 2, 2\), expected \(image, target\)"):
        Views([torch.zeros(3, 2, 2)], 2)[0]


@pytest.mark.parametrize("networks", [0, -1, 1.5, True, "2"])
def test_number_of_networks_that_cannot_be_is_refused(networks):
    with pytest.raises(InvalidOption, match="expected a positive integer"):
        several_views(v2.Identity(), networks)
    with pytest.raises(InvalidOption, match="expected a positive integer"):
        Views(Noisy(), networks)


def test_transform_that_cannot_be_called_is_refused():
    with pytest.raises(InvalidOption, match="found 2 as transform, expected a callable"):
        several_views(2, 2)
