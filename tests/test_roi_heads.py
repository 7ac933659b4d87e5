"RoIAlign and the box head: reference numbers, loops in plain Python, odd RoIs, precision, layouts, capture."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import shared
from torch.testing import assert_close

from scratchdet.box_head import BoxHead, box_detections, box_losses, sample_rois
from scratchdet.boxes import boxes_to_deltas, clip_boxes, deltas_to_boxes
from scratchdet.matcher import image_keys
from scratchdet.roi_align import _roi_align, _roi_align_backward, axis_weights, boxes_to_rois, roi_align, roi_levels
from scratchdet.rpn import Proposals

EVERYTHING = dict(batch_size_per_image=10**9, positive_fraction=1.)
STRIDES = [4, 8, 16, 32]
STD = (.1, .1, .2, .2)


@pytest.fixture(autouse=True)
def one_seed(): torch.manual_seed(0)


# --- against mmdetection, each stage from the stored inputs of that stage ---------------------------------------------

class Stored:
    "One file: training proposals and objects as a batch."
    def __init__(self, path):
        self.name, self.arrays = path.name, dict(np.load(path))
        self.has_masks = 'train.mask_targets' in self.arrays
        self.n = int(self.arrays['input.shape'][0])
        self.sizes = torch.tensor([self.arrays[f'image{i}'].shape[:2] for i in range(self.n)])
        stored = [self[f'train.proposals{i}'] for i in range(self.n)]
        boxes, scores, valid = self.padded([o[:, :4] for o in stored]), self.padded([o[:, 4] for o in stored]), \
            self.padded([torch.ones(len(o), dtype=torch.bool) for o in stored])
        self.proposals = Proposals(boxes, scores, valid)
        objects = [self[f'gt_boxes{i}'] for i in range(self.n)]
        self.boxes, self.labels = self.padded(objects), self.padded([self[f'gt_labels{i}'] for i in range(self.n)])
        self.valid = self.padded([torch.ones(len(o), dtype=torch.bool) for o in objects])
        self.keys = image_keys(0, 0, torch.arange(self.n))

    def __getitem__(self, key): return torch.from_numpy(np.asarray(self.arrays[key]))

    def __contains__(self, key): return key in self.arrays

    @staticmethod
    def padded(rows):
        "Tensors of different lengths in one, zeros behind; at least one slot."
        out = rows[0].new_zeros(len(rows), max(1, *map(len, rows)), *rows[0].shape[1:])
        for o, r in zip(out, rows): o[:len(r)] = r
        return out

    def rois(self, **kwargs):
        "All RoIs as the second stage of this model sees them."
        low = .5 if self.has_masks else None
        kwargs = {**dict(num_classes=80, low_quality=low), **EVERYTHING, **kwargs}
        return sample_rois(self.proposals, self.boxes, self.labels, self.valid, self.keys, **kwargs)

    def deltas(self, rois):
        "Box targets of all slots."
        at = rois.matched_idxs.clamp(min=0)[..., None].expand(-1, -1, 4)
        return boxes_to_deltas(self.boxes.gather(1, at), rois.boxes, STD)


@pytest.fixture(scope='session')
def stored():
    "Every file that holds a training step."
    folder = shared('SCRATCHDET_REFERENCE', '../shared/reference')
    files = [o for o in sorted(folder.rglob('*.npz')) if 'train.roi_labels' in np.load(o).files]
    assert files, f'no training step in {folder}'
    return [Stored(o) for o in files]


def in_order(rows, *others):
    "Rows of numbers sorted as words are, and other columns in the same order."
    order = np.lexsort(rows.numpy().T[::-1])
    return [o[torch.from_numpy(order.copy())] for o in (rows, *others)]


def test_levels_of_the_reference(stored):
    for case in stored: assert torch.equal(roi_levels(case['rois'][:, 1:]), case['roi_level']), case.name


def test_rois_and_their_objects_are_the_reference(stored):
    for case in stored:
        rois = case.rois()
        for i in range(case.n):
            count = int(case[f'train.roi_num_pos{i}'])
            want = case[f'train.roi_priors{i}']
            positive, negative = rois.positive[i], rois.used[i] & ~rois.positive[i]
            assert (positive.sum(), negative.sum()) == (count, len(want) - count), case.name
            boxes, owners = in_order(rois.boxes[i][positive], rois.matched_idxs[i][positive])
            expected, theirs = in_order(want[:count], case[f'train.roi_pos_gt{i}'])
            assert_close(boxes, expected, atol=1e-5, rtol=0)
            assert torch.equal(owners, theirs), case.name
            assert_close(in_order(rois.boxes[i][negative])[0], in_order(want[count:])[0], atol=1e-5, rtol=0)


