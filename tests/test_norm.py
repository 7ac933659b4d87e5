"GroupNorm as a custom op: what the notebook does not sweep."
import pytest
import torch
from torch.nn import functional as F

from scratchdet.norm import ConvNorm, GroupNorm, _group_norm, _group_norm_backward, group_norm
from scratchdet.resnet import max_pool
from scratchdet.roi_align import roi_align

layouts = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def reference(x, weight, bias, groups, residual=None, relu=False):
    "PyTorch's own steps, in float64."
    y = F.group_norm(x.double(), groups, weight.double(), bias.double())
    if residual is not None: y = y + residual.double()
    return y.relu() if relu else y


def inputs(shape, dtype=torch.float32, layout='contiguous', seed=0):
    g, wide = torch.Generator().manual_seed(seed), torch.promote_types(dtype, torch.float32)
    x, residual, dy = (torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layouts[layout])
                       for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=g).to(wide) for _ in range(2))
    return x, residual, weight, bias, dy


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('with_residual', [False, True])
@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('shape, groups', [((2, 64, 7, 9), 32), ((1, 64, 7, 9), 32), ((2, 64, 1, 1), 32), ((3, 8, 5, 1), 8),
                                           ((2, 6, 4, 4), 1)])
def test_forward_and_backward_equal_the_separate_steps(shape, groups, layout, with_residual, relu):
    x, residual, weight, bias, dy = inputs(shape, layout=layout)
    results = []
    for f in (group_norm, reference):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
        y = f(*leaves[:3], groups, residual=leaves[3] if with_residual else None, relu=relu)
        y.backward(dy.to(y.dtype))
        results.append([y, *(t.grad for t in leaves[:3 + with_residual])])
    assert results[0][0].is_contiguous(memory_format=layouts[layout])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 2e-4 * max(1, theirs.abs().max())


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('with_residual', [False, True])
@pytest.mark.parametrize('layout', layouts)
def test_gradcheck(layout, with_residual, relu):
    x, residual, weight, bias, _ = (t.requires_grad_() for t in inputs((2, 4, 3, 2), torch.float64, layout))
    residual = (residual,) if with_residual else ()
    f = lambda x, w, b, *r: group_norm(x, w, b, 2, residual=r[0] if r else None, relu=relu)
    assert torch.autograd.gradcheck(f, (x, weight, bias, *residual))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('layout', layouts)
def test_opcheck(layout, dtype):
    x, residual, weight, bias, dy = inputs((2, 8, 4, 6), dtype, layout)
    checks = 0
    for r in (None, residual):
        for relu in (False, True):
            leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
            torch.library.opcheck(_group_norm, (*leaves, 4, 1e-5, r, relu))
            y, mean, rstd = _group_norm(x, weight, bias, 4, 1e-5, r, relu)
            for d in (dy, dy.contiguous(), dy[:1, :1, :1, :1].expand_as(dy)):
                back = d, x, weight, bias, mean, rstd, y if relu else None, 4, r is not None
                torch.library.opcheck(_group_norm_backward, back)
                checks += 1
    assert checks == 12


@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('relu', [False, True])
def test_bfloat16_rounds_the_float32_result_once(relu, layout):
    x, residual, weight, bias, dy = inputs((2, 64, 12, 20), torch.bfloat16, layout)
    wide, leaves = x.float().requires_grad_(), x.clone().requires_grad_()
    y, exact = group_norm(leaves, weight, bias, relu=relu), group_norm(wide, weight, bias, relu=relu)
    assert y.dtype == torch.bfloat16
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()
    y.backward(dy)
    exact.backward(dy.float())
    assert leaves.grad.dtype == torch.bfloat16
    assert (leaves.grad - wide.grad).abs().max() <= 0.02 * wide.grad.abs().max()


def test_bfloat16_statistics_are_float32():
    "A group of half a million values: bfloat16 sums would stop growing at 256."
    x = (1 + 0.5 * torch.randn(1, 64, 300, 400, generator=torch.Generator().manual_seed(0))).bfloat16()
    y, mean, rstd = _group_norm(x, torch.ones(64), torch.zeros(64), 1, 1e-5, None, False)
    assert mean.dtype == rstd.dtype == torch.float32
    assert abs(mean.item() - x.double().mean()) < 1e-3 and abs(1 / rstd.item() - x.double().std()) < 1e-3


