"hotcoco against pycocotools, and evaluation shared by several processes."
import json
import os
import subprocess
import sys
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pycocotools import mask as coco_mask
from torch import nn

from scratchdet.coco import coco_split, load_index
from scratchdet.count import coco_ap, ground_truth, numbers, run_hotcoco, run_pycocotools
from scratchdet.detector import mask_rcnn
from scratchdet.evaluate import detect, evaluate, main, parse_args
from scratchdet.loader import eval_loader
from scratchdet.masks import mask_to_rle
from scratchdet.toy import make_toy
from scratchdet.weights import save_model

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


class Noisy(Perfect):
    "The objects moved, some twice, with masks and scores that depend on the image alone."
    def __init__(self, index):
        super().__init__(index)
        self.mask_head = True

    def forward(self, batch):
        out = []
        for image_id, size, found in zip(batch.image_ids.tolist(), batch.sizes, super().forward(batch)):
            g, twice = torch.Generator().manual_seed(image_id), torch.arange(2 * len(found['labels'])) // 2
            boxes = found['boxes'][twice] + 2 * torch.randn(len(twice), 4, generator=g)
            scores, probs = torch.rand(len(twice), generator=g), torch.rand(len(twice), 28, 28, generator=g)
            boxes = boxes.clamp(min=torch.zeros(4), max=size.flip(0).repeat(2))
            boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
            out.append(dict(boxes=boxes, labels=found['labels'][twice], scores=scores, mask_probs=probs ** .2))
        return out


def loaders(index, processes, batch_size=2):
    settings = dict(batch_size=batch_size, short=64, long=128, processes=processes)
    return [eval_loader(index, process=p, **settings) for p in range(processes)]


@pytest.mark.parametrize('processes', [1, 2, 3, 16])
@pytest.mark.parametrize('images', [0, 1, 2, 5, 7])
@pytest.mark.parametrize('batch_size', [1, 2, 8])
def test_each_image_is_in_one_share(index, images, processes, batch_size):
    part = index.subset(range(images))
    shares = [list(share) for share in loaders(part, processes, batch_size)]
    assert len(shares) == processes
    seen = [i for share in shares for batch, _ in share for i in batch.image_ids.tolist()]
    assert sorted(seen) == part.image_ids.tolist() and max(map(len, shares)) - min(map(len, shares)) <= 1
    whole = [tuple(batch.image_ids.tolist()) for batch, _ in loaders(part, 1, batch_size)[0]]
    assert sorted(whole) == sorted(tuple(batch.image_ids.tolist()) for share in shares for batch, _ in share)


worker = '''
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
import torch
from accelerate import Accelerator
import test_evaluate as t
from scratchdet.coco import coco_split, load_index
torch.set_num_threads(1)
accelerator, index = Accelerator(cpu=True), load_index(*coco_split(sys.argv[1], 'val'))
seen = t.rounds(index, accelerator, Path(sys.argv[2]))
Path(sys.argv[2], f'of_{accelerator.process_index}.json').write_text(json.dumps(seen))
accelerator.end_training()
'''

counts = [(0, 1), (1, 1), (1, 4), (2, 1), (3, 1), (3, 2), (5, 1), (5, 2), (5, 8), (7, 3)]  # images, images at once


def models(index):
    "A stand-in that finds something, and a network."
    torch.manual_seed(0)
    small = dict(blocks=(1, 1, 1, 1), width=16, channels=32, fc=32, groups=4, score_thresh=0., max_dets=10)
    return Noisy(index), mask_rcnn(len(index.names), rpn=dict(post_nms_topk=(50, 50)), **small)


def attempt(do):
    "What a call returns, or the error that it raises."
    try: return do()
    except (OSError, RuntimeError, KeyError) as e: return [type(e).__name__, str(e)]


def broken(truth, detections, kind): raise OSError(f'no space left for {len(detections)} detections')
def strange(truth, detections, kind): raise KeyError(kind)


def rounds(index, accelerator, out):
    "Evaluations of many sizes, with errors between them: what this process gets."
    several = accelerator is not None
    place, processes = (accelerator.process_index, accelerator.num_processes) if several else (0, 1)
    seen = {}
    for images, batch_size in counts:
        part = index.subset(range(images))
        for model in models(index):
            if several: model = accelerator.prepare(model)
            loader, name = loaders(part, processes, batch_size)[place], f'{len(seen)} {images} {batch_size}'
            seen[name] = evaluate(model, part, loader, accelerator=accelerator, out=out/name)
    model, whole = Noisy(index), loaders(index, 1)[0]
    share = loaders(index, processes)[place]
    settings = dict(accelerator=accelerator)
    seen['full disk'] = attempt(lambda: evaluate(model, index, share, run=broken, **settings))
    seen['a mistake'] = attempt(lambda: evaluate(model, index, share, run=strange, **settings)) if several else None
    seen['everyone has all'] = evaluate(model, index, whole, **settings)
    seen['too few'] = attempt(lambda: detect(model, index, [] if place == processes - 1 else list(share)[1:], accelerator))
    seen['alive'] = evaluate(model, index, share, **settings)
    seen['records'] = detect(model, index, share, accelerator)
    return seen


