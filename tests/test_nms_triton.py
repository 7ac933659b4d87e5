"The Triton kernel of non-maximum suppression: in Triton's interpreter, compiled for a Hopper chip, and on a GPU where there is one."
import math
import re

import pytest
import torch
import torchvision
from kernels import compiled, gpu, inside, on_the_cpu, outside, run_in_the_interpreter
from scratchdet import nms_triton
from scratchdet.boxes import _nms_keep, nms_keep
from scratchdet.nms_triton import _below, _register_nms, nms_segments, triton_nms_keep

plain = _nms_keep._init_fn
pytestmark = pytest.mark.filterwarnings('ignore:invalid value encountered in divide')  # 0/0 of boxes without area


def crowd(n, p, seed=0, groups=3, whole=True, device='cpu'):
    "Crowded boxes, some without area, equal scores, some slots empty."
    g = torch.Generator().manual_seed(seed)
    side = 4 * math.isqrt(p) + 4
    lo, size = torch.rand(n, p, 2, generator=g) * side, torch.rand(n, p, 2, generator=g) * 14
    if whole: lo, size = lo.floor(), size.floor()
    scores = torch.randint(-3, 8, (n, p), generator=g) / 8.
    out = torch.cat([lo, lo + size], -1), scores, torch.randint(0, groups, (n, p), generator=g), torch.rand(n, p, generator=g) > .2
    return [o.to(device) for o in out]


@inside
@pytest.mark.parametrize('n, p', [(3, 1), (2, 64), (1, 150)])
@pytest.mark.parametrize('whole', [True, False])
def test_equal_to_the_plain_body(n, p, whole):
    "Whole pixels make IoUs that hit the threshold."
    removed = 0
    for seed, thresh in enumerate((0., 1 / 3, .7, 1.)):
        args = crowd(n, p, seed, whole=whole)
        mine, theirs = (f(*args, thresh) for f in (triton_nms_keep, plain))
        assert mine.dtype == torch.bool and torch.equal(mine, theirs), thresh
        removed += (args[3] & ~mine).sum()
    assert removed > 0 or p < 20


@inside
def test_more_than_a_thousand_boxes_of_one_level():
    args = crowd(1, 1100, groups=1)
    keep = triton_nms_keep(*args, .5)
    assert torch.equal(keep, plain(*args, .5)) and 0 < keep.sum() < args[3].sum()


@inside
def test_a_chain_of_boxes_settles_box_by_box():
    "Each overlaps the next one only, so that one decision hangs on all before it."
    x = torch.arange(90.)
    boxes = torch.stack([x, x * 0, x + 2, x * 0 + 1], 1)[None]  # neighbours have an IoU of a third
    args = boxes, -x[None], torch.zeros(1, 90).long(), torch.ones(1, 90, dtype=torch.bool)
    keep = triton_nms_keep(*args, .3)
    assert torch.equal(keep, plain(*args, .3)) and keep[0].nonzero()[:, 0].tolist() == list(range(0, 90, 2))


@inside
def test_many_groups_with_few_boxes():
    args = crowd(2, 200, groups=80)
    args[2] = args[2] * 10**12 - 5 * 10**13  # any numbers
    assert torch.equal(triton_nms_keep(*args, .1), plain(*args, .1))


@inside
def test_boxes_without_area_stay_and_equal_boxes_go():
    boxes = torch.tensor([[[3., 3, 3, 3], [3, 3, 3, 3], [5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 7, 7]]])
    args = boxes, torch.full((1, 5), .4), torch.zeros(1, 5).long(), torch.ones(1, 5, dtype=torch.bool)
    assert triton_nms_keep(*args, .5).tolist() == plain(*args, .5).tolist() == [[True, True, True, False, True]]


