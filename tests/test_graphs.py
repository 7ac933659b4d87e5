"Recorded steps: the same losses and gradients as launched ones, bit for bit on a CPU, where a recording calls the function again."
from dataclasses import replace
from types import SimpleNamespace as Some

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ranks import run_ranks
from runs import losses, tiny, toy  # noqa: F401  (a fixture)
from test_detector import LOSSES, batch_of, small, without_objects

import scratchdet.train as module
from scratchdet import graphs
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.graphs import Recorded, recorder
from scratchdet.loader import Batch
from scratchdet.matcher import image_keys
from scratchdet.optim import sgd
from scratchdet.train import train, train_step

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
same = lambda counts: counts


def with_slots(batch, most):
    "The batch with room for exactly so many objects an image; all of them objects, copies of the first."
    rows = torch.arange(most).where(torch.arange(most) < batch.boxes.shape[1], 0)
    for k in ('boxes', 'labels', 'valid', 'masks'): setattr(batch, k, getattr(batch, k)[:, rows].clone())
    batch.images = batch.images.contiguous(memory_format=torch.channels_last)
    return batch


def stream():
    "Batches of two shapes of images and of one to forty objects, some without any."
    cases = [((64, 96), 1), ((64, 96), 15), ((96, 64), 17), ((64, 96), 17), ((64, 96), 3), ((96, 64), 40), ((96, 64), 2)]
    out = [with_slots(batch_of(2, size, seed), most) for seed, (size, most) in enumerate(cases)]
    without_objects(out[1], 0), without_objects(out[4], 0, 1)
    return [Batch(**vars(o)) for o in out]


class Keeper(torch.optim.SGD):
    "Keeps the gradients that each step gets."
    def step(self, closure=None):
        self.seen = [*getattr(self, 'seen', ()), [p.grad.clone() for p in self.param_groups[0]['params']]]
        super().step(closure)


def steps(build, precision, recorded, device='cpu', batches=None):
    "Losses and gradients of a step for each batch."
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device == 'cpu', mixed_precision=dict(fp32='no', bf16='bf16')[precision])
    model = small(build, fixed_mask_rois=8).train().to(device, memory_format=torch.channels_last)
    prepared, optimizer = accelerator.prepare(model, Keeper(model.parameters(), lr=.01))
    way = Recorded(model, precision) if recorded else None
    out = [train_step(prepared, optimizer, [o.to(device)], accelerator, t, recorded=way) for t, o in enumerate(batches or stream())]
    AcceleratorState._reset_state(True)
    return out, optimizer.optimizer.seen, way


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('build', [mask_rcnn, faster_rcnn])
def test_replayed_steps_are_launched_steps(build, precision):
    (wanted, gradients, _), (found, own, way) = (steps(build, precision, o) for o in (False, True))
    assert len(found) == 7 and set(found[0]) == LOSSES - ({'loss_mask'} if build is faster_rcnn else set())
    for a, b in zip(wanted, found, strict=True):
        assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    for a, b in zip(gradients, own, strict=True): assert len(a) > 50 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert sorted(k[:2] for k in way.shapes) == [((2, 3, 64, 96), 16), ((2, 3, 64, 96), 32), ((2, 3, 96, 64), 16),
                                                 ((2, 3, 96, 64), 32), ((2, 3, 96, 64), 64)]


def test_a_shape_is_recorded_once_and_the_model_sees_the_batch_as_it_is():
    "Two recordings for each shape; a replay neither builds fixed memory nor warms up again."
    calls = []
    def record(do):
        calls.append(do.func.__name__)
        return recorder(torch.device('cpu'))(do)
    model, batches = small(), stream()
    way = Recorded(model, record=record)
    for o in batches * 2: way([o], [image_keys(0, 0, o.image_ids)], same)
    assert calls == ['_forward', '_backward'] * 5 and len(way.shapes) == 5
    for o in way.shapes.values(): assert not hasattr(o, 'sums') and not o.losses.requires_grad and not o.counts.requires_grad


