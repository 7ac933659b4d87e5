"The cost of a run before it starts, against arithmetic by hand, a run that was made, and the training's own refusals."
import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest
import torch
from runs import log, tiny, toy  # noqa: F401

from scratchdet.coco import coco_split, load_index, training_images
from scratchdet.command import counted
from scratchdet.loader import plan_epoch, train_loader
from scratchdet.plan import activation_bytes, largest_shapes, main, parse_args, plan, report, saved_bytes
from scratchdet.recipes import recipes
from scratchdet.schedule import split_batch
from scratchdet.train import build_detector, main as train_main, parse_args as train_args, train

six, one = (recipes[f'mask_rcnn_r50_fpn_gn_scratch_{k}x'] for k in (6, 1))
coco = 117_266


def words(**kw):
    "A command line, changed by keyword."
    values = {'recipe': six.name, 'processes': 16, 'images-per-second': 60, **{k.replace('_', '-'): v for k, v in kw.items()}}
    return [str(o) for k, v in values.items() if v is not None for o in (f'--{k}', *(v if isinstance(v, list) else [v]))]


def command(**kw):
    return subprocess.run([sys.executable, '-m', 'scratchdet.plan', *words(**kw)], capture_output=True, text=True, timeout=120)


def test_6x_on_16_processes_by_hand():
    cost = plan(six, coco, 16, 60)
    assert ceil(117_266 / 16) == 7330 == cost['epoch_steps'] and cost['steps'] == 535_090 == 7330 * 73 and cost['epochs'] == 73
    assert [(o['step'], o['epoch'], round(o['lr'], 9)) for o in cost['drops']] == [(476_450, 65, .002), (520_430, 71, .0002)]
    assert (cost['images_per_process'], cost['parts']) == (1, 1) and cost['images_seen'] == 8_561_440
    assert cost['hours'] == pytest.approx(8_561_440 / 60 / 16 / 3600) and cost['gpu_hours'] == pytest.approx(39.636, abs=1e-3)
    assert cost['evaluations'] == 73 and cost['lr'] == .02 and cost['warmup'] == 500


def test_1x_on_16_processes_by_hand():
    cost = plan(one, coco, 16, 60)
    assert cost['steps'] == 90_000 and cost['images_seen'] == 1_440_000 and cost['epochs'] == pytest.approx(90_000 / 7330)
    assert [o['step'] for o in cost['drops']] == [60_000, 80_000] and cost['evaluations'] == 13
    assert cost['gpu_hours'] == pytest.approx(6.667, abs=1e-3)


@pytest.mark.parametrize('processes, split', [(1, (4, 4)), (2, (4, 2)), (4, (4, 1)), (8, (2, 1)), (16, (1, 1))])
def test_processes_change_time_and_traffic_alone(processes, split):
    cost, alone = plan(one, coco, processes, 10), plan(one, coco, 1, 10)
    parameters = 45_711_152
    assert (cost['images_per_process'], cost['parts']) == split == split_batch(16, processes, one.images_per_process)
    assert cost['hours'] * processes == pytest.approx(alone['hours'])
    assert cost['traffic'] == pytest.approx(2 * (processes - 1) / processes * (4 * parameters + 12))
    assert cost['disk'] == alone['disk'] == dict(weights=4 * parameters, momentum=4 * parameters)
    assert cost['memory']['buckets'] == (4 * parameters if processes > 1 else 0)
    for k in ('steps', 'drops', 'epochs', 'gpu_hours', 'images_seen', 'evaluations'): assert cost[k] == alone[k]


def test_parameters_are_those_of_the_model():
    for name in ('demo', 'faster_rcnn_r50_fpn_gn_scratch_6x'):
        model, cost = build_detector(recipes[name], 7), plan(recipes[name], 1000, 1, 1, classes=7)
        assert cost['memory']['parameters'] == 4 * sum(p.numel() for p in model.parameters()) > 0
    assert plan(six, coco, 16, 60)['disk']['weights'] == 4 * 45_711_152


