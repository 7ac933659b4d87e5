"Recipes: their values against the published ones, the command line, the launch files."
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from scratchdet.recipes import (Recipe, RunSettings, apply_settings, detector_arguments, find_recipe, load_recipe, recipe_differences,
                                recipe_schedule, recipes, save_recipe, times)
from scratchdet.schedule import Schedule, check_lr, scaled_lr, split_batch, tail_schedule

root = Path(__file__).resolve().parents[1]
runs = sorted(o for o in (root/'recipes').glob('*.sh') if o.name != 'slurm.sh')


def test_the_long_recipes_are_those_of_the_literature():
    mask, faster = (recipes[f'{o}_rcnn_r50_fpn_gn_scratch_6x'] for o in ('mask', 'faster'))
    assert replace(faster, masks=True, name=mask.name) == mask
    mmdetection = dict(lr=.02, momentum=.9, weight_decay=1e-4, epochs=73, milestones=(65, 71), gamma=.1, warmup=500,
                       warmup_factor=.001, batch_size=16, short_sides=(800,), long_side=1333, flip=.5, rpn_batch=256,
                       roi_batch=512, pre_nms_topk=(2000, 1000), post_nms_topk=(1000, 1000), score_thresh=.05, max_dets=100,
                       blocks=(3, 4, 6, 3), width=64, channels=256, fc=1024, groups=32)
    assert {k: getattr(mask, k) for k in mmdetection} == mmdetection


@pytest.mark.parametrize('k, steps, drops', [(1, 90_000, (60_000, 80_000)), (2, 180_000, (120_000, 160_000)),
                                             (3, 270_000, (210_000, 250_000)), (4, 360_000, (300_000, 340_000)),
                                             (5, 450_000, (390_000, 430_000)), (9, 810_000, (750_000, 790_000))])
def test_lengths_follow_the_paper(k, steps, drops):
    for kind in ('mask', 'faster'):
        schedule = recipe_schedule(recipes[f'{kind}_rcnn_r50_fpn_gn_scratch_{k}x'], 117_266)
        assert (schedule.steps, schedule.milestones) == (steps, drops)


def test_the_length_scales_with_the_batch():
    recipe = recipes['mask_rcnn_r50_fpn_gn_scratch_9x']
    schedule = recipe_schedule(replace(recipe, batch_size=64, lr=.08), 117_266)
    assert (schedule.steps, schedule.milestones) == (202_500, (187_500, 197_500))     # detectron2's 9x


@pytest.mark.parametrize('name', recipes)
def test_every_value_can_be_set_by_its_own_text(name):
    recipe, looped = recipes[name], 0
    for f in fields(recipe):
        if f.name == 'name': continue
        value = getattr(recipe, f.name)
        text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert apply_settings(recipe, [f'{f.name}={text}']) == recipe, f.name
        looped += 1
    assert looped == len(fields(Recipe)) - 1 > 30


@pytest.mark.parametrize('name', recipes)
def test_a_recipe_survives_the_disk(name, tmp_path):
    assert load_recipe(save_recipe(recipes[name], tmp_path/'recipe.json')) == recipes[name]


@pytest.mark.parametrize('text, words', [('leraning_rate=1', "no 'leraning_rate'"), ('batchsize=4', 'did you mean batch_size'),
                                         ('lr=fast', 'lr is a number'), ('epochs=1.5', 'epochs is a whole number'),
                                         ('masks=1', 'masks is true or false; write for example --set masks=true'), ('milestones=a,b', 'whole numbers with commas'),
                                         ('lr', 'write key=value'), ('precision=fp16', 'fp32 or bf16'), ('lr=nan', 'more than 0'),
                                         ('groups=48', 'must divide'), ('images_per_process=-1', '1 or more'),
                                         ('mask_rois=-2', '0 or more'), ('pre_nms_topk=100', '2 numbers'), ('post_nms_topk=0,0', '2 numbers'),
                                         ('warmup=-5', '0 or more'), ('warmup_factor=-1', 'from 0 to 1'), ('gamma=-1', 'more than 0'),
                                         ('momentum=2', 'from 0 to 1'), ('milestones=9,1', 'rising'), ('tail=1,2', 'falling'),
                                         ('eval_every=-1', '0 or more'), ('score_thresh=2', 'from 0 to 1'), ('seed=' + '9' * 20, '2**63'),
                                         ('on_bad_image=forget', 'stop or skip'), ('weight_decay=inf', 'finite'),
                                         ('epochs=0', 'epochs or iterations'), ('long_side=100', 'long_side=100 must be 128 or more'),
                                         ('short_sides=90,200', 'long_side=160 must be 200 or more, the largest of short_sides')])
