"""Input that lies, drawn by hypothesis: annotation files, targets, model files.

Each input ends in an error that names the file and the record, or in data that are sound. `SCRATCHDET_FUZZ=100000` draws that many,
and others each time.
"""
import io
import json
import os
import pickle
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pycocotools import mask as coco_mask
from safetensors.torch import save
from torchvision.io import write_png

from scratchdet.checkpoints import model_arguments, read_state
from scratchdet.coco import load_index
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.evaluate import eval_scale
from scratchdet.init import init_detector
from scratchdet.loader import collate, load_sample
from scratchdet.masks import longest
from scratchdet.predict import categories, predict
from scratchdet.records import ignored, skipped, trained
from scratchdet.weights import load_model, load_weights, read_meta, save_model

wanted = int(os.environ.get('SCRATCHDET_FUZZ', 0))
inputs = Counter()


def fuzz(share):
    "Draw this part of all inputs; the same ones each time unless a number was asked for."
    return settings(max_examples=round(share * (wanted or 2400)), derandomize=not wanted, database=None, deadline=30_000,
                    suppress_health_check=list(HealthCheck))


def count(what): inputs[what] += 1


# ---------------------------------------------------------------- an annotation file, and what an index of it must be

half = dict(size=[40, 60], counts=[1200, 1200])
string = coco_mask.frPyObjects(half, 40, 60)['counts'].decode()
triangle, square = [5, 5, 25, 5.5, 25, 25.25], [30, 10, 50, 10, 50, 30, 30, 30]


def copy(o): return json.loads(json.dumps(o))


def document():
    "A good file: three images of 40x60, six objects with polygons and run lengths in every form."
    ann = lambda id, image, shape, **more: dict(id=id, image_id=image, category_id=5, bbox=[5, 5, 40.5, 20], area=810, iscrowd=0,
                                                segmentation=shape, **more)
    doc = dict(info=dict(year=2017), licenses=[],
               images=[dict(id=i, file_name=name, height=40, width=60) for i, name in enumerate(('1.png', '2.png', 'sub/3.png'), 1)],
               annotations=[ann(10, 3, [triangle]), ann(11, 1, [triangle, square]), ann(12, 2, half), ann(13, 2, dict(half, counts=string)),
                            dict(ann(14, 2, half), iscrowd=1), ann(15, 1, [square], ignore=1)],
               categories=[dict(id=5, name='cat'), dict(id=9, name='dog')])
    return copy(doc)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder of images with links that lead out of it, and a secret beside it."
    root = tmp_path_factory.mktemp('fuzz')
    (root / 'images/sub').mkdir(parents=True)
    for name in ('images/1.png', 'images/2.png', 'images/sub/3.png', 'secret.png'):
        write_png(torch.full((3, 40, 60), 90, dtype=torch.uint8), str(root / name))
    for link, to in (('out.png', root / 'secret.png'), ('away', root), ('gone.png', root / 'nothing.png'), ('loop.png', 'loop.png'),
                     ('same.png', '1.png')): (root / 'images' / link).symlink_to(to)
    return root


def read(place, text):
    "The index of a file, or the message of the error, which names the file."
    (place / 'a.json').write_bytes(text)
    shutil.rmtree(place / 'cache', ignore_errors=True)
    try: return load_index(place / 'a.json', place / 'images', cache=place / 'cache')
    except (ValueError, OSError) as e:
        assert type(e) in (ValueError, FileNotFoundError) and str(place / 'a.json') in str(e), repr(e)
        assert len(str(e)) < 3000
        return str(e)


def encode(doc):
    "A document as json; the word <deep 99> becomes a list in a list in a list..."
    deep = lambda m: '[' * int(m[1]) + ']' * int(m[1])
    return re.sub(r'"<deep (\d+)>"', deep, json.dumps(doc)).encode()


def check_offsets(first, last):
    assert first[0] == 0 and first[-1] == last and (np.diff(first) >= 0).all()


