"The data modules: caches under faults and concurrency, plans of epochs by sweep, workers, and pycocotools as oracle."
import io
import json
import multiprocessing
import os
import pickle
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from PIL import Image

from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.loader import Batch, Sample, bucket_edges, collate, eval_loader, plan_epoch, train_loader
from scratchdet.masks import network_masks, polygons_to_mask, resize_mask, rle_counts, to_rle
from scratchdet.toy import make_toy
from scratchdet.transforms import read_image, resized_size

coco_mini = Path(os.environ.get('SCRATCHDET_COCO', Path(__file__).parents[2] / 'shared/coco-mini'))


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp('toy') / 'toy', train=24, val=6)


def splits(toy):
    "The toy set's train split, and coco-mini's two where it is."
    yield coco_split(toy, 'train')
    if coco_mini.is_dir(): yield from (coco_split(coco_mini, split) for split in ('train', 'val'))


def test_every_annotation_equals_pycocotools(toy, tmp_path):
    "Boxes, areas, categories and every mask, against COCO's own reader."
    for paths in splits(toy):
        index, seen = load_index(*paths, cache=tmp_path), 0
        with redirect_stdout(io.StringIO()): coco = COCO(str(paths[0]))
        assert index.category_ids.tolist() == sorted(coco.getCatIds())
        for i, image_id in enumerate(index.image_ids.tolist()):
            target, anns = index.target(i, every=True), coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
            assert index.arrays['annotation_ids'][target['rows']].tolist() == [o['id'] for o in anns]
            assert target['area'].tolist() == [o['area'] for o in anns]
            for mask, ann in zip(index.bitmaps(i, target['rows']), anns):
                np.testing.assert_array_equal(mask, coco.annToMask(ann))
                seen += 1
        assert seen > 40


def test_drawn_file_of_the_benchmark(tmp_path, monkeypatch):
    "At small size it is what pycocotools reads, blocks and crowds included."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / 'benchmarks'))
    from coco_index import write_coco
    images = write_coco(tmp_path / 'a.json', images=30, annotations=500, block=150)
    index = load_index(tmp_path / 'a.json', images, cache=tmp_path / 'cache')
    with redirect_stdout(io.StringIO()): coco = COCO(str(tmp_path / 'a.json'))
    assert len(index) == 30 and len(coco.anns) == len(index.arrays['labels']) == 500 and index.arrays['iscrowd'].any()
    for i, image_id in enumerate(index.image_ids.tolist()):
        anns, rows = coco.loadAnns(coco.getAnnIds(imgIds=[image_id])), index.target(i, every=True)['rows']
        assert index.arrays['annotation_ids'][rows].tolist() == [o['id'] for o in anns]
        for mask, ann in zip(index.bitmaps(i, rows), anns): np.testing.assert_array_equal(mask, coco.annToMask(ann))


def test_network_masks_equal_the_long_way(toy, tmp_path):
    "Packed masks at 800 px, mirrored or not, against resizing every bitmap."
    seen = 0
    for paths in splits(toy):
        index = load_index(*paths, cache=tmp_path)
        for i in range(4):
            h, w = index.sizes[i].tolist()
            size = resized_size(h, w)
            for mask, rle in zip(index.bitmaps(i), index.rles(i)):
                slow = resize_mask(mask, *size)
                flip = bool(seen % 2)
                want = np.packbits(slow[:, ::-1] if flip else slow, axis=1)
                np.testing.assert_array_equal(network_masks([rle], *size, flip)[0], want)
                seen += 1
    assert seen > 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_network_mask_sweep(h, w, height, width, flip, seed):
    mask = (np.random.default_rng(seed).random((h, w)) < (seed % 10) / 9).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    assert rle_counts(rle['counts']).sum() == h * w
    slow = resize_mask(mask, height, width)
    np.testing.assert_array_equal(network_masks([rle], height, width, flip)[0],
                                  np.packbits(slow[:, ::-1] if flip else slow, axis=1))


def test_run_lengths_in_every_form():
    mask = (np.random.default_rng(0).random((13, 17)) > .5).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    counts = rle_counts(rle['counts'])
    for field in (rle, dict(rle, counts=rle['counts'].decode()), dict(rle, counts=counts.tolist())):
        np.testing.assert_array_equal(polygons_to_mask(field, 13, 17), mask)
        assert to_rle(field, 13, 17)['counts'] == rle['counts']


