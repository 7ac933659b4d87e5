"""All benchmarks that this machine can run, one after the other, each in a process of its own; the results go to results/*.json.

    python benchmarks/run.py                  everything: about twenty minutes on two cores
    python benchmarks/run.py --small          everything at toy size, to see that it runs; the results go to a new temporary folder
    python benchmarks/run.py --only loading start
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import out_folder
from half import reference_files
from scratchdet.optim import bf16_gain

here = Path(__file__).parent
parts = {  # name of the result: words of the command, and its words at toy size
    'train_step': ('train_step.py --repeats 3', '--size 64 96 --rois 8 --images 1 --objects 2 --repeats 1'),
    'inference': ('inference.py --repeats 3', '--short 64 --long 96 --size 48 64 --repeats 1'),
    'loading': ('loading.py', '--images 4 --repeats 1'),
    'counting': ('evaluation.py --count', '--images 20 --detections 5 --repeats 1'),
    'overlap': ('overlap.py', '--images 20 --detections 5 --width 8 --repeats 1'),
    'start': ('start.py', '--images 60 --annotations 300 --repeats 1'),
    'cost': ('cost.py', '--side 64 --repeats 1'),
    'half': ('half.py', ''),
}


def bars(name, o):
    "What a result says beside what it should: (what, value, limit), all 'at most'."
    if name == 'train_step':
        best = o['default']['precision']
        yield f'training step, {best}, over torchvision fp32', o['default']['fp32']['ratio'], 1 / 1.9
        if 'bf16' in o: yield f'training step, {best}, over torchvision bf16', o['default']['bf16']['ratio'], 1 / 1.2
        memory = o[best]['peak_gb']
        yield f'peak memory, {best}, over torchvision', memory['scratchdet'] / memory['torchvision'], 1.
    if name == 'inference': yield 'inference over torchvision', o['ratio'], .5
    if name == 'loading':
        yield 'loader over torchvision', o['ratio'], .5
        yield 'padding', max(o['padding'][k] for k in ('training', 'evaluation')), .04
    if name == 'counting': yield 'COCO evaluation over pycocotools', o['ratio'], .1
    if name == 'overlap':
        for k in o['parts']:
            behind, loop = (statistics.median(v['still'] for v in o[k][way]) for way in ('behind', 'loop'))
            yield f'{k}, standstill of a loop over that of one that does it itself', behind / loop, .5
    if name == 'start':
        yield '--help, s', max(min(v) for v in o['help_seconds'].values()), 3.
        yield 'to the first step, s', sorted(o['first_step_seconds'])[len(o['first_step_seconds']) // 2], 10.
    if name == 'cost':
        for k, v in o['series'].items(): yield f'exponent of time over {k}', v['exponent'], 1.1
    if name == 'half':
        for k, found in ((f'{file}, {threads}', v['scratchdet']) for file, by in o['files'].items() for threads, v in by.items()):
            yield f'{k}: largest difference of a loss', found['draws'][0]['largest_loss_difference'], .01
            yield f'{k}: difference of a loss in half of the draws, the largest', max(o['typical'] for o in found['losses'].values()), .01
            yield f'{k}: 1 - lowest cosine of the gradient', 1 - found['lowest_cosine'], .02


def lines(name, found, small):
    "A result beside what it should be; at toy size its values alone."
    for what, value, limit in bars(name, found):
        yield f'{what}: {value:.3f}' if small else f"{'holds' if value <= limit else 'MISSED':>6}  {what}: {value:.3f}, at most {limit:.3f}"


def why_not_half():
    "What `half` lacks on this machine; None if nothing."
    if bf16_gain() <= .25: return 'this processor only imitates bf16'
    try: reference_files()
    except FileNotFoundError as e: return str(e)


def by_default():
    "All results but `half` where it lacks something, which is said."
    if not (why := why_not_half()): return list(parts)
    print(f'half is left out: {why}', flush=True)
    return [o for o in parts if o != 'half']


def main():
    "Run, and print a table of what should hold."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--small', action='store_true', help='at toy size')
    p.add_argument('--only', nargs='+', choices=parts, help='these results alone (all; half only where the processor has bf16 and the reference files are there)')
    p.add_argument('--out', type=out_folder, help='folder of the json files (results; with --small a new temporary one)')
    args = p.parse_args()
    out = args.out or (Path(tempfile.mkdtemp(prefix='benchmarks_')) if args.small else here.parent / 'results')
    print(f'results: {out}', flush=True)
    names, failed = args.only or by_default(), []
    for name in names:
        words, small = parts[name]
        file, start = out / f'{name}.json', time.perf_counter()
        command = [sys.executable, str(here / words.split()[0]), *words.split()[1:], *(small.split() if args.small else ()), '--out', str(file)]
        if subprocess.run(command).returncode: failed.append(name)
        print(f'-- {name}: {time.perf_counter() - start:.0f} s', flush=True)
    if args.small: print('toy sizes say nothing about the bars; the values:')
    for name in (o for o in names if o not in failed): print(*lines(name, json.loads((out / f'{name}.json').read_text()), args.small), sep='\n')
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
