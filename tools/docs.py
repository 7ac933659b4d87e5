"Build the site from the notebooks, check it, and turn `nbs/index.ipynb` into README.md."
import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import nbglob, patch_name
from nbdev.processors import FilterDefaults
from picture import pictures

definition = ast.FunctionDef, ast.ClassDef


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


def website(): return yaml.safe_load((get_config().nbs_path/'_quarto.yml').read_text(encoding='utf-8'))['website']


def sections(nbs):
    "Names of the sidebar's sections, and the notebooks of each, in reading order."
    found = [o for o in website()['sidebar']['contents'] if isinstance(o, dict)]
    files = [sorted(nbs.glob(o['contents'])) if isinstance(o['contents'], str) else [nbs/p for p in o['contents']] for o in found]
    return {o['section']: f for o, f in zip(found, files)}


def listed(text):
    "Markdown with the list of all pages in place of its mark."
    nbs = get_config().nbs_path
    if '<!-- pages -->' not in text: return text
    def link(path): return f'[{read_nb(path).cells[0].source.splitlines()[0][2:]}]({path.relative_to(nbs)})'
    lines = [f'- **{name}**: ' + ', '.join(map(link, paths)) for name, paths in sections(nbs).items()]
    return text.replace('<!-- pages -->', '\n'.join(lines))


def readme():
    "README.md as text: links to the repository's files are short, those beside the notebook lead to their folder."
    cells = read_nb(get_config().nbs_path/get_config().readme_nb).cells
    note = '<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->'
    text = listed('\n\n'.join([note, *filter(None, map(as_markdown, cells))]) + '\n')
    text = re.sub(r'(\]\(|src="|srcset=")(?=[\w/-]+\.(?:ipynb|svg))', r'\1nbs/', text)
    return re.sub(rf'\]\({re.escape(website()["repo-url"])}/(?:blob|tree)/main/', '](', text)


def front():
    "Files that are made from the notebooks for whoever reads the repository: README.md and its pictures."
    files = {f'nbs/{name}': text for name, text in pictures().items()}
    return {get_config().config_path/name: text for name, text in {'README.md': readme(), **files}.items()}


def text_faults(path):
    "Links and pictures of a Markdown file of the repository that lead nowhere, as GitHub would follow them."
    text = path.read_text(encoding='utf-8')
    prose = re.sub(r'^```.*?^```|`[^`\n]*`', '', text, flags=re.S | re.M)
    places = {re.sub(r'[^\w\- ]', '', o.strip().lower()).replace(' ', '-') for o in re.findall(r'^#+ (.*)$', prose, re.M)}
    links = re.findall(r'\]\(([^)\s]+)\)', prose) + re.findall(r'(?:href|src|srcset)="([^"]*)"', prose)
    def leads(link):
        parts = urlsplit(link)
        if parts.scheme: return True
        return (path.parent/unquote(parts.path)).exists() and (parts.path or unquote(parts.fragment) in places)
    return [f'{path.name}: {o} leads nowhere' for o in links if not leads(o)]


def write_readme(check):
    "Write README.md and its pictures, or fail when they are not what the index page gives, or when a link leads nowhere."
    files = front()
    if not check:
        for path, text in files.items(): path.write_text(text, encoding='utf-8')
        return
    stale = [o.name for o, text in files.items() if not o.exists() or o.read_text(encoding='utf-8') != text]
    if stale: sys.exit(f'{", ".join(stale)}: not what nbs/index.ipynb and tools/picture.py give: make readme')
    found = [fault for o in sorted(get_config().config_path.glob('*.md')) for fault in text_faults(o)]
    if found: sys.exit('\n'.join(found))
    print('README.md is what nbs/index.ipynb gives')


def defined(cell):
    "Names of the public functions, classes and patched methods that an exported cell defines."
    if 'export' not in directives(cell): return []
    return [patch_name(o) for o in cell.parsed_() or [] if isinstance(o, definition) and not o.name.startswith('_')]


def arguments(cell):
    "Names of the arguments of a cell's functions, and of the fields of its classes."
    nodes = [n for o in cell.parsed_() or [] for n in ast.walk(o)]
    fields = {f.target.id for n in nodes if isinstance(n, ast.ClassDef) for f in n.body if isinstance(f, ast.AnnAssign)}
    return fields | {n.arg for n in nodes if isinstance(n, ast.arg)}


