"""Questions about training from scratch, answered by tiny runs on the toy set: one command a study, several seeds a setting.

A study is a list of settings, each the base setting with one or two things changed. Finished runs are kept: a stopped study goes on
where it was, and a run that another study beside `--out` has made with the same setup is taken from there. Delete the files to start afresh.

    python benchmarks/studies.py norm --out results/norm.json
    python benchmarks/studies.py init zero_init order schedule pretrain --out results
"""
import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, roi_align

from common import hardware, out_file, out_folder, whole, write
from learning import both_splits, training, unseen_ap
from scratchdet.anchors import Anchors
from scratchdet.box_head import BoxHead
from scratchdet.boxes import xywh_to_xyxy
from scratchdet.detector import Detector
from scratchdet.fpn import FPN
from scratchdet.init import fill_part, gaussian, init_detector, kaiming, xavier
from scratchdet.norm import GroupNorm
from scratchdet.recipes import recipes
from scratchdet.resnet import Bottleneck, ResNet
from scratchdet.rpn import RPN, RPNHead
from scratchdet.schedule import Schedule, scaled_lr
from scratchdet.toy import make_toy, toy_image, toy_names

recipe = replace(
    recipes['demo'], name='studies', masks=False, width=16, channels=32, fc=128, groups=2, roi_batch=16, pre_nms_topk=(50, 50),
    post_nms_topk=(50, 50), short_sides=(64,), long_side=96, precision='fp32', warmup=20)
used = ('blocks width channels fc groups rpn_batch pre_nms_topk post_nms_topk roi_batch score_thresh max_dets short_sides long_side flip batch_size lr '
        'momentum weight_decay warmup warmup_factor gamma precision')  # the other values of the recipe have no say here


@dataclass(frozen=True)
class Setting:
    "What a run may change; the defaults are the base setting."
    norm: str = 'GN'              # 'GN', 'BN' with the statistics of its batch, 'frozen' with mean 0 and variance 1 for ever
    batch: int = 8                # images of a step; lr follows by the linear rule, steps are fewer
    init: str = 'scratchdet'      # one of `schemes`
    zero_last: bool = False       # the last norm of each bottleneck starts at 0
    head: str = 'norm, ReLU'      # what follows a convolution of the box head: 'norm, ReLU' or 'ReLU, norm'
    rpn_norm: bool = False        # GroupNorm after the 3x3 convolution of the RPN head
    length: int = 2               # of the schedule, "k x"
    drops: str = 'tail'           # of lr: 'tail' counts from the end, as 2x has it; 'share' at 2/3 and 8/9 of any length
    pretrained: bool = False      # the backbone comes from classification
    seed: int = 0                 # of weights, order of images, flips and samples


schemes = dict(
    scratchdet=init_detector,
    PyTorch=lambda model: model,
    He=lambda model: fill_part(model, kaiming),
    Xavier=lambda model: fill_part(model, xavier),
    normal=lambda model: fill_part(model, partial(gaussian, std=.01)))

studies = dict(
    norm=[Setting(norm=n, batch=b) for b in (8, 2, 1) for n in ('GN', 'BN', 'frozen')],
    init=[Setting(init=o) for o in schemes],
    zero_init=[Setting(zero_last=z) for z in (False, True)],
    schedule=[Setting(length=1, drops='share'), Setting(), *[Setting(length=k, drops=o) for k in (4, 8) for o in ('tail', 'share')]],
    pretrain=[Setting(length=k, drops='share' if k == 1 else 'tail', pretrained=p) for k in (1, 2, 4, 8) for p in (False, True)],
    order=[Setting(), Setting(head='ReLU, norm'), Setting(rpn_norm=True)])


class Normed(nn.Module):
    "Any norm behind the interface of `GroupNorm`."
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual=None, relu=False):
        "Normalize, add, rectify."
        x = self.norm(x)
        if residual is not None: x = x + residual
        return x.relu() if relu else x


class ReluFirst(Normed):
    "Rectify, then normalize."
    def forward(self, x, residual=None, relu=False):
        "A convolution of a head ends with this."
        return self.norm(x.relu())


norms = dict(GN=lambda o: nn.GroupNorm(o.groups, len(o.weight)), BN=lambda o: nn.BatchNorm2d(len(o.weight)),
             frozen=lambda o: FrozenBatchNorm2d(len(o.weight)))


def swap_norms(model, make, wrap=Normed):
    "Put `wrap(make(norm))` in the place of every GroupNorm of `model`."
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GroupNorm): setattr(module, name, wrap(make(child)))


