"Bad annotation files and images: each error names the file, the record and the way out."
import json

import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg, write_png

from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.records import _parse, ignored, skipped, trained
from scratchdet.loader import eval_loader, load_sample, train_loader
from scratchdet.transforms import read_image


def document():
    "A good file: two images of 40x60, two categories, a polygon, run lengths and a crowd."
    half = dict(size=[40, 60], counts=[1200, 1200])
    ann = lambda id, image, box, **more: dict(id=id, image_id=image, category_id=5, bbox=box, area=box[2] * box[3],
                                              iscrowd=0, **more)
    return dict(images=[dict(id=i, file_name=f'{i}.png', height=40, width=60) for i in (1, 2)],
                categories=[dict(id=5, name='cat'), dict(id=9, name='dog')],
                annotations=[ann(10, 1, [5, 5, 20, 20], segmentation=[[5, 5, 25, 5, 25, 25, 5, 25]]),
                             ann(11, 2, [30, 0, 30, 40], segmentation=half),
                             dict(ann(12, 2, [30, 0, 30, 40], segmentation=half), iscrowd=1)])


@pytest.fixture
def write(tmp_path):
    "Writes images and a document; returns a function that loads its index."
    (tmp_path / 'images').mkdir()
    for i in (1, 2): write_png(torch.full((3, 40, 60), 40 * i, dtype=torch.uint8), str(tmp_path / f'images/{i}.png'))

    def load(doc):
        text = doc if isinstance(doc, (str, bytes)) else json.dumps(doc)
        (tmp_path / 'a.json').write_bytes(text.encode() if isinstance(text, str) else text)
        return load_index(tmp_path / 'a.json', tmp_path / 'images', cache=tmp_path / 'cache')
    return load


def edited(change):
    "The good document after `change(document)`."
    doc = document()
    change(doc)
    return doc


def set_ann(key, value, i=0):
    return lambda doc: doc['annotations'][i].__setitem__(key, value)


def set_image(key, value, i=0):
    return lambda doc: doc['images'][i].__setitem__(key, value)


def test_the_good_document_loads(write):
    index = write(document())
    assert len(training_images(index)) == 2 and index.names == ('cat', 'dog')
    batch = next(iter(train_loader(index, batch_size=2, short_sides=(40,), long_side=60)))
    assert batch.valid.sum() == 2 and batch.masks.any()


not_coco = {
    'empty file': ('', 'is not json'),
    'cut off': (json.dumps(document())[:200], 'is not json'),
    'binary': (b'\x80\x81\xff', 'is not json'),
    'a list': ([1], 'not a COCO instances file but a list'),
    'a number': ('3', 'not a COCO instances file but a int'),
    'captions': (dict(images=document()['images'], categories=[dict(id=1, name='a')]), 'list of records `annotations`'),
    'results': ([dict(image_id=1, score=.5)], 'not a COCO instances file'),
    'no images': ({**document(), 'images': []}, 'its list `images` is empty'),
    'no categories': ({**document(), 'categories': []}, 'its list `categories` is empty'),
    'images by id': ({**document(), 'images': {'1': {}}}, 'list of records `images`'),
    'not records': ({**document(), 'annotations': [1, 2]}, 'list of records `annotations`'),
}


@pytest.mark.parametrize('name', not_coco)
def test_not_coco(write, name):
    doc, message = not_coco[name]
    with pytest.raises(ValueError) as e: write(doc)
    assert message in str(e.value) and 'a.json' in str(e.value)


deep = [0, 0, 1, 1, 2]


def nested(depth):
    "A list in a list in a list ..."
    out = [1]
    for _ in range(depth): out = [out]
    return out


