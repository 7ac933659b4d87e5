"The toy set: what its files hold, that they are the same for the same arguments, and that no half of it appears."
import hashlib
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from scratchdet import toy
from scratchdet.toy import make_toy, toy_batch, toy_image, toy_names

SIZE = 128, 160


@pytest.fixture(scope='module')
def drawn():
    "Annotations, and the objects they were made of, of 300 images."
    scenes = [toy._scene(i, 0, SIZE)[1] for i in range(300)]
    return [(o, [toy._annotation(x, *SIZE) for x in o]) for o in scenes]


@pytest.fixture(scope='module')
def small(tmp_path_factory): return make_toy(tmp_path_factory.mktemp('toy') / 'set', train=24, val=8, size=(64, 96), seed=3)


def bitmap(a, h, w):
    "Mask of an annotation as pycocotools reads it."
    rle = coco_mask.frPyObjects(a['segmentation'], h, w)
    return coco_mask.decode(rle if a['iscrowd'] else coco_mask.merge(rle)).astype(bool)


def digests(root): return {o.relative_to(root).as_posix(): hashlib.sha256(o.read_bytes()).hexdigest()
                           for o in sorted(root.rglob('*')) if o.is_file()}


# shape and colour

def test_neither_shape_nor_colour_names_a_category():
    pairs = [o.split() for o in toy_names]
    for which in 0, 1:
        for word in {p[which] for p in pairs}: assert sum(p[which] == word for p in pairs) >= 2
    # every colour of a category occurs with every shape of a category, as an object or as a distractor
    colours, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
    missing = [f'{c} {s}' for c in colours for s in shapes if f'{c} {s}' not in toy_names]
    assert len(missing) == 3 and {o.split()[0] for o in missing} == colours and {o.split()[1] for o in missing} == shapes


def test_guessing_from_one_of_them_is_wrong_half_of_the_time(drawn):
    labels = np.array([a['category_id'] - 1 for _, o in drawn for a in o])
    assert len(labels) > 800 and np.bincount(labels, minlength=6).min() > .12 * len(labels)
    for which in 0, 1:
        words = np.array([toy_names[o].split()[which] for o in labels])
        right = sum(np.bincount(labels[words == o]).max() for o in set(words)) / len(labels)
        assert right < .6


def test_distractors_are_no_category_and_are_common(monkeypatch):
    painted, last, paint, outline = [], {}, toy._paint, toy._random_outline
    monkeypatch.setattr(toy, '_random_outline', lambda rng, kind, *a: last.update(kind=kind) or outline(rng, kind, *a))
    monkeypatch.setattr(toy, '_paint', lambda rng, image, o, colour: painted.append(f"{colour} {last['kind']}")
                        or paint(rng, image, o, colour))
    rng = np.random.default_rng(42)
    for _ in range(100): toy._distractors(rng, np.zeros((*SIZE, 3), np.float32))
    assert len(painted) > 60 and not set(painted) & set(toy_names)
    assert {'green disc', 'blue square', 'red triangle'} <= set(painted)  # colour and shape of categories, but not together


def test_colour_of_the_pixels_is_that_of_the_name():
    looked, size = 0, SIZE
    for i in range(40):
        image, objects = toy._scene(i, 0, size)
        for o in objects:
            inner = image[o['seen'] > .99].astype(float)
            if o['crowd'] or len(inner) < 50: continue
            r, g, b = np.median(inner, axis=0)
            assert ('red', 'green', 'blue')[np.argmax([r, g, b])] == toy_names[o['label']].split()[0]
            looked += 1
    assert looked > 80


# images and annotations

def test_same_arguments_same_image_other_arguments_other_image():
    image, annotations = toy_image(5, seed=1)
    again, same = toy_image(5, seed=1)
    assert (image == again).all() and annotations == same
    for other in toy_image(6, seed=1)[0], toy_image(5, seed=2)[0]: assert (image != other).mean() > .5


def test_masks_are_the_seen_pixels(drawn):
    pairs = [(o['seen'] >= .5, bitmap(a, *SIZE)) for found in drawn for o, a in zip(*found)]
    ious = np.array([(seen & read).sum() / (seen | read).sum() for seen, read in pairs])
    assert len(ious) > 800
    assert ious.min() > .9 and np.mean(ious) > .97


def test_boxes_enclose_their_masks(drawn):
    looked = 0
    for _, annotations in drawn:
        for a in annotations:
            ys, xs = bitmap(a, *SIZE).nonzero()
            x, y, w, h = a['bbox']
            assert 0 <= x and 0 <= y and x + w <= SIZE[1] and y + h <= SIZE[0] and w > 0 and h > 0
            edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(edges - [x, y, x + w, y + h]).max() <= 1.5
            looked += 1
    assert looked > 800


