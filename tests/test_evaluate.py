"hotcoco against pycocotools, and evaluation shared by several processes."
import json
import subprocess
import sys
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pycocotools import mask as coco_mask
from torch import nn

from scratchdet.coco import coco_split, load_index
from scratchdet.evaluate import (_by_image, coco_ap, detect, evaluate, ground_truth, numbers, run_hotcoco,
                                 run_pycocotools)
from scratchdet.loader import eval_loader
from scratchdet.masks import mask_to_rle
from scratchdet.toy import make_toy

height, width, kinds = 60, 80, ('bbox', 'segm')


def rectangle(box):
    "Run lengths of a box of whole pixels."
    bits = np.zeros((height, width), np.uint8)
    x, y, w, h = (int(o) for o in box)
    bits[y:y+h, x:x+w] = 1
    return mask_to_rle(bits)


def record(image, category, box, **more):
    "An annotation or a detection."
    return dict(image_id=image, category_id=category, bbox=[float(o) for o in box], segmentation=rectangle(box), **more)


def dataset(objects, images=4, categories=3):
    "A COCO dataset of `objects`, records with `iscrowd`."
    anns = [dict(o, id=i, area=float(o['bbox'][2] * o['bbox'][3])) for i, o in enumerate(objects, 1)]
    return dict(images=[dict(id=i, height=height, width=width) for i in range(1, images + 1)], annotations=anns,
                categories=[dict(id=10 * i, name=f'kind {i}') for i in range(1, categories + 1)])


def assert_equal(truth, detections):
    "Both ways of counting agree to 1e-9: the twelve numbers, the whole curves, and each category."
    for kind in kinds:
        slow, fast = run_pycocotools(truth, detections, kind), run_hotcoco(truth, detections, kind)
        for a, b in zip(slow, fast):
            assert a.shape == b.shape and np.isfinite(a).all()
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-9)
        a, b = (coco_ap(truth, detections, kind, run) for run in (run_pycocotools, run_hotcoco))
        assert [o is None for o in a['per_category'].values()] == [o is None for o in b['per_category'].values()]


thing = record(1, 10, [10, 10, 20, 20], iscrowd=0)
crowd = record(1, 10, [5, 5, 60, 50], iscrowd=1)
hit = record(1, 10, [10, 10, 20, 20], score=.9)
near = record(1, 10, [12, 10, 20, 20], score=.9)
inside = record(1, 10, [40, 30, 10, 10], score=.5)
cases = {
    'one of each': ([thing], [hit]),
    'equal scores': ([thing], [near, hit, near, hit]),
    'equal scores, other order': ([thing], [hit, near, hit, near]),
    'equal scores over images': ([thing, record(2, 10, [0, 0, 9, 9], iscrowd=0)],
                                [near, record(2, 10, [0, 0, 9, 9], score=.9)]),
    'a crowd and nothing else': ([crowd], [hit, inside]),
    'a crowd takes what is left': ([thing, crowd], [near, hit, inside, inside]),
    'a crowd before the object': ([crowd, thing], [hit, inside]),
    'a crowd without detections': ([thing, crowd], []),
    'no objects': ([], [hit, inside]),
    'no detections': ([thing], []),
    'nothing at all': ([], []),
    'detections on an empty image': ([thing], [hit, record(3, 10, [0, 0, 5, 5], score=.95)]),
    'an image without detections': ([thing, record(2, 10, [0, 0, 9, 9], iscrowd=0)], [hit]),
    'a category without objects': ([thing], [hit, record(1, 20, [10, 10, 20, 20], score=.99)]),
    'two objects in one place': ([thing, dict(thing)], [hit, hit, near]),
    'exactly half': ([record(1, 10, [0, 0, 10, 10], iscrowd=0)], [record(1, 10, [0, 0, 20, 10], score=.5)]),
    'the edge of small': ([record(1, 10, [0, 0, 32, 32], iscrowd=0)], [record(1, 10, [0, 0, 32, 32], score=.5)]),
    'more than a hundred': ([thing], [dict(inside, score=i / 200) for i in range(150)] + [dict(hit, score=.25)]),
    'zero scores': ([thing], [dict(hit, score=0.), dict(near, score=0.)]),
}


