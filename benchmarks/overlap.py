"""What a training loop loses at a checkpoint and at the counting of an evaluation: done by the loop itself, and behind it.

The checkpoint is that of Mask R-CNN, R-50-FPN with GroupNorm: weights and velocities. The evaluation is generated as `evaluation.py` does. A step of the loop is
many small matrix products, each a call from Python, as in the loop that feeds a GPU. It stands still until a task is given, and in its longest step while the
task is done; what it loses besides, because both share processor and memory, is in `lost`: the time beyond that of as many usual steps.

    python benchmarks/overlap.py --out results/overlap.json
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import command, hardware_to_time, parser, seconds_of, write
from evaluation import Stored, make_detections, make_truth

from scratchdet.behind import Behind
from scratchdet.coco import coco_split, load_index
from scratchdet.count import coco_ap, count_apart, ground_truth, start_count
from scratchdet.detector import mask_rcnn, scale_detections
from scratchdet.evaluate import detections_to_coco
from scratchdet.mask_head import mask_rles
from scratchdet.optim import sgd
from scratchdet.resume import save_checkpoint, snapshot

a, b, c = torch.ones(3, 64, 64)


def step(products=200):
    "A step of the loop."
    for _ in range(products): torch.mm(a, b, out=c)


def beside(begin):
    "Do steps while what `begin` returns is done behind the loop: seconds that the loop stood still, lost, and until it was done."
    usual = statistics.median(seconds_of(step) for _ in range(100))
    with Behind() as behind:
        start, took = time.perf_counter(), []
        behind.give('task', begin())
        given = time.perf_counter() - start
        while behind.tasks:
            took.append(seconds_of(step))
            behind.check()
        seconds = time.perf_counter() - start
    return dict(still=given + max(took) - usual, given=given, lost=seconds - len(took) * usual, seconds=seconds, steps=len(took), step=usual)


def both_ways(by_loop, begin, repeats):
    "By the loop and behind it, in turn; the first turn is to warm up."
    found = dict(loop=[], behind=[])
    for _ in range(repeats + 1):
        seconds = seconds_of(by_loop)
        found['loop'].append(dict(still=seconds, lost=seconds, seconds=seconds))
        found['behind'].append(beside(begin))
    return {k: v[1:] for k, v in found.items()}


def checkpoint(root, args):
    "A checkpoint of Mask R-CNN with momentum."
    torch.manual_seed(args.seed)
    w = args.width
    model = mask_rcnn(80, width=w, channels=4 * w, fc=16 * w, groups=w // 2)
    optimizer = sgd(model, lr=.02)
    for p in model.parameters(): optimizer.state[p]['momentum_buffer'] = torch.randn_like(p)
    velocities, numbers = {k: optimizer.state[p]['momentum_buffer'] for k, p in model.named_parameters()}, iter(range(10 ** 6))
    def save(taken): return save_checkpoint(root/'checkpoints', model, optimizer, dict(step=next(numbers)), keep=1, taken=taken)
    def by_loop(): save((model.state_dict(), velocities))  # without a copy
    taken = {}, {}
    def begin():
        nonlocal taken
        taken = snapshot(model, optimizer, taken)
        return lambda: save(taken)
    found = both_ways(by_loop, begin, args.repeats)
    size = sum(o.stat().st_size for o in (root/'checkpoints').glob('step_*/*')) / 1e6
    return found, f'checkpoint of {size:.0f} MB'


def records_of(index, found):
    "The records of stored detections."
    model, records = Stored(index, found), []
    for i, (h, w) in enumerate(index.sizes.tolist()):
        det = scale_detections(model.one(i, h, w), (h, w), (h, w), mask_rles)
        records += detections_to_coco(det, index.image_ids[i], index.category_ids)
    return records


def evaluation(root, args):
    "The counting of boxes and masks."
    rng, tables = np.random.default_rng(args.seed), []
    truth = make_truth(root/'coco', args.images, rng)
    index = load_index(*coco_split(root/'coco', 'val'))
    records, kinds = records_of(index, make_detections(truth, args.detections, rng)), ['bbox', 'segm']
    def by_loop():
        truth = ground_truth(index)
        tables.append({k: coco_ap(truth, records, k) for k in kinds})
    def begin():
        process = start_count()
        return lambda: tables.append(count_apart(process, index, records, kinds))
    found = both_ways(by_loop, begin, args.repeats)
    assert len(tables) > 2 and all(o == tables[0] for o in tables), 'the tables differ'
    return found, f'evaluation of {len(index):,} images, {len(records):,} detections'


def main():
    "Measure, print and write."
    p = parser(__doc__, images=(5000, 'images'), detections=(100, 'detections of an image'), width=(64, 'of the network'),
               repeats=(5, 'of each'))
    p.add_argument('--seed', type=int, default=0, help='of what is drawn (0)')
    args = p.parse_args()
    torch.set_num_threads(1)
    result = dict(command=command(), hardware=hardware_to_time(), parts={})
    with tempfile.TemporaryDirectory() as root:
        for name, do in dict(checkpoint=checkpoint, evaluation=evaluation).items():
            result[name], result['parts'][name] = do(Path(root), args)
            for way, rows in result[name].items():
                still, lost, seconds = (statistics.median(o[k] for o in rows) for k in ('still', 'lost', 'seconds'))
                print(f'{result["parts"][name]}, {way}: stands still for {still:.3f} s, loses {lost:.3f} s, done after {seconds:.3f} s', flush=True)
    write(args.out, result)


if __name__ == '__main__': main()
