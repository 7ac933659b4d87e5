"What a cluster does to a run: each fault ends it with a message, soon, and the folder goes on as if nothing had been."
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from ranks import context, run_ranks
from runs import command, finish, log, losses, start, tiny, toy  # noqa: F401  (a fixture)

import scratchdet.loader
import scratchdet.resume
import scratchdet.train
from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.resume import checkpoints, verify_checkpoint
from scratchdet.train import claim_folder, main, parse_args, train

short = replace(tiny, epochs=3)                                       # twelve steps


def seen(process):
    "Wait for the end of a process that must not take long; its exit status and what it said."
    before = time.monotonic()
    status, said = finish(process)
    assert time.monotonic() - before < 90
    return status, said


def wait_for(out, lines, process):
    "Return when the log has so many lines; the process ids of all that train."
    while not (out/'log.jsonl').exists() or len((out/'log.jsonl').read_text().splitlines()) < lines:
        assert process.poll() is None, finish(process)
        time.sleep(.01)
    return {int(o.stem): json.loads(o.read_text())['pid'] for o in (out/'processes').glob('*.json')}


@pytest.fixture(scope='module')
def straight(toy, tmp_path_factory):  # noqa: F811
    "Losses of a run of two processes that nothing disturbed."
    out = tmp_path_factory.mktemp('straight')/'run'
    run_ranks(train, 2, short, toy, out)
    return losses(out)


def goes_on(out, toy, straight, processes=2):  # noqa: F811
    "The folder has whole checkpoints, no rests, and the same command ends the run as it would have ended."
    assert not (out/'model.safetensors').exists()
    for o in checkpoints(out/'checkpoints'): verify_checkpoint(o)
    run_ranks(train, processes, short, toy, out)
    assert losses(out) == straight and (out/'model.safetensors').exists() and not list(out.rglob('*.new'))


@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_is_killed(rank, toy, tmp_path, straight):  # noqa: F811
    out = tmp_path/'run'
    process = start(short, toy, out, processes=2)
    os.kill(wait_for(out, 4, process)[rank], signal.SIGKILL)
    status, said = seen(process)
    assert status != 0 and f'rank      : {rank}' in said and 'SIGKILL' in said            # the launcher's report
    assert 'another process of this run is gone' in said and 'goes on from the newest checkpoint' in said
    goes_on(out, toy, straight)


def test_a_process_stands_still(toy, tmp_path, straight):  # noqa: F811
    "The other one says who it is, and the launcher ends both."
    out = tmp_path/'run'
    process = start(replace(short, hang_timeout=6), toy, out, processes=2)
    pid = wait_for(out, 4, process)[1]
    os.kill(pid, signal.SIGSTOP)
    status, said = seen(process)
    assert status != 0 and f'no progress for 6 s; process 1 (pid {pid} on ' in said and 'does not answer' in said
    assert said.count('no progress') == 1 and 'hang_timeout' in said
    goes_on(out, toy, straight)


def hangs(out, toy, recipe, calls):  # noqa: F811
    "Train; the second process never comes back from its read of an image after so many."
    true, done = scratchdet.loader.read_image, []
    def read(path):
        done.append(path)
        if os.environ['RANK'] == '1' and len(done) > calls: time.sleep(600)
        return true(path)
    scratchdet.loader.read_image = read
    sys.stderr = open(out.with_suffix(f'.{os.environ["RANK"]}'), 'w')
    train(recipe, toy, out, progress=False)


def test_a_disk_that_does_not_answer(toy, tmp_path):  # noqa: F811
    "The process that reads for ever is the one that is named, by both: it is alive, and behind."
    out = tmp_path/'run'
    with pytest.raises(Exception): run_ranks(hangs, 2, out, toy, replace(short, hang_timeout=4), 8, seconds=30)
    said = [(tmp_path/f'run.{o}').read_text() for o in (0, 1)]
    assert any('no progress for 4 s; process 1 (pid' in o for o in said), said
    for o in said: assert not o or 'hangs at images of step' in o and 'process 0' not in o
    assert checkpoints(out/'checkpoints')


def slowly(name, seconds):
    "Let a function of the training page take longer."
    true = getattr(scratchdet.train, name)
    setattr(scratchdet.train, name, lambda *args: (time.sleep(seconds), true(*args))[1])