@pytest.mark.parametrize('ring', [[0, 0, 1e9, 0, 1e9, 1e9], [0, 0, 9, 0, np.nan, 9], [0, 0, -np.inf, 0, 9, 9], [65535, 65535, -65535, -65535] * 2000])
def test_polygons_that_would_end_the_program(ring):
    "pycocotools writes more of an outline than the memory it has asked for."
    for f in (to_rle, polygons_to_mask):
        with pytest.raises(ValueError, match='its polygons are not finite, leave 65535 px, or are longer than 4194240 px'): f([ring], 40, 60)


@pytest.mark.parametrize('size', [[0, 60], [40, 61], [1, 2399]])
def test_run_lengths_of_another_image(size):
    rle = dict(to_rle([[0, 0, 9, 0, 9, 9]], 40, 60), size=size)
    with pytest.raises(ValueError, match=f'do not add up to the pixels of a {size[0]}x{size[1]} image'): network_masks([rle], 80, 120)[0]


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'I;16'])
def test_every_png_becomes_three_channels_of_bytes(tmp_path, mode):
    grey = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    image = Image.fromarray(grey if mode == 'I;16' else (grey >> 8).astype(np.uint8))
    (image if mode == 'I;16' else image.convert(mode)).save(tmp_path / 'a.png')
    got = read_image(tmp_path / 'a.png')
    assert got.dtype == torch.uint8 and got.shape == (3, 16, 32) and got.stride(0) == 1
    if mode != '1': np.testing.assert_array_equal(got[1].numpy(), grey >> 8)


def test_first_picture_of_a_film(tmp_path):
    pictures = [Image.new('RGB', (9, 5), (i * 99, 7, 3)) for i in (2, 0, 1)]
    pictures[0].save(tmp_path / 'a.gif', save_all=True, append_images=pictures[1:])
    got = read_image(tmp_path / 'a.gif')
    assert got.shape == (3, 5, 9) and got[:, 4, 8].tolist() == [198, 7, 3]


@pytest.mark.parametrize('content', [b'a text', b'', 'bmp', 'webp'])
def test_what_an_image_is_not(tmp_path, content):
    "Said in words of ours, which also fit where there are no annotations."
    path, pictures = tmp_path / 'a.jpg', [Image.new('RGB', (9, 5), o) for o in ('red', 'blue')]
    path.write_bytes(b'' if isinstance(content, str) else content)
    if content == 'bmp': pictures[0].save(path, content)
    if content == 'webp': pictures[0].save(path, content, save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError) as e: read_image(path)
    assert str(e.value).startswith(f'{path} is not an image that can be read (')
    assert 'replace the file by a whole JPEG, PNG, WebP or GIF, or leave it out' in str(e.value)
    assert 'decode_' not in str(e.value) and '/csrc/' not in str(e.value)


def test_names_of_images(tmp_path):
    "Names of any bytes are read; what is no file is said."
    Image.new('RGB', (9, 5)).save(tmp_path / 'a.png')
    odd = (tmp_path / 'a.png').rename(os.fsdecode(os.fsencode(tmp_path) + b'/\xff.png'))
    assert read_image(odd).shape == (3, 5, 9)
    with pytest.raises(FileNotFoundError, match=f'the image {tmp_path} is not a file: check the path'): read_image(tmp_path)
    for name in ('b.png', '\ud83d.png', '\0.png'):
        with pytest.raises(FileNotFoundError, match='png does not exist: check the path'): read_image(tmp_path / name)