def test_what_is_seen_of_objects_does_not_overlap_and_is_enough(drawn):
    hidden = 0
    for objects, annotations in drawn:
        masks = [bitmap(a, *SIZE) for a in annotations if not a['iscrowd']]
        if masks: assert (sum(o.astype(int) for o in masks) > 1).mean() < .01  # contours share edge pixels
        for o in objects: assert o['seen'].sum() >= .49 * o['area']
        hidden += sum(o['seen'].sum() < .95 * o['area'] for o in objects)
    assert hidden > 100  # so shapes do overlap


def test_numbers_and_scales(drawn):
    counts = np.array([len(o) for o, _ in drawn])
    empty, crowds = (counts == 0).mean(), np.mean([any(x['crowd'] for x in o) for o, _ in drawn])
    assert counts.max() <= 7 and counts.mean() > 2.5
    assert 0 < empty < .06 and .005 < crowds < .08
    sides = np.array([max(a['bbox'][2:]) for _, o in drawn for a in o if not a['iscrowd']])
    assert sides.min() < 13 and sides.max() > 115 and ((sides > 14) & (sides < 95)).mean() > .75


def test_large_images_hold_shapes_of_200_px():
    sides = [max(a['bbox'][2:]) for i in range(60) for a in toy_image(i, size=(320, 400))[1] if not a['iscrowd']]
    assert max(sides) > 170 and min(sides) < 20


@pytest.mark.parametrize('size', [(32, 32), (33, 75), (200, 64)])
def test_other_sizes(size):
    images = [toy_image(i, size=size) for i in range(30)]
    assert all(o.shape == (*size, 3) for o, _ in images)
    found = [a for _, o in images for a in o]
    assert len(found) > 20 and all(bitmap(a, *size).any() for a in found)


@pytest.mark.parametrize('given, says', [
    (dict(size=(20, 160)), r'\(20, 160\).*32 px or more'), (dict(size=(10**5, 10**5)), r'\(100000, 100000\).*10,000 px at most'),
    (dict(size=(64, 10_001)), r'\(64, 10001\).*at most'), (dict(seed=-1), 'seed -1: give 0 or more')], ids=str)
def test_an_image_that_cannot_be_drawn_is_refused(given, says):
    with pytest.raises(ValueError, match=says): toy_image(0, **given)


def test_run_lengths_round_trip():
    rng = np.random.default_rng(42)
    masks = [rng.random((7, 9)) > p for p in (.1, .5, .9)] + [np.zeros((7, 9), bool), np.ones((7, 9), bool)]
    for mask in masks:
        rle = toy._run_lengths(mask)
        assert sum(rle['counts']) == mask.size and json.loads(json.dumps(rle)) == rle
        assert (coco_mask.decode(coco_mask.frPyObjects(rle, *rle['size'])) == mask).all()


# files

def test_coco_reads_the_files(small):
    for split, ids in ('train', range(1, 49, 2)), ('val', range(2, 17, 2)):
        coco = COCO(small / 'annotations' / f'instances_{split}2017.json')
        assert sorted(coco.imgs) == list(ids) and [o['name'] for o in coco.loadCats(range(1, 7))] == list(toy_names)
        for o in coco.imgs.values():
            picture = Image.open(small / f'{split}2017' / o['file_name'])
            assert picture.size == (o['width'], o['height']) == (96, 64) and picture.mode == 'RGB'
            drawn, annotations = toy_image(o['id'], 3, (64, 96))
            assert np.abs(np.asarray(picture).astype(int) - drawn).mean() < 4
            stored = coco.imgToAnns[o['id']]
            assert [{k: a[k] for k in b} for a, b in zip(stored, annotations)] == annotations
        assert len({a['id'] for a in coco.anns.values()}) == len(coco.anns) > 0


def test_same_arguments_same_bytes(small, tmp_path):
    again = make_toy(tmp_path / 'again', train=24, val=8, size=(64, 96), seed=3)
    assert len(digests(again)) == 24 + 8 + 3 and digests(again) == digests(small)


def test_a_larger_set_holds_the_smaller_one(small, tmp_path):
    more = digests(make_toy(tmp_path / 'more', train=30, val=4, size=(64, 96), seed=3))
    few = digests(small)
    assert all(more[k] == v for k, v in few.items() if k.startswith('train2017/'))
    assert sum(k.startswith('val2017/') and few[k] == v for k, v in more.items()) == 4


@pytest.mark.parametrize('train, val', [(-5, 1), (0, 1), (1, 0), (1, -1)])
def test_a_set_without_images_is_refused(tmp_path, train, val):
    with pytest.raises(ValueError, match=f'train {train}, val {val}: give 1 image or more for each'): make_toy(tmp_path / 'a', train, val)
    assert not list(tmp_path.iterdir())


