"Training: what must not depend on how the work is shared, and what ends a run early."
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import command, finish, log, losses, start, tiny, toy  # noqa: F401  (a fixture)

from scratchdet.coco import coco_split, load_index, training_images
from scratchdet import optim
from scratchdet.log import Report
from scratchdet.optim import sgd, usable_precision
from scratchdet.recipes import recipes
from scratchdet.train import Run, _line, _scores, batches, build_detector, main, parse_args, train, train_step
from scratchdet.weights import load_model, read_meta


@pytest.fixture(scope='module')
def images(toy): return training_images(load_index(*coco_split(toy, 'train')))


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def step(images, parts=1, recipe=tiny, dtype=torch.float64):
    "Losses and weights after one step in float64, the batch taken in `parts`."
    model = build_detector(recipe, len(images.names)).to(dtype).train()
    batch = next(batches(images, recipe, parts=parts))
    out = train_step(model, sgd(model, lr=.1), batch, Accelerator(cpu=True), step=0)
    return {k: v.item() for k, v in out.items()}, state(model)


@pytest.mark.parametrize('parts', [2, 4])
def test_parts_of_a_batch_add_up(images, parts):
    (whole, weights), (split, other) = step(images), step(images, parts)
    assert len(whole) == 5 and split == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert weights.keys() == other.keys()
    for k, v in weights.items(): torch.testing.assert_close(other[k], v, rtol=1e-9, atol=1e-10)


def test_lines_of_a_run_tell_a_busy_computer_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, 'getloadavg', lambda: (99., 0., 0.))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    run, behind = SimpleNamespace(step=1, epoch=4), SimpleNamespace(give=lambda *_: None)
    with Report(tmp_path/'log.jsonl', Accelerator(cpu=True), 4) as report:
        for _ in range(2): _line(run, .1, report, behind, print)
    assert capsys.readouterr().out.splitlines() == [
        f'load 99.0 on {os.cpu_count()} cores: threads wait for other work, OMP_NUM_THREADS=1 is likely faster']


def test_two_processes_are_one(toy, tmp_path):
    "Two processes over gloo, in two parts each, give the losses of one; one bit more or less may move a later step."
    recipe = replace(tiny, epochs=1)
    alone = train(recipe, toy, tmp_path/'one', progress=False)
    status, said = finish(start(replace(recipe, images_per_process=1), toy, tmp_path/'two', processes=2))
    assert status == 0, said
    one, two = losses(tmp_path/'one'), losses(tmp_path/'two')
    assert len(one) == len(two) == 4
    for a, b in zip(one[:2], two): assert b == pytest.approx(a, rel=1e-4)
    for a, b in zip(one, two): assert b['loss'] == pytest.approx(a['loss'], rel=.05)
    result = json.loads((tmp_path/'two/eval/step_00000004.json').read_text())
    assert result['images'] == alone['images'] == 4 and result.keys() == alone.keys()


def test_one_seed_is_one_run(toy, tmp_path):
    "The same command twice gives the same losses, bit for bit; another seed does not."
    runs = [start(replace(tiny, epochs=1, seed=s), toy, tmp_path/name) for name, s in (('a', 0), ('b', 0), ('c', 1))]
    for status, said in map(finish, runs): assert status == 0, said
    a, b, c = (losses(tmp_path/o) for o in 'abc')
    assert a == b and len(a) == 4 and a != c
    weights = [load_model(tmp_path/o/'model.safetensors').state_dict() for o in 'ab']
    assert all(torch.equal(weights[0][k], v) for k, v in weights[1].items())


def test_the_run_computes_in_what_the_processor_is_faster_with(toy, tmp_path, monkeypatch):
    for gain, precision in ((.5, 'no'), (2., 'bf16')):
        monkeypatch.setattr(optim, 'bf16_gain', lambda: gain)
        AcceleratorState._reset_state(True)
        run = Run(replace(tiny, precision='bf16'), toy, tmp_path/precision, cpu=True)
        assert run.accelerator.mixed_precision == precision and run.recipe.precision == 'bf16'
    AcceleratorState._reset_state(True)