def launch(script, processes, *args, timeout=300):
    "Run a script in several processes."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', processes, script, *args]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture(scope='module')
def alone(index, tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp('alone')
    return rounds(index, None, out), out


@pytest.mark.parametrize('processes', [2, 3])
def test_several_processes_give_the_numbers_of_one(index, alone, processes, tmp_path):
    script, shared, (wanted, out) = tmp_path/'worker.py', tmp_path/'shared', alone
    shared.mkdir(), script.write_text(worker)
    done = launch(script, processes, index.json_path.parents[1], shared, os.path.dirname(__file__))
    assert done.returncode == 0, done.stderr
    wanted = json.loads(json.dumps(wanted))
    special = 'full disk', 'a mistake', 'too few', 'records'
    for rank in range(processes):
        found = json.loads((shared/f'of_{rank}.json').read_text())
        assert {k: v for k, v in found.items() if k not in special} == {k: v for k, v in wanted.items() if k not in special}
        assert found['records'] == (wanted['records'] if rank == 0 else None)
        assert found['full disk'][0] == ('MainFailed' if rank else 'OSError') and 'no space left for' in found['full disk'][1]
        assert found['too few'][0] == 'RuntimeError' and 'were not evaluated, such as' in found['too few'][1]
        assert found['a mistake'] == (['MainFailed', "the main process failed: 'bbox'"] if rank else ['KeyError', "'bbox'"])
    files = [o.relative_to(out) for o in sorted(out.rglob('*.json'))]
    assert len(files) == 2 * 2 * len(counts)
    for file in files: assert (shared/file).read_bytes() == (out/file).read_bytes()
    assert wanted['18 7 3']['bbox']['AP50'] > .1 and wanted['18 7 3']['segm']['AR100'] > 0


fails = '''
import sys
sys.path[:0] = [sys.argv[2]]
from accelerate import Accelerator
import test_evaluate as t
from scratchdet.coco import coco_split, load_index
accelerator, index = Accelerator(cpu=True), load_index(*coco_split(sys.argv[1], 'val'))
def share():
    for i, o in enumerate(t.loaders(index, 2, 1)[accelerator.process_index]):
        if i == 1 and accelerator.process_index: raise ValueError('the image is not an image')
        yield o
t.evaluate(t.Noisy(index), index, share(), accelerator=accelerator)
print('never reached')
'''


def test_a_process_that_fails_ends_all(index, tmp_path):
    script = tmp_path/'fails.py'
    script.write_text(fails)
    done = launch(script, 2, index.json_path.parents[1], os.path.dirname(__file__), timeout=120)
    assert done.returncode != 0 and 'the image is not an image' in done.stderr and 'never' not in done.stdout


@pytest.mark.slow
def test_the_benchmark_compares_all_tables(tmp_path):
    file, script = tmp_path/'of.json', os.path.join(os.path.dirname(__file__), '..', 'benchmarks', 'evaluation.py')
    command = [sys.executable, script, '--images', '40', '--detections', '20', '--out', str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found['same_table'] and found['same_detections'] and found['largest_difference_to_pycocotools'] <= 1e-9
    assert (found['images'], found['objects'], len(found['two_processes'])) == (40, 288, 2) and found['results']['segm']['AP'] > 0


def test_files_are_whole_or_absent(index, tmp_path, monkeypatch):
    evaluate(Perfect(index), index, loaders(index, 1)[0], out=tmp_path)
    before = (tmp_path/'results.json').read_bytes()
    def full(self, data): raise OSError('no space left on device')
    monkeypatch.setattr('pathlib.Path.write_bytes', full)
    with pytest.raises(OSError, match='no space'): evaluate(Perfect(index), index, loaders(index, 1)[0], out=tmp_path)
    assert (tmp_path/'results.json').read_bytes() == before


class Idle(Perfect):
    "Must not be asked."
    def forward(self, batch): raise AssertionError('images were looked at before the folder')


@pytest.mark.parametrize('out, says', [('file', 'is a file: give'), ('file/inside', 'file is a file: give'),
                                       ('/proc/none', '/proc/none is no folder to write into'), ('/proc', '/proc is no folder to write into')])
def test_a_bad_folder_is_found_before_the_work(index, tmp_path, out, says):
    (tmp_path/'file').write_text('kept')
    with pytest.raises(OSError, match=says):
        evaluate(Idle(index), index, loaders(index, 1)[0], out=tmp_path/out)
    assert (tmp_path/'file').read_text() == 'kept' and len(list(tmp_path.iterdir())) == 1


def test_a_good_folder_is_left_as_it_was(index, tmp_path):
    with pytest.raises(AssertionError): evaluate(Idle(index), index, loaders(index, 1)[0], out=tmp_path/'new/folder')
    assert list((tmp_path/'new/folder').iterdir()) == []


def test_a_full_disk_leaves_the_table(index, tmp_path, monkeypatch):
    "What an hour of work gave is in the message where it cannot be in a file."
    def full(self, data): raise OSError('no space left on device')
    monkeypatch.setattr('pathlib.Path.write_bytes', full)
    with pytest.raises(OSError, match='(?s)no space left.*AP50.*bbox 100.0 100.0'): evaluate(Perfect(index), index, loaders(index, 1)[0], out=tmp_path)


@pytest.fixture(scope='module')
def files(index, tmp_path_factory):
    "Model files of 3, 6 and 9 classes that say nothing about them; and of 6 that say other names or ids."
    folder, tiny = tmp_path_factory.mktemp('models'), dict(blocks=(1, 1, 1, 1), width=8, channels=8, fc=8, groups=4)
    names, ids = list(index.names), index.category_ids.tolist()
    known = dict(none={}, names=dict(category_names=names[::-1]), ids=dict(category_ids=[i + 10 for i in ids]), both=dict(category_names=names, category_ids=ids),
                 turned=dict(category_names=names, category_ids=ids[::-1]))
    for name, meta in known.items(): save_model(folder/f'{name}.safetensors', mask_rcnn(6, **tiny), dict(**meta, short_side=32, long_side=48))
    for k in (3, 9): save_model(folder/f'{k}.safetensors', mask_rcnn(k, **tiny))
    return folder


@pytest.mark.parametrize('name, fault', [('3', 'knows 3 categories, .* has 6; not as many: give'), ('9', 'knows 9 categories, .* has 6; not as many: give'),
                                         ('names', 'the names have another order'), ('ids', 'only one of them has the ids 1, 2, '), ('turned', 'the ids have another order')])
def test_another_model_is_refused(index, files, name, fault):
    words = ['--weights', str(files/f'{name}.safetensors'), '--coco', str(index.json_path.parents[1]), '--cpu', '--quiet']
    with pytest.raises(SystemExit, match=f'scratchdet.evaluate: .*{name}.safetensors {fault if "knows" in fault else ".*" + fault}'): main(parse_args(words))


@pytest.mark.parametrize('name', ['none', 'both'])
def test_the_same_categories_are_accepted(index, files, name):
    words = ['--weights', str(files/f'{name}.safetensors'), '--coco', str(index.json_path.parents[1]), '--cpu', '--quiet', '--workers', '0']
    assert main(parse_args([*words, '--short', '32', '--long', '48']))['images'] == 7


@pytest.mark.parametrize('words', ['--batch-size 0', '--batch-size -1', '--short 0', '--short -5', '--long 0', '--long -1', '--workers -1', '--workers x'])
def test_numbers_that_cannot_be(words, capsys):
    with pytest.raises(SystemExit) as e: parse_args(['--weights', 'a', '--coco', 'b', *words.split()])
    assert e.value.code == 2 and words.split()[0] in capsys.readouterr().err


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


def test_fields_that_nobody_needs_may_hold_anything(tmp_path):
    "NaN is no json, a dict no score; neither is asked for, so neither changes the table or ends the evaluation."
    root = make_toy(tmp_path/'toy', train=1, val=3, size=(64, 96))
    wanted = ground_truth(load_index(*coco_split(root, 'val')))
    file, = root.glob('annotations/instances_val*.json')
    doc = json.loads(file.read_text())
    for o, odd in zip(doc['annotations'], (float('nan'), {}, 1 << 80, '\ud800')): o['score'] = odd
    file.write_text(json.dumps(doc))
    truth = ground_truth(load_index(*coco_split(root, 'val')))
    assert truth == wanted and len(truth['annotations']) >= 4
    perfect = [dict(image_id=o['image_id'], category_id=o['category_id'], bbox=o['bbox'], score=.9)
               for o in truth['annotations'] if not o['iscrowd']]
    for run in (run_hotcoco, run_pycocotools): assert coco_ap(truth, perfect, 'bbox', run)['AP'] == pytest.approx(1)
