"The studies' miniature: each setting changes what it says and nothing else, every study runs and goes on, each result is complete."
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scratchdet.init import init_detector
from scratchdet.matcher import image_keys
from scratchdet.norm import GroupNorm
from scratchdet.resnet import Bottleneck
from scratchdet.toy import toy_batch

root = Path(__file__).parents[1]
tiny = '--unit 8 --train 16 --val 4 --crops 8 --seeds 0'.split()


@pytest.fixture(scope='module')
def studies():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(root / 'benchmarks'))
        import studies
        yield studies


@pytest.fixture(scope='module')
def page():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(root / 'benchmarks'))
        import study_page
        yield study_page


def losses(model):
    batch = SimpleNamespace(**toy_batch(2))
    batch.masks = None
    return model.train()(batch, image_keys(0, 0, batch.image_ids))


def test_the_base_is_the_package(studies, monkeypatch):
    "PyTorch's GroupNorm in the place of ours: the same losses from the same weights."
    theirs = losses(studies.build(studies.Setting()))
    monkeypatch.setattr(studies, 'swap_norms', lambda *args: None)
    model = studies.build(studies.Setting())
    assert sum(isinstance(o, GroupNorm) for o in model.modules()) > 20
    torch.testing.assert_close(losses(model), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('norm, kind', [('GN', torch.nn.GroupNorm), ('BN', torch.nn.BatchNorm2d), ('frozen', None)])
def test_norms(studies, norm, kind):
    "All are of one kind, in the same places; the frozen one changes nothing and learns nothing."
    model = studies.build(studies.Setting(norm=norm))
    places = [o for o in model.modules() if isinstance(o, studies.Normed)]
    assert len(places) == sum(isinstance(o, torch.nn.GroupNorm) for o in studies.build(studies.Setting()).modules()) > 20
    assert all(type(o.norm) is (kind or studies.FrozenBatchNorm2d) for o in places)
    x = torch.randn(2, places[0].norm.weight.numel(), 4, 4)
    if norm == 'frozen':
        torch.testing.assert_close(places[0](x, relu=True), x.relu(), rtol=1e-4, atol=0)
        assert not list(places[0].parameters())
    torch.testing.assert_close(places[0](x, residual=x, relu=True), (places[0].norm(x) + x).relu())


def test_order_in_the_head(studies):
    "After the ReLU the norm makes negative values again; nothing else of the model changes."
    base, other = (studies.build(studies.Setting(head=o)) for o in ('norm, ReLU', 'ReLU, norm'))
    x = torch.randn(3, 32, 5, 5)
    assert base.box_head.convs(x).min() >= 0 > other.box_head.convs(x).min()
    a, b = ([v for k, v in sorted(o.state_dict().items())] for o in (base, other))
    assert len(a) > 20 and all(torch.equal(*o) for o in zip(a, b, strict=True))


def test_last_norms_at_zero(studies):
    "Each bottleneck is its shortcut."
    model = studies.build(studies.Setting(zero_last=True))
    blocks = [o for o in model.modules() if isinstance(o, Bottleneck)]
    x = torch.randn(2, 16, 8, 8).relu()
    assert len(blocks) == 4 and torch.equal(blocks[0](x), blocks[0].shortcut(x).relu())


def test_norm_in_the_rpn_head(studies):
    base, other = (studies.build(studies.Setting(rpn_norm=o)) for o in (False, True))
    more = sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in base.parameters())
    assert more == 2 * studies.recipe.channels
    maps = [torch.randn(2, studies.recipe.channels, h, w) for h, w in ((4, 6), (2, 3))]
    idxs = torch.tensor([[0, 71, 72, 89], [5, 5, 80, 1]])
    for model in base, other:
        out = model.rpn(maps)
        logits, deltas = model.rpn.head.at(maps, idxs)
        torch.testing.assert_close(logits, out.logits.gather(1, idxs))
        torch.testing.assert_close(deltas, out.deltas.gather(1, idxs[..., None].expand(-1, -1, 4)))
        sum(o.sum() for o in (logits, deltas)).backward()
        assert all(p.grad is not None for p in model.rpn.parameters())