def check_arrays(index):
    "Every array is finite, of its shape, and points into the others."
    a, n, t = index.arrays, len(index.image_ids), len(index.arrays['labels'])
    for k, v in a.items(): assert np.isfinite(v).all(), k
    assert len(set(a['image_ids'].tolist())) == n and len(set(a['annotation_ids'].tolist())) == t
    assert a['sizes'].shape == (n, 2) and 1 <= a['sizes'].min() and a['sizes'].max() <= longest
    assert len(index.names) == len(a['category_ids']) and (np.diff(a['category_ids']) > 0).all()
    if t: assert 0 <= a['labels'].min() and a['labels'].max() < len(index.names)
    assert set(a['status'].tolist()) <= {trained, ignored, skipped} and a['boxes'].shape == (t, 4)
    check_offsets(a['first'], t)
    check_offsets(a['rle_first'], len(a['rle']))
    check_offsets(a['ring_first'], len(a['coord_first']) - 1)
    check_offsets(a['coord_first'], len(a['coords']))
    assert len(a['first']) == n + 1 and len(a['rle_first']) == len(a['ring_first']) == t + 1
    assert (np.diff(a['coord_first']) >= 6).all() and (np.diff(a['coord_first']) % 2 == 0).all()


def check_image(index, i, root):
    "The image lies in its folder; boxes that are trained on touch it; every mask can be drawn."
    assert os.path.realpath(index.path(i)).startswith(str(root / 'images'))
    target, (h, w) = index.target(i), index.sizes[i].tolist()
    x0, y0, x1, y1 = target['boxes'].double().unbind(1)
    assert ((x0 <= w) & (y0 <= h) & (x1 >= 0) & (y1 >= 0) & (x1 > x0) & (y1 > y0)).all()
    assert (target['status'] == trained).all() and not target['iscrowd'].any()
    rows = [o for o in index.target(i, every=True)['rows'] if index.segmentation(o)]
    if h * w < 1e6: assert index.bitmaps(i, rows).shape == (len(rows), h, w)


def samples_of(index):
    "What training reads of the images, for those that can be read; an error names the image."
    found = []
    for i in range(min(len(index), 4)):
        try: found.append(load_sample(index, i, (40, 60), flip=bool(i % 2)))
        except (ValueError, FileNotFoundError) as e:
            assert re.search(r'\.png|annotation -?\d+ has no segmentation', str(e)), repr(e)
    return found


def sound(index, root):
    "Check an index and the batch made from it; returns the batch, or None where nothing can be read."
    check_arrays(index)
    for i in range(min(len(index), 4)): check_image(index, i, root)
    samples = samples_of(index)
    if not samples: return None
    batch = collate(samples)
    boxes, sizes = batch.boxes[batch.valid], batch.sizes[batch.valid.nonzero()[:, 0]]
    assert torch.isfinite(boxes).all() and (boxes >= 0).all() and (boxes[:, 2:] <= sizes.flip(1)).all()
    return batch


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return init_detector(mask_rcnn(8, blocks=(1, 1, 1, 1), width=8, channels=8, fc=16, groups=4, batch_size_per_image=16,
                                   rpn=dict(pre_nms_topk=(50, 50), post_nms_topk=(20, 20)))).train()


def check_losses(model, batch):
    "Losses and gradients of a batch are finite."
    losses = model(batch)
    model.zero_grad()
    sum(losses.values()).backward()
    assert len(losses) == 5 and all(torch.isfinite(o) for o in losses.values()), losses
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_good_document(place, model):
    index = read(place, encode(document()))
    assert [len(index.target(i)['boxes']) for i in range(3)] == [1, 2, 1]
    batch = sound(index, place)
    assert batch.valid.sum() == 4 and batch.masks.any()
    check_losses(model, batch)


# ---------------------------------------------------------------- anything

edges = [0, 1, -1, 2, 6, 39, 40, 59, 60, 61, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -2**63 - 1,
         10**30, 10**400, .5, 1., -0., 1e-320, 1e-9, 59.9999999, 1e15, 1e308, -1e308, float('nan'), float('inf'), -float('inf')]
words = ['', '1', '1.png', 'same.png', '../secret.png', 'out.png', 'away/secret.png', 'away/images/1.png', 'gone.png', 'loop.png', '/etc/passwd', '.', 'sub',
         'sub/', '\ud800', '\0', '\u202e', 'é' * 300, 'cat', 'NaN', 'true', string, string[:-1]]