@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('size', [16, 151])
def test_a_far_mean_costs_no_digits(layout, size):
    "ATen's kernel for channels last takes E[x²] - E[x]²; ours must not."
    x = (1000 + torch.randn(1, 64, size, size, generator=torch.Generator().manual_seed(0)))
    exact = reference(x, torch.ones(64), torch.zeros(64), 32)
    y = group_norm(x.contiguous(memory_format=layouts[layout]), torch.ones(64), torch.zeros(64))
    assert (y - exact).abs().max() < 1e-3


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('shape', [(2, 64, 128, 160), (1, 256, 100, 136), (2, 256, 64, 81), (1, 64, 151, 201), (1, 96, 128, 160), (1, 192, 64, 65), (64, 256, 7, 7)])
def test_no_channel_moves_as_a_whole(shape, inplace):
    "Smooth maps, in which neighbours round alike, larger and smaller than a block: the mean error of a channel's pixels is no larger than one of a pixel."
    (n, c, h, w), g = shape, torch.Generator().manual_seed(42)
    x = F.interpolate(torch.randn(n, c, 4, 4, generator=g), (h, w), mode='bilinear') + torch.randn(n, c, 1, 1, generator=g)
    x = (x + .05 * torch.randn(shape, generator=g)).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(c, generator=g) + .5, torch.randn(c, generator=g)
    exact = reference(x, weight, bias, 32)
    with torch.set_grad_enabled(not inplace): error = (group_norm(x, weight, bias, inplace=inplace) - exact) / exact.std()
    assert error.abs().max() < 1e-6 and error.mean((2, 3)).square().mean().sqrt() < 8e-8


@pytest.mark.parametrize('x', [torch.randn(2, 16, 8, 12)[:, ::2], torch.randn(2, 8, 12, 8).transpose(2, 3),
                               torch.randn(1, 8, 1, 1).expand(2, 8, 8, 12)], ids=['sliced', 'transposed', 'expanded'])
def test_any_strides(x):
    dense = x.contiguous()
    weight, bias = torch.rand(8), torch.rand(8)
    torch.testing.assert_close(group_norm(x, weight, bias, 4), group_norm(dense, weight, bias, 4))
    torch.library.opcheck(_group_norm, (x, weight, bias, 4, 1e-5, None, True))


def test_under_autocast_and_captured_as_one_graph():
    torch.manual_seed(0)
    net = torch.nn.Sequential(ConvNorm(3, 32, 3, 2, groups=8), ConvNorm(32, 64, 3, groups=8))
    x, results = torch.randn(2, 3, 16, 24), []
    for f in (net, torch.compile(net, fullgraph=True, backend='aot_eager')):
        net.zero_grad()
        with torch.autocast('cpu', torch.bfloat16): y = f(x)
        y.float().square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    assert results[0][0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in results[0][1:])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b)


def test_the_residual_is_neither_changed_nor_shared():
    x, residual, weight, bias, _ = inputs((2, 8, 4, 4))
    kept, leaves = residual.clone(), (x.clone().requires_grad_(), residual.clone().requires_grad_())
    y = group_norm(leaves[0], weight, bias, 4, residual=leaves[1])
    y.sum().backward()
    assert torch.equal(leaves[1], kept) and y.data_ptr() != leaves[1].data_ptr()
    assert torch.equal(leaves[1].grad, torch.ones_like(kept))


def test_only_what_is_needed_is_kept():
    "Saved for the way back: x, weight, bias, mean, rstd, and y where there is a ReLU."
    x, _, weight, bias, _ = inputs((2, 64, 8, 8))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        group_norm(x.requires_grad_(), weight, bias)
        without = sum(sizes)
        group_norm(x, weight, bias, relu=True)
    assert without <= x.numel() + 2 * 64 + 2 * 2 * 32
    assert sum(sizes) - without <= without + x.numel()


@pytest.mark.parametrize('make', [lambda: group_norm(torch.zeros(1, 48, 2, 2), torch.ones(48), torch.zeros(48)),
                                  lambda: GroupNorm(48), lambda: ConvNorm(3, 48, 1)])
def test_groups_that_do_not_divide_are_refused(make):
    with pytest.raises(ValueError, match='32 groups do not divide 48 channels'): make()


