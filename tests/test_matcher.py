"Matching against loops, and the sampler's promises: independent of company and device, fair, and never beyond its share."
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchdet.matcher import image_keys, match, random_keys, sample

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()
MASK = 2**32 - 1


# --- matching ---------------------------------------------------------------------------------------------------------

def slow_match(iou, valid, fg, bg, low, inside):
    "The rules one anchor and one object at a time; iou is a list of rows, one an object."
    objects, matched = [m for m, v in enumerate(valid) if v], []
    for r, there in enumerate(inside):
        best = max((iou[m][r] for m in objects), default=-1.)
        first = next((m for m in objects if iou[m][r] == best), None)
        matched.append(-2 if not there else first if objects and best >= fg else -1 if best < bg else -2)
    if low is None: return matched
    for m in objects:
        best = max((q for q, there in zip(iou[m], inside) if there), default=-1.)
        for r, there in enumerate(inside):
            if there and best >= low and iou[m][r] == best: matched[r] = m
    return matched


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 4), r=st.integers(1, 9), low=st.sampled_from([None, 0., .3, .5]),
       thresholds=st.sampled_from([(.7, .3), (.5, .5)]))
def test_match_is_the_loop(seed, m, r, low, thresholds):
    "IoUs are multiples of 0.1, so that anchors and objects tie often."
    generator = torch.Generator().manual_seed(seed)
    iou = torch.randint(0, 11, (3, m, r), generator=generator) / 10
    valid, inside = (torch.rand(3, k, generator=generator) < .7 for k in (m, r))
    fg, bg = (float(torch.tensor(t)) for t in thresholds)
    low32 = None if low is None else float(torch.tensor(low))
    ours = match(iou, valid, fg_thresh=fg, bg_thresh=bg, low_quality=low32, inside=inside)
    theirs = [slow_match(iou[i].tolist(), valid[i].tolist(), fg, bg, low32, inside[i].tolist()) for i in range(3)]
    assert ours.tolist() == theirs
    every = torch.ones_like(inside)
    assert torch.equal(match(iou, valid, fg_thresh=fg, bg_thresh=bg, low_quality=low32),
                       match(iou, valid, fg_thresh=fg, bg_thresh=bg, low_quality=low32, inside=every))


def test_padding_does_not_matter():
    "More padded objects, whatever their boxes overlap, change nothing."
    generator = torch.Generator().manual_seed(0)
    iou, valid = torch.rand(2, 3, 50, generator=generator), torch.tensor([[True, True, False], [False] * 3])
    options = dict(fg_thresh=.7, bg_thresh=.3, low_quality=.3)
    want = match(iou, valid, **options)
    more = torch.cat([iou, torch.ones(2, 4, 50)], 1), torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], 1)
    assert torch.equal(match(*more, **options), want)
    assert (want[1] == -1).all() and (want[0] >= 0).any()


# --- keys -------------------------------------------------------------------------------------------------------------

def int_mix(x):
    "The hash in Python's integers, which have no width to overflow."
    for shift, factor in (16, 0x21f0aaad), (15, 0x735a2d97): x = (x ^ x >> shift) * factor & MASK
    return x ^ x >> 15


def int_hash(words, h):
    for w in words: h = int_mix(h + w & MASK)
    return h


def int_keys(seed, step, image):
    words = [seed & MASK, step & MASK, image & MASK, image >> 32 & MASK]
    return (int_hash(words, 0x3c6ef372) >> 1 << 32) + int_hash(words, 0x9e3779b9)


@pytest.mark.parametrize('device', DEVICES)
def test_hash_is_exact(device):
    "Tensors give what unbounded integers give, on every device, also for large and negative seeds and ids."
    ids = [0, 1, 139, 581_929, 2**31, 2**40 + 3, 2**62]
    for seed, step in (0, 0), (1, 7), (-1, 2**33 + 5), (2**40, 540_000):
        keys = image_keys(seed, step, torch.tensor(ids, device=device))
        assert keys.tolist() == [int_keys(seed, step, i) for i in ids] and int(keys.min()) >= 0
        for salt in 0, 1:
            draws, offset = random_keys(keys, 50, salt), int_hash([salt], 0x9e3779b9)
            want = [[int_mix(int_mix(i ^ k & MASK) ^ k >> 32 ^ offset) for i in range(50)] for k in keys.tolist()]
            assert draws.tolist() == want


def test_no_product_overflows(): assert max(0x21f0aaad, 0x735a2d97) * MASK < 2**63


def test_draws_look_independent():
    "Between images with consecutive ids, between steps, between salts, and between neighbours of a row."
    n = 20_000
    rows = [random_keys(image_keys(s, t, torch.tensor([i])), n, salt)[0].double()
            for s, t, i, salt in [(0, 0, 1, 0), (0, 0, 2, 0), (0, 1, 1, 0), (1, 0, 1, 0), (0, 0, 1, 1)]]
    rows += [rows[0].roll(1), rows[0].roll(2)]
    off = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert off.abs().max() < 4.5 / n**.5


