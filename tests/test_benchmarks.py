"The benchmarks: what they count with, quickly; all of them at toy size among the slow tests."
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

folder = Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture(autouse=True)
def importable(monkeypatch): monkeypatch.syspath_prepend(str(folder))


def test_ratios_are_taken_within_each_repeat():
    from common import against, take_turns
    called = []
    seconds = take_turns({k: lambda k=k: called.append(k) for k in 'ab'}, 2)
    assert called == ['a', 'b'] * 3 and [len(v) for v in seconds.values()] == [2, 2]
    found = against({'a': [1., 2., 9.], 'b': [2., 2., 3.]}, 'a', 'b')
    assert found['ratio'] == 1 and found['ratios'] == [.5, 1, 3] and found['median'] == {'a': 2., 'b': 2.}


def test_ratios_are_told_with_their_spread():
    from common import spread
    assert spread([.5, .25, 1.]) == '0.500 (0.250 to 1.000)'


def test_other_work_is_seen_and_told(monkeypatch, capsys):
    import common
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(os.cpu_count() + 1)]
    try: assert common.running() > os.cpu_count() / 2
    finally:
        for o in busy: o.kill(), o.wait()
    for load, told in ((.9, ''), (4.2, 'load 4.2 on 2 cores: other work makes these times long and scattered\n')):
        monkeypatch.setattr(common, 'hardware', lambda: dict(load=load, cores=2))
        assert common.hardware_to_time() == dict(load=load, cores=2) and capsys.readouterr() == ('', told)


def test_a_function_of_another_process():
    from common import Apart
    do = Apart(partial, os.getpid)
    assert do() == do() == do.process.pid != os.getpid() and 0 < do.end() < 2 and do.process.exitcode == 0
    broken = Apart(partial, int, 'x')
    with pytest.raises(EOFError): broken()


def test_what_counts_something_is_at_least_one(capsys):
    from common import parser
    p = parser('', images=(2, 'images'))
    assert p.parse_args([]).images == 2 and p.parse_args(['--images', '1']).images == 1
    for bad, told in (('0', '--images: 0 is less than 1'), ('-3', '-3 is less than 1'), ('x', "invalid whole value: 'x'")):
        with pytest.raises(SystemExit): p.parse_args(['--images', bad])
        assert told in capsys.readouterr().err


def test_what_is_written_has_its_folder_before_the_work(tmp_path, capsys):
    from common import parser
    from studies import out_path
    made = parser('').parse_args(['--out', f'{tmp_path}/new/one.json']).out
    assert made == out_path(str(made)) == tmp_path/'new/one.json' and made.parent.is_dir() and not made.exists()
    assert out_path(f'{tmp_path}/several').is_dir()
    made.touch()
    for bad, told in ((made.parent, 'is a folder: name a file'), (made/'two.json', 'one.json is a file: give a folder')):
        with pytest.raises(SystemExit): parser('').parse_args(['--out', str(bad)])
        assert told in capsys.readouterr().err


def test_a_schedule_that_cannot_be_shortened_so_far(monkeypatch, capsys):
    from learning import main
    monkeypatch.setattr(sys, 'argv', ['learning.py', '--epochs', '1'])
    with pytest.raises(SystemExit) as told: main()
    assert told.value.code == 2 and '--epochs 1: recipe demo: milestones=(1, 1) must be rising' in capsys.readouterr().err


def test_a_clock_counts_nothing_twice():
    from parts import Clock, labels, timed
    def inner(): time.sleep(.02)
    def outer():
        time.sleep(.01)
        owner.inner()
    owner, clock = SimpleNamespace(inner=inner, outer=outer), Clock()
    timed(owner, 'inner', 'RoIAlign'), timed(owner, 'outer', 'losses'), timed(owner, 'outer', 'matching')
    owner.outer()  # without a clock
    for _ in range(2):
        with clock.step(), clock('rest of forward'): owner.outer()
    found = clock.medians()
    assert set(found) == set(labels) and len(clock.steps) == 2 and Clock.running is None
    assert .01 <= found['losses'] < .02 <= found['RoIAlign'] < .1 and found['rest of forward'] < .01 and found['matching'] == 0


def test_parts_of_both_models_are_timed():
    from parts import Clock
    from train_step import build, kinds
    args = SimpleNamespace(images=1, size=(64, 96), objects=2, rois=8)
    for kind in kinds:
        clock = Clock()
        build(kind, args, False, clock)()
        found = clock.medians(skip=0)
        assert [k for k, v in found.items() if v == 0] == [], kind
        assert found['backward'] > found['optimizer'] and found['backbone'] > found['matching'], kind


