"""A training step on a GPU asks the GPU nothing, seen without a GPU: on fake tensors, which have shapes and devices but no values.

Whatever needs a value (a loss as a number, the count of what is true) fails there, where a GPU would have to stop and answer."""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from scratchdet import train
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.graphs import Recorded
from scratchdet.loader import Batch
from scratchdet.log import Report, write_line
from scratchdet.matcher import image_keys
from scratchdet.optim import sgd
from scratchdet.train import _step
from test_detector import LOSSES, batch_of, small
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):
    "Collects what is called: the operator and its tensors."
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.calls.append((f, [o for o in tree_leaves((args, kwargs, out)) if isinstance(o, torch.Tensor)]))
        return out


@contextmanager
def fakes(model, device):
    "A model and a batch without values, on a device that need not be there."
    batch = batch_of()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield model.to(device), on(mode, batch, device)


def on(mode, batch, device):
    fake = lambda o: mode.from_tensor(o).to(device)
    return SimpleNamespace(**{k: fake(v) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})


@pytest.mark.parametrize('build', [mask_rcnn, faster_rcnn])
def test_the_forward_pass_asks_nothing_and_all_convolutions_are_channels_last(build):
    with fakes(small(build), 'cuda') as (model, batch):
        with Watched() as watched: losses = model(batch, image_keys(0, 0, batch.image_ids))
        assert set(losses) == LOSSES - ({'loss_mask'} if build is faster_rcnn else set())
        assert all(v.device.type == 'cuda' and v.dtype == torch.float32 for v in losses.values())
        assert not [f for f, o in watched.calls if len({x.device.type for x in o if x.dim()}) > 1], 'copies between devices'
        convs = [o for f, o in watched.calls if 'convolution' in str(f)]
        assert len(convs) > 30
        for x, *_ in convs: assert x.is_contiguous(memory_format=torch.channels_last), x.shape


def test_the_mask_head_sees_all_slots_that_may_hold_a_positive():
    "On a GPU a quarter of the RoIs; on a CPU, and there alone, the positives are counted."
    with fakes(small(), 'cpu') as (model, batch), pytest.raises(DynamicOutputShapeException):
        model(batch, image_keys(0, 0, batch.image_ids))
    with fakes(small(), 'cuda') as (model, batch), Watched() as watched: model(batch, image_keys(0, 0, batch.image_ids))
    seen = [o for f, o in watched.calls if 'mask_targets' in str(f)]
    (_, rois, *_, out), = seen
    assert len(rois) == 2 * 32 // 4 and out.shape == (16, 28, 28)


@pytest.mark.parametrize('recorded', [False, True])
def test_a_whole_step_asks_nothing_until_a_line_is_written(tmp_path, recorded):
    "Forward, losses, backward, update and report of two steps; a CPU differentiates as a GPU does."
    accelerator = SimpleNamespace(reduce=lambda o, how: o, backward=lambda o: o.backward(), num_processes=1, is_main_process=True,
                                  unwrap_model=lambda o: o, device=torch.device('cpu'), mixed_precision='no')
    with fakes(small(fixed_mask_rois=8), 'cpu') as (model, batch):
        batch = Batch(**vars(batch))
        run = SimpleNamespace(schedule=lambda step: .1, step=0, model=model, optimizer=sgd(model, .1), accelerator=accelerator,
                              recipe=SimpleNamespace(seed=0), recorded=Recorded(model) if recorded else None)
        report = Report(tmp_path/'log.jsonl', accelerator, 2, progress=False)
        with Watched() as watched:
            for _ in range(2): _step(run, [batch], report)
        assert run.step == len(report.rows) == 2 and len(watched.calls) > 1000
        assert sum('_fused_sgd_' in str(f) for f, _ in watched.calls) >= 2
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)): write_line(report, 2, 0., .1)


class Recorder:
    "Stands for CUDA's streams, and writes down what is asked of them."
    def __init__(self): self.said, self.inside = [], []

    @contextmanager
    def stream(self, name):
        self.inside.append(name)
        yield
        self.inside.pop()

    def current_stream(self, device): return SimpleNamespace(wait_stream=lambda name: self.said.append(('wait for', name)), name='compute')


def test_a_batch_travels_on_a_stream_of_its_own(monkeypatch):
    "Copies on the side stream, then the step's stream waits for them, and every tensor is known to it."
    cuda, sent = Recorder(), []
    for name in ('stream', 'current_stream'): monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(train, '_side', lambda device: 'side')
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda self, stream: cuda.said.append((stream.name, self.data_ptr())))
    monkeypatch.setattr(Batch, 'to', lambda self, device: sent.append((device.type, *cuda.inside)) or self)
    batch = Batch(**vars(batch_of()))
    out = train._send([batch, batch], torch.device('cuda'))
    pointers = [o.data_ptr() for o in vars(batch).values() if o is not None]
    assert out == [batch, batch] and sent == [('cuda', 'side')] * 2 and not cuda.inside
    assert cuda.said == [('wait for', 'side')] + [('compute', o) for o in pointers * 2] and len(pointers) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_a_batch_arrives_whole():
    device = torch.device('cuda', 0)
    for seed in range(20):
        batch = Batch(**vars(batch_of(seed=seed)))
        there, = train._send([batch.pin_memory()], device)
        busy = torch.randn(2000, 2000, device=device) @ torch.randn(2000, 2000, device=device)
        for k, v in vars(batch).items():
            if v is not None: assert torch.equal(getattr(there, k).cpu(), v)
        assert busy.isfinite().all()
