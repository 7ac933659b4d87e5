"Boxes: random sweeps, degenerate boxes, and NMS against a greedy loop."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from scratchdet.boxes import (box_area, box_iou, boxes_to_deltas, clip_boxes, deltas_to_boxes, nms_keep, xywh_to_xyxy,
                              xyxy_to_xywh)

settings.register_profile('boxes', deadline=None, max_examples=60)
settings.load_profile('boxes')
coordinate = st.integers(-40, 400).map(lambda o: o / 4)  # exact in float32, so that ties are ties
length = st.integers(0, 200).map(lambda o: o / 4)


def tensors(min_size=0, max_size=12, sides=length):
    "Lists of boxes as (P, 4) tensors."
    box = st.tuples(coordinate, coordinate, sides, sides).map(lambda o: (o[0], o[1], o[0] + o[2], o[1] + o[3]))
    return st.lists(box, min_size=min_size, max_size=max_size).map(lambda o: torch.tensor(o).reshape(-1, 4))


def greedy(boxes, scores, groups, valid, thresh):
    "The boxes that stay, by the definition: best first, each against those that stayed."
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i)):
        if not valid[i]: continue
        rivals = [j for j in kept if groups[j] == groups[i]]
        if all(box_iou(boxes[j, None], boxes[i, None]).item() <= thresh for j in rivals): kept.append(i)
    return torch.isin(torch.arange(len(boxes)), torch.tensor(kept, dtype=torch.int64))


@given(tensors(), tensors())
def test_iou_bounds_and_symmetry(a, b):
    iou = box_iou(a, b)
    assert iou.shape == (len(a), len(b))
    assert ((iou >= 0) & (iou <= 1)).all()
    assert torch.equal(iou, box_iou(b, a).T)
    assert torch.equal(box_iou(a, a).diagonal(), (box_area(a) > 0).float())


@given(tensors(1), st.integers(-64, 64), st.sampled_from([.5, 2., 4.]))
def test_iou_ignores_position_and_scale(boxes, shift, scale):
    assert torch.allclose(box_iou(boxes, boxes), box_iou((boxes + shift) * scale, (boxes + shift) * scale), atol=1e-6)


@given(tensors(), tensors())
def test_iou_equals_torchvision(a, b):
    from torchvision.ops import box_iou as peer
    assert torch.allclose(box_iou(a, b), peer(a, b).nan_to_num(0), atol=1e-6)


def test_iou_of_one_pixel_and_zero_area_boxes():
    pixel, line, point = torch.tensor([[3., 3, 4, 4], [3, 3, 3, 9], [3, 3, 3, 3]])
    assert box_iou(pixel[None], pixel[None]) == 1
    assert box_iou(pixel[None], torch.stack([line, point])).tolist() == [[0, 0]]
    assert box_iou(line[None], line[None]) == 0
    assert box_iou(point[None], point[None]) == 0


@given(tensors())
def test_corner_and_size_round_trip(boxes):
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


@given(tensors(), st.integers(1, 90), st.integers(1, 90))
def test_clip_stays_inside_and_is_idempotent(boxes, h, w):
    size = torch.tensor([h, w])
    clipped = clip_boxes(boxes, size)
    assert (clipped >= 0).all() and (clipped <= torch.tensor([w, h, w, h])).all()
    assert (clipped[:, 2:] >= clipped[:, :2]).all()
    assert torch.equal(clip_boxes(clipped, size), clipped)


def test_clip_of_a_batch_takes_each_size():
    boxes, sizes = torch.tensor([-5., -5, 500, 500]).expand(3, 2, 4), torch.tensor([[10, 20], [30, 40], [50, 60]])
    assert clip_boxes(boxes, sizes)[:, 0, 2:].tolist() == sizes.flip(-1).tolist()


sides = st.integers(1, 200).map(lambda o: o / 4)


@given(st.data(), st.sampled_from([(1., 1., 1., 1.), (.1, .1, .2, .2)]))
def test_deltas_round_trip(data, std):
    boxes = data.draw(tensors(1, 8, sides))
    anchors = data.draw(tensors(len(boxes), len(boxes), sides))
    near = anchors + (boxes - anchors).clamp(-1, 1) * .05   # within the clamp of 62.5
    back = deltas_to_boxes(boxes_to_deltas(near, anchors, std), anchors, std)
    assert torch.allclose(back, near, atol=1e-3)


@given(tensors(1, 8), st.integers(0, 2 ** 31))
def test_deltas_are_finite_and_sizes_bounded(anchors, seed):
    wild = torch.randn(len(anchors), 4, generator=torch.Generator().manual_seed(seed)) * 1e3
    size, moved = xyxy_to_xywh(anchors)[:, 2:], xyxy_to_xywh(deltas_to_boxes(wild, anchors))[:, 2:]
    assert moved.isfinite().all() and (moved <= size * 62.5 * 1.001 + .1).all()
    assert boxes_to_deltas(torch.zeros_like(anchors), anchors).isfinite().all()
    assert boxes_to_deltas(anchors, torch.zeros_like(anchors)).isfinite().all()


