"A run small enough for a test: sixteen drawn images, a model of two million parameters, eight steps."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scratchdet.recipes import recipes, save_recipe
from scratchdet.toy import make_toy

tiny = replace(recipes['demo'], name='tiny', width=32, channels=32, groups=4, fc=32, short_sides=(64,), long_side=96,
               batch_size=4, epochs=2, milestones=(), precision='fp32', warmup=4, eval_every=0, report_every=1,
               checkpoint_every=3, workers=0)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "Sixteen training images and four to validate on."
    return make_toy(tmp_path_factory.mktemp('toy')/'toy', train=16, val=4, size=(64, 96))


def log(out):
    "The lines of a run's log."
    return [json.loads(o) for o in (Path(out)/'log.jsonl').read_text().splitlines()]


def losses(out):
    "All losses of every line, in full precision."
    return [{k: v for k, v in o.items() if 'loss' in k} for o in log(out)]


def command(recipe, coco, out, *more, processes=1):
    "The words that train `recipe`, through Accelerate where there are several processes."
    file = Path(out).with_suffix('.recipe.json')
    save_recipe(recipe, file)
    launch = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(processes), '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    return [sys.executable, *(launch if processes > 1 else []), '-m', 'scratchdet.train', '--recipe', str(file),
            '--coco', str(coco), '--out', str(out), '--cpu', '--quiet', *more]


def start(*args, **kwargs):
    "Begin to train in a process of its own, one thread each."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command(*args, **kwargs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process):
    "Wait for a process; its exit status and all that it said."
    out, err = process.communicate(timeout=600)
    return process.returncode, out + err
