"Runs in processes of their own: killed again and again, stopped, and resumed on another number of processes."
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import command, log, losses, tiny

from scratchdet.recipes import save_recipe
from scratchdet.resume import checkpoints, verify_checkpoint
from scratchdet.toy import make_toy

# A process that has imported everything and forks one that trains for each line: a start costs no import.
STARTER = '''
import json, os, sys, time
import scratchdet.train as module
build, step = module.build_detector, module.train_step

def double(*args): return build(*args).double()

def stopping(steps, wanted):
    def train_step(*args):
        nonlocal steps
        if not steps:
            while not os.path.exists(wanted): time.sleep(.01)  # a checkpoint is written behind the loop
            os._exit(3)
        steps -= 1
        return step(*args)
    return train_step

def child(job, rank):
    count = job['processes']
    if count > 1: os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                                     MASTER_ADDR='127.0.0.1', MASTER_PORT=str(job['port']))
    sys.stdout = sys.stderr = open(job['said'], 'a', buffering=1)
    if job['double']: module.build_detector = double
    if job['steps']: module.train_step = stopping(job['steps'], job['wanted'])
    module.main(module.parse_args(job['words']))

for line in sys.stdin:
    job, pids = json.loads(line), []
    for rank in range(job['processes']):
        if pid := os.fork(): pids.append(pid)
        else: child(job, rank); sys.exit()
    print(*pids, flush=True)
    print(*[os.waitstatus_to_exitcode(os.waitpid(o, 0)[1]) for o in pids], flush=True)
'''

recipe = replace(tiny, batch_size=2, epochs=6, eval_every=1, checkpoint_every=1, keep=2)      # 10 images: 30 steps