def test_cache_goes_where_told(toy, tmp_path, monkeypatch):
    "Argument, then variable, then beside the json, then the user's folder when the json's is read-only."
    paths = coco_split(toy, 'val')
    monkeypatch.delenv('SCRATCHDET_CACHE', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert load_index(*paths).cache.parent == paths[0].parent / '.scratchdet'
    paths[0].parent.chmod(0o555)
    try: assert load_index(*paths).cache.parent == tmp_path / 'home/.cache/scratchdet'
    finally: paths[0].parent.chmod(0o755)
    monkeypatch.setenv('SCRATCHDET_CACHE', str(tmp_path / 'variable'))
    assert load_index(*paths).cache.parent == tmp_path / 'variable'
    assert load_index(*paths, cache=tmp_path / 'told').cache.parent == tmp_path / 'told'


def test_cache_is_reused_and_never_stale(toy, tmp_path):
    json_path, image_dir = coco_split(toy, 'val')
    doc = json.loads(json_path.read_text())
    own = tmp_path / 'own.json'
    own.write_text(json.dumps(doc))
    first = load_index(own, image_dir, cache=tmp_path / 'c')
    made = first.cache.stat().st_mtime_ns
    assert load_index(own, image_dir, cache=tmp_path / 'c').cache.stat().st_mtime_ns == made
    before, stat = first.arrays['boxes'].copy(), own.stat()
    row = next(i for i, o in enumerate(doc['annotations']) if not o['iscrowd'])
    doc['annotations'][row]['bbox'][0] = 9 - doc['annotations'][row]['bbox'][0] % 1
    text = json.dumps(doc)
    own.write_text(text)
    os.utime(own, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # not even the time tells
    second = load_index(own, image_dir, cache=tmp_path / 'c')
    assert second.cache != first.cache and not np.array_equal(second.arrays['boxes'], before)
    np.testing.assert_array_equal(first.arrays['boxes'], before)  # who still maps the old file keeps it


def test_cache_is_as_readable_as_the_json(toy, tmp_path):
    "Several users share a data set."
    json_path, image_dir = coco_split(toy, 'val')
    for mode in (0o644, 0o600):
        json_path.chmod(mode)
        assert load_index(json_path, image_dir, cache=tmp_path / str(mode)).cache.stat().st_mode & 0o777 == mode


def test_full_disk(toy, tmp_path, monkeypatch):
    "The error names the cache, and nothing is left of it."
    import scratchdet.coco as coco

    def full(tensors, name, metadata):
        Path(name).write_bytes(b'half')
        raise coco.SafetensorError('No space left on device')
    monkeypatch.setattr(coco, 'save_file', full)
    with pytest.raises(OSError, match='safetensors cannot be written .*No space left.*: free space, or set SCRATCHDET_CACHE'):
        load_index(*coco_split(toy, 'val'), cache=tmp_path / 'full')
    assert not list((tmp_path / 'full').iterdir())


@pytest.mark.parametrize('damage', [lambda o: o[:1000], lambda o: b'', lambda o: b'garbage' * 99, lambda o: o[:-1]])
def test_damaged_cache_is_rebuilt(toy, tmp_path, damage):
    index = load_index(*coco_split(toy, 'val'), cache=tmp_path)
    index.cache.write_bytes(damage(index.cache.read_bytes()))
    again = load_index(*coco_split(toy, 'val'), cache=tmp_path)
    assert again.names and len(again) == 6 and not list(tmp_path.glob('*.part'))


def _build(arguments):
    return load_index(*arguments[:2], cache=arguments[2]).arrays['boxes'].sum().item()


def test_processes_build_at_once(toy, tmp_path):
    with multiprocessing.get_context('fork').Pool(3) as pool:
        sums = pool.map(_build, [(*coco_split(toy, 'train'), tmp_path)] * 6)
    assert len(set(sums)) == 1 and [o.suffix for o in tmp_path.iterdir()] == ['.safetensors']


def test_index_in_another_process(toy, tmp_path):
    "Pickling sends names of files and the chosen rows, not arrays."
    index = load_index(*coco_split(toy, 'train'), cache=tmp_path).subset([5, 3])
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    assert copy.image_ids.tolist() == index.image_ids.tolist() and copy.path(1) == index.path(1)


def test_odd_file_names(tmp_path):
    "Folders below the image folder, and letters beyond ASCII of several lengths."
    names = ['a/b.png', 'ünï.png', 'with space.png', 'x' * 60 + '.png', '日本.png', 'a..b.png']
    doc = dict(images=[dict(id=i, file_name=o, height=4, width=4) for i, o in enumerate(names)],
               categories=[dict(id=1, name='ü')], annotations=[])
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'a.json').write_text(json.dumps(doc, ensure_ascii=False))
    index = load_index(tmp_path / 'a.json', tmp_path, cache=tmp_path / 'cache')
    assert [str(index.path(i).relative_to(tmp_path)) for i in range(6)] == names and index.names == ('ü',)


def test_order_of_categories_does_not_matter(toy, tmp_path):
    "Labels follow the ids, so that train and val agree."
    json_path, image_dir = coco_split(toy, 'val')
    doc = json.loads(json_path.read_text())
    doc['categories'].reverse()
    (tmp_path / 'a.json').write_text(json.dumps(doc))
    a, b = load_index(json_path, image_dir, cache=tmp_path), load_index(tmp_path / 'a.json', image_dir, cache=tmp_path)
    assert a.names == b.names
    np.testing.assert_array_equal(a.arrays['labels'], b.arrays['labels'])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(20, 700), st.integers(20, 700)), min_size=1, max_size=70), st.integers(1, 17),
       st.integers(0, 5), st.booleans(), st.sampled_from([(800,), (640, 672, 800), (64,)]))