def test_exponents():
    from cost import exponent
    x = np.array([1, 2, 4, 8])
    assert abs(exponent(x, [[v, v, 50 * v] for v in 3. * x]) - 1) < 1e-9 and abs(exponent(x, [[2.]] * 4)) < 1e-9


def test_padding_is_a_share_of_the_pixels():
    from loading import waste
    found = waste(np.array([[480, 640]] * 8), 2)
    padded = 1 - 800 * 1067 / (800 * 1088)
    assert found['shapes'] == 1 and found['training'] == pytest.approx(padded) == found['evaluation']


def test_counts_are_timed_in_turn(tmp_path):
    from evaluation import counted
    found = counted(tmp_path, images=4, detections=3, repeats=2)
    ours, theirs = (found['seconds'][k] for k in ('scratchdet', 'pycocotools'))
    assert len(ours) == len(theirs) == found['repeats'] == 2 and found['ratios'] == [a / b for a, b in zip(ours, theirs)]
    assert found['median']['scratchdet'] == pytest.approx(sum(ours) / 2) and found['ratio'] == pytest.approx(sum(found['ratios']) / 2)
    assert found['records'] == 12 and found['largest_difference'] <= 1e-9 < found['numbers_compared']


def test_half_precision_is_compared_on_losses_and_gradient():
    from half import compared
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 8), torch.randn(4, 64)
    found = compared(layer, lambda: dict(loss=layer(x).square().mean(), none=layer(x).sum() * 0))
    assert 0 < found['largest_loss_difference'] < .05 and .99 < found['cosine'] < 1


def test_draws_of_noise_move_a_value_by_one_at_most():
    from half import noisy
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert noisy(images, 0) is images
    far = noisy(images, 1).int() - images.int()
    assert far.abs().max() == 1 and not far.equal(noisy(images, 2).int() - images.int())


def test_the_mean_over_draws_keeps_the_sign():
    from half import over_draws
    draws = [dict(fp32=dict(a=2., none=0.), bf16=dict(a=v, none=0.), cosine=c) for v, c in ((2.2, .9), (1.8, .7), (2.2, .8))]
    found = over_draws(draws)
    assert found['losses'].keys() == {'a'}
    assert found['losses']['a'] == pytest.approx(dict(mean=.1 / 3, typical=.1, largest=.1)) and found['lowest_cosine'] == .7


def test_a_study_keeps_the_runs_it_has(tmp_path):
    from learning import kept, summary
    machine = dict(cpu='Z80', torch='2.11')
    runs = [dict(kind=k, seed=s, ap=[dict(step=9, bbox_AP=v)]) for k, s, v in (('a', 0, .25), ('a', 1, .75), ('b', 0, .5))]
    assert summary(runs) == dict(a=dict(bbox_AP=dict(mean=.5, low=.25, high=.75)), b=dict(bbox_AP=dict(mean=.5, low=.5, high=.5)))
    out, setup = tmp_path/'study.json', dict(recipe=dict(blocks=(1, 1)), train=8)
    assert kept(None, setup, machine) == kept(out, setup, machine) == []
    out.write_text(json.dumps(dict(**setup, hardware=machine, runs=runs)))
    assert kept(out, setup, dict(machine, cores=2)) == runs
    with pytest.raises(SystemExit, match='study.json holds runs of another setup'): kept(out, dict(setup, train=9), machine)
    for other in dict(machine, cpu='6502'), dict(machine, torch='2.12'):
        with pytest.raises(SystemExit, match='processor or torch'): kept(out, setup, other)


def started(monkeypatch, *words):
    "benchmarks/run.py with benchmarks that only write a ratio; the command lines that it starts."
    import run
    commands = []
    def write(command):
        commands.append(command)
        Path(command[-1]).write_text('{"ratio": 0.6}')
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(run, 'subprocess', SimpleNamespace(run=write))
    monkeypatch.setattr(sys, 'argv', ['run.py', *words])
    run.main()
    return commands


def test_toy_sizes_leave_the_results_alone_and_give_no_verdict(tmp_path, monkeypatch, capsys):
    (command,) = started(monkeypatch, '--small', '--only', 'inference')
    told, file = capsys.readouterr().out, Path(command[-1])
    assert '--short' in command and folder.parent not in file.parents and f'results: {file.parent}\n' in told
    assert 'inference over torchvision: 0.600\n' in told and 'say nothing' in told and 'MISSED' not in told
    shutil.rmtree(file.parent)
    (command,) = started(monkeypatch, '--only', 'inference', '--out', f'{tmp_path}/new')
    assert command[-1] == f'{tmp_path}/new/inference.json' and '--short' not in command
    assert 'MISSED  inference over torchvision: 0.600, at most 0.500\n' in capsys.readouterr().out


