"Small parts of large sets: the shares of the categories, the same choice everywhere, copies that are whole or not there."
import json
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from scratchdet.coco import coco_split, coco_subset, load_index, main, parse_args, stratified, training_images
from scratchdet.toy import make_toy


def index_of(present, ids=None):
    "As much of an index as `stratified` looks at, of images that have the categories of `present` (n, K)."
    n, k = present.shape
    rows, labels = np.nonzero(present)
    arrays = dict(image_ids=np.arange(n), first=np.searchsorted(rows, np.arange(n + 1)), labels=labels)

    class Index(SimpleNamespace):
        def __len__(self): return n
    return Index(arrays=arrays, images=np.arange(n), image_ids=np.arange(n) if ids is None else ids, category_ids=np.arange(k))


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp('subset')/'toy', train=40, val=10, size=(64, 96))


@pytest.mark.parametrize('seed', range(5))
def test_shares_follow_the_whole(seed):
    "Each stratum, counted in another way, gives its share to within one image; the error is below that of blind draws."
    rng = np.random.default_rng(seed)
    present = rng.random((3000, 40)) < .7 * .85 ** np.arange(40)
    chosen = stratified(index_of(present), 300, seed)
    assert len(set(chosen)) == 300 and (np.diff(chosen) > 0).all()
    counts = present.sum(0)
    rarest = [min(np.flatnonzero(o), key=counts.__getitem__, default=-1) for o in present]
    for k in set(rarest):
        have, want = sum(rarest[i] == k for i in chosen), rarest.count(k) / 10
        assert max(1, want - 2) <= have < want + 1
    def error(rows): return np.abs(present[rows].mean(0) - present.mean(0)).mean()
    assert error(chosen) < np.mean([error(rng.permutation(3000)[:300]) for _ in range(50)])
    assert present[chosen].any(0).all()


def test_the_order_of_the_file_does_not_count():
    rng = np.random.default_rng(0)
    present, ids, order = rng.random((200, 5)) < .3, rng.permutation(10**6)[:200], rng.permutation(200)
    a, b = stratified(index_of(present, ids), 30), stratified(index_of(present[order], ids[order]), 30)
    assert sorted(ids[a]) == sorted(ids[order][b])


def test_the_choice_is_the_same_everywhere():
    "Ids chosen on another computer: what others measured on a subset can be measured again."
    present = np.arange(60)[:, None] % np.arange(1, 5) == 0
    assert stratified(index_of(present), 6).tolist() == [6, 25, 35, 38, 44, 54]


def test_a_set_of_the_size_of_coco_takes_seconds():
    rng = np.random.default_rng(0)
    present = rng.random((118_287, 80)) < .5 * .93 ** np.arange(80)
    start = time.perf_counter()
    assert len(stratified(index_of(present), 10_000)) == 10_000
    assert time.perf_counter() - start < 20


def test_images_in_folders_crowds_and_empty_images(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path/'set')
    file, images = coco_split(root, 'train')
    doc = json.loads(file.read_text())
    (images/'deep').mkdir()
    for o in doc['images'][::2]:
        (images/o['file_name']).rename(images/'deep'/o['file_name'])
        o['file_name'] = f'deep/{o["file_name"]}'
    empty, crowd = doc['images'][0]['id'], doc['images'][1]['id']
    doc['annotations'] = [{**o, 'iscrowd': int(o['image_id'] == crowd)} for o in doc['annotations'] if o['image_id'] != empty]
    doc['licenses'] = [dict(id=1, url='https://example.org')]
    random.Random(0).shuffle(doc['annotations'])
    file.write_text(json.dumps(doc))
    small = coco_subset(root, tmp_path/'small', images=30, val_images=3)
    index, part = (load_index(*coco_split(o, 'train')) for o in (root, small))
    assert len(part) == 30 and len(list((small/'train2017').rglob('*.jpg'))) == 30
    assert json.loads(part.json_path.read_text())['licenses'] == doc['licenses']
    for i in range(30):
        j = index.image_ids.tolist().index(part.image_ids[i])
        a, b = part.target(i, every=True), index.target(j, every=True)
        assert all((a[k] == b[k]).all() for k in ('boxes', 'labels', 'iscrowd', 'area', 'status'))
        assert part.path(i).read_bytes() == index.path(j).read_bytes()


@pytest.mark.parametrize('images', [1, 2, 39, 40, 1000])
def test_every_size(toy, tmp_path, images):
    small = coco_subset(toy, tmp_path/'small', images=images)
    assert len(load_index(*coco_split(small, 'train'))) == min(images, 40)
    assert len(load_index(*coco_split(small, 'val'))) == min(max(1, images // 5), 10)
    assert coco_subset(toy, small, images=images) == small


def test_nothing_is_left_of_a_copy_that_fails(toy, tmp_path, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(shutil, 'copyfile', full)
    with pytest.raises(OSError, match='No space left'): coco_subset(toy, tmp_path/'out'/'small', images=3)
    assert list((tmp_path/'out').iterdir()) == []


def words(toy, out, *more): return ['subset', '--coco', str(toy), '--out', str(out), *map(str, more)]


def test_the_command(toy, tmp_path):
    out = tmp_path/'small'
    run = [sys.executable, '-m', 'scratchdet.coco', *words(toy, out, '--images', 6)]
    done, quiet, other = (subprocess.run([*run, *o], capture_output=True, text=True) for o in ([], ['--quiet'], ['--seed', '1']))
    assert (done.returncode, done.stdout, done.stderr) == (0, f'{out}\n', '')
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, '', '')
    assert other.returncode == 1 and not other.stdout and other.stderr.startswith('scratchdet.coco: ') and other.stderr.count('\n') == 1


def test_refusals(toy, tmp_path):
    out = tmp_path/'small'
    main(parse_args(words(toy, out, '--images', 6)))
    for root, images, says in ((toy, 7, 'give another folder'), (toy, 0, '0 images are no subset'), (tmp_path/'nowhere', 6, 'nowhere does not exist')):
        with pytest.raises(SystemExit, match=says) as e: main(parse_args(words(root, out, '--images', images)))
        assert '\n' not in str(e.value)
    (out/'subset.json').write_text('{')
    with pytest.raises(SystemExit, match='a damaged subset.json'): main(parse_args(words(toy, out, '--images', 6)))
    assert len(load_index(*coco_split(out, 'train'))) == 6


def test_real_images(coco_mini, tmp_path):
    whole = load_index(*coco_split(coco_mini, 'train'))
    small = coco_subset(coco_mini, tmp_path/'small', images=len(whole) // 2)
    part = load_index(*coco_split(small, 'train'))
    assert len(part) == len(whole) // 2 and part.names == whole.names and len(training_images(part)) > 0
    seen = [np.unique(np.concatenate([o.target(i, every=True)['labels'] for i in range(len(o))])) for o in (whole, part)]
    assert len(seen[1]) > .6 * len(seen[0])