def test_plan_sweep(sizes, batch_size, epoch, buckets, shorts):
    "ceil(n/B) batches of B, every image, one orientation but for one batch, shapes that hold and are multiples of 32."
    plan = plan_epoch(np.array(sizes), batch_size, 1, epoch, shorts, 1333, buckets=buckets)
    assert len(plan) == -(-len(sizes) // batch_size)
    images = np.concatenate([o.images for o in plan])
    assert set(images.tolist()) == set(range(len(sizes))) and len(images) == len(plan) * batch_size
    mixed = 0
    for o in plan:
        tall = o.sizes[:, 0] > o.sizes[:, 1]
        mixed += 0 < tall.sum() < len(tall)
        assert (o.sizes <= o.shape).all() and o.shape[0] % 32 == o.shape[1] % 32 == 0
        for i, size in zip(o.images, o.sizes): assert any(tuple(size) == resized_size(*sizes[i], s, 1333) for s in shorts)
    assert mixed <= 1


def test_padding_is_tight():
    "On COCO's usual sizes buckets pad under 5 %, and only ever a few shapes."
    common = [(480, 640), (640, 480), (427, 640), (640, 427), (375, 500), (500, 375), (612, 612), (360, 640)]
    sizes = np.array(common)[np.random.default_rng(0).integers(0, 8, 4000)]
    plan = plan_epoch(sizes, 16)
    content, area = sum(o.sizes.prod(1).sum() for o in plan), sum(16 * np.prod(o.shape) for o in plan)
    assert area / content < 1.05
    assert len({o.shape for o in plan}) <= 2 * len(bucket_edges())


def test_workers_and_processes_change_nothing(toy, tmp_path):
    "Every tensor of every batch, for one process, workers, and shares of several processes."
    index = training_images(load_index(*coco_split(toy, 'train'), cache=tmp_path))
    how = dict(batch_size=4, seed=3, epoch=2, short_sides=(64, 96), long_side=120)
    whole, workers = list(train_loader(index, **how)), list(train_loader(index, **how, workers=2))
    assert len(whole) == len(workers) == -(-len(index) // 4)
    for a, b in zip(whole, workers):
        for name, value in vars(a).items():
            if name != 'skipped': assert torch.equal(value, getattr(b, name)), name
        assert a.skipped is b.skipped is None
    shares = [list(train_loader(index, **how, process=p, processes=2, accumulation=2)) for p in range(2)]
    for k, a in enumerate(whole):
        parts = [shares[p][2 * k + j] for j in range(2) for p in range(2)]
        for name in ('images', 'sizes', 'image_ids'):
            assert torch.equal(getattr(a, name), torch.cat([getattr(o, name) for o in parts]))
        assert a.valid.sum() == sum(o.valid.sum() for o in parts)
        m = max(o.boxes.shape[1] for o in parts)
        assert m == a.boxes.shape[1]


def test_resuming_in_the_middle(toy, tmp_path):
    index = training_images(load_index(*coco_split(toy, 'train'), cache=tmp_path))
    how = dict(batch_size=4, seed=3, short_sides=(64,), long_side=120)
    ids = lambda **more: [o.image_ids.tolist() for o in train_loader(index, **how, **more)]
    for start in range(len(ids()) + 1): assert ids(start=start) == ids()[start:]


def test_eval_sees_every_image_once(toy, tmp_path):
    index = load_index(*coco_split(toy, 'train'), cache=tmp_path)
    for processes in (1, 2, 3):
        seen = []
        for p in range(processes):
            for batch, originals in eval_loader(index, batch_size=5, process=p, processes=processes, short=64, long=100, workers=p):
                seen += batch.image_ids.tolist()
                assert originals.shape == (len(batch), 2) and originals.dtype == torch.int64
        assert sorted(seen) == sorted(index.image_ids.tolist())


wrong = {  # what is wrong with sample 1: (change, what the error must say)
    'pixels from 0 to 1': (lambda o: dict(image=o.image / 255), 'image of sample 1 (image 7): (3, 40, 60) torch.float32, not (3, h, w) uint8'),
    'pixels of 16 bits': (lambda o: dict(image=o.image.to(torch.uint16)), 'torch.uint16, not (3, h, w) uint8'),
    'one channel': (lambda o: dict(image=o.image[:1]), '(1, 40, 60) torch.uint8, not (3, h, w) uint8'),
    'channels last': (lambda o: dict(image=o.image.permute(1, 2, 0)), '(40, 60, 3) torch.uint8, not (3, h, w)'),
    'a film': (lambda o: dict(image=o.image[None]), '(1, 3, 40, 60) torch.uint8, not (3, h, w)'),
    'an image beyond the shape': (lambda o: dict(image=o.image.repeat(1, 2, 1)), '(3, 80, 60) torch.uint8, not (3, h, w) uint8 within 64x64 px'),
    'boxes of five': (lambda o: dict(boxes=torch.zeros(2, 5)), 'boxes of sample 1 (image 7): (2, 5) torch.float32, not (2, 4) finite'),
    'boxes that are nan': (lambda o: dict(boxes=o.boxes * torch.nan), 'not (2, 4) finite numbers'),
    'boxes without end': (lambda o: dict(boxes=o.boxes / 0), 'not (2, 4) finite numbers'),
    'too few labels': (lambda o: dict(labels=o.labels[:1]), 'labels of sample 1 (image 7): (1,) torch.int64, not (2,) whole'),
    'labels below 0': (lambda o: dict(labels=o.labels - 4), 'not (2,) whole numbers from 0'),
    'real labels': (lambda o: dict(labels=o.labels / 2), '(2,) torch.float32, not (2,) whole numbers'),
    'no masks': (lambda o: dict(masks=None), 'masks of sample 1 (image 7): None, not as in sample 0'),
}


@pytest.mark.parametrize('name', wrong)
def test_wrong_samples(name):
    change, message = wrong[name]
    good = Sample(torch.zeros(3, 40, 60, dtype=torch.uint8), torch.ones(2, 4), torch.tensor([3, 0]), torch.zeros(2, 40, 60, dtype=torch.bool), 7)
    assert len(collate([good, good], (64, 64))) == 2
    with pytest.raises(ValueError) as e: collate([good, good._replace(**change(good))], (64, 64))
    assert message in str(e.value)


def test_masks_in_one_sample_of_two_and_no_samples():
    one = Sample(torch.zeros(3, 4, 6, dtype=torch.uint8), torch.ones(1, 4), torch.tensor([3]))
    with pytest.raises(ValueError, match=r'masks of sample 1 .*\(1, 4, 6\) torch.bool, not as in sample 0'):
        collate([one, one._replace(masks=torch.zeros(1, 4, 6, dtype=torch.bool))])
    with pytest.raises(ValueError, match='a batch needs a sample'): collate([])


def test_types_of_a_batch():
    "Dtypes and layouts that the detector relies on."
    image = torch.randint(0, 255, (3, 50, 70), dtype=torch.uint8)
    one = (image, torch.tensor([[1., 2, 30, 40]]), torch.tensor([3]), torch.ones(1, 50, 70, dtype=torch.bool), 7)
    none = (image[:, :20], torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 20, 70, dtype=torch.bool), 8)
    batch = collate([one, none])
    kinds = {k: (tuple(v.shape), v.dtype) for k, v in vars(batch).items() if v is not None}
    assert kinds == dict(images=((2, 3, 64, 96), torch.uint8), sizes=((2, 2), torch.int64), image_ids=((2,), torch.int64),
                         boxes=((2, 1, 4), torch.float32), labels=((2, 1), torch.int64), valid=((2, 1), torch.bool),
                         masks=((2, 1, 64, 12), torch.uint8))
    assert batch.images.is_contiguous(memory_format=torch.channels_last) and isinstance(batch.to('cpu'), Batch)
    assert collate([none]).valid.tolist() == [[False]]
