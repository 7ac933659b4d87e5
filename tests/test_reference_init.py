"Initialization against the statistics of mmdetection's, for every npz of the reference folder that holds some."
import re

import numpy as np
import pytest
import torch

from scratchdet.checkpoints import mmdet_names
from scratchdet.detector import faster_rcnn, mask_rcnn
from scratchdet.init import detector_fills, fill_part, init_detector


def init_files(folder):
    found = []
    for path in sorted(folder.rglob('*.npz')):
        with np.load(path) as arrays:
            if 'init.names' in arrays: found.append({k: arrays[k] for k in arrays if k.startswith('init.')})
    return found


def model_of(names, shapes):
    "A detector with the depth, the kind and the classes that the names and shapes tell."
    blocks = tuple(1 + max(int(re.match(rf'backbone\.layer{l}\.(\d+)', n)[1]) for n in names
                           if n.startswith(f'backbone.layer{l}.')) for l in range(1, 5))
    build = mask_rcnn if any('mask_head' in n for n in names) else faster_rcnn
    return build(shapes['roi_head.bbox_head.fc_cls.weight'][0] - 1, blocks=blocks)


def test_every_parameter_is_drawn_as_in_mmdetection(reference):
    files = init_files(reference)
    assert files, f'no npz with `init.names` under {reference}'
    for arrays in files:
        names = [str(n) for n in arrays['init.names']]
        shapes = {n: tuple(int(v) for v in re.findall(r'\d+', str(s))) for n, s in zip(names, arrays['init.shapes'])}
        model = init_detector(model_of(names, shapes), torch.Generator().manual_seed(0))
        ours = {theirs: model.get_parameter(n) for n, theirs in mmdet_names(model).items()}
        assert {n: tuple(p.shape) for n, p in ours.items()} == shapes
        stats = dict(zip(names, arrays['init.mean_std_min_max'], strict=True))
        wrong = [f'{n}: {problem}' for n in names for problem in [differs(ours[n].detach().double(), *stats[n])] if problem]
        assert not wrong, '\n'.join(wrong)


def differs(p, mean, std, low, high, sigmas=5):
    "What of one parameter's distribution is not the reference's (which is the mean of five draws)."
    if std == 0: return '' if (p == mean).all() else f'is not {mean} everywhere'
    error = sigmas * (1 + 1 / 5)**0.5 * std / p.numel()**0.5  # of a mean; of a std at most 1/sqrt(2) of it
    if abs(p.mean() - mean) > error: return f'mean {p.mean():.3g}, not {mean:.3g}'
    if abs(p.std() - std) > error / 2**0.5: return f'std {p.std():.4g}, not {std:.4g}'
    if p.numel() < 2000: return ''
    uniform = high < 2 * std  # a uniform ends at 1.73 std, a normal of 2000 values goes beyond 2.5
    if (p.max() < 2 * std) != uniform: return 'a normal drawn as a uniform or the reverse'
    return f'reaches {p.max():.4g}, not {high:.4g}' if uniform and abs(p.max() / high - 1) > 0.01 else ''


@pytest.mark.parametrize('build', [mask_rcnn, faster_rcnn])
def test_each_parameter_is_filled_once(build):
    with torch.device('meta'): model = build(20)
    parts = {part: fill_part(model.get_submodule(part), draw) for part, draw in detector_fills(model).items()}
    counts = {name: sum(p is q for filled in parts.values() for q in filled) for name, p in model.named_parameters()}
    assert len(counts) == (223 if build is mask_rcnn else 207)
    assert set(counts.values()) == {1}


def test_a_part_named_twice_or_not_at_all_is_refused(monkeypatch):
    with torch.device('meta'): model = faster_rcnn(3, blocks=(1, 1, 1, 1))
    fills = detector_fills(model)
    monkeypatch.setattr('scratchdet.init.detector_fills', lambda _: fills | {'fpn.lateral.0': fills['fpn']})
    with pytest.raises(ValueError, match='fpn.lateral.0.conv.weight 2 times'): init_detector(model)
    monkeypatch.setattr('scratchdet.init.detector_fills', lambda _: {k: v for k, v in fills.items() if k != 'rpn.head'})
    with pytest.raises(ValueError, match='rpn.head.conv.weight 0 times'): init_detector(model)


def test_a_draw_depends_on_its_generator_alone():
    build = lambda: mask_rcnn(3, blocks=(1, 1, 1, 1), width=16, channels=32, fc=64, groups=8)
    torch.manual_seed(0)
    a = init_detector(build(), torch.Generator().manual_seed(7))
    torch.manual_seed(1)
    b = init_detector(build(), torch.Generator().manual_seed(7))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
