"A data set checked before a run: every bad image of both splits, boxes that cannot be meant, counts, exit status."
import json
import re
import shutil
import time

import pytest
from PIL import Image

from scratchdet.check import bad_images, boxes_outside, count_split, load_both, main, parse_args, suspicious
from scratchdet.coco import coco_split, load_index
from scratchdet.loader import load_sample
from scratchdet.toy import make_toy


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp('check')/'toy', train=20, val=10, size=(64, 96))


@pytest.fixture
def copy(toy, tmp_path): return shutil.copytree(toy, tmp_path/'set')


def edit(root, split, change):
    "Change the document of a split."
    file = root/f'annotations/instances_{split}2017.json'
    change(doc := json.loads(file.read_text()))
    file.write_text(json.dumps(doc))


def files(root, split): return sorted((root/f'{split}2017').iterdir())


def failure(root, *words):
    "The lines of a check that fails."
    with pytest.raises(SystemExit) as e: main(parse_args(['--coco', str(root), *words]))
    return e.value.code.splitlines()


def test_every_bad_image_of_both_splits_is_listed(copy, capsys):
    "Torn, empty, another kind, turned by its mark, of another size: each with file and way out; the others are fine."
    torn, empty, text, turned, other = (*files(copy, 'train')[3:6], *files(copy, 'val')[1:3])
    torn.write_bytes(torn.read_bytes()[:-40])
    empty.write_bytes(b'')
    text.write_text('<html>404</html>')
    exif = Image.Exif()
    exif[0x112] = 8
    Image.open(turned).save(turned, exif=exif)
    Image.open(other).resize((48, 32)).save(other)
    lines = failure(copy)
    assert [o.split()[1] for o in lines] == list(map(str, (torn, empty, text, turned, other)))
    assert all(o.startswith('scratchdet.check: ') for o in lines)
    assert all('replace the file by a whole JPEG' in o for o in lines[:3])
    assert 'is 96x64 px' in lines[3] and 'marked the image as turned' in lines[3] and 'is 32x48 px' in lines[4]
    said = capsys.readouterr().out
    assert said.split()[:5] == ['train', 'val', 'images', '20', '10'] and 'every image' not in said
    assert failure(copy, '--quiet') == lines and capsys.readouterr() == ('', '')
    index = load_index(*coco_split(copy, 'train'))
    for i in range(3, 6):  # in the words of the run that would stop there
        with pytest.raises(ValueError) as e: load_sample(index, i, (64, 96))
        assert lines[i - 3] == f'scratchdet.check: {e.value}'


def test_a_good_set(toy, capsys):
    both = {k: load_index(*coco_split(toy, k)) for k in ('train', 'val')}
    assert main(parse_args(['--coco', str(toy)])) == {k: count_split(o) for k, o in both.items()}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == 'every image can be read' and not any('leave' in o or 'teach' in o for o in lines)
    assert len(lines) == 10 + len(both['train'].names) and {len(o) for o in lines[:-1]} == {len(lines[0])}
    assert sum(count_split(both['train'])['categories'].values()) == count_split(both['train'])['objects'] > 20


def test_corners_are_warned_of(copy, capsys):
    "In one split alone, after which the images are looked at all the same."
    def change(doc):
        for o in doc['annotations']:
            x, y, w, h = o['bbox']
            o['bbox'] = [x, y, x + w, y + h]
    edit(copy, 'val', change)
    counts = main(parse_args(['--coco', str(copy)]))
    *lines, end = capsys.readouterr().out.splitlines()
    line, = [o for o in lines if 'leave' in o]
    assert line.startswith('warning: ') and end == 'every image can be read; 1 warning above'
    n = counts['val']['boxes over the edge']
    total = counts['val']['objects'] + counts['val']['crowds']
    said = rf'instances_val2017\.json: boxes that leave their image: {n} of {total}, first that of annotation \d+; COCO writes x, y, width, height, not two'
    assert re.search(said, line)
    assert total / 2 < n <= total and counts['train']['boxes over the edge'] == 0


@pytest.mark.parametrize('share, says', [(0, None), (.05, 'training clips'), (.1, 'training clips'), (.2, 'other images')])
def test_a_few_boxes_that_leave_are_counted(copy, share, says):
    "And clipped; many are suspected."
    def change(doc):
        doc['annotations'] = doc['annotations'][:20]
        for i, o in enumerate(doc['annotations']): o['bbox'] = [1, 1, 9, 9 + i]
        for i, o in enumerate(doc['annotations'][:round(20 * share)]): o['bbox'] = [-30, -30, 90, 90 + i]
    edit(copy, 'train', change)
    index = load_index(*coco_split(copy, 'train'))
    assert boxes_outside(index).sum() == 20 * share and len(said := suspicious(index)) == bool(share)
    if share: assert f'leave their image: {20 * share:.0f} of 20, first that of annotation {index.arrays["annotation_ids"][0]}; ' in said[0] and says in said[0]


