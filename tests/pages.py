"The notebooks as the style and layering tests see them: cells, exported cells, public symbols. Nothing is imported or run."
import ast
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

root = Path(__file__).resolve().parents[1]


@dataclass
class Cell:
    kind: str
    source: str
    outputs: list = field(default_factory=list)

    @property
    def flags(self):
        "Words after `#|`."
        return {o[2:].strip().split(':')[0].split()[0] for o in self.source.splitlines() if re.match(r'#\|\s*\w', o)}

    @property
    def exported(self): return self.kind == 'code' and bool(self.flags & {'export', 'exports', 'exporti'})

    @property
    def code(self):
        "Source without `#|` lines at the top and without IPython's own syntax, line numbers kept."
        lines = ['' if re.match(r'\s*[%!]|#\|', o) else o for o in self.source.splitlines()]
        return '\n'.join(lines)

    @cached_property
    def tree(self): return ast.parse(self.code if self.kind == 'code' else '')

    @cached_property
    def names(self):
        "Every name and attribute that the cell's code mentions."
        nodes = list(ast.walk(self.tree))
        return {o.id for o in nodes if isinstance(o, ast.Name)} | {o.attr for o in nodes if isinstance(o, ast.Attribute)}

    @cached_property
    def definitions(self):
        "Public functions, classes and patched methods that the cell defines at its top level."
        kinds = ast.FunctionDef, ast.ClassDef
        return [o for o in self.tree.body if isinstance(o, kinds) and not o.name.startswith('_')]

    @cached_property
    def lines(self): return len([o for o in self.source.splitlines() if not o.startswith('#|')])

    @cached_property
    def assertions(self): return sum(map(is_assertion, ast.walk(self.tree)))


def is_assertion(node):
    "True for `assert`, and for a call of test_eq, torch.testing.assert_close, pytest.raises, ExceptionExpected and their like."
    if isinstance(node, ast.Assert): return True
    if not isinstance(node, ast.Call): return False
    name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
    return bool(re.match(r'(test|assert)_\w+$|raises$|ExceptionExpected$|expect_fail$', name))


@dataclass
class Page:
    path: Path

    @property
    def name(self): return self.path.stem

    @property
    def number(self): return int(self.name[:2]) if self.name[:2].isdigit() else None

    @cached_property
    def cells(self):
        raw = json.loads(self.path.read_text(encoding='utf-8'))['cells']
        return [Cell(o['cell_type'], ''.join(o['source']), o.get('outputs', [])) for o in raw if ''.join(o['source']).strip()]

    @cached_property
    def code(self): return [o for o in self.cells if o.kind == 'code']

    @cached_property
    def text(self): return [o for o in self.cells if o.kind == 'markdown']

    @cached_property
    def exported(self): return [o for o in self.cells if o.exported]

    @cached_property
    def symbols(self):
        "(position of the cell, node) of every public function, class and patched method."
        return [(i, node) for i, o in enumerate(self.cells) if o.exported for node in o.definitions]

    @cached_property
    def module(self):
        found = [re.search(r'#\|\s*default_exp\s+(\S+)', o.source) for o in self.code]
        return next((o[1] for o in found if o), None)


every = [Page(o) for o in sorted((root/'nbs').rglob('*.ipynb')) if not any(p.startswith(('.', '_')) for p in o.parts)]
pages = [o for o in every if o.module]
