"The model file: all that it holds, whole or not there, and refusals."
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from scratchdet import weights
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.weights import build_model, load_model, load_weights, read_meta, restore, save_model

ARGS = dict(num_classes=3, blocks=(1, 1, 1, 1), width=8, channels=16, fc=24, groups=4, score_thresh=.3,
            rpn=dict(post_nms_topk=(50, 40)))


@pytest.mark.parametrize('build', [mask_rcnn, faster_rcnn])
def test_our_file_holds_all(tmp_path, build):
    model, meta = build(**ARGS), dict(category_ids=[1, 5, 7], category_names=['a', 'b', 'c'], step=3)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p))
    model.to(memory_format=torch.channels_last)
    again = load_model(save_model(tmp_path/'m.safetensors', model, meta))
    assert again.meta == meta and not again.training and read_meta(tmp_path/'m.safetensors')[1] == meta
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert again.finding == model.finding and again.rpn.post_nms_topk[1] == 40
    assert [p.name for p in tmp_path.iterdir()] == ['m.safetensors']


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path, model = tmp_path/'m.safetensors', faster_rcnn(**ARGS)
    save_model(path, model)
    before = path.read_bytes()
    def stops(file, data):
        with file.open('wb') as f: f.write(data[:99])
        raise OSError('no space left')
    monkeypatch.setattr(Path, 'write_bytes', stops)
    with pytest.raises(OSError, match='no space'): save_model(path, model)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['m.safetensors']
    with pytest.raises(OSError, match='no space'): save_model(tmp_path/'new.safetensors', model)
    assert [p.name for p in tmp_path.iterdir()] == ['m.safetensors']


def test_a_kill_leaves_nothing_in_the_way(tmp_path):
    "What an earlier process left half written is written over."
    (tmp_path/'.new_m.safetensors').write_bytes(b'half')
    model = faster_rcnn(**ARGS)
    again = load_model(save_model(tmp_path/'m.safetensors', model))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ['m.safetensors']


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    steps, path = [], tmp_path/'m.safetensors'
    def noted(place, name):
        true = getattr(place, name)
        def call(o, *args):
            steps.append((name, 'folder' if Path(o).is_dir() else Path(o).name, path.exists()))
            return true(o, *args)
        monkeypatch.setattr(place, name, call)
    noted(weights, 'sync'), noted(os, 'replace')
    save_model(path, faster_rcnn(**ARGS))
    new = '.new_m.safetensors'
    assert steps == [('sync', new, False), ('replace', new, False), ('sync', 'folder', True)]


def test_a_file_is_as_readable_as_others(tmp_path):
    "Weights are shared, so their mode follows the umask as that of any new file does."
    save_model(tmp_path/'m.safetensors', faster_rcnn(**ARGS))
    (tmp_path/'plain').touch()
    assert (tmp_path/'m.safetensors').stat().st_mode == (tmp_path/'plain').stat().st_mode


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): save_model(tmp_path/'nowhere/m.safetensors', faster_rcnn(**ARGS))


def test_weights_of_another_model_are_refused():
    model, state = faster_rcnn(**ARGS), mask_rcnn(**ARGS).state_dict()
    with pytest.raises(ValueError, match='(?s)a.pth is of another model.*mask_head.*unexpected'):
        load_weights(model, state, 'a.pth')
    with pytest.raises(ValueError, match=r'(?s)mask_head.*is missing'): load_weights(mask_rcnn(**ARGS), model.state_dict())
    with pytest.raises(ValueError, match=r'box_head.cls.weight is \(5, 24\), the model has \(4, 24\)'):
        load_weights(model, faster_rcnn(**{**ARGS, 'num_classes': 4}).state_dict())


def test_files_that_are_not_ours(tmp_path):
    plain, half = tmp_path/'plain.safetensors', tmp_path/'half.safetensors'
    save_file(dict(a=torch.zeros(2)), plain)
    with pytest.raises(ValueError, match='plain.safetensors was not written by scratchdet.*convert --from'): load_model(plain)
    half.write_bytes(plain.read_bytes()[:20])
    with pytest.raises(ValueError, match='half.safetensors is not a complete'): load_model(half)
    with pytest.raises(FileNotFoundError, match='none.safetensors does not exist: give the model.safetensors of a run'):
        load_model(tmp_path/'none.safetensors')
    with pytest.raises(FileNotFoundError, match=f'^{tmp_path} is a folder: give the model.safetensors of a run'): load_model(tmp_path)
    with pytest.raises(ValueError, match="model 'yolo' is not one of mask_rcnn, faster_rcnn"): build_model(dict(model='yolo'))


