"Build the site from the notebooks, check it, and turn `nbs/index.ipynb` into README.md."
import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def smalldocs(*words):
    "Run smalldocs on the processed notebooks; fail when it does."
    program = Path(sys.executable).parent/'smalldocs'
    if not program.exists(): sys.exit('the site needs Quarto (https://quarto.org) or, from Python 3.11 on, pip install smalldocs')
    if subprocess.run([program, *words]).returncode: sys.exit(f'smalldocs {words[0]} finds fault with the site')


def build():
    "The site in `_docs`: with Quarto where it is installed, with smalldocs otherwise."
    if shutil.which('quarto'): return subprocess.run([Path(sys.executable).parent/'nbdev_docs'], check=True)
    cfg, cache = get_config(), proc_nbs()
    smalldocs('render', str(cache))
    if cfg.doc_path.exists(): shutil.rmtree(cfg.doc_path)
    shutil.copytree(cache/cfg.doc_path.name, cfg.doc_path)
    print(f'the site is in {cfg.doc_path}: open {cfg.doc_path/"index.html"}')


def check():
    "Every page is built from its notebook, and no link leads nowhere."
    if sys.version_info < (3, 11): return print('the site is not checked on Python 3.10: smalldocs needs 3.11')
    smalldocs('check', str(proc_nbs(force=True)))


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