def test_labels_and_targets_are_the_reference(stored):
    for case in stored:
        rois, start, first = case.rois(), 0, 0
        deltas = case.deltas(rois)
        for i in range(case.n):
            count, size = int(case[f'train.roi_num_pos{i}']), len(case[f'train.roi_priors{i}'])
            labels, targets = case['train.roi_labels'][start:start + size], case['train.roi_targets_pos'][first:first + count]
            expected = in_order(case[f'train.roi_priors{i}'][:count], labels[:count], targets)
            at = rois.positive[i]
            ours = in_order(rois.boxes[i][at], rois.labels[i][at], deltas[i][at])
            assert torch.equal(ours[1], expected[1]), case.name
            assert_close(ours[2], expected[2], atol=1e-5, rtol=1e-5)
            assert (labels[count:] == 80).all() and (rois.labels[i][~at] == 80).all()
            start, first = start + size, first + count
        assert start == len(case['train.roi_labels']) and first == len(case['train.roi_targets_pos'])


def test_losses_of_zero_logits_follow_from_the_reference(stored):
    for case in stored:
        rois = case.rois()
        slots = rois.labels.numel()
        sums, count = box_losses(torch.zeros(slots, 81), torch.zeros(slots, 320), rois, case.boxes)
        assert count == len(case['train.roi_labels']), case.name
        assert_close(sums['loss_cls'], count * torch.tensor(81.).log())
        assert_close(sums['loss_box_reg'], case['train.roi_targets_pos'].abs().sum())


def test_the_sampler_keeps_its_quota_of_the_reference(stored):
    for case in stored:
        every, drawn = case.rois(), case.rois(batch_size_per_image=64, positive_fraction=.25)
        assert torch.equal(drawn.positive.sum(1), every.positive.sum(1).clamp(max=16)) and drawn.used.all(), case.name
        assert torch.equal(drawn.positive, torch.arange(64) < drawn.positive.sum(1, keepdim=True))
        again = case.rois(batch_size_per_image=64, positive_fraction=.25)
        assert all(torch.equal(a, b) for a, b in zip(drawn, again))


# --- RoIAlign ---------------------------------------------------------------------------------------------------------

def bilinear(f, y, x):
    "Value of the map f (C, h, w) at a point, by the rules of the paper's kernels."
    h, w = f.shape[1:]
    if y < -1 or y > h or x < -1 or x > w: return torch.zeros(f.shape[0], dtype=f.dtype)
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    a, b = y - top, x - left
    return (f[:, top, left] * (1 - a) * (1 - b) + f[:, top, right] * (1 - a) * b
            + f[:, bottom, left] * a * (1 - b) + f[:, bottom, right] * a * b)


def by_loops(features, rois, resolution, sampling_ratio):
    "RoIAlign, one point at a time."
    out = torch.zeros(len(rois), features[0].shape[1], resolution, resolution, dtype=features[0].dtype)
    for k, (n, x0, y0, x1, y1) in enumerate(rois.tolist()):
        side = math.sqrt(max((x1 - x0) * (y1 - y0), 0))
        level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), len(features) - 1)
        f, s = features[level][int(n)], STRIDES[level]
        left, top, dx, dy = x0 / s - .5, y0 / s - .5, (x1 - x0) / s / resolution, (y1 - y0) / s / resolution
        gx, gy = (sampling_ratio or math.ceil(d) for d in (dx, dy))
        points = [(v, u) for v in range(gy) for u in range(gx)]
        for i in range(resolution):
            for j in range(resolution):
                read = [bilinear(f, top + (i + (v + .5) / gy) * dy, left + (j + (u + .5) / gx) * dx) for v, u in points]
                if read: out[k, :, i, j] = torch.stack(read).mean(0)
    return out