@pytest.fixture(scope='module')
def made(toy, tmp_path_factory):  # noqa: F811
    "A run with drops and evaluations, and its plan."
    recipe = replace(tiny, epochs=3, milestones=(1, 2), warmup=2, eval_every=2, keep=2)
    out = tmp_path_factory.mktemp('made')/'run'
    train(recipe, toy, out, cpu=True, progress=False)
    index = training_images(load_index(*coco_split(toy, 'train')))
    return recipe, out, plan(recipe, len(index), 1, 10., classes=len(index.names)), index


def test_a_run_does_what_was_planned(made):
    recipe, out, cost, index = made
    lines = log(out)
    assert [o['step'] for o in lines] == list(range(1, cost['steps'] + 1)) and lines[-1]['epoch'] == cost['epochs'] == 3
    lr = [o['lr'] for o in lines]
    fell = [i for i in range(1, len(lr)) if lr[i] < lr[i-1]]
    assert fell == [o['step'] for o in cost['drops']] and len(fell) == 2
    assert [lr[i] for i in fell] == [o['lr'] for o in cost['drops']] and max(lr) == cost['lr']
    assert len(list((out/'eval').glob('step_*.json'))) == cost['evaluations'] == 2
    assert cost['images_seen'] == len(lines) * recipe.batch_size and cost['epoch_steps'] == ceil(len(index) / recipe.batch_size)


def test_a_checkpoint_has_the_planned_size(made):
    recipe, out, cost, _ = made
    held = [o for o in (out/'checkpoints').iterdir() if o.is_dir()]
    assert recipe.keep <= len(held) <= recipe.keep + 1
    for folder in held:
        for name, planned in (('model', 'weights'), ('momentum', 'momentum')):
            assert (folder/f'{name}.safetensors').stat().st_size == pytest.approx(cost['disk'][planned], rel=.01)
        assert sum(o.stat().st_size for o in folder.iterdir()) == pytest.approx(sum(cost['disk'].values()), rel=.01)


@pytest.mark.parametrize('kind', [dict(), dict(precision='bf16'), dict(masks=False), dict(mask_rois=4)], ids=str)
def test_memory_is_a_ceiling_of_a_real_step(made, kind):
    recipe, _, _, index = made
    recipe = replace(recipe, **kind)
    loader = train_loader(index, batch_size=4, short_sides=recipe.short_sides, long_side=recipe.long_side, masks=recipe.masks)
    model, looked = build_detector(recipe, len(index.names)).train(), 0
    for batch in loader:
        shape = tuple(batch.images.shape[-2:])
        real, planned = saved_bytes(model, batch, recipe.precision == 'bf16'), activation_bytes(recipe, len(index.names), 4, shape)
        assert .5 * planned < real <= planned * 1.01 and max(shape) <= max(largest_shapes(recipe)[1])
        assert real == pytest.approx(planned, rel=.01) or recipe.masks and not recipe.mask_rois
        looked += 1
    assert looked == 4


def test_the_largest_shape_is_reached_and_not_passed():
    sizes = [(480, 640), (640, 480), (300, 640), (360, 640), (500, 333), (100, 100), (640, 640), (800, 1333), (50, 600)]
    for recipe in (six, recipes['demo'], replace(six, short_sides=(640, 800), buckets=False), replace(six, short_sides=(900,), long_side=900)):
        (h, w), (side, same) = largest_shapes(recipe)
        each = [plan_epoch([o], 1, 0, e, recipe.short_sides, recipe.long_side, buckets=recipe.buckets)[0].shape for o in sizes for e in range(8)]
        areas = [a * b for a, b in each]
        assert max(areas) == h * w and max(map(max, each)) == w == side == same


def test_the_command_prints_the_plan():
    done = command()
    assert done.returncode == 0, done.stderr
    for text in ('117,266 images (COCO train2017', '535,090 steps, 73.00 epochs', '0.0002 from step 520,430, epoch 71.00',
                 '16 images = 16 processes x 1 at once x 1 in turn', '39.64 GPU-hours', '60 images a second in each process',
                 'not counted: evaluation, 73 times 5,000 images', '365.7 MB', '342.8 MB sent by each process', 'estimated'):
        assert text in done.stdout, text