@pytest.mark.parametrize('bits', [0, 8, 16, 24])
def test_draws_are_uniform(bits):
    "Chi-square of each byte: 255 degrees of freedom, within 5 standard deviations."
    draws = random_keys(image_keys(3, 5, torch.arange(20)), 5000)
    counts = (draws >> bits & 255).flatten().bincount(minlength=256).double()
    chi2 = ((counts - counts.mean())**2 / counts.mean()).sum()
    assert abs(float(chi2) - 255) < 5 * (2 * 255)**.5


# --- sampling ---------------------------------------------------------------------------------------------------------

def some_matches(n, r, positives, ignored=0, seed=0):
    "N rows with so many positives and ignored anchors at random places, the others background."
    rng, rows = random.Random(seed), []
    for _ in range(n):
        row = [rng.randrange(5) for _ in range(positives)] + [-2] * ignored + [-1] * (r - positives - ignored)
        rng.shuffle(row)
        rows.append(row)
    return torch.tensor(rows)


SETTINGS = dict(batch_size_per_image=64, positive_fraction=.25)


@pytest.mark.parametrize('device', DEVICES)
def test_same_draws_in_any_company(device):
    "Alone, in a batch, in another order, and on another device."
    matched, ids = some_matches(6, 500, 40, 30), torch.tensor([5, 9, 2, 77, 1, 4])
    keys = image_keys(0, 11, ids)
    idxs, used = sample(matched, keys, **SETTINGS)
    assert used.all()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    again, _ = sample(matched[order].to(device), image_keys(0, 11, ids[order].to(device)), **SETTINGS)
    assert torch.equal(again.cpu(), idxs[order])
    for i in range(6):
        alone, _ = sample(matched[i:i+1].to(device), image_keys(0, 11, ids[i:i+1].to(device)), **SETTINGS)
        assert torch.equal(alone.cpu(), idxs[i:i+1])
    other, _ = sample(matched, image_keys(0, 12, ids), **SETTINGS)
    assert (other != idxs).float().mean() > .5


@pytest.mark.parametrize('size', [1, 16, 63, 100, 101, 1000])
@pytest.mark.parametrize('fraction', [0., .25, .5, 1.])
@pytest.mark.parametrize('positives, ignored', [(0, 0), (3, 10), (50, 50), (100, 0), (0, 100), (100 - 7, 0)])
def test_shares(size, fraction, positives, ignored):
    "As many positives as allowed, then as many negatives as fit, positives first, none twice, none ignored."
    r = 100
    matched = some_matches(4, r, positives, ignored)
    idxs, used = sample(matched, torch.arange(4), batch_size_per_image=size, positive_fraction=fraction)
    assert idxs.shape == used.shape == (4, min(size, r)) and 0 <= idxs.min() and idxs.max() < r
    pos = min(positives, int(size * fraction), r)
    neg = min(r - positives - ignored, min(size, r) - pos)
    picked = matched.gather(1, idxs)
    for row, u, i in zip(picked, used, idxs):
        assert (row[:pos] >= 0).all() and (row[pos:pos + neg] == -1).all()
        assert u[:pos + neg].all() and not u[pos + neg:].any()
        assert len(i[u].unique()) == pos + neg


def test_every_anchor_has_its_share():
    "Chi-square of how often each positive and each negative is drawn in 3000 steps, within 5 standard deviations."
    matched, steps = some_matches(1, 60, 20), 3000
    keys = torch.cat([image_keys(0, s, torch.tensor([42])) for s in range(steps)])
    idxs, used = sample(matched.expand(steps, -1), keys, batch_size_per_image=16, positive_fraction=.5)
    assert used.all()
    counts = idxs.flatten().bincount(minlength=60).double()
    for kind in matched[0] >= 0, matched[0] == -1:
        n, mean = int(kind.sum()), 8 * steps / int(kind.sum())
        chi2 = float(((counts[kind] - mean)**2 / (mean * (1 - 8 / n))).sum())
        assert abs(chi2 - (n - 1)) < 5 * (2 * (n - 1))**.5


def test_matching_and_sampling_are_one_graph():
    def both(iou, valid, keys):
        matched = match(iou, valid, fg_thresh=.7, bg_thresh=.3, low_quality=.3)
        return sample(matched, keys, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    args = torch.rand(2, 3, 200, generator=generator), torch.tensor([[True, True, False], [False] * 3]), torch.tensor([3, 4])
    for a, b in zip(torch.compile(both, fullgraph=True, backend='eager')(*args), both(*args)): assert torch.equal(a, b)