class Names:
    "Where each public name is explained: its page, and the heading over its cell. The anchor is `module.name`."
    def __init__(self, paths):
        self.places, self.modules, self.arguments = {}, {}, {}
        for path in paths:
            cells = [o for o in read_nb(path).cells if o.cell_type == 'code']
            self.arguments[path] = set().union(*map(arguments, cells))
            module = next((o[1] for o in (re.search(r'#\|\s*default_exp\s+(\S+)', c.source) for c in cells) if o), None)
            self.modules[path] = module
            for name in (n for c in cells for n in defined(c)): self.places.setdefault(name, []).append(path)

    def address(self, path, name, page):
        "Link from a page to a name on the page of `path`, or to that page as a whole; '' for a page to itself."
        anchor = f'#{self.modules[path]}.{name}' if path in self.places.get(name, []) else ''
        return ('' if path == page else os.path.relpath(path, page.parent)) + anchor

    def meant(self, name, page):
        "Pages that a name can mean: its own if it is defined there, none for an argument; a function and another page's module are two."
        paths = self.places.get(name) or self.pages(name)
        if page in paths: return [page]
        if name in self.arguments[page]: return []
        return [*paths, *(o for o in self.pages(f'{get_config().lib_name}.{name}') if paths and o not in paths)]

    def link(self, name, page):
        "Link from a page to where the name is explained, or None: the name is unknown or, like `main`, explained on several other pages."
        paths = self.meant(name, page)
        return self.address(paths[0], name, page) or None if len(paths) == 1 else None

    def doubtful(self, text, page):
        "Names in backticks without a link that mean a function of one page or the module of another."
        plain = re.sub(r'^```.*?^```|^#.*?$|\[[^\]\n]*\]\([^)\n]*\)', '', text, flags=re.S | re.M)
        said = set(re.findall(r'`(\w+)(?:\([^`]*\))?`', plain))
        return sorted(o for o in said if len(self.places.get(o, [])) == 1 and len(self.meant(o, page)) > 1)

    def pages(self, module):
        "The page of `package.module`, in a list; none for what is not ours."
        return [p for p, m in self.modules.items() if module == f'{get_config().lib_name}.{m}']

    def imported(self, page):
        "Links of what the code of a page imports from the package: modules, and names from them."
        trees = [o.parsed_() or [] for o in read_nb(page).cells]
        nodes = [n for tree in trees for o in tree for n in ast.walk(o) if isinstance(n, ast.ImportFrom)]
        found = [(n, p) for n in nodes for p in self.pages(n.module)]
        links = {n.module: self.address(p, '', page) for n, p in found}
        links |= {a.asname or a.name: self.address(p, a.name, page) for n, p in found for a in n.names}
        return {k: v.replace('.ipynb', '.html') for k, v in links.items() if v}

    def linked(self, text, page):
        "Markdown with links under the names in backticks; headings, fenced code and what is a link already stay."
        def link(found):
            target = self.link(found[1], page)
            return f'[{found[0]}]({target})' if target else found[0]
        parts = re.split(r'(^```.*?^```|^#.*?$|\[[^\]\n]*\]\([^)\n]*\))', text, flags=re.S | re.M)
        parts[::2] = [re.sub(r'`([\w.]+)(?:\([^`]*\))?`', link, o) for o in parts[::2]]
        return ''.join(parts)


def linked_code(text, links):
    "A built page with links under names in its Python; strings, comments and keywords of calls stay."
    names = '|'.join(sorted(map(re.escape, links), key=len, reverse=True))
    token = re.compile(rf'<span class="(?:st|ss|co)">.*?</span>|\.(?:<[^>]+>)*\w+|<[^>]+>|(?<!\w)({names})(?!\w|\s*(?:<span class="op">)?=(?!=))', re.S)
    def link(found): return f'<a href="{links[found[1]]}">{found[1]}</a>' if found[1] else found[0]
    def block(found): return token.sub(link, found[0])
    return re.sub(r'<code class="sourceCode python">.*?</code>', block, text, flags=re.S) if links else text