class NormedHead(RPNHead):
    "With GroupNorm after the 3x3 convolution. Its statistics are those of whole maps, so the sampled anchors ask for whole maps as well."
    def __init__(self, channels, groups):
        super().__init__(channels)
        self.conv = nn.Sequential(self.conv, nn.GroupNorm(groups, channels))

    def at(self, features, idxs):
        logits, deltas = (torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, k) for x in maps], 1) for maps, k in zip(self(features), (1, 4)))
        return logits[..., 0].gather(1, idxs), deltas.gather(1, idxs[..., None].expand(-1, -1, 4))


def build(setting, num_classes=len(toy_names)):
    "The detector of a setting with its random weights."
    torch.manual_seed(setting.seed)
    c, groups = recipe.channels, recipe.groups
    head = NormedHead(c, groups) if setting.rpn_norm else RPNHead(c)
    model = Detector(
        backbone=ResNet(recipe.blocks, recipe.width, groups=groups), fpn=FPN(tuple(4 * recipe.width * 2 ** i for i in range(4)), c, groups=groups),
        rpn=RPN(head, Anchors(scale=4), batch_size_per_image=recipe.rpn_batch, pre_nms_topk=recipe.pre_nms_topk, post_nms_topk=recipe.post_nms_topk),
        box_head=BoxHead(c, num_classes, convs=2, conv_channels=c, fc=recipe.fc, resolution=5, groups=groups), num_classes=num_classes,
        batch_size_per_image=recipe.roi_batch, low_quality=.5)
    if setting.head == 'ReLU, norm': swap_norms(model.box_head, norms[setting.norm], ReluFirst)
    swap_norms(model, norms[setting.norm])
    schemes[setting.init](model)
    if setting.zero_last:
        for o in model.modules():
            if isinstance(o, Bottleneck): nn.init.zeros_(o.conv3.norm.norm.weight)
    return model


