"""scratchdet's Mask R-CNN and torchvision's of the same parts learn the same toy set: same batches, steps, schedule, optimizer.

Each run trains from random weights with the `demo` recipe's values, on a network twice as wide, and is evaluated on 200 unseen images; seeds change the weights,
the order of the images and the samples. A file that is there already is added to: its runs stay, and are not repeated.

    python benchmarks/learning.py --out results/learning.json
    python benchmarks/learning.py --kinds scratchdet --precisions bf16 fp32 --out results/precision.json
"""
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from common import command, hardware_to_time, parser, whole, write
from peer import AsDetector, torchvision_mask_rcnn
from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.detector import mask_rcnn
from scratchdet.evaluate import evaluate
from scratchdet.init import init_detector
from scratchdet.loader import eval_loader, train_loader
from scratchdet.matcher import image_keys
from scratchdet.optim import sgd
from scratchdet.recipes import detector_arguments, recipe_schedule, recipes
from scratchdet.toy import make_toy


def build(kind, recipe, num_classes, seed):
    "One of the two models with random weights, each by its own initialization."
    torch.manual_seed(seed)
    if kind == 'scratchdet': return init_detector(mask_rcnn(num_classes, **detector_arguments(recipe)))
    pre, post = recipe.pre_nms_topk, recipe.post_nms_topk
    return AsDetector(torchvision_mask_rcnn(
        num_classes, (recipe.short_sides[0], recipe.long_side), blocks=recipe.blocks, channels=recipe.channels, fc=recipe.fc,
        groups=recipe.groups, rois=recipe.roi_batch, post_nms_train=post[0], rpn_batch_size_per_image=recipe.rpn_batch,
        rpn_pre_nms_top_n_train=pre[0], rpn_pre_nms_top_n_test=pre[1], rpn_post_nms_top_n_test=post[1],
        box_score_thresh=recipe.score_thresh, box_detections_per_img=recipe.max_dets))


def epochs(images, recipe):
    "The training batches of a run, one after the other."
    for epoch in range(10 ** 6):
        yield from train_loader(images, batch_size=recipe.batch_size, seed=recipe.seed, epoch=epoch, short_sides=recipe.short_sides,
                                long_side=recipe.long_side, flip=recipe.flip, masks=recipe.masks)


def training(model, recipe, images, schedule):
    "Train `model` step by step; yields each step's number, its loss, and the seconds of its forward, backward and update."
    optimizer = sgd(model.train(), recipe.lr, recipe.momentum, recipe.weight_decay)
    for step, batch in zip(range(schedule.steps), epochs(images, recipe)):
        start = time.perf_counter()
        for g in optimizer.param_groups: g['lr'] = schedule(step)
        with torch.autocast('cpu', torch.bfloat16, enabled=recipe.precision == 'bf16'):
            total = sum(model(batch, image_keys(recipe.seed, step, batch.image_ids)).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        yield step, total.item(), time.perf_counter() - start


def unseen_ap(model, recipe, unseen):
    "What `evaluate` finds on the images of `unseen`."
    return evaluate(model, unseen, eval_loader(unseen, batch_size=8, short=recipe.short_sides[-1], long=recipe.long_side))


def both_splits(root):
    "The index of what is learned from, and that of the unseen images."
    (train, images), (val, val_images) = (coco_split(root, o) for o in ('train', 'val'))
    return training_images(load_index(train, images)), load_index(val, val_images)


def learn(kind, recipe, root, evaluations):
    "Train one model; returns the losses of every tenth step, AP at `evaluations` points of the run, seconds of training."
    index, unseen = both_splits(root)
    schedule = recipe_schedule(recipe, len(index))
    model = build(kind, recipe, len(index.category_ids), recipe.seed)
    points = {round(schedule.steps * (i + 1) / evaluations) for i in range(evaluations)}
    losses, ap, seconds = [], [], 0.
    for step, loss, took in training(model, recipe, index, schedule):
        seconds += took
        if step % 10 == 0: losses.append([step, loss])
        if step + 1 in points:
            found = unseen_ap(model, recipe, unseen)
            ap.append(dict(step=step + 1, **{f'{k}_{m}': found[k][m] for k in ('bbox', 'segm') for m in ('AP', 'AP50')}))
            print(f'{kind} {recipe.precision} seed {recipe.seed} step {step + 1}: {ap[-1]}, {seconds:.0f} s of training', flush=True)
    return dict(kind=kind, seed=recipe.seed, losses=losses, ap=ap, seconds=seconds)


def kept(out, setup, machine):
    "The runs that the file holds already, which must be of this setup and of this machine's processor and PyTorch."
    if not (out and out.exists()): return []
    there = json.loads(out.read_text())
    same = all(json.dumps(there.get(k)) == json.dumps(v) for k, v in setup.items())
    if not same or any(there['hardware'][k] != machine[k] for k in ('cpu', 'torch')):
        raise SystemExit(f'{out} holds runs of another setup, processor or torch: name another file with --out')
    return there['runs']


def summary(runs):
    "Mean, lowest and highest of each measure in the last evaluations of each kind."
    found = {}
    for k in dict.fromkeys(o['kind'] for o in runs):
        rows = [o['ap'][-1] for o in runs if o['kind'] == k]
        found[k] = {m: dict(mean=statistics.mean(v := [o[m] for o in rows]), low=min(v), high=max(v)) for m in rows[0] if m != 'step'}
    return found


def main():
    "Run every model with every seed; write all curves after each run, print the means."
    p = parser(__doc__, train=(1000, 'images to learn from'), val=(200, 'unseen images'), evaluations=(4, 'of a run, the last at its end'),
               jobs=(2, 'runs at a time, with one thread each'))
    p.add_argument('--epochs', type=whole, help="of the demo recipe's schedule, shortened in proportion")
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--kinds', nargs='+', default=['scratchdet', 'torchvision'])
    p.add_argument('--precisions', nargs='+', choices=('bf16', 'fp32'), default=['bf16'], help='imitated, and slow, on a processor without it')
    args = p.parse_args()
    recipe = replace(recipes['demo'], width=64, channels=96)
    if args.epochs:
        milestones = tuple(round(o * args.epochs / recipe.epochs) for o in recipe.milestones)
        try: recipe = replace(recipe, epochs=args.epochs, milestones=milestones)
        except ValueError as e: p.error(f'--epochs {args.epochs}: {e}')
    machine = hardware_to_time()
    with tempfile.TemporaryDirectory() as folder:
        root = make_toy(Path(folder) / 'toy', train=args.train, val=args.val)
        arms = {f'{k} {o}' if len(args.precisions) > 1 else k: (k, o) for k in args.kinds for o in args.precisions}
        setup = dict(recipe=vars(recipe), train=args.train, val=args.val, evaluations=args.evaluations)
        runs = kept(args.out, setup, machine)
        wanted = [(name, s) for s in args.seeds for name in arms if (name, s) not in {(o['kind'], o['seed']) for o in runs}]
        todo = [(arms[name][0], replace(recipe, seed=s, precision=arms[name][1]), root, args.evaluations) for name, s in wanted]
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn'), torch.set_num_threads, (1,)) as pool:
            for run, (name, _) in zip(pool.map(learn, *zip(*todo)) if todo else (), wanted):
                runs.append(run | dict(kind=name))
                write(args.out, dict(command=command(), hardware=machine, jobs=args.jobs, **setup, runs=runs, summary=summary(runs)))
    print(json.dumps(summary(runs), indent=1))


if __name__ == '__main__': main()
