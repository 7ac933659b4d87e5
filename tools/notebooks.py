"""Run notebooks: save what they show, compare it with what is saved, or only try them; or check that they are exported and clean.

With --commands a notebook is a tutorial that a reader follows: the commands in its text are run too, where they stand, and so are its slow cells, all
in an empty folder. Commands are fenced as `bash`. A fence of `sh` is not run, and its first line says what it needs: `# needs a GPU`."""
import argparse
import filecmp
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.foundation import working_directory
from nbdev.config import get_config


def skipped(cell, flags):
    "True for what is not run: text, `#| eval: false`, and cells flagged with a word of `tst_flags`."
    if cell.cell_type != 'code': return True
    lines = [o[2:].strip() for o in cell.source.splitlines() if o.startswith('#|')]
    return any(o.replace(' ', '') == 'eval:false' or o in flags for o in lines)


def fences(text):
    "The fenced blocks of a text: a list of (language, content)."
    return re.findall(r'^```([^\n`]*)\n(.*?)^```\s*$', text, flags=re.S | re.M)


def run_command(text):
    "Run a block of shell commands as a reader would, who stops at the first that fails; what it prints is shown then."
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', text], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode: raise RuntimeError(f'this command fails with code {done.returncode}\n{text}\n{done.stdout[-4000:]}')


def run_cells(path, nb, flags, commands):
    "Run the cells of `nb` in the current folder, from top to bottom, and with `commands` what a reader would type between them."
    shell = CaptureShell(path, mpl_format='png')
    for cell in nb.cells:
        if commands and cell.cell_type == 'markdown':
            for language, text in fences(cell.source):
                if language == 'bash': run_command(text)
        if skipped(cell, flags): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc: raise RuntimeError(f'this cell fails\n{cell.source}\n' + shell.prettytb(fname=path))


def run(path, commands=False):
    "Run the notebook at `path`; returns it with fresh outputs, and the seconds it took."
    path, config = Path(path).resolve(), get_config()
    flags = set(config.tst_flags.split()) - ({'slow'} if commands else set())
    nb, start = read_nb(path), time.time()
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty)/'recipes').symlink_to(config.config_path/'recipes')  # as in a clone
        with working_directory(empty if commands else path.parent): run_cells(path, nb, flags, commands)
    return nb, time.time() - start


def shown(nb):
    "What each code cell of `nb` shows: a list of (source, text, number of pictures)."
    rows = []
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        texts, pictures = [], 0
        for o in cell.get('outputs', []):
            data = o.get('data', {})
            pictures += 'image/png' in data
            text = o.get('text', data.get('text/markdown', data.get('text/plain', '')))
            if 'image/png' not in data: texts.append(''.join(text))
        rows.append((cell.source, ''.join(texts).strip(), pictures))
    return rows


NUMBER = re.compile(r'[-+]?\d+\.\d+(?:e[-+]?\d+)?')


def same(saved, fresh, rel=.02):
    "True when two outputs agree: the same words, and numbers with a point within `rel` (other processors round elsewhere)."
    words, numbers = (lambda s: ' '.join(NUMBER.sub('#', s).split())), (lambda s: [float(o) for o in NUMBER.findall(s)])
    if words(saved) != words(fresh): return False
    return all(abs(a - b) <= rel * max(abs(a), abs(b)) + 1e-2 for a, b in zip(numbers(saved), numbers(fresh)))


def differences(saved, fresh):
    "One line for every cell whose saved output is not what a fresh run shows."
    for (source, old, pics_old), (_, new, pics_new) in zip(shown(saved), shown(fresh)):
        if pics_old != pics_new: yield f'{pics_old} pictures saved, {pics_new} shown by:\n{source}'
        if not same(old, new): yield f'saved {old[:300]!r}\nshown {new[:300]!r}\nby:\n{source}'


def execute(job):
    "Run one notebook, in a process of its own; returns its report and whether something is wrong."
    action, commands, path = job
    if action != 'try': os.environ.pop('SCRATCHDET_COCO', None)  # what is saved shows the toy set
    try: nb, seconds = run(path, commands)
    except Exception as e: return f'{path}: {e}', True
    bad = list(differences(read_nb(path), nb)) if action == 'check' else []
    if action == 'run': write_nb(nb, path)
    return '\n'.join([f'{path}: {seconds:.1f} s', *bad]), bool(bad)


def execute_all(action, paths, jobs, commands=False):
    "Run every notebook of `paths` in a fresh process, `jobs` at a time; returns those that are wrong."
    if jobs > 1: os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
    failed = []
    with multiprocessing.get_context('spawn').Pool(jobs, maxtasksperchild=1) as pool:
        for path, (report, bad) in zip(paths, pool.imap(execute, [(action, commands, o) for o in paths], chunksize=1)):
            print(report, flush=True)
            if bad: failed.append(str(path))
    return failed


def files(root, folders=('nbs', 'scratchdet')):
    "The files below `folders` that an export or a clean may change, relative to `root`."
    found = {p.relative_to(root) for o in folders for p in (root/o).rglob('*') if p.suffix in ('.ipynb', '.py')}
    hidden = ('.', '_proc', '__pycache__')
    found = {p for p in found if p.suffix == '.ipynb' or p.parts[0] != 'nbs'}
    return {p for p in found if not any(o.startswith(hidden) for o in p.parts)} | {Path('pyproject.toml')}


def stale(root):
    "The files that `nbdev_export` and `nbdev_clean` would add, change or leave over, found on a copy of `root`."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        copy.mkdir()
        for o in (files(root) - {Path('pyproject.toml')}) | {Path('settings.ini'), Path('README.md'), Path('setup.py')}:
            (copy/o).parent.mkdir(parents=True, exist_ok=True)
            if o.suffix != '.py' or o.name in ('__init__.py', 'setup.py'): shutil.copy2(root/o, copy/o)
        for command in ('nbdev_export', 'nbdev_clean'):
            subprocess.run([Path(sys.executable).parent/command], cwd=copy, check=True)
        both = files(root) | files(copy)
        return sorted(str(o) for o in both if not (root/o).exists() or not (copy/o).exists()
                      or not filecmp.cmp(root/o, copy/o, shallow=False))


def main():
    "`run` executes and saves; `check` executes and compares with what is saved; `try` executes, on `$SCRATCHDET_COCO`; `sync` checks export and clean."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('action', choices=['run', 'check', 'try', 'sync'])
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--jobs', type=int, default=1, help='notebooks executed at a time')
    parser.add_argument('--commands', action='store_true', help='run the commands in the text and slow cells too, in an empty folder')
    args = parser.parse_intermixed_args()
    if args.action == 'sync':
        bad = stale(Path.cwd())
        if bad: sys.exit('make export changes these files; run it and commit them:\n' + '\n'.join(bad))
        return print('notebooks are clean, and the modules are what they export')
    if not args.notebooks: parser.error(f'{args.action} needs the paths of notebooks')
    failed = execute_all(args.action, args.notebooks, args.jobs, args.commands)
    if failed and args.action == 'check':
        sys.exit(f'{len(failed)} of {len(args.notebooks)} notebooks fail, or show something else than they save: '
                 f'mend them, or python tools/notebooks.py run {" ".join(failed)}')
    if failed: sys.exit(f'{len(failed)} of {len(args.notebooks)} notebooks fail: {" ".join(failed)}')


if __name__ == '__main__': main()