writer = '''
import hashlib, sys
import torch
sys.path[:0] = [sys.argv[1]]
from test_weights import ARGS, META
from scratchdet.detector import faster_rcnn
from scratchdet.weights import save_model
torch.manual_seed(0)
print(hashlib.sha256(save_model(sys.argv[2], faster_rcnn(**ARGS), META).read_bytes()).hexdigest())
'''
META = dict(category_ids=[1, 5, 7], category_names=['a', 'b', 'c'], short_side=64, long_side=96)


def test_equal_models_are_equal_bytes(tmp_path):
    "In one process, for arguments in any order, and over processes."
    turned = {k: v for k, v in reversed(ARGS.items())}
    seen = set()
    for arguments, meta in [(ARGS, META), (turned, dict(reversed(META.items())))] * 4:
        torch.manual_seed(0)
        data = save_model(tmp_path/'m.safetensors', faster_rcnn(**arguments), meta).read_bytes()
        seen.add(hashlib.sha256(data).hexdigest())
    for i in range(2):
        done = subprocess.run([sys.executable, '-c', writer, os.path.dirname(__file__), str(tmp_path/f'{i}.safetensors')],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout.strip())
    assert len(seen) == 1
    torch.manual_seed(0)
    other = save_model(tmp_path/'m.safetensors', faster_rcnn(**ARGS), {**META, 'short_side': 65}).read_bytes()
    assert hashlib.sha256(other).hexdigest() not in seen


wrong_meta = {
    'names': dict(category_names=['a', 'b']), 'ids': dict(category_ids=[1, 2, 3, 4]), 'no ids': dict(category_ids=[]),
    'a name that is a number': dict(category_names=['a', 3, 'c']), 'an id that is a word': dict(category_ids=[1, '2', 3]),
    'an id twice': dict(category_ids=[1, 2, 1]), 'one text': dict(category_names='abc'), 'None': dict(category_names=None),
    'short side': dict(short_side='x'), 'no short side': dict(short_side=None), 'long side': dict(long_side=0), 'half': dict(long_side=96.5)}


@pytest.mark.parametrize('meta', wrong_meta.values(), ids=wrong_meta)
def test_meta_of_other_classes_is_refused(tmp_path, meta):
    "At saving, before anything is written; and at loading."
    path, model = tmp_path/'m.safetensors', faster_rcnn(**ARGS)
    key, = meta
    with pytest.raises(ValueError, match=key): save_model(path, model, meta)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(save(model.state_dict(), dict(scratchdet=json.dumps(dict(arguments=model.arguments, meta=meta)))))
    for reader in read_meta, load_model:
        with pytest.raises(ValueError, match=f'm.safetensors.*{key}'): reader(path)


wrong_arguments = [
    dict(model='yolo'), dict(model=['mask_rcnn']), dict(colour=3), dict(backbone=None), dict(mask_head=None), dict(settings={}), dict(width='8'),
    dict(width=-8), dict(width=0), dict(width=8.), dict(width=True), dict(width=10**40), dict(width=2**22), dict(width=2**30), dict(num_classes=-5),
    dict(blocks=[1]), dict(blocks=7), dict(blocks=[2**30] * 4), dict(blocks=[1, 1, 1, None]), dict(groups=0), dict(groups=-4), dict(groups=3),
    dict(score_thresh='x'), dict(score_thresh=None), dict(score_thresh=float('nan')), dict(nms_thresh=[.5]), dict(max_dets=-1), dict(pixel_mean=[1, 2]),
    dict(pixel_std=[0, 0, 0]), dict(pixel_std=[1, 1, float('nan')]), dict(pixel_std=3), dict(rpn=[]), dict(rpn=dict(head=None)),
    dict(rpn=dict(post_nms_topk=50)), dict(rpn=dict(nms_thresh='x')), dict(fixed_mask_rois=.5)]


