"The Triton kernels of GroupNorm: in Triton's interpreter, compiled for a Hopper chip, and on a GPU where there is one."
import itertools
import re

import pytest
import torch
from kernels import compiled, gpu, inside, layouts, on_the_cpu, outside, run_in_the_interpreter
from scratchdet import norm_triton
from scratchdet.norm import _group_norm, _group_norm_backward, group_norm
from scratchdet.norm_triton import Split, split_map, triton_group_norm, triton_group_norm_backward

plain, plain_backward = _group_norm._init_fn, _group_norm_backward._init_fn


def maps(shape, dtype, layout, seed=0, device='cpu'):
    g = torch.Generator().manual_seed(seed)
    x, residual, dy = (torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=g) for _ in range(2))
    return [o.to(device) for o in (x, residual, weight, bias, dy)]


def cases(shapes, dtypes, device='cpu'):
    "Arguments of both bodies, over layouts, residual and ReLU."
    both = False, True
    for (shape, groups), dtype, layout, add, relu in itertools.product(shapes, dtypes, layouts, both, both):
        x, residual, weight, bias, dy = maps(shape, dtype, layout, device=device)
        forward = x, weight, bias, groups, 1e-5, residual if add else None, relu
        y, mean, rstd = plain(*forward)
        yield forward, (dy, x, weight, bias, mean, rstd, y if relu else None, groups, add)


def compare(mine, theirs, unit, flip=0.):
    """Equal shapes, dtypes and strides; values to `unit` of themselves and 1e-4 of the largest.

    In a map of more than 100,000, one in as many may differ: rounding can move a value over the ReLU's 0. Sums of a channel then differ by `flip`."""
    for a, o in zip(mine, theirs, strict=True):
        assert a.shape == o.shape and a.dtype == o.dtype and a.stride() == o.stride()
        if not o.numel(): continue
        a, o, rtol = a.float(), o.float(), 0 if a.dtype == torch.float32 else unit
        near = (a - o).abs() <= rtol * o.abs() + 1e-4 * o.abs().max().clamp(min=1) + flip * (a.dim() == 1)
        assert near.logical_not().sum() <= a.numel() // 100_000


# one pass; in parts; 3 channels a group; LayerNorm; InstanceNorm; one pixel; more channels than a tile
shapes = [((2, 64, 3, 5), 32), ((1, 16, 17, 19), 4), ((2, 6, 4, 5), 2), ((1, 6, 9, 31), 1), ((2, 5, 4, 3), 5),
          ((3, 32, 1, 1), 32), ((2, 6, 1, 1), 2), ((1, 24, 1, 300), 3), ((1, 12, 5, 3), 4)]