numbers = st.sampled_from(edges) | st.integers(-70, 70) | st.floats()
leaves = st.none() | st.booleans() | numbers | st.sampled_from(words) | st.text(max_size=6) | st.integers(1, 3000).map('<deep {}>'.format)
keys = st.sampled_from(['id', 'size', 'counts', 'bbox', 'segmentation']) | st.text(max_size=3)
values = st.recursive(leaves, lambda o: st.lists(o, max_size=8) | st.dictionaries(keys, o, max_size=4), max_leaves=12)
shapes = st.lists(st.lists(numbers, max_size=12), max_size=3) | st.fixed_dictionaries(
    dict(size=st.just([40, 60]) | values, counts=st.lists(st.integers(0, 2400), max_size=5) | st.text('0123456789:;?PQo', max_size=9) | values))


def spots(o):
    "Every place in a document: (container, key)."
    for k in list(o) if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ():
        yield o, k
        yield from spots(o[k])


def spot(draw, doc):
    "One of the places."
    found = list(spots(doc))
    return found[draw(st.integers(0, len(found) - 1))]


@st.composite
def changed(draw):
    "The good document with up to three changes anywhere."
    doc = document()
    for _ in range(draw(st.integers(1, 3))):
        where, key = spot(draw, doc)
        what = draw(st.sampled_from(['set', 'set', 'shape', 'delete', 'copy', 'move']))
        if what == 'set': where[key] = copy(draw(values))
        elif what == 'shape' and doc.get('annotations') and isinstance(doc['annotations'], list):
            row = doc['annotations'][draw(st.integers(0, len(doc['annotations']) - 1))]
            if isinstance(row, dict): row['segmentation'] = copy(draw(shapes))
        elif what == 'delete': del where[key]
        elif what == 'copy' and isinstance(where, list): where.append(copy(where[key]))
        elif what == 'move':
            other, k = spot(draw, doc)
            where[key] = copy(other[k])
        if not doc: break
    return encode(doc)


@fuzz(.5)
@given(text=changed())
def test_changed_documents(place, model, text):
    count('changed documents')
    index = read(place, text)
    if isinstance(index, str): return
    batch = sound(index, place)
    if batch is not None and batch.labels.max() < 8 and inputs['changed documents'] % 8 == 0:
        count('of them through the detector')
        check_losses(model, batch)


@st.composite
def torn(draw):
    "The bytes of the good document, cut, or with bytes put in, or something else altogether."
    text, kind = encode(document()), draw(st.sampled_from(['cut', 'put', 'swap', 'other']))
    if kind == 'other': return kind, draw(st.binary(max_size=60))
    at = draw(st.integers(0, len(text) - 1))
    if kind == 'cut': return kind, text[:at]
    more = draw(st.binary(max_size=3) | st.sampled_from([b'"', b'\\', b'[', b']', b'{', b'}', b',', b':', b'-', b'e', b'0', b'\xef\xbb\xbf']))
    return kind, text[:at] + more + text[at + (kind == 'swap') * max(1, len(more)):]


@fuzz(.15)
@given(case=torn())
def test_torn_files(place, case):
    count('torn files')
    kind, text = case
    index = read(place, text)
    if isinstance(index, str): return
    assert kind not in ('cut', 'other')
    sound(index, place)


# ---------------------------------------------------------------- what is known to be wrong is never taken

no_number = st.none() | st.booleans() | st.text(max_size=4) | st.lists(st.integers(), max_size=2) | st.just('<deep 90>') | st.just({})
no_integer = no_number | st.floats() | st.sampled_from([1., 2**63, -2**63 - 1, 2**64, 10**400])
no_coordinate = no_number | st.sampled_from([float('nan'), float('inf'), -float('inf'), 65536, -65536, 65535.01, 1e308, 10**400, 2**63])
no_side = no_integer | st.integers(max_value=0) | st.integers(min_value=65536)
no_flag = no_integer.filter(lambda o: not isinstance(o, bool)) | st.integers(max_value=-1) | st.integers(min_value=2)
no_area = no_number | st.sampled_from([float('nan'), float('inf'), 1e300, -1e300, 10**400])
leaving = st.builds('{}../{}'.format, st.sampled_from(['', '../', 'sub/../', 'a/../../', '/']), st.sampled_from(['1.png', '', 'secret.png'])) | \
    st.sampled_from(['', '/', '/etc/passwd', '//1.png', '..', 'sub/..', r'..\1.png', r'a\..\..\b.png', r'\1.png', r'C:\1.png', 'c:/1.png',
                     '1.png\0', '\0', '\ud800.png', 'sub/\udfff', 'out.png', 'away/secret.png', 'gone.png']) | no_number.filter(
                         lambda o: not isinstance(o, str) or o == '<deep 90>') | st.integers()
