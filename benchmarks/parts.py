"Where the time of a step goes: a clock with labels, the parts of both models, and what the machine could do at best."
import statistics
import time
from contextlib import contextmanager, nullcontext
from functools import wraps

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torchvision.models.detection import roi_heads

from common import seconds_of
from scratchdet import detector
from scratchdet.matcher import image_keys

labels = ('backbone', 'FPN', 'RPN head', 'proposals', 'matching', 'RoIAlign', 'box head', 'mask head', 'mask targets', 'losses',
          'rest of forward', 'backward', 'optimizer')


class Clock:
    "Seconds of each step under each label; what is timed inside under another label is not counted twice."
    running = None  # the clock of the step that is being computed

    def __init__(self): self.steps, self.inner = [], []

    @contextmanager
    def step(self):
        "A step of its own."
        self.steps.append(dict.fromkeys(labels, 0.))
        Clock.running = self
        try: yield
        finally: Clock.running = None

    @contextmanager
    def __call__(self, label):
        self.inner.append(0.)
        start = time.perf_counter()
        yield
        spent, inside = time.perf_counter() - start, self.inner.pop()
        if self.inner: self.inner[-1] += spent
        self.steps[-1][label] += spent - inside

    def medians(self, skip=1):
        "Median seconds of each label, without the first steps."
        return {k: statistics.median(o[k] for o in self.steps[skip:]) for k in labels}


def timed(owner, name, label):
    "Let a function or method of `owner` be timed under a label, by the clock that is running, if any."
    do = getattr(owner, name)
    if hasattr(do, 'label'): return
    @wraps(do)
    def inner(*args, **kwargs):
        with Clock.running(label) if Clock.running else nullcontext(): return do(*args, **kwargs)
    inner.label = label
    setattr(owner, name, inner)


def time_ours(model):
    "Name the parts of a `Detector`."
    for part, label in ((model.backbone, 'backbone'), (model.fpn, 'FPN'), (model.rpn.head, 'RPN head'), (model.rpn.anchors, 'proposals'),
                        (model.box_head, 'box head'), (model.mask_head, 'mask head')): timed(part, 'forward', label)
    for owner, name, label in ((model.rpn, 'proposals', 'proposals'), (model.rpn, 'sample_anchors', 'matching'),
                               (model.rpn.head, 'at', 'RPN head'), (model.rpn, 'losses', 'losses'),
                               (detector, 'sample_rois', 'matching'), (detector, 'roi_align', 'RoIAlign'),
                               (detector, 'box_losses', 'losses'), (detector, 'mask_loss', 'losses'),
                               (detector, 'mask_targets', 'mask targets')): timed(owner, name, label)


def time_theirs(model):
    "Name the parts of torchvision's model."
    heads = model.roi_heads
    for part, label in ((model.backbone.body, 'backbone'), (model.backbone.fpn, 'FPN'), (model.rpn.head, 'RPN head'),
                        (model.rpn.anchor_generator, 'proposals'), (heads.box_roi_pool, 'RoIAlign'), (heads.mask_roi_pool, 'RoIAlign'),
                        (heads.box_head, 'box head'), (heads.box_predictor, 'box head'), (heads.mask_head, 'mask head'),
                        (heads.mask_predictor, 'mask head')): timed(part, 'forward', label)
    for owner, name, label in ((model.rpn.box_coder, 'decode', 'proposals'), (model.rpn, 'filter_proposals', 'proposals'),
                               (model.rpn, 'assign_targets_to_anchors', 'matching'), (model.rpn, 'compute_loss', 'losses'),
                               (heads, 'select_training_samples', 'matching'), (roi_heads, 'fastrcnn_loss', 'losses'),
                               (roi_heads, 'maskrcnn_loss', 'losses'),
                               (roi_heads, 'project_masks_on_boxes', 'mask targets')): timed(owner, name, label)


def machine_limits(side=1536, megabytes=256):
    "What all threads together reach at best: float32 products (GFLOP/s) and copies in memory (GB/s read and written)."
    a, b, c = (torch.ones(side, side) for _ in range(3))
    source, target = (torch.ones(megabytes * 2 ** 18) for _ in range(2))
    product = min(seconds_of(lambda: torch.mm(a, b, out=c)) for _ in range(5))
    copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(5))
    return dict(gflop_per_second=2 * side ** 3 / product / 1e9, gb_per_second=2 * megabytes / 1024 / copy)


def _conv_flops(x, weight, *args, out_shape=None, **kwargs):
    "Of a 3x3 convolution by its definition, whatever computes it; shapes (N, C, H, W) and (K, C, 3, 3)."
    return conv_flop_count(x, weight, out_shape)


def forward_flops(model, batch):
    "Multiplications and additions of our forward pass by the definitions, by part (without the positives' share that chance decides)."
    mapping = {torch.ops.scratchdet.conv3x3: _conv_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(batch, image_keys(0, 0, batch.image_ids))
    counts = counter.get_flop_counts()
    names = {'backbone': 'backbone', 'fpn': 'FPN', 'rpn.head': 'RPN head', 'box_head': 'box head', 'mask_head': 'mask head'}
    return {label: sum(counts[f'Detector.{k}'].values()) for k, label in names.items()}
