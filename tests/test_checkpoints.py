"Checkpoints: round trips of names, refusals, the command."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scratchdet import checkpoints
from scratchdet.checkpoints import from_detectron2, from_mmdet, mmdet_names, model_arguments, parse_args, read_state, rename, to_mmdet
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.weights import load_model, load_weights

FOLDER = Path(os.environ.get('SCRATCHDET_REFERENCE', Path(__file__).parents[1].parent/'shared'/'reference'))
TINY = dict(blocks=(1, 1, 1, 1), width=8, channels=16, fc=24, groups=4)
ARGS = dict(num_classes=3, score_thresh=.3, rpn=dict(post_nms_topk=(50, 40)), **TINY)


def names_of(file):
    "Names and shapes of a reference's state dict."
    if not (FOLDER/file).exists():
        if os.environ.get('SCRATCHDET_REQUIRE_SHARED') == '1': pytest.fail(f'{FOLDER/file} is missing')
        pytest.skip(f'{FOLDER/file} is missing; set SCRATCHDET_REFERENCE')
    return json.loads((FOLDER/file).read_text())


@pytest.mark.parametrize('build, file', [(mask_rcnn, 'mask_rcnn'), (faster_rcnn, 'faster_rcnn')])
def test_mmdet_round_trip_is_bit_exact(build, file):
    shapes = names_of(f'{file}.state_dict.json')
    theirs = {k: torch.randn(s) for k, s in shapes.items()}
    model = load_weights(build(80), from_mmdet(theirs), file)
    back = to_mmdet(model.state_dict())
    assert set(back) == set(theirs) and len(back) > 200
    assert all(torch.equal(back[k], v) for k, v in theirs.items())
    assert mmdet_names(model) == {k: k2 for k, k2 in zip(model.state_dict(), back)}
    arguments = model_arguments(from_mmdet(theirs))
    assert arguments == {k: v for k, v in model.arguments.items() if k in arguments}


def test_detectron2_names_and_colours():
    shapes = names_of('detectron2/detectron2_mask_rcnn_gn.state_dict.json')
    theirs = {k: torch.randn(s) for k, s in shapes.items()}
    buffers = dict(pixel_mean=torch.zeros(3, 1, 1), pixel_std=torch.ones(3, 1, 1))
    buffers['proposal_generator.anchor_generator.cell_anchors.0'] = torch.zeros(3, 4)
    ours = from_detectron2({**theirs, **buffers})
    load_weights(mask_rcnn(80), ours)
    for k, v in theirs.items():
        got = ours[rename(k, 'detectron2', 'ours')]
        assert torch.equal(got, v.flip(1) if k.endswith('stem.conv1.weight') else v)
    assert len(ours) == len(theirs) == 223


def test_foreign_names_are_refused():
    with pytest.raises(ValueError, match="1 names are not those of a mmdet.*backbone.bn1.weight"):
        from_mmdet({'backbone.bn1.weight': torch.zeros(1)})


class Danger:
    "Would run when unpickled."
    def __reduce__(self): return os.mkdir, (os.environ['DANGER'],)


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv('DANGER', str(tmp_path/'made'))
    torch.save(dict(state_dict=Danger()), tmp_path/'bad.pth')
    with pytest.raises(ValueError, match='bad.pth holds more than tensors'): read_state(tmp_path/'bad.pth')
    assert not (tmp_path/'made').exists()
    (tmp_path/'text.pth').write_text('hello')
    with pytest.raises(ValueError, match='text.pth'): read_state(tmp_path/'text.pth')


def convert(*words): checkpoints.main(parse_args(['convert', *map(str, words)]))


def test_convert_there_and_back(tmp_path, capsys):
    model = mask_rcnn(**ARGS)
    theirs = to_mmdet(model.state_dict())
    torch.save(dict(state_dict=theirs, meta=dict(epoch=73)), tmp_path/'their.pth')
    (tmp_path/'cats.json').write_text(json.dumps(dict(categories=[dict(id=i, name=f'n{i}') for i in (2, 3, 9)])))
    convert('--from', 'mmdet', tmp_path/'their.pth', tmp_path/'our.safetensors', '--groups', 4, '--categories', tmp_path/'cats.json')
    ours = load_model(tmp_path/'our.safetensors')
    assert ours.meta == dict(category_ids=[2, 3, 9], category_names=['n2', 'n3', 'n9'])
    convert('--to', 'mmdet', tmp_path/'our.safetensors', tmp_path/'back.pth')
    back = read_state(tmp_path/'back.pth')
    assert set(back) == set(theirs) and all(torch.equal(back[k], v) for k, v in theirs.items())
    assert capsys.readouterr().out.count('wrote') == 2


def test_convert_from_detectron2_turns_the_colours(tmp_path):
    model = mask_rcnn(**ARGS)
    theirs = {rename(k, 'ours', 'detectron2'): v for k, v in model.state_dict().items()}
    torch.save(dict(model=theirs), tmp_path/'their.pth')
    convert('--from', 'detectron2', tmp_path/'their.pth', tmp_path/'a.safetensors', '--groups', 4)
    a = load_model(tmp_path/'a.safetensors')
    assert a.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert a.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    convert('--from', 'detectron2', tmp_path/'their.pth', tmp_path/'b.safetensors', '--groups', 4, '--pixel-std', 1, 1, 1,
            '--pixel-mean', 10, 20, 30)
    b = load_model(tmp_path/'b.safetensors')
    assert b.pixel_mean.flatten().tolist() == [30, 20, 10] and b.pixel_std.flatten().tolist() == [1, 1, 1]
    assert torch.equal(b.backbone.stem.conv.weight.flip(1), model.backbone.stem.conv.weight)
    theirs.update(pixel_mean=torch.tensor([1., 2., 3.]).view(3, 1, 1), pixel_std=torch.tensor([4., 5., 6.]).view(3, 1, 1))
    save_file({k: v.clone() for k, v in theirs.items()}, tmp_path/'their.safetensors')
    convert('--from', 'detectron2', tmp_path/'their.safetensors', tmp_path/'c.safetensors', '--groups', 4)
    c = load_model(tmp_path/'c.safetensors')
    assert c.pixel_mean.flatten().tolist() == [3, 2, 1] and c.pixel_std.flatten().tolist() == [6, 5, 4]


def test_convert_refuses_in_one_line(tmp_path):
    (tmp_path/'text.pth').write_text('hello')
    with pytest.raises(SystemExit, match='scratchdet.checkpoints: .*text.pth'):
        convert('--from', 'mmdet', tmp_path/'text.pth', tmp_path/'our.safetensors')
    with pytest.raises(SystemExit, match='scratchdet.checkpoints: .*none.pth'):
        convert('--from', 'mmdet', tmp_path/'none.pth', tmp_path/'our.safetensors')
    torch.save(dict(state_dict=to_mmdet(mask_rcnn(**ARGS).state_dict())), tmp_path/'their.pth')
    (tmp_path/'cats.json').write_text(json.dumps(dict(categories=[dict(id=1, name='one')])))
    with pytest.raises(SystemExit, match='cats.json has 1 categories.*3 classes'):
        convert('--from', 'mmdet', tmp_path/'their.pth', tmp_path/'our.safetensors', '--groups', 4, '--categories', tmp_path/'cats.json')
    assert not (tmp_path/'our.safetensors').exists()


def test_help_is_quick():
    start = time.time()
    out = subprocess.run([sys.executable, '-m', 'scratchdet.checkpoints', 'convert', '--help'], capture_output=True, text=True)
    assert out.returncode == 0 and '--from' in out.stdout and time.time() - start < 3