bad_records = {  # what is wrong: (change, what the error must say)
    'image without id': (lambda d: d['images'][1].pop('id'), ['images[1]', '`id` None', 'not int']),
    'image id is text': (set_image('id', '1'), ['images[0]', "`id` '1'", 'not int']),
    'image id is real': (set_image('id', 1.), ['images[0] (id 1.0)', '`id` 1.0', 'not int']),
    'image id is a truth': (set_image('id', True), ['images[0] (id True)', 'not int']),
    'image id of 80 bits': (set_image('id', 1 << 80), ['images[0]', '`id` 1208925819614629174706176', 'not int from -9223372036854775808']),
    'second image without id': (lambda d: d['images'][1].pop('id'), ['images[1] (id None)', '`id` None']),
    'annotation out of order': (lambda d: (d['annotations'][0].update(image_id=2), d['annotations'][1].update(image_id=1, area=None)),
                                ['annotations[1] (id 11)', '`area` None']),
    'annotation id of 80 bits': (set_ann('id', -1 << 80), ['annotations[0]', 'not int from']),
    'side of a million': (set_image('width', 10**6), ['images[0] (id 1)', '`width` 1000000', 'from 1 to 65535']),
    'image twice': (set_image('id', 2), ['the id 2 occurs 2 times in `images`', 'give each its own']),
    'annotation twice': (set_ann('id', 11), ['the id 11 occurs 2 times in `annotations`', 'give each its own']),
    'category twice': (lambda d: d['categories'].append(dict(id=5, name='c')), ['the id 5 occurs 2 times in `categories`']),
    'category name twice': (lambda d: d['categories'][0].update(name='dog'), ["the name 'dog' occurs 2 times in `categories`", 'give each']),
    'no file name': (lambda d: d['images'][0].pop('file_name'), ['images[0] (id 1)', '`file_name` None', 'not str']),
    'no height': (lambda d: d['images'][0].pop('height'), ['images[0] (id 1)', '`height` None', 'correct the record']),
    'height of zero': (set_image('height', 0), ['images[0] (id 1) has `height` 0', 'not int from 1 to 65535']),
    'width is text': (set_image('width', '60'), ["`width` '60'", 'not int']),
    'name leaves by dots': (set_image('file_name', '../secret.png'), ['image 1', "'../secret.png'", 'leaves the image folder']),
    'name leaves inside': (set_image('file_name', 'a/../../b.png'), ['image 1', 'leaves the image folder']),
    'name is absolute': (set_image('file_name', '/etc/passwd'), ['image 1', "'/etc/passwd'", 'leaves the image folder']),
    'name leaves by backslashes': (set_image('file_name', r'a\..\..\b.png'), ['image 1', 'leaves the image folder']),
    'name is absolute elsewhere': (set_image('file_name', r'C:\b.png'), ['image 1', 'leaves the image folder']),
    'name with NUL': (set_image('file_name', '1.png\0.jpg'), ['images[0] (id 1)', '`file_name`', 'NUL or half a surrogate']),
    'name with half a pair': (set_image('file_name', '\ud83d.png'), ['images[0] (id 1)', '`file_name`', 'half a surrogate pair']),
    'category with half a pair': (lambda d: d['categories'][1].update(name='\udc00'), ['categories[1] (id 9)', 'half a surrogate']),
    'name is empty': (set_image('file_name', ''), ['image 1', 'leaves the image folder']),
    'unknown image': (set_ann('image_id', 77), ['annotation 10 has image_id 77', 'not in `images`', '(1 such']),
    'unknown category': (set_ann('category_id', 77), ['annotation 10 has category_id 77', 'not in `categories`', 'complete']),
    'category without name': (lambda d: d['categories'][1].pop('name'), ['categories[1] (id 9)', '`name` None', 'not str']),
    'no box': (lambda d: d['annotations'][0].pop('bbox'), ['annotations[0] (id 10)', '`bbox` None', 'not list']),
    'box of three': (set_ann('bbox', [1, 2, 3]), ['annotation 10', '`bbox` of 3 numbers', '[x, y, w, h]']),
    'box of text': (set_ann('bbox', [1, 2, 3, 'x']), ['annotation 10', '`bbox`', 'not finite numbers']),
    'box with null': (set_ann('bbox', [1, 2, None, 3]), ['annotation 10', '`bbox`', 'not finite numbers']),
    'box with nan': (set_ann('bbox', [1, 2, float('nan'), 3]), ['annotation 10', '`bbox`', 'nan', 'not finite numbers']),
    'box with infinity': (set_ann('bbox', [1, 2, float('inf'), 3]), ['annotation 10', 'inf', 'not finite numbers']),
    'box a million wide': (set_ann('bbox', [1, 2, 1e6, 3]), ['annotation 10', '1000000.0', 'within 65535 px']),
    'box beyond all numbers': (set_ann('bbox', [1, 2, 10**400, 3]), ['annotation 10', '`bbox`', 'not finite numbers']),
    'box with a truth': (set_ann('bbox', [1, 2, True, 3]), ['annotation 10', 'True', 'not finite numbers']),
    'area beyond all images': (set_ann('area', 1e300), ['annotations[0] (id 10)', '`area` 1e+300', 'not float or int from']),
    'no area': (lambda d: d['annotations'][1].pop('area'), ['annotations[1] (id 11)', '`area` None', 'not float or int']),
    'area is nan': (set_ann('area', float('nan')), ['annotations[0] (id 10) has `area` nan', 'not float or int from']),
    'polygon with nan': (set_ann('segmentation', [[1, 1, 9, 1, float('nan'), 9]]), ['annotation 10', '`segmentation`', 'nan']),
    'polygon far outside': (set_ann('segmentation', [[1, 1, 9, 1, 1e9, 9]]), ['annotation 10', 'within 65535 px']),
    'polygon with an endless outline': (set_ann('segmentation', [[65535, 65535, -65535, -65535] * 40]), ['annotation 10', 'longer than 4194240']),
    'polygon beyond all numbers': (set_ann('segmentation', [[1, 1, 9, 1, 10**400, 9]]), ['annotation 10', 'not finite numbers']),
    'polygon with truths': (set_ann('segmentation', [[True] * 6]), ['annotation 10', 'not finite numbers']),
    'polygon a thousand deep': (set_ann('segmentation', nested(900)), ['annotation 10', 'not finite numbers']),
    'short polygon with nan': (set_ann('segmentation', [[5, 5, 25, 5, 25, 25], [float('nan')]]), ['annotation 10', 'nan']),
    'polygon with text': (set_ann('segmentation', [[1, 1, 9, 1, '9', 9]]), ['annotation 10', 'not finite numbers']),
    'polygon not nested': (set_ann('segmentation', deep), ['annotation 10', 'no list of lists of numbers', 'remove it']),
    'polygon too deep': (set_ann('segmentation', [[[1, 1], [9, 1], [9, 9]]]), ['annotation 10', 'not finite numbers']),
    'segmentation is text': (set_ann('segmentation', 'x'), ['annotation 10', "`segmentation` 'x'", 'no polygons or runs']),
    'crowd flag is text': (set_ann('iscrowd', 'no'), ['annotations[0] (id 10)', "`iscrowd` 'no'", 'not bool or int']),
    'crowd flag is two': (set_ann('iscrowd', 2), ['annotations[0] (id 10)', '`iscrowd` 2', 'from 0 to 1']),
    'ignore flag is text': (set_ann('ignore', 'no'), ['annotations[0] (id 10)', "`ignore` 'no'", 'not bool or int']),
    'size of runs is a number': (set_ann('segmentation', dict(size=40, counts=[2400])), ['annotation 10', 'are for 40 (h, w)']),
    'runs that wrap': (set_ann('segmentation', dict(size=[40, 60], counts=[1 << 62] * 4 + [2400])), ['annotation 10', 'do not add up']),
    'runs beyond 64 bits': (set_ann('segmentation', dict(size=[40, 60], counts=[1 << 64])), ['annotation 10', 'do not add up']),
    'runs are reals': (set_ann('segmentation', dict(size=[40, 60], counts=[2400.])), ['annotation 10', 'neither whole numbers']),
    'runs in runs': (set_ann('segmentation', dict(size=[40, 60], counts=[[2400]])), ['annotation 10', 'neither whole numbers']),
    'no runs': (set_ann('segmentation', dict(size=[40, 60], counts=[])), ['annotation 10', 'do not add up']),
    'string of letters beyond ASCII': (set_ann('segmentation', dict(size=[40, 60], counts='é')), ['annotation 10', 'not a COCO string']),
    'string of one long number': (set_ann('segmentation', dict(size=[40, 60], counts='o' * 99 + '0')), ['annotation 10', 'exceeds 30 bits']),
    'runs of another size': (set_ann('segmentation', dict(size=[60, 40], counts=[2400])), ['annotation 10', '[40, 60]']),
    'runs without size': (set_ann('segmentation', dict(counts=[2400])), ['annotation 10', 'the image is [40, 60]']),
    'runs without counts': (set_ann('segmentation', dict(size=[40, 60])), ['annotation 10', 'neither whole numbers nor']),
    'runs too short': (set_ann('segmentation', dict(size=[40, 60], counts=[1, 2])), ['annotation 10', 'do not add up']),
    'negative runs': (set_ann('segmentation', dict(size=[40, 60], counts=[-1, 2401])), ['annotation 10', 'do not add up']),
    'string too short': (set_ann('segmentation', dict(size=[40, 60], counts='1')), ['annotation 10', 'do not add up']),
    'string of nonsense': (set_ann('segmentation', dict(size=[40, 60], counts='~~')), ['annotation 10', 'not a COCO string']),
    'string is empty': (set_ann('segmentation', dict(size=[40, 60], counts='')), ['annotation 10', 'not a COCO string']),
}


