"An exported detector, run in a process that cannot import this package; and suppression in plain operations."
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scratchdet.boxes import nms_keep
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.export import FixedDetector, export_detector, main, parse_args, plain_nms
from scratchdet.init import init_detector
from scratchdet.weights import save_model

small = dict(blocks=(1, 1, 1, 1), width=16, channels=32, fc=64, groups=4, rpn=dict(post_nms_topk=(60, 60)), max_dets=20, score_thresh=.6)
elsewhere = '''
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition('.')[0] == 'scratchdet': raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, torchvision
extra = {'scratchdet.json': ''}
model = torch.export.load(sys.argv[1], extra_files=extra).module()
batches = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode(): torch.save([model(*o) for o in batches], sys.argv[3])
print(extra['scratchdet.json'])
'''


@pytest.mark.parametrize('make', [mask_rcnn, faster_rcnn])
def test_it_finds_what_the_model_finds(make, tmp_path):
    "Images of noise of several sizes and a black pixel, in three batches of two; and two of the pixel, with nothing in the whole batch."
    g = torch.Generator().manual_seed(7)
    model = init_detector(make(5, **small), g).eval()
    nn.init.normal_(model.box_head.cls.weight, std=.3, generator=g)
    save_model(tmp_path/'model.safetensors', model, dict(category_names=list('abcde'), short_side=64, long_side=96))
    file = main(parse_args(f'--weights {tmp_path} --out {tmp_path}/model.pt2 --images 2 --quiet'.split()))
    batches = []
    for sizes in ([[64, 96], [40, 90]], [[1, 1], [64, 30]], [[33, 65], [64, 96]], [[1, 1], [1, 1]]):
        images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
        for image, (h, w) in zip(images, sizes):
            if h > 1: image[:, :h, :w] = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g)
        batches.append((images, torch.tensor(sizes)))
    torch.save(batches, tmp_path/'batches.pt')
    words = [sys.executable, '-c', elsewhere, file, tmp_path/'batches.pt', tmp_path/'found.pt']
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about['shape'] == [2, 3, 64, 96] and about['category_names'] == list('abcde')
    counts = []
    for batch, found in zip(batches, torch.load(tmp_path/'found.pt', weights_only=True)):
        with torch.inference_mode(): usual = model(SimpleNamespace(images=batch[0], sizes=batch[1]))
        assert ('mask_probs' in found) == (make is mask_rcnn)
        for i, one in enumerate(usual):
            valid = found['valid'][i]
            counts.append(len(one['labels']))
            assert valid.sum() == counts[-1] and torch.equal(found['labels'][i, valid], one['labels'])
            for k in one.keys() - {'labels'}: torch.testing.assert_close(found[k][i, valid], one[k], rtol=0, atol=1e-4)
    assert counts[2] == counts[6] == counts[7] == 0 and sum(o > 0 for o in counts) >= 3


def ours(program): return {str(o.target).removesuffix('.default') for o in program.graph.nodes if str(o.target).startswith('scratchdet')}


def test_every_operation_of_ours_is_replaced():
    "At the widths of a real model, whose 3x3 convolutions are operations of ours too: all four are in the graph at first, none is in the end."
    g = torch.Generator().manual_seed(7)
    model = init_detector(mask_rcnn(5, **small | dict(channels=256)), g).eval()
    nn.init.normal_(model.box_head.cls.weight, std=.3, generator=g)
    inputs = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=g), torch.tensor([[64, 96]])
    with torch.no_grad(): noted = torch.export.export(FixedDetector(model), inputs)
    assert ours(noted) == {f'scratchdet.{o}' for o in ('conv3x3', 'group_norm', 'nms_keep', 'roi_align')}
    program = export_detector(model, 64, 96)
    assert ours(program) == set() and any('conv2d' in str(o.target) for o in program.graph.nodes)
    with torch.inference_mode(): found, wanted = program.module()(*inputs), FixedDetector(model)(*inputs)
    assert wanted['valid'].any() and torch.equal(found['labels'], wanted['labels'])
    for k in wanted: torch.testing.assert_close(found[k], wanted[k], rtol=0, atol=1e-4)


@pytest.mark.parametrize('seed', range(20))
def test_plain_suppression_is_ours(seed):
    "Boxes that overlap a lot, of which some are equal, some outside, and with equal scores."
    g = torch.Generator().manual_seed(seed)
    corners = torch.randint(-20, 60, (2, 150, 2), generator=g).float()
    boxes = torch.cat([corners, corners + torch.randint(1, 60, (2, 150, 2), generator=g)], -1)
    scores, groups = torch.randint(0, 40, (2, 150), generator=g) / 40, torch.randint(0, 5, (2, 150), generator=g)
    valid = torch.rand(2, 150, generator=g) < .9
    kept = plain_nms(boxes, scores, groups, valid, .5)
    assert torch.equal(kept, nms_keep(boxes, scores, groups, valid, .5)) and 0 < kept.sum() < valid.sum()
    for few in (valid & False, valid & (torch.arange(150) == valid[0].nonzero()[0])):
        assert torch.equal(plain_nms(boxes, scores, groups, few, .5), few)


@pytest.mark.parametrize('words, says', [
    ('--size 64 100', 'width 100 must be a multiple of 32'), ('--images 0', 'images 0 must be 1 or more'), ('--size 0 0', 'height 0 must be 32 or more'),
    ('--size 64 -32', 'width -32 must be 32 or more'), ('--out x.onnx', 'ends in .pt2'),
    ('--out none/x.pt2', 'its folder does not exist')])
def test_refusals_are_one_line(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path/'model.safetensors', faster_rcnn(5, **small), dict(short_side=64, long_side=96))
    with pytest.raises(SystemExit) as e: main(parse_args(['--weights', str(tmp_path), '--out', 'x.pt2', *words.split()]))
    assert e.value.code.startswith('scratchdet.export: ') and says in e.value.code and '\n' not in e.value.code
    assert not list(tmp_path.rglob('*.pt2'))
