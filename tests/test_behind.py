"What is done behind the loop of a run: in order, of its own step, and no error, hang or kill of it is lost."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from runs import command, losses, tiny, toy  # noqa: F401  (a fixture)
from test_resume import listing, step_names
from test_resume_kill import content

import scratchdet.train as module
from scratchdet.resume import checkpoints, verify_checkpoint
from scratchdet.track import place
from scratchdet.train import main, parse_args, train

twice = replace(tiny, eval_every=1, keep=9)                              # evaluations after steps 4 and 8, checkpoints after 3, 4, 6 and 8


@pytest.fixture(autouse=True, scope='module')
def undrawn():
    with pytest.MonkeyPatch.context() as m:
        for name in ('draw_curves', 'draw_predictions'): m.setattr(module, name, lambda run: None)
        yield


@pytest.fixture(scope='module')
def straight(toy, tmp_path_factory):  # noqa: F811
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp('straight')/'run'
    train(twice, toy, out, progress=False)
    return out


def wait_for(lines, count):
    "Return when the log has so many lines, or after a time that is too long."
    until = time.monotonic() + 20
    while lines() < count and time.monotonic() < until: time.sleep(.005)


def test_order(toy, tmp_path, monkeypatch, straight):  # noqa: F811
    """Counts and writes that wait for two steps and for one: a checkpoint after an evaluation, and what trackers hear, come after its file.
    And what is written late is of its own step."""
    out, order, heard = tmp_path/'run', [], []
    save, count, lines = module.save_checkpoint, module.count_apart, lambda: len((out/'log.jsonl').read_text().splitlines())
    def counted(*args):
        wait_for(lines, 6)
        return count(*args)
    def saved(folder, model, optimizer, state, *args):
        wait_for(lines, min(8, state['step'] + 1))
        order.append((state['step'], listing(out/'eval')))
        return save(folder, model, optimizer, state, *args)
    monkeypatch.setattr(module, 'save_checkpoint', saved)
    monkeypatch.setattr(module.Trackers, 'send', lambda self, record: heard.append((place(record), lines())))
    monkeypatch.setattr(module, 'count_apart', counted)
    train(twice, toy, out, progress=False)
    evals, names = [f'{o}.json' for o in step_names(4, 8)], step_names(3, 4, 6, 8)
    assert order == [(3, []), (4, []), (6, evals[:1]), (8, evals[:1])]
    places = [o for o, _ in heard]
    assert places == sorted(places) and places == [[t, e] for t in range(1, 9) for e in (False, True) if not e or t in (4, 8)]
    assert dict((tuple(o), n) for o, n in heard)[4, True] == 6                # two steps were done while it was counted
    assert listing(out/'checkpoints') == listing(straight/'checkpoints') == names
    for file in (f'checkpoints/{o}/{kind}.safetensors' for o in names for kind in ('model', 'momentum')):
        assert content(out/file) == content(straight/file), file


@pytest.mark.parametrize('name, call, steps, saved, counted', [
    ('save_checkpoint', 2, (4, 5, 6), (3,), ()), ('count_apart', 2, (8,), (3, 4, 6, 8), (4,))])
def test_an_error_ends_the_run(name, call, steps, saved, counted, toy, tmp_path, monkeypatch):  # noqa: F811
    "At the next step, or at the end when no step comes after it; nothing is done after it."
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
copy = os.fork()  # as those that read images, it holds the pipe open
if copy: print(process.pid, copy, flush=True)
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
