"Detections in the forms of others, with the real libraries: what supervision reads, merges and refuses, and what is said without it."
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scratchdet.detector import mask_rcnn
from scratchdet.evaluate import detections_to_coco
from scratchdet.exchange import from_coco, from_supervision, from_torchvision, to_supervision, to_torchvision
from scratchdet.predict import predict, to_coco

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # that OpenCV is not installed
    import supervision as sv

names, size = ('disc', 'square', 'triangle'), (40, 60)


def detections(n, seed=0, masks=True, scores=True, size=size):
    g = torch.Generator().manual_seed(seed)
    h, w = size
    boxes = (torch.rand(n, 2, 2, generator=g) * torch.tensor([w, h])).sort(1).values.flatten(1)
    det = dict(boxes=boxes, labels=torch.randint(0, 3, (n,), generator=g))
    if scores: det['scores'] = torch.rand(n, generator=g)
    if masks: det['masks'] = torch.rand(n, h, w, generator=g) < .3
    return det


def same(a, b): return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 2**16), st.booleans(), st.booleans(), st.permutations([3, 17, 90]))
def test_there_and_back(n, seed, masks, scores, category_ids):
    det = detections(n, seed, masks, scores)
    assert same(from_supervision(to_supervision(det, names)), det)
    assert same(from_torchvision(to_torchvision(det, category_ids), category_ids), det)
    if not scores: return
    back = from_coco(json.loads(json.dumps(detections_to_coco(det, 7, category_ids))), category_ids, size if masks else None)
    torch.testing.assert_close(back.pop('boxes'), det.pop('boxes'), rtol=0, atol=1e-5)
    assert same(back, det)


def test_what_a_detector_finds():
    torch.manual_seed(0)
    model = mask_rcnn(3, blocks=(1, 1, 1, 1), width=16, channels=32, fc=32, groups=4, max_dets=5, rpn=dict(post_nms_topk=(20, 20)))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for score in (0, 1):
        det, = predict(model, [image], short=64, long=96, score=score)
        seen = to_supervision(det, names)
        assert len(seen) == (0 if score else 5) and seen.mask.shape == (len(seen), *size) and seen.class_id.dtype == np.int64
        assert same(from_supervision(seen), det)


def test_other_tensors_and_arrays():
    "Half precision, numbers with a gradient and numpy arrays become what they are here; what was given is not changed."
    det = detections(4)
    odd = dict(boxes=det['boxes'].double().requires_grad_(), labels=det['labels'].int(), scores=det['scores'].bfloat16(), masks=det['masks'].numpy())
    back = from_supervision(to_supervision(odd))
    assert same(back, {**det, 'scores': det['scores'].bfloat16().float()})
    seen = to_supervision(det)
    from_supervision(seen)['boxes'].zero_()
    seen.xyxy[:] = 0
    assert same(det, detections(4))


def test_no_memory_is_shared():
    det = detections(4)
    for out in (to_torchvision(det, [1, 2, 3]), from_supervision(to_supervision(det))):
        for v in out.values(): v.zero_()
    assert same(det, detections(4))


def test_the_annotation_file_that_supervision_reads(tmp_path):
    "Images, boxes, labels and masks of `predictions.json`, read by supervision with its own decoder; category numbers have gaps."
    ids, dets = [3, 17, 90], [detections(n, n) for n in (3, 0, 2)]
    for det in dets: det['masks'] = det['masks'][:, :1, :1] | (torch.arange(size[1]) < 20) & (torch.arange(size[0])[:, None] < 10 + 5 * det['labels'][:, None, None])
    for i in range(3): Image.new('RGB', size[::-1]).save(tmp_path/f'{i}.png')
    records = [o for i, det in enumerate(dets, 1) for o in detections_to_coco(det, i, ids)]
    kinds = [dict(id=i, name=n) for i, n in zip(ids, names)]
    (tmp_path/'a.json').write_text(json.dumps(to_coco([f'{i}.png' for i in range(3)], [size] * 3, [1, 2, 3], records, kinds)))
    there = sv.DetectionDataset.from_coco(str(tmp_path), str(tmp_path/'a.json'), force_masks=True)
    assert there.classes == list(names) and len(there) == 3
    for (path, _, found), det in zip(there, dets):
        seen = to_supervision(det, names)
        assert found.class_id.tolist() == seen.class_id.tolist(), path
        np.testing.assert_allclose(found.xyxy, seen.xyxy, rtol=0, atol=1e-4)
        if len(seen): assert (found.mask == seen.mask).all()