def late(out, toy, seconds):  # noqa: F811
    "Train under a watch of three seconds; writing a checkpoint and counting take so long each. What is said goes to a file."
    slowly('save_checkpoint', seconds), slowly('count_apart', seconds)
    sys.stderr = open(out.with_suffix('.said'), 'a')
    return train(replace(tiny, epochs=1, checkpoint_every=100, hang_timeout=3), toy, out, progress=False)['step']


def test_the_watch_lets_slow_tasks_pass(toy, tmp_path):  # noqa: F811
    "Together they take longer than it waits; each of them is progress, in both processes."
    assert run_ranks(late, 2, tmp_path/'run', toy, 1.8) == [4, 4]


def test_the_watch_sees_a_task_that_hangs(toy, tmp_path):  # noqa: F811
    process = context.Process(target=late, args=(tmp_path/'run', toy, 600))
    process.start()
    process.join(60)
    said = (tmp_path/'run.said').read_text()
    assert process.exitcode == 1 and 'no progress for 3 s; process 0 (pid' in said and 'hangs at the checkpoint of step 4, behind.py:' in said


@pytest.mark.parametrize('number,all', [(signal.SIGUSR1, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_processes_are_told_to_end(number, all, toy, tmp_path, straight):  # noqa: F811
    """One is told by a signal; or all and their launcher, as SLURM and a terminal do, and the launcher passes it on once more:
    both stop after the same step, with a checkpoint."""
    out = tmp_path/'run'
    process = start(short, toy, out, processes=2)
    pids = wait_for(out, 4, process)
    for o in (pids[0], pids[1], process.pid) if all else [pids[1]]: os.kill(o, number)
    status, said = seen(process)
    assert status != 0 and said.count('stopped by a signal') == 1
    assert checkpoints(out/'checkpoints')[-1].name == f'step_{len(losses(out)):08}' and 4 <= len(losses(out)) < 12
    goes_on(out, toy, straight)


@pytest.fixture(scope='module')
def single(toy, tmp_path_factory):  # noqa: F811
    "Losses of a run of one process."
    out = tmp_path_factory.mktemp('single')/'run'
    run_ranks(train, 1, short, toy, out)
    return losses(out)


def test_a_data_worker_is_killed(toy, tmp_path):  # noqa: F811
    out, recipe = tmp_path/'run', replace(short, workers=1, batch_size=1)
    process = start(recipe, toy, out)
    wait_for(out, 4, process)                                         # of sixteen steps in the first epoch
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    assert children
    for o in children: os.kill(int(o), signal.SIGKILL)
    status, said = seen(process)
    assert status == 1 and 'a process that reads images is gone' in said and 'workers=' in said and 'Traceback' not in said
    assert 4 <= len(losses(out)) < 16
    for o in checkpoints(out/'checkpoints'): verify_checkpoint(o)
    train(recipe, toy, out, progress=False)
    assert len(losses(out)) == 48


def test_the_disk_is_full(toy, tmp_path, single):  # noqa: F811
    "No file may grow beyond half of a checkpoint's weights: the message says what was to be written; nothing is torn."
    out = tmp_path/'run'
    run_ranks(train, 1, replace(short, checkpoint_every=100), toy, tmp_path/'other')
    size = (tmp_path/'other/model.safetensors').stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(command(short, toy, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=limit, env=env)
    status, said = seen(process)
    assert status == 1 and 'step_00000003: cannot be written' in said and 'MB' in said and 'Traceback' not in said
    assert 3 <= len(losses(out)) <= 6 and not list((out/'checkpoints').iterdir())        # the next save waits for this one
    goes_on(out, toy, single, 1)


def fills_up(out, toy):  # noqa: F811
    "Train; the second checkpoint fails at its last file. What is said."
    calls, true = [], scratchdet.resume.sync
    def full(path):
        calls.append(path)
        if len(calls) == 10: raise OSError(28, 'No space left on device', str(path))
        return true(path)
    scratchdet.resume.sync = full
    try: train(short, toy, out, progress=False)
    except OSError as e: return str(e)


def test_the_disk_is_full_later(toy, tmp_path, single):  # noqa: F811
    "The first checkpoint is there, and is where the run goes on."
    out = tmp_path/'run'
    said, = run_ranks(fills_up, 1, out, toy)
    assert 'step_00000006: cannot be written' in said and 'No space left' in said
    assert [o.name for o in (out/'checkpoints').iterdir()] == ['step_00000003']
    goes_on(out, toy, single, 1)


def test_a_loss_is_not_finite_in_one_of_two(toy, tmp_path):  # noqa: F811
    "All processes end; the message names loss, step and images, and no checkpoint holds the step."
    out = tmp_path/'run'
    process = start(replace(short, lr=1e25, warmup=0, report_every=2, checkpoint_every=1), toy, out, processes=2)
    status, said = seen(process)
    assert status != 0 and 'in step 2, with images [' in said and 'lower lr' in said
    assert [o.name for o in checkpoints(out/'checkpoints')] == ['step_00000001']


@pytest.fixture
def damaged(toy, tmp_path):  # noqa: F811
    "The toy set with one training image that cannot be decoded, and its file name and id."
    root = tmp_path/'damaged'
    for o in ('annotations', 'val2017', 'train2017'): (root/o).mkdir(parents=True)
    for o in toy.rglob('*.*'):
        if o.is_file() and '.scratchdet' not in o.parts: os.link(o, root/o.relative_to(toy))
    index = training_images(load_index(*coco_split(root, 'train')))
    path = index.path(5)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:len(content) // 3] if path.suffix != '.jpg' else content[:100])
    return root, path.name, int(index.image_ids[5])


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_stops_a_run(workers, damaged, tmp_path, capsys):
    "With a message in a line of its own: that of the bar has ended."
    root, name, _ = damaged
    words = command(replace(tiny, workers=workers), root, tmp_path/'run')[3:]
    with pytest.raises(SystemExit) as e: main(parse_args([o for o in words if o != '--quiet']))
    assert name in str(e.value) and '\n' not in str(e.value)
    assert re.search(r'%\|.*/8 \[.*\]\n$', capsys.readouterr().err)


def test_a_damaged_image_is_skipped_if_asked(damaged, tmp_path):
    "On two processes as on one; the log says which image, in the line of its step, once in each epoch."
    root, name, number = damaged
    recipe = replace(tiny, on_bad_image='skip')
    for n, out in ((1, 'one'), (2, 'two')): run_ranks(train, n, recipe, root, tmp_path/out)
    one, two = log(tmp_path/'one'), log(tmp_path/'two')
    lines = [o['step'] for o in one if 'skipped' in o]
    assert len(lines) == 2 and lines[0] <= 4 < lines[1] and all(o['skipped'] == [number] for o in one if 'skipped' in o)
    assert lines == [o['step'] for o in two if 'skipped' in o]
    for a, b in zip(one[:2], two): assert b['loss'] == pytest.approx(a['loss'], rel=1e-4)


def test_the_screen_tells_of_boxes_outside_and_of_skipped_images(damaged, tmp_path, capsys):
    "With counts in the singular, and the command that says more."
    root, _, number = damaged
    file = root/'annotations/instances_train2017.json'
    doc = json.loads(file.read_text())
    box = doc['annotations'][0]['bbox']
    box[2] = 100 - box[0]
    file.unlink()
    file.write_text(json.dumps(doc))
    train(replace(tiny, epochs=1, milestones=(1,), warmup=1, on_bad_image='skip'), root, tmp_path/'run')
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith('after 1 step; not lowered at 1, the run has 1 epoch'), lines[2]
    assert lines[3].startswith(f'warning: {file}: boxes that leave their image: 1 of ') and lines[3].endswith('training clips at the edge')
    assert lines[4] == f'python -m scratchdet.check --coco {root} says more'
    told = [o for o in lines if 'skipped' in o]
    assert len(told) == 1 and re.fullmatch(rf'step \d: 1 image cannot be read and is skipped, such as id {number}; scratchdet.check names the files', told[0])


def test_a_gpu_without_memory(toy, tmp_path, monkeypatch):  # noqa: F811
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')
    monkeypatch.setattr(scratchdet.train, 'train_step', full)
    with pytest.raises(SystemExit) as e: main(parse_args(command(tiny, toy, tmp_path/'run')[3:]))
    assert 'CUDA out of memory. Give --set images_per_process=' in str(e.value)


def test_a_folder_belongs_to_one_run(toy, tmp_path):  # noqa: F811
    "A second run is refused while the first one is at work, and welcome when that one was killed."
    out, long = tmp_path/'run', replace(short, epochs=100)
    process = start(long, toy, out)
    wait_for(out, 1, process)
    status, said = seen(start(long, toy, out))
    assert status == 1 and f'{out}: another run is at work in this folder' in said
    process.kill()
    finish(process)
    claim_folder(out, long).close()
