"""The block-triangular convolution against a dense one with a masked weight, in float64: outputs, gradients, spans."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery.errors import InvalidOption
from surgery_inclusive import kernels, triangular
from surgery_inclusive.triangular import NestedTriangularConv2d, TriangularConv2d

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
PARTS = 3
CONVS = {
    "pointwise": {"kernel_size": 1},
    "pointwise, small maps": {"kernel_size": 1},
    "pointwise, an image at a time": {"kernel_size": 1},
    "pointwise, strided": {"kernel_size": 1, "stride": (2, 3)},
    "pointwise, padded": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3, joined": {"kernel_size": 3, "padding": 1},
    "same, dilated": {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
    "strided": {"kernel_size": (3, 1), "stride": 2},
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture(params=CONVS)
def settings(request, monkeypatch):
    """Return the settings of a convolution; each comes to another way of working it out."""
    monkeypatch.setattr(kernels, "_SMALL", 1000 if "small" in request.param else 0)
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 1 if "at a time" in request.param else 2 << 20)
    monkeypatch.setattr(triangular, "_ROWS", 100 if "joined" in request.param else 1)
    return CONVS[request.param]


def pair(settings, *, bias=True, inputs=6, outputs=9, kind=TriangularConv2d):
    """Return a triangular convolution, and the dense one that it was made of with what lies above the diagonal at 0."""
    dense = nn.Conv2d(inputs, outputs, bias=bias, **settings).double()
    found = kind.of(dense, PARTS)
    with torch.no_grad():
        for row in range(outputs):
            for column in range(inputs):
                if column * PARTS // inputs > row * PARTS // outputs:
                    dense.weight[row, column] = 0
    return found, dense


def draw(*shape, layout=torch.contiguous_format):
    return torch.randn(*shape, dtype=torch.float64).to(memory_format=layout).requires_grad_()


def dense_weight(conv, gradients):
    """Return the gradients of the row blocks in the places of the dense weight."""
    return torch.cat([F.pad(g, (0, 0, 0, 0, 0, conv.in_channels - g.shape[1])) for g in gradients])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_a_dense_convolution_with_a_masked_weight(settings, bias, layout):
    conv, dense = pair(settings, bias=bias)
    value = draw(4, 6, 5, 7, layout=layout)
    found, expected = conv(value), dense(value)
    torch.testing.assert_close(found, expected, **TIGHT)
    assert found.stride() == expected.stride()
    pull = torch.randn_like(expected)
    ours = torch.autograd.grad(found, [value, *conv.parameters()], pull)
    theirs = torch.autograd.grad(expected, [value, *dense.parameters()], pull)
    names = [name for name, _ in conv.named_parameters()]
    to_weights = [g for name, g in zip(names, ours[1:], strict=True) if name != "bias"]
    mask = (dense.weight != 0).double()
    torch.testing.assert_close(ours[0], theirs[0], **TIGHT)
    torch.testing.assert_close(dense_weight(conv, to_weights), theirs[1] * mask, **TIGHT)
    if bias:
        torch.testing.assert_close(ours[1 + names.index("bias")], theirs[2], **TIGHT)


def test_an_output_depends_on_earlier_inputs_only(settings):
    conv, _ = pair(settings)
    value = draw(2, 6, 3, 4)
    jacobian = torch.autograd.functional.jacobian(conv, value).abs().sum(dim=(0, 2, 3, 4, 6, 7))
    reached = jacobian.view(PARTS, 3, PARTS, 2).sum(dim=(1, 3)) > 0
    assert torch.equal(reached, torch.ones(PARTS, PARTS, dtype=torch.bool).tril())


def test_of_keeps_the_lower_blocks():
    """Two parts of a 2 x 4 weight: the first output reads two inputs, the second all four."""
    conv = nn.Conv2d(4, 2, 1, bias=False)
    weight = torch.arange(8.0).view(2, 4, 1, 1)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    found = TriangularConv2d.of(conv.eval(), 2)
    assert [w.flatten().tolist() for w in found.weights] == [[0, 1], [4, 5, 6, 7]]
    assert not any(w.requires_grad for w in found.weights)
    assert not found.training
    assert (found.in_channels, found.out_channels) == (4, 2)
    assert set(found.state_dict()) == {"weights.0", "weights.1"}
    assert TriangularConv2d.of(conv.half().to("meta"), 2).weights[0].dtype is torch.half


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(6, 6, 1, groups=2), "groups=2"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(7, 6, 1), "7 input and 6 output"),
        (nn.Conv2d(6, 8, 1), "6 input and 8 output"),
    ],
)
def test_of_refuses(conv, message):
    with pytest.raises(InvalidOption, match=message):
        TriangularConv2d.of(conv, PARTS)


@pytest.mark.parametrize("first", range(1, PARTS + 1))
def test_a_thinner_span_is_the_first_part_of_the_whole(settings, first):
    conv, dense = pair(settings, kind=NestedTriangularConv2d)
    value = draw(4, 6, 5, 7)
    found = conv(value[:, : 2 * first], (0, first))
    expected = dense(value)[:, : 3 * first]
    torch.testing.assert_close(found, expected, **TIGHT)
    pull = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(result, value, pull)[0] for result in (found, expected))
    torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("spans", [[(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_spans_one_after_the_other_make_the_whole(settings, spans, layout, without):
    conv, dense = pair(settings, kind=NestedTriangularConv2d)
    conv.eval().remembering = True
    with without():
        value = draw(4, 6, 5, 7, layout=layout)
        parts = [conv(value[:, 2 * start : 2 * stop], (start, stop)) for start, stop in spans]
        torch.testing.assert_close(torch.cat(parts, dim=1), dense(value), **TIGHT)


@pytest.mark.parametrize("forgets", ["train", "grad", "not asked"])
def test_inputs_are_kept_only_where_anytime_asks(forgets):
    conv, _ = pair({"kernel_size": 1}, kind=NestedTriangularConv2d)
    conv.train(forgets == "train").remembering = forgets != "not asked"
    value = draw(1, 2, 3, 3)
    with torch.set_grad_enabled(forgets == "grad"):
        conv(value, (0, 1))
    with torch.no_grad(), pytest.raises(InvalidOption, match="where 0 have been read"):
        conv(value, (1, 2))


def test_a_copy_has_an_empty_cache_and_weights_of_its_own():
    conv, dense = pair({"kernel_size": 1}, kind=NestedTriangularConv2d)
    conv.eval().remembering = True
    value = draw(1, 6, 3, 3)
    with torch.no_grad():
        conv(value[:, :2], (0, 1))
        twin = copy.deepcopy(conv)
        with pytest.raises(InvalidOption, match="where 0 have been read"):
            twin(value[:, 2:4], (1, 2))
        torch.testing.assert_close(conv(value[:, 2:4], (1, 2)), dense(value)[:, 3:6], **TIGHT)
        twin.weights[0].zero_()
    assert conv.weights[0].abs().sum() > 0
    assert set(conv.state_dict()) == {"weights.0", "weights.1", "weights.2", "bias"}


@pytest.mark.parametrize("index", range(PARTS))
@pytest.mark.parametrize("bias", [False, True])
def test_selected_is_the_sub_network_alone(settings, index, bias):
    conv, dense = pair(settings, kind=NestedTriangularConv2d, bias=bias)
    conv.eval().weights.requires_grad_(False)
    part = conv.selected((index,))
    value = draw(2, 6, 5, 7)
    torch.testing.assert_close(part(value[:, : 2 * index + 2]), dense(value)[:, : 3 * index + 3], **TIGHT)
    assert type(part) is (TriangularConv2d if index else nn.Conv2d)
    assert (part.in_channels, part.out_channels) == (2 * index + 2, 3 * index + 3)
    assert not part.training
    assert [p.requires_grad for name, p in part.named_parameters() if name != "bias"] == [False] * (index + 1)
    own = {p.data_ptr() for p in part.parameters()}
    assert not own & {p.data_ptr() for p in conv.parameters()}


def test_gradients_only_where_they_are_wanted(settings):
    conv, _ = pair(settings)
    value = draw(2, 6, 5, 7)
    expected = torch.autograd.grad(conv(value).sum(), conv.weights[1])[0]
    for k in (0, 2):
        conv.weights[k].requires_grad_(False)
    conv(value.detach()).sum().backward()
    torch.testing.assert_close(conv.weights[1].grad, expected, **TIGHT)
    assert conv.weights[0].grad is None
    assert conv.weights[2].grad is None


def test_can_be_differentiated_twice(settings):
    conv, _ = pair(settings)
    value = draw(2, 6, 3, 2)
    weights = [w.detach().requires_grad_() for w in conv.parameters()]
    names = [name for name, _ in conv.named_parameters()]

    def apply(value, *weights):
        return torch.func.functional_call(conv, dict(zip(names, weights, strict=True)), value)

    assert torch.autograd.gradcheck(apply, (value, *weights))
    assert torch.autograd.gradgradcheck(apply, (value, *weights))


def test_batched_and_forward_derivatives_are_those_of_the_dense_one(settings):
    conv, dense = pair(settings)
    value = draw(2, 6, 3, 4)
    for derive in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(derive(conv)(value), derive(dense)(value), **TIGHT)
    pulls = torch.randn(3, *dense(value).shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(c(value), value, pulls, is_grads_batched=True)[0] for c in (conv, dense))
    torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_lowers_the_precision(kernel):
    conv = TriangularConv2d.of(nn.Conv2d(6, 6, kernel), PARTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv(torch.randn(2, 6, 4, 4))
    assert found.dtype is torch.bfloat16


def test_shapes_come_without_values(settings):
    conv, dense = pair(settings, kind=NestedTriangularConv2d)
    conv, dense = conv.to("meta").eval(), dense.to("meta")
    value = torch.empty(2, 6, 5, 7, dtype=torch.float64, device="meta")
    assert conv(value, (0, PARTS)).shape == dense(value).shape


def test_one_image_equals_the_dense_convolution(settings):
    conv, dense = pair(settings)
    value = draw(1, 6, 5, 7)
    torch.testing.assert_close(conv(value), dense(value), **TIGHT)


def test_no_images_give_no_outputs(settings):
    conv, dense = pair(settings)
    value = draw(0, 6, 5, 7)
    assert conv(value).shape == dense(value).shape


class Fixed(nn.Module):
    """A nested convolution with its span."""

    def __init__(self, conv, span):
        super().__init__()
        self.conv, self.span = conv, span

    def forward(self, value):
        return self.conv(value, self.span)


@pytest.mark.parametrize("span", [(0, 2), (0, PARTS)])
def test_compiled_and_exported_equal_eager(settings, span):
    conv, _ = pair(settings, kind=NestedTriangularConv2d)
    fixed = Fixed(conv.eval(), span)
    value = draw(2, 2 * span[1], 5, 7).detach()
    expected = fixed(value)
    torch.compiler.reset()
    compiled = torch.compile(fixed, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), expected, **TIGHT)
    torch.testing.assert_close(torch.export.export(fixed, (value,)).module()(value), expected, **TIGHT)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_equals_eager(kernel):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fixed = Fixed(NestedTriangularConv2d.of(nn.Conv2d(6, 9, kernel), PARTS), (0, 2)).eval()
    value = torch.randn(2, 4, 5, 7)
    file = io.BytesIO()
    torch.onnx.export(fixed, (value,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), fixed(value), rtol=1e-5, atol=1e-6)  # float32
