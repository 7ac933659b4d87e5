"The rules of a page that can be counted: size of cells and functions, text between code, examples, assertions, docments, outputs."
import ast
import base64
import re
from fnmatch import fnmatch

import pytest
from pages import Cell, every, pages, root

each = pytest.mark.parametrize('page', pages, ids=[o.name for o in pages])
any_page = pytest.mark.parametrize('page', every, ids=[o.name for o in every])


def words(text):
    "Words of a text cell; formulas, code blocks and tables are not read as words."
    text = re.sub(r'\$\$.*?\$\$|```.*?```|^\|.*$', ' ', text, flags=re.S | re.M)
    return sum(bool(re.search(r'\w', o)) for o in re.sub(r'\$[^$]+\$', 'x', text).split())


def functions(page):
    "Every function and method of the exported cells."
    found = [o for cell in page.exported for o in ast.walk(cell.tree) if isinstance(o, ast.FunctionDef)]
    return found or pytest.fail('exports no function')


@any_page
def test_title_and_subtitle(page):
    first = page.cells[0]
    assert first.kind == 'markdown' and re.match(r'# \S.*\n+> \S', first.source)
    if page.module: assert page.name[3:] == page.module and 'default_exp' in page.cells[1].source


@each
def test_one_public_symbol_in_a_cell(page):
    assert page.symbols
    assert not [o.definitions for o in page.exported if len(o.definitions) > 1]


@each
def test_exported_cells_are_short(page):
    assert page.exported
    assert not [(o.lines, o.source) for o in page.exported if o.lines > 30]


@each
def test_functions_are_short(page):
    assert not [(o.name, o.end_lineno - o.lineno + 1) for o in functions(page) if o.end_lineno - o.lineno >= 40]


@each
def test_number_of_cells(page): assert 25 <= len(page.cells) <= 80


@any_page
def test_lines_fit_the_page(page):
    lines = [line for o in page.code for line in o.source.splitlines()]
    assert lines or page.name == 'index'
    assert not [o for o in lines if len(o) > 110]


@any_page
def test_text_cells_hold_one_idea(page):
    assert page.text
    assert not [(words(o.source), o.source) for o in page.text if words(o.source) > 60]


@each
def test_enough_text(page):
    assert page.code and len(page.text) >= .4 * len(page.code)


@each
def test_a_sentence_between_exports(page):
    pairs = list(zip(page.cells, page.cells[1:]))
    assert pairs and not [b.source for a, b in pairs if a.exported and b.exported]


@each
def test_one_import_cell(page):
    cells = [[type(n) for n in o.tree.body] for o in page.exported]
    assert cells and sum(bool(o) and set(o) <= {ast.Import, ast.ImportFrom} for o in cells) <= 1


@each
def test_symbols_are_used_at_once(page):
    assert page.symbols
    after = {node.name: page.cells[i+1:i+5] for i, node in page.symbols}
    idle = [name for name, cells in after.items()
            if not any(name in o.names or name == 'forward' and o.kind == 'code' for o in cells)]
    assert not idle


@each
def test_symbols_are_asserted(page):
    tests = [o for o in page.code if o.assertions and not o.exported]
    named = {name for o in tests for name in o.names} | {'forward'}
    assert tests and not [node.name for _, node in page.symbols if node.name not in named]
    assert sum(o.assertions for o in tests) >= 3 * len({node.name for _, node in page.symbols})


def comment(lines, number):
    "The comment at the end of a line."
    return lines[number-1].partition('#')[2].strip()


def undocumented(node, lines):
    "Parameters and return of a function that have no docment of their own."
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    args = [o for o in args if o and o.arg not in ('self', 'cls')]
    places = [o.lineno for o in args]
    missing = [o.arg for o in args if places.count(o.lineno) > 1 or not comment(lines, o.lineno) or '|' in comment(lines, o.lineno)]
    own = [o for o in ast.walk(node) if isinstance(o, ast.Return) and o.value is not None]
    nothing = isinstance(node.returns, ast.Constant) and node.returns.value is None
    if own and not nothing and node.name not in ('__init__', '__post_init__'):
        text = comment(lines, node.returns.end_lineno) if node.returns else ''
        if not text or '|' in text: missing.append('return')
    return missing


def documented(node):
    "The functions, and the fields of a dataclass or NamedTuple, that need docments in a public definition."
    if isinstance(node, ast.FunctionDef): return [node], []
    public = [o for o in node.body if isinstance(o, ast.FunctionDef) and (o.name == '__init__' or not o.name.startswith('_'))]
    return public, [o for o in node.body if isinstance(o, ast.AnnAssign)]


