"A run that TensorBoard, trackio and Weights & Biases follow: stopped, resumed, and read back from each."
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
from runs import command, log, tiny, toy  # noqa: F401
from scratchdet import track
from scratchdet.train import main, parse_args

names = 'tensorboard', 'wandb', 'trackio'


@pytest.fixture(scope='module')
def run(tmp_path_factory, toy):  # noqa: F811
    """Steps 1 to 8 with two trackers; then checkpoint 3 is the newest that is left, and two processes train 4 to 8 again, with three.
    Everything is kept in one folder, without a network."""
    out = tmp_path_factory.mktemp('track')/'run'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'WANDB_MODE': 'offline', 'TRACKIO_DIR': str(out.parent/'trackio')}
    for processes, some in ((1, names[1:]), (2, names)):
        words = command(replace(tiny, score_thresh=.001), toy, out, '--track', *some, processes=processes)
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=600)
        assert done.returncode == 0 and done.stdout == '', done.stderr
        if processes == 1:
            assert done.stderr == ''
            shutil.copytree(out, out.parent/'first')
            for o in (*(out/'checkpoints').glob('step_0000000[4-9]'), out/'eval'): shutil.rmtree(o)
    assert [o['step'] for o in log(out)] == list(range(1, 9))
    return out


@pytest.fixture(scope='module')
def first(run):
    "The run folder after the first start: two processes round otherwise than one."
    return run.parent/'first'


def curves(out):
    "(step, loss) of each line, and (step, AP) of the only evaluation."
    test, = track.evaluations(out)
    assert test['bbox']['AP'] > 0
    return [[(o['step'], pytest.approx(o['loss'])) for o in log(out)], [(8, pytest.approx(test['bbox']['AP']))]]


def test_tensorboard_has_each_step_once(run):
    "Although it was asked for at the second start alone, and there by two processes."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run/'tensorboard')).Reload()
    found = [[(o.step, o.value) for o in events.Scalars(name)] for name in ('loss', 'bbox/AP')]
    assert found == curves(run)
    assert {'lr', 'images_per_second', 'memory_gb', 'loss_mask', 'segm/AP50'} <= set(events.Tags()['scalars'])
    assert len(list((run/'tensorboard').glob('events.*'))) == 1
    settings, = (run/'tensorboard').glob('*/hparams.yml')
    assert 'blocks: 1, 1, 1, 1' in settings.read_text()


def test_trackio_has_each_step_once(run, first):
    code = ('import json, trackio.sqlite_storage as s; o, = s.SQLiteStorage.get_runs("scratchdet");'
            'print(json.dumps([o, s.SQLiteStorage.get_logs("scratchdet", o), s.SQLiteStorage.get_run_config("scratchdet", o)]))')
    env = {**os.environ, 'TRACKIO_DIR': str(run.parent/'trackio')}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    name, rows, config = json.loads(done.stdout)
    found = [[(o['step'], o[k]) for o in rows if k in o] for k in ('loss', 'bbox/AP')]
    assert found == curves(first)
    assert name == json.loads((run/'track.json').read_text())['id'] and name.startswith('run-')
    assert config['blocks'] == '1, 1, 1, 1' and config['batch_size'] == 4


def records(file):
    "What is in a file of wandb: blocks of 32 KiB, chunks with a header of checksum, length and kind (whole, first, middle, last)."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part = file.read_bytes(), 7, b''
    while at + 7 < len(data):
        _, size, kind = struct.unpack('<IHB', data[at:at + 7])
        part, at = part + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b''
        if (left := 32768 - at % 32768) < 7: at += left


def test_wandb_has_each_step_once(run, first):
    "One run, in two parts that `wandb sync` puts together."
    files = sorted(run.glob('wandb/offline-run-*/run-*.wandb'))
    found = [list(records(o)) for o in files]
    assert len(files) == 2 and len({o.name for o in files}) == 1
    rows = [{'/'.join(o.nested_key) or o.key: json.loads(o.value_json) for o in r.history.item}
            for part in found for r in part if r.WhichOneof('record_type') == 'history']
    assert [[(o['_step'], o[k]) for o in rows if k in o] for k in ('loss', 'bbox/AP')] == curves(first)
    for part in found:
        about, = [r.run for r in part if r.WhichOneof('record_type') == 'run']
        config = {o.key: json.loads(o.value_json) for o in about.config.update}
        assert about.project == 'scratchdet' and config['blocks'] == '1, 1, 1, 1'


def test_no_duplicates_are_tracked_of_a_finished_run(run):
    assert json.loads((run/'track.json').read_text())['sent'] == dict.fromkeys(names, [8, True])


@pytest.mark.parametrize('words, says', [
    (['wandb', 'trackio'], '--track trackio: not installed; `pip install trackio`'), (['mlflow'], '--track mlflow: it is none of')])
def test_what_is_missing_is_told_before_anything_is_made(words, says, toy, tmp_path, monkeypatch):  # noqa: F811
    there = [o for o in track.get_available_trackers() if o.value != 'trackio']
    monkeypatch.setattr(track, 'get_available_trackers', lambda: there)
    with pytest.raises(SystemExit) as e:
        main(parse_args(['--recipe', 'demo', '--coco', str(toy), '--out', str(tmp_path/'run'), '--cpu', '--track', *words]))
    assert e.value.code.startswith('scratchdet.train: ') and says in e.value.code and '\n' not in e.value.code
    assert not (tmp_path/'run').exists()


def test_wandb_without_an_account(toy, tmp_path, monkeypatch):  # noqa: F811
    "One line that says what to do; no step is trained."
    for k in [k for k in os.environ if k.startswith('WANDB')]: monkeypatch.delenv(k)
    for k in ('HOME', 'NETRC'): monkeypatch.setenv(k, str(tmp_path/'none'))
    words = command(tiny, toy, tmp_path/'run', '--track', 'wandb')
    with pytest.raises(SystemExit) as e: main(parse_args(words[3:]))
    assert e.value.code.startswith('scratchdet.train: --track wandb does not start: ') and 'WANDB_MODE=offline' in e.value.code
    assert '\n' not in e.value.code and log(tmp_path/'run') == []
