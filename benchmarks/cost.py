"""How the time of a training step grows: with images in a batch, with objects in an image, with the area of an image.

Each series is walked several times, up and down in turn; the exponent is the slope of log(time) over log(x), least squares over the medians.

    python benchmarks/cost.py --out results/cost.json
"""
import statistics

import numpy as np

from common import command, hardware_to_time, parser, seconds_of, write
from scratchdet.matcher import image_keys
from scratchdet.optim import keep_memory, sgd, usable_precision
from scratchdet.recipes import recipes
from scratchdet.train import build_detector
from train_step import random_batch, stepper

series = dict(images=(1, 2, 4, 8), objects=(1, 5, 20, 50, 100, 200), area=((96, 128), (128, 192), (192, 256), (256, 384), (384, 512)))


def batches(what, values, size):
    "A batch for each value of one series, all else kept."
    base = dict(n=2, size=size, objects=5)
    key = dict(images='n', objects='objects', area='size')[what]
    return [random_batch(num_classes=80, **{**base, key: v}) for v in values]


def walk(recipe, what, values, repeats, size):
    "Seconds of each value: (repeats) for each, the series walked up and down."
    model = build_detector(recipe, 80).train()
    optimizer, steps = sgd(model, lr=1e-5), []
    for batch in batches(what, values, size):
        keys = image_keys(0, 0, batch.image_ids)
        steps.append(stepper(model, lambda batch=batch, keys=keys: model(batch, keys), optimizer, usable_precision('bf16', 'cpu') == 'bf16'))
    seconds = [[] for _ in steps]
    for i in range(repeats + 1):
        order = list(range(len(steps)))[::(-1) ** i]
        for k in order: seconds[k].append(seconds_of(steps[k]))
    return [o[1:] for o in seconds]


def exponent(x, seconds):
    "Slope of log(median seconds) over log(x)."
    return float(np.polyfit(np.log(x), np.log([statistics.median(o) for o in seconds]), 1)[0])


def main():
    "Walk all series, print and write."
    p = parser(__doc__, repeats=(5, 'of each value'), side=(128, 'shorter side where the area is kept, px'))
    p.add_argument('--recipe', default='demo', choices=recipes, help='whose model is timed')
    args = p.parse_args()
    keep_memory()
    machine, result, size = hardware_to_time(), {}, (args.side, args.side * 5 // 4)
    for what, values in series.items():
        seconds = walk(recipes[args.recipe], what, values, args.repeats, size)
        x = [a * b for a, b in values] if what == 'area' else list(values)
        result[what] = dict(x=x, seconds=seconds, exponent=exponent(x, seconds))
        print(f"{what}: {[f'{statistics.median(o):.3f}' for o in seconds]} s, exponent {result[what]['exponent']:.2f}", flush=True)
    write(args.out, dict(command=command(), hardware=machine, recipe=args.recipe, size=list(size), series=result))


if __name__ == '__main__': main()