def maps(n=2, c=6, h=96, w=128, dtype=torch.float64, **kwargs):
    return [torch.randn(n, c, -(-h // s), -(-w // s), dtype=dtype, **kwargs) for s in STRIDES]


ODD = torch.tensor([[0, 9, 9, 9, 40], [1, 9, 9, 9, 9], [0, 50, 40, 20, 10], [1, -80, -60, 300, 280], [0, 500, 500, 600, 600],
                    [1, -300, -300, -200, -200], [0, 0, 0, 128, 96], [1, 126, 94, 128, 96], [0, 0, 30, 128, 31],
                    [1, .4, .4, .6, .6], [0, 0, 0, 113, 113], [1, -200, -200, 300, 300]], dtype=torch.float64)


def usual(k=12, h=96, w=128):
    "RoIs of all sizes, most of them inside."
    side, centre = 6 * 40 ** torch.rand(k, 1) * torch.tensor([.8, 1.3]), torch.rand(k, 2) * torch.tensor([w, h])
    return torch.cat([torch.randint(2, (k, 1)), centre - side / 2, centre + side / 2], 1).double()


@pytest.mark.parametrize('resolution,sampling_ratio', [(7, 0), (14, 0), (7, 2), (3, 1)])
def test_roi_align_equals_a_loop_over_points(resolution, sampling_ratio):
    features, rois = maps(c=2), torch.cat([ODD, usual()])
    upright = rois[:, 3:] >= rois[:, 1:3]
    if sampling_ratio: rois = rois[upright.all(1)]
    want = by_loops(features, rois, resolution, sampling_ratio)
    assert_close(roi_align(features, rois, resolution, STRIDES, sampling_ratio), want)


@pytest.mark.parametrize('resolution,sampling_ratio', [(7, 0), (14, 2)])
def test_roi_align_equals_torchvision_forward_and_backward(resolution, sampling_ratio):
    features, rois = maps(), torch.cat([ODD, usual(40)])
    levels = roi_levels(rois[:, 1:])
    assert len(levels.unique()) == 4
    ours, theirs = ([x.clone().requires_grad_() for x in features] for _ in range(2))
    out = roi_align(ours, rois, resolution, sampling_ratio=sampling_ratio)
    want = torch.zeros_like(out)
    for level, (x, s) in enumerate(zip(theirs, STRIDES)):
        at = (levels == level).nonzero()[:, 0]
        want = want.index_copy(0, at, torchvision.ops.roi_align(x, rois[at], resolution, 1 / s, sampling_ratio, True))
    assert_close(out, want)
    g = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, ours, g), torch.autograd.grad(want, theirs, g))


def test_both_bodies_of_the_operator_agree():
    features, rois = maps(), torch.cat([ODD, usual(20)])
    plain, fast = (f(features, rois, 7, STRIDES, 0) for f in (_roi_align._init_fn, _roi_align))
    assert_close(plain, fast)
    assert_close(*(f(plain, features, rois, STRIDES, 0) for f in (_roi_align_backward._init_fn, _roi_align_backward)))


def test_gradcheck():
    features = maps(n=1, c=2, h=32, w=32, requires_grad=True)
    boxes = [[3, 5, 20, 17], [0, 0, 150, 150], [0, 0, 250, 250], [9, 9, 9, 30], [0, 0, 500, 600]]
    rois = boxes_to_rois(torch.tensor([boxes]).double())
    for sampling_ratio in (0, 2):
        assert torch.autograd.gradcheck(lambda *x: roi_align(x, rois, 2, sampling_ratio=sampling_ratio), features)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_opcheck(layout, dtype):
    features = [x.to(dtype).contiguous(memory_format=layout).requires_grad_() for x in maps(c=4)]
    torch.library.opcheck(_roi_align, (features, usual(6).float(), 7, STRIDES, 0))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_layout_and_precision_are_the_maps(layout):
    features, rois = [x.float().contiguous(memory_format=layout) for x in maps()], usual(20).float()
    want = roi_align(features, rois, 7)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 3e-2)):
        x = [o.to(dtype).requires_grad_() for o in features]
        out = roi_align(x, rois, 7)
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
        assert_close(out.float(), want, atol=tolerance, rtol=tolerance)
        for a, b in zip(torch.autograd.grad(out.sum(), x), x): assert a.dtype == dtype and a.stride() == b.stride()


