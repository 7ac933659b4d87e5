"Anchors, matching, losses, proposals against the reference; gradients against whole maps; sizes, precision, capture of the RPN."
from contextlib import nullcontext

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


def stored_losses(rpn, out, sizes, boxes, valid, keys):
    "Losses of a sample whose answers are taken from those of all anchors."
    sampled = rpn.sample_anchors(out, sizes, boxes, valid, keys)
    deltas = out.deltas.gather(1, sampled.idxs[..., None].expand(-1, -1, 4))
    return rpn.losses(out.logits.gather(1, sampled.idxs), deltas, sampled, boxes)


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
        level, _ = stored_losses(everything(), RPNOutput(logits, deltas, anchors, (len(anchors),), None), *s.batch(), s.keys)
        for k, v in level.items(): parts[k].append(v)
    monkeypatch.undo()
    return {k: torch.stack(v) for k, v in parts.items()}


def test_reference_losses(stored, monkeypatch):
    "Of all levels together, and of each."
    for s in stored:
        sums, count = stored_losses(everything(), s.out, *s.batch(), s.keys)
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


# --- a small RPN ------------------------------------------------------------------------------------------------------

SHAPES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def small(shapes=SHAPES, n=2, channels=16, seed=0, **options):
    "An RPN, what it says of random features, and objects: two in the first image, none in the others."
    generator = torch.Generator().manual_seed(seed)
    rpn = RPN(RPNHead(channels), Anchors(), **options)
    features = [torch.randn(n, channels, h, w, generator=generator) for h, w in shapes]
    boxes = torch.tensor([[4., 4, 40, 44], [50, 10, 90, 60]]).repeat(n, 1, 1)
    valid = torch.zeros(n, 2, dtype=torch.bool)
    valid[0] = True
    h, w = (4 * x for x in shapes[0])
    sizes = torch.tensor([[h, w]] * n)
    return rpn, features, (sizes, boxes, valid, image_keys(0, 0, torch.arange(n)))


def losses_at(rpn, features, out, sizes, boxes, valid, keys):
    "Losses of a sample that the head is asked for once more, as in training."
    sampled = rpn.sample_anchors(out, sizes, boxes, valid, keys)
    return rpn.losses(*rpn.head.at(features, sampled.idxs), sampled, boxes)


def step(rpn, features, objects):
    "Loss and proposals of one training step."
    out = rpn(features)
    sums, count = losses_at(rpn, features, out, *objects)
    return sum(sums.values()) / count, rpn.proposals(out, objects[0], True)


# --- the sampled anchors once more: loss and gradients equal those of whole maps ---------------------------------------

def dense(head, features, idxs):
    "As `RPNHead.at`, by way of all anchors of all levels."
    logits, deltas = head(features)
    deltas = flat(deltas, 4).gather(1, idxs[..., None].expand(-1, -1, 4))
    return flat(logits, 1)[..., 0].gather(1, idxs), deltas


def sampled_at(head, features, idxs): return head.at(features, idxs)


def gradients(rpn, features, idxs, answers, loss_of, dtype=None):
    "Loss, and its gradients of all parameters and maps, of one of the two ways."
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in features]
    with torch.autocast('cpu', dtype) if dtype else nullcontext():
        rpn(leaves)  # as in a step: what autocast keeps of it has no graph
        loss = loss_of(*answers(rpn.head, leaves, idxs))
    return [loss.detach(), *torch.autograd.grad(loss, [*rpn.head.parameters(), *leaves])]


def assert_same(rpn, features, idxs, loss_of):
    "To the rounding of float64, each as a share of its greatest entry."
    found = [gradients(rpn, features, idxs, f, loss_of) for f in (sampled_at, dense)]
    for a, b in zip(*found, strict=True): assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    return found[0]


def weighted(idxs, used=None):
    "A loss that tells every number of every anchor from the others."
    z, d = torch.randn(idxs.shape, dtype=torch.float64), torch.randn(*idxs.shape, 4, dtype=torch.float64)
    used = torch.ones_like(idxs, dtype=torch.bool) if used is None else used
    return lambda logits, deltas: ((logits * z + (deltas * d).sum(-1)) * used).sum()


ONE = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 1)]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('n', [1, 2])
def test_gradients_of_a_step(n, layout):
    "The loss of a step; in the second image nothing is there."
    rpn, features, (sizes, boxes, valid, keys) = small(n=n)
    rpn.double().to(memory_format=layout)
    features, boxes = [x.double().to(memory_format=layout) for x in features], boxes.double()
    sampled = rpn.sample_anchors(rpn(features), sizes, boxes, valid, keys)
    assert sampled.positive.any(1).tolist() == [True, False][:n] and sampled.used.all()
    def loss(*answers):
        sums, count = rpn.losses(*answers, sampled, boxes)
        return sum(sums.values()) / count
    assert all(o.abs().max() > 0 for o in assert_same(rpn, features, sampled.idxs, loss))


