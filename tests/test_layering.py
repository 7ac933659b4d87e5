"A page builds on the pages before it, and on nothing else."
import ast
import sys

import pytest
from pages import pages, root

modules = {o.module: o for o in pages}
by_name = dict(argnames='page', argvalues=pages, ids=[o.name for o in pages])
data = {'toy', 'coco', 'transforms', 'loader'}


def imports(tree):
    "(module, imported names) of every import in `tree`, wherever it stands; our own modules as `.name`."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((own(a.name), []) for a in node.names)
        if isinstance(node, ast.ImportFrom):
            names = [a.name for a in node.names]
            base = '.' + (node.module or '') if node.level else own(node.module)
            if base == '.': yield from (('.' + o, [o]) for o in names)
            else: yield base, names


def own(module):
    "`scratchdet.boxes` and `.boxes` are the same."
    return '.' + module.partition('.')[2] if module.split('.')[0] == 'scratchdet' else module


def test_the_notebooks_are_found(): assert len(pages) >= 22 and len(modules) == len(pages)


@pytest.mark.parametrize(**by_name)
def test_imports_point_to_lower_numbers(page):
    assert page.exported
    for cell in page.exported:
        for name, _ in imports(cell.tree):
            if not name.startswith('.') or name == '.__version__': continue
            below = modules[name[1:]]
            assert below.number < page.number, f'{page.name} imports from {below.name}'


@pytest.mark.parametrize(**by_name)
def test_no_star_imports(page):
    found = [o for cell in page.cells if cell.kind == 'code' for o in imports(cell.tree)]
    assert found and not [name for name, names in found if '*' in names]


def test_the_detector_knows_no_data_and_no_accelerate():
    parts = [o for o in pages if 19 <= o.number <= 52]
    assert len(parts) >= 11
    for page in parts:
        names = {name for cell in page.exported for name, _ in imports(cell.tree)}
        assert not names & {'.' + o for o in data}, page.name
        assert not [o for o in names if o.split('.')[0] == 'accelerate'], page.name


@pytest.mark.parametrize(**by_name)
def test_every_import_is_used(page):
    tree = ast.parse((root/'scratchdet'/f'{page.module}.py').read_text(encoding='utf-8'))
    bound = {a.asname or a.name.split('.')[0] for o in ast.walk(tree) if isinstance(o, (ast.Import, ast.ImportFrom))
             for a in o.names}
    used = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)}
    assert not bound - used


def test_third_party_imports_are_required():
    "What a module imports at once; what a function alone imports is optional, and there for its tests."
    lines = {o.partition(' = ')[0]: o.lower() for o in (root/'settings.ini').read_text().splitlines()}
    at_once, later = set(), set()
    for tree in (cell.tree for page in pages for cell in page.exported):
        inside = {id(o) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for o in ast.walk(f)}
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
            (later if id(node) in inside else at_once).update(name.split('.')[0] for name, _ in imports(node))
    def others(names): return {{'PIL': 'pillow'}.get(o, o) for o in names if o and o not in sys.stdlib_module_names}
    assert 'torch' in at_once and 'trackio' in later
    assert not [o for o in others(at_once) if o not in lines['requirements']]
    assert not [o for o in others(later) if o not in lines['requirements'] + lines['dev_requirements']]
