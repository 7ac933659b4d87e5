"The mask head: own masks against the convolution, targets against the reference, the loss, pasting against `grid_sample`, memory, capture."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import shared
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scratchdet.mask_head import MaskHead, _mask_targets, _own_masks, mask_loss, mask_targets, paste_masks
from scratchdet.masks import pack_masks, unpack_masks


@pytest.fixture(autouse=True)
def one_seed(): torch.manual_seed(0)


# --- against mmdetection ----------------------------------------------------------------------------------------------

def stored_masks(arrays):
    "Masks of a file's objects, padded to the batch and packed: (N, M, H, W / 8)."
    n, _, height, width = arrays['input.shape']
    m = max(1, *(len(arrays[f'gt_boxes{i}']) for i in range(n)))
    masks = torch.zeros(n, m, height, width, dtype=torch.bool)
    for i in range(n):
        h, w = arrays[f'image{i}'].shape[:2]
        for j, bits in enumerate(arrays[f'gt_masks{i}'][:len(arrays[f'gt_boxes{i}'])]):
            masks[i, j, :h, :w] = torch.from_numpy(np.unpackbits(bits)[:h * w].reshape(h, w)).bool()
    return pack_masks(masks)


@pytest.fixture(scope='session')
def stored():
    "Arrays of every file with mask targets."
    folder = shared('SCRATCHDET_REFERENCE', '../shared/reference')
    files = [o for o in sorted(folder.rglob('*.npz')) if 'train.mask_targets' in np.load(o).files]
    assert files, f'no mask targets in {folder}'
    return {o.name: dict(np.load(o)) for o in files}


def test_targets_are_the_reference(stored):
    for name, arrays in stored.items():
        n = arrays['input.shape'][0]
        counts = [int(arrays[f'train.roi_num_pos{i}']) for i in range(n)]
        boxes = np.concatenate([arrays[f'train.roi_priors{i}'][:c] for i, c in enumerate(counts)])
        rois = torch.from_numpy(np.c_[np.repeat(np.arange(n), counts), boxes]).float()
        matched = torch.from_numpy(np.concatenate([arrays[f'train.roi_pos_gt{i}'] for i in range(n)]))
        want = torch.from_numpy(np.unpackbits(arrays['train.mask_targets'], axis=1)).view(-1, 28, 28).float()
        assert len(want) == sum(counts) > 0
        assert torch.equal(mask_targets(stored_masks(arrays), rois, matched), want), name


def test_masks_of_the_reference_survive_the_small_picture(stored):
    for arrays in stored.values():
        masks = stored_masks(arrays)
        boxes = torch.from_numpy(arrays['gt_boxes0'])
        rois, index = F.pad(boxes, (1, 0)), torch.arange(len(boxes))
        height, width = masks.shape[2], masks.shape[3] * 8
        pasted = paste_masks(mask_targets(masks, rois, index), boxes, height, width)
        truth = unpack_masks(masks[0, :len(boxes)], width)
        iou = (pasted & truth).sum((1, 2)) / (pasted | truth).sum((1, 2))
        assert (iou[truth.sum((1, 2)) > 100] > .7).all()


# --- targets ----------------------------------------------------------------------------------------------------------

def blobs(n=2, m=3, height=60, width=88):
    "Random smooth masks."
    noise = F.interpolate(torch.randn(n * m, 1, 8, 11), (height, width), mode='bicubic')
    return (noise > 0).view(n, m, height, width)


def some_rois(k, n=2, height=60, width=88):
    side, centre = 2 + 60 * torch.rand(k, 2) ** 2, torch.rand(k, 2) * torch.tensor([width, height])
    return torch.cat([torch.randint(n, (k, 1)), centre - side / 2, centre + side / 2], 1)


@pytest.mark.parametrize('size', [28, 14])
def test_targets_equal_torchvision_on_unpacked_masks(size):
    masks, rois, matched = blobs(), some_rois(60), torch.randint(3, (60,))
    own = masks[rois[:, 0].long(), matched][:, None].float()
    alone = torch.cat([torch.arange(60.)[:, None], rois[:, 1:]], 1)
    cover = torchvision.ops.roi_align(own, alone, size, 1., 0, True)[:, 0]
    ours, clear = mask_targets(pack_masks(masks), rois, matched, size), (cover - .5).abs() > 1e-5
    assert torch.equal(ours[clear], (cover >= .5).float()[clear]) and clear.float().mean() > .98
    assert 0 < ours.mean() < 1


