"Reports of runs: finished, unfinished and damaged, alike and unlike; and COCO's rule on random detections."
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from random import Random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from runs import tiny, toy  # noqa: F401
from scratchdet.coco import coco_split, load_index
from scratchdet.errors import judge, match_boxes
from scratchdet.evaluate import ground_truth, run_hotcoco, run_pycocotools
from scratchdet.report import draw_lines, examine, main, overview, page, parse_args, read_run, read_runs, run_curves, write_report
from scratchdet.train import train


@pytest.fixture(scope='module')
def folders(tmp_path_factory, toy):  # noqa: F811
    "A finished run with masks and one without."
    root = tmp_path_factory.mktemp('runs')
    base = replace(tiny, eval_every=1, score_thresh=.001)  # so that there is something to judge after eight steps
    for recipe in (replace(base, name='masks'), replace(base, name='boxes', masks=False, lr=.01)):
        train(recipe, toy, root/recipe.name, cpu=True, progress=False)
    return root


@pytest.fixture
def run(folders, tmp_path):
    "A copy of the run with masks, to be damaged."
    return shutil.copytree(folders/'masks', tmp_path/'run')


class Elements(HTMLParser):
    "Counts elements, collects addresses, and sees whether all are closed in order."
    void = {'meta', 'img', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.links, self.wrong = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href')]
        if tag not in self.void: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void: self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.wrong.append(tag)


def elements(text):
    "The page, whole and without anything from elsewhere."
    found = Elements(text)
    assert not found.wrong and not found.open
    assert not [o for o in found.links if not o.startswith(('#', 'data:image/jpeg;base64,'))]
    assert not re.findall(r'@import|url\((?!#)', text)
    return found.counts


def command(*words):
    return subprocess.run([sys.executable, '-m', 'scratchdet.report', *map(str, words)], capture_output=True, text=True)


def test_two_runs_with_detections(folders, toy, tmp_path):  # noqa: F811
    out = write_report([folders/'masks', folders/'boxes'], tmp_path/'deep/both.html', toy)
    text = out.read_text()
    counts = elements(text)
    assert counts['svg'] == 9 + 2 + 2 + 2 and counts['h3'] == 4 and counts['img'] > 0
    assert '<td>lr</td><td>0.02</td><td>0.01</td>' in text and '<td>masks</td><td>True</td><td>False</td>' in text
    assert out.stat().st_size < 3_000_000 and out.with_suffix('.png').read_bytes()[:4] == b'\x89PNG'
    assert sorted(o.name for o in out.parent.iterdir()) == ['both.html', 'both.png']


def test_the_command(folders, tmp_path):
    done = command(folders/'masks', '--out', tmp_path/'a.html', '--quiet', '--cpu')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert elements((tmp_path/'a.html').read_text())['svg'] == 9 + 2 + 2 and (tmp_path/'a.png').stat().st_size > 10_000
    assert '--coco DIR' in (tmp_path/'a.html').read_text()


def test_what_is_no_run(folders, tmp_path):
    done = command(folders/'masks', tmp_path, '--out', tmp_path/'a.html')
    assert done.returncode == 1 and done.stderr.startswith(f'scratchdet.report: {tmp_path} is no run folder')
    assert done.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


def test_a_page_with_the_name_of_a_folder(folders, tmp_path):
    (tmp_path/'a.html').mkdir()
    done = command(folders/'masks', '--out', tmp_path/'a.html')
    assert done.returncode == 1 and done.stderr == f'scratchdet.report: --out {tmp_path}/a.html is a folder: give the name of a file\n'
    assert [o.name for o in tmp_path.rglob('*')] == ['a.html']


@pytest.mark.parametrize('options, message', [
    (dict(out='a.htm'), 'ends in .html'), (dict(out='a.html', coco='nowhere'), 'nowhere does not exist')])
def test_wrong_arguments(folders, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message): write_report([folders/'masks'], **options)
    assert not list(tmp_path.glob('a.*'))


def test_a_run_that_has_just_begun(run):
    for name in ('log.jsonl', 'model.safetensors'): (run/name).unlink()
    shutil.rmtree(run/'eval')
    text = page([read_run(run)])
    assert 'svg' not in elements(text) and 'Not evaluated yet' in text and 'nothing in the log yet' in text
    assert len(overview([read_run(run)], {}).axes) == 0


def test_an_unfinished_run_beside_a_finished_one(run, folders, toy, tmp_path):  # noqa: F811
    (run/'model.safetensors').unlink()
    text = write_report([run, folders/'boxes'], tmp_path/'a.html', toy).read_text()
    assert elements(text)['h3'] == 2 and 'model.safetensors is missing: run.' in text


@pytest.mark.parametrize('tail', ['{"step": 9, "epo', '[1]', '3', 'null', '"x"', '{}', '{"step": "nine", "epoch": null}', '\x00\xff'])
def test_a_damaged_line_is_left_out(run, tail):
    before = read_run(run).log
    with (run/'log.jsonl').open('ab') as f: f.write(tail.encode('latin1') + b'\n')
    after = read_run(run)
    assert after.log == before and len(before) == 8 and after.notes == ['1 of 9 lines of the log are damaged and left out']


@pytest.mark.parametrize('log, told', [
    (b'', 'run: nothing in the log yet\n'), (b'torn\n{"step": 1, "epoch": 0.1}\n', 'run: 1 of 2 lines of the log are damaged and left out\n'), (None, '')])
def test_what_a_run_lacks_is_on_the_screen(run, tmp_path, capsys, log, told):
    if log is not None: (run/'log.jsonl').write_bytes(log)
    words = [str(run), '--out', str(tmp_path/'a.html'), '--cpu']
    main(parse_args(words))
    assert capsys.readouterr() == (f'{tmp_path}/a.html and a.png\n', told)
    main(parse_args([*words, '--quiet']))
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('text', ['', '{"step": 8', '[]', '{"step": 8, "epoch": 2}', '{"step": 8, "epoch": 2, "bbox": 1}'])
def test_a_damaged_evaluation_is_left_out(run, text):
    (run/'eval/step_00000009.json').write_text(text)
    found = read_run(run)
    assert [o['step'] for o in found.evaluations] == [4, 8] and 'evaluations are damaged' in found.notes[0]
    assert page([found])


def test_a_number_that_is_missing_or_none(run):
    "An AP that could not be measured, a category without objects, a line without speed."
    found = read_run(run)
    found.evaluations[0]['bbox']['AP'] = None
    found.evaluations[-1]['bbox']['per_category'] = {'disc': None}
    del found.log[3]['images_per_second']
    curves = run_curves([found])
    assert np.isnan(curves['Box AP, %; dashed, hollow: AP50'][0].ys[0]) and len(curves['Images a second'][0].xs) == 7
    assert elements(page([found]))['svg'] == 9 + 2 + 1


def test_one_evaluation_is_seen(run):
    "A point for AP and another for AP50, each as a marker, for a line of one point is none; the hollow one is AP50."
    found = read_run(run)
    lines = run_curves([found._replace(evaluations=found.evaluations[-1:])])['Box AP, %; dashed, hollow: AP50']
    ax = draw_lines(plt.subplots()[1], 'AP', lines)
    assert [(len(o.get_xdata()), o.get_marker(), o.get_markerfacecolor() == 'none') for o in ax.lines] == [(1, 'o', False), (1, 'o', True)]
    assert ax.get_xlim()[0] == 0 < ax.lines[0].get_xdata()[0] < ax.get_xlim()[1]
    plt.close(ax.figure)


@pytest.mark.parametrize('text', ['', '[]', '{"masks": 1', '{"lr": -1}'])
def test_a_damaged_recipe_is_an_error(run, text):
    (run/'recipe.json').write_text(text)
    with pytest.raises(ValueError, match='recipe'): read_run(run)


def test_names_are_text(run, tmp_path):
    other = shutil.copytree(run, tmp_path/'_<b>$x$ & "é"')
    runs = read_runs([run, other])
    assert elements(page(runs))['svg'] == 9 + 2 + 2 and '<b>' not in page(runs)
    assert [o.get_text() for o in overview(runs, {}).legends[0].get_texts()] == ['run', other.name]


def test_a_long_log_makes_a_small_page(run):
    found = read_run(run)
    long = [{**found.log[-1], 'step': i, 'epoch': i / 100, 'loss': 1 / (1 + i)} for i in range(20_000)]
    assert len(page([found._replace(log=long)] * 3)) < 600_000


def test_the_counts_are_those_of_the_weights(folders, toy):  # noqa: F811
    "The detections of a trained model, judged here, give the precision that is counted elsewhere."
    index = load_index(*coco_split(toy, 'val'))
    truth = ground_truth(index)
    found = examine(read_run(folders/'masks'), index, truth)
    assert len(found['records']) > 100 and found['true'] and found['false'] and list(found['precision']) == ['bbox', 'segm']
    check_curve(truth, found['records'], found['precision']['bbox'])


def check_curve(truth, records, precision):
    "Precision at IoU 0.5 and 101 recalls, from `judge` alone."
    judged = judge(truth, records)
    for k, kind in enumerate(o['id'] for o in truth['categories']):
        rows = [(o['score'], name == 'true') for name in ('true', 'false') for o in judged[name] if o['category_id'] == kind]
        hits = np.array([hit for _, hit in sorted(rows, key=lambda o: -o[0])], dtype=float)
        there = sum(o['category_id'] == kind and not o['iscrowd'] for o in truth['annotations'])
        missed = sum(o['category_id'] == kind for o in judged['missed'])
        assert hits.sum() + missed == there
        if not there: continue
        best = np.maximum.accumulate((hits.cumsum() / np.arange(1, len(hits) + 1))[::-1])[::-1]
        at = np.searchsorted(hits.cumsum() / there, np.linspace(0, 1, 101))
        np.testing.assert_allclose(precision[0, :, k, 0, -1], np.append(best, 0)[np.minimum(at, len(hits))], atol=1e-9)


place, side = st.integers(0, 1), st.integers(1, 3)
box = st.tuples(place, place, side, side).map(lambda o: [8. * x for x in o])
left, right, wide = [0., 0, 16, 8], [16., 0, 16, 8], [0., 0, 32, 8]
one = st.tuples(st.integers(1, 2), st.just(1) | st.integers(1, 2), box)


@settings(max_examples=100, deadline=None)
@example([((1, 1, left), False), ((1, 1, right), False)], [(1, 1, wide), (1, 1, right)], Random(5))  # the better box is equally near to both
@given(st.lists(st.tuples(one, st.booleans()), max_size=8), st.lists(one, max_size=12), st.randoms())
def test_the_rule_is_cocos(objects, found, random):
    "On a grid so coarse, boxes are equal, compete for one object, and have IoUs of 0.5 exactly; scores differ."
    images = [dict(id=i, height=64, width=64) for i in (1, 2)]
    anns = [dict(id=n, image_id=i, category_id=k, bbox=b, area=b[2] * b[3], iscrowd=int(crowd))
            for n, ((i, k, b), crowd) in enumerate(objects, 1)]
    scores = random.sample(range(1, 100), len(found))
    records = [dict(image_id=i, category_id=k, bbox=b, score=s / 100) for (i, k, b), s in zip(found, scores)]
    truth = dict(images=images, annotations=anns, categories=[dict(id=1, name='a'), dict(id=2, name='b')])
    for count in (run_pycocotools, run_hotcoco): check_curve(truth, records, count(truth, records, 'bbox')[1])


def test_a_box_without_area_is_no_error():
    boxes, crowd = torch.tensor([[5., 5, 5, 9], [0., 0, 10, 10]]), torch.tensor([True])
    assert match_boxes(boxes, torch.tensor([[0., 0, 10, 10]]), crowd) == [-1, 0]
    assert match_boxes(boxes, torch.tensor([[0., 0, 10, 10]]), ~crowd) == [-1, 0]


def test_a_report_does_not_change_the_run(run, toy, tmp_path):  # noqa: F811
    before = {o: o.read_bytes() for o in run.rglob('*') if o.is_file()}
    write_report([run], tmp_path/'a.html', toy)
    assert {o: o.read_bytes() for o in run.rglob('*') if o.is_file()} == before and len(before) > 5


def test_the_same_report_twice(folders, tmp_path):
    texts = [write_report([folders/'masks'], tmp_path/f'{i}.html').read_text() for i in range(2)]
    assert texts[0] == texts[1] and json.loads((folders/'masks/recipe.json').read_text())['name'] in texts[0]
