"""Everything that wants a GPU, in one run: first whether the kernels mean what the plain bodies mean, then how fast all of it is.

    python benchmarks/gpu.py --out results/gpu.json --coco ../shared/coco-mini     about 45 minutes
    python benchmarks/gpu.py --device cpu --small --out gpu.json                   the same code at toy size, in half a minute
    python benchmarks/gpu.py --only parity speed --out results/gpu.json            some parts alone; the file keeps the others

The file is written after every part, so a run that is cut off keeps what it has. bf16 is autocast's, maps are channels last. On a CPU the
parts compare the CPU's own bodies with the plain ones; the times are that CPU's, and say nothing about a GPU.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from common import command, hardware_to_time, parser, whole, write
from parts import Clock, forward_flops, time_ours
from peer import torchvision_inputs, torchvision_mask_rcnn
from scratchdet.boxes import _nms_keep
from scratchdet.detector import mask_rcnn
from scratchdet.graphs import Recorded
from scratchdet.init import init_detector
from scratchdet.mask_head import _mask_targets
from scratchdet.matcher import image_keys
from scratchdet.norm import _group_norm, _group_norm_backward
from scratchdet.optim import sgd
from scratchdet.recipes import recipes, save_recipe
from scratchdet.resnet import _max_pool, _max_pool_backward
from scratchdet.roi_align import _roi_align, _roi_align_backward
from scratchdet.roi_triton import use_triton
from scratchdet.train import _for_gpu
from train_step import random_batch, with_weights

strides = [4, 8, 16, 32]


def wait(device):
    "Until everything that was asked of the device is done."
    if device == 'cuda': torch.cuda.synchronize()


def peak(device, reset=False):
    "Most memory of the GPU since the last reset, GB."
    if device != 'cuda': return None
    if reset: torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


def milliseconds(do, device, repeats):
    "Time of one call, many calls queued; the first ones compile and tune."
    for _ in range(3): do()
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats): do()
    wait(device)
    return (time.perf_counter() - start) / repeats * 1e3


# --- what the ops are called with -------------------------------------------------------------------------------------

def op_cases(args, dtype):
    "Arguments of every op at the sizes of a training step with two images: {name: (op, arguments)}."
    g, (h, w), last = torch.Generator().manual_seed(0), args.size, dict(memory_format=torch.channels_last)
    def noise(*shape): return torch.randn(*shape, generator=g).to(args.device, dtype).contiguous(**last)
    out, c = {}, 256
    for name, (n, c_, y, x), add in (('GroupNorm C2', (2, 256, h // 4, w // 4), True), ('GroupNorm stem', (2, 64, h // 2, w // 2), False),
                                     ('GroupNorm C5', (2, 2048, h // 32, w // 32), True), ('GroupNorm RoIs', (args.rois, 256, 7, 7), False)):
        v, r, dy = (noise(n, c_, y, x) for _ in range(3))
        weight, bias = (torch.randn(c_, generator=g).to(args.device) for _ in range(2))
        forward = v, weight, bias, 32, 1e-5, r if add else None, True
        result, mean, rstd = _group_norm._init_fn(*forward)
        out[name] = _group_norm, forward
        out[name + ', backward'] = _group_norm_backward, (dy, v, weight, bias, mean, rstd, result, 32, add)
    stem = noise(2, 64, h // 2, w // 2)
    out['max pooling'] = _max_pool, (stem,)
    pooled, taps = _max_pool._init_fn(stem)
    out['max pooling, backward'] = _max_pool_backward, (torch.randn_like(pooled), taps, h // 2, w // 2)
    maps, batch = [noise(2, c, -(-h // s), -(-w // s)) for s in strides], random_batch(2, args.size, args.objects, 80)
    side = 16 * (min(h, w) / 16) ** torch.rand(args.rois, 1, generator=g)
    centre = torch.rand(args.rois, 2, generator=g) * torch.tensor([w, h])
    rois = torch.cat([torch.arange(args.rois)[:, None] % 2, centre - side / 2, centre + side / 2], 1).to(args.device)
    for bins, some in ((7, rois), (14, rois[:args.rois // 4])):
        out[f'RoIAlign {bins}'] = _roi_align, (maps, some, bins, strides, 0)
        out[f'RoIAlign {bins}, backward'] = _roi_align_backward, (noise(len(some), c, bins, bins), maps, some, strides, 0)
    k = max(args.rois // 4, 2)
    objects = batch.boxes[torch.arange(k) % 2, torch.arange(k) // 2 % args.objects]
    near = torch.cat([torch.arange(k)[:, None] % 2, objects + torch.randn(k, 4, generator=g)], 1).to(args.device)
    out['mask targets'] = _mask_targets, (batch.masks.to(args.device), near, (torch.arange(k) // 2 % args.objects).to(args.device), 28)
    lo = torch.rand(2, args.candidates, 2, generator=g) * torch.tensor([w, h])
    boxes = torch.cat([lo, lo + 8 + torch.rand(2, args.candidates, 2, generator=g) * 90], 2).to(args.device)
    rows = torch.rand(2, args.candidates, generator=g), torch.arange(args.candidates).expand(2, -1) * 5 // args.candidates
    out['NMS'] = _nms_keep, (boxes, *(o.to(args.device) for o in rows), torch.ones(2, args.candidates, dtype=torch.bool, device=args.device), .7)
    return out


def differences(mine, theirs):
    "Largest difference over the largest value, and the share of values that differ by more than a hundredth of that."
    mine, theirs = ([o] if isinstance(o, torch.Tensor) else list(o) for o in (mine, theirs))
    worst, share = 0., 0.
    for a, o in zip(mine, theirs, strict=True):
        if a.shape != o.shape or a.dtype != o.dtype or a.stride() != o.stride(): raise ValueError(f'{a.shape} {a.dtype} is not {o.shape} {o.dtype}')
        if not o.numel(): continue
        away, top = (a.double() - o.double()).abs(), o.double().abs().max().clamp(min=1e-12)
        worst, share = max(worst, (away.max() / top).item()), max(share, (away > top / 100).double().mean().item())
    return dict(largest=worst, share=share)


def parity(args):
    "Kernels against plain bodies, in fp32 and bf16; then losses and gradients of the reference files, bf16 against fp32."
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (op, arguments) in op_cases(args, dtype).items():
            mine, theirs = op(*arguments), op._init_fn(*arguments)
            out[f'{name}, {str(dtype)[6:]}'] = row = differences(mine, theirs)
            print(f"{name:26} {str(dtype)[6:]:9} largest {row['largest']:.1e}, share {row['share']:.1e}", flush=True)
    return dict(ops=out, reference=reference_losses(args))


def reference_losses(args):
    "Losses of the reference files in fp32, against the files, and in bf16; the cosine of both gradients. None without the files."
    sys.path.append(str(Path(__file__).parents[1] / 'tests'))
    from half import compared
    from test_reference import FILES, Case
    root = Path(os.environ.get('SCRATCHDET_REFERENCE', Path(__file__).parents[2] / 'shared/reference'))
    if args.small or not root.is_dir(): return None
    out = {}
    for name in (o for o in FILES if o.startswith('mask')):  # the others hold no objects to train on
        case = Case(name)
        model, batch = case.model.train().to(args.device), on_device(case.batch, args.device)
        keys, model.rpn.post_nms_topk = image_keys(0, 0, batch.image_ids), (100, 100)
        out[name] = compared(model, lambda: model(batch, keys), args.device)
        print(name, out[name]['largest_loss_difference'], out[name]['cosine'], flush=True)
    return out


# --- steps ------------------------------------------------------------------------------------------------------------

def on_device(batch, device):
    "The batch there, its images channels last as the loader gives them."
    out = SimpleNamespace(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
    out.images = out.images.contiguous(memory_format=torch.channels_last)
    return out


def our_model(args):
    "The recipe's model with random weights, on its device."
    small = dict(blocks=(1, 1, 1, 1), width=16, channels=32, fc=32, groups=4) if args.small else {}
    torch.manual_seed(0)
    return _for_gpu(init_detector(mask_rcnn(80, batch_size_per_image=args.rois, **small)).train().to(args.device))


def our_step(args, n):
    "A training step of ours on `n` images, which reads nothing back."
    model, batch = our_model(args), on_device(random_batch(n, args.size, args.objects, 80), args.device)
    optimizer, keys = sgd(model, lr=1e-4), image_keys(0, 0, batch.image_ids)
    return stepper(lambda: model(batch, keys), optimizer, args.device), model


def recorded_step(args, n):
    "The same step, replayed as training does it on a GPU; on a CPU it is called again."
    model, batch = our_model(args), on_device(random_batch(n, args.size, args.objects, 80), args.device)
    optimizer, keys, recorded = sgd(model, lr=1e-4), image_keys(0, 0, batch.image_ids), Recorded(model, 'bf16')
    def step():
        recorded([batch], [keys], lambda counts: counts)
        optimizer.step()
        optimizer.zero_grad()
    return step, model


def their_step(args, n):
    "The same of torchvision's model, with our weights."
    size, small = args.size, dict(blocks=(1, 1, 1, 1), channels=32, fc=32, groups=4) if args.small else {}
    torch.manual_seed(0)
    model = torchvision_mask_rcnn(80, size, rois=args.rois, **small).train()
    if not args.small: with_weights(model, our_model(args).cpu())
    model = model.to(args.device, memory_format=torch.channels_last)
    images, targets = torchvision_inputs(random_batch(n, size, args.objects, 80))
    images = [o.to(args.device) for o in images]
    targets = [{k: v.to(args.device) for k, v in o.items()} for o in targets]
    return stepper(lambda: model([o.clone() for o in images], targets), sgd(model, lr=1e-4), args.device), model


def stepper(losses, optimizer, device):
    "Forward, backward, update; with a clock, its parts are timed."
    def step(clock=None):
        clock = clock or Clock()
        with clock.step():
            with clock('rest of forward'), torch.autocast(device, torch.bfloat16): total = sum(losses().values())
            optimizer.zero_grad()
            with clock('backward'): total.backward()
            with clock('optimizer'): optimizer.step()
    return step


def images_per_second(make, args):
    "Images/s and memory at each number of images; a number that does not fit the memory says so."
    rows = {}
    for n in args.images:
        try:
            peak(args.device, reset=True)
            step, _ = make(args, n)
            ms = milliseconds(step, args.device, args.repeats)
            rows[str(n)] = dict(images_per_second=n * 1e3 / ms, ms_per_image=ms / n, gpu_gb=peak(args.device))
            print(f'{make.__name__:13} {n:3} images: {n * 1e3 / ms:6.1f} images/s, {ms:7.1f} ms a step', flush=True)
        except torch.OutOfMemoryError: rows[str(n)] = dict(error='out of memory')
        step = None
        if args.device == 'cuda': torch.cuda.empty_cache()
    return rows


def speed(args):
    "Recorded steps, as training does them, and beside each the step that is launched one operator after another."
    rows, eager = (images_per_second(o, args) for o in (recorded_step, our_step))
    return {n: row | dict(eager=eager[n]) for n, row in rows.items()}


def peer(args): return images_per_second(their_step, args)


# --- parts and their limits -------------------------------------------------------------------------------------------

class Waiting(Clock):
    "A clock that waits for the device before it looks: parts add up to more than a step that runs ahead."
    def __init__(self, device):
        super().__init__()
        self.device = device

    @contextmanager
    def __call__(self, label):
        wait(self.device)
        with super().__call__(label):
            yield
            wait(self.device)


def limits(device, side, megabytes):
    "What the device reaches at best: bf16 products (TFLOP/s) and copies (GB/s read and written)."
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.ones(megabytes * 2 ** 18, device=device)
    y = torch.empty_like(x)
    product, copy = milliseconds(lambda: a @ b, device, 10), milliseconds(lambda: y.copy_(x), device, 10)
    return dict(tflop_per_second=2 * side ** 3 / product / 1e9, gb_per_second=2 * megabytes / 1024 / copy * 1e3)


def parts(args):
    "Milliseconds of each part of a step, and of each op beside the time that its reads and writes would take at best."
    n = max(args.images)
    step, model = our_step(args, n)
    time_ours(model)
    clock = Waiting(args.device)
    for _ in range(args.repeats + 3): step(clock)
    batch = on_device(random_batch(n, args.size, args.objects, 80), args.device)
    best, ops = limits(args.device, 256 if args.small else 8192, 16 if args.small else 1024), {}
    for name, (op, arguments) in op_cases(args, torch.bfloat16).items():
        tensors = [o for a in (*arguments, *as_list(op(*arguments))) for o in as_list(a) if isinstance(o, torch.Tensor)]
        size = sum(o.numel() * o.element_size() for o in tensors)
        row = dict(ms=milliseconds(lambda: op(*arguments), args.device, args.repeats), bytes_ms=size / best['gb_per_second'] / 1e6)
        ops[name] = row
        print(f"{name:26} {row['ms']:8.3f} ms, its bytes alone {row['bytes_ms']:.3f} ms", flush=True)
    return dict(images=n, limits=best, ms={k: v * 1e3 for k, v in clock.medians(skip=3).items()}, ops=ops,
                forward_gflop={k: o / 1e9 for k, o in forward_flops(model, batch).items()})


def as_list(o): return list(o) if isinstance(o, (list, tuple)) else [o]


# --- training ---------------------------------------------------------------------------------------------------------

def overfit_folder(coco, folder):
    "A COCO folder whose validation images are its training images."
    (folder/'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (folder/'annotations'/f'instances_{split}2017.json').symlink_to(coco/'annotations'/'instances_train2017.json')
        (folder/f'{split}2017').symlink_to(coco/'train2017')
    return folder


def curve(args, name, data, tmp):
    "Train the recipe on `data` for about `minutes`, at the speed that was measured; its log and evaluations."
    steps = max(2, round(args.minutes * 60 * args.per_second / 16))
    recipe = recipes['demo'] if args.small else recipes['mask_rcnn_r50_fpn_gn_scratch_6x']
    recipe = replace(recipe, name=name, batch_size=16, images_per_process=max(args.images), lr=.02, epochs=0, milestones=(), iterations=steps,
                     tail=(max(steps // 5, 1),), warmup=max(steps // 10, 1), eval_every=0, report_every=max(steps // 50, 1),
                     checkpoint_every=steps, workers=0 if args.small else 8)
    out = tmp/'runs'/name
    save_recipe(recipe, tmp/f'{name}.json')
    words = ['--recipe', tmp/f'{name}.json', '--coco', data, '--out', out, '--quiet'] + ['--cpu'] * (args.device == 'cpu')
    start = time.perf_counter()
    subprocess.run([sys.executable, '-m', 'scratchdet.train', *map(str, words)], check=True)
    log = [json.loads(o) for o in (out/'log.jsonl').read_text().splitlines()]
    tests = [json.loads(o.read_text()) for o in sorted((out/'eval').glob('*.json'))]
    row = dict(steps=steps, seconds=time.perf_counter() - start, log=log, evaluations=tests)
    print(name, {k: v['AP'] for k, v in tests[-1].items() if isinstance(v, dict) and 'AP' in v}, flush=True)
    return row


def training(args):
    "Minutes of training on the toy set, and on the training images of a COCO folder, where there is one, with AP on these images."
    out = {}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        size = (48, 64) if args.small else (800, 1088)
        subprocess.run([sys.executable, '-m', 'scratchdet.toy', '--out', tmp/'toy', '--train', str(args.toy[0]), '--val', str(args.toy[1]),
                        '--size', *map(str, size), '--quiet'], check=True)
        out['toy'] = curve(args, 'toy', tmp/'toy', tmp)
        if args.coco: out['overfit'] = curve(args, 'overfit', overfit_folder(args.coco.resolve(), tmp/'coco'), tmp)
    return out


every = dict(parity=parity, speed=speed, parts=parts, peer=peer, training=training)


def settings():
    "The command line; `--small` replaces what is large."
    p = parser(__doc__, objects=(8, 'objects an image'), rois=(512, 'sampled RoIs an image'), candidates=(8741, 'boxes before NMS'),
               repeats=(20, 'steps or calls that are timed'), minutes=(10, 'of each training'))
    p.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    p.add_argument('--small', action='store_true', help='toy size')
    p.add_argument('--size', type=whole, nargs=2, default=(800, 1216), help='height and width, px')
    p.add_argument('--images', type=whole, nargs='+', default=[1, 2, 4, 8, 16], help='images of a step')
    p.add_argument('--toy', type=whole, nargs=2, default=(2000, 200), help='images to train on and to evaluate')
    p.add_argument('--only', nargs='+', choices=every, default=list(every), help='these parts alone')
    p.add_argument('--coco', type=Path, help='folder in COCO layout to overfit')
    args = p.parse_args()
    if args.small: vars(args).update(size=(64, 96), images=[1], rois=8, objects=2, candidates=60, repeats=1, minutes=0, toy=(16, 4))
    if args.device == 'cuda' and not torch.cuda.is_available(): p.error('no GPU is here: --device cpu --small tries the code')
    return args


def main():
    "Each part in turn; the file after each."
    args = settings()
    here = dict(hardware={k: v for k, v in hardware_to_time().items() if k != 'load'}, images_size=list(args.size), small=args.small, device=args.device, kernels=use_triton())
    if args.device == 'cuda': here['gpu'] = dict(name=torch.cuda.get_device_name(), count=torch.cuda.device_count(), cuda=torch.version.cuda)
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else here
    if other := [k for k, v in here.items() if found.get(k) != v]: sys.exit(f'{args.out}: measured with another {", ".join(other)}; give another --out')
    for name in args.only:
        measured = found.get('speed', {}).get(str(max(args.images)), {})
        args.per_second = measured.get('images_per_second', 1.)
        print(f'--- {name}', flush=True)
        start = time.perf_counter()
        found[name] = every[name](args)
        found.setdefault('seconds', {})[name] = time.perf_counter() - start
        found.setdefault('command', {})[name] = command()
        write(args.out, found)


if __name__ == '__main__': main()