def page(path, names):
    "A notebook as the site shows it: what is exported under a heading with its name, names linked, hidden cells left out."
    nb = read_nb(path)
    headings = {o.id: defined(o) for o in nb.cells if o.cell_type == 'code'}
    FilterDefaults()(nb)  # without what settings.ini skips: signatures in place of the code, links to the published site
    nb.cells[0].source = re.sub(r'^output-file: .*\n', '', nb.cells[0].source, flags=re.M)  # a page keeps its number
    cells = []
    for cell in nb.cells:
        module = names.modules[path]
        cells += [mk_cell(f'### `{o}` {{#{module}.{o} .symbol}}', 'markdown') for o in headings.get(cell.get('id'), [])]
        if cell.cell_type == 'markdown': cell.source = names.linked(listed(cell.source), path)
        for data in (o.data for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})):
            data['text/markdown'] = names.linked(''.join(data['text/markdown']), path)
        cells.append(cell)
    nb.cells = cells
    return nb


def process(folder):
    "The notebooks as the site shows them, and the files beside them, in a folder."
    source, names = get_config().nbs_path, Names(nbglob(as_path=True).sorted())
    for path in [*nbglob(file_glob='', as_path=True), source/'_quarto.yml']:
        to = folder/path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.ipynb': write_nb(page(path, names), to)
        elif path.suffix != '.py': shutil.copyfile(path, to)
    return names


# TeX spaces `log x`, `|x|` and `-1` after a bracket or a sign in its own way; the converter leaves it to the browser, which does not.
spacing = [
    ('<mi>(log|exp)</mi>', r'<mo form="prefix" lspace=".17em" rspace=".17em">\1</mo>'),
    ('<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;'),
    (r'(<mo[^>]*>(?:&#x00028;|\(|\[|&#x0002C;|&#x0003D;)</mo>)<mo>&#x02212;', r'\1<mo form="prefix">&#x02212;')]


def mathml(found):
    "A formula that every browser draws by itself, in place of one that waits for a script from the network."
    tex = re.sub(r'\\mathrm\{(\w)\}', r'\\text{\1}', unescape(found[2]))
    formula = convert(tex, display='block' if found[1] == 'display' else 'inline')
    for pattern, instead in spacing: formula = re.sub(pattern, instead, formula)
    return formula


def drawn(found):
    "A picture that is read from files in the repository, drawn in the page itself: its parts are links, its colours the page's."
    files = re.findall(r'(?:src|srcset)="([^"]+\.svg)"', found[0])
    drawings = [(get_config().nbs_path/o).read_text(encoding='utf-8').replace('.ipynb"', '.html"') for o in files]
    return f'<span class="drawings">{"".join(drawings)}</span>'


def finish(out, names):
    "The built site made to work from a folder, without network: formulas are MathML, the index of the search is a script."
    for path in names.modules:
        to = out/path.relative_to(get_config().nbs_path).with_suffix('.html')
        text = linked_code(to.read_text(encoding='utf-8'), names.imported(path))
        text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', mathml, text, flags=re.S)
        text = re.sub(r'<picture>.*?</picture>', drawn, text, flags=re.S)
        text = re.sub(r'<(?:link|script)[^>]*"https?://[^"]*(?:katex|mathjax|polyfill)[^>]*>(?:</script>)?', '', text, flags=re.I)
        to.write_text(text, encoding='utf-8')
    for path in out.rglob('*.css'):  # a theme's fonts
        style = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'@import\s+url\(["\']?https?:[^)]*\);?', '', style), encoding='utf-8')
    index = (out/'search.json').read_text(encoding='utf-8')
    (out/'search.js').write_text(f'window.searchIndex = {index};\n', encoding='utf-8')
    return out


def renderer():
    "The command that turns processed notebooks into a site: Quarto where it is installed, smalldocs otherwise; None without both."
    if shutil.which('quarto'): return ['quarto', 'render', '--no-cache']
    smalldocs = Path(sys.executable).parent/'smalldocs'
    return [smalldocs, 'render', '--quiet', '--strict'] if smalldocs.exists() else None


def render(folder):
    "The site of the notebooks, made in a folder."
    if not renderer(): sys.exit('the site needs Quarto (https://quarto.org) or, from Python 3.11 on, pip install smalldocs')
    names = process(folder)
    if subprocess.run(renderer(), cwd=folder).returncode: sys.exit(f'{renderer()[0]} finds fault with the site')
    return finish(folder/get_config().doc_path.name, names)