def test_an_object_that_is_there_twice_is_warned_of(copy, capsys):
    "The later annotation is named; neither crowds nor another category, box or image are the same."
    def change(doc):
        first, other = doc['annotations'][0], next(o for o in doc['annotations'] if o['image_id'] != doc['annotations'][0]['image_id'])
        del doc['annotations'][1:]
        kinds = [o['id'] for o in doc['categories'] if o['id'] != first['category_id']]
        x, y, w, h = first['bbox']
        for i, more in enumerate([dict(), dict(), dict(category_id=kinds[0]), dict(bbox=[x, y, w - 1, h]),
                                  dict(image_id=other['image_id']), dict(iscrowd=1), dict(iscrowd=1)]):
            doc['annotations'].append({**first, 'iscrowd': 0, 'id': 9_001 + i, **more})
    edit(copy, 'train', change)
    counts = main(parse_args(['--coco', str(copy)]))['train']
    line, = [o for o in capsys.readouterr().out.splitlines() if o.startswith('warning')]
    assert line.endswith('boxes that are there twice: 2 of 8, first that of annotation 9001; remove it: evaluation counts one of two as missed')
    assert counts['boxes there twice'] == 2


def test_what_teaches_nothing_is_warned_of(copy, capsys):
    "Corners in the wrong order, for example: the first is named, crowds are not counted."
    def change(doc):
        for o in doc['annotations'][3:5]: o['bbox'] = [30, 30, -9, 9]
        doc['annotations'][6]['iscrowd'] = 1
    edit(copy, 'train', change)
    counts = main(parse_args(['--coco', str(copy)]))['train']
    line, = [o for o in capsys.readouterr().out.splitlines() if 'teach' in o]
    doc = json.loads((copy/'annotations/instances_train2017.json').read_text())
    said = f'annotations that teach nothing: 2 of {len(doc["annotations"])}, first {doc["annotations"][3]["id"]}; no area'
    assert said in line and counts['left out'] == 2


def test_empty_images_crowds_and_a_category_named_like_a_count(copy):
    def change(doc):
        doc['categories'][0]['name'] = 'objects'
        ids = [o['id'] for o in doc['images']]
        doc['annotations'] = [{**o, 'iscrowd': int(o['image_id'] == ids[0])} for o in doc['annotations'] if o['image_id'] not in ids[5:]]
    edit(copy, 'val', change)
    index = load_index(*coco_split(copy, 'val'))
    counts = count_split(index)
    assert counts['images without objects'] == 5 and counts['crowds'] == len(index.target(0, every=True)['labels']) > 0
    assert sum(counts['categories'].values()) == counts['objects'] and list(counts['categories'])[0] == 'objects'


@pytest.mark.parametrize('split, change, says', [
    ('val', lambda d: d.update(images=[]), 'instances_val2017.json: its list `images` is empty: add a record'),
    ('train', lambda d: d['annotations'].clear(), 'has no image to train on'),
    ('val', lambda d: d['annotations'][0].update(image_id=999), 'image_id 999, which is not in `images`'),
    ('train', lambda d: d['images'][0].update(file_name='x.jpg'), "lacks 1 of the 20 images of .*, first 'x.jpg'"),
    ('val', lambda d: d['categories'].append(dict(id=99, name='cup')), "categories of train and val differ, such as .99, 'cup'.; give")])
def test_what_a_run_refuses_is_refused(copy, split, change, says):
    edit(copy, split, change)
    with pytest.raises((ValueError, OSError), match=says): load_both(copy)
    assert len(failure(copy)) == 1


def test_no_object_in_validation_is_allowed(copy):
    edit(copy, 'val', lambda d: d['annotations'].clear())
    assert main(parse_args(['--coco', str(copy), '--quiet']))['val']['images without objects'] == 10


def test_an_interrupt_stops_the_reading(toy, monkeypatch):
    "Images that nobody has begun are left."
    index, read = load_index(*coco_split(toy, 'train')).subset([0] * 2000), []

    def stop(index, i, size):
        read.append(i)
        time.sleep(.001)
        if len(read) >= 5: raise KeyboardInterrupt
    monkeypatch.setattr('scratchdet.check._pixels', stop)
    with pytest.raises(KeyboardInterrupt): bad_images(index)
    assert 5 <= len(read) < 2000


def test_real_images(coco_mini):
    "The form of its labels is not doubted, and every image is whole."
    for split in ('train', 'val'):
        index = load_index(*coco_split(coco_mini, split))
        assert suspicious(index) == [] and bad_images(index) == [] and not boxes_outside(index).any()