def schedule_of(setting, unit):
    "The learning rate of every step, where 1x is `unit` images."
    def steps(images): return round(images / setting.batch)
    total = setting.length * unit
    last = (2 * unit if setting.drops == 'tail' else total) / 3
    return Schedule(lr=scaled_lr(setting.batch, recipe.lr, recipe.batch_size), steps=steps(total), gamma=recipe.gamma,
                    milestones=tuple(steps(total) - steps(o) for o in (last, last / 3)),
                    warmup=min(recipe.warmup * recipe.batch_size, unit // 2) // setting.batch, warmup_factor=recipe.warmup_factor)


def crops(images, seed, side=48):
    "The objects of `images` drawn images that no detector sees: pixels (n, 3, side, side) with some surroundings, labels (n,)."
    pixels, labels = [], []
    for i in range(1, images + 1):
        image, objects = toy_image(i, 1000 + seed, (64, 96))
        objects = [o for o in objects if not o['iscrowd']]
        boxes = xywh_to_xyxy(torch.tensor([o['bbox'] for o in objects]).reshape(-1, 4))
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) * .65
        image = (torch.from_numpy(image).permute(2, 0, 1).float() - 115) / 57
        pixels.append(roi_align(image[None], [torch.cat([centre - half, centre + half], 1)], side, sampling_ratio=2, aligned=True))
        labels += [o['category_id'] - 1 for o in objects]
    return torch.cat(pixels), torch.tensor(labels)


@cache
def classifier(seed, images, epochs=6, batch=32):
    "The weights of a backbone that learned to classify crops, its accuracy on unseen ones, how many it saw, and its CPU seconds."
    start, (x, y), (test, truth) = time.process_time(), crops(images, seed), crops(max(images // 10, 8), seed + 500)
    body = build(Setting(seed=seed)).backbone
    model = nn.Sequential(body, last := nn.Linear(body.channels[-1], len(toy_names)))
    model.forward = lambda images: last(body(images)[-1].mean((2, 3)))
    g, steps = torch.Generator().manual_seed(seed), epochs * math.ceil(len(x) / batch)
    optimizer = torch.optim.SGD(model.parameters(), .05, .9, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for idxs in torch.randperm(len(x), generator=g).split(batch):
            images = x[idxs] if torch.rand((), generator=g) < .5 else x[idxs].flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(model(images), y[idxs]).backward()
            optimizer.step()
            rate.step()
    with torch.inference_mode(): accuracy = (model(test).argmax(1) == truth).float().mean().item()
    return body.state_dict(), dict(accuracy=accuracy, crops=len(x) * epochs, cpu_seconds=round(time.process_time() - start, 1))


def run(setting, index, unseen, args):
    "Train and evaluate one setting; a loss that is not finite ends it, with AP 0."
    model, schedule, more = build(setting, len(index.category_ids)), schedule_of(setting, args.unit), {}
    if setting.pretrained:
        weights, more['classifier'] = classifier(setting.seed, args.crops)
        model.backbone.load_state_dict(weights)
    own = replace(recipe, batch_size=setting.batch, lr=schedule.lr, seed=setting.seed)
    start, losses, ap, every = time.process_time(), [], dict(AP=0., AP50=0.), max(1, schedule.steps // 30)
    for step, loss, _ in training(model, own, index, schedule):
        losses.append(loss)
        if not math.isfinite(loss): break
    if math.isfinite(loss): ap = {k: v for k, v in unseen_ap(model, own, unseen)['bbox'].items() if k in ap}
    else: more['diverged'] = step
    seconds, groups = time.process_time() - start, [losses[i:i + every] for i in range(0, len(losses), every)]
    means = [float(f'{sum(o) / len(o):.4g}') for o in groups]
    return dict(changes(setting), seed=setting.seed, **ap, losses=[o if math.isfinite(o) else None for o in means], every=every,
                steps=len(losses), cpu_seconds=round(seconds, 1), **more)


def changes(setting):
    "How a setting differs from the base, apart from the seed."
    return {f.name: getattr(setting, f.name) for f in fields(Setting) if f.name != 'seed' and getattr(setting, f.name) != f.default}


def same_run(stored, setting):
    "True when `stored` is a run of `setting`."
    names = [f.name for f in fields(Setting)]
    return {k: stored[k] for k in names if k in stored} == json.loads(json.dumps(dict(changes(setting), seed=setting.seed)))


def stored_runs(out, setup):
    "The runs of `out` and of the studies beside it that have the same setup."
    docs = [json.loads(o.read_text()) for o in sorted(out.parent.glob('*.json')) if o.stem in studies]
    return [o for doc in docs if doc['setup'] == setup for o in doc['runs']]


def study(name, out, root, args):
    "Run what is missing of a study; `out` is written after each run."
    sizes = dict(unit=args.unit, train=args.train, val=args.val, crops=args.crops)
    setup = dict(recipe={k: getattr(recipe, k) for k in used.split()}, base=asdict(Setting()), **sizes, torch=torch.__version__)
    setup = json.loads(json.dumps(setup))
    index, unseen = both_splits(root)
    command = f'python benchmarks/studies.py {name} --out results/{name}.json' + args.changed
    doc, have = dict(command=command, hardware=hardware(), setup=setup, seeds=args.seeds, runs=[]), stored_runs(out, setup)
    todo = [replace(o, seed=s) for s in args.seeds for o in studies[name]]
    for i, setting in enumerate(todo):
        found = next((o for o in have if same_run(o, setting)), None)
        doc['runs'].append(found or run(setting, index, unseen, args))
        if not found: write(out, doc)
        row = {k: v for k, v in doc['runs'][-1].items() if k != 'losses'}
        print(f'{name} {i + 1}/{len(todo)}{" (kept)" if found else ""}: {row}', flush=True)
    write(out, doc)


def out_path(text):
    "The value of `--out`: a json file, or a folder for several."
    return out_file(text) if Path(text).suffix else out_folder(text)


def main(argv=None):
    "Run the named studies, one after the other."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='+', choices=list(studies), metavar='NAME', help=', '.join(studies))
    p.add_argument('--out', type=out_path, required=True, help='json file to write; for several studies a folder')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--unit', type=whole, default=640, help='images of a 1x schedule (default: 640)')
    p.add_argument('--train', type=whole, default=400, help='images to learn from (default: 400)')
    p.add_argument('--val', type=whole, default=100, help='unseen images (default: 100)')
    p.add_argument('--crops', type=whole, default=1000, help='other images whose objects the classifier sees (default: 1000)')
    args = p.parse_args(argv)
    names = 'seeds', 'unit', 'train', 'val', 'crops'
    args.changed = ''.join(f' --{k} {str(v).strip("[]").replace(",", "")}' for k in names if (v := getattr(args, k)) != p.get_default(k))
    if len(args.names) > 1 and args.out.suffix: p.error(f'--out {args.out}: several studies need a folder')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = make_toy(Path(folder) / 'toy', train=args.train, val=args.val, size=(recipe.short_sides[0], recipe.long_side))
        for name in args.names: study(name, args.out if args.out.suffix else args.out / f'{name}.json', root, args)


if __name__ == '__main__': main()
