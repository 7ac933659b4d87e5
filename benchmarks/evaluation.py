"""Evaluation of 5,000 images with 100 detections each, boxes and masks: in one process, in two, and counted by pycocotools.

Images, objects and detections are generated from a seed in the shape of COCO's validation set: about 36,000 objects of 80 categories, one in a hundred a crowd.
A stand-in for the detector returns the stored detections, so that all the rest is what a run does: reading and resizing images, pasting masks, run
lengths, gathering, counting. All tables must be equal.

    python benchmarks/evaluation.py --out results/evaluation.json
    python benchmarks/evaluation.py --count --out results/counting.json     counting alone, without files and processes
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.io import write_jpeg

from common import against, command, hardware_to_time, own_peak, parser, seconds_of, write

from scratchdet.coco import coco_split, load_index
from scratchdet.detector import scale_detections
from scratchdet.count import coco_ap, ground_truth, numbers, run_hotcoco, run_pycocotools
from scratchdet.evaluate import detections_to_coco, evaluate
from scratchdet.loader import eval_loader
from scratchdet.mask_head import mask_rles

shapes = np.array([(480, 640), (640, 480), (427, 640), (640, 427)])
category_ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def ellipse(box, points=20):
    "A polygon in the box x, y, w, h."
    at, (x, y, w, h) = np.linspace(0, 2 * np.pi, points, endpoint=False), box
    return np.stack([x + w / 2 * (1 + np.cos(at)), y + h / 2 * (1 + np.sin(at))], 1).round(2).ravel().tolist()


def annotation(number, image, category, box, crowd, size):
    "A record as in COCO's files: polygons, or counts for a crowd."
    rle = coco_mask.merge(coco_mask.frPyObjects([ellipse(box)], *size))
    field = [ellipse(box)]
    if crowd:
        bits = coco_mask.decode(rle).T.ravel()
        edges = np.flatnonzero(np.diff(bits)) + 1
        counts = np.diff([0, *edges, len(bits)]).tolist()
        field = dict(size=[int(o) for o in size], counts=([0] if bits[0] else []) + counts)
    return dict(id=number, image_id=int(image), category_id=int(category), bbox=[round(float(o), 2) for o in box],
                area=float(coco_mask.area(rle)), iscrowd=int(crowd), segmentation=field)


def random_boxes(rng, sizes):
    "Boxes x, y, w, h inside images of these sizes, mostly small, as in COCO."
    side = rng.lognormal(np.log(55), 1, (len(sizes), 1)) * np.exp(rng.normal(0, .35, (len(sizes), 2)))
    wh = side.clip(6, sizes[:, ::-1] * .95)
    return np.concatenate([rng.random((len(sizes), 2)) * (sizes[:, ::-1] - wh), wh], 1)


def make_truth(root, images, rng):
    "A data set in COCO's layout; its images are grey, and one file serves all images of one size."
    kind, objects = rng.choice(4, images, p=[.6, .2, .15, .05]), int(7.2 * images)
    owner = np.sort(rng.choice(images, objects, p=rng.dirichlet(np.full(images, 1.5))))
    shares = 1 / np.arange(1, 81)
    labels, sizes = rng.choice(80, objects, p=shares / shares.sum()), shapes[kind]
    boxes, crowds = random_boxes(rng, sizes[owner]), rng.random(objects) < .01
    ids = np.sort(rng.choice(600_000, images, replace=False)) + 1
    name = [f'{h}x{w}.jpg' for h, w in shapes.tolist()]
    for split in ('annotations', 'val2017'): (root/split).mkdir(parents=True)
    for (h, w), file in zip(shapes.tolist(), name): write_jpeg(torch.full((3, h, w), 128, dtype=torch.uint8), str(root/'val2017'/file))
    rows = zip(ids[owner], np.array(category_ids)[labels], boxes, crowds, sizes[owner])
    doc = dict(images=[dict(id=int(i), file_name=name[k], height=int(h), width=int(w)) for i, k, (h, w) in zip(ids, kind, sizes)],
               annotations=[annotation(i, *row) for i, row in enumerate(rows, 1)],
               categories=[dict(id=k, name=f'kind {k}') for k in category_ids])
    (root/'annotations/instances_val2017.json').write_text(json.dumps(doc))
    return owner, labels, boxes, sizes


def make_detections(truth, each, rng):
    "For every image: objects that moved, some as another category, and boxes that hold nothing; many scores are equal."
    owner, labels, boxes, sizes = truth
    found = dict(boxes=random_boxes(rng, sizes.repeat(each, 0)).reshape(len(sizes), each, 4),
                 labels=rng.integers(0, 80, (len(sizes), each)), scores=(rng.random((len(sizes), each)) ** 3).round(3))
    for i in range(len(sizes)):
        own = np.tile(np.flatnonzero(owner == i), 3)[:each]
        moved = boxes[own] + rng.normal(0, .08, (len(own), 4)) * boxes[own][:, [2, 3, 2, 3]]
        found['boxes'][i, :len(own)] = np.concatenate([moved[:, :2], moved[:, 2:].clip(2)], 1)
        found['labels'][i, :len(own)] = np.where(rng.random(len(own)) < .85, labels[own], found['labels'][i, :len(own)])
        found['scores'][i, :len(own)] = rng.random(len(own)).round(2)
    found['boxes'][..., 2:] += found['boxes'][..., :2]
    return dict(found, radii=rng.uniform(.75, 1.1, (len(sizes), each, 2)))


class Stored(nn.Module):
    "Returns stored detections at the network's scale, with masks of 28 x 28 cells, as a `Detector` does."
    def __init__(self, index, found):
        super().__init__()
        self.index, self.mask_head, self.weight = index, True, nn.Parameter(torch.zeros(1))
        self.row = {int(o): i for i, o in enumerate(index.image_ids)}
        self.found = {k: torch.from_numpy(v) for k, v in found.items()}

    def one(self, i, h, w):
        "The detections of one image for a network that sees h x w px."
        found, (height, width) = {k: v[i] for k, v in self.found.items()}, self.index.sizes[i].tolist()
        cell = (torch.arange(28) + .5) / 14 - 1
        x, y = (cell / r[:, None] for r in found.pop('radii').float().unbind(1))  # (D, 28) each
        scale = torch.tensor([w / width, h / height] * 2)
        probs = torch.sigmoid(8 * (1 - x[:, None] ** 2 - y[:, :, None] ** 2))  # (D, 28, 28)
        return dict(boxes=found['boxes'].float() * scale, labels=found['labels'], scores=found['scores'].float(), mask_probs=probs)

    def forward(self, batch):
        "One dict an image."
        return [self.one(self.row[i], *size) for i, size in zip(batch.image_ids.tolist(), batch.sizes.tolist())]


def memory():
    "Resident memory of this process now, GB."
    with open('/proc/self/status') as f: return next(int(o.split()[1]) for o in f if o.startswith('VmRSS')) / 2 ** 20


class Timed:
    "A loader that notes when its last batch was worked on, and the memory then."
    def __init__(self, loader): self.loader = loader

    def __iter__(self):
        yield from self.loader
        self.end, self.memory = time.perf_counter(), memory()


def worker(root, out):
    "Evaluate the share of one process; its results, times and peak memory go to a file."
    accelerator, index = Accelerator(cpu=True), load_index(*coco_split(root, 'val'))
    rank, processes = accelerator.process_index, accelerator.num_processes
    with np.load(root/'detections.npz') as f: model = Stored(index, dict(f))
    loader = Timed(eval_loader(index, process=rank, processes=processes, short=320, long=640))
    accelerator.wait_for_everyone()
    before, start = memory(), time.perf_counter()
    results = evaluate(model, index, loader, accelerator=accelerator, out=out)
    times = dict(seconds=time.perf_counter() - start, detection_seconds=loader.end - start, start_gb=before, detection_gb=loader.memory, peak_gb=own_peak())
    (out/f'of_{rank}.json').write_text(json.dumps(dict(**times, results=results)))
    accelerator.end_training()


def original(root, out):
    "Count the detections in `out` with pycocotools."
    index = load_index(*coco_split(root, 'val'))
    start, truth = time.perf_counter(), ground_truth(index)
    records = json.loads((out/'detections.json').read_bytes())
    results = {k: coco_ap(truth, records, k, run_pycocotools) for k in ('bbox', 'segm')}
    (out/'pycocotools.json').write_text(json.dumps(dict(seconds=time.perf_counter() - start, peak_gb=own_peak(), results=results)))


def call(args, *launcher):
    "Run this file in another process."
    subprocess.run([sys.executable, *launcher, __file__, *map(str, args)], check=True)


def several(root, processes):
    "Evaluate in so many processes: the times and memory of each, the results, and a hash of the detections."
    out = root/f'of_{processes}'
    out.mkdir()
    call(['--worker', root, '--to', out], '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes))
    ranks = [json.loads((out/f'of_{i}.json').read_text()) for i in range(processes)]
    results = [o.pop('results') for o in ranks]
    assert all(o == results[0] for o in results), 'processes hold different results'
    return ranks, results[0], hashlib.sha256((out/'detections.json').read_bytes()).hexdigest()


def differences(a, b):
    "Absolute differences of all numbers of two tables; both lack the same."
    pairs = [(a[k][n], b[k][n]) for k in ('bbox', 'segm') for n in numbers]
    pairs += [(v, b[k]['per_category'][n]) for k in ('bbox', 'segm') for n, v in a[k]['per_category'].items()]
    assert all((x is None) == (y is None) for x, y in pairs), 'a number is missing in one of the tables'
    return [abs(x - y) for x, y in pairs if x is not None]


def counted(root, images, detections, repeats, seed=0):
    "Count the same records in memory with both, in turn: seconds of making our run lengths and of each count, tables compared."
    rng = np.random.default_rng(seed)
    truth = make_truth(root, images, rng)
    found = make_detections(truth, detections, rng)
    index = load_index(*coco_split(root, 'val'))
    model, records, encoding = Stored(index, found), [], 0.
    for i, (h, w) in enumerate(index.sizes.tolist()):
        det, start = model.one(i, h, w), time.perf_counter()
        det = scale_detections(det, (h, w), (h, w), mask_rles)
        records += detections_to_coco(det, index.image_ids[i], index.category_ids)
        encoding += time.perf_counter() - start
    truth, runs, results = ground_truth(index), dict(scratchdet=run_hotcoco, pycocotools=run_pycocotools), {}
    def count(name): results[name] = {k: coco_ap(truth, records, k, runs[name]) for k in ('bbox', 'segm')}
    seconds = {name: [] for name in runs}
    for name in list(runs) * repeats: seconds[name].append(seconds_of(lambda: count(name)))
    gaps = differences(results['scratchdet'], results['pycocotools'])
    return dict(images=images, detections=detections, records=len(records), repeats=repeats, encoding_seconds=encoding, peak_gb=own_peak(),
                **against(seconds, *runs), numbers_compared=len(gaps), largest_difference=max(gaps))


def compare(root, args):
    "Generate, evaluate in one and in two processes, count with pycocotools, compare."
    machine, rng = hardware_to_time(), np.random.default_rng(args.seed)
    truth = make_truth(root, args.images, rng)
    np.savez(root/'detections.npz', **make_detections(truth, args.detections, rng))
    load_index(*coco_split(root, 'val'))
    (one, results, detections), (two, same, as_well) = several(root, 1), several(root, 2)
    call(['--original', root, '--to', root/'of_1'])
    slow = json.loads((root/'of_1/pycocotools.json').read_text())
    gaps, table = differences(results, slow['results']), {k: {n: results[k][n] for n in numbers} for k in ('bbox', 'segm')}
    return dict(command=command(), hardware=machine, images=args.images, objects=len(truth[0]), detections=args.detections,
                one_process=one, two_processes=two, pycocotools={k: slow[k] for k in ('seconds', 'peak_gb')},
                same_table=results == same, same_detections=detections == as_well, numbers_compared=len(gaps),
                largest_difference_to_pycocotools=max(gaps), detections_mb=(root/'of_1/detections.json').stat().st_size / 1e6, results=table)


def main():
    "Compare, print and write; the exit status is 1 where tables differ."
    p = parser(__doc__, images=(5000, 'images'), detections=(100, 'detections of an image'), repeats=(3, 'of each count with --count'))
    p.add_argument('--seed', type=int, default=0, help='of what is drawn (0)')
    p.add_argument('--count', action='store_true', help='only count, here and with pycocotools: ten minutes')
    p.add_argument('--worker', type=Path, help='evaluate this data set, as one of the processes')
    p.add_argument('--original', type=Path, help='count with pycocotools')
    p.add_argument('--to', type=Path, help='folder for what --worker and --original write')
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.worker: return worker(args.worker, args.to)
    if args.original: return original(args.original, args.to)
    with tempfile.TemporaryDirectory() as root:
        if args.count: result = dict(command=command(), hardware=hardware_to_time(), **counted(Path(root), args.images, args.detections, args.repeats, args.seed))
        else: result = compare(Path(root), args)
    print(json.dumps(result, indent=1))
    write(args.out, result)
    if args.count: sys.exit('the tables differ' if result['largest_difference'] > 1e-9 else 0)
    if not (result['same_table'] and result['same_detections'] and result['largest_difference_to_pycocotools'] <= 1e-9):
        sys.exit('the tables differ')


if __name__ == '__main__': main()
