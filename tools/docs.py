"Build the site from the notebooks, check it, and turn `nbs/index.ipynb` into README.md."
import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbdev.processors
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.serve import proc_nbs


def directives(cell):
    "The words after `#|` of a cell, as a set of lines without spaces."
    return {o[2:].replace(' ', '') for o in cell.source.splitlines() if o.startswith('#|')}


def as_markdown(cell):
    "One cell of the index page as Markdown: its text, or its code and what it shows; '' for a hidden one."
    if cell.cell_type == 'markdown': return cell.source
    flags = directives(cell)
    if cell.cell_type != 'code' or flags & {'hide', 'include:false'}: return ''
    code = '\n'.join(o for o in cell.source.splitlines() if not o.startswith('#|'))
    parts = [] if 'echo:false' in flags else [f'```python\n{code}\n```']
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        if 'image/png' in data: raise SystemExit('nbs/index.ipynb: README.md takes no pictures from cells; link to a file')
        if 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
        else: parts.append('```\n' + ''.join(out.get('text', data.get('text/plain', ''))).rstrip() + '\n```')
    return '\n\n'.join(parts)


def readme():
    "README.md as text."
    cells = read_nb(get_config().nbs_path/get_config().readme_nb).cells
    note = '<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->'
    text = '\n\n'.join([note, *filter(None, map(as_markdown, cells))]) + '\n'
    return re.sub(r'\]\((?=[\w/]+\.ipynb)', '](nbs/', text)


def write_readme(check):
    "Write README.md, or fail when it is not what the index page gives."
    path = get_config().config_path/'README.md'
    if not check: return path.write_text(readme(), encoding='utf-8')
    if path.read_text(encoding='utf-8') != readme(): sys.exit('README.md is not what nbs/index.ipynb gives: make readme')
    print('README.md is what nbs/index.ipynb gives')


def needed(cell):
    "True for the cells that must be executed to print signatures: `show_doc`, what is exported, imports alone."
    code = cell.cell_type == 'code' and 'eval:false' not in directives(cell) and cell.parsed_()
    if not code: return False
    imports = all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in code)
    return imports or 'export' in cell.directives_ or '\nshow_doc(' in cell.source


def process():
    "The notebooks as the site shows them, in `_proc`: exported code becomes documentation. One process imports torch once."
    nbdev.processors._do_eval = needed
    cache = proc_nbs(n_workers=0, force=True)
    for path in cache.rglob('*.ipynb'):  # a page keeps its number, whatever renders it
        path.write_text(re.sub(r'output-file: [^"]*?\\n', '', path.read_text(encoding='utf-8'), count=1), encoding='utf-8')
    return cache


def renderer():
    "The command that turns `_proc` into a site: Quarto where it is installed, smalldocs otherwise."
    if shutil.which('quarto'): return ['quarto', 'render', '--no-cache']
    smalldocs = Path(sys.executable).parent/'smalldocs'
    if smalldocs.exists(): return [smalldocs, 'render', '.']
    sys.exit('the site needs Quarto (https://quarto.org) or, from Python 3.11 on, pip install smalldocs')


def build():
    "The site, in `_docs`."
    command, out = renderer(), get_config().doc_path
    cache = process()
    if subprocess.run(command, cwd=cache).returncode: sys.exit(f'{command[0]} cannot build the site')
    if out.exists(): shutil.rmtree(out)
    shutil.move(cache/out.name, out)
    print(f'the site is in {out}: open {out/"index.html"}')


def check():
    "Every page is built from its notebook, no option is unknown, and no link leads nowhere."
    smalldocs = Path(sys.executable).parent/'smalldocs'
    if not smalldocs.exists(): return print('the site is not checked: smalldocs needs Python 3.11')
    if subprocess.run([smalldocs, 'check', process()]).returncode: sys.exit('smalldocs finds fault with the site')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest='action', required=True)
    actions.add_parser('build', help='the site, in _docs')
    actions.add_parser('check', help='links, options, Markdown')
    actions.add_parser('readme', help='README.md from the index page').add_argument('--check', action='store_true')
    args = parser.parse_args()
    if args.action == 'readme': write_readme(args.check)
    else: dict(build=build, check=check)[args.action]()


if __name__ == '__main__': main()