def test_wrong_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)): apply_settings(recipes['demo'], [text])


def test_what_is_learned_may_not_change_and_how_it_is_run_may():
    recipe, free = recipes['demo'], {o.name for o in fields(RunSettings)}
    assert free == {'images_per_process', 'workers', 'eval_every', 'checkpoint_every', 'keep', 'report_every',
                    'hang_timeout', 'graphs'}
    assert recipe_differences(recipe, replace(recipe, workers=9, images_per_process=1)) == []
    assert recipe_differences(recipe, replace(recipe, seed=1, flip=0.)) == ['flip: 0.5 -> 0.0', 'seed: 0 -> 1']


def test_every_model_can_be_built_from_its_recipe():
    from scratchdet.detector import faster_rcnn, mask_rcnn
    for recipe in recipes.values():
        inspect.signature(mask_rcnn if recipe.masks else faster_rcnn).bind(80, **detector_arguments(recipe))
    model = mask_rcnn(6, **detector_arguments(replace(recipes['demo'], roi_batch=48, max_dets=7, mask_rois=5)))
    assert model.sampling['batch_size_per_image'] == 48 and model.finding['max_dets'] == 7 and model.fixed_mask_rois == 5


@pytest.mark.parametrize('batch', [1, 2, 8, 16, 64, 256])
def test_the_linear_rule(batch):
    assert check_lr(scaled_lr(batch), batch) is None
    with pytest.raises(ValueError, match=f'lr={scaled_lr(batch):g}.*allow_lr_mismatch'): check_lr(scaled_lr(batch) * 1.5, batch)
    assert check_lr(scaled_lr(batch) * 1.5, batch, allow=True) is None


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match='16 cannot be shared by 5 processes.*batch_size=15'): split_batch(16, 5)
    with pytest.raises(ValueError, match='2 cannot be shared by 8 processes'): split_batch(2, 8)


def test_warmup_meets_a_drop(): assert Schedule(1., 10, (2,), warmup=5, warmup_factor=0.)(2) == pytest.approx(.05)


def test_times_keeps_what_is_not_the_length():
    recipe = times(recipes['faster_rcnn_r50_fpn_gn_scratch_6x'], 2)
    assert recipe == recipes['faster_rcnn_r50_fpn_gn_scratch_2x'] and not recipe.masks and recipe.lr == .02


def imported(*words):
    "Modules that a command imports, and what it says."
    done = subprocess.run([sys.executable, '-X', 'importtime', *words], capture_output=True, text=True, timeout=120)
    return done, set(re.findall(r'\|\s+([\w.]+)$', done.stderr, re.M))


def test_recipes_need_no_tensors():
    done, modules = imported('-c', 'import scratchdet.recipes')
    assert done.returncode == 0 and 'scratchdet.schedule' in modules and not {'torch', 'numpy'} & modules


def test_there_is_a_file_for_every_run(): assert {o.stem for o in runs} == set(recipes)


