"Backbone and pyramid: shapes, structure, and independence of an image from its batch, over many settings."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from scratchdet.fpn import FPN
from scratchdet.norm import GroupNorm
from scratchdet.resnet import Bottleneck, ResNet


def small(seed=0):
    torch.manual_seed(seed)
    backbone = ResNet((1, 1, 1, 1), width=16, groups=8)
    return backbone, FPN(backbone.channels, 32, groups=8)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2), st.integers(33, 140), st.integers(33, 140))
def test_each_level_halves_the_one_before_rounding_up(n, h, w):
    backbone, fpn = small()
    with torch.no_grad():
        cs = backbone(torch.randn(n, 3, h, w))
        ps = fpn(cs)
    half = lambda s: tuple(-(-v // 2) for v in s)
    shapes, size = [], half(half((h, w)))
    for _ in range(5):
        shapes.append(size)
        size = half(size)
    assert [tuple(c.shape) for c in cs] == [(n, c, *s) for c, s in zip(backbone.channels, shapes)]
    assert [tuple(p.shape) for p in ps] == [(n, 32, *s) for s in shapes]


@pytest.mark.parametrize('blocks, layers', [((3, 4, 6, 3), 50), ((3, 4, 23, 3), 101), ((1, 1, 1, 1), 14)])
def test_depth(blocks, layers):
    with torch.device('meta'): net = ResNet(blocks)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [m for m in net.modules() if isinstance(m, Bottleneck) and m.shortcut is not None]
    assert len(convs) + 1 - len(shortcuts) == layers and len(shortcuts) == 4
    assert sum(isinstance(m, GroupNorm) for m in net.modules()) == len(convs)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert net.channels == (256, 512, 1024, 2048)


def test_the_stride_is_in_the_3x3_of_the_first_block_of_stages_2_to_4():
    with torch.device('meta'): net = ResNet()
    strides = {n: m.stride[0] for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.stride[0] != 1}
    expected = {'stem.conv'} | {f'stages.{l}.0.{c}.conv' for l in (1, 2, 3) for c in ('conv2', 'shortcut')}
    assert set(strides) == expected and set(strides.values()) == {2}


def test_an_image_alone_gives_what_it_gives_in_a_batch():
    backbone, fpn = small()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together = fpn(backbone(images))
        for i in range(3):
            for a, b in zip(together, fpn(backbone(images[i:i + 1]))): torch.testing.assert_close(a[i:i + 1], b, atol=1e-4, rtol=1e-4)


def test_gradients_of_a_batch_are_the_sum_over_its_images():
    backbone, fpn = small()
    backbone, fpn = backbone.double(), fpn.double()
    images, params = torch.randn(2, 3, 64, 64, dtype=torch.float64), [*backbone.parameters(), *fpn.parameters()]
    loss = lambda x: sum(p.square().sum() for p in fpn(backbone(x)))
    whole = torch.autograd.grad(loss(images), params)
    parts = [torch.autograd.grad(loss(i[None]), params) for i in images]
    assert len(whole) == len(params) > 0
    for w, a, b in zip(whole, *parts): torch.testing.assert_close(w, a + b)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_layouts_and_autocast(layout, dtype):
    backbone, fpn = small()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact = fpn(backbone(images))
        backbone, fpn = (copy.deepcopy(m).to(memory_format=layout) for m in (backbone, fpn))
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            ps = fpn(backbone(images.contiguous(memory_format=layout)))
    for p, e in zip(ps, exact, strict=True):
        assert p.dtype == dtype
        assert (p - e).abs().mean() < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_captured_as_one_graph_with_equal_gradients():
    backbone, fpn = small()
    model, images, results = nn.Sequential(backbone, fpn), torch.randn(2, 3, 64, 64), []
    for f in (model, torch.compile(model, fullgraph=True, backend='eager')):
        model.zero_grad()
        sum(p.square().mean() for p in f(images)).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert len(results[0]) > 0
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b)