@pytest.mark.parametrize('name', cases)
def test_hotcoco_is_pycocotools(name):
    objects, detections = cases[name]
    assert_equal(dataset(objects), detections)


box = st.tuples(st.integers(0, 50), st.integers(0, 40), st.integers(1, 29), st.integers(1, 19))
objects = st.lists(st.builds(lambda i, k, b, c: record(i, k, b, iscrowd=c), st.integers(1, 3),
                             st.sampled_from([10, 20]), box, st.sampled_from([0, 0, 0, 1])), max_size=8)
detections = st.lists(st.builds(lambda i, k, b, s: record(i, k, b, score=s / 4), st.integers(1, 4),
                                st.sampled_from([10, 20, 30]), box, st.integers(0, 4)), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(objects, detections, st.booleans())
def test_hotcoco_is_pycocotools_on_anything(objects, detections, copy):
    if copy: detections = detections + [record(o['image_id'], o['category_id'], o['bbox'], score=.5) for o in objects]
    assert_equal(dataset(objects), detections)


def test_polygons_and_counts_as_in_coco_files():
    square = dict(thing, segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])
    bits = coco_mask.decode(dict(crowd['segmentation'], counts=crowd['segmentation']['counts'].encode()))
    runs = [len(list(same)) for _, same in groupby(bits.T.ravel())]  # down the columns, zeros first
    counts = dict(crowd, segmentation=dict(size=[height, width], counts=runs))
    assert sum(runs) == height * width and bits[0, 0] == 0
    assert_equal(dataset([square, counts]), [near, hit, inside])


def test_no_input_is_changed():
    truth, found = dataset([dict(thing, segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]]), crowd]), [hit, near]
    before = json.dumps([truth, found])
    for kind in kinds:
        for run in (run_pycocotools, run_hotcoco): run(truth, found, kind)
    assert json.dumps([truth, found]) == before


def test_masks_are_measured_by_their_own_area():
    bits = np.eye(60, 80, dtype=np.uint8)  # 60 px in a box of 3600: a small mistake, not a medium one
    thin = dict(record(1, 10, [0, 0, 60, 60], score=.95), segmentation=mask_to_rle(bits))
    for run in (run_pycocotools, run_hotcoco):
        assert coco_ap(dataset([thing]), [thin, hit], 'segm', run)['APs'] == pytest.approx(.5)
        assert coco_ap(dataset([thing]), [thin, hit], 'bbox', run)['APs'] == pytest.approx(1)


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    root = make_toy(tmp_path_factory.mktemp('toy')/'toy', train=1, val=7, size=(64, 96))
    return load_index(*coco_split(root, 'val'))


class Perfect(nn.Module):
    "Returns the objects themselves, at the scale of the network."
    def __init__(self, index):
        super().__init__()
        self.index, self.mask_head, self.weight = index, None, nn.Parameter(torch.zeros(1))
        self.place = {int(o): i for i, o in enumerate(index.image_ids)}

    def forward(self, batch):
        out = []
        for image_id, (h, w) in zip(batch.image_ids.tolist(), batch.sizes.tolist()):
            i = self.place[image_id]
            target, (height, width) = self.index.target(i), self.index.sizes[i].tolist()
            boxes = target['boxes'].float() * torch.tensor([w / width, h / height] * 2)
            out.append(dict(boxes=boxes, labels=target['labels'], scores=torch.ones(len(boxes))))
        return out


def loaders(index, processes):
    settings = dict(batch_size=2, short=64, long=128, processes=processes)
    return [eval_loader(index, process=p, **settings) for p in range(processes)]