@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('shapes', [SHAPES, ONE, [(1, 3), (3, 1), (1, 1)]])
def test_gradients_of_every_anchor_and_of_one(shapes, n):
    "All of all levels in any order; the corners of each level, all their anchors; one anchor many times."
    rpn, features, _ = small(shapes, n=n)
    rpn.double()
    features, ends = [x.double() for x in features], torch.tensor([h * w for h, w in shapes]).cumsum(0).tolist()
    corners = [first + y * w + x for first, (h, w) in zip([0, *ends], shapes) for y in (0, h - 1) for x in (0, w - 1)]
    corners = (3 * torch.tensor(corners)[:, None] + torch.arange(3)).flatten()
    for idxs in (torch.stack([torch.randperm(3 * ends[-1]) for _ in range(n)]), corners.repeat(n, 1), torch.full((n, 7), 4),
                 torch.tensor([[3 * ends[-1] - 1]] * n)):
        assert_same(rpn, features, idxs, weighted(idxs))


def test_spare_slots_and_other_images_have_no_gradient():
    "What is not used leaves no trace, nor does an image in the maps of another."
    rpn, features, _ = small()
    rpn.double()
    idxs, features = torch.tensor([[0, 5, 5, 1000], [0, 0, 0, 0]]), [x.double() for x in features]
    used = torch.tensor([[True, True, False, False], [False] * 4])
    _, *grads = assert_same(rpn, features, idxs, weighted(idxs, used))
    maps = grads[-len(features):]
    assert (maps[0][0] != 0).any() and not any((o[1] != 0).any() for o in maps) and not any((o != 0).any() for o in maps[1:])
    assert (maps[0][0] != 0).any(0).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradients_under_autocast(layout):
    "All there (a copy of a weight that autocast keeps has a graph), and about as near to those of float32 as whole maps' are."
    rpn, features, objects = small()
    rpn.to(memory_format=layout)
    features = [x.to(memory_format=layout) for x in features]
    idxs = rpn.sample_anchors(rpn(features), *objects).idxs
    z, d = torch.randn(idxs.shape), torch.randn(*idxs.shape, 4)
    runs = [gradients(rpn, features, idxs, f, lambda logits, deltas: (logits * z + (deltas * d).sum(-1)).sum(), dtype)[1:]
            for f, dtype in ((dense, None), (sampled_at, torch.bfloat16), (dense, torch.bfloat16))]
    for exact, ours, theirs in zip(*runs, strict=True):
        assert ours.dtype == torch.float32 and ours.norm() > 0
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() + .005 * exact.norm()


# --- sizes, empty images, precision, capture --------------------------------------------------------------------------

@pytest.mark.parametrize('shapes', [[(2, 2), (1, 1), (1, 1), (1, 1), (1, 1)], [(1, 3)] * 5, SHAPES])
def test_maps_of_any_size(shapes):
    "Fewer anchors than the limits of the sample and of the proposals, down to a handful."
    rpn, features, objects = small(shapes)
    loss, found = step(rpn, features, objects)
    loss.backward()
    total = 3 * sum(h * w for h, w in shapes)
    assert found.boxes.shape == (2, min(1000, total), 4) and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in rpn.parameters())


@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('m', [1, 4])
def test_only_empty_images(n, m):
    "Losses and gradients are finite, the deltas learn nothing, objectness does."
    rpn, features, (sizes, _, _, keys) = small(n=n)
    loss, found = step(rpn, features, (sizes, torch.zeros(n, m, 4), torch.zeros(n, m, dtype=torch.bool), keys))
    loss.backward()
    assert loss.isfinite() and found.boxes.isfinite().all() and found.valid.any(1).all()
    assert (rpn.head.deltas.weight.grad == 0).all() and (rpn.head.objectness.weight.grad != 0).any()
    assert all(p.grad.isfinite().all() for p in rpn.parameters())


def test_sums_of_a_batch_are_sums_of_its_images():
    "With the sampler on: what an image draws does not depend on its batch."
    rpn, features, objects = small(n=3)
    out = rpn(features)
    sums, count = losses_at(rpn, features, out, *objects)
    alone = [losses_at(rpn, [x[i:i+1] for x in features], out, *(x[i:i+1] for x in objects)) for i in range(3)]
    assert count == sum(c for _, c in alone)
    for k, v in sums.items(): assert_close(v, sum(s[k] for s, _ in alone))