missing = st.sampled_from(['9.png', '1.PNG', '1.png ', 'sub', 'sub/', '.', 'sub/9.png', '1.png/', 'x' * 300, 'x/' * 3000])
pixels = half['size'][0] * half['size'][1]
no_runs = st.one_of(
    no_number.filter(lambda o: not isinstance(o, list)), st.integers(),
    st.lists(st.integers(0, 2400), max_size=6).filter(lambda o: sum(o) != pixels),
    st.lists(st.integers(1, 99), min_size=1, max_size=4).map(lambda o: [-sum(o), *o, pixels]),
    st.sampled_from([[1200., 1200.], [True, 2399], [[2400]], ['2400'], [None], [2**62] * 4 + [2400], [2**64, 2400 - 2**64], string[:-1], string + '1',
                     '', '~', '\x00', 'é', '\ud800', 'o' * 50, 'o' * 50 + '0', string + string]))
no_size = no_number | st.integers() | st.sampled_from([[60, 40], [40], [40, 60, 1], [0, 0], [-40, -60], [None, None], ['40', '60'], [[40], [60]], {}])
no_ring = st.none() | st.booleans() | numbers | st.text(max_size=4) | st.just({})
no_shape = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(no_ring, min_size=1, max_size=4),
    st.builds(lambda o, i: [triangle[:i] + [o] + triangle[i:]], no_coordinate, st.integers(0, 6)),
    st.builds(lambda o: [triangle, [o]], no_coordinate), no_runs.map(lambda o: dict(half, counts=o)), no_size.map(lambda o: dict(half, size=o)),
    st.sampled_from([{}, dict(size=[40, 60]), dict(counts=[2400])]))

bad_values = dict(
    images=dict(id=no_integer, file_name=leaving | missing, height=no_side, width=no_side),
    categories=dict(id=no_integer, name=no_number.filter(lambda o: not isinstance(o, str)) | st.integers() | st.sampled_from(['\ud800', 'a\0'])),
    annotations=dict(
        id=no_integer, image_id=no_integer | st.sampled_from([0, 4, -1, 2**62]), category_id=no_integer | st.sampled_from([0, 1, 6, 90]),
        bbox=no_number | st.lists(numbers, max_size=3) | st.lists(st.integers(0, 9), min_size=5, max_size=6) | st.builds(
            lambda o, i: [*[5] * i, o, *[5] * (3 - i)], no_coordinate, st.integers(0, 3)),
        area=no_area, iscrowd=no_flag, ignore=no_flag, segmentation=no_shape))
optional = {'iscrowd', 'ignore', 'segmentation'}


@st.composite
def wrong_records(draw):
    "A document with one wrong record, and the words of which the error must have one."
    doc = document()
    kind = draw(st.sampled_from(['annotations', 'annotations', 'images', 'categories']))
    i = draw(st.integers(0, len(doc[kind]) - 1))
    row, what = doc[kind][i], draw(st.sampled_from(['value', 'value', 'value', 'value', 'missing', 'twice', 'record', 'list']))
    names = [f'{kind}[{i}]', f'annotation {row["id"]} ', f'annotation {row["id"]}:'] if kind == 'annotations' else \
        [f'{kind}[{i}]', f'image {row["id"]} ', f'(image {row["id"]})']
    if what == 'value':
        key = draw(st.sampled_from(sorted(bad_values[kind])))
        row[key] = draw(bad_values[kind][key])
        if key == 'id': names = [f'{kind}[{i}]']
    elif what == 'missing': del row[draw(st.sampled_from(sorted(set(row) - optional)))]
    elif what == 'twice':
        doc[kind].insert(draw(st.integers(0, len(doc[kind]))), row)
        names = [f'the id {row["id"]} occurs 2 times in `{kind}`']
    elif what == 'record': doc[kind][i], names = draw(no_ring.filter(lambda o: o != {})), [f'list of records `{kind}`']
    else: doc[kind], names = draw(no_ring), [f'list of records `{kind}`']
    return encode(doc), names


