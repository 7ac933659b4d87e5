"Checkpoints: round trips of names, refusals, the command."
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scratchdet import checkpoints
from scratchdet.checkpoints import from_detectron2, from_mmdet, mmdet_names, model_arguments, parse_args, read_state, rename, to_mmdet
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.weights import describe, load_model, load_weights, save_model

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
    with pytest.raises(ValueError, match="1 name is none of a mmdet.*backbone.bn1.weight"):
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
    with pytest.raises(SystemExit, match='cats.json .*category_ids are 1, .* 3 classes'):
        convert('--from', 'mmdet', tmp_path/'their.pth', tmp_path/'our.safetensors', '--groups', 4, '--categories', tmp_path/'cats.json')
    assert not (tmp_path/'our.safetensors').exists()


FULL = dict(num_classes=3, pixel_mean=(1, 2, 3), pixel_std=(4., 5., 6.), low_quality=.4, nms_thresh=.3, max_dets=7, rpn=dict(post_nms_topk=(9, 8)), **TINY)
META = dict(category_ids=[2, 3, 9], category_names=['n2', 'n3', 'n9'], short_side=64, long_side=96, more=dict(step=[1, .5]))


@pytest.mark.parametrize('build', [mask_rcnn, faster_rcnn])
def test_ours_to_mmdet_and_back_is_the_same_file(tmp_path, build):
    "All that the model file says, byte for byte; and mmdetection finds what it looks for."
    ours = save_model(tmp_path/'our.safetensors', build(**FULL), META)
    convert('--to', 'mmdet', ours, tmp_path/'their.pth')
    convert('--from', 'mmdet', tmp_path/'their.pth', tmp_path/'back.safetensors')
    assert (tmp_path/'back.safetensors').read_bytes() == ours.read_bytes()
    file = torch.load(tmp_path/'their.pth', weights_only=True)
    assert set(file) == {'state_dict', 'meta'} and isinstance(file['meta'], dict)
    assert all(isinstance(v, torch.Tensor) for v in file['state_dict'].values())
    assert {rename(k, 'mmdet', 'ours') for k in file['state_dict']} == set(load_model(ours).state_dict())
    (tmp_path/'cats.json').write_text(json.dumps(dict(categories=[dict(id=i, name=f'new {i}') for i in (1, 2, 3)])))
    convert('--from', 'mmdet', tmp_path/'their.pth', tmp_path/'new.safetensors', '--groups', 2, '--categories', tmp_path/'cats.json')
    new = load_model(tmp_path/'new.safetensors')
    assert new.arguments['groups'] == 2 and new.meta == {**META, 'category_ids': [1, 2, 3], 'category_names': ['new 1', 'new 2', 'new 3']}