class PageParser(HTMLParser):
    "What the checks look at: ids, links, files that the page loads, and text outside of code and scripts."
    aside = {'code', 'pre', 'script', 'style', 'annotation'}

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.text, self.depth = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if 'id' in found: self.ids.append(found['id'])
        address = found.get('href', found.get('xlink:href'))
        if tag == 'a' and address: self.links.append(address)
        elif tag != 'a' and address and found.get('rel') != 'canonical': self.loads.append(address)
        self.loads += [found[o] for o in ('src', 'poster', 'data') if found.get(o)]
        self.loads += [o.split()[0] for o in found.get('srcset', '').split(',') if o.strip()]
        self.depth += tag in self.aside

    def handle_endtag(self, tag): self.depth -= tag in self.aside

    def handle_data(self, data):
        if not self.depth: self.text.append(data)


def faults(out):
    "What is wrong in a built site, one line each: links and pictures to nothing, what needs the network, raw Markdown and formulas."
    home, repository = (website()[o].rstrip('/') for o in ('site-url', 'repo-url'))
    pages = {o: PageParser(o.read_text(encoding='utf-8')) for o in sorted(out.rglob('*.html'))}
    found = [] if pages else [f'{out}: no pages']
    for path in out.rglob('*.css'):
        loads = re.findall(r'url\(["\']?(https?:[^)]*)\)', path.read_text(encoding='utf-8'))
        found += [f'{path.relative_to(out)}: needs the network for {o}' for o in loads]
    for path, page in pages.items():
        name, text = path.relative_to(out), ''.join(page.text)
        found += [f'{name}: {o} is there twice' for o in {o for o in page.ids if page.ids.count(o) > 1}]
        found += [f'{name}: needs the network for {o}' for o in page.loads if urlsplit(o).scheme in ('http', 'https')]
        found += [f'{name}: raw Markdown or formula: {o}' for o in re.findall(r'\]\([^)\n]*\)|\$\$.*|\\[a-zA-Z(\[].*|:::.*|\{#.*', text)]
        for link in page.links + page.loads:
            file = re.match(rf'{re.escape(repository)}/(?:blob|tree)/main/([^#?]*)', link)
            if file and not (get_config().config_path/unquote(file[1])).exists(): found.append(f'{name}: {link} is not in the repository')
            link = os.path.relpath(out, path.parent) + link[len(home):] if link.startswith(home) else link
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target/'index.html'
            if not target.exists(): found.append(f'{name}: {link} leads nowhere')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f'{name}: {link} leads to no place on its page')
    return found


def build(to):
    "The site, in `_docs` or the folder `to`."
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        site = render(Path(folder)/'site')
        if to.exists(): shutil.rmtree(to)
        shutil.move(site, to)
    print(f'the site is in {to}, built in {time.time() - start:.0f} s: open {to/"index.html"}')


def unclear(names):
    "Names in the texts of the notebooks that a reader could take for two things, one line each."
    texts = [(p, c.source) for p in names.modules for c in read_nb(p).cells if c.cell_type == 'markdown']
    return [f'{p.name}: `{o}` is on two pages, link it to one' for p, text in texts for o in names.doubtful(text, p)]


def check():
    "Every page is built from its notebook, no option is unknown, no link leads nowhere, no name means two things, nothing needs the network."
    if not renderer(): return print('the site is not checked: smalldocs needs Python 3.11')
    found = unclear(Names(nbglob(as_path=True).sorted()))
    with tempfile.TemporaryDirectory() as folder: found += faults(render(Path(folder).resolve()/'site'))
    if found: sys.exit('\n'.join([*found, f'{len(found)} faults in the site']))
    print('no fault in the site')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest='action', required=True)
    builder = actions.add_parser('build', help='the site')
    builder.add_argument('--to', type=Path, default=get_config().doc_path, help='folder of the site (%(default)s)')
    actions.add_parser('check', help='links, options, Markdown, formulas')
    actions.add_parser('readme', help='README.md from the index page').add_argument('--check', action='store_true')
    args = parser.parse_args()
    if args.action == 'readme': write_readme(args.check)
    elif args.action == 'build': build(args.to)
    else: check()


if __name__ == '__main__': main()