class Starter:
    "Starts runs and tells how they ended."
    def __init__(self, folder):
        self.coco = make_toy(folder/'toy', train=10, val=2, size=(64, 96))
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'SCRATCHDET_CACHE': str(folder/'cache')}
        self.process = subprocess.Popen([sys.executable, '-c', STARTER], 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def start(self, recipe, out, processes=1, double=False, steps=0, newest=0):
        "Begin to train; in float64, and only for so many steps and until a checkpoint is there, if asked. The numbers of the processes."
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        words = command(recipe, self.coco, out)[3:]
        self.said = Path(f'{out}.said')
        self.said.write_text('')
        job = dict(words=words, processes=processes, double=double, steps=steps, port=port, said=str(self.said),
                   wanted=f'{out}/checkpoints/step_{newest:08}')
        self.process.stdin.write((json.dumps(job) + '\n').encode())
        self.pids = [int(o) for o in self.process.stdout.readline().split()]
        return self.pids

    def wait(self, condition):
        "Return when a condition holds; raises when the run ends before."
        while not condition():
            for o in self.pids: os.kill(o, 0)
            time.sleep(.0005)

    def finish(self):
        "Exit status of each process, and what they said; a run that hangs is killed."
        if not select.select([self.process.stdout], [], [], 300)[0]:
            for o in self.pids: os.kill(o, signal.SIGKILL)
        return [int(o) for o in self.process.stdout.readline().split()], self.said.read_text()

    def run(self, *args, **kwargs):
        "Start and finish."
        self.start(*args, **kwargs)
        return self.finish()


@pytest.fixture(scope='module')
def starter(tmp_path_factory):
    starter = Starter(tmp_path_factory.mktemp('starter'))
    yield starter
    starter.process.stdin.close()
    assert starter.process.wait(60) == 0


@pytest.fixture(scope='module')
def straight(starter, tmp_path_factory):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp('straight')/'run'
    status, said = starter.run(recipe, out)
    assert status == [0] and len(losses(out)) == 30, said
    return out


def content(file):
    "Header and bytes of the numbers; the texts in a header are in no fixed order."
    data = file.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    return json.loads(data[8:8+n]), data[8+n:]


def same_runs(out, straight):
    "Weights and momentum to the byte, losses and evaluations to the last digit."
    files = ['model.safetensors', *(f'checkpoints/step_00000030/{o}.safetensors' for o in ('model', 'momentum'))]
    assert [o for o in files if content(out/o) != content(straight/o)] == []
    names = [f'eval/step_{t:08}.json' for t in range(5, 31, 5)]
    assert [o for o in names if (out/o).read_bytes() != (straight/o).read_bytes()] == []
    assert losses(out) == losses(straight) and [o['step'] for o in log(out)] == list(range(1, 31))
    assert all(verify_checkpoint(o) for o in checkpoints(out/'checkpoints'))
    return not [o for o in (out/'checkpoints').iterdir() if o.name[0] == '.']


def moments(rng, count=20):
    "(place in a run, step, seconds after it) of the kills, in the order of their steps."
    places = ['saving'] * 10 + ['steps'] * 4 + ['evaluating'] * 3 + ['starting'] * 3
    longest = dict(saving=.03, steps=.3, evaluating=.1, starting=.5)
    steps = [rng.randrange(5, 30, 5) if o == 'evaluating' else rng.randrange(1, 30) for o in places]
    return sorted(((o, t, longest[o] * rng.random()) for o, t in zip(places, steps)), key=lambda o: o[1])


def reached(place, folder, step):
    "True when a run is at this place of this step, or beyond."
    if place == 'starting': return True
    return (folder/f'step_{step:08}').exists() or place == 'saving' and (folder/f'.new_step_{step:08}').exists()


def test_twenty_kills(starter, straight, tmp_path):
    "SIGKILL while saving, in steps, in evaluations and at the start: the weights are those of a run without any."
    out, rng, seen = tmp_path/'run', random.Random(0), []
    for place, step, seconds in moments(rng):
        pid, = starter.start(recipe, out)
        starter.wait(lambda: reached(place, out/'checkpoints', step))
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        status, said = starter.finish()
        assert status == [-signal.SIGKILL], said
        seen.append((place, bool(list((out/'checkpoints').glob('.*')))))
    assert len(seen) == 20 and not (out/'model.safetensors').exists()
    assert sum(torn for _, torn in seen) >= 3, seen                                  # kills that left half a checkpoint
    status, said = starter.run(recipe, out)
    assert status == [0] and same_runs(out, straight), said


short = replace(recipe, epochs=2, eval_every=0, checkpoint_every=2, keep=5)


@pytest.fixture(scope='module')
def exact(starter, tmp_path_factory):
    "Ten steps in float64, in one process."
    out = tmp_path_factory.mktemp('exact')/'run'
    status, said = starter.run(short, out, double=True)
    assert status == [0] and len(losses(out)) == 10, said
    return out


def test_signals_stop_a_run_after_a_checkpoint(starter, exact, tmp_path):
    "What a cluster sends, then what a person sends; the third command comes to the end."
    out, rare, stops = tmp_path/'run', replace(short, checkpoint_every=100), []
    for number, lines in ((signal.SIGTERM, 2), (signal.SIGINT, 5)):
        pid, = starter.start(rare, out, double=True)
        starter.wait(lambda: (out/'log.jsonl').exists() and len(losses(out)) >= lines)
        os.kill(pid, number)
        status, said = starter.finish()
        assert status == [1] and 'the same command goes on' in said and not (out/'model.safetensors').exists()
        stops.append(len(losses(out)))
        assert lines <= stops[-1] < 10 and [int(o.name[5:]) for o in checkpoints(out/'checkpoints')] == stops
    status, said = starter.run(rare, out, double=True)
    assert status == [0] and losses(out) == losses(exact), said
    assert content(out/'model.safetensors') == content(exact/'model.safetensors')


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_another_number_of_processes(before, after, starter, exact, tmp_path):
    "Killed before step 7, resumed from step 6, in float64: the losses are those of one process throughout."
    out = tmp_path/'run'
    status, said = starter.run(short, out, processes=before, double=True, steps=7, newest=6)
    assert len(status) == before and set(status) == {3}, said
    assert checkpoints(out/'checkpoints')[-1].name == 'step_00000006' and len(losses(out)) == 7
    status, said = starter.run(short, out, processes=after, double=True)
    assert status == [0] * after, said
    assert [o['step'] for o in log(out)] == list(range(1, 11)) and len(losses(exact)) == 10
    for a, b in zip(losses(exact), losses(out)): assert b == pytest.approx(a, rel=1e-6)
    a, b = (content(o/'model.safetensors') for o in (exact, out))
    assert {v['dtype'] for k, v in b[0].items() if k != '__metadata__'} == {'F64'} and len(a[1]) == len(b[1])


def test_all_processes_go_on_from_the_same_step(starter, exact, tmp_path):
    "One process chooses: the newest two checkpoints are damaged, and both go on from step 6; or stop when none is good."
    out = shutil.copytree(exact, tmp_path/'run')
    (out/'model.safetensors').unlink()
    for path in checkpoints(out/'checkpoints')[-2:]: (path/'state.json').write_text('{"step": 7}')
    status, said = starter.run(short, out, processes=2, double=True)
    assert status == [0, 0] and said.count('state.json is damaged') == said.count('using step_00000006 instead') == 2
    for a, b in zip(losses(exact), losses(out), strict=True): assert b == pytest.approx(a, rel=1e-6)
    for path in checkpoints(out/'checkpoints'): (path/'model.safetensors').unlink()
    status, said = starter.run(short, out, processes=2, double=True)
    assert status == [1, 1] and 'none of its checkpoints is whole' in said and 'model.safetensors is missing' in said
