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


@pytest.fixture
def own(tmp_path, monkeypatch):
    "What the page on one's own data defines before its table, in an empty folder, and a function that makes a data set of a table."
    page, = [o for o in tutorials if o.name == '02_own_data']
    monkeypatch.chdir(tmp_path)
    defined = {}
    for word in ('own = Path', 'def photo', 'def gridded', 'def read_table', 'def to_coco'):
        cell, = [o for o in page.code if word in o.source]
        exec(cell.source, defined)
    table = tmp_path/'own/labels.csv'

    def make(*lines, encoding='utf-8'):
        table.write_bytes('\n'.join(['file,x1,y1,x2,y2,label', *lines]).encode(encoding))
        defined['to_coco'](table, tmp_path/'own/coco', train=tmp_path/'own/photos', val=tmp_path/'own/photos')
        return load_index(*coco_split(tmp_path/'own/coco', 'train'))

    return defined, make


good = 'desk_0.jpg,94,28,129,55,cup'


def test_a_label_table_becomes_boxes(own):
    "A pixel over the edge is rounding, as for the check; names of any script, with and without the mark of UTF-8."
    edge = 'desk_1.jpg,-1,0,161,121,чашка '  # a space behind is none of the label
    for encoding in ('utf-8', 'utf-8-sig'):
        index = own[1](good, edge, encoding=encoding)
        assert list(index.names) == ['cup', 'чашка'] and index.target(0)['boxes'].tolist() == [[94, 28, 129, 55]]


@pytest.mark.parametrize('lines, encoding, says', [
    ([good, 'desk_1.jpg,25,54,162,91,cup'], 'utf-8', 'line 3: 25,54,162,91 leaves desk_1.jpg, which is 160 x 120 px: correct the corners'),
    ([good, '', 'desk_1.jpg,25,54,71,122,cup'], 'utf-8', 'line 4: 25,54,71,122 leaves desk_1.jpg'),
    (['desk_1.jpg,-2,54,71,91,cup'], 'utf-8', 'line 2: -2,54,71,91 leaves'),
    (['desk_1.jpg,25,54,inf,91,cup'], 'utf-8', 'line 2: 25,54,inf,91 leaves'),
    ([good, '', 'desk_1.jpg,71,54,25,91,cup'], 'utf-8', 'line 4: desk_1.jpg,71,54,25,91,cup is not file,x1'),
    ([good, 'desk_1.jpg,25,54,71,91,cup, small'], 'utf-8', 'line 3: desk_1.jpg,25,54,71,91,cup'),
    ([good, 'desk_1.jpg,25,54,71,91'], 'utf-8', 'line 3: desk_1.jpg,25,54,71,91,'),
    ([good, 'desk_9.jpg,25,54,71,91,cup'], 'utf-8', "line 3: 'desk_9.jpg' is not in "),
    ([good, 'desk_1.jpg,25,54,71,91,tasse à café', 'é'], 'latin-1', 'line 3: it is not UTF-8: save the table as "CSV UTF-8"'),
    ([good], 'utf-16', 'line 1: it is not UTF-8')])
def test_a_wrong_label_table_is_told_with_file_and_line(own, tmp_path, lines, encoding, says):
    with pytest.raises(ValueError, match=rf'own/labels\.csv, {re.escape(says)}') as e: own[1](*lines, encoding=encoding)
    assert type(e.value) is ValueError and not (tmp_path/'own/coco').exists()


def test_a_table_without_boxes_or_with_another_head_is_told(own, tmp_path):
    read, table = own[0]['read_table'], tmp_path/'own/labels.csv'
    with pytest.raises(ValueError, match='labels.csv: no line follows the first'): own[1]()
    for head, found in (('file;x1;y1', 'file;x1;y1'), ('file,x1,y1,x2,y2', 'file,x1,y1,x2,y2'), ('', 'empty')):
        table.write_text(head)
        with pytest.raises(ValueError, match=f'its first line is not file,x1,y1,x2,y2,label but {found}$'): read(table)


def test_a_table_that_is_not_there_is_told(own):
    with pytest.raises(FileNotFoundError, match='own/lables.csv does not exist: write it, or correct its name$'): own[0]['read_table']('own/lables.csv')


def test_titles_of_the_grid_are_in_the_picture(own):
    fig = own[0]['fig']
    titles = [ax.title.get_window_extent() for ax in fig.axes]
    assert len(titles) == 2 and all(o.y1 < fig.bbox.y1 and fig.bbox.x0 < o.x0 < o.x1 < fig.bbox.x1 for o in titles)


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