def test_autocast_does_not_lower_the_precision_of_maps():
    features, rois = [x.float() for x in maps()], usual(20).float()
    with torch.autocast('cpu', torch.bfloat16): out = roi_align(features, rois, 7)
    assert torch.equal(out, roi_align(features, rois, 7))


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_one_graph(backend):
    features = maps(requires_grad=True)
    boxes = usual(8)[:, 1:].view(2, 4, 4)
    def pool(features, boxes): return roi_align(features, boxes_to_rois(boxes), 7)
    out, want = (f(features, boxes) for f in (torch.compile(pool, fullgraph=True, backend=backend), pool))
    assert torch.equal(out, want)
    assert_close(torch.autograd.grad(out.sum(), features), torch.autograd.grad(want.sum(), features))


def test_no_rois_and_images_without_rois():
    features = maps(requires_grad=True)
    for rois in (torch.zeros(0, 5).double(), torch.tensor([[1, 4, 4, 40, 40.]]).double()):
        out = roi_align(features, rois, 7)
        assert out.shape == (len(rois), 6, 7, 7)
        grads = torch.autograd.grad(out.sum(), features)
        assert all(g.shape == x.shape and g[0].abs().sum() == 0 for g, x in zip(grads, features))


def test_boxes_that_are_upside_down_read_nothing():
    boxes = torch.tensor([[40, 9, 9, 40], [9, 40, 40, 9], [40, 40, 9, 9], [9, 9, 9, 9]]).double()
    assert roi_levels(boxes).unique().tolist() == [0]
    assert not roi_align(maps(), F.pad(boxes, (1, 0)), 7).any()


def test_a_constant_map_stays_constant_inside():
    features, rois = [torch.ones_like(x) for x in maps()], usual(30)
    rois[:, 1::2], rois[:, 2::2] = rois[:, 1::2].clamp(0, 128), rois[:, 2::2].clamp(0, 96)
    assert_close(roi_align(features, rois, 7), torch.ones(30, 6, 7, 7).double())


def test_axis_weights_are_the_windows_of_whole_rows():
    lo = torch.tensor([-3.2, 0, 4.25, 17.5, 30.]).double()
    hi = lo + torch.tensor([9.7, 20, .3, 6, 2.]).double()
    first, end, weights = axis_weights(lo, hi, 5, 20)
    f = torch.randn(20).double()
    for k in range(5):
        g = max(math.ceil((hi[k] - lo[k]) / 5), 1)
        at = lo[k] + (torch.arange(5 * g).double() + .5) * (hi[k] - lo[k]) / (5 * g)
        read = [bilinear(f.view(1, 20, 1), p, 0)[0] for p in at.tolist()]
        assert_close(weights[k, :, :end[k] - first[k]] @ f[first[k]:end[k]], torch.stack(read).view(5, g).mean(1))


# --- box head ---------------------------------------------------------------------------------------------------------

def by_classes(scores, boxes, valid, score_thresh, max_dets):
    "mmdetection's `multiclass_nms` for one image, with torchvision's NMS class by class; boxes (P, K, 4)."
    rows = []
    for c in range(scores.shape[1]):
        at = ((scores[:, c] > score_thresh) & valid).nonzero()[:, 0]
        at = at[torchvision.ops.nms(boxes[at, c], scores[at, c], .5)]
        rows.append((scores[at, c], torch.full_like(at, c), boxes[at, c]))
    s, c, b = (torch.cat(o) for o in zip(*rows))
    order = s.argsort(descending=True)[:max_dets]
    return s[order], c[order], b[order]


@pytest.mark.parametrize('score_thresh', [.05, 0.])
@pytest.mark.parametrize('p,k,max_dets', [(300, 20, 100), (1000, 80, 100), (3, 2, 100), (50, 1, 7)])
def test_detections_equal_nms_class_by_class(score_thresh, p, k, max_dets):
    rois, sizes = usual(2 * p), torch.tensor([[96, 128], [80, 100]])
    rois = clip_boxes(rois[:, 1:].view(2, p, 4), sizes).float()
    proposals = Proposals(rois, torch.rand(2, p), torch.rand(2, p) < .9)
    logits, deltas = torch.randn(2, p, k + 1) * 2, torch.randn(2, p, 4 * k)
    found = box_detections(logits, deltas, proposals, sizes, score_thresh=score_thresh, max_dets=max_dets)
    assert found.boxes.shape == (2, max_dets, 4) and found.valid.any(1).all()
    for i in range(2):
        boxes = deltas_to_boxes(deltas[i].view(p, k, 4), rois[i][:, None], STD)
        boxes = clip_boxes(boxes.flatten(0, 1), sizes[i]).view(p, k, 4)
        want = by_classes(logits[i].softmax(-1)[:, :k], boxes, proposals.valid[i], score_thresh, max_dets)
        at = found.valid[i]
        assert at.sum() == len(want[0]) and at[:len(want[0])].all()
        for a, b in zip((found.scores, found.labels, found.boxes), want): assert_close(a[i][at], b)