@pytest.mark.skipif(usable_precision('bf16', 'cpu') == 'fp32', reason='this processor is slower in bf16')
def test_bf16_learns_the_same(toy, tmp_path):
    status, said = finish(start(replace(tiny, precision='bf16'), toy, tmp_path/'half'))
    assert status == 0, said
    train(tiny, toy, tmp_path/'full', progress=False)
    half, full = losses(tmp_path/'half'), losses(tmp_path/'full')
    assert half != full and half[0]['loss'] == pytest.approx(full[0]['loss'], rel=.05)
    assert half[-1]['loss'] < half[0]['loss'] and all(math.isfinite(v) for o in half for v in o.values())
    assert all(v.dtype == torch.float32 for v in load_model(tmp_path/'half/model.safetensors').state_dict().values())


def test_faster_rcnn_trains_too(toy, tmp_path):
    results = train(replace(tiny, masks=False), toy, tmp_path/'run', progress=False)
    assert 'segm' not in results and set(losses(tmp_path/'run')[0]) == {
        'loss', 'loss_rpn_cls', 'loss_rpn_loc', 'loss_cls', 'loss_box_reg'}
    assert losses(tmp_path/'run')[-1]['loss'] < losses(tmp_path/'run')[0]['loss']
    assert load_model(tmp_path/'run/model.safetensors').mask_head is None


def test_a_run_folder(toy, tmp_path, images):
    results = train(replace(tiny, eval_every=1, keep=1, report_every=3), toy, tmp_path/'run', progress=False)
    names = {o.relative_to(tmp_path/'run').as_posix() for o in (tmp_path/'run').rglob('*') if o.is_file()}
    best = max((4, 8), key=lambda o: json.loads((tmp_path/f'run/eval/step_{o:08}.json').read_text())['bbox']['AP'])
    point = [f'checkpoints/step_{step:08}/{o}' for step in {best, 8}
             for o in ('model.safetensors', 'momentum.safetensors', 'state.json', 'manifest.json')]
    assert names == {'recipe.json', 'log.jsonl', 'lock', 'model.safetensors', 'curves.png', 'predictions.png',
                     'eval/step_00000004.json', 'eval/step_00000008.json', *point}
    lines = log(tmp_path/'run')
    assert [o['step'] for o in lines] == [3, 4, 6, 8]                                # reports, checkpoints, evaluations
    assert set(lines[0]) == {'step', 'epoch', 'lr', 'loss', 'loss_rpn_cls', 'loss_rpn_loc', 'loss_cls', 'loss_box_reg',
                             'loss_mask', 'images_per_second', 'memory_gb'}
    assert all(o['images_per_second'] > 0 and 0 < o['memory_gb'] < 64 for o in lines)
    assert lines[0]['lr'] == pytest.approx(.02 * (.001 + .999 * 2 / 3)) and lines[-1]['epoch'] == 2
    arguments, meta = read_meta(tmp_path/'run/model.safetensors')
    assert arguments['model'] == 'mask_rcnn' and meta['category_names'] == list(images.names)
    assert (meta['short_side'], meta['long_side']) == (tiny.short_sides[-1], tiny.long_side)
    assert results['step'] == 8 and results['epoch'] == 2


def test_batches_without_objects(images):
    "A batch of background alone, again and again: finite losses, and the classifier learns that nothing is there."
    model = build_detector(tiny, len(images.names)).train()
    optimizer, accelerator = sgd(model, lr=.02), Accelerator(cpu=True)
    empty = [replace(o, valid=torch.zeros_like(o.valid)) for o in next(batches(images, tiny))]
    out = [train_step(model, optimizer, empty, accelerator, step=t) for t in range(4)]
    assert all(v.isfinite() for o in out for v in o.values()) and out[-1]['loss_cls'] < out[0]['loss_cls']
    assert all(o['loss_mask'] == o['loss_box_reg'] == o['loss_rpn_loc'] == 0 for o in out)
    assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize('workers', [0, 1])
def test_every_image_once_an_epoch(images, workers):
    stream, recipe = batches(images, replace(tiny, workers=workers), step=0), tiny
    seen = [[i for o in next(stream) for i in o.image_ids.tolist()] for _ in range(8)]
    wanted = set(images.image_ids.tolist())
    assert set(sum(seen[:4], [])) == set(sum(seen[4:], [])) == wanted and seen[:4] != seen[4:]
    assert all(len(o) == recipe.batch_size for o in seen)


