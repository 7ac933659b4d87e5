"The data pipeline against mmdetection's, array by array."
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.records import ignored, trained
from scratchdet.loader import bucket_shape, load_sample
from scratchdet.masks import unpack_masks
from scratchdet.transforms import resized_size

shared = Path(__file__).parents[2] / 'shared'
reference = Path(os.environ.get('SCRATCHDET_REFERENCE', shared / 'reference'))
coco = Path(os.environ.get('SCRATCHDET_COCO', shared / 'coco-mini'))
mean, std = (np.array(o, np.float32)[:, None, None] for o in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))


def needed(folder, variable):
    "Skip where the shared files are not, unless they must be."
    if folder.is_dir(): return
    reason = f'{folder} does not exist: point {variable} to it'
    if os.environ.get('SCRATCHDET_REQUIRE_SHARED') == '1': pytest.fail(reason)
    pytest.skip(reason)


def data_files():
    "Every file of the reference folder that holds arrays of the data pipeline."
    files = sorted(reference.glob('*.npz')) if reference.is_dir() else []
    return [o for o in files if 'train.image_ids' in np.load(o).files]


@pytest.fixture(scope='module')
def indexes(tmp_path_factory):
    "The index of both splits; the data folder stays untouched."
    needed(reference, 'SCRATCHDET_REFERENCE')
    needed(coco, 'SCRATCHDET_COCO')
    cache = tmp_path_factory.mktemp('cache')
    train, val = (load_index(*coco_split(coco, split), cache=cache) for split in ('train', 'val'))
    return dict(train=training_images(train), val=val)


class Worst:
    "Largest error per kind of array."
    def __init__(self): self.rows = {}

    def exact(self, kind, ours, theirs):
        self.rows[kind] = max(self.rows.get(kind, 0), 0)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=kind)

    def close(self, kind, ours, theirs, limit):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape, (kind, ours.shape, theirs.shape)
        error = np.abs(ours - theirs).max(initial=0)
        self.rows[kind] = max(self.rows.get(kind, 0), error)
        assert error <= limit, f'{kind}: {error} > {limit}'


def network_view(index, i, flip, objects):
    "A sample as mmdetection's pipeline gives it: normalized, padded to multiples of 32."
    h, w = index.sizes[i].tolist()
    size = resized_size(h, w)
    sample = load_sample(index, i, size, flip, masks=objects, objects=objects)
    padded = np.zeros((3, *bucket_shape(*size)), np.float32)
    padded[:, :size[0], :size[1]] = (sample.image.numpy() - mean) / std
    return sample, size, padded


def check_image(split, index, key, arrays, worst, grey):
    "All arrays of one image; returns the names that were checked."
    flip, image_id = key.startswith('flip1'), int(key.split('.')[-1])
    i = int(np.flatnonzero(index.image_ids == image_id)[0])
    sample, size, pixels = network_view(index, i, flip, objects=split == 'train')
    sub = pixels[:, 3::41, 5::43]
    for name, theirs in arrays.items():
        kind = f'{split}.{name}'
        if name == 'img_shape': worst.exact(kind, size, theirs)
        elif name == 'ori_shape': worst.exact(kind, index.sizes[i], theirs)
        elif name == 'padded_shape': worst.exact(kind, pixels.shape, theirs)
        elif name == 'scale_factor':
            worst.close(kind, [size[1] / index.sizes[i][1], size[0] / index.sizes[i][0]], theirs, 1e-12)
        elif name == 'boxes': worst.close(kind, sample.boxes, theirs, 1e-4)
        elif name == 'labels': worst.exact(kind, sample.labels, theirs)
        elif name == 'mask_area': worst.exact(kind, unpack_masks(sample.masks, size[1]).sum((1, 2)), theirs)
        elif name == 'pixels.mean': worst.close(kind, pixels.mean((1, 2), dtype=np.float64), theirs, .005)
        elif name == 'pixels.sub':
            worst.close(f'{kind} (grey levels)', sub * std, theirs * std, 2.001)
            grey.append(np.abs((sub - theirs) * std).mean())
            assert grey[-1] < .5, f'{key}: {grey[-1]} grey levels on average'
        else: pytest.fail(f'{kind} is an array that this test does not know')
    return len(arrays)


def split_arrays(data, split):
    "Arrays of the images of a split: image key -> name -> array. Keys are `flip0.123` in train and `123` in val."
    depth, images = {'train': 3, 'val': 2}[split], {}
    for name in data.files:
        parts = name.split('.')
        if parts[0] == split and len(parts) > depth:
            images.setdefault('.'.join(parts[1:depth]), {})['.'.join(parts[depth:])] = data[name]
    return images


def test_every_data_array(indexes, capsys):
    "Image ids, counts, shapes, scales, boxes, labels, mask areas and pixels of every file."
    files = data_files()
    assert files, f'no file under {reference} holds `train.image_ids`'
    for file in files:
        data, worst, grey, checked = np.load(file), Worst(), [], 0
        for split, index in indexes.items():
            worst.exact(f'{split}.image_ids', index.image_ids, data[f'{split}.image_ids'])
            checked += 1
            for key, arrays in split_arrays(data, split).items():
                checked += check_image(split, index, key, arrays, worst, grey)
        status = [indexes['train'].target(i, every=True)['status'] for i in range(len(indexes['train']))]
        for name, value in (('num_gt', trained), ('num_ignored', ignored)):
            worst.exact(f'train.{name}', [int((o == value).sum()) for o in status], data[f'train.{name}'])
            checked += 1
        assert checked == sum(o.split('.')[0] in ('train', 'val') for o in data.files), 'an array was not looked at'
        with capsys.disabled():
            print(f'\n{file.name}: {checked} arrays; grey levels off on average {np.mean(grey):.2f}')
            for kind, error in sorted(worst.rows.items()): print(f'  {kind:36}{error:.2e}')


def test_images_choose_their_own_objects(indexes):
    "An image's objects do not depend on which view it is read through."
    index = indexes['train']
    few = index.subset([3, 0])
    torch.testing.assert_close(few.target(0)['boxes'], index.target(3)['boxes'])
    assert few.path(1) == index.path(0)
