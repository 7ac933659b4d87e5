"The tutorials, followed as a reader follows them: every command and every cell in order, as written, in an empty folder."
import re
import subprocess
import sys

import pytest
from pages import every, root

from scratchdet.coco import coco_split, load_index

tutorials = [o for o in every if o.path.parent.name == 'tutorials']
each = pytest.mark.parametrize('page', tutorials, ids=[o.name for o in tutorials])


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(root/'tools')
    import notebooks
    return notebooks


def commands(page, notebooks): return [text for o in page.text for kind, text in notebooks.fences(o.source) if kind == 'bash']


def test_they_are_found(): assert len(tutorials) >= 5


@each
def test_no_command_escapes(page, notebooks):
    "What looks like a command is fenced as `bash`, and run, or as `sh`, and says at once what it needs."
    for cell in page.text:
        found = notebooks.fences(cell.source)
        assert len(re.findall('^ *(```|~~~)', cell.source, flags=re.M)) == 2 * len(found), cell.source
        for kind, text in found:
            assert kind in ('bash', 'sh', 'text', 'csv', 'json'), kind
            if kind == 'sh': assert text.startswith('# needs '), text
            lines = text.strip().splitlines() if kind == 'bash' else []
            failing = [i for i, o in enumerate(lines) if o.startswith('!')]  # bash ignores its status, unless it is the last
            assert not failing or len(failing) == 1 and all(o.endswith('\\') for o in lines[failing[0]:-1]), text
            if kind in ('text', 'csv', 'json'): assert not re.search(r'^(\$ |python|accelerate|pip|bash|make|sbatch|recipes/)', text, flags=re.M), text
        prose = re.sub('^```.*?^```', '', cell.source, flags=re.S | re.M)
        assert not re.search(r'^( {4}|\t)\S|^\$ ', prose, flags=re.M), cell.source
    assert commands(page, notebooks)


@each
def test_tutorials_export_nothing(page): assert not page.module and not page.exported


@pytest.mark.long
@each
def test_commands_and_cells_run_as_written(page):
    command = [sys.executable, 'tools/notebooks.py', 'try', '--commands', str(page.path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_for_coco_takes_a_part_of_it(notebooks, coco_mini, tmp_path, monkeypatch):
    "The fence that needs COCO, as written, with a small one in its place."
    page, = [o for o in tutorials if o.name == '03_coco_subset']
    found = [text for o in page.text for kind, text in notebooks.fences(o.source) if kind == 'sh' and '--out coco-500' in text]
    assert len(found) == 1
    (tmp_path/'coco').symlink_to(coco_mini.resolve())
    monkeypatch.chdir(tmp_path)
    notebooks.run_command(found[0])
    index = load_index(*coco_split(tmp_path/'coco-500', 'train'))
    assert len(index) == min(500, len(load_index(*coco_split(coco_mini, 'train')))) > 0


def test_a_command_that_fails_stops_the_reader(notebooks, tmp_path, monkeypatch):
    "A text with two blocks and what follows: a failing line is an error with its output, a fence of `sh` is left alone."
    import nbformat
    text = nbformat.v4.new_markdown_cell
    def follow(*cells):
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), tmp_path/'a.ipynb')
        return notebooks.run(tmp_path/'a.ipynb', commands=True)[0]
    made = text('Text.\n\n```bash\nmkdir made\necho 3 > made/file\n```\n\n```sh\n# needs a GPU\nexit 7\n```')
    read = nbformat.v4.new_code_cell("#| slow\nprint(open('made/file').read())")
    assert notebooks.shown(follow(made, read))[0][1] == '3'
    with pytest.raises(RuntimeError, match='(?s)fails with code 3.*gone wrong'):
        follow(text('```bash\necho gone wrong >&2; (exit 3)\necho not reached\n```'))
    assert not (tmp_path/'made').exists() and not (root/'made').exists()