@pytest.mark.parametrize('gain, there, told', [(.1, True, 'imitates bf16'), (1., False, 'SCRATCHDET_REFERENCE'), (1., True, '')])
def test_half_precision_runs_by_default_where_it_says_something(monkeypatch, capsys, gain, there, told):
    import run
    import test_reference
    monkeypatch.setattr(run, 'bf16_gain', lambda: gain)
    monkeypatch.setattr(test_reference, 'FILES', ['mask_rcnn.npz'] * there)
    assert ('half' in run.by_default()) == (told == '') and told in capsys.readouterr().out
    assert len(run.by_default()) >= len(run.parts) - 1


def test_half_precision_without_files_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, folder/'half.py', '--out', tmp_path/'half.json'], capture_output=True, text=True,
                          env={**os.environ, 'SCRATCHDET_REFERENCE': f'{tmp_path}/none'})
    assert done.returncode == 1 and not (tmp_path/'half.json').exists()
    assert done.stderr == f'half.py: no reference files of Mask R-CNN under {tmp_path}/none: name their folder in SCRATCHDET_REFERENCE\n'


@pytest.mark.long
def test_one_command_runs_everything(tmp_path):
    from run import lines, parts
    names = [o for o in parts if o != 'half']  # its files have one size
    done = subprocess.run([sys.executable, folder/'run.py', '--small', '--out', tmp_path, '--only', *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for name in names:
        found = json.loads((tmp_path/f'{name}.json').read_text())
        assert found['command'].startswith('python') and found['hardware']['cores'] >= 1
        values = list(lines(name, found, small=True))
        assert values and set(values) <= set(said)


def gpu_script(out, *words):
    "Run benchmarks/gpu.py on the CPU at toy size; returns what it wrote."
    run = subprocess.run([sys.executable, folder/'gpu.py', '--device', 'cpu', '--small', '--out', out, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text())


def test_the_gpu_script_compares_every_op(tmp_path):
    found = gpu_script(tmp_path/'gpu.json', '--only', 'parity')
    ops = found['parity']['ops']
    assert len(ops) == 2 * 16 and set(found) >= {'command', 'hardware', 'seconds'} and 'speed' not in found
    for name, row in ops.items(): assert row['largest'] < (1e-4 if name.endswith('float32') else .02) and row['share'] < 1e-3, name


def test_the_gpu_script_tells_what_differs():
    from gpu import differences
    x = torch.arange(100.)
    assert differences([x, x], [x, x]) == dict(largest=0, share=0)
    found = differences(x, x + 9.9 * (x == 5))
    assert found['largest'] == pytest.approx(.1) and found['share'] == .01
    with pytest.raises(ValueError, match='float64'): differences(x, x.double())


def test_the_overfitted_folder_has_its_training_images_twice(tmp_path):
    from gpu import overfit_folder
    (tmp_path/'coco/annotations').mkdir(parents=True), (tmp_path/'coco/train2017').mkdir()
    (tmp_path/'coco/annotations/instances_train2017.json').write_text('{}')
    made = overfit_folder(tmp_path/'coco', tmp_path/'both')
    assert (made/'annotations/instances_val2017.json').read_text() == '{}'
    assert (made/'val2017').resolve() == (made/'train2017').resolve() == tmp_path/'coco/train2017'


def test_the_gpu_script_times_both_kinds_of_steps(tmp_path):
    row = gpu_script(tmp_path/'gpu.json', '--only', 'speed')['speed']['1']
    assert min(o[k] for o in (row, row['eager']) for k in ('images_per_second', 'ms_per_image')) > 0


@pytest.mark.long
def test_the_gpu_script_runs_everything(tmp_path):
    from gpu import every
    found = gpu_script(tmp_path/'gpu.json')
    assert set(found) >= set(every) == set(found['seconds'])
    assert found['speed']['1']['images_per_second'] > 0 < found['peer']['1']['images_per_second']
    assert min(found['parts']['ms'].values()) > 0 < min(o['bytes_ms'] for o in found['parts']['ops'].values())
    assert found['training']['toy']['steps'] == len(found['training']['toy']['log']) == 2
    assert 'AP' in found['training']['toy']['evaluations'][-1]['bbox']
