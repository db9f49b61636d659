"""The wide operations against einsum and autograd, in float64: streams read, branches joined, moments, memory."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgery_masked import memory
from surgery_masked.gathering import gather
from surgery_masked.kernels import Mix, join, read_streams
from surgery_masked.moments import moments

TIGHT = 1e-10
CHUNKS = {"an image at a time": 1, "two images at a time": None, "all at once": 1 << 30}
SIZES = [(3, 4, 2, 3, 5, 6), (2, 2, 3, 1, 1, 1), (4, 3, 1, 2, 7, 3)]  # B, C, c, d, H, W


@pytest.fixture(params=CHUNKS)
def chunked(request, monkeypatch):
    """Return a function that sets how many images of a wide tensor are taken at a time."""

    def apply(wide_elements_per_image):
        size = CHUNKS[request.param]
        monkeypatch.setattr(memory, "_CHUNK_BYTES", 2 * 8 * wide_elements_per_image if size is None else size)

    return apply


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=TIGHT, atol=1e-13)


def compare(found, expected, inputs):
    """Compare two outputs, and the gradients of every input under weights of their own."""
    assert found.shape == expected.shape
    same(found, expected)
    pull = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((found * pull).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * pull).sum(), inputs, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)


def read_literally(streams, weight, stride=1):
    apart = streams.unflatten(1, (len(weight), -1))[..., ::stride, ::stride]
    return torch.einsum("kdc,bkchw->bkdhw", weight, apart).flatten(1, 2)


def join_literally(hidden, shortcut, weight, scale, shift, mask, mix):
    outputs = torch.einsum("kcd,bkdhw->bkchw", weight, hidden.unflatten(1, (len(weight), -1)))
    joined = torch.einsum("jc,jk,bkchw->bjchw", scale, mask, outputs) + shift[:, :, None, None]
    if shortcut is not None:
        through = shortcut.unflatten(1, (-1, weight.shape[1])).expand(-1, len(weight), -1, -1, -1)
        joined = joined + mix.shortcut * torch.einsum("jk,bkchw->bjchw", mask, through)
    return (joined.relu() if mix.rectify else joined).flatten(1, 2)


def joinable(consumers, branches, shortcut, images=5, channels=3, width=2, size=(4, 3)):
    """Return tensors for a join; the mask is any real matrix."""
    through = {
        "own": draw(images, branches * channels, *size, seed=1),
        "shared": draw(images, channels, *size, seed=2),
        "none": None,
    }[shortcut]
    return (
        draw(images, branches * width, *size, seed=3),
        through,
        draw(branches, channels, width, seed=4),
        draw(consumers, channels, seed=5),
        draw(consumers, channels, seed=6),
        draw(consumers, branches, seed=7),
    )


# --- reading ---


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("batch", "branches", "channels", "width", "height", "breadth"), SIZES)
def test_reading_is_one_product_a_stream(batch, branches, channels, width, height, breadth, stride, chunked):
    streams = draw(batch, branches * channels, height, breadth)
    weight = draw(branches, width, channels)
    chunked(streams[0].numel())
    found = read_streams(streams, weight, stride)
    assert found.shape[2:] == (-(-height // stride), -(-breadth // stride))
    compare(found, read_literally(streams, weight, stride), (streams, weight))


@pytest.mark.parametrize("stride", [1, 2])
def test_reading_has_the_gradients_of_finite_differences(stride):
    assert torch.autograd.gradcheck(lambda s, w: read_streams(s, w, stride), (draw(2, 6, 3, 5), draw(3, 4, 2)))


def test_one_weight_for_all_streams_gets_the_sum_of_their_gradients():
    streams, weight = draw(2, 6, 3, 5), draw(4, 2)
    found = read_streams(streams, weight.expand(3, -1, -1), 2)
    compare(found, read_literally(streams, weight.expand(3, -1, -1), 2), (streams, weight))


@pytest.mark.parametrize("frozen", ["streams", "weight"])
def test_what_is_frozen_gets_no_gradient_from_reading(frozen):
    streams, weight = draw(2, 6, 3, 5), draw(3, 4, 2)
    {"streams": streams, "weight": weight}[frozen].requires_grad_(False)
    read_streams(streams, weight).sum().backward()
    assert (streams.grad is None) == (frozen == "streams")
    assert (weight.grad is None) == (frozen == "weight")
    left = weight.grad if frozen == "streams" else streams.grad
    assert left is not None
    assert left.any()


# --- joining ---


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shortcut", ["own", "shared", "none"])
@pytest.mark.parametrize(("consumers", "branches"), [(4, 4), (1, 4), (3, 4), (5, 2), (1, 1), (2, 1)])
def test_joining_is_the_masked_sum_of_scaled_branches_and_shortcuts(consumers, branches, shortcut, rectify, chunked):
    tensors = joinable(consumers, branches, shortcut)
    chunked(consumers * 3 * 4 * 3)
    mix = Mix(0.3, rectify)
    inputs = [tensor for tensor in tensors if tensor is not None]
    compare(join(*tensors, mix), join_literally(*tensors, mix), inputs)


@pytest.mark.parametrize("shortcut", ["own", "shared", "none"])
@pytest.mark.parametrize("rectify", [False, True])
def test_joining_has_the_gradients_of_finite_differences(shortcut, rectify):
    tensors = joinable(3, 2, shortcut, images=2, size=(2, 2))
    inputs = tuple(tensor for tensor in tensors if tensor is not None)

    def joined(*given):
        rest = given if shortcut != "none" else (given[0], None, *given[1:])
        return join(*rest, Mix(0.5, rectify))

    assert torch.autograd.gradcheck(joined, inputs)


@pytest.mark.parametrize("frozen", range(6))
def test_joining_beside_a_frozen_input_has_the_same_gradients(frozen):
    tensors = joinable(3, 4, "own")
    tensors[frozen].requires_grad_(False)
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    compare(join(*tensors, Mix(0.3, True)), join_literally(*tensors, Mix(0.3, True)), inputs)


def test_a_rectified_sum_of_exactly_zero_passes_no_gradient():
    hidden = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, mask = torch.ones(2, 1, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    scale, shift = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    join(hidden, None, weight, scale, shift, mask, Mix(1.0, True)).sum().backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shortcut", ["own", "shared", "none"])
@pytest.mark.parametrize("index", [[[2], [0], [2]], [[0, 3], [1, 2], [3, 0]], [[1, 2, 3]]], ids=str)
def test_gathering_is_joining_by_a_mask_of_ones(index, shortcut, rectify, chunked):
    chosen = torch.tensor(index)
    *tensors, _ = (None if tensor is None else tensor.detach() for tensor in joinable(len(index), 4, shortcut))
    chunked(len(index) * 3 * 4 * 3)
    mask = torch.zeros(len(index), 4, dtype=torch.float64).scatter(1, chosen, 1)
    mix = Mix(0.3, rectify)
    same(gather(*tensors, chosen, mix), join_literally(*tensors, mask, mix))


# --- streams with several readers ---

PLAIN, STRIDED, OTHER = draw(4, 5, 3, seed=20), draw(4, 2, 3, seed=21), draw(4, 3, 3, seed=22)
PULLS = {"plain": 1.0, "strided": 0.5, "join": -2.0, "other": 0.7}
ORDERS = [order for count in (2, 3) for order in itertools.permutations(["plain", "strided", "join"], count)]
ORDERS += list(itertools.permutations(["plain", "other", "join"]))


def readers(streams, tensors, read, joined):
    """Return functions from nothing to what several readers of the same streams make of them."""
    hidden, _, *rest = tensors
    return {
        "plain": lambda: read(streams, PLAIN),
        "strided": lambda: read(streams, STRIDED, 2),
        "other": lambda: read(streams, OTHER),
        "join": lambda: joined(hidden, streams, *rest, Mix(0.3, True)),
    }


def losses(order, streams, tensors, read=read_streams, joined=join):
    """Call the readers in this order and return a number for each, all of whose gradients differ."""
    calls = readers(streams, tensors, read, joined)
    return {name: PULLS[name] * calls[name]().square().sum() for name in order}


def expected_gradient(used, start):
    found = losses(used, start.sin(), joinable(3, 4, "own"), read_literally, join_literally)
    return torch.autograd.grad(sum(found.values()), start)[0]


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_streams_get_the_sum_of_the_gradients_of_their_readers(order, leaf):
    start = draw(5, 12, 4, 3, seed=1)
    streams = start.sin().detach().requires_grad_() if leaf else start.sin()
    ours = sum(losses(order, streams, joinable(3, 4, "own")).values())
    theirs = sum(losses(order, streams, joinable(3, 4, "own"), read_literally, join_literally).values())
    [expected] = torch.autograd.grad(theirs, streams if leaf else start, retain_graph=True)
    for _ in range(2):  # of a graph that is kept, all gradients once more
        [found] = torch.autograd.grad(ours, streams if leaf else start, retain_graph=True)
        same(found, expected)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_streams_of_other_layouts_get_the_same_gradients(order, layout):
    start = draw(5, 12, 4, 3, seed=1)
    lay = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    streams = lay(start.sin())
    assert not streams.is_contiguous()
    [found] = torch.autograd.grad(sum(losses(order, streams, joinable(3, 4, "own")).values()), start)
    same(found, expected_gradient(order, start))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_streams_without_gradients_are_left_alone_by_their_readers(order):
    streams = draw(5, 12, 4, 3, seed=1).requires_grad_(False)
    weights = {"plain": PLAIN, "strided": STRIDED, "other": OTHER}
    loss = sum(losses(order, streams, joinable(3, 4, "own")).values())
    wanted = [weights[name] for name in order if name in weights]
    assert all(found.any() for found in torch.autograd.grad(loss, wanted))
    assert streams.grad is None


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_recomputed_readers_give_the_same_gradients(order):
    start = draw(5, 12, 4, 3, seed=1)

    def run(streams):
        return sum(losses(order, streams, joinable(3, 4, "own")).values())

    ours = checkpoint(run, start.sin(), use_reentrant=False)
    for _ in range(2):
        [found] = torch.autograd.grad(ours, start, retain_graph=True)
        same(found, expected_gradient(order, start))


PARTS = [(order, name) for order in ORDERS for name in order]
PART_IDS = [f"{'-'.join(order)}: {name}" for order, name in PARTS]


@pytest.mark.parametrize(("order", "alone"), PARTS, ids=PART_IDS)
def test_streams_get_the_gradient_of_one_reader_where_the_others_take_no_part(order, alone):
    """Which happens where a loss is put on a value inside a block."""
    start = draw(5, 12, 4, 3, seed=1)
    loss = losses(order, start.sin(), joinable(3, 4, "own"))[alone]
    [found] = torch.autograd.grad(loss, start, allow_unused=True)
    assert found is not None
    same(found, expected_gradient([alone], start))


@pytest.mark.parametrize(("order", "alone"), PARTS, ids=PART_IDS)
def test_a_pass_through_one_reader_leaves_nothing_behind_for_the_next_pass(order, alone):
    """The first pass ends at an input of that reader beside the streams, so that the others do not run in it."""
    start, tensors = draw(5, 12, 4, 3, seed=1), joinable(3, 4, "own")
    beside = {"plain": PLAIN, "strided": STRIDED, "other": OTHER, "join": tensors[0]}[alone]
    found = losses(order, start.sin(), tensors)
    torch.autograd.grad(sum(found.values()), beside, retain_graph=True)
    [whole] = torch.autograd.grad(sum(found.values()), start, retain_graph=True)
    same(whole, expected_gradient(order, start))


@pytest.mark.parametrize(("order", "alone"), PARTS, ids=PART_IDS)
def test_passes_through_one_reader_after_another_add_up(order, alone):
    start = draw(5, 12, 4, 3, seed=1)
    found = losses(order, start.sin(), joinable(3, 4, "own"))
    last = sum(loss for name, loss in found.items() if name != alone)
    parts = [torch.autograd.grad(loss, start, retain_graph=True, allow_unused=True)[0] for loss in (found[alone], last)]
    assert all(part is not None for part in parts)
    same(parts[0], expected_gradient([alone], start))
    same(parts[0] + parts[1], expected_gradient(order, start))


@pytest.mark.parametrize("name", ["plain", "strided", "join"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_reading_that_no_loss_follows_from_does_not_swallow_the_gradients_of_later_ones(name, kept):
    start = draw(5, 12, 4, 3, seed=1)
    streams = start.sin()
    unused = losses(["plain"], streams, joinable(3, 4, "own"))
    if not kept:
        del unused
    loss = losses([name], streams, joinable(3, 4, "own"))[name]
    [found] = torch.autograd.grad(loss, start, allow_unused=True)
    assert found is not None
    same(found, expected_gradient([name], start))


@pytest.mark.parametrize("order", list(itertools.permutations(["projection", "reader"])), ids="-".join)
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "projection alone first"])
def test_streams_of_a_block_get_the_gradients_of_its_reader_and_projection(order, alone):
    start = draw(5, 12, 4, 3, seed=1)
    ours, weight = block(order, read_streams, join, start.sin())
    theirs, _ = block(order, read_literally, join_literally, start.sin())
    if alone:
        torch.autograd.grad(ours, weight, retain_graph=True)
    [found], [expected] = torch.autograd.grad(ours, start), torch.autograd.grad(theirs, start)
    same(found, expected)


def block(order, read, joined, streams):
    """Run what a block does: the join reads what the reader and the projection, called in this order, return."""
    projection, reader, (_, _, *rest) = draw(4, 3, 3, seed=23), draw(4, 2, 3, seed=24), joinable(3, 4, "own")
    weights = {"projection": projection, "reader": reader}
    found = {name: read(streams, weights[name]) for name in order}
    logits = joined(found["reader"].tanh(), found["projection"], *rest, Mix(0.3, True))
    return logits.square().sum(), projection


# --- moments ---


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_moments_are_mean_and_covariance_within_each_branch(branches):
    hidden = draw(4, 6, 3, 5)
    rows = hidden.unflatten(1, (branches, -1)).permute(1, 2, 0, 3, 4).flatten(2)
    mean = rows.mean(dim=2)
    centred = rows - mean.unsqueeze(2)
    covariance = torch.einsum("kdp,kep->kde", centred, centred) / rows.shape[2]
    for found, expected in zip(moments(hidden, branches), (mean, covariance), strict=True):
        compare(found, expected, (hidden,))


@pytest.mark.parametrize("branches", [1, 2])
def test_moments_have_the_gradients_of_finite_differences(branches):
    assert torch.autograd.gradcheck(lambda hidden: moments(hidden, branches), (draw(2, 4, 2, 3),))


def test_moments_of_two_positions_worked_by_hand():
    """Channels (1, 3) and (2, 8): means 2 and 5, deviations 1 and 3, so the covariance is [[1, 3], [3, 9]]."""
    hidden = torch.tensor([[1.0, 3.0], [2.0, 8.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    mean, covariance = moments(hidden)
    assert mean.tolist() == [[2.0, 5.0]]
    assert covariance.tolist() == [[[1.0, 3.0], [3.0, 9.0]]]


def test_moments_of_half_precision_are_those_in_float32():
    hidden = draw(4, 6, 3, 5).detach().bfloat16()
    mean, covariance = moments(hidden, 2)
    assert mean.dtype == covariance.dtype == torch.float32
    for found, expected in zip((mean, covariance), moments(hidden.float(), 2), strict=True):
        assert torch.equal(found, expected)


# --- memory ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.half])
@pytest.mark.parametrize("size", [(3, 5), (2, 1200, 31, 37), (0, 7)])
def test_memory_has_the_size_and_dtype_asked_for_and_holds_what_is_written(dtype, size):
    found = memory.empty(torch.zeros(1, dtype=dtype), size)
    assert found.shape == size
    assert found.dtype == dtype
    assert found.is_contiguous()
    found.fill_(2)
    found.mul_(3).add_(1)
    assert torch.equal(found, torch.full(size, 7.0, dtype=dtype))


def test_a_large_tensor_outlives_its_views_and_its_views_outlive_it():
    whole = memory.empty(torch.zeros(1), (3, 700, 32, 32))
    assert whole.numel() * 4 > memory._HUGE
    whole.copy_(torch.arange(whole.numel()).view_as(whole))
    part = whole[1, 2]
    last = whole.flatten()[-1].item()
    del whole
    gc.collect()
    others = [memory.empty(torch.zeros(1), (3, 700, 32, 32)).fill_(-1) for _ in range(3)]
    assert torch.equal(part.flatten(), torch.arange(702 * 1024, 703 * 1024).float())
    assert last == 3 * 700 * 1024 - 1
    assert all(bool((other == -1).all()) for other in others)


def test_large_tensors_do_not_overlap():
    first, second = (memory.empty(torch.zeros(1), (700, 40, 41)).fill_(value) for value in (1, 2))
    assert bool((first == 1).all())
    assert bool((second == 2).all())


def test_wide_streams_are_joined_and_read_as_narrow_ones():
    """Above the size from which on memory comes in huge pages, beside the same in two halves below it."""
    tensors = joinable(4, 4, "own", images=12, channels=16, width=2, size=(36, 36))
    assert 12 * 64 * 36 * 36 * 8 > memory._HUGE > 6 * 64 * 36 * 36 * 8
    hidden, shortcut, *rest = tensors
    weight = draw(4, 2, 16)

    def run(part):
        joined = join(hidden[part], shortcut[part], *rest, Mix(0.25, True))
        loss = (read_streams(joined, weight).square() + 1).log().sum() + joined.sum()
        return joined, torch.autograd.grad(loss, (shortcut, weight))

    joined, whole = run(slice(None))
    halves = [run(slice(0, 6)), run(slice(6, 12))]
    same(joined, torch.cat([halves[0][0], halves[1][0]]))
    for place in range(2):
        torch.testing.assert_close(whole[place], halves[0][1][place] + halves[1][1][place], rtol=TIGHT, atol=1e-11)


def test_a_large_parameter_keeps_its_gradient_after_an_optimizer_step():
    streams = nn.Parameter(memory.empty(torch.zeros(1, dtype=torch.float64), (6, 64, 40, 40)).fill_(0.5).detach())
    before = streams.detach().clone()
    read_streams(streams, draw(4, 2, 16).detach()).sum().backward()
    torch.optim.SGD([streams], lr=0.1).step()
    assert streams.grad.any()
    same(streams.detach(), before - 0.1 * streams.grad)
