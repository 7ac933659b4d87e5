"Checkpoints that are damaged, half written or of another run; runs that are stopped and go on. Kills are in `test_resume_kill.py`."
import json
import os
import re
import resource
import shutil
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import losses, tiny, toy  # noqa: F401  (a fixture)

import scratchdet.resume as writer
import scratchdet.train as module
from scratchdet.detector import mask_rcnn
from scratchdet.optim import sgd
from scratchdet.resume import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from scratchdet.train import train
from scratchdet.weights import load_model

names = ['manifest.json', 'model.safetensors', 'momentum.safetensors', 'state.json']
by_file = pytest.mark.parametrize('name', names)


def weights(out): return load_model(Path(out)/'model.safetensors').state_dict()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def small(seed=0, **changes):
    "A model of two thousand kB, and an optimizer with momentum."
    torch.manual_seed(seed)
    arguments = dict(num_classes=3, blocks=(1, 1, 1, 1), width=16, channels=16, fc=24, groups=4)
    model = mask_rcnn(**{**arguments, **changes})
    optimizer = sgd(model, lr=.1)
    for p in model.parameters(): optimizer.state[p]['momentum_buffer'] = torch.randn_like(p)
    return model, optimizer


def state(model, optimizer):
    "Copies of all weights and velocities."
    velocities = {k: optimizer.state[p]['momentum_buffer'].clone() for k, p in model.named_parameters() if p in optimizer.state}
    return {k: v.clone() for k, v in model.state_dict().items()}, velocities


def same_states(a, b): return all(map(same, a, b))


def listing(folder): return sorted(o.name for o in folder.iterdir())


def step_names(*steps): return [f'step_{o:08}' for o in steps]


@pytest.fixture
def points(tmp_path):
    "A folder with checkpoints of steps 1, 2 and 3, and the states in them."
    states = {}
    for t in (1, 2, 3):
        model, optimizer = small(t)
        save_checkpoint(tmp_path/'points', model, optimizer, dict(step=t))
        states[t] = state(model, optimizer)
    return tmp_path/'points', states


def flip(file, place, bit=3):
    "Change one bit."
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