@pytest.mark.parametrize('name', bad_records)
def test_bad_record(write, name):
    change, messages = bad_records[name]
    with pytest.raises(ValueError) as e: write(edited(change))
    for message in [*messages, 'a.json']: assert message in str(e.value), f'{message!r} is not in {e.value}'


quiet = {  # what mmdetection leaves out without an error, and so do we: (change, status of annotation 10)
    'ignore flag': (set_ann('ignore', 1), skipped),
    'box without width': (set_ann('bbox', [5, 5, 0, 20]), skipped),
    'box of less than a pixel': (set_ann('bbox', [5, 5, .9, 20]), skipped),
    'box of negative width': (set_ann('bbox', [25, 5, -20, 20]), skipped),
    'box right of the image': (set_ann('bbox', [60, 5, 20, 20]), skipped),
    'box above the image': (set_ann('bbox', [5, -30, 20, 20]), skipped),
    'area of zero': (set_ann('area', 0), skipped),
    'crowd': (set_ann('iscrowd', 1), ignored),
    'polygon of two points': (set_ann('segmentation', [[5, 5, 25, 25]]), ignored),
    'polygon of odd length': (set_ann('segmentation', [[5, 5, 25, 5, 25, 25, 7]]), ignored),
    'empty polygon': (set_ann('segmentation', [[]]), ignored),
    'polygon beside the image': (set_ann('segmentation', [[70, 5, 90, 5, 90, 25]]), ignored),
    'polygon below the image': (set_ann('segmentation', [[5, 45, 25, 45, 25, 65]]), ignored),
    'one polygon of two is good': (set_ann('segmentation', [[5, 5, 25, 5, 25, 25], [1, 1]]), trained),
    'box reaches over the edge': (set_ann('bbox', [-5, -5, 200, 200]), trained),
    'no crowd flag': (lambda d: d['annotations'][0].pop('iscrowd'), trained),
    'runs with gaps of nothing': (set_ann('segmentation', dict(size=[40, 60], counts=[0, 0, 1200, 0, 0, 40, 1160])), trained),
    'sizes of runs are reals': (set_ann('segmentation', dict(size=[40., 60.], counts=[1200, 1200])), trained),
    'numbers with many digits': (set_ann('segmentation', [[5.123456789, 5, 25, 5, 25, 25]]), trained),
}