def test_deltas_have_gradients_of_formula():
    deltas = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(42), requires_grad=True)
    anchors = torch.tensor([[0., 0, 8, 4]], dtype=torch.float64).expand(5, 4)
    assert torch.autograd.gradcheck(lambda d: deltas_to_boxes(d, anchors), deltas)


@given(st.data(), st.sampled_from([.3, .5, .7]))
def test_nms_is_greedy(data, thresh):
    boxes = data.draw(tensors(0, 14, sides))
    p = len(boxes)
    scores = torch.tensor(data.draw(st.lists(st.sampled_from([.1, .5, .9]), min_size=p, max_size=p)))  # ties
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=p, max_size=p)), dtype=torch.int64)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=p, max_size=p)), dtype=torch.bool)
    keep = nms_keep(boxes[None], scores[None], groups[None], valid[None], thresh)
    assert torch.equal(keep[0], greedy(boxes, scores, groups, valid, thresh))


def case(n=3, p=40, seed=42):
    "Crowded boxes of three groups with tied scores, some slots empty."
    g = torch.Generator().manual_seed(seed)
    lo = torch.randint(0, 20, (n, p, 2), generator=g).float()
    boxes = torch.cat([lo, lo + torch.randint(1, 20, (n, p, 2), generator=g)], dim=-1)
    scores = torch.randint(0, 6, (n, p), generator=g) / 6
    return boxes, scores, torch.randint(0, 3, (n, p), generator=g), torch.rand(n, p, generator=g) > .2


def test_nms_of_a_batch_is_that_of_each_image():
    boxes, scores, groups, valid = case()
    keep = nms_keep(boxes, scores, groups, valid, .5)
    for i in range(3):
        alone = nms_keep(*(o[i:i + 1] for o in (boxes, scores, groups, valid)), .5)[0]
        assert torch.equal(keep[i], alone)
        assert torch.equal(alone, greedy(boxes[i], scores[i], groups[i], valid[i], .5))
    assert 0 < keep.sum() < valid.sum()


def test_nms_removes_above_and_not_at_the_threshold():
    boxes = torch.tensor([[[0., 0, 4, 4], [0, 0, 4, 2]]])  # IoU is exactly one half
    scores, groups, valid = torch.tensor([[.9, .8]]), torch.zeros(1, 2).long(), torch.ones(1, 2, dtype=torch.bool)
    assert nms_keep(boxes, scores, groups, valid, .5).tolist() == [[True, True]]
    assert nms_keep(boxes, scores, groups, valid, .499).tolist() == [[True, False]]


def test_nms_groups_are_apart_also_left_of_zero():
    boxes = torch.tensor([[[-90., -90, -10, -10], [-90, -90, -10, -10], [5, 5, 9, 9]]])
    groups = torch.tensor([[0, 1, 0]])
    assert nms_keep(boxes, torch.ones(1, 3), groups, torch.ones(1, 3, dtype=torch.bool), .5).all()


def test_nms_keeps_zero_area_boxes_and_drops_equal_pixels():
    boxes = torch.tensor([[[3., 3, 3, 3], [3, 3, 3, 3], [5, 5, 6, 6], [5, 5, 6, 6]]])
    keep = nms_keep(boxes, torch.tensor([[.4, .4, .4, .4]]), torch.zeros(1, 4).long(), torch.ones(1, 4, dtype=torch.bool), .5)
    assert keep.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize('n, p', [(2, 0), (0, 3), (1, 1)])
def test_nms_of_nothing(n, p):
    keep = nms_keep(torch.zeros(n, p, 4), torch.zeros(n, p), torch.zeros(n, p).long(), torch.zeros(n, p).bool(), .5)
    assert keep.shape == (n, p) and keep.dtype == torch.bool and not keep.any()


def test_nms_is_one_node_of_a_graph():
    def step(boxes, scores, groups, valid):
        keep = nms_keep(boxes, scores, groups, valid, .5)
        return (scores * keep).topk(10).values, clip_boxes(boxes, torch.tensor([[9, 9]] * 3)) * keep[..., None]
    captured = torch.compile(step, fullgraph=True, backend='eager')
    for got, expected in zip(captured(*case()), step(*case())): assert torch.equal(got, expected)


def test_nms_operator_keeps_its_promises():
    torch.library.opcheck(torch.ops.scratchdet.nms_keep.default, (*case(), .5))
    boxes, scores, groups, valid = case(1, 1)
    torch.library.opcheck(torch.ops.scratchdet.nms_keep.default, (boxes, scores, groups, torch.zeros_like(valid), .5))