def test_losses_are_copies_and_gradients_one_piece():
    model, batches = small(), stream()
    way = Recorded(model)
    outs = [way([o], [image_keys(0, 0, o.image_ids)], same) for o in batches[:1]]
    kept = {k: v.item() for k, v in outs[0].items()}
    first = [p.grad for p in model.parameters()]
    model.zero_grad()
    for o in batches: outs.append(way([o], [image_keys(0, 1, o.image_ids)], same))
    assert {k: v.item() for k, v in outs[0].items()} == kept != {k: v.item() for k, v in outs[1].items()}
    assert len(first) > 50 and all(p.grad is g for p, g in zip(model.parameters(), first))
    assert {p.grad.untyped_storage().data_ptr() for p in model.parameters()} == {way.flat.untyped_storage().data_ptr()}
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_total_is_asked_once_and_divides():
    batch, asked = stream()[0], []
    way, keys = Recorded(small()), image_keys(0, 0, batch.image_ids)
    def four_times(counts):
        asked.append(counts.clone())
        return 4 * counts
    one, gradient = way([batch], [keys], same), way.flat.clone()
    quarter = way([batch], [keys], four_times)
    assert len(asked) == 1 and asked[0].shape == (3,) and asked[0].min() > 0
    for k, v in one.items(): assert v == 4 * quarter[k]
    torch.testing.assert_close(4 * way.flat, gradient, rtol=1e-5, atol=1e-7)


def test_spare_slots_may_have_held_objects():
    "Forty objects, then one in the same memory: nothing of the forty is left."
    many, one = with_slots(batch_of(), 16), with_slots(batch_of(), 1)
    way, keys = Recorded(small()), image_keys(0, 0, one.image_ids)
    alone, gradient = way([one], [keys], same), way.flat.clone()
    way([many], [keys], same)
    after = way([one], [keys], same)
    assert len(way.shapes) == 1 and alone == after and torch.equal(way.flat, gradient)


def sum_of(batch, processes):
    "Losses and gradients of a process's share of a batch, the counts summed over all."
    accelerator = Accelerator(cpu=True)
    if processes > 1: batch = batch._each(lambda o: o.chunk(processes)[accelerator.process_index])
    model = small(fixed_mask_rois=8).double()
    way = Recorded(model)
    out = way([batch], [image_keys(0, 0, batch.image_ids)], lambda counts: accelerator.reduce(counts, 'sum'))
    return {k: accelerator.reduce(v, 'sum').item() for k, v in out.items()}, [p.grad.numpy() for p in model.parameters()]


def test_two_processes_are_one():
    "Each with one of two images, one of them without objects: the sum over both is the gradient of the whole batch."
    batch = without_objects(with_slots(batch_of(), 3), 1)
    batch = Batch(**vars(batch))
    (wanted, gradient), = run_ranks(sum_of, 1, batch, 1)
    for out, own in run_ranks(sum_of, 2, batch, 2):
        assert out == pytest.approx(wanted, rel=1e-9) and len(own) > 50
        for a, b in zip(gradient, own, strict=True): assert abs(a - b).max() <= 1e-9 * max(abs(a).max(), 1e-9)


def test_parts_are_one():
    "Parts of unlike shapes and one without objects: the losses and gradients of launched parts; their numbers are asked for once."
    AcceleratorState._reset_state(True)
    accelerator, asked = Accelerator(cpu=True), []
    parts = [stream()[i] for i in (0, 2, 4, 1)]
    def total(counts): return asked.append(counts.tolist()) or counts
    model = small(fixed_mask_rois=8).double()
    keys = [image_keys(0, 0, o.image_ids) for o in parts]
    found = Recorded(model)(parts, keys, total)
    own = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted = module._launched(model, parts, keys, total, accelerator)
    AcceleratorState._reset_state(True)
    assert len(asked) == 2 and asked[0] == pytest.approx(asked[1]) and found.keys() == wanted.keys()
    for k, v in wanted.items(): torch.testing.assert_close(found[k], v, rtol=1e-9, atol=0)
    for p, g in zip(model.parameters(), own, strict=True): torch.testing.assert_close(g, p.grad, rtol=1e-9, atol=1e-12)


