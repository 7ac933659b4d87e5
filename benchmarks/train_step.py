"""One training step (forward, backward, SGD) of scratchdet's Mask R-CNN and of torchvision's with the same parts, alternating.

Both see the same two images with eight objects each, start from the same weights and sample 512 RoIs an image. Each keeps its own defaults otherwise: the reference's
adaptive RoIAlign here, two samples a bin in torchvision.

    python benchmarks/train_step.py --out results/train_step.json
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision

from peer import torchvision_inputs, torchvision_mask_rcnn
from scratchdet.detector import mask_rcnn
from scratchdet.init import init_detector
from scratchdet.masks import pack_masks
from scratchdet.matcher import image_keys
from scratchdet.optim import sgd


def random_batch(n, size, objects, num_classes, seed=0):
    "A batch of noise images with `objects` boxes each, half to a fifth of the image wide, and elliptic masks."
    g, (h, w) = torch.Generator().manual_seed(seed), size
    wh = (torch.rand(n, objects, 2, generator=g) * .3 + .2) * torch.tensor([w, h])
    xy = torch.rand(n, objects, 2, generator=g) * (torch.tensor([w, h]) - wh)
    boxes = torch.cat([xy, xy + wh], -1)
    y, x = torch.arange(h)[:, None] + .5, torch.arange(w) + .5
    c, r = (xy + wh / 2)[..., None, None, :], (wh / 2)[..., None, None, :]
    masks = ((x - c[..., 0]) / r[..., 0]) ** 2 + ((y - c[..., 1]) / r[..., 1]) ** 2 < 1
    return SimpleNamespace(
        images=torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=g), sizes=torch.tensor([[h, w]] * n),
        image_ids=torch.arange(n), boxes=boxes, labels=torch.randint(0, num_classes, (n, objects), generator=g),
        valid=torch.ones(n, objects, dtype=torch.bool), masks=pack_masks(masks))


def stepper(model, losses, optimizer, bf16):
    "A function that runs one training step and returns the loss."
    def step():
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): total = sum(losses().values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.item()
    return step


def with_weights(model, ours):
    "torchvision's model with our weights, so that both see the same proposals; its heads have rows for the background besides."
    with torch.no_grad():
        for a, b in zip(ours.parameters(), model.parameters(), strict=True): b[:len(a)] = a
    return model


def build(kind, args, bf16):
    "The step of one of the two models at a low learning rate."
    torch.manual_seed(0)
    batch = random_batch(args.images, args.size, args.objects, 80)
    model = init_detector(mask_rcnn(80, batch_size_per_image=args.rois)).train()
    if kind == 'torchvision':
        model = with_weights(torchvision_mask_rcnn(80, args.size, rois=args.rois).train(), model)
        images, targets = torchvision_inputs(batch)
        losses = lambda: model([o.clone() for o in images], targets)
    else:
        keys = image_keys(0, 0, batch.image_ids)
        losses = lambda: model(batch, keys)
    return stepper(model, losses, sgd(model, lr=1e-3), bf16)


def hardware():
    "What the run ran on."
    with open('/proc/cpuinfo') as f: name = next((o.split(':')[1].strip() for o in f if o.startswith('model name')), platform.machine())
    return dict(cpu=name, threads=torch.get_num_threads(), torch=torch.__version__, torchvision=torchvision.__version__)


def own_peak():
    "Peak resident memory of this process, GB (`ru_maxrss` would count its parent's)."
    with open('/proc/self/status') as f: return next(int(o.split()[1]) for o in f if o.startswith('VmHWM')) / 2 ** 20


def peak_memory(kind, args, bf16):
    "Peak resident memory (GB) of two steps in a process of their own."
    flags = ['--size', *map(str, args.size), '--images', str(args.images), '--rois', str(args.rois), '--objects', str(args.objects)]
    run = subprocess.run([sys.executable, __file__, *flags, '--one', kind] + ['--bf16'] * bf16, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main():
    "Time both models in turn, fp32 then bf16 autocast; print and write medians."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, nargs=2, default=(512, 640), help='height and width, px')
    p.add_argument('--images', type=int, default=2)
    p.add_argument('--objects', type=int, default=8, help='objects an image')
    p.add_argument('--rois', type=int, default=512, help='sampled RoIs an image')
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--out', type=Path, help='json file to write')
    p.add_argument('--one', choices=['scratchdet', 'torchvision'], help='run two steps of one model and print its peak memory')
    p.add_argument('--bf16', action='store_true', help='with --one: under bf16 autocast')
    args = p.parse_args()
    if args.one:
        step = build(args.one, args, args.bf16)
        for _ in range(2): step()
        return print(own_peak())
    result = dict(command=' '.join(['python', *sys.argv]), hardware=hardware(), images=args.images, size=list(args.size), objects=args.objects,
                  rois=args.rois, repeats=args.repeats)
    for precision in 'fp32', 'bf16':
        bf16, kinds = precision == 'bf16', ('scratchdet', 'torchvision')
        steps, seconds = {k: build(k, args, bf16) for k in kinds}, {k: [] for k in kinds}
        for k in kinds: steps[k]()
        for _ in range(args.repeats):
            for k in kinds:
                start = time.perf_counter()
                steps[k]()
                seconds[k].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(seconds['scratchdet'], seconds['torchvision'])]
        row = dict(ratio=statistics.median(ratios), ratios=ratios, seconds=seconds, median={k: statistics.median(v) for k, v in seconds.items()})
        del steps
        row['peak_gb'] = {k: peak_memory(k, args, bf16) for k in kinds}
        result[precision] = row
        print(f"{precision}: scratchdet {row['median']['scratchdet']:.2f} s, torchvision {row['median']['torchvision']:.2f} s, "
              f"median ratio {row['ratio']:.3f}, peak GB {row['peak_gb']}", flush=True)
    if args.out:
        tmp = args.out.with_suffix('.tmp')
        tmp.write_text(json.dumps(result, indent=1))
        os.replace(tmp, args.out)


if __name__ == '__main__': main()