def test_one_is_no_plural():
    recipe = replace(recipes['demo'], batch_size=1, epochs=1, warmup=1)
    said = report(recipe, plan(recipe, 1, 1, 1, classes=2), val=counted(1, 'image'))
    for text in ('demo on 1 process\n', '1 image: 1 step of 1 image\n', '1 step, 1.00 epochs, 1 image seen', 'after 1 step of warm-up', '1 time 1 image\n'):
        assert text in said, said


def test_the_command_counts_a_folder(toy, capsys):  # noqa: F811
    cost = main(parse_args(words(recipe='demo', processes=2, coco=toy)))
    said, index = capsys.readouterr().out, load_index(*coco_split(toy, 'train'))
    assert cost['images'] == len(training_images(index)) and f'of {len(index)} in instances_train2017.json' in said
    assert 'evaluation, 2 times 4 images' in said
    classes = len(index.names)
    assert cost['disk']['weights'] == 4 * sum(p.numel() for p in build_detector(recipes['demo'], classes).parameters())
    assert classes != 80


def test_settings_change_the_plan():
    cost = main(parse_args(words(set=['batch_size=32', 'lr=0.04'], images=1000)))
    assert cost['steps'] == 73 * 32 and cost['images_per_process'] == 2 and cost['lr'] == .04


errors = {
    'no recipe': (dict(recipe='mask'), "no recipe 'mask'; there are mask_rcnn"),
    'unknown key': (dict(set=['learning=1']), "a recipe has no 'learning'"),
    'lr and batch': (dict(set=['batch_size=32']), 'lr=0.02 does not fit batch_size=32'),
    'processes and batch': (dict(processes=7), 'batch_size=16 cannot be shared by 7 processes'),
    'no processes': (dict(processes=0), '0 processes: give 1 or more'),
    'no rate': (dict(images_per_second=0), '0.0 images a second: give a number above 0'),
    'a rate that is none': (dict(images_per_second='nan'), 'give a number above 0'),
    'no images': (dict(images=0), '0 images in batches of 16'),
    'no folder': (dict(coco='nowhere'), 'nowhere does not exist'),
    'no file': (dict(recipe='nowhere.json'), 'nowhere.json'),
}


@pytest.mark.parametrize('name', errors)
def test_what_is_refused(name):
    change, text = errors[name]
    with pytest.raises(SystemExit) as e: main(parse_args(words(**change)))
    assert str(e.value).startswith('scratchdet.plan: ') and text in str(e.value)


@pytest.mark.parametrize('settings', [['lr=0.01'], ['batch_size=48'], ['epochs=0'], ['lr=fast'], ['width=7']])
def test_it_refuses_as_training_does(settings, tmp_path):
    with pytest.raises(SystemExit) as a: main(parse_args(words(set=settings)))
    asked = train_args(['--recipe', six.name, '--coco', str(tmp_path), '--out', str(tmp_path/'out'), '--cpu', '--set', *settings])
    with pytest.raises(SystemExit) as b: train_main(asked)
    assert str(a.value).removeprefix('scratchdet.plan: ') == str(b.value).removeprefix('scratchdet.train: ')


def test_a_refusal_is_one_line_and_a_status():
    done = command(processes=7)
    assert done.returncode == 1 and done.stdout == '' and 'Traceback' not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('scratchdet.plan: batch_size=16 cannot be shared by 7 processes')


def test_words_exclude_one_another():
    for wrong in (words(images=5, coco='x'), words(processes='many'), words(recipe=None)):
        with pytest.raises(SystemExit) as e: parse_args(wrong)
        assert e.value.code == 2


def test_planning_draws_nothing():
    before = torch.get_rng_state()
    cost = plan(six, coco, 16, 60)
    assert torch.equal(before, torch.get_rng_state()) and cost == plan(six, coco, 16, 60)