@inside
@pytest.mark.parametrize('dtype, unit', [(torch.float32, 0), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_both_bodies_equal_the_plain_ones(dtype, unit):
    "The interpreter cuts to bfloat16 where a GPU rounds: a whole unit."
    looked = set()
    for forward, backward in cases(shapes if dtype == torch.float32 else shapes[1:3] + shapes[4:5], [dtype]):
        compare(triton_group_norm(*forward), plain(*forward), unit)
        compare(triton_group_norm_backward(*backward), plain_backward(*backward), unit)
        x, groups = forward[0], forward[3]
        looked.add(split_map(x.shape[1], x[0, 0].numel(), groups, not x.is_contiguous()).whole)
    assert looked == {True, False}


@inside
@pytest.mark.parametrize('split', [Split(8, 16, 4, 24, False), Split(64, 4, 4, 64, False), Split(256, 8, 4, 256, False)])
def test_any_cut_gives_the_same(split, monkeypatch):
    "Several tiles in a part, several blocks of channels, a last part with few pixels."
    monkeypatch.setattr(norm_triton, 'split_map', lambda *args: split)
    looked = 0
    for forward, backward in cases([((2, 12, 5, 11), 4)], [torch.float32]):
        compare(triton_group_norm(*forward), plain(*forward), 0)
        compare(triton_group_norm_backward(*backward), plain_backward(*backward), 0)
        looked += 1
    assert looked == 8


@inside
@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('h', [5, 19])
def test_a_far_mean_costs_no_digits(h, layout):
    x = 1000 + maps((1, 64, h, 23), torch.float32, layout)[0]
    y, mean, rstd = triton_group_norm(x, torch.ones(64), torch.zeros(64), 32)
    exact = x.double().reshape(1, 32, -1)
    assert (y - torch.nn.functional.group_norm(x.double(), 32)).abs().max() < 1e-3
    torch.testing.assert_close(rstd.double(), exact.var(-1, correction=0).rsqrt(), rtol=1e-4, atol=0)
    zero = torch.where(torch.arange(h)[:, None] < 4, 0., x)  # padding first: no tile's mean is near the other's
    torch.testing.assert_close(triton_group_norm(zero, torch.ones(64), torch.zeros(64), 32)[0].double(),
                               torch.nn.functional.group_norm(zero.double(), 32), rtol=0, atol=1e-4)


@inside
def test_bits_depend_neither_on_the_batch_nor_on_the_run():
    for forward, backward in cases([((3, 8, 3, 5), 2), ((3, 8, 17, 19), 2)], [torch.float32]):
        x, weight, bias, groups, eps, residual, relu = forward
        y = triton_group_norm(*forward)[0]
        alone = triton_group_norm(x[1:2], weight, bias, groups, eps, None if residual is None else residual[1:2], relu)[0]
        assert torch.equal(y[1:2], alone) and torch.equal(y, triton_group_norm(*forward)[0])
        first, second = (triton_group_norm_backward(*backward) for _ in range(2))
        assert all(map(torch.equal, first, second))


@inside
def test_what_is_not_a_number_stays_so():
    x, _, weight, bias, _ = maps((2, 64, 3, 5), torch.float32, torch.channels_last)
    x[0, 5, 1, 1] = torch.nan
    for h in (3, 100):
        y = triton_group_norm(x.repeat(1, 1, h // 3, 1), weight, bias, 32, relu=True)[0]
        assert y[0, 4:6].isnan().all() and not y[0, 6:].isnan().any() and not y[1].isnan().any()


@inside
def test_arguments_are_left_alone():
    for forward, backward in cases([((2, 8, 3, 5), 2), ((1, 8, 17, 19), 2)], [torch.bfloat16]):
        kept = [o.clone() for o in (*forward, *backward) if isinstance(o, torch.Tensor)]
        triton_group_norm(*forward)
        triton_group_norm_backward(*backward)
        assert all(map(torch.equal, kept, [o for o in (*forward, *backward) if isinstance(o, torch.Tensor)]))


@inside
@pytest.mark.parametrize('make', [lambda x: x[:, ::2], lambda x: x.transpose(2, 3), lambda x: x[:, :1].expand(2, 8, 4, 6)],
                         ids=['sliced', 'transposed', 'expanded'])
def test_any_strides(make):
    x = make(torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0)))
    weight, bias = torch.ones(1).expand(x.shape[1]), torch.arange(float(2 * x.shape[1]))[::2]
    forward = x, weight, bias, 4, 1e-5, x.flip(0), True
    compare(triton_group_norm(*forward), plain(*forward), 0)
    y, mean, rstd = plain(*forward)
    backward = torch.ones(1, 1, 1, 1).expand_as(x), x, weight, bias, mean, rstd, y, 4, True
    compare(triton_group_norm_backward(*backward), plain_backward(*backward), 0)


@pytest.fixture
def kernels_on_cpu():
    with on_the_cpu(norm_triton._register, _group_norm, _group_norm_backward): yield


@inside
@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('shape', [(2, 8, 4, 6), (1, 8, 17, 19)])
def test_opcheck(shape, layout, kernels_on_cpu):
    x, residual, weight, bias, dy = maps(shape, torch.bfloat16, layout)
    checks = 0
    for r, relu in itertools.product((None, residual), (False, True)):
        leaves = [o.clone().requires_grad_() for o in (x, weight, bias)]
        torch.library.opcheck(_group_norm, (*leaves, 4, 1e-5, r, relu))
        y, mean, rstd = _group_norm(x, weight, bias, 4, 1e-5, r, relu)
        back = dy, x, weight, bias, mean, rstd, y if relu else None, 4, r is not None
        torch.library.opcheck(_group_norm_backward, back)
        checks += 1
    assert checks == 4


@inside
def test_autograd_and_capture(kernels_on_cpu):
    x, residual, weight, bias, dy = maps((2, 16, 7, 5), torch.float32, torch.channels_last)
    f = lambda x, w, b, r: group_norm(x, w, b, 4, residual=r, relu=True)
    oracle = lambda x, w, b, r: (torch.nn.functional.group_norm(x, 4, w, b) + r).relu()
    results = []
    for g in (oracle, f, torch.compile(f, fullgraph=True, backend='aot_eager')):
        leaves = [o.clone().requires_grad_() for o in (x, weight, bias, residual)]
        y = g(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for other in results[1:]:
        for a, o in zip(other, results[0], strict=True): torch.testing.assert_close(a, o, rtol=1e-4, atol=1e-4)


@inside
def test_no_image_and_float64_have_the_plain_body(kernels_on_cpu):
    weight, bias = torch.rand(8), torch.rand(8)
    empty = torch.zeros(0, 8, 3, 3, requires_grad=True)
    y = group_norm(empty, weight, bias, 4, relu=True)
    y.sum().backward()
    assert y.shape == empty.grad.shape == (0, 8, 3, 3)
    x = 1e9 + torch.randn(2, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.group_norm(x, 4, weight.double(), bias.double())
    torch.testing.assert_close(group_norm(x, weight.double(), bias.double(), 4), exact, rtol=1e-5, atol=1e-5)


@outside
def test_in_the_interpreter(): assert run_in_the_interpreter(__file__) >= 20


def test_every_cut_covers_the_map_with_few_programs():
    looked = 0
    for c, groups in ((64, 32), (256, 32), (2048, 32), (48, 24), (6, 2), (6, 1), (512, 1), (96, 96)):
        for pixels, last in itertools.product((1, 2, 49, 196, 257, 1050, 67200, 268800), (False, True)):
            s = split_map(c, pixels, groups, last)
            parts, blocks = -(-pixels // s.pixels), -(-c // s.cols)
            assert s.rows * s.cols <= 8192 and not s.rows & (s.rows - 1) and not s.cols & (s.cols - 1)
            if s.whole: assert parts == 1 and s.rows >= pixels and s.cols % (c // groups) == 0
            else: assert s.pixels % s.rows == 0 and parts * c // groups <= 8192 and parts * blocks <= 512
            looked += 1
    assert looked == 128


wide = dict.fromkeys('weight bias mean rstd moments sums shift scale'.split(), '*fp32')
types = wide | dict.fromkeys('x y dy dx masked residual'.split(), '*bf16') | {'eps': 'fp32'}


@outside
@pytest.mark.parametrize('tile', [dict(ROWS=16, COLS=256, LAST=True), dict(ROWS=512, COLS=8, LAST=False)],
                         ids=['channels_last', 'contiguous'])
def test_a_hopper_chip_reads_16_bytes_at_a_time_and_spills_nothing(tile, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    sums = norm_triton._one_warp(tile | dict(num_warps=4))
    tile, sums = ({k: v for k, v in o.items() if k != 'num_warps'} for o in (tile, sums))
    small, larger = (dict(ROWS=r, COLS=c, LAST=tile['LAST'], SIZE=8) for r, c in ((64, 64), (256, 32)))
    both, neither = dict(ADD=True, RELU=True), dict(ADD=False, RELU=True)
    # name, warps, reads of 16 bytes of a thread, arguments that are constant
    work = [('_moments', 1, 2, sums), ('_normalize', 4, 8, tile | both), ('_normalize', 4, 4, tile | neither | dict(residual=None)),
            ('_sums', 1, 6, sums | both), ('_sums', 1, 4, sums | neither | dict(y=None)),
            ('_input_gradient', 4, 8, tile | dict(RELU=True)), ('_whole', 2, 16, small | both), ('_whole_backward', 2, 24, small | both),
            ('_whole', 8, 8, larger | both), ('_whole_backward', 8, 12, larger | both),
            ('_combine', 8, 0, dict(PARTS=4096)), ('_means', 8, 0, dict(PARTS=4096))]
    looked = 0
    for name, warps, reads, constants in work:
        ptx, uses = compiled(getattr(norm_triton, name), tmp_path, types, constants, ('C', 'HW', 'pixels'), num_warps=warps)
        assert 16 <= uses['REG'] <= (160 if tile['LAST'] and warps > 2 else 255) and uses['STACK'] <= 16 and uses['LOCAL'] == 0, (name, uses)
        accesses = re.findall(r'(?:ld|st)\.global\S*', ptx)
        # 8 values of 2 bytes at a time
        assert accesses.count('ld.global.v4.b32') >= reads and not [o for o in accesses if '16' in o], (name, accesses)
        numbers_alone = name in ('_moments', '_combine', '_means') or name == '_sums' and not constants['ADD']
        if not numbers_alone and 'st.global.v4' in ptx:
            assert 'cvt.rn.bf16' in ptx, name  # rounds to the nearest
            looked += 1
    assert looked >= 5


@gpu
@pytest.mark.parametrize('dtype, unit', [(torch.float32, 0), (torch.float16, 2**-9), (torch.bfloat16, 2**-7)])
def test_on_a_gpu_the_kernels_equal_the_plain_bodies(dtype, unit):
    norm_triton._register('cuda')
    large = [((1, 64, 400, 672), 32), ((2, 256, 200, 336), 32), ((1, 2048, 25, 42), 32),
             ((64, 256, 14, 14), 32), ((256, 256, 7, 7), 32)]
    looked = 0
    for forward, backward in cases(shapes + large, [dtype], 'cuda'):
        torch.cuda.set_sync_debug_mode('error')
        mine = _group_norm(*forward), _group_norm_backward(*backward), _group_norm_backward(*backward)
        torch.cuda.set_sync_debug_mode('default')
        compare(mine[0], plain(*forward), unit)
        compare(mine[1], plain_backward(*backward), unit, flip=2 * backward[0].abs().max() if backward[6] is not None else 0.)
        assert all(map(torch.equal, mine[1], mine[2]))
        looked += 1
    assert looked == 8 * len(shapes + large)


@gpu
@pytest.mark.parametrize('layout', layouts)
def test_on_a_gpu_a_step_is_captured_as_a_cuda_graph(layout):
    norm_triton._register('cuda')
    x, residual, weight, bias, dy = maps((2, 64, 33, 21), torch.bfloat16, layout, device='cuda')
    leaves = [o.requires_grad_() for o in (x, weight, bias, residual)]
    step = lambda: torch.autograd.grad(group_norm(*leaves[:3], residual=leaves[3], relu=True), leaves, dy)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream): expected = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): got = step()
    for o in got: o.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))