@pytest.mark.parametrize('name', quiet)
def test_left_out_as_mmdetection_does(write, name):
    change, status = quiet[name]
    index = write(edited(change))
    assert index.target(0, every=True)['status'].tolist() == [status]
    assert len(index.target(0)['boxes']) == (status == trained)
    sample = load_sample(index, 0, (40, 60))
    assert len(sample.boxes) == len(sample.masks) == (status == trained)
    assert torch.isfinite(sample.boxes).all()


@pytest.mark.parametrize('segmentation', ['missing', None, []])
def test_object_without_segmentation(write, segmentation):
    "Boxes can be learned, masks cannot: told before training starts."
    change = (lambda d: d['annotations'][0].pop('segmentation')) if segmentation == 'missing' else \
        set_ann('segmentation', segmentation)
    index = write(edited(change))
    assert len(next(iter(train_loader(index, batch_size=2, masks=False))).boxes) == 2
    with pytest.raises(ValueError, match=r'a\.json: annotation 10 has no segmentation \(1 such.*masks=false'):
        train_loader(index, batch_size=2)
    with pytest.raises(ValueError, match='annotation 10 has no segmentation'): index.bitmaps(0)


def test_missing_images(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 images of .*a\.json, first '7\.png' \(image 1\)"):
        write(edited(set_image('file_name', '7.png')))
    with pytest.raises(FileNotFoundError, match=r"first 'sub/b\.png' \(image 2\).*complete it"):
        write(edited(set_image('file_name', 'sub/b.png', 1)))


def test_links(write, tmp_path):
    "The image folder may be a link, and links may lead to other places in it, but not out of it."
    images, other = tmp_path / 'images', tmp_path / 'other'
    other.mkdir()
    (images / '1.png').rename(other / '1.png')
    (images / '1.png').symlink_to(other / '1.png')
    with pytest.raises(ValueError, match=r'images/1\.png, of image 1 in .*a\.json, is a link to .*other/1\.png, outside of .*: copy'):
        write(document())
    (images / '1.png').unlink()
    (images / 'sub').symlink_to(other)
    with pytest.raises(ValueError, match='images/sub, of image 1 in .*a.json, is a link to .*other, outside'):
        write(edited(set_image('file_name', 'sub/1.png')))
    (images / 'sub').unlink()
    images.rename(tmp_path / 'elsewhere')
    images.symlink_to(tmp_path / 'elsewhere')
    (images / 'real.png').write_bytes((other / '1.png').read_bytes())
    (images / '1.png').symlink_to('real.png')
    index = write(document())
    assert read_image(index.path(0)).shape == (3, 40, 60)
    (images / '1.png').unlink()
    (images / '1.png').symlink_to(other / '1.png')
    with pytest.raises(ValueError, match='is a link to'): load_sample(index, 0, (40, 60))


@pytest.mark.parametrize('text', ['[' * 10**5, '{"images":' * 10**5, '1' * 5000, b'\xef\xbb\xbf', b'\xff\xfe{', '{"a": "\x01"}'])
def test_text_that_stops_a_parser(write, text):
    with pytest.raises(ValueError, match=r'a\.json: (is not json|not a COCO instances file)'): write(text)


def test_document_as_it_is(write, tmp_path):
    "Fields that nobody asks for hold anything; evaluation gets plain lists, from any text that has an index."
    doc = edited(set_ann('score', float('nan')))
    for text in (json.dumps(doc), json.dumps(doc).encode('utf-16')):
        index = write(text)
        assert json.dumps(_parse(index.json_path)) == json.dumps(doc)
    (tmp_path / 'b.json').write_text('{')
    with pytest.raises(ValueError, match=r'b\.json: is not json .*: is the download complete'): _parse(tmp_path / 'b.json')


def test_byte_order_mark(write):
    assert len(write(b'\xef\xbb\xbf' + json.dumps(document()).encode())) == 2
    assert len(write(json.dumps(document()).encode('utf-16'))) == 2


def test_folder_in_place_of_an_image(write, tmp_path):
    (tmp_path / 'images/3.png').mkdir()
    for link, to in (('4.png', '3.png'), ('5.png', '5.png'), ('6.png', 'nowhere')): (tmp_path / 'images' / link).symlink_to(to)
    for name in ('3.png', '4.png', '5.png', '6.png'):
        with pytest.raises(FileNotFoundError, match=rf"lacks 1 of the 2 images of .*a\.json, first '{name}' \(image 1\)"):
            write(edited(set_image('file_name', name)))


def test_file_that_changes_while_it_is_read(write, tmp_path, monkeypatch):
    "A cache must never hold another content than its name says."
    import scratchdet.coco as coco
    build = coco.read_annotations

    def edit_too(path):
        built = build(path)
        path.write_text(json.dumps(edited(set_ann('area', 7))))
        return built
    monkeypatch.setattr(coco, 'read_annotations', edit_too)
    with pytest.raises(ValueError, match=r'a\.json: changed while it was read: start again'): write(document())
    assert not (tmp_path / 'cache').exists()


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no\.json does not exist: check the path'):
        load_index(tmp_path / 'no.json', tmp_path)
    (tmp_path / 'a.json').write_text(json.dumps(document()))
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'): load_index(tmp_path / 'a.json', tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match="has 0 files annotations/instances_val.*COCO's layout"): coco_split(tmp_path, 'val')
    (tmp_path / 'annotations').mkdir()
    for o in ('train', 'val'): (tmp_path / f'annotations/instances_{o}.json').touch()
    with pytest.raises(FileNotFoundError, match=r'instances_vall\*\.json; it has instances_train\.json, instances_val\.json$'):
        coco_split(tmp_path, 'vall')
    with pytest.raises(FileNotFoundError, match='does not exist'): coco_split(tmp_path / 'nowhere', 'val')
    (tmp_path / 'labels.csv').touch()
    with pytest.raises(FileNotFoundError, match='labels.csv is a file'): coco_split(tmp_path / 'labels.csv', 'val')


@pytest.mark.parametrize('content', [b'', b'GIF89a', b'\xff\xd8\xff\xe0 no image', b'<html>404</html>'])
def test_unreadable_image(write, tmp_path, content):
    index = write(document())
    (tmp_path / 'images/1.png').write_bytes(content)
    with pytest.raises(ValueError, match=r'1\.png is not an image that can be read .*replace the file'):
        read_image(index.path(0))
    for loader in (train_loader(index, batch_size=2), train_loader(index, batch_size=2, workers=1)):
        with pytest.raises(ValueError, match=r'1\.png is not an image that can be read'): list(loader)
    with pytest.raises(ValueError, match=r'1\.png is not an image'): list(eval_loader(index))


def test_truncated_jpeg(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8))
    write_jpeg(noise, str(tmp_path / 'a.jpg'))
    (tmp_path / 'a.jpg').write_bytes((tmp_path / 'a.jpg').read_bytes()[:2000])
    with pytest.raises(ValueError, match=r'a\.jpg is not an image that can be read'): read_image(tmp_path / 'a.jpg')
    with pytest.raises(FileNotFoundError, match=r'b\.jpg does not exist'): read_image(tmp_path / 'b.jpg')
    with pytest.raises(FileNotFoundError): read_image(tmp_path)