def test_a_source_is_not_its_own_target(tmp_path):
    ours = save_model(tmp_path/'our.safetensors', faster_rcnn(**ARGS))
    torch.save(dict(state_dict=to_mmdet(faster_rcnn(**ARGS).state_dict())), tmp_path/'their.pth')
    (tmp_path/'cats.json').write_text(json.dumps(dict(categories=[dict(id=i, name=f'n{i}') for i in (1, 2, 3)])))
    (tmp_path/'link.pth').symlink_to(tmp_path/'their.pth')
    before = {o: o.read_bytes() for o in tmp_path.iterdir()}
    for words in (['--to', ours, ours], ['--to', ours, tmp_path/'x'/'..'/'our.safetensors'], ['--from', tmp_path/'their.pth', tmp_path/'link.pth'],
                  ['--from', tmp_path/'their.pth', tmp_path/'their.pth'],
                  ['--from', tmp_path/'their.pth', tmp_path/'cats.json', '--categories', tmp_path/'cats.json']):
        with pytest.raises(SystemExit, match='would replace what it is made from'): convert(words[0], 'mmdet', *words[1:], *['--groups', 4][:2 * (words[0] == '--from')])
    assert {o: o.read_bytes() for o in tmp_path.iterdir()} == before and (tmp_path/'link.pth').is_symlink()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Good and bad inputs of the command."
    folder = tmp_path_factory.mktemp('files')
    model = faster_rcnn(**ARGS)
    theirs = to_mmdet(model.state_dict())
    save_model(folder/'ours.safetensors', model)
    for name, doc in dict(good=theirs, a_list=[1, 2], scalar={**theirs, 'backbone.conv1.weight': torch.tensor(1.)},
                          empty={}, numbers={1: torch.zeros(1), 2: 'x'}, few={k: v for k, v in theirs.items() if 'layer4' not in k},
                          stages={**theirs, 'backbone.layer99999999.0.conv1.weight': torch.zeros(1)},
                          none={**theirs, 'roi_head.bbox_head.fc_cls.weight': torch.zeros(1, 24)}).items():
        torch.save(dict(state_dict=doc), folder/f'{name}.pth')
    said = json.loads(describe(model, {}))
    for name, text in dict(text='what', number=5, width=json.dumps({**said, 'arguments': {**said['arguments'], 'width': 2**22}}),
                           blocks=json.dumps({**said, 'arguments': {**said['arguments'], 'blocks': [2**30] * 4}})).items():
        torch.save(dict(state_dict=theirs, meta=dict(scratchdet=text)), folder/f'says_{name}.pth')
    data = (folder/'good.pth').read_bytes()
    for name, part in dict(cut=data[:len(data) // 2], start=data[:9], nothing=b'').items(): (folder/f'{name}.pth').write_bytes(part)
    torch.save(theirs, folder/'old.pth', _use_new_zipfile_serialization=False)
    (folder/'old_cut.pth').write_bytes((folder/'old.pth').read_bytes()[:-40])
    (folder/'folder.pth').mkdir(), (folder/'folder.safetensors').mkdir()
    rows = [dict(id=i, name=f'n{i}') for i in (1, 2, 3)]
    for name, doc in dict(listed=rows, nameless=dict(categories=[dict(id=i) for i in range(3)]), words=dict(categories=['a', 'b', 'c']),
                          twice=dict(categories=[rows[0]] * 3), mixed=dict(categories=[rows[0], dict(id='x', name='y'), rows[1]]),
                          numbers=dict(categories=[dict(id=i, name=i) for i in range(3)]), without={}).items():
        (folder/f'{name}.json').write_text(json.dumps(doc))
    (folder/'broken.json').write_text('{"categories": [')
    (folder/'bytes.json').write_bytes(b'\xff\xfe\x00')
    return folder


bad_inputs = ['a_list', 'scalar', 'empty', 'numbers', 'few', 'stages', 'none', 'says_text', 'says_number', 'says_width', 'says_blocks', 'cut', 'start', 'nothing',
              'old_cut', 'folder', 'missing']
bad_categories = ['listed', 'nameless', 'words', 'twice', 'mixed', 'numbers', 'without', 'broken', 'bytes', 'missing']


def refused(files, fault, *words):
    "One line that names `fault`; nothing is written."
    before = sorted(files.rglob('*'))
    with pytest.raises(SystemExit, match=fault) as e: convert(*words)
    assert str(e.value).startswith('scratchdet.checkpoints: ') and 'more than tensors' not in str(e.value)
    assert sorted(files.rglob('*')) == before


@pytest.mark.parametrize('name', bad_inputs)
def test_bad_inputs_are_named(files, name):
    what = dict(cut='is cut off', start='is cut off', nothing='is cut off', old_cut='is cut off', folder='is a folder', missing='does not exist')
    refused(files, f'{name}.pth.*{what.get(name, "")}', '--from', 'mmdet', files/f'{name}.pth', files/'out.safetensors')
    if name == 'folder': refused(files, 'is a folder', '--from', 'mmdet', files/'folder.safetensors', files/'out.safetensors')


@pytest.mark.parametrize('name', bad_categories)
def test_bad_categories_are_named(files, name):
    refused(files, f'{name}.json', '--from', 'mmdet', files/'good.pth', files/'out.safetensors', '--groups', 4, '--categories', files/f'{name}.json')


@pytest.mark.parametrize('words, fault', [('--groups 0', 'groups=0'), ('--groups -4', 'groups=-4'), ('--groups 3', '3 groups'), ('--pixel-std 0 0 0', 'pixel_std'),
                                          ('--pixel-std 1 nan 1', 'pixel_std'), ('--pixel-mean 1 inf 1', 'pixel_mean'), ('--pixel-std -1 1 1', 'pixel_std')])
def test_bad_numbers_are_named(files, words, fault):
    refused(files, fault, '--from', 'mmdet', files/'good.pth', files/'out.safetensors', *words.split())


@pytest.mark.parametrize('words', [['--to', 'ours.safetensors'], ['--from', 'good.pth', '--groups', 4]])
def test_bad_targets_are_named(files, words):
    way, source, *more = words
    for target in ('nowhere/x', 'folder.pth', 'good.pth/x'): refused(files, target, way, 'mmdet', files/source, files/target, *more)


def test_what_has_no_effect_is_refused(capsys):
    for more in ('--groups 0', '--groups 4', '--pixel-std 0 0 0', '--pixel-mean 1 2 3', '--categories a.json'):
        with pytest.raises(SystemExit, match='2'): parse_args(['convert', '--to', 'mmdet', 'a', 'b', *more.split()])
    assert capsys.readouterr().err.count('go with --from') == 5


def test_theirs_is_whole_or_absent(files, monkeypatch):
    def stops(file, data):
        with file.open('wb') as f: f.write(data[:99])
        raise OSError('no space left')
    monkeypatch.setattr(Path, 'write_bytes', stops)
    refused(files, 'no space left', '--to', 'mmdet', files/'ours.safetensors', files/'out.pth')