@each
def test_docments(page):
    assert page.symbols
    missing = []
    for i, node in page.symbols:
        lines = page.cells[i].code.splitlines()
        defs, fields = documented(node)
        missing += [f'{node.name}.{f.name}: {o}' for f in defs for o in undocumented(f, lines)]
        missing += [f'{node.name}.{f.target.id}' for f in fields if not comment(lines, f.lineno)]
    assert not missing


@each
def test_docstrings_are_one_line(page):
    assert page.symbols
    texts = {node.name: ast.get_docstring(node) for _, node in page.symbols}
    assert not [name for name, text in texts.items() if not text or '\n' in text]


def pictures(page):
    return [base64.b64decode(''.join(o['data']['image/png'])) for c in page.code for o in c.outputs
            if 'image/png' in o.get('data', {})]


@any_page
def test_pictures_and_pages_are_small(page):
    size = page.path.stat().st_size
    assert 0 < size <= 400_000
    assert not [len(o) for o in pictures(page) if len(o) > 60_000]


def test_pages_have_pictures(): assert sum(bool(pictures(o)) for o in pages) >= len(pages) / 2 > 0


draws = re.compile(r'\b(torch\.(rand|randn|randint|randperm|rand_like|randn_like|normal|bernoulli)\(|np\.random\.(?!default_rng))'
                   r'|\.(normal_|uniform_|random_)\(')
seeds = re.compile(r'manual_seed\(|generator\s*=|default_rng\(|np\.random\.seed\(|\bseed\s*=|set_seed\(')


def test_random_numbers_are_seeded_where_they_are_drawn():
    cells = [(page.name, o.source) for page in every for o in page.code if not o.exported and draws.search(o.source)]
    assert cells
    assert not [o for o in cells if not seeds.search(o[1])]


@any_page
def test_outputs_are_saved(page):
    shown = [o for o in page.code if o.outputs]
    assert len(shown) >= (3 if page.module else 1)


def outside_of_functions(tree):
    "The nodes that run when the cell runs."
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)): continue
        yield node
        yield from outside_of_functions(node)


def promised(cell):
    "What a cell must show: 'text' where it prints or ends with a value, 'picture' where it makes a figure that it does not close."
    calls = {ast.unparse(o.func) for o in outside_of_functions(cell.tree) if isinstance(o, ast.Call)}
    last = cell.tree.body[-1] if cell.tree.body else None
    value = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call) and not cell.source.rstrip().endswith(';')
    drawn = calls & {'plt.subplots', 'plt.figure'} and 'close' not in cell.names
    return {k for k, v in dict(text=value or 'print' in calls, picture=drawn).items() if v}


def test_what_a_cell_promises():
    for code, kinds in (('x = 1', ''), ('x', 'text'), ('x;', ''), ('f(x)', ''), ('for i in x: print(i)', 'text'), ('def f(): print(1)', ''),
                        ('fig, ax = plt.subplots()', 'picture'), ('fig = plt.figure()\nplt.close(fig)', '')):
        assert promised(Cell('code', code)) == set(kinds.split())


@any_page
def test_no_cell_lacks_its_output(page):
    cells = [(o, promised(o)) for o in page.code if not o.exported and not o.flags & {'hide', 'eval'}]
    assert cells or page.name == 'index'
    for cell, kinds in cells:
        shown = {'picture' if 'image/png' in o.get('data', {}) else 'text' for o in cell.outputs}
        assert kinds <= shown, cell.source


def test_hidden_cells_are_plumbing():
    "Imports and settings of the environment; what is shown or tested is not hidden. The front page, which is README.md too, makes tables."
    hidden = [(page.name, o) for page in every for o in page.code if 'hide' in o.flags]
    assert hidden
    plain = ast.Import, ast.ImportFrom, ast.Assign
    assert not [(name, type(n)) for name, o in hidden for n in o.tree.body if name != 'index' and not isinstance(n, plain)]
    assert not [name for name, o in hidden if o.assertions or o.outputs]


@any_page
def test_outputs_are_clean(page):
    outputs = [o for c in page.code for o in c.outputs]
    assert outputs
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    texts = [''.join(o.get('text', o.get('data', {}).get('text/plain', ''))) for o in outputs]
    assert not [o for o in texts if re.search(r'(^|[\s\'"(])/(home|root|tmp|usr|Users|private|var|mnt|work)\b', o)]


def test_every_page_is_in_the_sidebar():
    text = (root/'_quarto.yml').read_text(encoding='utf-8').partition('sidebar:')[2]
    listed = re.findall(r'[\w/*]+\.ipynb', text)
    pages = [str(o.path.relative_to(root/'nbs')) for o in every]
    matches = [sum(fnmatch(page, o) for o in listed) for page in pages]
    assert len(pages) >= 26 and set(matches) == {1}
    assert not [o for o in listed if '*' not in o and o not in pages]
