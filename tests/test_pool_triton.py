"The Triton kernels of max pooling: in Triton's interpreter, compiled for a Hopper chip, and on a GPU where there is one."
import re

import pytest
import torch
from kernels import compiled, gpu, inside, layouts, on_the_cpu, outside, run_in_the_interpreter
from torch.nn import functional as F

from scratchdet import pool_triton
from scratchdet.norm import _layout
from scratchdet.pool_triton import _register_pool, triton_max_pool, triton_max_pool_backward
from scratchdet.resnet import _max_pool, _max_pool_backward

plain, plain_backward = _max_pool._init_fn, _max_pool_backward._init_fn


def maps(shape, layout=torch.channels_last, dtype=torch.float32, seed=0, device='cpu'):
    "Maps with many equal values, as behind a ReLU, and a gradient."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).relu().mul(4).round().to(device, dtype).contiguous(memory_format=layout)
    n, c, h, w = shape
    dy = torch.randn(n, c, (h + 1) // 2, (w + 1) // 2, generator=g).to(device, dtype)
    return x, dy


def compare(x, dy, tolerance):
    "Both bodies: values and taps to the last bit."
    mine, theirs = triton_max_pool(x), plain(x)
    for a, o in zip(mine, theirs, strict=True):
        assert torch.equal(a, o) and (a.dtype, _layout(a)) == (o.dtype, _layout(o))
    mine, theirs = (f(dy, theirs[1], *x.shape[2:]) for f in (triton_max_pool_backward, plain_backward))
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert (mine.dtype, _layout(mine)) == (theirs.dtype, _layout(theirs))


@inside
@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('shape', [(2, 64, 9, 40), (1, 130, 4, 5), (3, 1, 1, 1), (1, 2, 30, 1), (1, 5, 2, 2), (2, 3, 1, 33)])
def test_equal_to_the_plain_bodies(shape, layout):
    compare(*maps(shape, layout), 1e-6)
    compare(*maps(shape, layout, torch.float16), 4e-3)


@inside
def test_values_below_zero_and_not_numbers():
    x = -maps((2, 3, 7, 8))[0] - 1
    x[0, :, 2, 3], x[1, :, :4] = torch.nan, -torch.inf
    for a, o in zip(triton_max_pool(x), plain(x)): assert torch.equal(a.nan_to_num(5.), o.nan_to_num(5.))


@pytest.fixture
def kernels_on_cpu():
    with on_the_cpu(_register_pool, _max_pool, _max_pool_backward): yield


def check_ops():
    for shape in (2, 3, 8, 10), (1, 4, 5, 7):
        for layout in layouts:
            x, dy = maps(shape, layout)
            torch.library.opcheck(_max_pool, (x.requires_grad_(),))
            for d in dy, dy[:1, :1, :1, :1].expand_as(dy): torch.library.opcheck(_max_pool_backward, (d, _max_pool(x)[1], *shape[2:]))


@inside
def test_opcheck_of_the_kernels(kernels_on_cpu): check_ops()


def test_opcheck_of_the_plain_bodies(): check_ops()


@inside
def test_an_empty_map_and_float64(kernels_on_cpu):
    for x in torch.zeros(0, 3, 4, 4), torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double():
        leaf = x.requires_grad_()
        y, _ = _max_pool(leaf)
        y.sum().backward()
        assert torch.equal(y, F.max_pool2d(leaf, 3, 2, 1)) and leaf.grad.sum() == y.numel()


@outside
def test_in_the_interpreter(): assert run_in_the_interpreter(__file__) >= 15


@outside
@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
def test_a_hopper_chip_spills_nothing(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    kernels = ((pool_triton._pool, dict(x=f'*{dtype}', y=f'*{dtype}', taps='*u8')),
               (pool_triton._unpool, dict(dy=f'*{dtype}', taps='*u8', dx=f'*{dtype}')))
    for kernel, types in kernels:
        ptx, uses = compiled(kernel, tmp_path, types, dict(ROWS=16, COLS=64), even=('C',), num_warps=4)
        assert 16 <= uses['REG'] <= 128 and uses['LOCAL'] == 0, uses
        assert re.search(r'ld\.global\S*\.v[24]\.b32', ptx) and re.search(r'st\.global\S*\.v[24]\.b32', ptx)  # 8 bytes at least


@gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('shape', [(2, 64, 400, 608), (1, 64, 401, 333), (2, 32, 7, 9)])
def test_on_a_gpu_equal_to_the_plain_bodies(shape, dtype):
    x, dy = maps(shape, dtype=dtype, device='cuda')
    triton_max_pool_backward(dy, triton_max_pool(x)[1], *shape[2:])
    torch.cuda.set_sync_debug_mode('error')
    mine = triton_max_pool(x)
    back = triton_max_pool_backward(dy, mine[1], *shape[2:])
    torch.cuda.set_sync_debug_mode('default')
    for a, o in zip(mine, plain(x)): assert torch.equal(a, o)
    torch.testing.assert_close(back, plain_backward(dy, mine[1], *shape[2:]), rtol=1e-2, atol=1e-2)
