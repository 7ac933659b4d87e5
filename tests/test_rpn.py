"Anchors, matching, losses and proposals against the reference's numbers; sizes, empty images, precision and capture of the RPN."
import numpy as np
import pytest
import torch
from conftest import shared
from torch.testing import assert_close

from scratchdet.anchors import Anchors
from scratchdet.boxes import boxes_to_deltas
from scratchdet.matcher import image_keys
from scratchdet.rpn import RPN, RPNHead, RPNOutput

EVERYTHING = dict(batch_size_per_image=10**9, positive_fraction=1.)


@pytest.fixture(autouse=True)
def one_seed(): torch.manual_seed(0)


# --- against mmdetection, each stage from the stored inputs of that stage ---------------------------------------------

def flat(maps, k):
    "Maps (N, A * k, h, w) as rows (N, h * w * A, k), written out index by index."
    n, _, h, w = maps[0].shape
    return torch.cat([m.reshape(len(m), -1, k, *m.shape[2:]).permute(0, 3, 4, 1, 2).reshape(len(m), -1, k) for m in maps], 1)


class Stored:
    "One file: the RPN's output, sizes and objects."
    def __init__(self, path):
        self.name, self.arrays = path.name, dict(np.load(path))
        self.levels = [f'P{l}' for l in range(2, 7)]
        logits, deltas = ([self[f'rpn_{k}.{l}'] for l in self.levels] for k in ('logits', 'deltas'))
        anchors = [self[f'anchors.{l}'] for l in self.levels]
        self.shapes = [tuple(x.shape[-2:]) for x in logits]
        self.out = RPNOutput(flat(logits, 1)[..., 0], flat(deltas, 4), torch.cat(anchors), tuple(map(len, anchors)), self.shapes)
        self.n = len(logits[0])
        self.sizes = torch.tensor([self.arrays[f'image{i}'].shape[:2] for i in range(self.n)])
        objects = [self[f'gt_boxes{i}'] for i in range(self.n)]
        m = max(1, *map(len, objects))
        self.boxes, self.valid = torch.zeros(self.n, m, 4), torch.zeros(self.n, m, dtype=torch.bool)
        self.labels = torch.full((self.n, m), -1)
        for i, o in enumerate(objects):
            k = len(o)
            self.boxes[i, :k], self.valid[i, :k], self.labels[i, :k] = o, True, self[f'gt_labels{i}']
        self.keys = image_keys(0, 0, torch.arange(self.n))

    def __getitem__(self, key): return torch.from_numpy(self.arrays[key])

    def batch(self): return self.sizes, self.boxes, self.valid

    def counted(self, matched):
        """Matches that `rpn_pos` and the classification loss of a level count as positive.

        The files hold what mmdetection's RPN head gives for the categories as they are: only category 0 counts as an object,
        the others as background. In training mmdetection calls all objects 0 before, and `train.total.loss_rpn_cls` is of that
        kind; so are the targets, whose number tells the two apart.
        """
        if sum(int(self[f'train.rpn_pos.{l}'].sum()) - len(self[f'train.rpn_targets.{l}']) for l in self.levels) == 0: return matched
        other = self.labels.gather(1, matched.clamp(min=0)) != 0
        return matched.masked_fill((matched >= 0) & other, -1)

    def split(self, x): return zip(self.levels, x.split(self.out.counts, 1))


@pytest.fixture(scope='module')
def stored():
    "Every file of a model's training step that the folder has."
    folder = shared('SCRATCHDET_REFERENCE', '../shared/reference')
    files = [p for p in sorted(folder.rglob('*.npz')) if 'train.rpn_avg_factor' in np.load(p).files]
    assert files, f'no model file under {folder}'
    return [Stored(p) for p in files]


def everything(): return RPN(RPNHead(), Anchors(), **EVERYTHING)


def test_reference_anchors(stored):
    for s in stored:
        for l, ours in zip(s.levels, Anchors()(s.shapes), strict=True): assert torch.equal(ours, s[f'anchors.{l}']), (s.name, l)


def test_reference_matches(stored):
    "Positives, negatives and left out anchors are the same; targets of the positives in order."
    positives = 0
    for s in stored:
        matched = everything().targets(s.out, *s.batch())
        objects = s.boxes.gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4))
        targets = boxes_to_deltas(objects, s.out.anchors.expand_as(objects))
        for (l, idxs), (_, t), (_, counted) in zip(s.split(matched), s.split(targets), s.split(s.counted(matched))):
            assert torch.equal(counted >= 0, s[f'train.rpn_pos.{l}']), (s.name, l)
            assert torch.equal(idxs != -2, s[f'train.rpn_used.{l}']), (s.name, l)
            assert_close(t[idxs >= 0], s[f'train.rpn_targets.{l}'], rtol=0, atol=1e-5)
            positives += int((idxs >= 0).sum())
    assert positives > 0


def level_losses(s, matched, monkeypatch):
    "Sums of the losses of each level's anchors alone, given the matches of all anchors."
    parts = {'loss_rpn_cls': [], 'loss_rpn_loc': []}
    split = [[x for _, x in s.split(y)] for y in (s.out.logits, s.out.deltas, matched)]
    for logits, deltas, idxs, anchors in zip(*split, s.out.anchors.split(s.out.counts), strict=True):
        monkeypatch.setattr(RPN, 'targets', lambda *args: idxs)
        level, _ = everything().losses(RPNOutput(logits, deltas, anchors, (len(anchors),), None), *s.batch(), s.keys)
        for k, v in level.items(): parts[k].append(v)
    monkeypatch.undo()
    return {k: torch.stack(v) for k, v in parts.items()}


def test_reference_losses(stored, monkeypatch):
    "Of all levels together, and of each."
    for s in stored:
        sums, count = everything().losses(s.out, *s.batch(), s.keys)
        assert count == s['train.rpn_avg_factor'], s.name
        matched = everything().targets(s.out, *s.batch())
        cls = level_losses(s, s.counted(matched), monkeypatch)['loss_rpn_cls'] / count
        loc = level_losses(s, matched, monkeypatch)['loss_rpn_loc'] / count
        assert_close(cls, s['train.loss_rpn_cls'], rtol=1e-5, atol=0)
        assert_close(loc, s['train.loss_rpn_bbox'], rtol=1e-5, atol=0)
        for ours, theirs in ('loss_rpn_cls', 'loss_rpn_cls'), ('loss_rpn_loc', 'loss_rpn_bbox'):
            assert_close((sums[ours] / count).double(), s[f'train.total.{theirs}'], rtol=1e-5, atol=0)


@pytest.mark.parametrize('key, training', [('test', False), ('train', True)])
def test_reference_proposals(stored, key, training):
    "All boxes and scores, in order of the scores."
    for s in stored:
        ours = everything().proposals(s.out, s.sizes, training)
        for i in range(s.n):
            want, boxes, scores = s[f'{key}.proposals{i}'], ours.boxes[i], ours.scores[i]
            assert int(ours.valid[i].sum()) == len(want) and ours.valid[i, :len(want)].all(), (s.name, i)
            assert_close(scores[:len(want)], want[:, 4], rtol=0, atol=1e-5)
            rows = torch.cat([boxes[:len(want)], scores[:len(want), None]], 1)
            near = (rows[:, None] - want).abs().amax(-1) < 1e-5 * float(s.sizes.max())  # (ours, theirs)
            assert near.any(0).all() and near.any(1).all(), (s.name, i)
            assert (near.diagonal().float().mean() > .99), 'the order'
