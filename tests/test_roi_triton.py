"The Triton kernels of RoIAlign and mask targets: in Triton's interpreter, compiled for a Hopper chip, and on a GPU where there is one."
import itertools
import re
import subprocess
import sys

import pytest
import torch
from kernels import compiled, gpu, inside, layouts, on_the_cpu, outside, run_in_the_interpreter
from scratchdet import roi_triton
from scratchdet.boxes import _nms_keep
from scratchdet.mask_head import _mask_targets
from scratchdet.masks import pack_masks
from scratchdet.norm import _group_norm, _group_norm_backward
from scratchdet.roi_align import _roi_align, _roi_align_backward, axis_weights, roi_align, roi_levels
from scratchdet.roi_triton import (_register_rois, triton_mask_targets, triton_roi_align, triton_roi_align_backward,
                                   use_triton)

plain, plain_backward = _roi_align._init_fn, _roi_align_backward._init_fn
ops = _group_norm, _group_norm_backward, _nms_keep, _roi_align, _roi_align_backward, _mask_targets
strides = [4, 8, 16, 32]
pytestmark = pytest.mark.filterwarnings('ignore:(invalid value|divide by zero) encountered')  # no points, no size

# one cell; no height; no size; upside down; over all borders; outside; on the border; thin; less than a cell; level by a hair; everything
odd = torch.tensor([[0, 9, 9, 12, 13], [0, 9, 9, 30, 9], [1, 9, 9, 9, 9], [0, 50, 40, 20, 10], [1, -80, -60, 120, 90], [0, 500, 500, 600, 600],
                    [1, -90, -90, -40, -40], [1, 62, 46, 64, 48], [0, 0, 20, 64, 21], [1, .4, .4, .6, .6], [0, 0, 0, 112, 112],
                    [0, 2, 2, 30, 30], [1, -200, -200, 300, 300], [0, -150, -140, 160, 180]])
upright = odd[(odd[:, 3:] >= odd[:, 1:3]).all(1)]