def test_what_people_do_with_them():
    "Merge, filter, suppress, cut into slices: what comes out is detections here, the names still with them."
    a, b = detections(3, 1), detections(2, 2)
    both = sv.Detections.merge([to_supervision(o, names) for o in (a, detections(0), b)])
    assert same(from_supervision(both), {k: torch.cat([a[k], b[k]]) for k in a})
    assert list(both['class_name']) == [names[k] for k in torch.cat([a['labels'], b['labels']])]
    kept = from_supervision(both[both.confidence > .5])
    assert 0 < len(kept['boxes']) < 5 and (kept['scores'] > .5).all()
    twice = sv.Detections.merge([both, both])
    once, again = (o[np.argsort(o.confidence)] for o in (both, twice.with_nms(.99)))
    assert same(from_supervision(again), from_supervision(once))
    tile = detections(1, size=(20, 20))
    slicer = sv.InferenceSlicer(lambda image: to_supervision(tile), slice_wh=(20, 20), overlap_wh=(0, 0))
    found = from_supervision(slicer(np.zeros((*size, 3), np.uint8)))
    corners = torch.tensor([[x, y, x, y] for y in (0, 20) for x in (0, 20, 40)])
    torch.testing.assert_close(found['boxes'], tile['boxes'] + corners, rtol=0, atol=1e-4)
    assert found['masks'].shape == (6, *size) and (found['masks'].sum((1, 2)) == tile['masks'].sum()).all()


@pytest.mark.parametrize('field, change', [
    ('boxes', lambda x: x[0]), ('boxes', lambda x: x[:, :3]), ('boxes', lambda x: x[:, None]), ('labels', lambda x: x[:-1]),
    ('labels', lambda x: x.float()), ('scores', lambda x: x[:, None]), ('scores', lambda x: torch.cat([x, x])),
    ('masks', lambda x: x[0]), ('masks', lambda x: x[:2]), ('masks', lambda x: x.float()), ('masks', lambda x: x.byte()), ('masks', lambda x: x[:, None])])
def test_wrong_fields_are_named(field, change):
    det = detections(3)
    det[field] = change(det[field])
    for convert in (to_supervision, lambda o: to_torchvision(o, [1, 2, 3])):
        with pytest.raises(ValueError) as e: convert(det)
        if field != 'boxes' or det['boxes'].shape[-1:] != (4,) or det['boxes'].ndim != 2:
            assert str(det[field].dtype) in str(e.value) and str(tuple(det[field].shape)) in str(e.value)
        assert field in str(e.value) and '\n' not in str(e.value)


def test_without_the_library(monkeypatch, tmp_path):
    "One line that says what to install; the other functions do not need it. A library that is there and broken is not called missing."
    det = detections(2)
    seen = to_supervision(det)
    monkeypatch.setitem(sys.modules, 'supervision', None)
    with pytest.raises(ImportError) as e: to_supervision(det)
    assert str(e.value) == 'supervision is not installed: `pip install supervision`'
    assert same(from_supervision(seen), det) and same(from_torchvision(to_torchvision(det, [1, 2, 3]), [1, 2, 3]), det)
    (tmp_path/'supervision.py').write_text('import nothing_of_this_name')
    monkeypatch.delitem(sys.modules, 'supervision')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_of_this_name'"): to_supervision(det)
