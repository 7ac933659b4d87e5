"Every command, found by its `parse_args`: what --help says and how soon, what --quiet leaves, how a failure looks."
import argparse
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from pages import pages, root
from runs import tiny, toy  # noqa: F401

import scratchdet
from scratchdet.recipes import save_recipe
from scratchdet.train import parse_args, train

commands = [o.module for o in pages if 'parse_args' in {node.name for _, node in o.symbols}]
each = pytest.mark.parametrize('name', commands)
units = re.compile(r'\b(px|images|processes|GPUs|groups of every GroupNorm|0 to 1|0 to 255|another seed)\b')


class Stopped(Exception): "Raised with the parser, in place of parsing."


def parser(name, monkeypatch):
    "The parser that a command would use."
    def stop(self, *args): raise Stopped(self)
    with monkeypatch.context() as m:
        m.setattr(argparse.ArgumentParser, 'parse_args', stop)
        with pytest.raises(Stopped) as e: import_module(f'scratchdet.{name}').parse_args([])
    return e.value.args[0]


def actions(p):
    "All arguments of a parser and of the parsers below it."
    for o in p._actions:
        if isinstance(o, argparse._SubParsersAction):
            for below in o.choices.values(): yield from actions(below)
        elif not isinstance(o, argparse._HelpAction): yield o


def filled(p, word):
    "Words for all that must be given, `word` wherever any would do."
    one_of = {g._group_actions[0] for g in p._mutually_exclusive_groups if g.required}
    for o in p._actions:
        if isinstance(o, argparse._SubParsersAction):
            first = next(iter(o.choices))
            yield from (first, *filled(o.choices[first], word))
        elif o.required or not o.option_strings or o in one_of:
            yield from o.option_strings[-1:]
            yield next(iter(o.choices)) if o.choices else '1' if o.type in (int, float) else word


def test_commands_are_found():
    "`python -m scratchdet` lists them all."
    assert {'toy', 'plan', 'train', 'evaluate', 'predict', 'report', 'checkpoints'} <= set(commands)
    files = sorted((root/'scratchdet').glob('[!_]*.py'))
    assert sorted(commands) == [o.stem for o in files if "\nif __name__ == '__main__'" in o.read_text()]
    done = subprocess.run([sys.executable, '-m', 'scratchdet'], capture_output=True, text=True, check=True)
    assert sorted(re.findall(r'python -m scratchdet\.(\w+)', done.stdout)) == sorted(commands)


def test_help_of_training_shows_the_recipe_that_is_asked_for(capsys):
    for words, told in (['--recipe', 'demo'], 'as demo has them'), (['--recipe'], 'as mask_rcnn_r50_fpn_gn_scratch_6x has them'):
        with pytest.raises(SystemExit): parse_args([*words[:2], '--help'] if words[1:] else ['--help', *words])
        said = capsys.readouterr().out
        assert told in said and ('long_side=160 ' in said) == ('demo' in told)


@each
def test_help_is_complete(name, monkeypatch):
    "A meaning for each option; a default where it may be left out; a unit where it is a number; --quiet."
    found = list(actions(parser(name, monkeypatch)))
    assert ['--quiet'] in [o.option_strings for o in found] and not [o.dest for o in found if not o.help]
    for o in found:
        optional = o.option_strings and not o.required and o.nargs != 0 and not o.choices
        if optional: assert '(default: ' in o.help, o.dest
        if optional and o.default not in (None, []):
            values = o.default if isinstance(o.default, (tuple, list)) else [o.default]
            assert f'(default: {" ".join(map(str, values))})' in o.help, o.dest
        if o.type in (int, float): assert units.search(o.help), o.dest