def test_padding_changes_the_function_and_a_single_value_normalizes_to_the_bias():
    norm, x = GroupNorm(64), inputs((1, 64, 8, 8))[0]
    assert not torch.allclose(norm(F.pad(x, (0, 4)))[..., :8], norm(x), atol=1e-2)
    pixel = group_norm(torch.randn(3, 32, 1, 1), torch.ones(32), torch.full((32,), 2.))
    torch.testing.assert_close(pixel, torch.full_like(pixel, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize('relu', [False, True])
def test_transforms_of_torch_func_take_pytorchs_operations(relu):
    x, other = torch.randn(2, 2, 8, 6, 6, dtype=torch.float64)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    def ours(x): return group_norm(x, weight, bias, 2, residual=other, relu=relu)
    leaf, tangent = x.clone().requires_grad_(), torch.randn_like(x)
    exact, = torch.autograd.grad(ours(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda o: ours(o).square().sum())(x), exact)
    y, along = torch.func.jvp(lambda o: ours(o).square().sum(), (x,), (tangent,))
    torch.testing.assert_close(along, (exact * tangent).sum())
    torch.testing.assert_close(torch.vmap(ours)(torch.stack([x, 2 * x])), torch.stack([ours(x), ours(2 * x)]))
    brick = ConvNorm(8, 8, 3, groups=4).double()
    with torch.no_grad(): torch.testing.assert_close(torch.vmap(brick)(x[None]), brick(x)[None])


def test_roi_align_in_forward_mode_is_refused_not_taken_for_zero():
    x = torch.randn(2, 8, 6, 6)
    maps, roi = [torch.randn(1, 4, 64 // s, 64 // s) for s in (1, 2, 4, 8)], torch.tensor([[0., 1, 1, 30, 30]])
    with pytest.raises(NotImplementedError, match='roi_align has no derivative in forward mode'):
        torch.func.jvp(lambda o: roi_align([o, *maps[1:]], roi, 7), (maps[0],), (maps[0],))
    pooled, tangent = torch.func.jvp(max_pool, (x,), (x,))
    assert torch.equal(pooled, tangent)


def test_what_comes_through_another_convolution_is_not_overwritten():
    brick, x = ConvNorm(8, 8, 3, groups=4), torch.randn(2, 8, 6, 6)
    for brick.conv in torch.nn.Identity(), torch.nn.Unflatten(1, (8,)):
        before = x.clone()
        with torch.no_grad(): assert not torch.equal(brick(x), before) and torch.equal(x, before)
    inner, kept = torch.nn.Conv2d(8, 8, 3, padding=1), []
    brick.conv = torch.nn.Sequential(inner)
    with inner.register_forward_hook(lambda module, given, got: kept.append(got)), torch.no_grad(): brick(x)
    assert torch.equal(kept[0], inner(x))


@pytest.mark.parametrize('name, shape', [('weight', (4,)), ('weight', (1,)), ('bias', (1, 8)), ('residual', (1, 8, 6, 6)), ('residual', (8,))])
def test_shapes_that_would_broadcast_are_refused(name, shape):
    args = dict(weight=torch.ones(8), bias=torch.ones(8)) | {name: torch.ones(shape)}
    with pytest.raises(ValueError, match=f'{name} must be'): group_norm(torch.randn(2, 8, 6, 6), groups=2, **args)


@pytest.mark.parametrize('watch', ['convolution', 'norm', 'everything'])
def test_what_a_hook_keeps_is_not_overwritten(watch):
    brick, x, kept = ConvNorm(8, 16, 1, groups=4), torch.randn(2, 8, 6, 6), []
    with torch.no_grad(): expected = brick(x)
    def after(module, given, got):
        if module is brick.conv: kept.append(got)
    hook = {'convolution': lambda: brick.conv.register_forward_hook(after),
            'norm': lambda: brick.norm.register_forward_pre_hook(lambda module, given: kept.append(given[0])),
            'everything': lambda: torch.nn.modules.module.register_module_forward_hook(after)}[watch]()
    with hook, torch.no_grad(): y = brick(x)
    assert len(kept) == 1 and torch.equal(kept[0], brick.conv(x))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(): assert torch.equal(brick(x), expected)
