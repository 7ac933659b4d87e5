"What all benchmarks share: the machine, memory, turns, json files."
import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

from scratchdet.command import make_folder


def running(seconds=.5, looks=10):
    "How many threads run or wait for a core besides this one, on average from now on; the load average would count what has ended."
    found = []
    for _ in range(looks):
        time.sleep(seconds / looks)
        with open('/proc/stat') as f: found.append(next(int(o.split()[1]) for o in f if o.startswith('procs_running')) - 1)
    return statistics.fmean(found)


def hardware():
    "What the run runs on; `load` is what else wants its cores now."
    import torch

    from scratchdet.optim import usable_precision
    load = round(running(), 1)
    with open('/proc/cpuinfo') as f: name = next((o.split(':')[1].strip() for o in f if o.startswith('model name')), platform.machine())
    return dict(cpu=name, cores=os.cpu_count(), threads=torch.get_num_threads(), instructions=torch.backends.cpu.get_cpu_capability(),
                bf16=usable_precision('bf16', 'cpu') == 'bf16', load=load,
                **{o: version(o) for o in ('torch', 'torchvision', 'accelerate', 'hotcoco', 'pycocotools')})


def hardware_to_time():
    "`hardware`, before something is timed; other work is told on stderr."
    found = hardware()
    if found['load'] > found['cores'] / 2:
        print(f"load {found['load']} on {found['cores']} cores: other work makes these times long and scattered", file=sys.stderr, flush=True)
    return found


def own_peak():
    "Peak resident memory of this process, GB (`ru_maxrss` would count its parent's)."
    with open('/proc/self/status') as f: return next(int(o.split()[1]) for o in f if o.startswith('VmHWM')) / 2 ** 20


def seconds_of(do):
    "How long a call takes."
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


class Apart:
    "A function with a process of its own, so that memory and settings of one do not touch the other's: `build(*args)` returns the function."
    def __init__(self, build, *args):
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self):
        "Call it over there, and wait for it."
        self.pipe.send(True)
        return self.pipe.recv()

    def end(self):
        "End the process; its peak memory, GB."
        self.pipe.send(False)
        peak = self.pipe.recv()
        self.process.join()
        return peak


def _serve(pipe, build, args):
    do = build(*args)
    while pipe.recv(): pipe.send(do())
    pipe.send(own_peak())


def take_turns(functions, repeats):
    "Call every function once to warm up, then all in turn: {name: seconds of each repeat}."
    for do in functions.values(): do()
    seconds = {k: [] for k in functions}
    for _ in range(repeats):
        for k, do in functions.items(): seconds[k].append(seconds_of(do))
    return seconds


def against(seconds, ours, theirs):
    "Medians, and the ratio of `ours` to `theirs` within each repeat: below 1, ours is faster."
    ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs])]
    return dict(ratio=statistics.median(ratios), ratios=ratios, seconds={k: seconds[k] for k in (ours, theirs)},
                median={k: statistics.median(seconds[k]) for k in (ours, theirs)})


def whole(text):
    "The value of an option that counts something."
    if int(text) < 1: raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return int(text)


def out_folder(text):
    "The value of an option that names a folder to write to; it is made, or refused, before the work."
    try: return make_folder(text)
    except OSError as e: raise argparse.ArgumentTypeError(e)


def out_file(text):
    "The value of an option that names a file to write; its folder is made, or refused, before the work."
    out_folder(Path(text).parent)
    if Path(text).is_dir(): raise argparse.ArgumentTypeError(f'{text} is a folder: name a file')
    return Path(text)


def spread(ratios):
    "Their median, lowest and highest in words."
    return f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})'


def parser(doc, **numbers):
    "A command line with `--out`, and an option that counts for each of `numbers`: (default, help)."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in numbers.items(): p.add_argument(f'--{name}', type=whole, default=default, help=f'{text} ({default})')
    p.add_argument('--out', type=out_file, help='json file to write')
    return p


def command():
    "The command line of this process, with paths from the folder of the project."
    return ' '.join(['python', *sys.argv]).replace(f'{Path(__file__).parents[1]}/', '')


def write(path, doc):
    "Write a json file, whole or not at all."
    if not path: return
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(doc, indent=1))
    os.replace(tmp, path)