def test_an_image_is_detected_as_if_alone():
    p, k, sizes = 60, 4, torch.tensor([[96, 128], [80, 100]])
    proposals = Proposals(usual(2 * p)[:, 1:].view(2, p, 4).float(), torch.rand(2, p), torch.rand(2, p) < .8)
    logits, deltas = torch.randn(2, p, k + 1), torch.randn(2, p, 4 * k)
    both = box_detections(logits, deltas, proposals, sizes)
    for i in range(2):
        alone = box_detections(logits[i:i+1], deltas[i:i+1], Proposals(*(o[i:i+1] for o in proposals)), sizes[i:i+1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, both))


def random_step(n=2, m=3, p=30, k=5, objects=True):
    "Proposals, objects and head outputs of a step."
    proposals = Proposals(usual(n * p)[:, 1:].view(n, p, 4).float(), torch.rand(n, p), torch.rand(n, p) < .8)
    boxes = proposals.boxes[:, :m].clone() + 2
    valid = torch.rand(n, m).argsort(1) < 2 if objects else torch.zeros(n, m, dtype=torch.bool)
    return proposals, boxes, torch.randint(k, (n, m)), valid, image_keys(1, 2, torch.arange(n))


def test_step_of_images_without_objects_is_finite():
    rois = sample_rois(*random_step(objects=False), num_classes=5, batch_size_per_image=16)
    logits, deltas = (torch.randn(32, c, requires_grad=True) for c in (6, 20))
    sums, count = box_losses(logits, deltas, rois, torch.zeros(2, 3, 4))
    assert not rois.positive.any() and count == 32 and sums['loss_box_reg'] == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(sums.values()), (logits, deltas)))


def test_padding_of_objects_changes_nothing():
    proposals, boxes, labels, valid, keys = random_step()
    valid = torch.tensor([[True, True, False], [True, True, False]])
    short = sample_rois(proposals, boxes[:, :2], labels[:, :2], valid[:, :2], keys, num_classes=5, **EVERYTHING)
    boxes[:, 2], labels[:, 2] = torch.tensor([0., 0, 128, 96]), 4
    padded = sample_rois(proposals, boxes, labels, valid, keys, num_classes=5, **EVERYTHING)
    for i in range(2):
        a, b = (in_order(r.boxes[i][r.used[i]], r.labels[i][r.used[i]]) for r in (short, padded))
        assert all(torch.equal(*o) for o in zip(a, b))


def test_losses_are_float32_from_bfloat16_and_exact_in_float64():
    step = random_step()
    rois = sample_rois(*step, num_classes=5, batch_size_per_image=16)
    logits, deltas = torch.randn(32, 6).double(), torch.randn(32, 20).double()
    exact, _ = box_losses(logits, deltas, rois, step[1])
    for dtype, result, tolerance in ((torch.bfloat16, torch.float32, 2e-2), (torch.float32, torch.float32, 1e-5)):
        sums, _ = box_losses(logits.to(dtype), deltas.to(dtype), rois, step[1])
        for k, v in sums.items():
            assert v.dtype == result
            assert_close(v.double(), exact[k], rtol=tolerance, atol=tolerance)
    assert torch.autograd.gradcheck(lambda a, b: tuple(box_losses(a, b, rois, step[1])[0].values()),
                                    (logits.requires_grad_(), deltas.requires_grad_()))


def test_head_of_any_size():
    for convs, fc, resolution in ((0, 16, 7), (2, 8, 5)):
        head = BoxHead(64, 3, convs=convs, conv_channels=64, fc=fc, resolution=resolution)
        logits, deltas = head(torch.randn(2, 64, resolution, resolution))
        assert len(head.convs) == convs and logits.shape == (2, 4) and deltas.shape == (2, 12)