def test_a_width_that_is_no_multiple_of_eight():
    masks = torch.ones(1, 1, 20, 21, dtype=torch.bool)
    assert mask_targets(pack_masks(masks), torch.tensor([[0., 1, 1, 20, 19]]), torch.tensor([0])).all()


def test_rois_without_objects_or_pixels_give_zeros():
    masks = pack_masks(torch.ones(1, 1, 16, 16, dtype=torch.bool))
    boxes = [[2, 2, 9, 9], [2, 2, 9, 9], [5, 5, 5, 9], [9, 9, 5, 5], [50, 50, 60, 60], [2, 2, 9, 9]]
    rois = F.pad(torch.tensor(boxes).float(), (1, 0))
    targets = mask_targets(masks, rois, torch.tensor([-2, -1, 0, 0, 0, 0]))
    assert targets.flatten(1).any(1).tolist() == [False] * 5 + [True]
    for k in (0, 2): assert mask_targets(masks, rois[:k], torch.full((k,), -1)).shape == (k, 28, 28)


def test_targets_as_an_operator():
    masks, rois, matched = pack_masks(blobs()), some_rois(5), torch.tensor([0, 1, 2, -1, -2])
    torch.library.opcheck(_mask_targets, (masks, rois, matched, 28))
    with torch.autocast('cpu', torch.bfloat16): low = mask_targets(masks, rois, matched)
    assert torch.equal(low, mask_targets(masks, rois, matched))


def test_only_the_window_is_unpacked(monkeypatch):
    import scratchdet.mask_head as module
    sizes, unpack = [], module.unpack_masks
    monkeypatch.setattr(module, 'unpack_masks', lambda packed, width: sizes.append(packed.shape) or unpack(packed, width))
    mask_targets(torch.zeros(1, 1, 800, 134, dtype=torch.uint8), torch.tensor([[0., 400, 300, 440, 350]]), torch.tensor([0]))
    assert sizes and all(h <= 53 and w <= 7 for h, w in sizes)


# --- head -------------------------------------------------------------------------------------------------------------

LAYOUTS = torch.contiguous_format, torch.channels_last
LABELS = torch.tensor([3, 0, 4, 3, 2, 5, 5])  # K is 5: the last two are background; nobody has class 1


def dense(head, feats, labels):
    "The masks of all classes by the convolution, then each RoI's own."
    every = head.logits(head.upsample(head.convs(feats)).relu())
    return every[torch.arange(len(feats)), labels.clamp(max=every.shape[1] - 1)]


def small_head(layout, dtype=torch.float32):
    return MaskHead(16, 5, convs=1, conv_channels=32, groups=4).to(dtype, memory_format=layout)


def values_and_gradients(run, head, feats, labels, upstream):
    "Values, then gradients of the features and of every parameter."
    feats = feats.detach().requires_grad_()
    out = run(head, feats, labels)
    return out, *torch.autograd.grad(out, [feats, *head.parameters()], upstream.to(out.dtype))


def both_ways(layout, dtype=torch.float32, keep=slice(None)):
    "Pairs of the head's and the dense way's values and gradients."
    head, labels = small_head(layout, dtype), LABELS[keep]
    feats = torch.randn(len(labels), 16, 14, 14, dtype=dtype).contiguous(memory_format=layout)
    upstream = torch.randn(len(labels), 28, 28, dtype=dtype)
    runs = MaskHead.__call__, dense
    return list(zip(*(values_and_gradients(run, head, feats, labels, upstream) for run in runs), strict=True))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('keep', [slice(None), slice(1), slice(0)], ids=['seven', 'one', 'none'])
def test_the_own_mask_is_that_of_the_convolution(layout, keep):
    pairs = both_ways(layout, torch.float64, keep)
    assert len(pairs) == 2 + 3 + 4 and pairs[0][0].shape == (len(LABELS[keep]), 28, 28)
    for ours, theirs in pairs: assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_own_mask_under_autocast(layout):
    with torch.autocast('cpu', torch.bfloat16): pairs = both_ways(layout)
    assert pairs[0][0].dtype == pairs[0][1].dtype == torch.bfloat16
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= .03 * theirs.float().norm()


class Large(TorchDispatchMode):
    "Collects what is made, not seen through a view, with at least `size` elements."
    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        known = {o.untyped_storage().data_ptr() for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)}
        out = f(*args, **(kwargs or {}))
        self.made += [o for o in tree_leaves(out) if o is not None and o.numel() >= self.size and o.untyped_storage().data_ptr() not in known]
        return out