def test_image_of_another_size(write):
    index = write(edited(set_image('height', 41)))
    with pytest.raises(ValueError, match=r'1\.png is 40x60 px, but .*a\.json says 41x60 px .* image 1: correct'):
        load_sample(index, 0, (40, 60))


def test_nothing_to_train_on(write):
    index = write(edited(lambda d: (d['annotations'].clear(), d['images'][0].update(height=31))))
    with pytest.raises(ValueError, match=r'a\.json: has no image to train on \(of 2, 2 have no annotation, 1 a side under 32 px\): add'):
        training_images(index)
    with pytest.raises(ValueError, match=r'a\.json: has no image to train on \(of 0'): training_images(index.subset([]), False)
    assert len(training_images(index, filter_empty=False)) == 1
    with pytest.raises(ValueError, match=r'a\.json has no image to train on'): train_loader(index.subset([]), batch_size=2)


def test_uneven_batch(write):
    with pytest.raises(ValueError, match='6 images does not divide among 4 processes with 2 parts each: .* multiple of 8'):
        train_loader(write(document()), batch_size=6, processes=4, accumulation=2)


@pytest.mark.parametrize('key, value', [('bbox', [.1, .1, .4, .4]), ('area', 0), ('iscrowd', 1), ('ignore', 1)])
def test_nothing_to_learn(write, key, value):
    "Boxes from 0 to 1 in place of pixels, and whatever else leaves no object, are told before training."
    def change(doc):
        for o in doc['annotations']: o[key] = value
    with pytest.raises(ValueError, match=r'a\.json: has no object to train on: .*: are the boxes \[x, y, width, height\] in px\?'):
        training_images(write(edited(change)))
