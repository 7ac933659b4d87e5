"Run notebooks and save what they show, or check that what is saved is what they show."
import argparse
import re
import sys
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


def run(path):
    "Run the notebook at `path` from top to bottom; returns it with fresh outputs, and the seconds it took."
    path = Path(path).resolve()
    flags, nb, start = set(get_config().tst_flags.split()), read_nb(path), time.time()
    shell = CaptureShell(path, mpl_format='png')
    with working_directory(path.parent):
        for cell in nb.cells:
            if skipped(cell, flags): continue
            shell.cell(cell)
            if shell.exc: raise SystemExit(f'{path.name}: this cell fails\n{cell.source}\n' + shell.prettytb(fname=path))
    return nb, time.time() - start


def shown(nb):
    "What each code cell of `nb` shows: a list of (source, texts, number of pictures)."
    rows = []
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        outputs, texts, pictures = cell.get('outputs', []), [], 0
        for o in outputs:
            data = o.get('data', {})
            pictures += 'image/png' in data
            if 'image/png' not in data: texts.append(''.join(o.get('text', data.get('text/plain', ''))))
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


def main():
    "`run` executes, saves and cleans; `check` executes and compares with what is saved."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('action', choices=['run', 'check'])
    parser.add_argument('notebooks', nargs='+', type=Path)
    args, failed = parser.parse_args(), 0
    for path in args.notebooks:
        nb, seconds = run(path)
        bad = list(differences(read_nb(path), nb)) if args.action == 'check' else []
        if args.action == 'run': write_nb(nb, path)
        print(f'{path.name}: {seconds:.1f} s', *bad, sep='\n', flush=True)
        failed += bool(bad)
    if failed: sys.exit(f'{failed} notebooks show something else than they save: python tools/notebooks.py run NOTEBOOK')


if __name__ == '__main__': main()