@fuzz(.3)
@given(case=wrong_records())
def test_wrong_records_are_named(place, case):
    count('wrong records')
    message = read(place, case[0])
    assert isinstance(message, str), 'accepted'
    assert any(o in message for o in case[1]), (case[1], message)


# ---------------------------------------------------------------- targets

side = st.floats(0, 64, width=32) | st.sampled_from([0., 1e-30, 1e-7, .5, 1., 31.999998, 32., 63.99999, 64.])


@st.composite
def targets(draw):
    "Two images of 64 px with up to six boxes each, of any size down to nothing, and masks that need not agree with them."
    samples, seed = [], draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    for _ in range(2):
        xy = torch.tensor(draw(st.lists(st.tuples(side, side, side, side), max_size=6)), dtype=torch.float32).reshape(-1, 2, 2)
        boxes = torch.cat([xy.amin(1), xy.amax(1)], 1)
        masks = torch.rand(len(boxes), 64, 64, generator=g) < draw(st.sampled_from([0., .5, 1.]))
        samples.append((torch.zeros(3, 64, 64, dtype=torch.uint8), boxes, torch.arange(len(boxes)) % 8, masks, draw(st.integers(-2**63, 2**63 - 1))))
    return collate(samples)


@fuzz(.05)
@given(batch=targets())
def test_targets_of_any_size(model, batch):
    count('targets')
    check_losses(model, batch)


# ---------------------------------------------------------------- model files

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A folder with a good model file, and its bytes."
    folder = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    small = faster_rcnn(2, blocks=(1, 1, 1, 1), width=4, channels=4, fc=4, groups=2)
    return SimpleNamespace(folder=folder, model=small, data=save_model(folder / 'good.safetensors', small, dict(category_ids=[1, 2])).read_bytes(),
                           mark=folder / 'code_ran')


class Payload:
    "Pickled, it makes a file when it is read."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def pickles(mark, kind):
    "A harmful file in one of the forms that `torch.load` knows."
    bad, tensor = Payload(mark), torch.zeros(2)
    doc = dict(bare=bad, state_dict=dict(state_dict={'a': tensor, 'b': bad}), name={bad: tensor}, meta=dict(model={'a': tensor}, meta=bad))
    form, _, what = kind.partition(' ')
    if form == 'pickle': return pickle.dumps(doc[what])
    out = io.BytesIO()
    torch.save(doc[what], out, _use_new_zipfile_serialization=form == 'zip')
    return out.getvalue()


def refused(reader, path):
    "The error of a reader names the file."
    with pytest.raises((ValueError, OSError)) as e: reader(path)
    assert path.name in str(e.value), repr(e.value)


@pytest.mark.parametrize('what', ['bare', 'state_dict', 'name', 'meta'])
@pytest.mark.parametrize('form', ['pickle', 'zip', 'old'])
def test_pickles_never_run(files, form, what):
    data = pickles(files.mark, f'{form} {what}')
    if form == 'pickle':
        pickle.loads(data)
        assert files.mark.is_dir(), 'the payload is none'
        files.mark.rmdir()
    for suffix in ('.safetensors', '.pth', '.pt', '.bin', ''):
        path = files.folder / f'bad{suffix}'
        path.write_bytes(data)
        for reader in (read_state, read_meta, load_model):
            count('pickles with a payload')
            refused(reader, path)
            assert not files.mark.exists()


def header(data): return json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]])


def with_header(data, new, length=None):
    "The same tensors under another header."
    text = new if isinstance(new, bytes) else encode(new)
    return struct.pack('<Q', len(text) if length is None else length) + text + data[8 + struct.unpack('<Q', data[:8])[0]:]


