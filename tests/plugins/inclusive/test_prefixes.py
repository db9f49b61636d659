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


@pytest.mark.parametrize("rest", [(), (4, 3)])
@pytest.mark.parametrize("spans", [[(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)], [(0, 3)]])
def test_what_was_read_comes_back_in_front_uncopied(rest, spans):
    value, cache = draw(2, 6, *rest), PrefixCache()
    parts = [value[:, 2 * start : 2 * stop] for start, stop in spans]
    for number, (part, span) in enumerate(zip(parts, spans, strict=True), start=1):
        found = cache.add(part, *span)
        assert [id(each) for each in found] == [id(each) for each in parts[:number]]
    assert torch.equal(torch.cat(found, dim=1), value)


def test_zero_begins_anew_also_with_other_images():
    cache = PrefixCache()
    cache.add(draw(2, 2, 3), 0, 1)
    second = draw(5, 2, 7)
    assert cache.add(second, 0, 1) == [second]


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True]), torch.tensor([2])])
def test_only_the_kept_images_go_on(rows):
    value, cache = draw(4, 6, 5), PrefixCache()
    cache.add(value[:, :4], 0, 2)
    cache.keep(rows)
    assert torch.equal(torch.cat(cache.add(value[rows][:, 4:], 2, 3), dim=1), value[rows])


def test_keep_on_an_empty_cache_does_nothing():
    cache = PrefixCache()
    cache.keep(torch.tensor([0]))
    assert len(cache.add(torch.ones(2, 3), 0, 1)) == 1


@pytest.mark.parametrize(
    ("first", "second", "span", "message"),
    [
        ((2, 2, 3), (2, 2, 3), (2, 3), "from 2 on where 1 have been read, expected the next one"),
        ((2, 2, 3), (2, 2, 4), (1, 2), r"shape \(2, 2, 4\) behind some of shape \(2, 2, 3\), expected the same images"),
        ((2, 2, 3), (3, 2, 3), (1, 2), "expected the same images; begin anew"),
    ],
)
def test_what_does_not_continue_is_refused_and_changes_nothing(first, second, span, message):
    cache, part, other = PrefixCache(), draw(*first), draw(*first)
    cache.add(part, 0, 1)
    with pytest.raises(InvalidOption, match=message):
        cache.add(draw(*second), *span)
    assert cache.add(other, 1, 2) == [part, other]


def test_a_first_step_that_is_none_is_refused():
    with pytest.raises(InvalidOption, match="from 1 on where 0 have been read"):
        PrefixCache().add(draw(1, 1), 1, 2)


def test_gradients_are_refused():
    with pytest.raises(InvalidOption, match="carry gradients, expected none in anytime prediction"):
        PrefixCache().add(draw(1, 2).requires_grad_(), 0, 1)


def test_a_cleared_cache_begins_with_the_first_part():
    cache = PrefixCache()
    cache.add(draw(1, 2), 0, 1)
    cache.clear()
    with pytest.raises(InvalidOption, match="from 1 on where 0 have been read"):
        cache.add(draw(1, 2), 1, 2)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_empty(twin):
    cache = PrefixCache()
    cache.add(draw(1, 2), 0, 1)
    with pytest.raises(InvalidOption, match="from 1 on where 0 have been read"):
        twin(cache).add(draw(1, 2), 1, 2)
