"What is done behind the loop of a run: in order, of its own step, and no error, hang or kill of it is lost."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from ranks import context, run_ranks
from runs import command, losses, tiny, toy  # noqa: F401  (a fixture)
from test_resume import listing, step_names
from test_resume_kill import content

import scratchdet.train as module
from scratchdet.resume import checkpoints, verify_checkpoint
from scratchdet.track import place
from scratchdet.train import main, parse_args, train

twice = replace(tiny, eval_every=1)                                       # evaluations after steps 4 and 8, checkpoints after 3, 4, 6 and 8


@pytest.fixture(scope='module')
def straight(toy, tmp_path_factory):  # noqa: F811
    "A run that nothing disturbed, all of its checkpoints kept."
    out = tmp_path_factory.mktemp('straight')/'run'
    train(replace(twice, keep=9), toy, out, progress=False)
    return out


def slowly(monkeypatch, name, seconds):
    "Let a function of the training page take longer."
    true = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (time.sleep(seconds), true(*args))[1])


def test_a_late_write_holds_the_weights_of_its_step(toy, tmp_path, monkeypatch, straight):  # noqa: F811
    slowly(monkeypatch, 'save_checkpoint', .5)
    train(replace(twice, keep=9), toy, tmp_path/'run', progress=False)
    assert listing(tmp_path/'run/checkpoints') == listing(straight/'checkpoints') == step_names(3, 4, 6, 8)
    for name in step_names(3, 4, 6, 8):
        for file in ('model', 'momentum'):
            a, b = (content(o/f'checkpoints/{name}/{file}.safetensors') for o in (tmp_path/'run', straight))
            assert a == b, (name, file)


def test_a_checkpoint_waits_for_the_evaluation_before_it(toy, tmp_path, monkeypatch):  # noqa: F811
    "A slow count: training goes on, but the checkpoint after it, and what trackers hear, come after its file."
    out, order, heard = tmp_path/'run', [], []
    save, lines = module.save_checkpoint, lambda: len((out/'log.jsonl').read_text().splitlines())
    def saved(folder, model, optimizer, state, *args):
        order.append((state['step'], listing(out/'eval')))
        return save(folder, model, optimizer, state, *args)
    monkeypatch.setattr(module, 'save_checkpoint', saved)
    monkeypatch.setattr(module.Trackers, 'send', lambda self, record: heard.append((place(record), lines())))
    slowly(monkeypatch, 'count_apart', 1)
    train(twice, toy, out, progress=False)
    evals = [f'{o}.json' for o in step_names(4, 8)]
    assert order == [(3, []), (4, []), (6, evals[:1]), (8, evals[:1])]
    places = [o for o, _ in heard]
    assert places == sorted(places) and places == [[t, e] for t in range(1, 9) for e in (False, True) if not e or t in (4, 8)]
    assert dict((tuple(o), n) for o, n in heard)[4, True] >= 5                # steps were done while it was counted


@pytest.mark.parametrize('name, call, steps, saved, counted', [
    ('save_checkpoint', 2, (4, 5, 6), (3,), ()), ('save_checkpoint', 4, (8,), (3, 4, 6), (4,)),
    ('count_apart', 1, (4, 5, 6), (3, 4), ()), ('count_apart', 2, (8,), (4, 6, 8), (4,))])
def test_an_error_ends_the_run(name, call, steps, saved, counted, toy, tmp_path, monkeypatch, straight):  # noqa: F811
    "At the next step, or at the end when no step comes after it; nothing is done after it. The same command goes on."
    out, true, calls = tmp_path/'run', getattr(module, name), []
    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == call: raise OSError('the disk is gone')
        return true(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(module, name, fails)
        with pytest.raises(OSError, match='the disk is gone'): train(twice, toy, out, progress=False)
    assert len(losses(out)) in steps and len(calls) == call and not (out/'model.safetensors').exists()
    assert listing(out/'checkpoints') == step_names(*saved) and listing(out/'eval') == [f'{o}.json' for o in step_names(*counted)]
    results = train(twice, toy, out, progress=False)
    assert losses(out) == losses(straight) and results == json.loads((straight/'eval/step_00000008.json').read_text())


def test_the_counting_process_is_killed(toy, tmp_path, monkeypatch, straight):  # noqa: F811
    out, true = tmp_path/'run', module.start_count
    def killed():
        process = true()
        process.kill()
        return process
    with monkeypatch.context() as m:
        m.setattr(module, 'start_count', killed)
        with pytest.raises(SystemExit) as e: main(parse_args(command(twice, toy, out)[3:]))
    assert str(e.value).startswith('scratchdet.train: the process that counts detections is gone: killed by SIGKILL. Was memory short?')
    assert f'the same command goes on from the newest checkpoint in {out}' in str(e.value) and '\n' not in str(e.value)
    assert 4 <= len(losses(out)) <= 6 and listing(out/'checkpoints') == step_names(3, 4) and listing(out/'eval') == []
    assert all(map(verify_checkpoint, checkpoints(out/'checkpoints')))
    train(twice, toy, out, progress=False)
    assert losses(out) == losses(straight)
    for o in listing(straight/'eval'): assert (out/'eval'/o).read_bytes() == (straight/'eval'/o).read_bytes()


PARENT = '''
import os, time
from scratchdet.count import start_count
process = start_count()
print(process.pid, os.fork() or os.getpid(), flush=True)  # a copy, as those that read images, holds the pipe open
time.sleep(60)
'''


def gone(pid):
    "True when a process has ended; one that nobody waits for may stay as a zombie."
    try: return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError: return True


def test_the_counting_process_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, '-c', PARENT], stdout=subprocess.PIPE, text=True)
    counting, copy = map(int, parent.stdout.readline().split())
    try:
        time.sleep(.5)
        assert not gone(counting)
        parent.kill()
        parent.wait()
        until = time.monotonic() + 20
        while not gone(counting) and time.monotonic() < until: time.sleep(.05)
        assert gone(counting) and not gone(copy)
    finally: os.kill(copy, signal.SIGKILL)


def late(out, toy, seconds):  # noqa: F811
    "Train under a watch of two seconds; writing a checkpoint and counting take so long each. What is said goes to a file."
    for name in ('save_checkpoint', 'count_apart'): slowly(pytest.MonkeyPatch(), name, seconds)
    sys.stderr = open(out.with_suffix('.said'), 'a')
    return train(replace(tiny, epochs=1, checkpoint_every=100, hang_timeout=2), toy, out, progress=False)['step']


def test_the_watch_lets_slow_tasks_pass(toy, tmp_path):  # noqa: F811
    "Together they take longer than it waits; each of them is progress, in both processes."
    assert run_ranks(late, 2, tmp_path/'run', toy, 1.4) == [4, 4]


def test_the_watch_sees_a_task_that_hangs(toy, tmp_path):  # noqa: F811
    process = context.Process(target=late, args=(tmp_path/'run', toy, 600))
    process.start()
    process.join(60)
    said = (tmp_path/'run.said').read_text()
    assert process.exitcode == 1 and 'no progress for 2 s; process 0 (pid' in said and 'hangs at the checkpoint of step 4, behind.py:' in said