@pytest.mark.parametrize('lie', wrong_arguments, ids=str)
def test_arguments_that_build_no_model(tmp_path, lie):
    path, model = tmp_path/'m.safetensors', faster_rcnn(**ARGS)
    path.write_bytes(save(model.state_dict(), dict(scratchdet=json.dumps(dict(arguments={**model.arguments, **lie}, meta={})))))
    with pytest.raises(ValueError, match='m.safetensors (describes no|is of another) model'): load_model(path)


def test_texts_that_are_no_description(tmp_path):
    path, model = tmp_path/'m.safetensors', faster_rcnn(**ARGS)
    whole = json.dumps(dict(arguments=model.arguments, meta={}))
    for text in ['', 'null', '3', '[]', '{}', '"a"', '[' * 99999, '{"arguments": {}, "meta": {}}', whole[:-1], '9' * 5000,
                 whole.replace('"meta": {}', '"meta": []'), whole.replace('"meta"', '"mate"'), json.dumps(dict(arguments=[], meta={}))]:
        path.write_bytes(save(model.state_dict(), dict(scratchdet=text)))
        for reader in read_meta, load_model:
            with pytest.raises(ValueError, match='m.safetensors describes no model'): reader(path)


def test_all_arguments_of_a_model_come_back():
    "Every number that a constructor takes may differ from its default."
    full = dict(num_classes=3, blocks=(1, 2, 1, 1), width=8, channels=16, fc=24, groups=4, pixel_mean=(1, 2.5, 3), pixel_std=(4, 5, 6), low_quality=.4,
                batch_size_per_image=64, positive_fraction=.5, iou_thresh=.6, score_thresh=0, nms_thresh=.4, max_dets=10, fixed_mask_rois=7)
    rpn = dict(batch_size_per_image=32, positive_fraction=.4, fg_thresh=.8, bg_thresh=.2, min_pos_iou=.2, nms_thresh=.6, pre_nms_topk=[9, 8],
               post_nms_topk=[7, 6])
    for build in mask_rcnn, faster_rcnn:
        model = build(**full, rpn=rpn)
        again = restore(json.loads(json.dumps(model.arguments)), model.state_dict())
        assert (again.finding, again.sampling, again.fixed_mask_rois) == (model.finding, model.sampling, 7)
        assert torch.equal(again.pixel_mean, model.pixel_mean) and {k: getattr(again.rpn, k) for k in rpn} == rpn


@pytest.mark.parametrize('change', [lambda v: v * float('nan'), lambda v: v + float('inf'), lambda v: v.int()])
def test_values_that_are_no_numbers(tmp_path, change):
    "Weights of a run that diverged, or of another type, are not used in silence."
    path, model = tmp_path/'m.safetensors', mask_rcnn(**ARGS)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    name = sorted(state)[3]
    save_file({**state, name: change(state[name])}, path, read_metadata(save_model(tmp_path/'good.safetensors', model)))
    with pytest.raises(ValueError, match=rf'm\.safetensors: {re.escape(name)} holds values that are no finite numbers'): load_model(path)


def read_metadata(path):
    with safe_open(path, 'pt') as f: return f.metadata()


@pytest.mark.parametrize('build', [mask_rcnn, faster_rcnn])
@pytest.mark.parametrize('name', ['num_classes', 'width', 'channels', 'fc', 'groups'])
def test_counts_come_first(name, build):
    for n in (-1, 0, 2**31):
        with pytest.raises(ValueError, match=f'^{name}={n} must be from 1 to 10,000$'): build(**{**ARGS, name: n})


def test_sizes_that_no_machine_holds(tmp_path):
    with pytest.raises(ValueError, match='max_dets=2147483647 must be from 1 to 10,000'): mask_rcnn(**ARGS, max_dets=2**31 - 1)
    with pytest.raises(ValueError, match='short_side=200000 must be a number of px, 16,384 at most'):
        save_model(tmp_path/'m.safetensors', mask_rcnn(**ARGS), dict(short_side=200_000))
