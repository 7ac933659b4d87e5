"What is installed: every module is in the wheel, the front page and the tools do what they say."
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pages import pages, root


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "The source archive of this tree, built without the network, from a copy."
    copy = tmp_path_factory.mktemp('sdist')/'copy'
    copied = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, copied.split('\0')):
        if not (root/name).is_file() or name.startswith('nbs/'): continue
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, copy/name)
    done = subprocess.run([sys.executable, 'setup.py', '--quiet', 'sdist'], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, = (copy/'dist').glob('scratchdet-*.tar.gz')
    return found


@pytest.fixture(scope='module')
def wheel(sdist):
    "The wheel that the source archive gives."
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--quiet', '--wheel-dir', sdist.parent, sdist]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, = sdist.parent.glob('scratchdet-*.whl')
    return found


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f'scratchdet/{o.name}' for o in (root/'scratchdet').glob('*.py')}
    assert len(pages) >= 22 and {f'scratchdet/{o.module}.py' for o in pages} <= modules
    assert {o for o in names if '.dist-info/' not in o} == modules


def test_the_archive_holds_what_it_is_built_from(sdist):
    names = {o.partition('/')[2] for o in tarfile.open(sdist).getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md', 'scratchdet/boxes.py'} <= names
    assert not [o for o in names if o.startswith(('tests', 'nbs', 'results', '.'))]


def test_the_wheel_works(wheel, tmp_path):
    "Unpacked elsewhere, all modules import from there, and the toy set is drawn."
    command = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--quiet', '--target', tmp_path/'there', wheel]
    subprocess.run(list(map(str, command)), check=True)
    names = ', '.join(f'scratchdet.{o.module}' for o in pages)
    code = f'import scratchdet, {names}; from scratchdet.toy import make_toy; make_toy("toy", 2, 1); print(scratchdet.__file__)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path/'there')})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path/'there/scratchdet/__init__.py')
    assert len(list((tmp_path/'toy').rglob('*.jpg'))) == 3


def test_commands_run_beside_a_clone(sdist, tmp_path):
    "Installed as `make install` does it, from the folder that holds the clone, where Python takes the clone's folder for a package."
    tarfile.open(sdist).extractall(tmp_path, filter='data')
    next(tmp_path.glob('scratchdet-*')).rename(tmp_path/'scratchdet')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv'], check=True)
    python, site = tmp_path/'venv/bin/python', next(tmp_path.glob('venv/lib/*/site-packages'))
    (site/'others.pth').write_text(sysconfig.get_path('purelib'))
    def run(*words):
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        done = subprocess.run([python, '-m', *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    run('pip', 'install', '--no-deps', '--no-build-isolation', '--ignore-installed', '--quiet', '--editable', tmp_path/'scratchdet')
    assert run('scratchdet.train', '--help').startswith('usage: python -m scratchdet.train')
    assert 'scratchdet' in run('scratchdet', '--help')


def test_versions_agree():
    import scratchdet
    text = (root/'settings.ini').read_text()
    assert f'\nversion = {scratchdet.__version__}\n' in text
    assert f'## {scratchdet.__version__}' in (root/'CHANGELOG.md').read_text()


@pytest.mark.parametrize('tag, version, heading, fault', [
    ('v1.2.0', '1.2.0', '1.2.0, 2026-01-31', None), ('v1.3.0', '1.2.0', '1.2.0, 2026-01-31', 'the tag is v1.3.0'),
    ('v1.2.0', '1.1.0', '1.2.0, 2026-01-31', '__init__.py has 1.1.0'), ('v1.2.0', '1.2.0', '1.2.0, not released yet', 'CHANGELOG.md'),
    ('v1.2.0', '1.2.0', '1.1.0, 2026-01-31', 'CHANGELOG.md')])
def test_a_release_is_what_its_tag_says(monkeypatch, tmp_path, tag, version, heading, fault):
    monkeypatch.syspath_prepend(root/'tools')
    import release
    (tmp_path/'scratchdet').mkdir()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nversion = 1.2.0\n')
    (tmp_path/'scratchdet/__init__.py').write_text(f'__version__ = "{version}"\n')
    (tmp_path/'CHANGELOG.md').write_text(f'# Changes\n\n## {heading}\n\n- All.\n\n## 1.0.0, 2025-01-31\n')
    found = release.faults(tag, tmp_path)
    assert found == [] if fault is None else len(found) == 1 and fault in found[0]


def test_workflows_name_what_is_here():
    "They are YAML with pinned actions; every script and target that they call exists, and nothing is published before tests and build."
    files = {o.stem: yaml.safe_load(o.read_text()) for o in (root/'.github/workflows').glob('*.yml')}
    assert set(files) == {'test', 'docs', 'release'}
    steps = [s for f in files.values() for j in f['jobs'].values() for s in j.get('steps', [])]
    commands = '\n'.join(s.get('run', '') for s in steps)
    assert all(re.fullmatch(r'[\w-]+/[\w-]+@(v\d+|release/v\d+)', s['uses']) for s in steps if 'uses' in s)
    targets = re.findall(r'\bmake (\S+)', commands)
    assert set(targets) == {'test', 'docs'} and all(f'\n{o}:' in (root/'Makefile').read_text() for o in targets)
    scripts = re.findall(r'\b(tools/\S+\.py)', commands)
    assert scripts == ['tools/release.py'] and (root/scripts[0]).exists()
    assert re.findall(r'-m (scratchdet\.\w+)', commands) == ['scratchdet.toy']
    jobs = files['release']['jobs']
    assert jobs['publish']['needs'] == ['test', 'build'] and jobs['publish']['permissions'] == {'id-token': 'write'}
    assert 'workflow_call' in files['test'][True] and jobs['test']['uses'] == './.github/workflows/test.yml'  # `on` reads as true


def test_one_command_measures_all():
    "`make bench` runs it, `make help` and the front page name it."
    def make(*words): return subprocess.run(['make', *words], cwd=root, capture_output=True, text=True, check=True).stdout
    assert 'python benchmarks/run.py\n' in make('-n', 'bench') and '\nmake bench ' in make('help')
    assert 'python benchmarks/run.py' in (root/'README.md').read_text()


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(root/'tools')
    import notebooks
    return notebooks


@pytest.mark.parametrize('saved, fresh, equal', [
    ('AP 0.500', 'AP 0.505', True), ('AP 0.50', 'AP 0.56', False), ('AP 0.5', 'AR 0.5', False), ('3 boxes', '4 boxes', False),
    ('a   1.0\n', 'a 1.0', True), ('1e-7 x', '1e-7 x', True), ('tensor([1.5, -2.5])', 'tensor([1.5, 2.5])', False), ('', '', True),
    ('[1.0]', '[1.0, 2.0]', False), ('', 'x', False)])
def test_outputs_are_compared_as_words_and_numbers(notebooks, saved, fresh, equal):
    assert notebooks.same(saved, fresh) == equal


def notebook(path, *cells):
    "A notebook of code cells (source, text shown)."
    import nbformat
    new = nbformat.v4
    outputs = [[new.new_output('stream', text=text)] if text else [] for _, text in cells]
    code = [new.new_code_cell(source, outputs=o) for (source, _), o in zip(cells, outputs)]
    nbformat.write(new.new_notebook(cells=code), path)
    return path


def test_a_notebook_that_shows_something_else_fails(tmp_path):
    def check(*paths):
        command = [sys.executable, str(root/'tools/notebooks.py'), 'check', *map(str, paths)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)
    good = notebook(tmp_path/'good.ipynb', ('x = 1', ''), ('print(x)', '1\n'), ('#| slow\n1/0', ''))
    other = notebook(tmp_path/'other.ipynb', ('print(2)', '1\n'))
    broken = notebook(tmp_path/'broken.ipynb', ('1/0', ''))
    assert check(good).returncode == 0
    done = check(good, other, broken)
    assert done.returncode == 1 and '2 of 3 notebooks fail' in done.stderr and f'run {other} {broken}' in done.stderr
    assert "saved '1'" in done.stdout and 'division by zero' in done.stdout


def test_the_front_page_becomes_markdown(monkeypatch):
    monkeypatch.syspath_prepend(root/'tools')
    import docs
    def cell(kind, source, *outputs): return SimpleNamespace(cell_type=kind, source=source, get=lambda k, d: list(outputs) or d)
    assert docs.as_markdown(cell('markdown', '# Title')) == '# Title'
    assert docs.as_markdown(cell('code', '#| hide\nx = 1')) == ''
    table = dict(data={'text/markdown': '| a |'})
    assert docs.as_markdown(cell('code', '#| echo: false\nx', table)) == '| a |'
    assert docs.as_markdown(cell('code', 'x', dict(text='1\n'))) == '```python\nx\n```\n\n```\n1\n```'
    with pytest.raises(SystemExit, match='no pictures'): docs.as_markdown(cell('code', 'x', dict(data={'image/png': ''})))


def test_the_front_page_is_used_as_written(tmp_path, monkeypatch):
    "What it does with the model of `make demo`, done with one of the same kind."
    from scratchdet.detector import mask_rcnn
    from scratchdet.init import init_detector
    from scratchdet.toy import make_toy, toy_names
    from scratchdet.weights import save_model
    code, = re.findall(r'```python\n(.*?load_model\(.*?)```', (root/'README.md').read_text(), re.S)
    model = mask_rcnn(num_classes=6, blocks=(1, 1, 1, 1), width=32, channels=32, fc=32)
    init_detector(model)
    monkeypatch.chdir(tmp_path)
    make_toy('demo/toy', 1, 1)
    Path('demo/run').mkdir()
    save_model('demo/run/model.safetensors', model, dict(category_names=list(toy_names)))
    exec(code, {})
    assert Path('found.png').stat().st_size > 1000
