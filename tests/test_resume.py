"A run that is killed, at any moment and in any way, goes on as if it had not been."
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import finish, losses, start, tiny, toy  # noqa: F401  (a fixture)

import scratchdet.resume as writer
import scratchdet.train as module
from scratchdet.optim import sgd
from scratchdet.resume import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from scratchdet.train import build_detector, train
from scratchdet.weights import load_model


def weights(out): return load_model(Path(out)/'model.safetensors').state_dict()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def straight(toy, tmp_path_factory):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp('straight')/'run'
    status, said = finish(start(tiny, toy, out))
    assert status == 0 and len(losses(out)) == 8, said
    return out


def wait_for(file, lines, process):
    "Return when the file has so many lines."
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert process.poll() is None, finish(process)
        time.sleep(.01)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_bit_for_bit(number, toy, tmp_path, straight):
    out = tmp_path/'run'
    process = start(tiny, toy, out)
    wait_for(out/'log.jsonl', 4, process)                             # after the checkpoint of step 3
    process.send_signal(number)
    status, said = finish(process)
    assert status != 0 and not (out/'model.safetensors').exists()
    if number != signal.SIGKILL:
        assert 'the same command goes on' in said and checkpoints(out/'checkpoints')[-1].name == f'step_{len(losses(out)):08}'
    assert 4 <= len(losses(out)) < 8 and checkpoints(out/'checkpoints')
    status, said = finish(start(tiny, toy, out))
    assert status == 0, said
    assert losses(out) == losses(straight) and same(weights(out), weights(straight))


class Killed(BaseException): "Stands for a process that is no more."


@pytest.mark.parametrize('place', ['save_model', 'save', 'sync', 'rename', 'rmtree'])
@pytest.mark.parametrize('when', [1, 2, 3])
def test_a_kill_while_a_checkpoint_is_written(place, when, tmp_path, monkeypatch):
    "Whatever call is the last, a whole checkpoint is there, and it is the old one or the new one."
    model = build_detector(tiny, 3)
    optimizer = sgd(model, lr=.1)
    for p in model.parameters(): optimizer.state[p]['momentum_buffer'] = torch.full_like(p, .5)
    for t in (1, 2): save_checkpoint(tmp_path, model, optimizer, dict(step=t), keep=2)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(): model.box_head.fc.weight.add_(1.)
    owner = dict(save_model=writer, save=writer, sync=writer, rename=Path, rmtree=shutil)[place]
    true, calls = getattr(owner, place), []
    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == when: raise Killed
        return true(*args, **kwargs)
    monkeypatch.setattr(owner, place, dies)
    try: save_checkpoint(tmp_path, model, optimizer, dict(step=3), keep=2)
    except Killed: pass
    monkeypatch.undo()
    newest, other = find_checkpoint(tmp_path), build_detector(tiny, 3)
    state = load_checkpoint(newest, other, sgd(other, lr=.1))
    assert state['step'] in (2, 3) and same(other.state_dict(), old if state['step'] == 2 else model.state_dict())
    save_checkpoint(tmp_path, model, optimizer, dict(step=4), keep=2)
    assert sorted(o.name for o in tmp_path.iterdir())[-1] == 'step_00000004' and len(list(tmp_path.iterdir())) == 2


def test_damaged_checkpoints_are_named(tmp_path):
    model = build_detector(tiny, 3)
    path = save_checkpoint(tmp_path, model, sgd(model, lr=.1), dict(step=1))
    whole = (path/'model.safetensors').read_bytes()
    (path/'model.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='model.safetensors is damaged: its size'): load_checkpoint(path, model, sgd(model, .1))
    (path/'model.safetensors').write_bytes(whole)
    with pytest.raises(ValueError, match='of another model.*box_head'):
        load_checkpoint(path, build_detector(replace(tiny, fc=48), 3), sgd(model, .1))
    with pytest.raises(ValueError, match='of another model'): load_checkpoint(path, build_detector(tiny, 4), sgd(model, .1))


def stop_after(monkeypatch, steps):
    "Make the next run stop after so many of its steps, as a signal would."
    true, done = module.train_step, []
    def step(*args, **kwargs):
        done.append(1)
        if len(done) == steps: os.kill(os.getpid(), signal.SIGTERM)
        return true(*args, **kwargs)
    monkeypatch.setattr(module, 'train_step', step)


def test_a_run_goes_on_in_other_parts(toy, tmp_path, monkeypatch):
    "How a batch is shared may change between two commands; what is learned may not."
    stop_after(monkeypatch, 2)
    assert train(tiny, toy, tmp_path/'run', progress=False) == {}
    monkeypatch.undo()
    train(replace(tiny, images_per_process=1, keep=5, eval_every=1, workers=1), toy, tmp_path/'run', progress=False)
    train(tiny, toy, tmp_path/'straight', progress=False)
    mixed, plain = losses(tmp_path/'run'), losses(tmp_path/'straight')
    assert len(mixed) == len(plain) == 8 and mixed[:2] == plain[:2]
    assert mixed[2]['loss'] == pytest.approx(plain[2]['loss'], rel=.02) and mixed[3]['loss'] == pytest.approx(plain[3]['loss'], rel=.1)
    with pytest.raises(ValueError, match='seed: 0 -> 1'): train(replace(tiny, seed=1), toy, tmp_path/'run', progress=False)


def test_an_evaluation_that_was_cut_short_is_done_again(toy, tmp_path, monkeypatch):
    recipe = replace(tiny, eval_every=1)
    def killed(*args, **kwargs): raise Killed
    monkeypatch.setattr(module, 'evaluate', killed)
    with pytest.raises(Killed): train(recipe, toy, tmp_path/'run', progress=False)
    monkeypatch.undo()
    assert checkpoints(tmp_path/'run/checkpoints')[-1].name == 'step_00000004' and not list((tmp_path/'run/eval').glob('*'))
    results = train(recipe, toy, tmp_path/'run', progress=False)
    assert [o.name for o in sorted((tmp_path/'run/eval').glob('*'))] == ['step_00000004.json', 'step_00000008.json']
    assert train(recipe, toy, tmp_path/'run', progress=False) == results and len(losses(tmp_path/'run')) == 8


def test_other_annotations_are_refused(toy, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    assert train(tiny, toy, tmp_path/'run', progress=False) == {}
    monkeypatch.undo()
    shutil.copytree(toy, tmp_path/'changed')
    file = tmp_path/'changed/annotations/instances_train2017.json'
    doc = json.loads(file.read_text())
    doc['annotations'].pop()
    file.write_text(json.dumps(doc))
    with pytest.raises(ValueError, match='instances_train2017.json has changed'):
        train(tiny, tmp_path/'changed', tmp_path/'run', progress=False)


def test_a_log_that_was_cut_in_a_line(toy, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    train(tiny, toy, tmp_path/'run', progress=False)
    monkeypatch.undo()
    lines = (tmp_path/'run/log.jsonl').read_text()
    (tmp_path/'run/log.jsonl').write_text(lines + lines.splitlines()[0].replace('"step": 1,', '"step": 4,') + '\n{"step": 5, "ep')
    train(tiny, toy, tmp_path/'run', progress=False)
    assert [json.loads(o)['step'] for o in (tmp_path/'run/log.jsonl').read_text().splitlines()] == list(range(1, 9))