def test_cells_are_not_copied():
    "The upsampled cells are made once, and their gradient before and after the ReLU; nothing else is as large, there or back."
    feats = torch.randn(7, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    with Large(7 * 32 * 28 * 28) as seen:
        out = small_head(torch.channels_last)(feats, LABELS)
        assert len(seen.made) == 1
        out.sum().backward()
    assert len(seen.made) == 3


def test_the_head_as_one_graph():
    head, feats = small_head(torch.channels_last), torch.randn(7, 16, 14, 14)
    compiled = torch.compile(head, fullgraph=True, backend='eager')
    assert_close(compiled(feats, LABELS), head(feats, LABELS))


# --- loss -------------------------------------------------------------------------------------------------------------

def test_loss_in_all_precisions():
    logits, targets = torch.randn(6, 28, 28).double(), (torch.rand(6, 28, 28) < .5).float()
    weight = torch.tensor([True, True, True, False, False, False])
    exact, count = mask_loss(logits, targets, weight)
    want = F.binary_cross_entropy_with_logits(logits[:3], targets[:3].double(), reduction='none')
    assert_close(exact, want.mean((1, 2)).sum())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        loss, _ = mask_loss(logits.to(dtype), targets, weight)
        assert loss.dtype == torch.float32 and count == 3
        assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
    few = logits[:2, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, targets[:2, :2, :2], weight[:2])[0], few)


def test_positives_alone_and_fixed_slots_give_the_same_gradient():
    head, feats = MaskHead(64, 3, convs=1, conv_channels=64).double(), torch.randn(8, 64, 14, 14).double()
    weight, labels = torch.arange(8) < 3, torch.randint(3, (8,)).where(torch.arange(8) < 3, 3)
    targets = (torch.rand(8, 28, 28) < .5).float()
    losses = [mask_loss(head(feats[keep], labels[keep]), targets[keep], weight[keep])[0] for keep in (weight, weight | True)]
    assert_close(*losses)
    a, b = (torch.autograd.grad(o, list(head.parameters())) for o in losses)
    assert_close(a, b)


def test_no_rois_have_a_loss_and_a_gradient():
    head = MaskHead(64, 3, convs=1, conv_channels=64)
    none = torch.zeros(0, dtype=torch.int64)
    loss, count = mask_loss(head(torch.zeros(0, 64, 14, 14), none), torch.zeros(0, 28, 28), none.bool())
    loss.backward()
    assert loss == 0 and count == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


# --- pasting ----------------------------------------------------------------------------------------------------------

def by_grid_sample(probs, boxes, height, width):
    "Probabilities of all pixels of the picture."
    (x0, y0, x1, y1), xs, ys = boxes.T[..., None], torch.arange(width) + .5, torch.arange(height) + .5
    gx, gy = (xs - x0) / (x1 - x0) * 2 - 1, (ys - y0) / (y1 - y0) * 2 - 1
    at = torch.stack(torch.broadcast_tensors(gx[:, None], gy[:, :, None]), -1)
    return F.grid_sample(probs[:, None], at, align_corners=False)[:, 0]


@pytest.mark.parametrize('threshold', [.05, .5, .95])
@pytest.mark.parametrize('largest', [3, 40, 300])
def test_pasting_equals_grid_sample(threshold, largest):
    corner = torch.rand(40, 2) * torch.tensor([140., 110]) - 20
    boxes, probs = torch.cat([corner, corner + .3 + largest * torch.rand(40, 2)], 1), torch.rand(40, 28, 28)
    want = by_grid_sample(probs, boxes, 90, 120)
    ours, clear = paste_masks(probs, boxes, 90, 120, threshold), (want - threshold).abs() > 1e-4
    assert torch.equal(ours[clear], (want >= threshold)[clear]) and clear.float().mean() > .99
    with torch.autocast('cpu', torch.bfloat16): low = paste_masks(probs, boxes, 90, 120, threshold)
    assert torch.equal(ours, low)


def test_boxes_without_pixels():
    boxes = torch.tensor([[5., 5, 5, 9], [5, 9, 9, 5], [40, 5, 60, 9], [-60, -60, -40, -40], [5.6, 5.6, 5.8, 5.8]])
    assert not paste_masks(torch.ones(5, 28, 28), boxes, 20, 30).any()
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), 20, 30).shape == (0, 20, 30)
    assert paste_masks(torch.ones(1, 28, 28), torch.tensor([[-1e4, -1e4, 1e4, 1e4]]), 20, 30).all()