def recorded_run(coco, out, recipe):
    "A run that is recorded though it has no GPU."
    module._recorded = lambda run: Recorded(run.detector, run.precision)
    return train(recipe, coco, out, cpu=True, progress=False)


@pytest.mark.parametrize('processes', [1, 2])
def test_a_recorded_run_is_the_run(toy, tmp_path, processes):  # noqa: F811
    "Evaluations and checkpoints in between; on two processes the order of sums is another."
    recipe = replace(tiny, eval_every=1, images_per_process=4)
    launched = train(recipe, toy, tmp_path/'launched', cpu=True, progress=False)
    results = run_ranks(recorded_run, processes, toy, tmp_path/'recorded', recipe)
    a, b = losses(tmp_path/'launched'), losses(tmp_path/'recorded')
    assert len(a) == len(b) == 8 and launched.keys() == results[0].keys()
    if processes == 1: assert a == b and launched == results[0]
    else: assert all(y == pytest.approx(x, rel=1e-3) for x, y in zip(a[:2], b))


@pytest.mark.parametrize('kind, triton, wanted, made', [
    ('cuda', True, True, True), ('cuda', True, False, False), ('cuda', False, True, False), ('cpu', True, True, False), ('mps', True, True, False)])
def test_who_is_recorded(monkeypatch, kind, triton, wanted, made):
    monkeypatch.setattr(module, 'Recorded', lambda detector, precision: (detector, precision))
    monkeypatch.setattr(graphs, 'use_triton', lambda: triton)
    run = Some(accelerator=Some(device=torch.device(kind)), recipe=Some(graphs=wanted), detector='detector', precision='bf16')
    assert module._recorded(run) == (('detector', 'bf16') if made else None)


@gpu
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_on_a_gpu_replays_are_launches(precision):
    "Kernels that add in any order leave last bits open, and these grow over the steps: few steps, and a bound."
    few = stream()[:4]
    (wanted, gradients, _), (found, own, way) = (steps(mask_rcnn, precision, o, 'cuda', few) for o in (False, True))
    assert len(way.shapes) == 3
    bound = dict(rtol=1e-3, atol=1e-4) if precision == 'fp32' else dict(rtol=.05, atol=.02)
    for a, b in zip(wanted, found, strict=True):
        for k, v in a.items(): torch.testing.assert_close(b[k], v, **bound)
    near = [torch.cosine_similarity(torch.cat([o.flatten() for o in a]), torch.cat([o.flatten() for o in b]), 0) for a, b in zip(gradients, own)]
    assert min(near) > (.999 if precision == 'fp32' else .98)


@gpu
def test_on_a_gpu_a_replay_can_be_repeated():
    "The shapes in turn, again and again, on weights that stay: each has its own losses every time, whatever another left in the pool."
    model = small().train().to('cuda', memory_format=torch.channels_last)
    way, batches = Recorded(model), [o.to('cuda') for o in stream()]
    rounds = [[(way([o], [image_keys(0, 0, o.image_ids)], same), way.flat.clone()) for o in batches] for _ in range(3)]
    with torch.no_grad(): plain = [model(o, image_keys(0, 0, o.image_ids)) for o in batches]
    for one in rounds:
        for (out, flat), (first, gradient), wanted in zip(one, rounds[0], plain, strict=True):
            for k, v in out.items(): torch.testing.assert_close(v, wanted[k], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(flat, gradient, rtol=1e-3, atol=1e-5)


@gpu
def test_on_a_gpu_a_run_is_recorded(toy, tmp_path):  # noqa: F811
    for name, on in dict(on=True, off=False).items(): train(replace(tiny, epochs=1, graphs=on), toy, tmp_path/name, progress=False)
    a, b = losses(tmp_path/'off'), losses(tmp_path/'on')
    assert len(a) == len(b) == 4
    assert a[0] == pytest.approx(b[0], rel=1e-3) and all(x['loss'] == pytest.approx(y['loss'], rel=.05) for x, y in zip(a, b))