def words(recipe, toy, out, *more): return command(recipe, toy, out, *more)[3:]


def refusal(recipe, toy, out, *more):
    "What the command says instead of training."
    with pytest.raises(SystemExit) as e: main(parse_args(words(recipe, toy, out, *more)))
    assert not (out/'log.jsonl').exists() or 'other settings' in str(e.value) or 'in step' in str(e.value)
    return str(e.value)


def test_a_loss_that_is_not_finite_ends_the_run(toy, tmp_path):
    said = refusal(replace(tiny, lr=1e25, warmup=0, report_every=3), toy, tmp_path/'run')
    assert 'loss_' in said and ('nan' in said or 'inf' in said) and 'in step 2, with images [' in said and 'warmup' in said
    assert said.count(',') >= 4 and not list((tmp_path/'run/checkpoints').glob('*')) and log(tmp_path/'run') == []


def test_what_cannot_work_is_said_before_it_starts(toy, tmp_path):
    assert 'does not fit batch_size=4' in refusal(tiny, toy, tmp_path/'a', '--set', 'allow_lr_mismatch=false')
    assert 'did you mean milestones' in refusal(tiny, toy, tmp_path/'a', '--set', 'milestone=1')
    assert str(tmp_path/'none') in refusal(tiny, tmp_path/'none', tmp_path/'b')
    assert not (tmp_path/'a').exists() and not (tmp_path/'b').exists()


def test_categories_of_both_splits_agree(toy, tmp_path):
    for split in ('train2017', 'val2017', 'annotations'): (tmp_path/split).symlink_to(toy/split)
    (tmp_path/'annotations').unlink()
    (tmp_path/'annotations').mkdir()
    for split in ('train', 'val'):
        doc = json.loads((toy/f'annotations/instances_{split}2017.json').read_text())
        if split == 'val': doc['categories'].append(dict(id=99, name='extra'))
        (tmp_path/f'annotations/instances_{split}2017.json').write_text(json.dumps(doc))
    assert 'categories of train and val differ' in refusal(tiny, tmp_path, tmp_path/'out')


def test_frozen_layers_are_refused(toy, tmp_path, monkeypatch):
    import scratchdet.train as module
    def frozen(*args):
        model = build_detector(*args)
        model.backbone.stem.requires_grad_(False)
        return model
    monkeypatch.setattr(module, 'build_detector', frozen)
    with pytest.raises(ValueError, match='frozen'): Run(tiny, toy, tmp_path/'out')


def test_an_unknown_recipe_lists_those_that_exist(toy, tmp_path):
    with pytest.raises(SystemExit) as e: main(parse_args(['--recipe', 'dmo', '--coco', str(toy), '--out', str(tmp_path/'x')]))
    assert all(o in str(e.value) for o in recipes)


def test_a_typo_on_the_command_line_has_a_status():
    done = subprocess.run([sys.executable, '-m', 'scratchdet.train', '--recipe', 'demo'], capture_output=True, text=True)
    assert done.returncode == 2 and '--coco' in done.stderr


def test_real_images(coco_mini, tmp_path):
    "Two steps on COCO's own images, and the evaluation of two of them."
    run = Run(replace(recipes['coco_mini'], precision='fp32', workers=0), coco_mini, tmp_path/'run')
    assert len(run.images.names) == 80 and len(run.val) == 79 and run.schedule.steps == run.epoch * run.recipe.epochs
    stream, out = batches(run.images, run.recipe, parts=run.parts), []
    for t in range(2): out.append(train_step(run.model, run.optimizer, next(stream), run.accelerator, step=t))
    assert all(v.isfinite() for o in out for v in o.values()) and {o.name for o in fields(run.recipe)} > {'lr'}


def test_a_validation_set_in_which_nothing_is_to_be_found(toy, tmp_path):  # noqa: F811
    "The run ends with its weights, curves and pictures; the table has no numbers."
    root = tmp_path/'bare'
    shutil.copytree(toy, root, ignore=shutil.ignore_patterns('.scratchdet'))
    file, = root.glob('annotations/instances_val*.json')
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(annotations=[])))
    results = train(replace(tiny, epochs=1), root, tmp_path/'run', progress=False)
    assert _scores(results) == 'step 4: box AP -, mask AP -'
    assert results['bbox']['AP'] is None and (tmp_path/'run/predictions.png').exists() and (tmp_path/'run/curves.png').exists()