@inside
def test_scores_of_any_kind():
    "Minus infinity, both zeros, not a number: the order is that of a stable sort."
    boxes = torch.tensor([0., 0, 4, 4]).repeat(1, 6, 1)
    scores = torch.tensor([[-torch.inf, -0., 0., -torch.inf, -1, -2]])
    args = boxes, scores, torch.tensor([[0, 1, 1, 0, 2, 2]]), torch.ones(1, 6, dtype=torch.bool)
    assert triton_nms_keep(*args, .5).tolist() == plain(*args, .5).tolist() == [[True, True, False, False, True, False]]
    scores[0, 2] = torch.nan
    assert torch.equal(triton_nms_keep(*args, .5), plain(*args, .5))


@inside
def test_arguments_are_left_alone_and_bits_do_not_depend_on_the_batch():
    args = crowd(3, 80)
    kept = [o.clone() for o in args]
    keep = triton_nms_keep(*args, .4)
    assert all(map(torch.equal, kept, args))
    for i in range(3): assert torch.equal(keep[i:i + 1], triton_nms_keep(*(o[i:i + 1] for o in args), .4))


@pytest.fixture
def kernel_on_cpu():
    with on_the_cpu(_register_nms, _nms_keep): yield


@inside
def test_opcheck_and_capture(kernel_on_cpu):
    args = crowd(2, 40)
    torch.library.opcheck(_nms_keep, (*args, .5))
    def step(boxes, scores, groups, valid): return (scores * nms_keep(boxes, scores, groups, valid, .5)).topk(10).values
    assert torch.equal(torch.compile(step, fullgraph=True, backend='eager')(*args), step(*args))
    for n, p in ((2, 0), (0, 3)): assert nms_keep(*(o[:n, :p] for o in args), .5).shape == (n, p)


@outside
def test_in_the_interpreter(): assert run_in_the_interpreter(__file__) >= 13


def test_thresholds_are_those_of_torchvision():
    "Boxes of every ratio up to 40, at thresholds that are the ratio and its neighbours."
    looked = 0
    for d in range(1, 41):
        for k in range(1, d + 1):
            boxes, iou = torch.tensor([[0., 0, d, 1], [0, 0, k, 1]]), torch.tensor(float(k)) / d
            for thresh in (k / d, math.nextafter(k / d, 0), math.nextafter(k / d, 2)):
                gone = len(torchvision.ops.nms(boxes, torch.tensor([.9, .8]), thresh)) == 1
                assert gone == bool(iou > _below(thresh)), (k, d, thresh)
                looked += 1
    assert looked == 2460


def test_segments_cover_the_boxes():
    boxes, scores, groups, valid = crowd(4, 50)
    order, ends = nms_segments(scores, groups, valid)
    for i in range(4):
        seen, at = [], ends[i].nonzero()[:, 0].tolist()
        for first in at:
            slots = order[i, first:ends[i, first]]
            assert len(groups[i, slots].unique()) == 1 and valid[i, slots].all()
            assert (scores[i, slots].diff() <= 0).all()
            seen += slots.tolist()
        assert len(at) == 3 and sorted(seen) == valid[i].nonzero()[:, 0].tolist()


@outside
def test_a_hopper_chip_spills_nothing_and_rounds_as_a_cpu_does(tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    types = dict(boxes='*fp32', ends='*i32', keep='*i8', thresh='fp32')
    ptx, uses = compiled(nms_triton._segments, tmp_path, types, dict(B=64), num_warps=16, enable_fp_fusion=False)
    assert 16 <= uses['REG'] <= 128 and uses['STACK'] <= 16 and uses['LOCAL'] == 0, uses
    assert 'div.rn.f32' in ptx and 'fma' not in ptx and 'div.full' not in ptx
    assert len(re.findall('bar.sync', ptx)) >= 2


@gpu
@pytest.mark.parametrize('n, p, groups', [(1, 8741, 5), (4, 8741, 5), (2, 20000, 80)])
def test_on_a_gpu_equal_to_the_plain_body_without_a_question(n, p, groups):
    args = crowd(n, p, groups=groups, device='cuda')
    triton_nms_keep(*args, .7)
    for thresh in .5, .7:
        torch.cuda.set_sync_debug_mode('error')
        keep = triton_nms_keep(*args, thresh)
        torch.cuda.set_sync_debug_mode('default')
        assert torch.equal(keep.cpu(), plain(*(o.cpu() for o in args), thresh))