@st.composite
def damaged(draw, data):
    "The bytes of a model file, damaged or lying."
    kind = draw(st.sampled_from(['cut', 'bytes', 'length', 'header', 'tensor']))
    if kind == 'cut': return kind, data[:draw(st.integers(0, len(data) - 1))]
    if kind == 'bytes': return kind, draw(st.binary(max_size=80))
    if kind == 'length': return kind, with_header(data, header(data), draw(st.sampled_from([0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])))
    head = header(data)
    name = draw(st.sampled_from(sorted(set(head) - {'__metadata__'})))
    if kind == 'header': head[name] = draw(values)
    else:
        key = draw(st.sampled_from(['dtype', 'shape', 'data_offsets']))
        head[name][key] = draw(values | st.sampled_from(['F64', 'I8', [2**40], [-1], [0, 2**62]]))
    return kind, with_header(data, head)


def outcome(reader, path):
    "What the reader returns, or None for an error that names the file."
    try: return reader(path)
    except (ValueError, OSError) as e: assert path.name in str(e), repr(e)


@fuzz(.1)
@given(data=st.data())
def test_damaged_model_files(files, data):
    count('damaged model files')
    _, content = data.draw(damaged(files.data))
    path = files.folder / 'damaged.safetensors'
    path.write_bytes(content)
    assert outcome(load_model, path) is None
    state = outcome(read_state, path)
    if state is not None:
        with pytest.raises(ValueError): load_weights(files.model, state, str(path))
        try: model_arguments(state)
        except ValueError: pass


@fuzz(.05)
@given(content=st.binary(max_size=99), suffix=st.sampled_from(['.pth', '.pt', '']))
def test_random_checkpoints(files, content, suffix):
    count('random checkpoints')
    path = files.folder / f'random{suffix}'
    path.write_bytes(content)
    assert outcome(read_state, path) is None


@st.composite
def lies(draw, model):
    "Metadata of a model file that are not what they should be."
    arguments, meta = dict(model.arguments), dict(category_ids=[1, 2], category_names=['a', 'b'])
    about, key, part = dict(arguments=arguments, meta=meta), 'scratchdet', draw(st.sampled_from(['arguments', 'meta']))
    kind = draw(st.sampled_from(['argument', 'meta', 'part', 'missing', 'text', 'key']))
    if kind == 'argument': arguments[draw(st.sampled_from(sorted(arguments)) | keys)] = draw(values)
    elif kind == 'meta': meta[draw(st.sampled_from(['category_ids', 'category_names', 'short_side', 'long_side']) | keys)] = draw(values)
    elif kind == 'part': about[part] = draw(values.filter(lambda o: not isinstance(o, dict)))
    elif kind == 'missing': del about[part]
    elif kind == 'key': key = draw(st.sampled_from(['', 'pt', 'scratchdet ', '1']))
    text = draw(st.text(st.characters(exclude_categories=['Cs']), max_size=9)) if kind == 'text' else encode(about).decode()
    return kind, {key: text}


@fuzz(.1)
@given(data=st.data())
def test_lying_metadata(files, data):
    count('lying metadata')
    kind, about = data.draw(lies(files.model))
    path = files.folder / 'lying.safetensors'
    path.write_bytes(save(files.model.state_dict(), about))
    model = outcome(load_model, path)
    if model is not None:
        assert kind in ('argument', 'meta')
        assert len(categories(model)) == 2 and min(eval_scale(model.meta)) > 0
        predict(model, [torch.zeros(3, 20, 30, dtype=torch.uint8)], short=32, long=48)
        assert isinstance(model.meta, dict) and {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in files.model.state_dict().items()}


def test_number_of_inputs(capsys):
    "Enough were drawn; the number is shown."
    if not {'changed documents', 'wrong records', 'lying metadata'} <= set(inputs): pytest.skip('a part of this file was chosen')
    total = sum(v for k, v in inputs.items() if not k.startswith('of them'))
    with capsys.disabled(): print(f'\n{total} fuzzed inputs:', ', '.join(f'{v} {k}' for k, v in inputs.items()))
    assert total >= max(2000, .6 * wanted)