def test_the_same_names_in_both_splits(toy, tmp_path):  # noqa: F811
    "Two names that are exchanged would exchange what is learned."
    root = tmp_path/'swapped'
    shutil.copytree(toy, root, ignore=shutil.ignore_patterns('.scratchdet'))
    file, = root.glob('annotations/instances_val*.json')
    doc = json.loads(file.read_text())
    a, b = doc['categories'][:2]
    a['name'], b['name'] = b['name'], a['name']
    file.write_text(json.dumps(doc))
    assert 'the categories of train and val differ, such as (1, ' in refusal(tiny, root, tmp_path/'run')


def test_a_damaged_log_is_named_and_a_damaged_evaluation_done_again(toy, tmp_path):  # noqa: F811
    recipe = replace(tiny, epochs=1)
    results = train(recipe, toy, tmp_path/'run', progress=False)
    file = tmp_path/'run/eval/step_00000004.json'
    file.write_text('')
    assert train(recipe, toy, tmp_path/'run', progress=False) == results == json.loads(file.read_text())
    with (tmp_path/'run/log.jsonl').open('a') as f: f.write('{no line}\n')
    with pytest.raises(SystemExit, match=r'log.jsonl, line \d+, is none of a log: .\{no line\}'):
        main(parse_args(words(recipe, toy, tmp_path/'run')))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_objects_without_masks_are_told_before_the_first_step(split, toy, tmp_path):  # noqa: F811
    root = tmp_path/'toy'
    shutil.copytree(toy, root, ignore=shutil.ignore_patterns('.scratchdet'))
    file, = root.glob(f'annotations/instances_{split}*.json')
    doc = json.loads(file.read_text())
    number = next(o['id'] for o in doc['annotations'] if not o['iscrowd'])
    for o in doc['annotations']:
        if o['id'] == number: del o['segmentation']
    file.write_text(json.dumps(doc))
    said = refusal(tiny, root, tmp_path/'run')
    assert file.name in said and f'annotation {number} has no segmentation' in said and 'without masks' in said
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('line', ['{"step": 1}', '{"step": null, "epoch": 0, "loss": 1}', '[' * 10**5, '\udcff', '[]'])
def test_lines_that_are_none_of_a_log_are_named_at_the_start(toy, tmp_path, line):
    run = tmp_path/'run'
    train(replace(tiny, epochs=1), toy, run, cpu=True, progress=False)
    (run/'log.jsonl').write_bytes(b'\n'.join([line.encode(errors='surrogateescape'), (run/'log.jsonl').read_bytes()]))
    with pytest.raises(ValueError, match=r'log.jsonl, line 1, is none of a log: .* Remove the line'):
        train(replace(tiny, epochs=1), toy, run, cpu=True, progress=False)


def test_a_checkpoint_beyond_the_end_is_refused(toy, tmp_path):
    "An edited recipe.json must not give a run that never ends."
    run = tmp_path/'run'
    train(tiny, toy, run, cpu=True, progress=False)
    (run/'recipe.json').unlink()
    with pytest.raises(ValueError, match=r'step_00000008: it is of step 8, and the recipe ends at step 4. Use another --out'):
        train(replace(tiny, epochs=1), toy, run, cpu=True, progress=False)


def test_a_locked_folder_says_by_whom(toy, tmp_path):
    run = Run(tiny, toy, tmp_path/'run', cpu=True)
    code = f'from scratchdet.train import claim_folder; from scratchdet.recipes import load_recipe; claim_folder({str(tmp_path/"run")!r}, load_recipe({str(tmp_path/"run/recipe.json")!r}))'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr
    assert f'another run is at work in this folder (process {os.getpid()} on ' in said
    run.lock.close()


@pytest.mark.parametrize('text', ['5', '[1]', '{"a": 1}'])
def test_an_evaluation_that_is_none_is_made_again(toy, tmp_path, text):
    one = replace(tiny, epochs=1)
    results = train(one, toy, tmp_path/'run', cpu=True, progress=False)
    (tmp_path/'run/eval/step_00000004.json').write_text(text)
    assert train(one, toy, tmp_path/'run', cpu=True, progress=False) == results