def test_an_existing_set_is_left_alone(small, monkeypatch):
    monkeypatch.setattr(toy, '_write_split', lambda *_: pytest.fail('drawn again'))
    assert make_toy(small, train=24, val=8, size=[64, 96], seed=3) == small


def test_another_set_in_the_same_folder_is_refused(small):
    before = digests(small)
    with pytest.raises(FileExistsError, match="'seed': 3.*'seed': 4.*give another folder"):
        make_toy(small, train=24, val=8, size=(64, 96), seed=4)
    assert digests(small) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('precious')
    with pytest.raises(FileExistsError, match='mine holds something else .it has no toy.json.'): make_toy(tmp_path / 'mine', train=1, val=1)
    assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'precious' and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / 'mine').write_text('precious')
    for o in ('mine', 'mine/toy'):
        with pytest.raises(NotADirectoryError, match='mine is a file: give a folder'): make_toy(tmp_path / o, train=1, val=1)
    assert (tmp_path / 'mine').read_text() == 'precious' and len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert (make_toy(tmp_path / 'empty', train=1, val=1, size=(32, 48)) / 'toy.json').exists()


@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()])
def test_nothing_is_left_of_an_interrupted_set(tmp_path, monkeypatch, error):
    write = toy._write_split
    def fail(folder, split, *args):
        write(folder, split, *args)
        if split == 'val': raise error
    monkeypatch.setattr(toy, '_write_split', fail)
    with pytest.raises(type(error)): make_toy(tmp_path / 'toy', train=2, val=1, size=(32, 48))
    assert not list(tmp_path.iterdir())


def test_several_at_once_make_one_set(tmp_path):
    roots, args = [], dict(train=4, val=2, size=(32, 48))
    makers = [threading.Thread(target=lambda: roots.append(make_toy(tmp_path / 'toy', **args))) for _ in range(4)]
    for o in makers: o.start()
    for o in makers: o.join()
    assert len(roots) == 4 and [o.name for o in tmp_path.iterdir()] == ['toy']


def test_command_line(tmp_path):
    def run(*args): return subprocess.run([sys.executable, '-m', 'scratchdet.toy', *args], capture_output=True, text=True)
    out = tmp_path / 'toy'
    done = run('--out', str(out), '--train', '2', '--val', '1', '--size', '32', '48', '--seed', '7')
    assert done.returncode == 0 and done.stdout.strip() == str(out)
    assert digests(out) == digests(make_toy(tmp_path / 'same', train=2, val=1, size=(32, 48), seed=7))
    assert run('--help').returncode == 0 and run('--train', '2').returncode == 2
    for args, says in ((('--train', '5'), 'give another folder'), (('--train', '-5', '--val', '0'), '1 image or more'),
                       (('--out', str(tmp_path / 'b'), '--size', '0', '5'), 'give 32 px or more'),
                       (('--out', str(tmp_path / 'b'), '--size', '100000', '100000'), 'give 10,000 px at most'),
                       (('--out', str(tmp_path / 'b'), '--seed', '-1'), 'scratchdet.toy: seed -1: give 0 or more')):
        failed = run('--out', str(out), *args)
        assert failed.returncode == 1 and failed.stderr.startswith('scratchdet.toy: ') and says in failed.stderr
        assert len(failed.stderr.splitlines()) == 1 and not failed.stdout


# batches

def test_batch_is_padded_and_packed():
    batch = toy_batch(6)
    n, m = batch['valid'].shape
    assert n == 6 and batch['images'].dtype == torch.uint8 and batch['boxes'].dtype == torch.float32
    for i, number in enumerate(batch['image_ids'].tolist()):
        image, annotations = toy_image(number, 42, (64, 96))
        objects = [a for a in annotations if not a['iscrowd']]
        assert torch.equal(batch['images'][i], torch.from_numpy(image).permute(2, 0, 1))
        assert batch['valid'][i].tolist() == [j < len(objects) for j in range(m)]
        for j, a in enumerate(objects):
            assert batch['labels'][i, j] == a['category_id'] - 1
            mask = np.unpackbits(batch['masks'][i, j].numpy(), axis=-1, count=96).astype(bool)
            assert (mask == bitmap(a, 64, 96)).all()
    assert not batch['boxes'][~batch['valid']].any() and not batch['masks'][~batch['valid']].any()


def test_batch_of_images_without_objects(monkeypatch):
    monkeypatch.setattr(toy, 'toy_image', lambda i, seed, size: (np.zeros((*size, 3), np.uint8), []))
    batch = toy_batch(2, size=(32, 40))
    assert batch['valid'].shape == (2, 1) and not batch['valid'].any() and batch['masks'].shape == (2, 1, 32, 5)