@pytest.mark.parametrize('option, code', [('--help', 0), ('--no-such-option', 2)])
@each
def test_commands_answer_at_once(name, option, code):
    "In processor time, so that a busy machine does not matter; importing torch alone takes about as long."
    before = os.times()
    words = [sys.executable, '-X', 'importtime', '-m', f'scratchdet.{name}', option]
    done = subprocess.run(words, capture_output=True, text=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == code and f'usage: python -m scratchdet.{name} ' in done.stdout + done.stderr
    assert 'Traceback' not in done.stderr and spent < 3
    modules = set(re.findall(r'\|\s+([\w.]+)$', done.stderr, re.M))
    assert 'argparse' in modules and not {'torch', 'numpy', 'accelerate', 'matplotlib'} & modules


@each
def test_a_failure_is_one_line(name, monkeypatch, tmp_path, capfd):
    "Files below a file can be neither read nor written."
    (tmp_path/'file').touch()
    words = list(filled(parser(name, monkeypatch), str(tmp_path/'file/below')))
    module = import_module(f'scratchdet.{name}')
    with pytest.raises(SystemExit) as e: module.main(module.parse_args(words))
    assert re.fullmatch(rf'scratchdet\.{name}: .+', e.value.code) and str(tmp_path/'file') in e.value.code
    assert capfd.readouterr() == ('', '')


@pytest.fixture(scope='module')
def words(tmp_path_factory, toy):  # noqa: F811
    "What each command does well, in its own words, and in a folder where a run has ended."
    at = tmp_path_factory.mktemp('commands')
    save_recipe(tiny, recipe := at/'recipe.json')
    train(tiny, toy, at/'run', cpu=True, progress=False)
    weights = at/'run/model.safetensors'
    return dict(
        check=f'--coco {toy}',
        coco=f'subset --coco {toy} --images 4 --out {at}/few',
        toy=f'--out {at}/toy --train 2 --val 1 --size 32 48',
        plan=f'--recipe {recipe} --processes 2 --images-per-second 3 --coco {toy}',
        train=f'--recipe {recipe} --coco {toy} --out {at}/new --cpu --set epochs=1',
        evaluate=f'--weights {weights} --coco {toy} --out {at}/ap --cpu --workers 0',
        predict=f'{toy}/val2017 --weights {weights} --out {at}/pictures --cpu',
        report=f'{at}/run --out {at}/report.html --coco {toy} --cpu',
        export=f'--weights {at}/run --out {at}/model.pt2 --size 64 96',
        checkpoints=f'convert --to mmdet {weights} {at}/model.pth')


def test_all_commands_are_run(words): assert set(words) == set(commands)


@pytest.mark.parametrize('name', ['coco', 'toy', 'train', 'evaluate', 'predict'])
def test_a_file_in_place_of_a_folder(name, words, tmp_path):
    "One line that names it, not Python's words; the file is as before."
    (file := tmp_path/'notes.txt').write_text('kept')
    module, first = import_module(f'scratchdet.{name}'), words[name].split()
    for out in (file, file/'below'):
        with pytest.raises(SystemExit) as e: module.main(module.parse_args([*first, '--out', str(out), '--quiet']))
        assert e.value.code == f'scratchdet.{name}: {file} is a file: give a folder'
    assert file.read_text() == 'kept'


@each
def test_quiet_is_quiet(name, words, capfd, recwarn):
    "Nothing to read where nothing is wrong, warnings that Python shows included."
    module, silent = import_module(f'scratchdet.{name}'), (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)
    module.main(module.parse_args([*words[name].split(), '--quiet']))
    assert capfd.readouterr() == ('', '')
    assert not [str(o.message) for o in recwarn if not issubclass(o.category, silent)]


def interrupted(name, words, ready):
    "Exit status and error stream of a command that gets a SIGINT as soon as `ready(pid)`."
    def listens(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell has put behind it does not
    command = [sys.executable, '-m', f'scratchdet.{name}', *words.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listens) as process:
        while not ready(process.pid):
            assert process.poll() is None
            time.sleep(.01)
        process.send_signal(signal.SIGINT)
        return process.wait(), process.stderr.read()


@pytest.mark.parametrize('name', ['toy', 'check', 'train', 'evaluate', 'predict', 'report'])
def test_ctrl_c_is_one_line(name, words):
    "As soon as PyTorch is being loaded, which is when it comes as a rule."
    def loads(pid): return 'libtorch_cpu' in Path(f'/proc/{pid}/maps').read_text()
    status, text = interrupted(name, words[name], loads)
    assert status != 0 and text == f'\nscratchdet.{name}: stopped by Ctrl-C\n'


def unread(*words):
    "Exit status and error stream of a command of whose output nobody reads a line."
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, 'PYTHONUNBUFFERED': ''}
    try: done = subprocess.run([sys.executable, '-m', *words], stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    finally: os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize('name', ['scratchdet', *(f'scratchdet.{o}' for o in commands)])
def test_a_reader_that_has_gone_ends_help(name): assert unread(name, '--help') == (-signal.SIGPIPE, '')


@pytest.mark.parametrize('name', ['check', 'train', 'plan'])
def test_a_reader_that_has_gone_ends_the_work(name, words):
    "While it is on, and at its end; a run's bar may stand on the error stream, and no word after it."
    status, text = unread(f'scratchdet.{name}', *words[name].split())
    assert status == -signal.SIGPIPE and 'Traceback' not in text and 'roken' not in text and 'gone' not in text


def test_the_version():
    done = subprocess.run([sys.executable, '-m', 'scratchdet', '--version'], capture_output=True, text=True, check=True)
    assert done.stdout == f'scratchdet {scratchdet.__version__}\n' and not done.stderr


@pytest.mark.parametrize('words, says', [
    ('train --cpu', 'scratchdet: commands have a dot: python -m scratchdet.train'), ('learn', "scratchdet: 'learn' is no command\ncommands:")])
def test_a_space_in_place_of_the_dot(words, says):
    done = subprocess.run([sys.executable, '-m', 'scratchdet', *words.split()], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(says) and not done.stdout


@each
def test_a_misspelt_option_is_named(name, monkeypatch, capsys):
    "Also where the command lacks another, or the option itself."
    whole = list(filled(parser(name, monkeypatch), 'x'))
    for words in [whole[:1]] if name in ('coco', 'checkpoints') else [whole, []]:
        with pytest.raises(SystemExit) as e: import_module(f'scratchdet.{name}').parse_args([*words, '--quiett'])
        assert e.value.code == 2 and capsys.readouterr().err.endswith('; there is no --quiett, did you mean --quiet?\n')