@pytest.mark.parametrize('name', ['scratchdet', 'PyTorch', 'He', 'Xavier', 'normal'])
def test_schemes(studies, name):
    "The deviation of a layer's weights is the scheme's."
    weight = studies.build(studies.Setting(init=name)).rpn.head.conv.weight
    fan = weight[0].numel()
    wanted = dict(scratchdet=.01, PyTorch=(3 * fan) ** -.5, He=(2 / fan) ** .5, Xavier=(1 / fan) ** .5, normal=.01)
    assert weight.std().item() == pytest.approx(wanted[name], rel=.05) and set(studies.schemes) == set(wanted)


def test_schedules(studies):
    "Drops count images from the end, or are in proportion; both are the same at 2x; a smaller batch sees as many images."
    def schedule(**changes): return studies.schedule_of(studies.Setting(**changes), 720)
    assert schedule() == schedule(drops='share') and schedule().milestones == (120, 160) and schedule().steps == 180
    assert schedule(length=8).milestones == (660, 700) and schedule(length=8, drops='share').milestones == (480, 640)
    small = schedule(batch=1)
    assert (small.steps, small.warmup, small.milestones) == (1440, 8 * schedule().warmup, (960, 1280))
    assert small.lr == schedule().lr / 8


def test_pretrained_backbone(studies):
    "The classifier's backbone is put in; all else has the random weights of the seed."
    weights, facts = studies.classifier(0, 8)
    args, index = SimpleNamespace(unit=8, crops=8), SimpleNamespace(category_ids=range(6))
    random, seen = studies.build(studies.Setting()), {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(studies, 'training', lambda model, *rest: seen.update(model=model) or iter([(0, float('nan'), 0.)]))
        result = studies.run(studies.Setting(pretrained=True), index, None, args)
    assert result['classifier'] == facts and 0 <= facts['accuracy'] <= 1 and facts['crops'] > 0
    assert all(torch.equal(v, weights[k]) for k, v in seen['model'].backbone.state_dict().items())
    assert all(torch.equal(v, random.fpn.state_dict()[k]) for k, v in seen['model'].fpn.state_dict().items())
    assert not torch.equal(weights['stem.conv.weight'], random.backbone.state_dict()['stem.conv.weight'])


def test_a_run_that_diverges(studies, monkeypatch):
    "It ends, and counts as AP 0."
    monkeypatch.setattr(studies, 'training', lambda *args: iter([(0, 2., 0.), (1, float('inf'), 0.), (2, 1., 0.)]))
    result = studies.run(studies.Setting(), SimpleNamespace(category_ids=range(6)), None, SimpleNamespace(unit=8))
    assert (result['diverged'], result['AP50'], result['steps'], result['losses']) == (1, 0, 2, [2., None])


def test_every_study_runs(studies, tmp_path):
    "All settings of all studies; what two studies need is run once."
    studies.main([*studies.studies, '--out', str(tmp_path), *tiny])
    docs = {o: json.loads((tmp_path / f'{o}.json').read_text()) for o in studies.studies}
    for name, doc in docs.items():
        assert len(doc['runs']) == len(studies.studies[name]) > 1
        assert all(studies.same_run(*o) for o in zip(doc['runs'], studies.studies[name], strict=True))
        assert doc['command'] == f'python benchmarks/studies.py {name} --out results/{name}.json --seeds 0 --unit 8 --train 16 --val 4 --crops 8'
    assert docs['order']['runs'][0] == docs['init']['runs'][0] in docs['norm']['runs']


def test_a_stopped_study_goes_on(studies, tmp_path, monkeypatch):
    "Stopped in its third run, it keeps two; the next start makes the others alone, and one with another setup makes all."
    made, out = [], ['schedule', '--out', str(tmp_path / 'schedule.json'), *tiny]

    def run(setting, *args):
        if len(made) == 2 and not (tmp_path / 'stopped').exists():
            (tmp_path / 'stopped').touch()
            raise KeyboardInterrupt
        made.append(setting)
        return dict(studies.changes(setting), seed=setting.seed, AP50=0.)

    monkeypatch.setattr(studies, 'run', run)
    with pytest.raises(KeyboardInterrupt): studies.main(out)
    assert len(json.loads((tmp_path / 'schedule.json').read_text())['runs']) == 2
    studies.main(out)
    assert made == studies.studies['schedule']
    studies.main(out)
    assert len(made) == len(studies.studies['schedule'])
    studies.main([*out, '--unit', '16'])
    assert len(made) == 2 * len(studies.studies['schedule'])


def test_settings_are_told_apart(page, capsys):
    page.verdict('a', [3, 4, 5], 'b', [1, 2, 2.5])
    page.verdict('a', [1, 4, 5], 'b', [1, 2, 2.5])
    assert 'a - b: +2.2, all seeds above' in (said := capsys.readouterr().out) and 'not told apart' in said
    study = dict(command='c', seeds=[0, 1, 2], setup=dict(base=dict(batch=8, norm='GN')), runs=[dict(seed=s, AP50=s / 100) for s in (0, 1, 2)])
    assert page.by(study, 'norm') == dict(GN=[0, 1, 2]) and page.by(study, 'norm', 'batch') == {('GN', '8'): [0, 1, 2]}
    with pytest.raises(ValueError, match='no three seeds'): page.by(study | dict(runs=study['runs'][:2]), 'norm')


def test_every_seed_is_drawn(page):
    "A mark for each seed of each column, the means joined, where a series has a gap too; the last losses and the scatter are by hand."
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    page.lines(ax, dict(a={'1': [1, 2, 3], '4': [5, 6, 10]}, b={'4': [2, 2, 2]}), ['1', '2', '4'])
    means, seeds, _, more = ax.get_lines()
    assert list(means.get_ydata()) == [2, 7] and list(seeds.get_ydata()) == [1, 2, 3, 5, 6, 10] and len(more.get_ydata()) == 3
    assert [round(o) for o in seeds.get_xdata()] == [0, 0, 0, 2, 2, 2]
    study = dict(command='c', seeds=[0, 1, 2], setup=dict(base=dict(norm='GN')), runs=[dict(seed=s, losses=[9, s, s + 2]) for s in (2, 0, 1)])
    assert page.late(study, 'norm', reports=2) == dict(GN=[1, 2, 3]) and page.scatter(dict(a=[1, 2, 3], b=[0, 0, 0])) == .5 ** .5


pages = sorted((root / 'nbs/studies').glob('*.ipynb'))
told = sorted({o for page in pages for o in re.findall(r"study_page.*?load\('(\w+)'\)", page.read_text(), re.S)})


@pytest.mark.parametrize('name', told)
def test_results_are_complete(studies, name):
    "What a page reads has every setting of its study with three seeds or more, its command, and 60 kB at most."
    file = root / f'results/{name}.json'
    doc = json.loads(file.read_text())
    wanted = [replace(o, seed=s) for s in doc['seeds'] for o in studies.studies[name]]
    assert len(doc['seeds']) >= 3 and len(doc['runs']) == len(wanted)
    assert all(studies.same_run(*o) for o in zip(doc['runs'], wanted, strict=True))
    assert doc['command'] == f'python benchmarks/studies.py {name} --out results/{name}.json'
    assert all(o['cpu_seconds'] > 0 for o in doc['runs']) and doc['hardware']['torch'] and file.stat().st_size <= 60_000


def test_every_result_has_its_page(studies):
    assert told == sorted(o for o in studies.studies if (root / f'results/{o}.json').exists()) != []
