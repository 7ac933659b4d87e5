"""One training step (forward, backward, SGD) of scratchdet's Mask R-CNN and of torchvision's with the same parts, alternating, whole and by part.

Both see the same two images with eight objects each, start from the same weights and sample 512 RoIs an image. Each keeps its own defaults otherwise: the reference's
adaptive RoIAlign and kept memory here, two samples a bin and the C library's ways in torchvision; so each runs in a process of its own, and one waits for the
other. bf16 is timed where the processor has instructions for it, though they be slower; `default` is what our training takes by itself.

    python benchmarks/train_step.py --out results/train_step.json
"""
import statistics
from types import SimpleNamespace

import torch

from common import Apart, against, command, hardware_to_time, parser, spread, take_turns, whole, write
from parts import Clock, forward_flops, machine_limits, time_ours, time_theirs
from peer import torchvision_inputs, torchvision_mask_rcnn
from scratchdet.detector import mask_rcnn
from scratchdet.init import init_detector
from scratchdet.masks import pack_masks
from scratchdet.matcher import image_keys
from scratchdet.optim import bf16_gain, keep_memory, sgd, usable_precision

kinds = 'scratchdet', 'torchvision'


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


def stepper(model, losses, optimizer, bf16, clock=None):
    "A function that runs one training step and returns the loss; with a clock, its parts are timed."
    clock = clock or Clock()
    def step():
        with clock.step(): return parts()
    def parts():
        with clock('rest of forward'), torch.autocast('cpu', torch.bfloat16, enabled=bf16): total = sum(losses().values())
        optimizer.zero_grad()
        with clock('backward'): total.backward()
        with clock('optimizer'): optimizer.step()
        return total.item()
    return step


def with_weights(model, ours):
    "torchvision's model with our weights, so that both see the same proposals; its heads have rows for the background besides."
    with torch.no_grad():
        for a, b in zip(ours.parameters(), model.parameters(), strict=True): b[:len(a)] = a
    return model


def build(kind, args, bf16, clock=None):
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
    (time_theirs if kind == 'torchvision' else time_ours)(model)
    return stepper(model, losses, sgd(model, lr=1e-3), bf16, clock)


def flops(args):
    "`forward_flops` of the timed model."
    torch.manual_seed(0)
    model, batch = init_detector(mask_rcnn(80, batch_size_per_image=args.rois)).train(), random_batch(args.images, args.size, args.objects, 80)
    return forward_flops(model, batch)


def timed_step(kind, args, bf16):
    "One of the two models in this process: a function that runs a step and returns the medians of its parts so far, without the first step."
    clock = Clock()
    step = build(kind, args, bf16, clock)
    def run():
        step()
        if kind == 'scratchdet': keep_memory()  # as our training does
        return clock.medians(skip=len(clock.steps) > 1)
    return run


def measure(args):
    "All models and precisions in turn; medians, parts, memory."
    precisions = ['fp32', 'bf16'] if bf16_gain() > .25 else ['fp32']  # imitated, it takes minutes
    apart = {f'{k} {p}': Apart(timed_step, k, args, p == 'bf16') for p in precisions for k in kinds}
    parts = {}
    seconds = take_turns({name: lambda name=name: parts.update({name: apart[name]()}) for name in apart}, args.repeats)
    peak = {name: o.end() for name, o in apart.items()}
    result = dict(images=args.images, size=list(args.size), objects=args.objects, rois=args.rois, repeats=args.repeats, **machine_limits())
    for p in precisions:
        row = against({k: seconds[f'{k} {p}'] for k in kinds}, *kinds)
        row.update({name: {k: o[f'{k} {p}'] for k in kinds} for name, o in (('parts', parts), ('peak_gb', peak))})
        result[p] = row
        print(f"{p}: scratchdet {row['median']['scratchdet']:.2f} s, torchvision {row['median']['torchvision']:.2f} s, "
              f"median ratio {spread(row['ratios'])}, peak GB {row['peak_gb']}", flush=True)
    best = usable_precision('bf16', 'cpu')
    result['default'] = dict(precision=best)
    for p in precisions:
        ratios = [a / b for a, b in zip(seconds[f'scratchdet {best}'], seconds[f'torchvision {p}'])]
        result['default'][p] = dict(ratio=statistics.median(ratios), ratios=ratios)
        print(f"ours by default ({best}) over torchvision {p}: {spread(ratios)}", flush=True)
    return dict(result, flops=flops(args))


def main():
    "Time both models in turn in each precision; print and write medians."
    p = parser(__doc__, images=(2, 'images'), objects=(8, 'objects an image'), rois=(512, 'sampled RoIs an image'), repeats=(5, 'of each'))
    p.add_argument('--size', type=whole, nargs=2, default=(512, 640), help='height and width, px')
    args = p.parse_args()
    machine = hardware_to_time()
    write(args.out, dict(command=command(), hardware=machine, **measure(args)))


if __name__ == '__main__': main()