damages = dict(
    first=lambda o: flip(o, 0), middle=lambda o: flip(o, o.stat().st_size // 2), last=lambda o: flip(o, -1),
    half=lambda o: o.write_bytes(o.read_bytes()[:o.stat().st_size // 2]), longer=lambda o: o.write_bytes(o.read_bytes() + b'\0'),
    empty=lambda o: o.write_bytes(b''), missing=lambda o: o.unlink(), folder=lambda o: (o.unlink(), o.mkdir()),
    zeros=lambda o: o.write_bytes(bytes(o.stat().st_size)))


@by_file
@pytest.mark.parametrize('damage', damages)
def test_a_damaged_checkpoint_is_passed_over(name, damage, points):
    "The file is named, the one before is used, and what was read is its state alone."
    folder, states = points
    damages[damage](folder/'step_00000003'/name)
    with pytest.raises(ValueError, match=f'step_00000003/{name} '): verify_checkpoint(folder/'step_00000003')
    with pytest.warns(UserWarning, match=f'(?s)step_00000003/{name} .*; using step_00000002 instead') as said: path = find_checkpoint(folder)
    assert len(said) == 1 and path.name == 'step_00000002'
    model, optimizer = small(9)
    before = state(model, optimizer)
    with pytest.raises(ValueError, match=name): load_checkpoint(folder/'step_00000003', model, optimizer)
    assert same_states(state(model, optimizer), before)
    assert load_checkpoint(path, model, optimizer) == dict(step=2) and same_states(state(model, optimizer), states[2])


def test_no_changed_character_of_a_manifest_is_overlooked(tmp_path):
    path = tmp_path/'step_00000007'
    path.mkdir()
    for name in names[1:]: (path/name).write_text('{"step": 7}')
    manifest = json.dumps({o: writer._digest(path/o) for o in names[1:]}, indent=1)
    (path/'manifest.json').write_text(manifest)
    assert set(verify_checkpoint(path)) == set(names[1:]) and len(manifest) > 300
    overlooked = []
    for i, character in enumerate(manifest):
        flip(path/'manifest.json', i, i % 8)
        try: verify_checkpoint(path); overlooked.append((i, character))
        except ValueError: pass
        flip(path/'manifest.json', i, i % 8)
    assert overlooked == [] and verify_checkpoint(path)


@pytest.mark.parametrize('text', ['[]', '{}', '3', 'null', '{"model.safetensors": {}}', '{"../../x": {"size": 1, "sha256": ""}}',
                                  json.dumps(dict.fromkeys(names[1:], 1)), json.dumps(dict.fromkeys(names[1:], {})), '\xff'])
def test_manifests_of_another_form(text, points):
    folder, _ = points
    (folder/'step_00000003/manifest.json').write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match='step_00000003/'): verify_checkpoint(folder/'step_00000003')


def test_several_damaged_ones_and_none_that_is_good(points):
    folder, states = points
    (folder/'step_00000003/model.safetensors').unlink()
    shutil.rmtree(folder/'step_00000002')
    (folder/'step_00000002').mkdir()
    with pytest.warns(UserWarning) as said: assert find_checkpoint(folder).name == 'step_00000001'
    assert len(said) == 2 and all('using step_00000001 instead' in str(o.message) for o in said)
    flip(folder/'step_00000001/state.json', 4)
    with pytest.raises(ValueError, match='none of its checkpoints is whole') as e: find_checkpoint(folder)
    for word in ('step_00000003/model.safetensors is missing', 'step_00000002/manifest.json is missing', 'step_00000001/state.json is damaged',
                 'start again in another folder'): assert word in str(e.value)
    assert listing(folder) == step_names(1, 2, 3)                                              # left for a person to look at


def test_nothing_to_resume_from(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find_checkpoint(tmp_path) is None and find_checkpoint(tmp_path/'none') is None
        (tmp_path/'.new_step_00000004').mkdir()
        assert find_checkpoint(tmp_path) is None and checkpoints(tmp_path) == []


@pytest.mark.parametrize('changes, says', [
    (dict(fc=48), 'of another model'), (dict(blocks=(1, 2, 1, 1)), 'of another model'),
    (dict(num_classes=4), 'the number of categories differs, 3 there and 4 here. Use another run folder')])
def test_another_model_is_an_error_at_once(changes, says, points):
    folder, _ = points
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        path = find_checkpoint(folder)
    model, optimizer = small(**changes)
    before = state(model, optimizer)
    with pytest.raises(ValueError, match=f'step_00000003/model.safetensors: {says}'): load_checkpoint(path, model, optimizer)
    assert path.name == 'step_00000003' and same_states(state(model, optimizer), before)


def test_momentum_of_another_model_changes_nothing(tmp_path):
    "Weights that fit beside momentum that does not: neither is read."
    model, optimizer = small()
    for p in model.box_head.fc.parameters(): optimizer.state[p]['momentum_buffer'] = torch.zeros(2)
    path = save_checkpoint(tmp_path, model, optimizer, dict(step=1))
    other, its = small(1)
    before = state(other, its)
    with pytest.raises(ValueError, match='momentum.safetensors: of another model; 2 tensors differ, such as box_head.fc'):
        load_checkpoint(path, other, its)
    assert same_states(state(other, its), before)


def test_parameters_without_momentum(tmp_path):
    "Velocities that were not there are not there afterwards, and the next step is the same."
    model, optimizer = small()
    optimizer.state.clear()
    path, (other, its) = save_checkpoint(tmp_path, model, optimizer, dict(step=0)), small(1)
    load_checkpoint(path, other, its)
    assert len(its.state) == 0
    for m, o in ((model, optimizer), (other, its)):
        sum(p.square().sum() for p in m.parameters()).backward()
        o.step()
    assert same_states(state(model, optimizer), state(other, its)) and len(its.state) > 0


@pytest.mark.parametrize('before, after', [('last', 'last'), ('last', 'first'), ('first', 'last')])
def test_weights_that_lie_channels_last(before, after, tmp_path):
    "As on a GPU, written and read in either layout: the next step is the same. A fused optimizer reads weight and momentum in memory's order."
    layouts = dict(last=torch.channels_last, first=torch.contiguous_format)
    def step(model, optimizer):
        optimizer.zero_grad()
        sum((p * torch.arange(p.numel()).view_as(p)).sum() for p in model.parameters()).backward()
        optimizer.step()
    pairs = []
    for layout in (before, after):
        model = small()[0].to(memory_format=layouts[layout])
        pairs.append((model, sgd(model, 1e-6)))
    step(*pairs[0])
    load_checkpoint(save_checkpoint(tmp_path, *pairs[0], dict(step=1)), *pairs[1])
    for o in pairs: step(*o)
    assert same_states(*(state(*o) for o in pairs))


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(points):
    folder, states = points
    model, optimizer = small(7)
    path = save_checkpoint(folder, model, optimizer, dict(step=3))
    other, its = small(9)
    load_checkpoint(path, other, its)
    assert same_states(state(other, its), states[3])                                           # a good one is left alone
    flip(path/'momentum.safetensors', -5)
    save_checkpoint(folder, model, optimizer, dict(step=3))
    load_checkpoint(path, other, its)
    assert same_states(state(other, its), state(model, optimizer)) and listing(folder) == step_names(1, 2, 3)


def test_who_may_read_one_file_may_read_all(points):
    "safetensors gives its files to their owner alone."
    modes = {o.stat().st_mode & 0o777 for o in points[0].glob('step_*/*')}
    (points[0]/'usual').write_text('')
    assert modes == {(points[0]/'usual').stat().st_mode & 0o777}


def test_which_are_kept(tmp_path):
    model, optimizer = small()
    for t in range(1, 9): save_checkpoint(tmp_path, model, optimizer, dict(step=t), keep=2, best=3 if t > 3 else None)
    assert listing(tmp_path) == step_names(3, 7, 8)
    save_checkpoint(tmp_path, model, optimizer, dict(step=9), keep=1, best=8)
    assert listing(tmp_path) == step_names(8, 9)
    flip(tmp_path/'step_00000009/state.json', 0)
    save_checkpoint(tmp_path, model, optimizer, dict(step=5), keep=1, best=4)                  # resumed from an older one
    assert listing(tmp_path) == step_names(5, 8, 9)


@pytest.mark.parametrize('limit', [0, 500, 100_000, 'model', 'momentum'])
def test_a_file_that_cannot_grow(limit, points):
    "Of every size, down to the last byte: the older checkpoints are whole, nothing else is left, and the next save works."
    folder, _ = points
    model, optimizer = small(5)
    if isinstance(limit, str): limit = (folder/f'step_00000003/{limit}.safetensors').stat().st_size - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match='step_00000004: cannot be written.*It needs .* MB, and .* MB are free.*untouched'):
            save_checkpoint(folder, model, optimizer, dict(step=4))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(folder) == step_names(1, 2, 3) and all(map(verify_checkpoint, checkpoints(folder)))
    assert verify_checkpoint(save_checkpoint(folder, model, optimizer, dict(step=4)))


def test_the_room_that_is_missing_is_said(points, monkeypatch):
    folder, _ = points
    model, optimizer = small(5)
    size = sum(o.stat().st_size for o in (folder/'step_00000003').iterdir())
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(0, 0, 1_500_000))
    def full(*_, **__): raise OSError(28, 'No space left on device')
    for owner, name in ((Path, 'mkdir'), (writer, 'save_file'), (Path, 'write_text'), (writer, 'sync'), (Path, 'rename')):
        with monkeypatch.context() as m:
            m.setattr(owner, name, full)
            with pytest.raises(OSError, match='No space left') as e: save_checkpoint(folder, model, optimizer, dict(step=4))
        needed, = re.findall(r'It needs (\S+) MB, and 1.5 MB are free', str(e.value))
        assert float(needed) == pytest.approx(size / 1e6, rel=.05)
        assert listing(folder) == step_names(1, 2, 3), name


class Killed(BaseException): "Stands for a process that is no more."


@pytest.mark.parametrize('place', ['save_file', 'sync', 'rename', 'rmtree', 'unlink', 'rmdir', '_digest'])
@pytest.mark.parametrize('damaged', [False, True])
def test_a_kill_while_a_checkpoint_is_written(place, damaged, tmp_path, monkeypatch):
    "Whatever call is the last, a good checkpoint is there, and it is the old one or the new one."
    owner = dict(rename=Path, rmtree=shutil, unlink=os, rmdir=os).get(place, writer)
    true, kills, (model, optimizer) = getattr(owner, place), 0, small()
    for when in range(1, 20):
        shutil.rmtree(tmp_path)
        for t in (1, 2): save_checkpoint(tmp_path, model, optimizer, dict(step=t), keep=2)
        if damaged: shutil.copytree(tmp_path/'step_00000002', tmp_path/'step_00000003', ignore=lambda *_: names[3:])
        old = state(model, optimizer)
        with torch.no_grad(): model.box_head.fc.weight.add_(1.)
        calls = []
        def dies(*args, **kwargs):
            calls.append(args)
            if len(calls) >= when: raise Killed
            return true(*args, **kwargs)
        with monkeypatch.context() as m:
            m.setattr(owner, place, dies)
            try: save_checkpoint(tmp_path, model, optimizer, dict(step=3), keep=2)
            except Killed: kills += 1
        with warnings.catch_warnings(record=True): path = find_checkpoint(tmp_path)
        other, its = small(1)
        assert load_checkpoint(path, other, its)['step'] in (2, 3) and path.name in step_names(2, 3)
        assert same_states(state(other, its), old if path.name == 'step_00000002' else state(model, optimizer))
        save_checkpoint(tmp_path, model, optimizer, dict(step=4), keep=2)
        assert listing(tmp_path) in (step_names(2, 4), step_names(3, 4))
        if len(calls) < when: break
    assert kills == when - 1 > 0


@pytest.fixture(scope='module')
def straight(toy, tmp_path_factory):
    "A run that nothing disturbed, in this process: bits depend on the number of threads."
    out = tmp_path_factory.mktemp('straight')/'run'
    train(tiny, toy, out, progress=False)
    assert len(losses(out)) == 8
    return out


def stop_after(monkeypatch, steps):
    "Make the next run stop after so many of its steps, as a signal would."
    true, done = module.train_step, []
    def step(*args, **kwargs):
        done.append(1)
        if len(done) == steps: os.kill(os.getpid(), signal.SIGTERM)
        return true(*args, **kwargs)
    monkeypatch.setattr(module, 'train_step', step)


def stopped(recipe, coco, out, monkeypatch, steps):
    "A run that a signal stops after so many steps."
    with monkeypatch.context() as m:
        stop_after(m, steps)
        assert train(recipe, coco, out, progress=False) == {}
    assert len(losses(out)) == steps
    return out


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(toy, tmp_path, monkeypatch, straight):
    out = stopped(tiny, toy, tmp_path/'run', monkeypatch, 7)
    assert listing(out/'checkpoints') == step_names(3, 6, 7)
    flip(out/'checkpoints/step_00000007/momentum.safetensors', -9)
    (out/'checkpoints/step_00000006/state.json').write_text('')
    with pytest.warns(UserWarning, match='using step_00000003 instead') as said: train(tiny, toy, out, progress=False)
    assert sum('using step_00000003' in str(o.message) for o in said) == 2
    assert losses(out) == losses(straight) and same(weights(out), weights(straight))
    assert verify_checkpoint(out/'checkpoints/step_00000006') and not (out/'checkpoints/step_00000003').exists()


def test_the_best_checkpoint_is_kept(toy, tmp_path, monkeypatch):
    scores = iter([.1, .5, .3, .5])
    monkeypatch.setattr(module, 'count_apart', lambda *_: dict(bbox=dict(AP=next(scores), AP50=.5)))
    train(replace(tiny, epochs=4, eval_every=1, keep=1, checkpoint_every=3), toy, tmp_path/'run', progress=False)
    assert listing(tmp_path/'run/checkpoints') == step_names(8, 16)
    best = load_model(tmp_path/'run/checkpoints/step_00000008/model.safetensors')
    assert best.meta['category_names'] and not same(best.state_dict(), weights(tmp_path/'run'))


def test_a_run_goes_on_in_other_parts(toy, tmp_path, monkeypatch, straight):
    "How a batch is shared may change between two commands; what is learned may not."
    out = stopped(tiny, toy, tmp_path/'run', monkeypatch, 2)
    train(replace(tiny, images_per_process=1, keep=5, eval_every=1, workers=1), toy, out, progress=False)
    mixed, plain = losses(out), losses(straight)
    assert len(mixed) == len(plain) == 8 and mixed[:2] == plain[:2]
    assert mixed[2]['loss'] == pytest.approx(plain[2]['loss'], rel=.02) and mixed[3]['loss'] == pytest.approx(plain[3]['loss'], rel=.1)
    with pytest.raises(ValueError, match='seed: 0 -> 1'): train(replace(tiny, seed=1), toy, out, progress=False)


@pytest.mark.parametrize('place', ['detect', 'write_file'])
def test_an_evaluation_that_was_cut_short_is_done_again(place, toy, tmp_path, monkeypatch):
    "Also by a kill after it was counted, before it was written; no later checkpoint hides that it is missing."
    recipe, until = replace(tiny, eval_every=1), time.monotonic() + 60
    def killed(*args, **kwargs):
        while not (tmp_path/'run/checkpoints/step_00000004').exists() and time.monotonic() < until: time.sleep(.01)  # it is written behind the loop
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(module, place, killed)
        with pytest.raises(Killed): train(recipe, toy, tmp_path/'run', progress=False)
    assert checkpoints(tmp_path/'run/checkpoints')[-1].name == 'step_00000004' and not list((tmp_path/'run/eval').glob('*'))
    results = train(recipe, toy, tmp_path/'run', progress=False)
    assert listing(tmp_path/'run/eval') == ['step_00000004.json', 'step_00000008.json']
    assert train(recipe, toy, tmp_path/'run', progress=False) == results and len(losses(tmp_path/'run')) == 8


def test_other_annotations_are_refused(toy, tmp_path, monkeypatch):
    out = stopped(tiny, toy, tmp_path/'run', monkeypatch, 1)
    shutil.copytree(toy, tmp_path/'changed')
    file = tmp_path/'changed/annotations/instances_train2017.json'
    doc = json.loads(file.read_text())
    doc['annotations'].pop()
    file.write_text(json.dumps(doc))
    with pytest.raises(ValueError, match='other annotations than .*instances_train2017.json has'): train(tiny, tmp_path/'changed', out, progress=False)


def test_a_data_set_with_other_categories_is_refused(toy, tmp_path, monkeypatch):
    "In words that tell why the model does not fit, with both numbers."
    out = stopped(tiny, toy, tmp_path/'run', monkeypatch, 1)
    shutil.copytree(toy, tmp_path/'more')
    for file in (tmp_path/'more/annotations').glob('*.json'):
        doc = json.loads(file.read_text())
        kinds = len(doc['categories'])
        doc['categories'].append(dict(id=99, name='extra'))
        file.write_text(json.dumps(doc))
    with pytest.raises(ValueError, match=f'number of categories differs, {kinds} there and {kinds + 1} here. Use another run'):
        train(tiny, tmp_path/'more', out, progress=False)


def test_a_log_that_was_cut_in_a_line(toy, tmp_path, monkeypatch):
    out = stopped(tiny, toy, tmp_path/'run', monkeypatch, 3)
    lines = (out/'log.jsonl').read_text()
    (out/'log.jsonl').write_text(lines + lines.splitlines()[0].replace('"step": 1,', '"step": 4,') + '\n{"step": 5, "ep')
    train(tiny, toy, out, progress=False)
    assert [json.loads(o)['step'] for o in (out/'log.jsonl').read_text().splitlines()] == list(range(1, 9))


def test_copies_with_names_of_their_own_stay(tmp_path):
    "What the user put beside the checkpoints is neither used, nor deleted, nor in the way."
    model = mask_rcnn(num_classes=2, blocks=(1, 1, 1, 1), width=8, channels=16, fc=16, groups=4)
    optimizer = sgd(model, .02)
    for step in (1, 2): save_checkpoint(tmp_path, model, optimizer, dict(step=step), keep=2)
    for name in ('step_00000002_good', 'step_old', 'step_00000009.tar'): shutil.copytree(tmp_path/'step_00000002', tmp_path/name)
    for step in (3, 4, 5): save_checkpoint(tmp_path, model, optimizer, dict(step=step), keep=2)
    assert [o.name for o in checkpoints(tmp_path)] == ['step_00000004', 'step_00000005']
    assert find_checkpoint(tmp_path).name == 'step_00000005'
    assert (tmp_path/'step_00000002_good/manifest.json').exists() and (tmp_path/'step_old').exists()


@pytest.mark.parametrize('state, words', [({'step': 99}, 'its step is 99'), ({}, 'its step is None'), ({'step': '1'}, "its step is '1'"),
                                          ([1], 'its step is'), ('{', 'cannot be read'), ('[' * 10**5, 'cannot be read')])
def test_a_state_of_another_step_is_passed_over(tmp_path, state, words):
    "Also where the manifest lists just this state: a renamed folder, an edited one."
    model = mask_rcnn(num_classes=2, blocks=(1, 1, 1, 1), width=8, channels=16, fc=16, groups=4)
    for step in (1, 2): path = save_checkpoint(tmp_path, model, sgd(model, .02), dict(step=step))
    (path/'state.json').write_text(state if isinstance(state, str) else json.dumps(state))
    listed = json.loads((path/'manifest.json').read_text())
    (path/'manifest.json').write_text(json.dumps({**listed, 'state.json': writer._digest(path/'state.json')}))
    with pytest.raises(ValueError, match=re.escape(words)): verify_checkpoint(path)
    with pytest.warns(UserWarning, match='using step_00000001 instead'): assert find_checkpoint(tmp_path).name == 'step_00000001'


def test_a_closed_terminal_asks_for_a_checkpoint_unless_nohup():
    from scratchdet.watch import StopSignals
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally: signal.signal(signal.SIGHUP, before)


def test_sigterm_does_not_cut_short_what_an_error_says():
    from scratchdet.watch import StopSignals
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(RuntimeError), StopSignals() as stop: raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM and signal.getsignal(signal.SIGINT) == before[1]
    finally: signal.signal(signal.SIGTERM, before[0])
