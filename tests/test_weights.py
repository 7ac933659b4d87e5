"The model file: all that it holds, whole or not there, and refusals."
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scratchdet import weights
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.weights import build_model, load_model, load_weights, read_meta, save_model

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
    with pytest.raises(FileNotFoundError, match='none.safetensors does not exist.*give the model.safetensors of a run'):
        load_model(tmp_path/'none.safetensors')
    with pytest.raises(FileNotFoundError, match='is a folder: give the model.safetensors of a run'): load_model(tmp_path)
    with pytest.raises(ValueError, match="model 'yolo' is not one of mask_rcnn, faster_rcnn"): build_model(dict(model='yolo'))