def test_proposals_of_a_batch_are_those_of_its_images():
    rpn, features, (sizes, *_) = small(n=3)
    sizes[1] = torch.tensor([40, 50])
    out = rpn(features)
    together = rpn.proposals(out, sizes, False)
    for i in range(3):
        alone = rpn.proposals(out._replace(logits=out.logits[i:i+1], deltas=out.deltas[i:i+1]), sizes[i:i+1], False)
        for a, b in zip(together, alone, strict=True): assert torch.equal(a[i:i+1], b)
    assert together.boxes[1, :, 0].max() <= 50 and together.boxes[1, :, 1].max() <= 40


def test_losses_are_float32_under_autocast():
    "The head answers in bfloat16; losses, boxes and scores are float32, and near those of float32 answers."
    rpn, features, objects = small()
    with torch.autocast('cpu', torch.bfloat16):
        out = rpn(features)
        sampled = rpn.sample_anchors(out, *objects)
        logits, deltas = rpn.head.at(features, sampled.idxs)
        sums, count = rpn.losses(logits, deltas, sampled, objects[1])
        found = rpn.proposals(out, objects[0], True)
    assert {o.dtype for o in (out.logits, out.deltas, logits, deltas)} == {torch.bfloat16}
    exact, same = rpn.losses(logits.float(), deltas.float(), sampled, objects[1])
    assert count == same
    for k, v in sums.items():
        assert v.dtype == torch.float32
        assert_close(v, exact[k], rtol=1e-6, atol=1e-6)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    sum(sums.values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in rpn.parameters())


@pytest.mark.parametrize('empty', [False, True])
def test_the_training_step_is_one_graph(empty):
    "Head, losses and proposals are captured whole; loss, gradients and proposals equal those of eager mode."
    rpn, features, (sizes, boxes, valid, keys) = small()
    objects = sizes, boxes, valid & (not empty), keys
    results = []
    for f in step, torch.compile(step, fullgraph=True, backend='eager'):
        rpn.zero_grad()
        loss, found = f(rpn, features, objects)
        loss.backward()
        results.append([loss, *found, *(p.grad.clone() for p in rpn.parameters())])
    for a, b in zip(*results, strict=True): assert_close(a, b)


@pytest.mark.parametrize('logit', [80., -80., 0.])
def test_scores_that_saturate(logit):
    "Equal scores, far beyond where a sigmoid still differs, give a finite loss and as many proposals as ever."
    rpn, features, objects = small()
    out = rpn(features)
    out = out._replace(logits=torch.full_like(out.logits, logit))
    sums, _ = stored_losses(rpn, out, *objects)
    assert all(v.isfinite() for v in sums.values())
    found = rpn.proposals(out, objects[0], False)
    assert found.valid.any(1).all() and found.scores.isfinite().all()


def test_ranking_survives_saturation():
    "Logits of 30 and 40 have the same float32 score; the better one still comes first."
    rpn, features, objects = small()
    out = rpn(features)
    logits = torch.full_like(out.logits, -5.)
    logits[:, 100], logits[:, 700] = 30., 40.
    found = rpn.proposals(out._replace(logits=logits, deltas=torch.zeros_like(out.deltas)), objects[0], False)
    assert torch.equal(found.scores[:, 0], found.scores[:, 1])
    assert found.boxes[0, 0].tolist() == out.anchors[700].clamp(min=0).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu_gives_the_same():
    "The same anchors are drawn and the same boxes are proposed; losses agree to rounding."
    rpn, features, objects = small()
    out = rpn(features)
    sums, count = losses_at(rpn, features, out, *objects)
    found = rpn.proposals(out, objects[0], True)
    theirs = RPNOutput(*(x.cuda() for x in out[:3]), *out[3:])
    on_gpu = [x.cuda() for x in objects]
    rpn.cuda()
    sums2, count2 = losses_at(rpn, [x.cuda() for x in features], theirs, *on_gpu)
    found2 = rpn.proposals(theirs, on_gpu[0], True)
    assert count == count2.cpu() and torch.equal(found.valid, found2.valid.cpu())
    for k, v in sums.items(): assert_close(v, sums2[k].cpu())
    assert_close(found.boxes, found2.boxes.cpu(), rtol=1e-4, atol=1e-3)
    for a, b in zip(Anchors()(SHAPES), rpn.anchors(SHAPES), strict=True): assert torch.equal(a, b.cpu())
