"3x3 convolutions by fewer products: what the notebook does not sweep."
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import scratchdet.winograd as winograd
from scratchdet.detector import mask_rcnn
from scratchdet.winograd import Conv3x3, _conv3x3, _conv3x3_weight, _pays, conv3x3


def inputs(n, c, k, h, w, dtype=torch.float32):
    g = torch.Generator().manual_seed(n + h * 31 + w)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((n, c, h, w), (k, c, 3, 3), (n, k, h, w)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 80))
def test_any_shape_in_any_blocks(n, c, k, h, w, most):
    "Forward and both gradients, whatever the blocks."
    x, weight, dy = inputs(n, c, k, h, w, torch.float64)
    leaves = [(x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    with patch.object(winograd._Tiles, 'most', most):
        results = [_conv3x3(*leaves[0]), F.conv2d(*leaves[1], padding=1)]
        grads = [torch.autograd.grad(y, o, dy) for y, o in zip(results, leaves)]
    for ours, theirs in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(3, 4, 5, 7, 7), (2, 4, 5, 9, 14)])
def test_opcheck(shape, dtype, layout):
    x, weight, dy = (o.contiguous(memory_format=layout) for o in inputs(*shape, dtype))
    torch.library.opcheck(_conv3x3, (x.requires_grad_(), weight.requires_grad_()))
    for d in dy, dy[:1, :1, :1, :1].expand_as(dy): torch.library.opcheck(_conv3x3_weight, (d, x.detach()))


@pytest.mark.parametrize('shape, most', [((600, 256, 7, 7), 6e-7), ((300, 256, 4, 8), 6e-7), ((40, 256, 14, 14), 2e-6),
                                         ((1, 128, 50, 68), 2e-6), ((2, 512, 32, 33), 2e-6)])
def test_float32_loses_some_roundings(shape, most):
    "Whole maps lose less than tiles."
    n, c, h, w = shape
    x, weight, dy = inputs(n, c, c, h, w)
    x, weight = x.relu().requires_grad_(), (weight / c ** .5 / 3).requires_grad_()
    assert _pays(x, weight)
    wide = [o.detach().double().requires_grad_() for o in (x, weight)]
    exact = F.conv2d(*wide, padding=1)
    exact = exact, *torch.autograd.grad(exact, wide, dy.double())
    ours = conv3x3(x, weight)
    ours = ours, *torch.autograd.grad(ours, (x, weight), dy)
    for a, b in zip(ours, exact, strict=True): assert (a.double() - b).norm() / b.norm() < most


def test_where_it_is_used():
    "All 3x3 convolutions of stride 1; where a gradient is recorded, the backbone's are PyTorch's."
    model = mask_rcnn(3)
    named = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    fast = [(k, m) for k, m in named if isinstance(m, Conv3x3)]
    assert fast == [(k, m) for k, m in named if m.stride == (1, 1)] and len(fast) == 13 + 4 + 1 + 4 + 4
    assert all(m.exact_gradient == k.startswith('backbone') for k, m in fast)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8))
def test_a_whole_map_takes_its_real_values_and_three_products_for_each_pair(h, w):
    "Of n circular values of an axis, 1 is real if n is odd, 2 if it is even."
    n, real = (h + 1) * (w + 1), (1 + h % 2) * (1 + w % 2)
    assert [tuple(o.shape) for o in winograd._matrices(h, w, True)] == [(h * w, p := real + 3 * (n - real) // 2), (p, 9), (p, h * w)]
    assert winograd._gain(h, w, 1, 1)[1] == 120 * p


def test_what_is_no_gradient_is_not_computed():
    for wanted, spared in ((1, '_conv3x3'), (0, '_conv3x3_weight')):
        leaves = inputs(100, 128, 128, 7, 7)[:2]
        assert _pays(*leaves)
        y = conv3x3(leaves[0].requires_grad_(wanted == 0), leaves[1].requires_grad_(wanted == 1))
        with patch.object(winograd, spared, side_effect=AssertionError): y.sum().backward()
        assert leaves[1 - wanted].grad is None and leaves[wanted].grad.abs().sum() > 0


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_bad_values_stay_in_their_image(bad):
    x, weight, _ = inputs(100, 128, 128, 7, 7)
    assert _pays(x, weight)
    x[3, 0, 2, 2] = bad
    finite = conv3x3(x, weight).isfinite().flatten(1).all(1)
    assert not finite[3] and finite[:3].all() and finite[4:].all()


@pytest.mark.parametrize('shape', [(100, 128, 7, 7), (3, 128, 30, 33)])
def test_backward_may_begin_under_autocast(shape):
    n, c, h, w = shape
    x, weight, dy = inputs(n, c, c, h, w)
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = conv3x3(*leaves)
    outside = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with torch.autocast('cpu', torch.bfloat16): inside = torch.autograd.grad(y, leaves, dy)
    assert _pays(*leaves) and all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize('least, side', [(1, 7), (1, 20), (100, 7)])
def test_the_number_of_maps_may_change_after_export(least, side):
    conv, x = Conv3x3(128, 128), inputs(100, 128, 128, side, side)[0]
    program = torch.export.export(conv, (x,), dynamic_shapes=({0: torch.export.Dim('n', min=least, max=4096)},))
    assert 'conv3x3' in str(program.graph)
    for n in 300, least + 1:
        more = inputs(n, 128, 128, side, side)[0]
        torch.testing.assert_close(program.module()(more), conv(more), atol=1e-3, rtol=1e-4)


def test_transforms_of_torch_func_take_pytorchs():
    x, weight, _ = inputs(100, 128, 128, 7, 7)
    def both(f): return [torch.func.grad(lambda o: f(o, weight).square().sum())(x), torch.vmap(lambda o: f(x, weight, o))(torch.ones(2, 128))]
    for ours, theirs in zip(both(conv3x3), both(lambda *a: F.conv2d(*a, padding=1)), strict=True): assert torch.equal(ours, theirs)


@pytest.mark.parametrize('bias, kernel', [(torch.ones(128).double(), (3, 3)), (torch.ones(128, 1), (3, 3)), (None, (1, 9)), (None, (5, 5))])
def test_what_conv2d_refuses_or_means_otherwise_is_left_to_it(bias, kernel):
    x, weight = inputs(100, 128, 128, 7, 7)[0], torch.ones(128, 128, *kernel)
    assert not _pays(x, weight, bias)
    try: expected = F.conv2d(x, weight, bias, padding=1)
    except RuntimeError: return pytest.raises(RuntimeError, conv3x3, x, weight, bias)
    assert torch.equal(conv3x3(x, weight, bias), expected)


def test_forward_mode_and_one_image_are_pytorchs():
    x, weight, _ = inputs(2, 128, 128, 40, 40)
    def derivative(f): return torch.func.jvp(lambda o: f(o, weight), (x,), (x + 1,))
    for ours, theirs in zip(derivative(conv3x3), derivative(lambda o, w: F.conv2d(o, w, padding=1)), strict=True):
        assert torch.equal(ours, theirs) and ours.any()
    assert _pays(x, weight) and torch.equal(conv3x3(x[0], weight), F.conv2d(x[0], weight, padding=1))
    with pytest.raises(RuntimeError, match='channels'): conv3x3(x[:, 1:], weight)
    with pytest.raises(RuntimeError): conv3x3(x, weight, torch.ones(1))
