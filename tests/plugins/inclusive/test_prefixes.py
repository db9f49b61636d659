"""What anytime prediction has read: parts come one after the other, and nothing of it is copied or saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from surgery.errors import InvalidOption
from surgery_inclusive.prefixes import PrefixCache


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("rest", [(), (5,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("spans", [[(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)], [(0, 3)]])
def test_what_was_read_comes_back_in_front(rest, spans):
    value = draw(2, 6, *rest)
    cache = PrefixCache()
    for start, stop in spans:
        found = cache.extend(value[:, 2 * start : 2 * stop], start, stop, 3)
        assert torch.equal(found, value[:, : 2 * stop])


def test_zero_begins_anew_and_leaves_what_was_returned():
    first, second = draw(2, 4, 3), draw(5, 4, 7)
    cache = PrefixCache()
    returned = cache.extend(first[:, :2], 0, 1, 2)
    assert torch.equal(cache.extend(second[:, :2], 0, 1, 2), second[:, :2])
    assert torch.equal(cache.extend(second[:, 2:], 1, 2, 2), second)
    assert torch.equal(returned, first[:, :2])


def test_steps_share_one_buffer():
    value = draw(2, 4, 3)
    cache = PrefixCache()
    first = cache.extend(value[:, :2], 0, 1, 2)
    assert cache.extend(value[:, 2:], 1, 2, 2).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True]), torch.tensor([2])])
def test_only_the_kept_images_go_on(rows):
    value = draw(4, 6, 5)
    cache = PrefixCache()
    cache.extend(value[:, :4], 0, 2, 3)
    cache.keep(rows)
    assert torch.equal(cache.extend(value[rows][:, 4:], 2, 3, 3), value[rows])


def test_keep_on_an_empty_cache_does_nothing():
    cache = PrefixCache()
    cache.keep(torch.tensor([0]))
    assert torch.equal(cache.extend(torch.ones(2, 3), 0, 1, 1), torch.ones(2, 3))


def test_the_order_of_memory_is_kept():
    value = draw(2, 6, 4, 3).to(memory_format=torch.channels_last)
    cache = PrefixCache()
    for k in range(3):
        found = cache.extend(value[:, 2 * k : 2 * k + 2].contiguous(memory_format=torch.channels_last), k, k + 1, 3)
        assert found.stride() == value.stride()
    assert torch.equal(found, value)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(1, 2)], "from 1 on where 0 have been read"),
        ([(0, 1), (2, 3)], "from 2 on where 1 have been read"),
        ([(0, 2), (1, 2)], "from 1 on where 2 have been read"),
        ([(0, 2), (2, 2)], "a span within them"),
        ([(0, 4)], "a span within them"),
    ],
)
def test_gaps_are_refused(spans, message):
    cache = PrefixCache()
    *before, (start, stop) = spans
    for first, last in before:
        cache.extend(torch.ones(1, last - first), first, last, 3)
    with pytest.raises(InvalidOption, match=message):
        cache.extend(torch.ones(1, max(stop - start, 1)), start, stop, 3)


def test_nothing_follows_what_was_cleared():
    cache = PrefixCache()
    cache.extend(torch.ones(1, 1), 0, 1, 2)
    cache.clear()
    with pytest.raises(InvalidOption, match="where 0 have been read"):
        cache.extend(torch.ones(1, 1), 1, 2, 2)


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 5), (2, 3, 4)])
def test_other_images_are_refused(shape):
    cache = PrefixCache()
    cache.extend(torch.ones(2, 2, 4), 0, 1, 2)
    with pytest.raises(InvalidOption, match="the same images"):
        cache.extend(torch.ones(shape), 1, 2, 2)


def test_channels_that_cannot_be_divided_are_refused():
    with pytest.raises(InvalidOption, match="equally many channels"):
        PrefixCache().extend(torch.ones(1, 3), 0, 2, 2)


def test_gradients_are_refused():
    with pytest.raises(InvalidOption, match="no_grad"):
        PrefixCache().extend(torch.ones(1, 2, requires_grad=True), 0, 1, 2)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_empty(duplicate):
    cache = PrefixCache()
    cache.extend(torch.ones(1, 1), 0, 1, 2)
    with pytest.raises(InvalidOption, match="where 0 have been read"):
        duplicate(cache).extend(torch.ones(1, 1), 1, 2, 2)
    assert torch.equal(cache.extend(torch.ones(1, 1), 1, 2, 2), torch.ones(1, 2))