@pytest.mark.parametrize('file', runs, ids=[o.stem for o in runs])
def test_a_run_says_what_it_is(file):
    text = file.read_text()
    header = text.partition('set -euo')[0]
    for word in ('Command:', 'Hardware:', 'Time:', 'Expected:'): assert header.count(f'# {word}') == 1
    assert f'--recipe {file.stem} ' in text and file.stat().st_mode & 0o111
    for path in re.findall(r'recipes/[\w./]+\.(?:yaml|sh)', text): assert (root/path).exists(), path
    assert subprocess.run(['bash', '-n', str(file)]).returncode == 0


@pytest.mark.parametrize('name, machines, processes', [('one_gpu', 1, 1), ('eight_gpus', 1, 8), ('two_machines', 2, 16)])
def test_accelerate_reads_its_files(name, machines, processes):
    from accelerate.commands.config.config_args import load_config_from_file
    config = load_config_from_file(str(root/f'recipes/accelerate/{name}.yaml'))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    for recipe in recipes.values():
        if '_rcnn_' in recipe.name: assert split_batch(recipe.batch_size, processes, recipe.images_per_process)[0] <= 4


def test_slurm_uses_two_machines():
    text = (root/'recipes/slurm.sh').read_text()
    assert subprocess.run(['bash', '-n', str(root/'recipes/slurm.sh')]).returncode == 0
    assert '#SBATCH --nodes=2' in text and 'two_machines.yaml' in text and '--signal=TERM' in text


@pytest.mark.parametrize('text, words', [('[1]', 'holds no names'), ('{', 'not json'), ('{"lr": 1}', 'another version'),
                                         (dict(epochs='2'), "epochs is '2', not a whole number"),
                                         (dict(epochs=2.5), 'epochs is 2.5, not a whole number'),
                                         (dict(masks='no'), 'not true or false'), (dict(lr=None), 'not a number'),
                                         (dict(blocks=7), 'not whole numbers')])
def test_a_file_that_is_no_recipe_is_named(text, words, tmp_path):
    file = tmp_path/'recipe.json'
    file.write_text(text if isinstance(text, str) else json.dumps(asdict(recipes['demo']) | text))
    with pytest.raises(ValueError, match=re.escape(words)) as e: load_recipe(file)
    assert str(file) in str(e.value)


@pytest.mark.parametrize('name', ['none.json', 'folder.json'])
def test_a_recipe_that_cannot_be_read_is_named(name, tmp_path):
    (tmp_path/'folder.json').mkdir()
    with pytest.raises(OSError, match=rf'{name}: no recipe to read \(.*\); give another file, or a name: mask_rcnn'):
        find_recipe(str(tmp_path/name))


def test_a_recipe_is_written_whole(tmp_path, monkeypatch):
    "A kill while it is written leaves the old one."
    file = save_recipe(recipes['demo'], tmp_path/'recipe.json')
    def dies(*args): raise KeyboardInterrupt
    monkeypatch.setattr(Path, 'replace', dies)
    with pytest.raises(KeyboardInterrupt): save_recipe(recipes['coco_mini'], file)
    assert load_recipe(file) == recipes['demo']


@pytest.mark.parametrize('words', ['iterations=100', 'iterations=60000', 'iterations=1000 tail=1000,500'])
def test_a_tail_as_long_as_the_run_is_refused(words):
    "Every step would have the lr of the end."
    with pytest.raises(ValueError, match=r'tail=.* must be less than iterations='):
        apply_settings(recipes['mask_rcnn_r50_fpn_gn_scratch_6x'], ['epochs=0', 'milestones=', *words.split()])
    assert apply_settings(recipes['mask_rcnn_r50_fpn_gn_scratch_6x'], ['epochs=0', 'milestones=', 'iterations=100', 'tail=60,20']).iterations == 100


@pytest.mark.parametrize('iterations, batch, tail', [(1, 64, ()), (2, 64, (1,)), (100, 16, (100,))])
def test_a_schedule_has_steps_at_the_full_lr(iterations, batch, tail):
    with pytest.raises(ValueError, match='none at the full lr: train longer'): tail_schedule(iterations, batch, tail, lr=.02)
