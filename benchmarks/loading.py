"""Images a second on one core, from files to batches with boxes, labels and masks: `train_loader` and torchvision's `CocoDetection` with v2 transforms.

`pixels` is decoding and resizing alone, with the same functions. Then the share of the pixels that padding adds, in batches of 16 in training, and in
evaluation, where the sizes are those of the images that were read, each many times.

    python benchmarks/loading.py --out results/loading.json
"""
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from common import against, command, hardware_to_time, parser, spread, take_turns, write
from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.loader import _scaled, plan_epoch, train_loader
from scratchdet.toy import make_toy
from scratchdet.transforms import read_image, resize_image, resized_size
from train_step import kinds

def files(folder, images):
    "COCO images where `SCRATCHDET_COCO` leads to them, else drawn ones of 480x640 px."
    coco = Path(os.environ.get('SCRATCHDET_COCO', '../shared/coco-mini'))
    return coco if coco.is_dir() else make_toy(folder / 'toy', train=images, val=1, size=(480, 640))


def ours(index, batch):
    "Read all images in batches."
    return lambda: sum(len(o) for o in train_loader(index, batch_size=batch))


def pixels(index):
    "Decode and resize all images, and nothing else: no loader with the same pixels is faster."
    sizes = [resized_size(*o) for o in index.sizes.tolist()]
    return lambda: sum(len(resize_image(read_image(index.path(i)), o)) // 3 for i, o in enumerate(sizes))


def theirs(index, batch):
    "The same with torchvision: lists of images and targets, as its detectors take them."
    do = v2.Compose([v2.ToImage(), v2.Resize(800, max_size=1333), v2.RandomHorizontalFlip(.5), v2.SanitizeBoundingBoxes()])
    data = CocoDetection(index.image_dir, index.json_path, transforms=do)
    data.ids = index.image_ids.tolist()
    data = wrap_dataset_for_transforms_v2(data, target_keys=('boxes', 'labels', 'masks', 'image_id'))
    return lambda: sum(len(o) for o in torch.utils.data.DataLoader(data, batch, collate_fn=list))


def waste(sizes, batch):
    "Share of the pixels of an epoch, and of an evaluation, that are padding, and how many shapes of batches there are."
    plan = plan_epoch(sizes, batch)
    scaled, padded = _scaled(sizes, np.full(len(sizes), 800), 1333, True)
    trained = 1 - sum(o.sizes.prod(1).sum() for o in plan) / sum(len(o.images) * o.shape[0] * o.shape[1] for o in plan)
    return dict(training=float(trained), evaluation=float(1 - scaled.prod(1).sum() / padded.prod(1).sum()), shapes=len({o.shape for o in plan}))


def main():
    "Time both in turn, measure waste, print and write."
    p = parser(__doc__, images=(64, 'images to read'), batch=(2, 'images a batch'), repeats=(5, 'of each'))
    args = p.parse_args()
    torch.set_num_threads(1)
    machine = hardware_to_time()
    with tempfile.TemporaryDirectory() as folder:
        split = coco_split(files(Path(folder), args.images), 'train')
        index = training_images(load_index(*split, cache=folder))
        index = index.subset(np.arange(min(args.images // args.batch * args.batch, len(index) // args.batch * args.batch)))
        todo = dict(zip(kinds, (o(index, args.batch) for o in (ours, theirs)))) | dict(pixels=pixels(index))
        seconds = take_turns(todo, args.repeats)
        result = against(seconds, *kinds)
        drawn = np.repeat(index.sizes, 500, axis=0)
    rate = {k: len(index) / statistics.median(v) for k, v in seconds.items()}
    pads = waste(drawn, 16)
    print(f"loading: ratio {spread(result['ratios'])}, images a second {rate}\n{pads}")
    write(args.out, dict(command=command(), hardware=machine, images=len(index), objects=int(sum(len(index.target(i)['rows']) for i in range(len(index)))),
                         images_per_second=rate, padding=pads, **result))


if __name__ == '__main__': main()