def maps(dtype=torch.float32, layout=torch.channels_last, c=5, size=(48, 64), n=2, levels=4, device='cpu'):
    g = torch.Generator().manual_seed(0)
    shapes = [(n, c, -(-size[0] // s), -(-size[1] // s)) for s in strides[:levels]]
    return [torch.randn(s, generator=g).to(device, dtype).contiguous(memory_format=layout) for s in shapes]


def boxes(k, size, n, device='cpu', seed=1):
    "RoIs of all sizes in an image of `size`."
    g = torch.Generator().manual_seed(seed)
    side = 8 * (max(size) / 8) ** torch.rand(k, 1, generator=g) * torch.tensor([.8, 1.25])
    centre = torch.rand(k, 2, generator=g) * torch.tensor(size[::-1])
    return torch.cat([torch.randint(n, (k, 1), generator=g), centre - side / 2, centre + side / 2], 1).to(device)


def compare(mine, theirs, unit=0.):
    "Equal shapes, dtypes and strides; values to `unit` of themselves and 1e-5 of the largest."
    for a, o in zip(mine, theirs, strict=True):
        assert a.shape == o.shape and a.dtype == o.dtype and a.stride() == o.stride()
        if not o.numel(): continue
        a, o = a.float(), o.float()
        assert ((a - o).abs() <= unit * o.abs() + 1e-5 * o.abs().max().clamp(min=1)).all(), (a - o).abs().max()


def compare_both(features, rois, bins, ratio=0, unit=0.):
    "Forward and backward against the plain bodies; returns what was pooled."
    out = triton_roi_align(features, rois, bins, strides, ratio)
    compare([out], [plain(features, rois, bins, strides, ratio)], unit)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    args = grad, features, rois, strides, ratio
    compare(triton_roi_align_backward(*args), plain_backward(*args), unit)
    return out


@inside
@pytest.mark.parametrize('layout', layouts)
def test_odd_boxes(layout):
    out = compare_both(maps(layout=layout), odd, 2)
    assert len(roi_levels(odd[:, 1:]).unique()) == 4
    assert out.flatten(1).any(1).tolist() == [True, False, False, False, True, False, False, True, True, True, True, True, True, True]


@inside
@pytest.mark.parametrize('dtype, unit', [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_narrow_types_are_rounded_once(dtype, unit):
    "The interpreter cuts to bfloat16 where a GPU rounds: a whole unit. It also multiplies matrices of bfloat16 by their bits: forward alone."
    features, rois = maps(dtype), upright[[0, 4, 8]]
    if dtype == torch.float16: compare_both(features, rois, 3, unit=unit)
    else: compare([triton_roi_align(features, rois, 3, strides)], [plain(features, rois, 3, strides, 0)], unit)


@inside
@pytest.mark.parametrize('bins, ratio', [(1, 1), (3, 2), (7, 0)])
def test_bins_and_points(bins, ratio):
    compare_both(maps(c=2), odd[[0, 7]] if bins == 7 else upright[[0, 2, 7, 9, 11]], bins, ratio)


@inside
@pytest.mark.parametrize('levels', [1, 2, 3])
def test_any_number_of_levels(levels):
    features = maps(levels=levels, c=3)
    out = triton_roi_align(features, odd[[0, 7, 10]], 2, strides[:levels])
    compare([out], [plain(features, odd[[0, 7, 10]], 2, strides[:levels], 0)])
    args = out, features, odd[[0, 7, 10]], strides[:levels], 0
    compare(triton_roi_align_backward(*args), plain_backward(*args))


@inside
def test_many_channels_and_a_list_in_blocks(monkeypatch):
    "More channels than a tile has; RoIs of a tile in several blocks of the search."
    rois = torch.cat([boxes(20, (24, 24), 2), torch.tensor([[1., 2, 3, 9, 11]])])
    monkeypatch.setattr(roi_triton, '_search', 8)
    compare_both(maps(c=3, size=(24, 24)), rois, 1)
    compare_both(maps(c=260, size=(16, 16), n=1), rois[-1:] * torch.tensor([0, 1, 1, 1, 1]), 2)


@inside
def test_any_strides_and_layouts_of_their_own():
    features = [x.transpose(2, 3) for x in maps(torch.float32, torch.contiguous_format, size=(64, 48))]
    features[1] = features[1].contiguous(memory_format=torch.channels_last)
    features[0] = features[0].contiguous()
    compare_both(features, odd[[0, 10]], 2)


@inside
def test_nothing_to_pool_and_images_without_rois():
    features = maps()
    assert triton_roi_align(features, odd[:0], 7, strides).shape == (0, 5, 7, 7)
    out = compare_both(features, odd[[0, 11]], 2)
    assert out.any() and not triton_roi_align_backward(out, features, odd[[0, 11]], strides)[0][1].any()
    assert not any(x.any() for x in triton_roi_align_backward(out[:0], features, odd[:0], strides))


@inside
def test_bits_depend_neither_on_the_batch_nor_on_the_run():
    features, rois = maps(size=(32, 32)), boxes(4, (32, 32), 2)
    out = triton_roi_align(features, rois, 2, strides)
    first, second = (triton_roi_align_backward(out, features, rois, strides) for _ in range(2))
    assert torch.equal(out, triton_roi_align(features, rois, 2, strides)) and all(map(torch.equal, first, second))
    own = rois[:, 0] == 1
    alone = [x[1:] for x in features], rois[own] * torch.tensor([0, 1, 1, 1, 1])
    assert torch.equal(out[own], triton_roi_align(*alone, 2, strides))
    for a, o in zip(first, triton_roi_align_backward(out[own], *alone, strides)): assert torch.equal(a[1:], o)


@inside
def test_arguments_are_left_alone():
    features, rois = maps(torch.bfloat16), odd[[0, 4]].clone()
    kept = [o.clone() for o in (*features, rois)]
    triton_roi_align_backward(triton_roi_align(features, rois, 1, strides), features, rois, strides)
    assert all(map(torch.equal, kept, [*features, rois]))


def discs(n=2, m=3, size=(40, 53)):
    g = torch.Generator().manual_seed(3)
    y, x = torch.arange(size[0])[:, None] + .5, torch.arange(size[1]) + .5
    centre, radius = torch.rand(n, m, 2, 1, 1, generator=g) * 40, 6 + torch.rand(n, m, 1, 1, generator=g) * 14
    return pack_masks((y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2 < radius ** 2)


def shares(masks, rois, matched, size):
    "What `mask_targets` compares with one half."
    from scratchdet.masks import unpack_masks
    box, out = rois[:, 1:] - .5, torch.zeros(len(rois), size, size)
    y0, y1, wy = axis_weights(box[:, 1], box[:, 3], size, masks.shape[2])
    x0, x1, wx = axis_weights(box[:, 0], box[:, 2], size, masks.shape[3] * 8)
    for k in (matched >= 0).nonzero()[:, 0].tolist():
        window = unpack_masks(masks[int(rois[k, 0]), matched[k]], masks.shape[3] * 8)[y0[k]:y1[k], x0[k]:x1[k]].float()
        out[k] = wy[k, :, :y1[k] - y0[k]] @ window @ wx[k, :, :x1[k] - x0[k]].T
    return out


@inside
def test_mask_targets(size=14):
    "Equal, but where the share of the mask is one half to the last digits."
    masks, rois = discs(), torch.cat([odd[[0, 1, 3, 5, 7, 9, 8]], boxes(4, (30, 30), 2)])
    matched = torch.arange(len(rois)) % 4 - 1
    mine, theirs = (f(masks, rois, matched, size) for f in (triton_mask_targets, _mask_targets))
    far = (shares(masks, rois, matched, size) - .5).abs() > 1e-4
    assert mine.dtype == torch.float32 and far.float().mean() > .98 and torch.equal(mine[far], theirs[far])
    assert 0 < mine.sum() < mine.numel() and not mine[matched < 0].any()


@pytest.fixture
def kernels_on_cpu():
    with on_the_cpu(_register_rois, _roi_align, _roi_align_backward, _mask_targets): yield


@inside
def test_opcheck(kernels_on_cpu):
    features = [x.requires_grad_() for x in maps(torch.bfloat16, c=2, size=(16, 16), n=1)]
    rois = torch.tensor([[0., 3, 2, 12, 9]])
    torch.library.opcheck(_roi_align, (features, rois, 2, strides, 0))
    torch.library.opcheck(_mask_targets, (discs(1), rois, torch.tensor([1]), 7))


@inside
def test_autograd_capture_and_plain_bodies(kernels_on_cpu):
    "Kernels are captured as one graph; float64 and batches without images keep the plain bodies."
    results = []
    for pool in (roi_align, torch.compile(roi_align, fullgraph=True, backend='aot_eager')):
        leaves = [x.requires_grad_() for x in maps()]
        out = pool(leaves, odd[[0, 8]], 2)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    compare(*results)
    assert results[0][1].abs().sum() > 0
    wide = [x.double() for x in maps()]
    compare([roi_align(wide, odd[[0, 8]].double(), 2)], [plain(wide, odd[[0, 8]].double(), 2, strides, 0)])
    assert roi_align([x[:0] for x in maps()], odd[:0], 2).shape == (0, 5, 2, 2)


@outside
def test_in_the_interpreter(): assert run_in_the_interpreter(__file__) >= 17


@outside
def test_without_triton_nothing_changes():
    code = ('import sys; sys.modules["triton"] = None; import torch; from scratchdet import boxes, norm, roi_align, roi_triton; '
            'assert roi_triton.use_triton() is False; '
            'assert not any("cuda" in o._backend_fns for o in (norm._group_norm, boxes._nms_keep, roi_align._roi_align)); '
            'print(norm.group_norm(torch.ones(1, 64, 3, 3), torch.ones(64), torch.ones(64)).mean().item())')
    run = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True)
    assert run.stdout == '1.0\n', run.stderr


@outside
def test_one_switch_for_all_kernels(monkeypatch):
    "Twice is once, and a CPU keeps its bodies."
    monkeypatch.setattr(roi_triton, '_can_build', lambda: True)
    assert use_triton() and use_triton()
    assert len(ops) == 6 and all('cuda' in o._backend_fns for o in ops)
    assert torch.isfinite(roi_align(maps(), odd, 7)).all()


@outside
def test_without_a_compiler_or_headers_the_plain_bodies_stay(monkeypatch, tmp_path):
    (tmp_path/'Python.h').touch()
    monkeypatch.setattr(roi_triton, 'get_paths', lambda: dict(include=str(tmp_path)))
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert not use_triton()
    (tmp_path/'clang').touch(0o755)
    assert use_triton()
    (tmp_path/'Python.h').unlink()
    assert not use_triton()


four = lambda o: (o,) * 4
types = dict(maps=four('*bf16'), grads=four('*bf16'), heights=four('i32'), widths=four('i32'), strides=four('fp32'),
             firsts=four('i32'), begins='*i32', order='*i64', rois='*fp32', out='*bf16', dy='*bf16')


@outside
@pytest.mark.parametrize('name, warps, constants', [('_pool', 1, dict(CELLS=8, COLS=256)),
                                                    ('_spread', 4, dict(SIDE=4, BINS=16, COLS=256, BLOCK=128))])
@pytest.mark.parametrize('last', [True, False])
def test_a_hopper_chip_reads_16_bytes_at_a_time_and_spills_nothing(name, warps, constants, last, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    ptx, uses = compiled(getattr(roi_triton, name), tmp_path, types, dict(LAST=last, **constants), ('C',), num_warps=warps)
    assert 16 <= uses['REG'] <= (128 if last else 255) and uses['STACK'] == uses['LOCAL'] == 0, uses
    assert not re.findall(r'atom\.global|red\.global', ptx)
    if last: assert re.findall(r'ld\.global\.v4', ptx) and ('mma' in ptx) == (name == '_spread')


@outside
def test_ones_are_constants_to_the_compiler(tmp_path, monkeypatch):
    "A map of one row, one channel, one bin, one RoI: Triton compiles numbers that are 1 as constants."
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    ones = dict(C=1, bins=1, ratio=1, LAST=True)
    for name, constants in (('_pool', dict(CELLS=8, COLS=1)), ('_spread', dict(SIDE=4, BINS=16, COLS=16, BLOCK=128))):
        _, uses = compiled(getattr(roi_triton, name), tmp_path, types, ones | constants, num_warps=1)
        assert uses['LOCAL'] == 0
    mask = dict(masks='*u8', rois='*fp32', matched='*i64', out='*fp32')
    for constants in (dict(BINS=32), dict(BINS=32, M=1, width=1)):
        _, uses = compiled(roi_triton._mask_rows, tmp_path, mask, constants, num_warps=1)
        assert 16 <= uses['REG'] <= 128 and uses['LOCAL'] == 0


@gpu
@pytest.mark.parametrize('dtype, unit', [(torch.float32, 0), (torch.float16, 2**-9), (torch.bfloat16, 2**-7)])
def test_on_a_gpu_equal_to_the_plain_bodies_without_a_question(dtype, unit):
    size, looked = (800, 1216), 0
    for layout, (k, bins) in itertools.product(layouts, ((512, 7), (128, 14))):
        features, rois = maps(dtype, layout, 256, size, device='cuda'), boxes(2 * k, size, 2, 'cuda')
        rois = torch.cat([rois, upright.cuda()])
        out, grad = triton_roi_align(features, rois, bins, strides), None
        torch.cuda.set_sync_debug_mode('error')
        again = triton_roi_align(features, rois, bins, strides)
        grad = triton_roi_align_backward(out, features, rois, strides), triton_roi_align_backward(out, features, rois, strides)
        torch.cuda.set_sync_debug_mode('default')
        assert torch.equal(again, out) and all(map(torch.equal, *grad))
        compare([out], [plain(features, rois, bins, strides, 0)], unit)
        compare(grad[0], plain_backward(out, features, rois, strides, 0), unit)
        looked += 1
    assert looked == 4


@gpu
def test_on_a_gpu_mask_targets_equal_the_plain_body():
    masks, rois = discs(2, 9, (800, 1216)), boxes(200, (60, 60), 2)
    matched = torch.randint(-1, 9, (200,))
    far = (shares(masks, rois, matched, 28) - .5).abs() > 1e-4
    args = masks.cuda(), rois.cuda(), matched.cuda(), 28
    triton_mask_targets(*args)
    torch.cuda.set_sync_debug_mode('error')
    mine = triton_mask_targets(*args)
    torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(mine.cpu()[far], _mask_targets(masks, rois, matched, 28)[far])