@pytest.mark.parametrize('processes', [2, 3, 16])
def test_shares_make_the_whole(index, processes, monkeypatch):
    whole = detect(Perfect(index), index, loaders(index, 1)[0])
    shares = loaders(index, processes)
    parts = [_by_image(Perfect(index), index, share, 'cpu') for share in shares]
    assert whole and sum(map(len, parts)) == len(index)
    fake = SimpleNamespace(num_processes=processes, unwrap_model=lambda m: m)
    monkeypatch.setattr('scratchdet.evaluate.gather_object', lambda part: parts)
    for share in shares: assert detect(Perfect(index), index, share, fake) == whole
    parts[:] = parts[1:] + parts[1:]
    with pytest.raises(RuntimeError, match='images were not evaluated, such as'):
        detect(Perfect(index), index, shares[0], fake)


worker = '''
import json, sys
sys.path[:0] = [sys.argv[3]]
import torch
from accelerate import Accelerator
from test_evaluate import Perfect, loaders
from scratchdet.coco import coco_split, load_index
from scratchdet.evaluate import evaluate
torch.set_num_threads(1)
accelerator, index = Accelerator(cpu=True), load_index(*coco_split(sys.argv[1], 'val'))
loader = loaders(index, accelerator.num_processes)[accelerator.process_index]
results = evaluate(accelerator.prepare(Perfect(index)), index, loader, accelerator=accelerator, out=sys.argv[2])
with open(f'{sys.argv[2]}/of_{accelerator.process_index}.json', 'w') as f: json.dump(results, f)
accelerator.end_training()
'''


def test_two_processes_give_the_numbers_of_one(index, tmp_path):
    alone = evaluate(Perfect(index), index, loaders(index, 1)[0], out=tmp_path/'alone')
    script = tmp_path/'worker.py'
    script.write_text(worker)
    (tmp_path/'shared').mkdir()
    here = __file__.rpartition('/')[0]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script,
               index.json_path.parents[1], tmp_path/'shared', here]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1): assert json.loads((tmp_path/f'shared/of_{rank}.json').read_text()) == alone
    for name in ('detections', 'results'):
        assert (tmp_path/'shared'/f'{name}.json').read_bytes() == (tmp_path/'alone'/f'{name}.json').read_bytes()


def test_files_are_whole_or_absent(index, tmp_path, monkeypatch):
    evaluate(Perfect(index), index, loaders(index, 1)[0], out=tmp_path)
    before = (tmp_path/'results.json').read_bytes()
    def full(self, data): raise OSError('no space left on device')
    monkeypatch.setattr('pathlib.Path.write_bytes', full)
    with pytest.raises(OSError, match='no space'): evaluate(Perfect(index), index, loaders(index, 1)[0], out=tmp_path)
    assert (tmp_path/'results.json').read_bytes() == before


def test_truth_is_the_file_unrounded(index):
    doc = json.loads(index.json_path.read_text())
    truth = ground_truth(index)
    assert [o['bbox'] for o in truth['annotations']] == [o['bbox'] for o in doc['annotations']]
    assert [o['id'] for o in truth['categories']] == [o['id'] for o in doc['categories']]


def test_real_annotations(coco_mini):
    index = load_index(*coco_split(coco_mini, 'val'))
    truth = ground_truth(index)
    rng, found = np.random.default_rng(0), []
    for o in truth['annotations']:
        h, w = next((i['height'], i['width']) for i in truth['images'] if i['id'] == o['image_id'])
        field = o['segmentation']
        if isinstance(field, list): field = coco_mask.merge(coco_mask.frPyObjects(field, h, w))
        elif isinstance(field['counts'], list): field = coco_mask.frPyObjects(field, h, w)
        bits = np.roll(coco_mask.decode(field), rng.integers(-4, 5), 1)
        shifted = [float(v) for v in np.array(o['bbox']) + rng.normal(0, 2, 4) * [1, 1, 0, 0]]
        found.append(dict(image_id=o['image_id'], category_id=o['category_id'], bbox=shifted,
                          score=float(rng.integers(0, 6)) / 5, segmentation=mask_to_rle(bits)))
    assert any(o['iscrowd'] for o in truth['annotations']) and len(truth['images']) == len(index)
    assert_equal(truth, found)
    ap = coco_ap(truth, found)
    assert 0 < ap['AP'] < 1 and len(ap['per_category']) == 80 and set(numbers) < set(ap)
