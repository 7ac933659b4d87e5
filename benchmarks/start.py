"""How long one waits: `--help` of every command, and from the command line of a training on a data set as large as COCO to its first step.

The annotation files are those of `coco_index.py`; the images of the first batch are drawn. The index is there already, as in all but the first run;
the first run builds it, which is timed alone.

    python benchmarks/start.py --out results/start.json
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.io import write_jpeg

from coco_index import write_coco
from common import command, hardware_to_time, parser, seconds_of, write

commands = 'train', 'evaluate', 'predict', 'checkpoints', 'plan', 'report'
first_step = """
import sys
from scratchdet.recipes import find_recipe
from scratchdet.train import Run, batches
run = Run(find_recipe('mask_rcnn_r50_fpn_gn_scratch_6x', ['batch_size=2', 'lr=0.0025', 'images_per_process=2', 'workers=0']), *sys.argv[1:], cpu=True)
(batch,) = next(batches(run.images, run.recipe))
print(len(run.images), tuple(batch.images.shape))
"""


def call(*words):
    "Run Python in a process of its own; its output."
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr)
    return done.stdout


def data(root, images, annotations):
    "A folder in COCO's layout: a large training split, a small validation split; all files of one size are one picture."
    (root / 'annotations').mkdir(parents=True)
    for split, share in (('train', 1), ('val', .01)):
        json = root / f'annotations/instances_{split}2017.json'
        folder = write_coco(json, max(int(images * share), 20), max(int(annotations * share), 100))
        folder.rename(root / f'{split}2017')
    return root


def fill(root):
    "Pictures for all images: links to one file for each size."
    from scratchdet.coco import coco_split, load_index
    index = load_index(*coco_split(root, 'train'))
    for h, w in np.unique(index.sizes, axis=0).tolist(): write_jpeg(torch.full((3, h, w), 99, dtype=torch.uint8), str(root / f'{h}x{w}.jpg'))
    for i, (h, w) in enumerate(index.sizes.tolist()):
        index.path(i).unlink()
        index.path(i).hardlink_to(root / f'{h}x{w}.jpg')


def main():
    "Time all, print and write."
    p = parser(__doc__, images=(118287, 'images of the training split'), annotations=(860001, 'its objects'), repeats=(3, 'of each'))
    args = p.parse_args()
    machine = hardware_to_time()
    helps = {o: [seconds_of(lambda: call('-m', f'scratchdet.{o}', '--help')) for _ in range(args.repeats)] for o in commands}
    with tempfile.TemporaryDirectory() as folder:
        root = data(Path(folder) / 'coco', args.images, args.annotations)
        built = seconds_of(lambda: fill(root))
        first = [seconds_of(lambda: call('-c', first_step, root, Path(folder) / f'run{i}')) for i in range(args.repeats)]
    print(f'--help: {max(min(o) for o in helps.values()):.2f} s; to the first step: {sorted(first)} s')
    write(args.out, dict(command=command(), hardware=machine, images=args.images, annotations=args.annotations, help_seconds=helps,
                         first_build_seconds=built, first_step_seconds=first))


if __name__ == '__main__': main()
